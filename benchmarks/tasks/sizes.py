"""The sizes that are measured: the paper's models on a GPU, and what ends in minutes on two CPU cores."""

from typing import Any, NamedTuple

from benchmarks.harness.cases import OURS, Case

HEAD_DIM, VOCABULARY = 128, 152_064


class Model(NamedTuple):
    """The sizes of a language model that matter here: query heads, key heads, width of its states."""

    heads: int
    kv_heads: int
    hidden: int


MODELS = {"7B": Model(28, 4, 3584), "32B": Model(40, 8, 5120), "72B": Model(64, 8, 8192)}
# Model, rows B, prompt P, visual tokens V of it, completion R.
PAPER = (
    ("7B", 8, 1536, 1024, 2560),
    ("7B", 8, 2048, 1536, 6144),
    ("32B", 8, 1024, 256, 4096),
    ("32B", 8, 4096, 3584, 4096),
    ("72B", 4, 4096, 3584, 8192),
)
# What a sweep holds while one of its sizes varies, and the values of each.
LENGTHS, VISUAL, ROWS, WORDS = (
    (512, 2048, 8192, 32_768),
    (256, 1024, 4096, 16_384),
    (1, 4, 16),
    (8192, 32_768, VOCABULARY),
)


def sizes(model: str, B: int, P: int, V: int, R: int, **others: Any) -> dict[str, Any]:
    """Returns the sizes of a model's rows, by name; `others` come on top or in their place."""
    heads, kv_heads, hidden = MODELS[model]
    return {
        **{"B": B, "P": P, "V": V, "R": R, "heads": heads, "kv_heads": kv_heads},
        **{"D": HEAD_DIM, "hidden": hidden, "vocabulary": VOCABULARY},
        **others,
    }


def paper_cases() -> list[Case]:
    """Returns the five cases of the paper's models; the first is what a GPU runs by default."""
    cases = []
    for number, (model, B, P, V, R) in enumerate(PAPER, 1):
        name = f"{number}: {model}, B {B}, P {P} ({V} visual), R {R}"
        levels = ("small", "paper") if number == 1 else ("paper",)
        cases.append(Case(name, levels, sizes(model, B, P, V, R), kind="cuda"))
    # Two cores can be asked for them, too; they take hours.
    return cases + [Case(case.name, ("paper",), case.sizes, kind="cpu") for case in cases]


def small(name: str, *, tiny: dict[str, Any], **sizes_of_cpu: Any) -> list[Case]:
    """Returns a case for CPUs, and its likeness that ends in a moment, sizes of which are in `tiny`."""
    return [
        Case(name, ("small",), sizes_of_cpu, kind="cpu"),
        Case("tiny", ("tiny",), sizes_of_cpu | tiny),
    ]


def sweep(
    axis: str,
    values: tuple[int, ...],
    *,
    cpu: dict[str, Any],
    gpu: dict[str, Any],
    varies: str | None = None,
    providers: tuple[str, ...] = (OURS,),
) -> list[Case]:
    """Returns the cases in which one size varies, small ones for CPUs and the paper's for GPUs.

    Args:
        axis: what the size is called in tables.
        values: of it.
        cpu, gpu: the sizes that are held.
        varies: the size's own name, where it is another.
        providers: those that are swept.
    """
    return [
        Case(f"{axis} {value}", (level,), held | {varies or axis: value}, (axis, value), kind, providers)
        for kind, level, held in (("cpu", "small", cpu), ("cuda", "paper", gpu))
        for value in values
    ]
