"""What the tasks of attention share: rows of a prompt with an image and a completion, and what they count."""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import vgpo_kernels
from benchmarks.harness.cases import OURS, PLAIN, Case, Work, half_on_gpu
from benchmarks.tasks.sizes import LENGTHS, ROWS, VISUAL, sizes, sweep

# Those that take any mask, in every task of attention.
ANY_MASK = (OURS, PLAIN, "eager map")
TINY = {"B": 2, "P": 24, "V": 16, "R": 24, "heads": 4, "kv_heads": 2, "D": 32}


class Attention(NamedTuple):
    """The inputs of every task here; R queries of the completion (all tokens where rows are packed) on P + R keys."""

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
    images: list[list[tuple[int, int]]]  # the keys of each image, by row, or once where they are the same in all rows
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
    # By our own kernel: inputs must not depend on what other backends there are.
    lse = None if whole else vgpo_kernels.attention_with_lse(q, k, k, **masks, backend="vgpo")[1]
    starts = [row * P // 8 for row in range(B)] if "key_mask" in masks else [0]
    places = [[(max(start, i * V // images), (i + 1) * V // images) for i in range(images)] for start in starts]
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
    visual = V if case.sizes.get("images", 1) else 0
    queries, keys = count * B * (P + R if whole else R), count * B * (visual if visual_only else P + R)
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
    if case.sizes.get("packed"):
        return "visual keys of packed rows lie among others"
    return None if case.sizes.get("images", 1) else "there is no visual key"


def masked(case: Case) -> str | None:
    unusual = case.sizes.get("packed") or case.sizes.get("left_padded")
    return "takes no padding and no packed rows" if unusual else None


def edge_cases(providers: tuple[str, ...] = ANY_MASK, *, cpu: bool = False, few: bool = False) -> list[Case]:
    """Returns unusual rows: padding, packing, several images or none, other head sizes.

    Args:
        providers: those that take any mask, or say that they do not.
        cpu: among the small cases of CPUs, too; else tiny, and with the paper's on a GPU.
        few: few queries on many keys, too.
    """
    kinds = {
        "packed rows": {"B": 1, "packed": True},
        "left padding": {"left_padded": True},
        "two images": {"images": 2},
        "no image": {"images": 0},
        "D 64": {"D": 64},
        "D 96": {"D": 96},
    }
    asked = sizes("7B", 1, 16_320, 16_000, 64)
    cases = [("64 queries on 16,384 keys", asked, asked | {"B": 8})] if few else []
    found = []
    for name, extra in kinds.items():
        small, large = sizes("7B", 2, 256, 192, 384) | extra, sizes("7B", 8, 1536, 1024, 2560) | extra
        cases.append((name, small, large))
        found.append(Case(f"tiny, {name}", ("tiny",), small | TINY | extra, providers=providers))
    for name, small, large in cases:
        found += [Case(name, ("small",), small, kind="cpu", providers=providers)] if cpu else []
        found.append(Case(name, ("paper",), large, kind="cuda", providers=providers))
    return found


def sweeps(*axes: str, providers: tuple[str, ...] = (OURS,)) -> list[Case]:
    """Returns one sweep for each axis: T tokens of a completion, V visual tokens, B rows."""
    cpu = sizes("7B", 1, 1024, 1024, 1024, heads=1, kv_heads=1, D=64)
    gpu = sizes("7B", 1, 1024, 1024, 2560)
    found = {
        "T": sweep("T", LENGTHS, cpu=cpu, gpu=gpu, varies="R", providers=providers),
        # The image fills the prompt.
        "V": [replace(case, sizes={**case.sizes, "P": case["V"]}) for case in sweep("V", VISUAL, cpu=cpu, gpu=gpu)],
        "B": sweep("B", ROWS, cpu=cpu, gpu=gpu),
    }
    return [case for axis in axes for case in found[axis]]
