"""What "ahead" means for each kernel on an H200, and what a file of results says to it."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.result_file import BOUND, HEADLINE, OURS, PEER, Entry, Group, Results

DEVICE = "H200"
MASS, COLUMN = "attention mass, given the LSE", "attention column sum, given the LSE"
FORWARD, BACKWARD = "attention with LSE and mass", "attention backward with a mass gradient"
FOCUS, WEIGHTS, STEP = "focus", "weights", "training step"
LOGITS, LOGPROBS, LOSS = "policy loss of logits", "log-probs of hidden states", "policy loss of hidden states"
# Those that make the logits a second time in the backward, 8MHV operations: all but those that keep them.
RECOMPUTING = r"^(?!.*(dense|eager|compile|whole))"

Measure = Callable[[Group], float | None]


@dataclass(frozen=True)
class Goal:
    """One goal: a figure of a room's cases and its limit; a limit of None is shown and not judged."""

    room: str
    text: str
    measure: Measure
    limit: float | None
    at_least: bool = True
    unit: str = "x"

    def margin(self, value: float) -> float:
        """How far beyond the limit a value is, as a factor; below 1 the goal is missed."""
        if self.limit is None:
            return 1.0
        if self.at_least:
            return value / self.limit
        return self.limit / value if value else math.inf


@dataclass(frozen=True)
class Verdict:
    """What a file says to a goal: the worst value of its cases, None where no case has one.

    Args:
        met: None where the file cannot tell: not measured, or not on the machine the goal is stated for.
    """

    goal: Goal
    value: float | None = None
    case: str = ""
    met: bool | None = None


def fastest(group: Group, pattern: str, *roles: str) -> Entry | None:
    """Returns the fastest entry of these roles whose provider's name matches, in either case of letters."""
    found = (x for x in group.entries if x.role in roles and re.search(pattern, x.provider, re.IGNORECASE))
    return min(found, key=lambda x: x.median, default=None)


def times_faster(pattern: str) -> Measure:
    """How many times longer than ours the fastest of the matching peers takes."""
    return lambda group: group.ratio(fastest(group, pattern, PEER))


def times_faster_than_less(pattern: str) -> Measure:
    """How many times longer than ours the fastest matching entry takes, though it does less."""
    return lambda group: group.ratio(fastest(group, pattern, BOUND))


def times_leaner(pattern: str) -> Measure:
    """How many times the memory of ours the fastest of the matching peers takes."""
    return lambda group: group.memory_ratio(fastest(group, pattern, PEER))


def times_bound(
    bound: str, read: Callable[[Entry], float | None] = lambda x: x.median, ours: str = f"^{HEADLINE}$"
) -> Measure:
    """How many times the seconds, or what else is read, of the fastest matching entry that does less ours takes."""

    def measure(group: Group) -> float | None:
        pair = fastest(group, ours, OURS), fastest(group, bound, BOUND)
        own, least = (read(entry) if entry else None for entry in pair)
        return None if own is None or not least else own / least

    return measure


def of_ours(read: Callable[[Entry], float | None]) -> Measure:
    """A figure of ours alone."""
    return lambda group: read(group.ours) if group.ours else None


def rate_of_products(entry: Entry) -> float | None:
    """TFLOP/s; None where there is nothing to multiply, as without an image."""
    return entry.facts["achieved"]["tflops"] or None


def copy_share(entry: Entry) -> float:
    """The bytes counted a second, of what a large copy moves."""
    return entry.facts["achieved"]["gbs"] / entry.facts["ceilings"]["gbs"]


def allocated(entry: Entry) -> float | None:
    """Peak memory of a step's tensors beyond what lives throughout, exact where a resident set is not."""
    return entry.facts.get("allocated_bytes")


def peak_of_all(entry: Entry) -> float | None:
    """The same with what lives throughout: parameters and the optimizer's moments."""
    extra = allocated(entry)
    return None if extra is None else extra + entry.facts["live_bytes"]


def floats_a_query(entry: Entry) -> float | None:
    """Peak memory in fp32 numbers for each query of each head."""
    queries = entry.facts["shapes"].get("q")
    return entry.memory / (4 * queries[0] * queries[1] * queries[2]) if queries and entry.memory is not None else None


def _most(room: str, text: str, measure: Measure, limit: float | None, unit: str = "x") -> Goal:
    return Goal(room, text, measure, limit, at_least=False, unit=unit)


# The project's own goals, one line for each part of its table "what ahead means (H200, in one run)".
GOALS = (
    Goal(MASS, "at least 1.5x as fast as the two-LSE trick", times_faster(r"two.lse"), 1.5),
    Goal(MASS, "at least 480 TFLOP/s", of_ours(rate_of_products), 480, unit=" TFLOP/s"),
    Goal(MASS, "at least 20x as fast as an eager map", times_faster("eager"), 20),
    _most(MASS, "extra memory O(B H R): in fp32 numbers a query and head", of_ours(floats_a_query), None, ""),
    Goal(COLUMN, "at least 4x as fast as flash-colreduce", times_faster("colreduce"), 4),
    Goal(COLUMN, "at least 2x as fast as any peer that is given the LSE", times_faster("given the LSE"), 2),
    _most(FORWARD, "stock kernel and our mass: at most 1.3x the kernel alone", times_bound("stock", ours="stock"), 1.3),
    Goal(FORWARD, "all-Triton: at least as fast as FlexAttention without mass", times_faster_than_less("flex"), 1),
    _most(BACKWARD, "at most 1.05x the same backward without", times_bound(HEADLINE), 1.05),
    Goal(FOCUS, "at least 85% of a copy's bandwidth", of_ours(copy_share), 0.85, unit=" of a copy"),
    Goal(FOCUS, "at least 1.3x as fast as torch.compile", times_faster("compile"), 1.3),
    _most(WEIGHTS, "at most 2 launches", of_ours(lambda x: x.facts.get("launches")), 2, " launches"),
    Goal(WEIGHTS, "at least 100x as fast as the published loop", times_faster("loop"), 100),
    Goal(LOGITS, "at least 88% of a copy's bandwidth", of_ours(copy_share), 0.88, unit=" of a copy"),
    Goal(LOGITS, "no slower than Liger", times_faster("liger"), 1),
    Goal(LOGITS, "no more memory than Liger", times_leaner("liger"), 1),
    Goal(LOGPROBS, "at least 0.85x as fast as Liger's CuTe forward", times_faster("cute"), 0.85),
    Goal(LOGPROBS, "at least 10x as fast as Liger's Triton", times_faster_than_less("liger(?!.*cute)"), 10),
    Goal(LOSS, "at least 1.2x as fast as the best that recomputes logits", times_faster(RECOMPUTING), 1.2),
    _most(LOSS, "at most 1 GB beyond inputs and gradients", of_ours(lambda x: x.memory and x.memory / 1e9), 1, " GB"),
    _most(STEP, "at most 1.02x the time of the same GRPO step", times_bound("GRPO"), 1.02),
    _most(STEP, "at most 1.02x the memory of the same GRPO step", times_bound("GRPO", peak_of_all), 1.02),
    _most(
        STEP,
        "memory beyond parameters and moments, times that of the GRPO step",
        times_bound("GRPO", allocated),
        None,
    ),
)


def verdicts(results: Results) -> list[Verdict]:
    """Returns what a file says to each goal, the worst first, what it does not say last.

    Only paper cases on the machine that the goals are stated for are judged; elsewhere all cases are shown.
    """
    judged = DEVICE in results.machine["device"]
    groups = [x for x in results.groups if not x.in_sweep and (not judged or "paper" in x.entries[0].facts["levels"])]
    found = [_verdict(goal, [x for x in groups if x.room == goal.room], judged=judged) for goal in GOALS]
    return sorted(found, key=lambda x: (x.value is None, 0 if x.value is None else x.goal.margin(x.value)))


def _verdict(goal: Goal, groups: list[Group], *, judged: bool) -> Verdict:
    measured = [(value, group.case) for group in groups if (value := goal.measure(group)) is not None]
    if not measured:
        return Verdict(goal)
    value, case = min(measured) if goal.at_least else max(measured)
    return Verdict(goal, value, case, goal.margin(value) >= 1 if judged and goal.limit is not None else None)
