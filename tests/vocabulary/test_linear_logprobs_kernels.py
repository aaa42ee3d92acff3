"""Log-probs, LSE and entropy of the kernel against float64; plain torch in fp32, from the same inputs, sets the budget.

Logits are never rounded to half precision, so that fp16 and bf16 inputs get no larger a budget than fp32.
"""

import importlib
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from vgpo_kernels.testing import assert_error_budget
from vgpo_kernels.vocabulary.backend import Head

pytest.importorskip("triton")

logprobs = importlib.import_module("vgpo_kernels.vocabulary.triton.logprobs")

ON_GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]


class Case(NamedTuple):
    hidden: Tensor
    index: tuple[Tensor, ...]
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    temperature: float = 1.0
    softcap: float | None = None


def case(
    tokens: int,
    width: int,
    vocabulary: int,
    dtype: torch.dtype,
    device: str,
    *,
    bias: bool = False,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Case:
    hidden = torch.randn(2, tokens, width).to(dtype)
    # Every other token of two rows, in an order of no kind, the first one twice.
    index = (torch.arange(tokens) % 2, torch.randperm(tokens))
    for axis in index:
        axis[-1] = axis[0]
    weight = (torch.randn(vocabulary, width) * 2 / width**0.5).to(dtype)
    b = torch.randn(vocabulary).to(dtype).to(device) if bias else None
    targets = torch.randint(0, vocabulary, (tokens,))
    targets[0], targets[-1] = 0, vocabulary - 1
    index = tuple(axis.to(device) for axis in index)
    return Case(hidden.to(device), index, weight.to(device), b, targets.to(device), temperature, softcap)


def dense(given: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Returns logps, LSE and entropy from logits in `dtype`."""
    z = given.hidden[given.index].to(dtype) @ given.weight.to(dtype).T
    if given.bias is not None:
        z = z + given.bias.to(dtype)
    if given.softcap is not None:
        z = given.softcap * torch.tanh(z / given.softcap)
    log_p = (z / given.temperature).log_softmax(-1)
    # A probability of 0 adds nothing, though its logarithm is -inf.
    entropy = -torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p).sum(-1)
    return log_p.gather(-1, given.targets[:, None])[:, 0], (z / given.temperature).logsumexp(-1), entropy


def run(given: Case, *, entropy: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    head = Head(given.weight, given.bias, given.temperature, given.softcap)
    return logprobs.linear_logprobs(given.hidden, given.index, head, given.targets, entropy)


def check(given: Case) -> None:
    found = run(given)
    for name, *values in zip(
        ("logps", "lse", "entropy"), found, dense(given, torch.float32), dense(given, torch.float64), strict=True
    ):
        assert values[0].dtype == torch.float32
        assert_error_budget(name, *values)


@pytest.fixture
def wide_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes a vocabulary of 150,000 in few, wide tiles."""
    if not ON_GPU:
        tiles = {"BLOCK_M": 16, "BLOCK_N": 8192, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}
        monkeypatch.setattr(logprobs, "linear_tiles", lambda *_args, **_flags: tiles)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "width", "vocabulary"),
    [
        (1, 1, 2),  # the least there can be
        (5, 7, 33),  # odd rows: no vector loads, less than a tile each way
        (70, 72, 301),  # vectors, one whole tile of the width and a rest, odd vocabulary, more than a block of fp32
        (300, 64, 256),  # more tokens than the largest block, whole tiles of width and vocabulary
    ],
)
def test_sizes(tokens: int, width: int, vocabulary: int, dtype: torch.dtype, device: str) -> None:
    check(case(tokens, width, vocabulary, dtype, device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{"temperature": 0.6}, {"softcap": 3.0}, {"bias": True}])
def test_options(options: dict[str, float | bool], dtype: torch.dtype, device: str) -> None:
    check(case(20, 40, 205, dtype, device, **options))  # a rest of the width, two tiles of the vocabulary and a rest


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 9])  # rows at whole 16 bytes and at none
def test_everything_at_once(width: int, dtype: torch.dtype, device: str) -> None:
    check(case(20, width, 205, dtype, device, temperature=1.7, softcap=5.0, bias=True))


@pytest.mark.parametrize("vocabulary", [151936, 152064, 50257])  # Qwen's, padded two ways; GPT-2's, which is odd
@pytest.mark.usefixtures("wide_tiles")
def test_whole_vocabularies(vocabulary: int, device: str) -> None:
    check(case(3, 16, vocabulary, torch.float32, device))
    check(case(3, 16, vocabulary, DTYPES[-1], device, temperature=0.8, softcap=4.0, bias=True))


def test_entropy_is_only_made_when_asked_for(device: str) -> None:
    given = case(9, 16, 140, torch.float32, device)
    *without, nothing = run(given, entropy=False)
    assert nothing is None
    for plain, beside in zip(without, run(given)[:2], strict=True):
        assert torch.equal(plain, beside)


def one_hot(logits: Tensor, dtype: torch.dtype, device: str) -> Case:
    """Returns a case of one token whose logits are these."""
    hidden = torch.zeros(1, 8)
    hidden[0, 3] = 1.0
    weight = torch.randn(logits.shape[0], 8)
    weight[:, 3] = logits
    return Case(
        hidden.to(dtype).to(device),
        (torch.zeros(logits.shape[0], dtype=torch.int64, device=device),),
        weight.to(dtype).to(device),
        None,
        torch.arange(logits.shape[0], device=device),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_probabilities_near_1_and_0(dtype: torch.dtype, device: str) -> None:
    given = one_hot(torch.tensor([0.0, 12.0, -3.0, -80.0]), dtype, device)
    logps, lse, entropy = run(given)
    exact = dense(given, torch.float64)
    # The error stays at the rounding of a sum near 1, though the LSE is 12.
    torch.testing.assert_close(logps.double(), exact[0], rtol=1e-6, atol=2e-7)
    torch.testing.assert_close(lse.double(), exact[1], rtol=2e-7, atol=0)
    torch.testing.assert_close(entropy.double(), exact[2], rtol=0, atol=2e-7)


@pytest.mark.parametrize("size", [1e3, 3e4])
def test_huge_logits(size: float, device: str) -> None:
    # Half a unit below the largest, and far away on both sides.
    given = one_hot(torch.tensor([size, size - 0.5, 0.0, -size, size - 2.0]), torch.float32, device)
    check(given)
    logps = run(given)[0]
    torch.testing.assert_close(logps[[0, 1, 4]].double(), dense(given, torch.float64)[0][[0, 1, 4]], rtol=0, atol=1e-6)


def test_words_of_no_probability(device: str) -> None:
    given = case(6, 16, 300, torch.float32, device, bias=True)
    # Single words, and all of the first tile.
    given.bias[torch.tensor([130, 140, 299])] = -torch.inf
    given.bias[:128] = -torch.inf
    given.targets[0], given.targets[1] = 130, 200
    check(given)
    assert run(given)[0][0] == -torch.inf


def test_nothing_but_words_of_no_probability(device: str) -> None:
    given = case(3, 16, 20, torch.float32, device, bias=True)
    given.bias.fill_(-torch.inf)
    assert all(x.isnan().all() for x in run(given))


def test_an_infinite_state_is_its_own_tokens_affair(device: str) -> None:
    given = case(6, 16, 140, torch.float32, device)
    given = given._replace(index=(torch.zeros_like(given.targets), torch.arange(6, device=device)))
    expected = run(given)
    given.hidden[0, 2] = torch.nan
    given.hidden[0, 4, 5] = torch.inf
    broken = torch.tensor([False, False, True, False, True, False], device=device)
    for before, after in zip(expected, run(given), strict=True):
        assert after[broken].isnan().all()
        assert torch.equal(before[~broken], after[~broken])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pitch", [24, 21])  # whole vectors and none
def test_tensors_are_read_where_they_lie(pitch: int, dtype: torch.dtype, device: str) -> None:
    given = case(20, 16, 150, dtype, device, bias=True)
    hidden = torch.full((20, 4, pitch), torch.nan, dtype=dtype, device=device)
    weight = torch.full((150, pitch), torch.nan, dtype=dtype, device=device)
    bias = torch.full((150, 3), torch.nan, dtype=dtype, device=device)
    # Between other columns, rows in another order, every second of them.
    strided = hidden.transpose(0, 1)[1:3, :, :16]
    strided.copy_(given.hidden)
    weight[:, :16], bias[:, 1] = given.weight, given.bias
    found = run(given._replace(hidden=strided, weight=weight[:, :16], bias=bias[:, 1]))
    for plain, elsewhere in zip(run(given), found, strict=True):
        torch.testing.assert_close(elsewhere, plain, rtol=1e-6, atol=1e-6)


def test_columns_apart_are_copied(device: str) -> None:
    given = case(5, 16, 40, torch.float32, device)
    hidden, weight = given.hidden.mT.contiguous().mT, given.weight.T.contiguous().T
    for plain, apart in zip(run(given), run(given._replace(hidden=hidden, weight=weight)), strict=True):
        assert torch.equal(plain, apart)


def test_states_that_begin_off_a_vector(device: str) -> None:
    given = case(5, 16, 40, torch.float16, device)
    memory = torch.zeros(given.hidden.numel() + 1, dtype=torch.float16, device=device)
    moved = memory[1:].view_as(given.hidden).copy_(given.hidden)
    check(given._replace(hidden=moved))


@pytest.mark.parametrize("shape", [(12,), (3, 4), (2, 3, 2)])
def test_any_number_of_leading_dimensions(shape: tuple[int, ...], device: str) -> None:
    given = case(12, 16, 40, torch.float32, device)
    states = given.hidden[0].reshape(*shape, 16)
    index = tuple(axis.to(device) for axis in (torch.rand(shape) < 0.6).nonzero(as_tuple=True))
    assert index[0].numel()
    check(given._replace(hidden=states, index=index, targets=given.targets[: index[0].numel()]))


def test_more_rows_than_a_grid_axis_holds(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not ON_GPU:  # fewer programs for the interpreter
        tiles = {"BLOCK_M": 1024, "BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}
        monkeypatch.setattr(logprobs, "linear_tiles", lambda *_args, **_flags: tiles)
    check(case(70_000, 3, 5, torch.float32, device))


@pytest.mark.parametrize("target", [-1, -100, 40, 127, 2**31, 2**32 + 3, -(2**62)])
def test_a_target_out_of_range_is_nan_and_reads_nothing(target: int, device: str) -> None:
    given = case(5, 16, 40, torch.float32, device)
    expected = run(given)
    given.targets[2] = target
    logps, lse, entropy = run(given)
    assert logps.isnan().tolist() == [False, False, True, False, False]
    kept = ~logps.isnan()
    assert torch.equal(logps[kept], expected[0][kept])
    assert torch.equal(lse, expected[1])
    assert torch.equal(entropy, expected[2])


def test_no_tokens(device: str) -> None:
    given = case(2, 16, 40, torch.float32, device)
    none = given._replace(index=tuple(axis[:0] for axis in given.index), targets=given.targets[:0])
    assert [x.shape for x in run(none)] == [(0,)] * 3
    assert run(none, entropy=False)[2] is None


def test_bit_identical_from_run_to_run(device: str) -> None:
    given = case(40, 24, 500, DTYPES[-1], device, temperature=0.9, bias=True)
    for first, second in zip(run(given), run(given), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("group", [1, 2, 3, 5])  # one block, groups with a smaller one last, one group
@pytest.mark.parametrize("tiles", [1, 2, 4])  # a part a tile, a smaller part last, one part
def test_any_cut_covers_everything(group: int, tiles: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "cut", lambda *_: (group, tiles))
    small = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(logprobs, "linear_tiles", lambda *_args, **_flags: small)
    check(case(75, 16, 55, torch.float32, device))  # five blocks, four tiles


@pytest.mark.parametrize("target", logprobs.MULTIPROCESSORS)
@pytest.mark.parametrize("tokens", [1, 129, 2048, 20_480, 70_000])
@pytest.mark.parametrize(("vocabulary", "width"), [(5, 3), (151_936, 896), (152_064, 8192)])
def test_the_cut_keeps_a_gpu_busy(tokens: int, vocabulary: int, width: int, target: str) -> None:
    tiles = logprobs.linear_tiles(2, target, unit=8, softcap=False)
    group, tiles_per_split = logprobs.cut(tokens, vocabulary, width * 2, tiles["BLOCK_M"], tiles["BLOCK_N"], target)
    blocks, columns = -(-tokens // tiles["BLOCK_M"]), -(-vocabulary // tiles["BLOCK_N"])
    assert 1 <= group <= blocks
    assert group == 1 or group * tiles["BLOCK_M"] * width * 2 <= logprobs.GROUP_BYTES
    splits = -(-columns // tiles_per_split)
    assert (splits - 1) * tiles_per_split < columns, "a part is empty"
    programs = logprobs.MULTIPROCESSORS[target]
    rounds = -(-blocks * splits // programs)
    # Of the rounds' time, how much is work; a vocabulary of one tile leaves no choice.
    assert columns == 1 or blocks * columns / (programs * rounds * tiles_per_split) > 0.8


@pytest.mark.skipif(ON_GPU, reason="a GPU runs its own tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("target", logprobs.MULTIPROCESSORS)
def test_tiles_of_every_target(target: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "target_of", lambda _: target)
    check(case(140, 72, 270, dtype, "cpu", softcap=6.0))  # more than one tile each way, all with a rest
