"""The kernels' tiles: what may be tried in place of each choice, and that a launch obeys it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import vgpo_kernels as vgpo
from vgpo_kernels import _tuning

pytest.importorskip("triton")

from vgpo_kernels import _compile
from vgpo_kernels._triton import target_of
from vgpo_kernels.attention.triton.dkdv import PADDED_TILE
from vgpo_kernels.vocabulary import triton as vocabulary_kernels

CONFIGS = _tuning.configs()
CASES = {case.name: case for case in _compile.all_cases()}
PAIRS = [(kernel, target) for kernel in CONFIGS for target in _compile.TARGETS]


@pytest.mark.parametrize(("kernel", "target"), PAIRS)
def test_candidates_name_what_the_kernel_takes(kernel: str, target: str) -> None:
    config = CONFIGS[kernel]
    case, candidates = CASES[config.case], config.candidates[target]
    assert 3 <= len(candidates) <= 6
    assert len({tuple(sorted(tiles.items())) for tiles in candidates}) == len(candidates)
    expected = set(case.chosen(target)).difference(_tuning.LAUNCH_OPTIONS)
    assert expected <= set(case.kernel.arg_names)
    for tiles in candidates:
        assert set(tiles).difference(_tuning.LAUNCH_OPTIONS) == expected
        assert all(value > 0 and value & (value - 1) == 0 for name, value in tiles.items() if "BLOCK" in name)
        # Whole tiles are cut into those that an interval crosses; padding goes up to whole blocks of queries.
        for axis in "MN":
            assert tiles.get(f"BLOCK_{axis}", 0) % tiles.get(f"CUT_{axis}", 1) == 0
        if "backward" in kernel and "BLOCK_M" in tiles:
            assert PADDED_TILE.value % tiles["BLOCK_M"] == 0


@pytest.mark.parametrize("target", _compile.TARGETS)
def test_keys_of_the_backward_are_padded_to_whole_tiles(target: str) -> None:
    # dK and dV's blocks are what the weights of keys are padded to, and dQ's narrow tiles read them without a mask.
    blocks, cuts = (
        {tiles[name] for tiles in (CASES[CONFIGS[kernel].case].chosen(target), *CONFIGS[kernel].candidates[target])}
        for kernel, name in (("attention dkdv", "BLOCK_N"), ("attention dq", "CUT_N"))
    )
    assert all(block % cut == 0 for block in blocks for cut in cuts)


def attention_inputs(device: str, dtype: torch.dtype, length: int = 150) -> tuple[tuple[Tensor, ...], Tensor]:
    """Returns q, k and v of more than a tile of most sizes and no multiple of one, and which keys are visual."""
    q, k, v = (torch.randn(1, heads, length, 16).to(device, dtype) for heads in (2, 1, 1))
    return (q, k, v), (torch.arange(length, device=device) % 40 < 25)[None]


def mass(device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    (q, k, _), visual = attention_inputs(device, dtype)
    lse = torch.full((1, 2, 150), 6.0, device=device)
    return (vgpo.attention_mass(q, k, lse, visual.int(), 2, impl="triton"),)


def column(device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    (q, k, _), visual = attention_inputs(device, dtype)
    lse = torch.full((1, 2, 150), 6.0, device=device)
    return (vgpo.attention_column_sum(q, k, lse, visual, impl="triton"),)


def forward(device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    qkv, visual = attention_inputs(device, dtype)
    return tuple(vgpo.visual_attention(*qkv, visual, impl="triton"))


def backward(device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    qkv, visual = attention_inputs(device, dtype, 70)
    leaves = [x.requires_grad_() for x in qkv]
    found = vgpo.visual_attention(*leaves, visual, impl="triton")
    return torch.autograd.grad((found.out, found.visual_mass), leaves, (leaves[0].detach(), found.lse.detach()))


def split(device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    (q, k, v), visual = attention_inputs(device, dtype)
    return tuple(vgpo.visual_attention(q[:, :, -1:], k, v, visual, impl="triton"))


def focus(device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    states = torch.randn(2, 70, 264).to(device, dtype)
    visual = (torch.arange(70, device=device) < 30).expand(2, 70)
    return (vgpo.visual_focus_score(states, visual, ~visual, impl="triton"),)


def weights(device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    focus = torch.rand(3, 270).to(device, dtype).float()
    mask = torch.arange(270, device=device) < torch.tensor([[270], [1], [259]], device=device)
    groups = torch.tensor([0, 0, 1], device=device)
    found = vgpo.vgpo_weights(focus, mask, groups, config=vgpo.VGPOConfig.balanced(), impl="triton")
    return found.token_weights, found.trajectory_weights


def linear(device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    hidden, weight = torch.randn(1, 70, 72).to(device, dtype), torch.randn(300, 72).to(device, dtype) / 8
    targets = torch.arange(70, device=device)[None]
    return tuple(vgpo.linear_logprobs(hidden, weight, targets, entropy=True, impl="triton"))


def logits(device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    values = torch.randn(1, 3, 20_003).to(device, dtype)
    targets = torch.tensor([[0, 17, 20_002]], device=device)
    old = torch.full((1, 3), -10.0, device=device)
    gradient = torch.empty_like(values)
    row = torch.ones(1, 3, device=device)
    found = vocabulary_kernels.logits_loss(
        values, targets, None, old, row, None, row, 1.0, None, vgpo.PolicyLossConfig(), gradient
    )
    return *found, gradient


CALLS: dict[str, Callable[[str, torch.dtype], tuple[Tensor, ...]]] = {
    "attention mass": mass,
    "attention column": column,
    "attention forward": forward,
    "attention dkdv": backward,
    "attention dq": backward,
    "attention preprocess": backward,
    "attention split": split,
    "focus prototype": focus,
    "focus cosine": focus,
    "weights token": weights,
    "weights group": weights,
    "linear logprobs": linear,
    "logits": logits,
}


def test_every_kernel_has_a_call() -> None:
    assert set(CALLS) == set(CONFIGS)


@pytest.mark.parametrize("kernel", CONFIGS)
def test_candidates_give_what_the_choice_gives(kernel: str, device: str) -> None:
    def run() -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        return CALLS[kernel](device, torch.float16)

    expected = run()
    candidates = CONFIGS[kernel].candidates[target_of(expected[0])]
    # One that cuts the work differently: warps and stages are nothing to the interpreter.
    tiles = max(candidates, key=lambda tiles: _difference(tiles, CASES[CONFIGS[kernel].case].chosen("sm_90")))
    with _tuning.chosen_tiles(kernel, tiles):
        found = run()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)


def _difference(tiles: dict[str, int], chosen: dict[str, int]) -> int:
    return sum(chosen[name] != value for name, value in tiles.items() if name not in _tuning.LAUNCH_OPTIONS)


@pytest.mark.parametrize("kernel", CONFIGS)
def test_a_launch_takes_the_forced_tiles_or_raises(kernel: str, device: str) -> None:
    with (
        _tuning.chosen_tiles(kernel, {"BLOCK_OF_MARBLE": 16, "num_warps": 4}),
        pytest.raises(ValueError, match=f"tiles of '{kernel}': expected .*, got BLOCK_OF_MARBLE"),
    ):
        CALLS[kernel](device, torch.float16)


def test_an_unknown_kernel_raises() -> None:
    with pytest.raises(ValueError, match=r"kernel: expected one of 'attention mass', .*, got 'attention of a whale'"):
        _tuning.chosen_tiles("attention of a whale", {}).__enter__()


@pytest.fixture
def tiles_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[str, int]]:
    """The choice of a kernel that is in the package during a test."""
    monkeypatch.setattr(_tuning, "_configs", dict(CONFIGS))

    @_tuning.tunable("marble", case="none", candidates={})
    def marble_tiles() -> dict[str, int]:
        """Cut with care."""
        return {"BLOCK": 64, "num_warps": 4}

    return marble_tiles


def test_tiles_are_forced_inside_the_context_only(tiles_of: Any) -> None:
    with _tuning.chosen_tiles("marble", {"BLOCK": 16}):
        assert tiles_of() == {"BLOCK": 16}
        with _tuning.chosen_tiles("marble", {"BLOCK": 32, "maxnreg": 128}):
            assert tiles_of() == {"BLOCK": 32, "maxnreg": 128}
        assert tiles_of() == {"BLOCK": 16}
    assert tiles_of() == {"BLOCK": 64, "num_warps": 4}
    with pytest.raises(RuntimeError), _tuning.chosen_tiles("marble", {"BLOCK": 16}):
        raise RuntimeError
    assert tiles_of() == {"BLOCK": 64, "num_warps": 4}


def test_a_launch_cannot_change_what_is_forced(tiles_of: Any) -> None:
    with _tuning.chosen_tiles("marble", {"BLOCK": 16}):
        tiles_of()["BLOCK"] = 8
        assert tiles_of() == {"BLOCK": 16}


def test_the_choice_keeps_its_name_and_docstring(tiles_of: Any) -> None:
    assert (tiles_of.__name__, tiles_of.__doc__) == ("marble_tiles", "Cut with care.")


@pytest.mark.usefixtures("tiles_of")
def test_two_choices_of_one_kernel_raise() -> None:
    with pytest.raises(ValueError, match="kernel: 'marble' has its tiles already"):
        _tuning.tunable("marble", case="none", candidates={})


def test_a_table_of_candidates() -> None:
    assert _tuning.listed("BLOCK maxnreg", (16, None), (32, 128)) == ({"BLOCK": 16}, {"BLOCK": 32, "maxnreg": 128})
    with pytest.raises(ValueError, match="zip"):
        _tuning.listed("BLOCK maxnreg", (16,))
