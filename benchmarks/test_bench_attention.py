"""Attention toward visual tokens: mass and column sums given the LSE, attention that returns the mass, its backward."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import peers
import pytest
import torch
from room import IMPL, OURS, PLAIN, Case, Provider, Room, Work, half_on_gpu, ours_of
from sizes import LENGTHS, ROWS, VISUAL, paper_cases, sizes, small, sweep
from torch import Tensor

import vgpo_kernels

# Those that take any mask, or say that they do not.
ANY_MASK = (OURS, PLAIN, "two LSEs, torch", "FlexAttention", "eager map")
TINY = {"B": 2, "P": 24, "V": 16, "R": 24, "heads": 4, "kv_heads": 2, "D": 32}


class Attention(NamedTuple):
    """The inputs of every room here; R queries of the completion (all tokens where rows are packed) on P + R keys."""

    q: Tensor  # (B, Hq, Lq, D)
    k: Tensor  # (B, Hkv, L, D)
    v: Tensor  # (B, Hkv, L, D)
    lse: Tensor | None  # (B, Hq, Lq) fp32, where the task is given it
    segment_ids: Tensor  # (B, L) int32, which image a key belongs to, or -1
    visual_mask: Tensor  # (B, L) bool
    sequences: Tensor  # (B, L) int32, which packed sequence a token belongs to, -1 for padding
    grad_out: Tensor | None  # (B, Hq, Lq, D)
    grad_mass: Tensor | None  # (B, Hq, Lq) fp32
    num_segments: int
    images: list[tuple[int, int]]  # the keys of each image, where all rows have them at the same places
    masks: dict[str, Tensor]  # arguments of our functions
    prepared: dict[str, Any]  # what is made once a batch, or once a forward


def attention_inputs(case: Case, device: torch.device, *, whole: bool = False, gradients: bool = False) -> Attention:
    """Returns random q, k and v; with `whole` every token is a query, else those of the completion.

    "packed": three sequences in one row; "left_padded": row b begins with b * P // 8 tokens of padding; "images": how
    many images share the visual tokens.
    """
    torch.manual_seed(0)
    dtype, packed = half_on_gpu(device), case.sizes.get("packed", False)
    B, P, V, R, D = (case[name] for name in ("B", "P", "V", "R", "D"))
    count, images = 3 if packed else 1, case.sizes.get("images", 1)
    length = count * (P + R)
    queries = length if whole or packed else R

    def heads(number: int, tokens: int) -> Tensor:
        return torch.randn(B, tokens, number, D, device=device, dtype=dtype).transpose(1, 2)

    q, k, v = heads(case["heads"], queries), heads(case["kv_heads"], length), heads(case["kv_heads"], length)
    place = torch.arange(length, device=device).expand(B, length)
    sequences, segment_ids = (place // (P + R)).int(), place % (P + R) * max(images, 1) // V
    masks = {}
    if packed:
        masks["cu_seqlens"] = torch.arange(count + 1, device=device, dtype=torch.int32) * (P + R)
    if case.sizes.get("left_padded"):
        masks["key_mask"] = place >= torch.arange(B, device=device)[:, None] * P // 8
        sequences = sequences.masked_fill(~masks["key_mask"], -1)
    segment_ids = segment_ids.masked_fill((segment_ids >= images) | (sequences < 0), -1).int()
    lse = None if whole else vgpo_kernels.attention_with_lse(q, k, k, **masks)[1]
    places = [] if masks else [(i * V // images, (i + 1) * V // images) for i in range(images)]
    grads = (None, None)
    if gradients:
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        grads = heads(case["heads"], queries), torch.randn(B, case["heads"], queries, device=device)
    rest = (segment_ids, segment_ids >= 0, sequences, *grads, max(images, 1), places, masks, {})
    return Attention(q, k, v, lse, *rest)


def visible_pairs(case: Case, *, whole: bool) -> tuple[float, float]:
    """Returns, over all rows, how many (query, key) pairs there are, and how many with a visual key."""
    B, P, V, R = (case[name] for name in ("B", "P", "V", "R"))
    V = V if case.sizes.get("images", 1) else 0
    total = visual = 0
    for row in range(B):
        hidden = row * P // 8 if case.sizes.get("left_padded") else 0
        length, seen = P + R - hidden, max(V - hidden, 0)
        # Causal: all tokens on all, less the prompt's tokens on the prompt where only completions ask.
        total += length * (length + 1) // 2 - (0 if whole else (P - hidden) * (P - hidden + 1) // 2)
        visual += R * seen + ((P - hidden - seen) * seen + seen * (seen + 1) // 2 if whole else 0)
    count = 3 if case.sizes.get("packed") else 1
    return count * total, count * visual


def work_of(case: Case, *, passes: float, whole: bool, visual_only: bool) -> Work:
    """Counts `passes` products of D a pair of query and key, and one read of q and the keys, one write a query."""
    whole = whole or bool(case.sizes.get("packed"))
    pairs = visible_pairs(case, whole=whole)[visual_only]
    B, P, V, R, D = (case[name] for name in ("B", "P", "V", "R", "D"))
    count = 3 if case.sizes.get("packed") else 1
    queries, keys = count * B * (P + R if whole else R), count * B * (V if visual_only else P + R)
    itemsize = half_on_gpu(torch.device(case.kind or "cpu")).itemsize
    # Mass and column sums read k; attention reads k and v and writes its output.
    states = case["heads"] * queries + case["kv_heads"] * keys
    moved = states * D * itemsize * (1 if visual_only else 2) + case["heads"] * queries * 8
    return Work(2.0 * passes * D * case["heads"] * pairs, moved)


def map_bytes(case: Case) -> float:
    """Returns what an eager map takes: scores, mask and probabilities at once."""
    count = 3 if case.sizes.get("packed") else 1
    tokens = count * (case["P"] + case["R"])
    return 12.0 * case["B"] * case["heads"] * tokens * (tokens if count > 1 else case["R"])


def whole_map_bytes(case: Case) -> float:
    return 12.0 * case["B"] * case["heads"] * (case["P"] + case["R"]) ** 2


def not_side_by_side(case: Case) -> str | None:
    """Returns why a second stock attention cannot give the visual LSE."""
    if case.sizes.get("packed") or case.sizes.get("left_padded"):
        return "visual keys lie at other places in each row"
    return None if case.sizes.get("images", 1) else "there is no visual key"


def masked(case: Case) -> str | None:
    return "takes no padding and no packed rows" if not_side_by_side(case) and case.sizes.get("images", 1) else None


def edge_cases() -> list[Case]:
    """Returns unusual rows: padding, packing, several images or none, other head sizes, few queries on many keys."""
    kinds = {
        "packed rows": {"B": 1, "packed": True},
        "left padding": {"left_padded": True},
        "two images": {"images": 2},
        "no image": {"images": 0},
        "D 64": {"D": 64},
        "D 96": {"D": 96},
    }
    few = sizes("7B", 1, 16_320, 16_000, 64)
    cases = [("64 queries on 16,384 keys", few, few | {"B": 8})]
    tiny = []
    for name, extra in kinds.items():
        cpu, gpu = sizes("7B", 2, 256, 192, 384) | extra, sizes("7B", 8, 1536, 1024, 2560) | extra
        cases.append((name, cpu, gpu))
        tiny.append(Case(f"tiny, {name}", ("tiny",), cpu | TINY | extra, providers=ANY_MASK))
    for name, cpu, gpu in cases:
        tiny += [
            Case(name, ("small",), cpu, kind="cpu", providers=ANY_MASK),
            Case(name, ("paper",), gpu, kind="cuda", providers=ANY_MASK),
        ]
    return tiny


def sweeps(*axes: str, providers: tuple[str, ...] = (OURS,)) -> list[Case]:
    """Returns one sweep for each axis: T tokens of a completion, V visual tokens, B rows."""
    cpu = sizes("7B", 1, 1024, 1024, 1024, heads=1, kv_heads=1)
    gpu = sizes("7B", 1, 1024, 1024, 2560)
    found = {
        "T": sweep("T", LENGTHS, cpu=cpu, gpu=gpu, varies="R", providers=providers),
        # The image fills the prompt.
        "V": [replace(case, sizes={**case.sizes, "P": case["V"]}) for case in sweep("V", VISUAL, cpu=cpu, gpu=gpu)],
        "B": sweep("B", ROWS, cpu=cpu, gpu=gpu),
    }
    return [case for axis in axes for case in found[axis]]


def mass(given: Attention, impl: str | None) -> Tensor:
    q, k, lse = given.q, given.k, given.lse
    return vgpo_kernels.attention_mass(q, k, lse, given.segment_ids, given.num_segments, impl=impl, **given.masks)


def two_lse(backend: str | None) -> Callable[[Attention], Tensor]:
    return lambda given: peers.two_lse_mass(given.q, given.k, given.lse, given.images, backend)


def flex_mass(given: Attention) -> Tensor:
    """FlexAttention's LSE over the keys of each image, with keys for values, less the LSE over all."""
    masses = []
    for segment in range(given.num_segments):
        if segment not in given.prepared:
            visual = given.segment_ids == segment
            given.prepared[segment] = peers.flex_mask(given.sequences, given.q.shape[2], visual)
        _, lse = peers.flex(given.q, given.k, given.k, given.prepared[segment])
        masses.append((lse - given.lse).exp())
    return torch.stack(masses, -1)


def eager_mass(given: Attention) -> tuple[Tensor, ...]:
    return given.q, given.k, given.sequences, given.segment_ids, given.num_segments


MASS = Room(
    "attention mass, given the LSE",
    cases=[
        *small("7B, B 1, P 1024 (1024 visual), R 1024", tiny=TINY, **sizes("7B", 1, 1024, 1024, 1024)),
        *paper_cases(),
        *edge_cases(),
        *sweeps("T", "V", "B", providers=(OURS, "two LSEs, torch")),
    ],
    inputs=attention_inputs,
    providers={
        **ours_of(mass),
        "two LSEs, torch": Provider(two_lse(None), obstacle=not_side_by_side),
        "two LSEs, flash-attn 2": Provider(
            two_lse("flash_attn_2"), needs=("flash_attn",), gpu=True, obstacle=not_side_by_side
        ),
        "two LSEs, flash-attn 3": Provider(
            two_lse("flash_attn_3"), needs=("flash_attn_interface",), gpu=True, obstacle=not_side_by_side
        ),
        "FlexAttention": Provider(flex_mass, gpu=True, compiled=True),
        "eager map": Provider(lambda given: peers.eager_mass(*eager_mass(given)), extra_bytes=map_bytes),
        "eager map, torch.compile": Provider(
            lambda given: peers.compiled(peers.eager_mass)(*eager_mass(given)),
            compiled=True,
            extra_bytes=map_bytes,
            obstacle=peers.no_compiler,
        ),
    },
    work=lambda case: work_of(case, passes=1, whole=False, visual_only=True),
)


@pytest.mark.room(MASS)
def test_attention_mass(entry):
    entry.measure()


def column_sum(given: Attention, impl: str | None) -> Tensor:
    q, k, lse = given.q, given.k, given.lse
    return vgpo_kernels.attention_column_sum(q, k, lse, given.visual_mask, impl=impl, **given.masks)


def eager_column_sum(given: Attention) -> tuple[Tensor, ...]:
    return given.q, given.k, given.sequences, given.visual_mask


COLUMN = Room(
    "attention column sum, given the LSE",
    cases=[
        *small("7B, B 1, P 1024 (1024 visual), R 1024", tiny=TINY, **sizes("7B", 1, 1024, 1024, 1024)),
        *paper_cases(),
        *sweeps("T", "V"),
    ],
    inputs=attention_inputs,
    providers={
        **ours_of(column_sum),
        "flash-colreduce": Provider(
            # It returns sums in the queries' dtype.
            lambda given: peers.colreduce(given.q, given.k, given.visual_mask),
            needs=("flash_colreduce",),
            gpu=True,
            obstacle=masked,
        ),
        "eager map": Provider(lambda given: peers.eager_column_sum(*eager_column_sum(given)), extra_bytes=map_bytes),
        "eager map, torch.compile": Provider(
            lambda given: peers.compiled(peers.eager_column_sum)(*eager_column_sum(given)),
            compiled=True,
            extra_bytes=map_bytes,
            obstacle=peers.no_compiler,
        ),
    },
    work=lambda case: work_of(case, passes=1, whole=False, visual_only=True),
)


@pytest.mark.room(COLUMN)
def test_attention_column_sum(entry):
    entry.measure()


def of_completion(given: Attention, visual_mass: Tensor) -> Tensor:
    """Returns the mass at the completion's queries, which is what scores need and all that some providers give."""
    return visual_mass[..., given.prepared["prompt"] :]


def whole_inputs(case: Case, device: torch.device) -> Attention:
    given = attention_inputs(case, device, whole=True)
    given.prepared["prompt"] = case["P"]
    return given


def fused(given: Attention, impl: str | None) -> tuple[Tensor, Tensor]:
    found = vgpo_kernels.visual_attention(given.q, given.k, given.v, given.visual_mask, impl=impl)
    return found.out, of_completion(given, found.visual_mass)


def stock_and_mass(given: Attention) -> tuple[Tensor, Tensor]:
    """The fastest stock kernel at hand, and our mass from its LSE."""
    out, lse = vgpo_kernels.attention_with_lse(given.q, given.k, given.v)
    asked = (given.prepared["prompt"], given.q.shape[2])
    return out, vgpo_kernels.attention_mass(given.q, given.k, lse, given.segment_ids, 1, query_range=asked, impl=IMPL)[
        ..., 0
    ]


def flex_output(given: Attention) -> tuple[Tensor, Tensor]:
    queries = given.q.shape[2]
    if "masks" not in given.prepared:
        wanted = (None, given.visual_mask)
        given.prepared["masks"] = [peers.flex_mask(given.sequences, queries, visual) for visual in wanted]
    everything, visual = given.prepared["masks"]
    out, lse = peers.flex(given.q, given.k, given.v, everything)
    _, visual_lse = peers.flex(given.q, given.k, given.k, visual)
    return out, of_completion(given, (visual_lse - lse).exp())


def eager_output(given: Attention, run: Callable[..., Any] = peers.eager_output) -> tuple[Tensor, Tensor]:
    out, visual_mass = run(given.q, given.k, given.v, given.sequences, given.visual_mask)
    return out, of_completion(given, visual_mass)


FORWARD = Room(
    "attention with LSE and mass",
    cases=[
        *small("7B, B 1, P 512 (512 visual), R 512", tiny=TINY, **sizes("7B", 1, 512, 512, 512)),
        *paper_cases(),
        *sweeps("T"),
    ],
    inputs=whole_inputs,
    providers={
        **ours_of(fused),
        "vgpo_kernels, mass after a stock kernel": Provider(stock_and_mass, "ours"),
        "stock kernel, no mass": Provider(
            lambda given: vgpo_kernels.attention_with_lse(given.q, given.k, given.v), "bound"
        ),
        "FlexAttention, twice": Provider(flex_output, gpu=True, compiled=True),
        "eager map": Provider(eager_output, extra_bytes=whole_map_bytes),
        "eager map, torch.compile": Provider(
            lambda given: eager_output(given, peers.compiled(peers.eager_output)),
            compiled=True,
            extra_bytes=whole_map_bytes,
            obstacle=peers.no_compiler,
        ),
    },
    work=lambda case: work_of(case, passes=2, whole=True, visual_only=False),
)


@pytest.mark.room(FORWARD)
def test_attention_with_mass(entry):
    entry.measure()


def backward(name: str, forward: Callable[[Attention], tuple[Tensor, ...]], *, of_mass: bool = True):
    """Returns the gradients of q, k and v; the forward runs once, before anything is timed."""

    def run(given: Attention) -> tuple[Tensor, ...]:
        key = (name, id(given.q))
        if key not in given.prepared:
            given.prepared[key] = forward(given)
        outputs = given.prepared[key][: 1 + of_mass]
        wanted = (given.grad_out, given.grad_mass)[: 1 + of_mass]
        return torch.autograd.grad(outputs, (given.q, given.k, given.v), wanted, retain_graph=True)

    return run


def forward_of(impl: str | None) -> Callable[[Attention], tuple[Tensor, ...]]:
    return lambda given: vgpo_kernels.visual_attention(given.q, given.k, given.v, given.visual_mask, impl=impl)[:2]


def eager_forward(given: Attention) -> tuple[Tensor, Tensor]:
    return peers.eager_output(given.q, given.k, given.v, given.sequences, given.visual_mask)


def flex_forward(given: Attention) -> tuple[Tensor, Tensor]:
    given.prepared["prompt"] = 0
    return flex_output(given)


def sdpa_forward(given: Attention) -> tuple[Tensor]:
    options = {"is_causal": True, "enable_gqa": True}
    return (torch.nn.functional.scaled_dot_product_attention(given.q, given.k, given.v, **options),)


BACKWARD = Room(
    "attention backward with a mass gradient",
    cases=[
        *small("7B, B 1, P 256 (256 visual), R 768", tiny=TINY, **sizes("7B", 1, 256, 256, 768)),
        *paper_cases(),
    ],
    inputs=lambda case, device: attention_inputs(case, device, whole=True, gradients=True),
    providers={
        **ours_of(lambda given, impl: backward(impl or "ours", forward_of(impl))(given)),
        "vgpo_kernels, no mass gradient": Provider(backward(IMPL or "ours", forward_of(IMPL), of_mass=False), "bound"),
        "SDPA, no mass gradient": Provider(backward("sdpa", sdpa_forward, of_mass=False), "bound"),
        "FlexAttention, twice": Provider(backward("flex", flex_forward), gpu=True, compiled=True),
        "eager map": Provider(backward("eager", eager_forward), extra_bytes=lambda case: 2 * whole_map_bytes(case)),
    },
    work=lambda case: work_of(case, passes=5, whole=True, visual_only=False),
)


@pytest.mark.room(BACKWARD)
def test_attention_backward(entry):
    entry.measure()
