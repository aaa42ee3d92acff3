"""What becomes of a rollout when a reward raises, hangs, ends its process or gives no number."""

import logging
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vgpo_train import rewards
from vgpo_train.data import Sample
from vgpo_train.rewards import RewardMixer, Rewards, builtin, math_verify, pool, register
from vgpo_train.rewards.equality import same_answer


def _sample(answer: str, name: str = "s1") -> Sample:
    return Sample(name, "?", answer)


def _boom() -> float:
    raise KeyError("solution")


def _raise(error: BaseException) -> float:
    raise error


class _Unprintable(Exception):
    def __init__(self) -> None:
        self.lock = threading.Lock()  # which cannot be pickled either

    def __str__(self) -> str:
        raise ValueError


def _hang_in_c() -> float:
    return float(7 ** (10**9) > 0)  # one call of C that holds the interpreter for minutes


def _wait_for_a_thread() -> None:
    thread = threading.Thread(target=time.sleep, args=(1e9,))  # not a daemon: Python would wait for it at the end
    thread.start()
    thread.join()


# What a reward may do to the process that runs it; by the kind of failure that is reported.
_FAILURES: dict[str, tuple[Callable[[], object], str]] = {
    "raises": (_boom, "KeyError: 'solution'"),
    "exits": (lambda: sys.exit(0), "SystemExit"),
    "interrupts": (lambda: _raise(KeyboardInterrupt()), "KeyboardInterrupt"),
    "raises what cannot be sent": (lambda: _raise(_Unprintable()), "_Unprintable"),
    "ends its process": (lambda: os._exit(3), "status 3"),
    "ends its process as if all were well": (lambda: os._exit(0), "status 0"),
    "is killed": (lambda: os.kill(os.getpid(), signal.SIGKILL), "signal 9"),
    "sleeps": (lambda: time.sleep(1e9), "TimeoutError"),
    "hangs in C": (_hang_in_c, "TimeoutError"),
    "waits for a thread": (_wait_for_a_thread, "TimeoutError"),
    "nan": (lambda: math.nan, "nan"),
    "infinite": (lambda: math.inf, "inf"),
    "infinite in float32": (lambda: 1e39, "1e+39"),
    "too large": (lambda: 10**400, "OverflowError"),
    "complex": (lambda: 1j, "complex"),
    "nothing": (lambda: None, "NoneType"),
    "text": (lambda: "1", "str"),
}
_SLOW = ("sleeps", "hangs in C", "waits for a thread")


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgets what a test registers."""
    monkeypatch.setattr(rewards._REWARDS, "_known", dict(rewards._REWARDS._known))


@pytest.fixture
def misbehaving(registry: None, request: pytest.FixtureRequest) -> Iterator[RewardMixer]:  # noqa: ARG001
    """One reward that does on a sample what the sample's answer says, and otherwise is the completion as a number."""
    timeout = 3.0 if request.node.callspec.params["what"] in _SLOW else 100.0

    @register("misbehaving")
    def _(completion: str, sample: Sample) -> object:
        return _FAILURES[sample.answer][0]() if sample.answer in _FAILURES else float(completion)

    mixer = RewardMixer({"exact_match": 0.0, "misbehaving": 1.0}, accuracy="misbehaving", timeout=timeout, workers=2)
    yield mixer
    mixer.close()


def test_the_mixer_weighs_and_reports_each_reward() -> None:
    mixer = RewardMixer({"exact_match": 1.0, "format": 0.5}, accuracy="exact_match")
    completions = [r"<think> a</think>\boxed{1}", r"\boxed{1}", r"<think> a</think>\boxed{2}"]
    earned = mixer(completions, [_sample("1")] * 3)
    assert isinstance(earned, Rewards)
    assert torch.equal(earned.total, torch.tensor([1.5, 1.0, 0.5]))
    assert torch.equal(earned.accuracy, torch.tensor([1.0, 1.0, 0.0]))
    assert torch.equal(earned.named["format"], torch.tensor([1.0, 0.0, 1.0]))
    assert earned.failures == 0
    assert mixer([], []).total.shape == (0,)
    mixer.close()
    with pytest.raises(RuntimeError, match="closed"):
        mixer(completions, [_sample("1")] * 3)


@pytest.mark.parametrize("what", _FAILURES)
def test_a_failing_reward_costs_its_completion_alone(misbehaving: RewardMixer, what: str, caplog) -> None:
    answers = ["", "", "", what, "", what, ""]
    samples = [_sample(answer, f"sample {place if not answer else 'bad'}") for place, answer in enumerate(answers)]
    began = time.monotonic()
    with caplog.at_level(logging.ERROR):
        earned = misbehaving([str(place) for place in range(7)], samples)
    assert earned.total.tolist() == [0.0, 1.0, 2.0, 0.0, 4.0, 0.0, 6.0]
    assert earned.failures == 2
    (message,) = [record.getMessage() for record in caplog.records]  # one line a reward and sample
    assert "reward 'misbehaving' failed on sample 'sample bad'" in message
    assert _FAILURES[what][1] in message
    assert "begins '3'" in message
    assert time.monotonic() - began < 60
    assert misbehaving(["8"], [_sample("")]).total.tolist() == [8.0]  # and the next batch runs


@pytest.mark.usefixtures("registry")
def test_numbers_of_other_kinds_are_rewards() -> None:
    values = [torch.tensor(0.5), True, 3, torch.tensor([2.0]).numpy()[0]]
    register("kinds")(lambda completion, _sample: values[int(completion)])
    earned = RewardMixer({"kinds": 1.0}, accuracy="kinds")(list("0123"), [_sample("")] * 4)
    assert earned.total.tolist() == [0.5, 1.0, 3.0, 2.0]
    assert earned.failures == 0


@pytest.mark.usefixtures("registry")
def test_a_total_that_is_not_finite_counts_as_failed(caplog) -> None:
    register("large")(lambda completion, _sample: float(completion))
    earned = RewardMixer({"large": 1e30}, accuracy="large")(["1e30", "1"], [_sample(""), _sample("")])
    assert earned.total.tolist() == [0.0, torch.tensor(1e30).item()]
    assert earned.failures == 1
    assert "weighted total" in caplog.text


@pytest.mark.usefixtures("registry")
def test_a_reward_that_always_hangs_does_not_take_its_limit_for_every_completion(monkeypatch, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    calls.touch()

    @register("stuck")
    def _(_completion: str, _sample: Sample) -> None:
        with calls.open("a") as file:
            file.write(".")
        time.sleep(1e9)

    monkeypatch.setattr(pool, "_IN_A_ROW", 3)
    mixer = RewardMixer({"stuck": 1.0}, accuracy="stuck", timeout=0.1, workers=1)
    assert mixer(["a"] * 20, [_sample("1")] * 20).failures == 20
    assert len(calls.read_text()) <= 3  # fewer where a worker takes 0.1 s to begin
    mixer.close()
    monkeypatch.setattr(pool, "_IN_A_ROW", 1)
    mixer = RewardMixer({"stuck": 1.0, "exact_match": 1.0}, accuracy="exact_match", timeout=3.0, workers=1)
    earned = mixer([r"\boxed{1}"] * 3, [_sample("1")] * 3)
    assert (earned.total.tolist(), earned.failures) == ([1.0] * 3, 3)  # the other reward is called all the same
    mixer.close()


def test_a_call_that_a_broken_pool_has_lost_is_not_waited_for() -> None:
    with pytest.raises(RuntimeError, match="the pool of workers has ended"):
        pool._outcome(SimpleNamespace(active=False), Future(), timeout=1000.0)


@pytest.mark.usefixtures("registry")
def test_rewards_run_outside_the_main_thread_and_draw_by_the_seed() -> None:
    register("drawn")(lambda _completion, _sample: random.random() + torch.rand(()))
    mixer = RewardMixer({"drawn": 1.0, "math_verify": 1.0}, accuracy="math_verify", timeout=60.0, workers=2)
    results: list[Rewards] = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        worker = threading.Thread(target=lambda: results.append(mixer([r"\boxed{3}"] * 40, [_sample("3")] * 40)))
        worker.start()
        worker.join()
    assert [result.failures for result in results] == [0, 0, 0]
    assert results[0].accuracy.tolist() == [1.0] * 40
    first, again, other = (result.total for result in results)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(set(first.tolist())) == 40
    mixer.close()


@pytest.mark.usefixtures("registry")
def test_processes_that_were_killed_are_started_anew() -> None:
    before = _children(os.getpid())
    mixer = RewardMixer({"exact_match": 1.0}, accuracy="exact_match")
    (manager,) = _children(os.getpid()) - before
    os.kill(manager, signal.SIGKILL)
    assert mixer([r"\boxed{1}"], [_sample("1")]).failures == 1
    assert mixer([r"\boxed{1}"], [_sample("1")]).failures == 0
    mixer.close()
    assert _children(os.getpid()) == before


@pytest.mark.usefixtures("registry")
def test_a_worker_that_ends_between_two_calls_costs_nothing() -> None:
    register("own_pid")(lambda _completion, _sample: float(os.getpid()))
    mixer = RewardMixer({"own_pid": 1.0}, accuracy="own_pid", timeout=60.0, workers=1)
    worker = int(mixer(["a"], [_sample("1")]).total)
    os.kill(worker, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while _runs(worker) and time.monotonic() < deadline:
        time.sleep(0.02)
    earned = mixer(["a"] * 3, [_sample("1")] * 3)
    assert earned.failures == 0
    assert worker not in earned.total.tolist()
    mixer.close()


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("end", [lambda: time.sleep(1e9), lambda: os._exit(3)], ids=["limit", "exit"])
def test_what_a_reward_started_ends_with_its_process(end: Callable[[], None], tmp_path: Path) -> None:
    note = tmp_path / "pid"

    @register("starts")
    def _(_completion: str, _sample: Sample) -> None:
        note.write_text(str(subprocess.Popen(["sleep", "1000"]).pid))
        end()

    mixer = RewardMixer({"starts": 1.0}, accuracy="starts", timeout=3.0, workers=1)
    assert mixer(["a"], [_sample("1")]).failures == 1
    deadline = time.monotonic() + 20
    while (runs := _runs(int(note.read_text()))) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not runs
    mixer.close()


def test_no_process_outlives_the_one_that_rewards(registry: None) -> None:  # noqa: ARG001
    read, write = os.pipe()

    @register("stuck")
    def _(_completion: str, _sample: Sample) -> None:
        os.write(write, f"{os.getppid()} {os.getpid()}\n".encode())
        time.sleep(1e9)

    rewarding = os.fork()
    if rewarding == 0:
        RewardMixer({"stuck": 1.0}, accuracy="stuck", timeout=1000.0, workers=1)(["a"], [_sample("1")])
        os._exit(0)
    with os.fdopen(read) as pids:
        processes = [int(pid) for pid in pids.readline().split()]
    os.close(write)
    os.kill(rewarding, signal.SIGKILL)
    os.waitpid(rewarding, 0)
    deadline = time.monotonic() + 20
    while any(_runs(process) for process in processes) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(processes) == 2
    assert not any(_runs(process) for process in processes)


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _children(process: int) -> set[int]:
    return {int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()}


def _mathematics() -> RewardMixer:
    """math_verify with a limit that is short, but not for what is parsed after this process parsed something."""
    same_answer("1", "2")
    return RewardMixer({"math_verify": 1.0}, accuracy="math_verify", timeout=3.0)


def test_the_limit_holds_against_the_c_code_of_mathematics() -> None:
    pytest.importorskip("gmpy2")
    mixer = _mathematics()
    began = time.monotonic()
    earned = mixer([r"\boxed{\binom{10^{9}}{5\cdot 10^8}}", r"\boxed{1}"], [_sample("1")] * 2)
    assert time.monotonic() - began < 60
    assert (earned.total.tolist(), earned.failures) == ([0.0, 1.0], 1)
    mixer.close()


def test_mathematics_called_by_itself_runs_in_any_thread_and_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "_LIMIT", 60.0)
    right = Sample("s1", "?", "90"), r"\boxed{90°}"
    results = []
    worker = threading.Thread(target=lambda: results.append(math_verify(right[1], right[0])))
    worker.start()
    worker.join()
    fork = os.fork()
    if fork == 0:
        os._exit(int(math_verify(right[1], right[0])))
    assert os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]) == 1
    assert [*results, math_verify(right[1], right[0])] == [1.0, 1.0]


def test_mathematics_without_end_counts_as_failed() -> None:
    mixer = _mathematics()
    earned = mixer([r"\boxed{9^{9^{9^{9}}}}", r"\boxed{3}"], [_sample("3")] * 2)
    assert (earned.total.tolist(), earned.failures) == ([0.0, 1.0], 1)
    mixer.close()


@pytest.mark.parametrize("timeout", [0.0, -1.0, math.nan, math.inf])
def test_a_limit_that_is_none_is_refused(timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout: expected a positive number of seconds"):
        RewardMixer({"exact_match": 1.0}, accuracy="exact_match", timeout=timeout)
