"""Rewards by name, the answers that they take for right, and what happens to a run when one of them fails."""

import csv
import logging
import math
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from vgpo_train import rewards
from vgpo_train.config import ConfigError
from vgpo_train.data import Sample
from vgpo_train.rewards import RewardMixer, Rewards, boxed_answer, get_reward, processes, register

_ANSWERS = list(csv.DictReader((Path(__file__).parent / "answers.tsv").open(), delimiter="\t", quoting=csv.QUOTE_NONE))


def _sample(answer: str, name: str = "s1", problem: str = "?") -> Sample:
    return Sample(name, problem, answer)


def _boxed(answer: str) -> str:
    return answer if "\\boxed" in answer else rf"\boxed{{{answer}}}"


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


# What a reward may do to the process that runs it; by the kind of failure that is reported.
_FAILURES: dict[str, tuple[Callable[[], object], str]] = {
    "raises": (_boom, "KeyError: 'solution'"),
    "exits": (lambda: sys.exit(0), "SystemExit"),
    "interrupts": (lambda: _raise(KeyboardInterrupt()), "KeyboardInterrupt"),
    "raises what cannot be sent": (lambda: _raise(_Unprintable()), "_Unprintable"),
    "ends its process": (lambda: os._exit(3), "status 3"),
    "is killed": (lambda: os.kill(os.getpid(), signal.SIGKILL), "signal 9"),
    "sleeps": (lambda: time.sleep(1e9), "TimeoutError"),
    "hangs in C": (_hang_in_c, "TimeoutError"),
    "backtracks": (lambda: bool(re.fullmatch(r"(a+)+b", "a" * 40)), "TimeoutError"),
    "waits for a thread": (lambda: threading.Thread(target=time.sleep, args=(1e9,)).run(), "TimeoutError"),
    "nan": (lambda: math.nan, "nan"),
    "infinite": (lambda: math.inf, "inf"),
    "infinite in float32": (lambda: 1e39, "1e+39"),
    "too large": (lambda: 10**400, "OverflowError"),
    "complex": (lambda: 1j, "complex"),
    "nothing": (lambda: None, "NoneType"),
    "text": (lambda: "1", "str"),
}
_SLOW = ("sleeps", "hangs in C", "backtracks", "waits for a thread")


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgets what a test registers."""
    monkeypatch.setattr(rewards._REWARDS, "_known", dict(rewards._REWARDS._known))


@pytest.fixture
def misbehaving(registry: None) -> Iterator[RewardMixer]:  # noqa: ARG001
    """One reward that does on a sample what the sample's answer says, and otherwise is the completion as a number."""

    @register("misbehaving")
    def _(completion: str, sample: Sample) -> object:
        return _FAILURES[sample.answer][0]() if sample.answer in _FAILURES else float(completion)

    mixer = RewardMixer({"exact_match": 0.0, "misbehaving": 1.0}, accuracy="misbehaving", timeout=0.5, workers=2)
    yield mixer
    mixer.close()


def test_an_unknown_reward_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"got 'exact_mach'; did you mean 'exact_match'\?"):
        get_reward("exact_mach")
    with pytest.raises(ConfigError, match="math_verify"):
        RewardMixer({"math_verifi": 1.0}, accuracy="exact_match")


@pytest.mark.parametrize(
    ("completion", "boxed"),
    [
        (r"\boxed{3}", "3"),
        (r"\boxed{1} no, \boxed{ 2 }", "2"),  # the last one counts
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{3", None),  # cut off
        (r"\boxed{1}, \boxed{2", None),
        (r"\boxed{oh, \boxed{2}", "2"),  # the last one is whole
        (r"\boxed{\left.\frac{1}{2}\right\}}", r"\left.\frac{1}{2}\right\}"),  # LaTeX's braces are none
        (
            r"\boxed{\left\{\begin{array}{l}x=1\\y=2\end{array}\right.}",
            r"\left\{\begin{array}{l}x=1\\y=2\end{array}\right.",
        ),
        (r"\boxed{\{1\}} }", r"\{1\}"),
        (r"\boxed{a\\}", r"a\\"),
        (r"\boxed {x}", "x"),
        (r"\boxed" "\n{x}", "x"),
        (r"\fbox{x}", "x"),
        (r"\boxed 5", "5"),
        (r"\boxed 12.5.", "12.5"),
        (r"\boxed\pi", r"\pi"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{\text{a \fbox{b}}}", r"\text{a \fbox{b}}"),
        (r"\\boxed{3}", "3"),  # an escaped text
        (r"\boxedness{3}", None),
        (r"\boxed{}", ""),
        ("3", None),
    ],
)
def test_the_boxed_answer(completion: str, boxed: str | None) -> None:
    assert boxed_answer(completion) == boxed


@pytest.mark.parametrize(
    ("name", "completion", "answer", "reward"),
    [
        ("exact_match", r"<think> red</think>\boxed{3}", "3", 1.0),
        ("exact_match", r"\boxed{ Red  Square }", "red square", 1.0),
        ("exact_match", r"\boxed{3.0}", "3", 0.0),
        ("exact_match", "3", "3", 0.0),
        ("multiple_choice", r"\boxed{B}", "B", 1.0),
        ("multiple_choice", r"\boxed{(b)}", "B", 1.0),
        ("multiple_choice", r"\boxed{B. a red square}", "B", 1.0),
        ("multiple_choice", r"\boxed{A}", "B", 0.0),
        ("multiple_choice", r"\boxed{Banana}", "B", 0.0),
        ("multiple_choice", r"\boxed{?}", "?", 0.0),
        ("multiple_choice", r"\boxed{\text{B}}", "B", 1.0),
        ("multiple_choice", r"\boxed{\mathrm{B}}", "B", 1.0),
        ("multiple_choice", r"\boxed{\textbf{(B)}}", "B", 1.0),
        ("multiple_choice", r"\boxed{\mathbf{\text{B}}}", "B", 1.0),
        ("multiple_choice", r"\boxed{\text{B. } \frac{1}{2}}", "B", 1.0),
        ("multiple_choice", r"\boxed{(B) a red square}", "B", 1.0),
        ("multiple_choice", r"\boxed{B) a red square}", "B", 1.0),
        ("multiple_choice", r"\boxed{B: red}", "$B$", 1.0),
        ("multiple_choice", r"\boxed{A dog}", "A", 0.0),
        ("multiple_choice", r"\boxed{\text{A dog}}", "A", 0.0),
        ("multiple_choice", r"\boxed{\textbf{A}nother}", "A", 0.0),
        ("multiple_choice", r"\boxed{(A)(B)}", "A", 0.0),
        ("math_verify", r"\boxed{\frac{2}{4}}", "0.5", 1.0),
        ("math_verify", r"\boxed{0.5}", r"$\frac{1}{2}$", 1.0),
        ("math_verify", r"\boxed{x^2+2x+1}", "(x+1)^2", 1.0),
        ("math_verify", r"\boxed{\{1, 2\}}", r"\{2, 1\}", 1.0),
        ("math_verify", r"\boxed{3}", r"\boxed{3}", 1.0),
        ("math_verify", r"\boxed{4}", "3", 0.0),
        ("math_verify", "it is 3", "3", 0.0),
        ("exact_match", r"\boxed{\left\{a\right.}", r"\left\{a\right.", 1.0),
        ("exact_match", r"\boxed{\text{Red}.}", "red", 1.0),
        ("exact_match", r"\boxed{A}", r"\boxed{A}", 1.0),  # as some data sets write what is right
        ("word_match", r"\boxed{A}", r"\boxed{A}", 1.0),
        ("multiple_choice", r"\boxed{A}", r"\boxed{A}", 1.0),
        ("math_verify", r"\boxed{A}", r"\boxed{A}", 1.0),
        ("multiple_choice", r"\boxed{A}, \boxed{B}", "B", 0.0),
        ("format", r"<think> a b</think>\boxed{1}", "1", 1.0),
        ("format", r"\boxed{1}", "1", 0.0),
        ("format", r"<think> a \boxed{1}", "1", 0.0),
        ("format", "<think>a</think> 1", "1", 0.0),
        ("format", r"<think>a</think><think>b</think>\boxed{1}", "1", 0.0),
    ],
)
def test_rewards(name: str, completion: str, answer: str, reward: float) -> None:
    assert get_reward(name)(completion, _sample(answer)) == reward


@pytest.mark.parametrize(
    ("completion", "credit"),
    [
        (r"\boxed{red blue; red 1}", 1.0),
        (r"\boxed{red red; red 1}", 0.75),
        (r"\boxed{red}", 0.25),
        (r"\boxed{red blue; red 1 1 1 1 1}", 0.5),  # what is too much costs, too
        ("red blue; red 1", 0.0),
    ],
)
def test_word_match_gives_credit_by_place(completion: str, credit: float) -> None:
    assert get_reward("word_match")(completion, _sample("red blue; red 1")) == credit


@pytest.mark.parametrize(
    "completion",
    [
        r"\boxed{9^{9^{9^{9}}}}",  # a number that no machine can hold
        r"\boxed{" + "(" * 500 + "1" + ")" * 500 + "}",  # nesting that a grammar explores for ever
    ],
)
@pytest.mark.timeout(60)
def test_pathological_mathematics_ends(completion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_OWN_LIMIT", 1)
    assert get_reward("math_verify")(completion, _sample("3")) == 0.0


def test_the_table_of_answers() -> None:
    """Pairs of a right answer and what was answered, and whether a person calls it right."""
    said = {
        (row["gold"], row["answer"]): get_reward("math_verify")(_boxed(row["answer"]), _sample(row["gold"]))
        for row in _ANSWERS
    }
    wrong = [
        (row["gold"], row["answer"]) for row in _ANSWERS if said[row["gold"], row["answer"]] != (row["right"] == "yes")
    ]
    assert len(said) == len(_ANSWERS) >= 150
    assert not wrong


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("B", "12 cm", True),
        ("B", "12", True),
        ("12 cm", "B", True),
        ("B", "10 cm", False),
        ("12 cm", "A", False),
        ("B", "B. 12 cm", True),
        ("B", "D", False),
    ],
)
@pytest.mark.parametrize(
    "problem", ["How long? (A) 10 cm (B) 12 cm (C) 14 cm", "<image>\nHow long?\nA. 10 cm\nB. 12 cm"]
)
def test_a_choice_is_its_letter_or_the_text_that_the_problem_gives_it(problem, gold, answer, right) -> None:
    assert get_reward("math_verify")(_boxed(answer), _sample(gold, problem=problem)) == right


# What `format` is: the regular expression says it, in time that grows with the square of a text or worse.
_FORMAT = re.compile(r"\s*<think>(?:(?!</?think>).)*</think>(?:(?!</?think>).)*\\boxed\{.*\}\s*\S{0,2}\s*", re.DOTALL)


def test_format_is_its_regular_expression() -> None:
    generator = random.Random(0)
    pieces = ["<think>", "</think>", "<think", "\\boxed{", "\\boxed", "}", "{", " ", "\n", "a", "ab", ".", "$"]
    accepted = 0
    for _ in range(10_000):
        text = "".join(generator.choices(pieces, k=generator.randrange(6)))
        if generator.random() < 0.8:
            text = generator.choice(["", " "]) + "<think>" + generator.choice(["", "a"]) + "</think>" + text
        if generator.random() < 0.8:
            text += (
                "\\boxed{" + "".join(generator.choices(pieces, k=2)) + "}" + generator.choice(["", ".", " $ ", "..."])
            )
        expected = _FORMAT.fullmatch(text) is not None
        accepted += expected
        assert get_reward("format")(text, _sample("1")) == expected, text
    assert accepted > 500


@pytest.mark.parametrize("name", ["format", "exact_match", "multiple_choice"])
@pytest.mark.parametrize(
    "piece",
    ["<think>a</think>", "\\boxed{", "\\boxed{}", "}", " ", "{", "\\", "<think></think>\\boxed{}} ", "**a", "$a "],
)
def test_rewards_of_text_take_linear_time(name: str, piece: str) -> None:
    completion = "<think></think>" + piece * (100_000 // len(piece)) + "\\boxed{" + piece * 2000 + "}"
    began = time.process_time()
    get_reward(name)(completion, _sample("1"))
    assert time.process_time() - began < 0.5  # some milliseconds


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
    assert time.monotonic() - began < 30
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
def test_a_reward_that_always_hangs_does_not_take_its_limit_for_every_completion() -> None:
    register("stuck")(lambda _completion, _sample: time.sleep(1e9))
    mixer = RewardMixer({"stuck": 1.0, "exact_match": 1.0}, accuracy="exact_match", timeout=0.1, workers=1)
    began = time.monotonic()
    earned = mixer([r"\boxed{1}"] * 200, [_sample("1")] * 200)
    assert time.monotonic() - began < 15  # 200 limits, each with a new process, take more
    assert earned.failures == 200
    assert earned.total.tolist() == [1.0] * 200
    mixer.close()


@pytest.mark.usefixtures("registry")
def test_rewards_run_outside_the_main_thread_and_draw_by_the_seed() -> None:
    register("drawn")(lambda _completion, _sample: random.random() + torch.rand(()))
    mixer = RewardMixer({"drawn": 1.0, "math_verify": 1.0}, accuracy="math_verify", workers=2)
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
    mixer = RewardMixer({"exact_match": 1.0}, accuracy="exact_match")
    (manager,) = _children(os.getpid())
    os.kill(manager, signal.SIGKILL)
    assert mixer([r"\boxed{1}"], [_sample("1")]).failures == 1
    assert mixer([r"\boxed{1}"], [_sample("1")]).failures == 0
    mixer.close()
    assert not _children(os.getpid())


def test_no_process_outlives_the_one_that_rewards(tmp_path: Path) -> None:
    script = tmp_path / "mine.py"
    script.write_text(
        textwrap.dedent("""
            import os, subprocess, time
            from vgpo_train.data import Sample
            from vgpo_train.rewards import RewardMixer, register

            def stuck(completion, sample):  # known to the workers, though this script has no guard for its name
                child = subprocess.Popen(["sleep", "1000"])
                print("here", os.getppid(), os.getpid(), flush=True)
                time.sleep(1e9)

            register("stuck")(stuck)
            RewardMixer({"stuck": 1.0}, accuracy="stuck", timeout=1000.0, workers=1)(["a"], [Sample("a", "b", "c")])
        """)
    )
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        processes = [int(word) for word in run.stdout.readline().split()[1:]]
        assert len(processes) == 2
        run.kill()
        run.wait(10)
        deadline = time.monotonic() + 10
        while any(Path(f"/proc/{process}").exists() for process in processes) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not [process for process in processes if Path(f"/proc/{process}").exists()]


def _children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_the_limit_holds_against_the_c_code_of_mathematics() -> None:
    pytest.importorskip("gmpy2")
    mixer = RewardMixer({"math_verify": 1.0}, accuracy="math_verify", timeout=1.0)
    began = time.monotonic()
    earned = mixer([r"\boxed{\binom{10^{9}}{5\cdot 10^8}}", r"\boxed{1}"], [_sample("1")] * 2)
    assert time.monotonic() - began < 20
    assert (earned.total.tolist(), earned.failures) == ([0.0, 1.0], 1)
    mixer.close()


def test_mathematics_without_end_counts_as_failed() -> None:
    mixer = RewardMixer({"math_verify": 1.0}, accuracy="math_verify", timeout=1.0)
    earned = mixer([r"\boxed{9^{9^{9^{9}}}}", r"\boxed{3}"], [_sample("3")] * 2)
    assert (earned.total.tolist(), earned.failures) == ([0.0, 1.0], 1)
    mixer.close()


@pytest.mark.parametrize("timeout", [0.0, -1.0, math.nan, math.inf])
def test_a_limit_that_is_none_is_refused(timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout: expected a positive number of seconds"):
        RewardMixer({"exact_match": 1.0}, accuracy="exact_match", timeout=timeout)
