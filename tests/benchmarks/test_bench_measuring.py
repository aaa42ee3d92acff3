"""How entries are held to ours before they are timed, and what is said of those that are not."""

import dataclasses
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.harness import cases
from benchmarks.harness import measure as measuring
from benchmarks.harness.cases import OURS, PLAIN, Case, Provider, Task, Unavailable, Work

CASE = Case("one case", ("small",), {"n": 40})
CPU = torch.device("cpu")


class Given(NamedTuple):
    x: Tensor
    factor: float


def inputs(case: Case, device: torch.device) -> Given:
    return Given(torch.arange(1.0, case["n"] + 1, device=device), 2.0)


def double(given: Given) -> Tensor:
    return given.x * given.factor


@pytest.fixture
def make_task(monkeypatch: pytest.MonkeyPatch):
    """Makes a task that the next test does not see; memory has tests of its own."""
    monkeypatch.setattr(cases, "TASKS", {})
    monkeypatch.setattr(measuring, "_memory", lambda *_: 0)

    def make(**providers: Provider) -> Task:
        named = {{"ours": OURS, "plain": PLAIN}.get(name, name): one for name, one in providers.items()}
        options = {"seconds": 0.001, "work": lambda _: Work(1e6, 1e6)}
        return Task("a task", [CASE], inputs, {OURS: Provider(double, "ours"), **named}, **options)

    return make


def measured(made: Task, **options: bool) -> dict[str, measuring.Outcome]:
    return measuring.measure(made, CASE, list(made.providers), CPU, __name__, **options)


def test_those_that_agree_are_timed_and_described(make_task):
    made = make_task(plain=Provider(lambda g: g.x + g.x, "ours, plain"), sum=Provider(lambda g: g.x + g.x))
    outcomes = measured(made)
    for name, outcome in outcomes.items():
        assert (outcome.wrong, outcome.skipped) == (None, None)
        assert len(outcome.samples) >= made.least
        assert all(seconds > 0 for seconds in outcome.samples)
        assert (outcome.info["task"], outcome.info["case"], outcome.info["provider"]) == ("a task", "one case", name)
        assert (outcome.info["flops"], outcome.info["bytes"], outcome.info["memory"]) == (1e6, 1e6, 0)
        assert outcome.info["roofline"] > 0
    assert [outcomes[name].info["role"] for name in (OURS, PLAIN, "sum")] == ["ours", "ours, plain", "peer"]


@pytest.mark.parametrize(
    "run",
    [
        lambda g: double(g) * 1.001,
        lambda g: double(g)[:-1],
        lambda g: torch.where(g.x == 3, math.nan, double(g)),
        lambda g: (double(g), g.x),
        lambda _: [],
        lambda _: 1 / 0,
    ],
    ids=["a thousandth off", "shorter", "a NaN", "one more", "nothing", "raises"],
)
def test_a_wrong_peer_is_not_timed(make_task, run):
    made = make_task(plain=Provider(double, "ours, plain"), wrong=Provider(run))
    outcomes = measured(made)
    assert outcomes["wrong"].wrong
    assert not outcomes["wrong"].samples
    assert outcomes[OURS].samples
    assert outcomes[PLAIN].samples


def test_ours_is_wrong_where_our_plain_torch_says_so(make_task):
    made = make_task(
        ours=Provider(lambda g: g.x, "ours"),
        plain=Provider(double, "ours, plain"),
        copied=Provider(lambda g: g.x.clone()),
    )
    outcomes = measured(made)
    assert PLAIN in outcomes[OURS].wrong
    assert not outcomes[OURS].samples


def test_ours_is_wrong_if_no_other_agrees(make_task):
    outcomes = measured(make_task(ours=Provider(lambda g: g.x, "ours"), a=Provider(double), b=Provider(double)))
    assert all(outcome.wrong for outcome in outcomes.values())


def test_a_kernel_that_does_not_run_fails_the_case(make_task):
    outcomes = measured(make_task(ours=Provider(lambda _: 1 / 0, "ours"), other=Provider(double)))
    assert all("ZeroDivisionError" in outcome.wrong for outcome in outcomes.values())


def test_bounds_are_not_compared(make_task):
    assert measured(make_task(copy=Provider(lambda g: g.x.clone(), "bound")))["copy"].samples


@pytest.mark.parametrize(
    ("provider", "reason"),
    [
        (Provider(double, needs=("no_such_package",)), "no_such_package is not installed"),
        (Provider(double, gpu=True), "needs a GPU"),
        (Provider(double, extra_bytes=lambda _: 1e18), "takes 1000000000.0 GB"),
        (Provider(double, obstacle=lambda case: f"not {case.name}"), "not one case"),
    ],
)
def test_what_cannot_run_is_skipped_with_its_reason(make_task, provider, reason):
    outcome = measured(make_task(other=provider))["other"]
    assert outcome.skipped.startswith(reason)
    assert not outcome.samples


def test_what_torch_compile_makes_needs_a_compiler_on_a_cpu(make_task, monkeypatch):
    monkeypatch.setattr("benchmarks.harness.cases.shutil.which", lambda _: None)
    assert measured(make_task(other=Provider(double, compiled=True)))["other"].skipped.endswith("needs a C++ compiler")


def test_out_of_memory_is_no_error_of_the_peer(make_task):
    def exhausted(_: Given) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 77 GiB\nmore")

    outcome = measured(make_task(other=Provider(exhausted)))["other"]
    assert outcome.skipped == "out of memory: CUDA out of memory. Tried to allocate 77 GiB"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no memory"), ImportError("no cutlass"), Unavailable("no flash")]
)
def test_ours_is_not_timed_without_a_result_to_hold_it_to(make_task, error):
    def absent(_: Given) -> Tensor:
        raise error

    made = make_task(plain=Provider(absent, "ours, plain"), bound=Provider(double, "bound"))
    assert {name: bool(outcome.samples) for name, outcome in measured(made).items()} == {
        **{OURS: False, PLAIN: False, "bound": True}
    }
    outcome = measuring.measure(made, CASE, [OURS], CPU, __name__)[OURS]
    assert outcome.skipped.startswith(f"nothing to compare with ({PLAIN}: ")
    assert str(error) in outcome.skipped


def test_inputs_that_cannot_be_made_leave_the_case_out(make_task):
    def exhausted(*_: object) -> Given:
        raise torch.OutOfMemoryError("too large")

    outcomes = measured(dataclasses.replace(make_task(other=Provider(double)), inputs=exhausted, name="large"))
    assert {outcome.skipped for outcome in outcomes.values()} == {"out of memory: too large"}


def test_what_is_said_of_one_provider_does_not_take_the_others_along(make_task):
    def details(_: Given, name: str) -> dict:
        return {"length": len(name)} if name == OURS else 1 / 0

    outcomes = measured(dataclasses.replace(make_task(other=Provider(double)), details=details, name="with details"))
    assert outcomes[OURS].info["length"] == len(OURS)
    assert outcomes[OURS].samples
    assert "ZeroDivisionError" in outcomes["other"].wrong


@pytest.mark.parametrize("keeps_forward", [False, True])
def test_a_forward_that_is_kept_is_made_before_the_clock_starts(make_task, monkeypatch, keeps_forward):
    events = []
    interleaved = measuring.interleaved
    monkeypatch.setattr(measuring, "interleaved", lambda *x: events.append("clock") or interleaved(*x))
    made = make_task(other=Provider(lambda g: events.append("call") or double(g)))
    measured(dataclasses.replace(made, keeps_forward=keeps_forward, name="kept"))
    assert events.index("clock") == 1 + keeps_forward


def test_a_run_without_times_only_checks(make_task):
    outcomes = measured(make_task(wrong=Provider(lambda g: g.x)), timed=False)
    assert outcomes["wrong"].wrong
    assert not outcomes[OURS].samples


def test_a_task_needs_ours_and_a_name_of_its_own(make_task):
    made = make_task()
    with pytest.raises(ValueError, match="there is a task 'a task' already"):
        make_task()
    with pytest.raises(ValueError, match="providers: expected 'vgpo_kernels' among them"):
        Task("another", [CASE], inputs, {"peer": Provider(double)}, made.work)
    with pytest.raises(ValueError, match="role: expected one of ours"):
        Task("another", [CASE], inputs, {OURS: Provider(double, "mine")}, made.work)


def test_distance():
    x = torch.tensor([3.0, 4.0, -math.inf])
    assert measuring.distance(x, x) == 0.0
    assert measuring.distance(torch.tensor([3.0, 4.5, -math.inf]), x) == pytest.approx(0.1)
    assert measuring.distance(torch.tensor([3.0, 4.0, 0.0]), x) == math.inf
    assert measuring.distance(torch.tensor([math.nan, 4.0, -math.inf]), x) == math.inf
    assert measuring.distance(torch.zeros(2), torch.zeros(2)) == 0.0
    assert measuring.distance(torch.ones(2), torch.zeros(2)) == math.inf
    assert measuring.distance(torch.zeros(2), torch.zeros(3)) == math.inf


def test_distance_is_that_of_all_pieces(monkeypatch: pytest.MonkeyPatch):
    a, b = torch.randn(5, 7).T, torch.randn(5, 7).T
    monkeypatch.setattr(measuring, "PIECE", 4)
    assert measuring.distance(a, b) == pytest.approx(float((a - b).double().norm() / b.double().norm()))
    b[6, 4] = math.inf
    assert measuring.distance(a, b) == math.inf


class Cached(NamedTuple):
    x: Tensor
    y: Tensor
    prepared: dict


def test_cold_copies_outgrow_the_cache(monkeypatch: pytest.MonkeyPatch):
    class Properties:
        L2_cache_size = 10_000

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Properties)
    # Rows that lie apart, as those of transposed heads do.
    given = Cached(torch.randn(4, 50).T.requires_grad_(), torch.arange(100), {})
    copies = measuring.cold_copies(given, torch.device("cuda"))
    assert sum(measuring.memory.bytes_of(copy) for copy in copies) > 2 * Properties.L2_cache_size
    places = {copy.x.untyped_storage().data_ptr() for copy in copies}
    assert len(places) == len(copies)
    for copy in copies:
        assert torch.equal(copy.x, given.x)
        assert copy.x.requires_grad
        assert copy.x.is_leaf
        assert copy.x.stride() == given.x.stride()
        assert copy.prepared is given.prepared
    assert measuring.cold_copies(given, CPU) == [given]


def test_a_sweep_of_ours_alone_is_held_to_our_plain_torch(make_task):
    made = make_task(ours=Provider(lambda g: g.x, "ours"), plain=Provider(double, "ours, plain"))
    outcomes = measuring.measure(made, CASE, [OURS], CPU, __name__)
    assert outcomes.keys() == {OURS}
    assert PLAIN in outcomes[OURS].wrong


def test_what_fails_while_it_is_timed_is_said_by_all(make_task):
    calls = []

    def fails_later(given: Given) -> Tensor:
        calls.append(given)
        if len(calls) > 1:
            raise torch.OutOfMemoryError("too much\nand more")
        return double(given)

    outcomes = measured(make_task(late=Provider(fails_later)))
    assert {outcome.skipped for outcome in outcomes.values()} == {"while timed together: out of memory: too much"}
