"""Rewards by name, and what happens to a run when one of them fails."""

import logging
import threading

import pytest
import torch

from vgpo_train import rewards
from vgpo_train.config import ConfigError
from vgpo_train.data import Sample
from vgpo_train.rewards import RewardMixer, Rewards, boxed_answer, get_reward, register


def _sample(answer: str, name: str = "s1") -> Sample:
    return Sample(name, "?", answer)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a reward that raises on the sample 'bad' alone, registered for one test."""
    monkeypatch.setattr(rewards._REWARDS, "_known", dict(rewards._REWARDS._known))

    @register("brittle")
    def brittle(_completion: str, sample: Sample) -> float:
        if sample.id == "bad":
            raise KeyError("solution")
        return 1.0

    return "brittle"


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
def test_pathological_mathematics_ends(completion: str) -> None:
    assert get_reward("math_verify")(completion, _sample("3")) == 0.0


def test_the_mixer_weighs_and_reports_each_reward() -> None:
    mixer = RewardMixer({"exact_match": 1.0, "format": 0.5}, accuracy="exact_match")
    completions = [r"<think> a</think>\boxed{1}", r"\boxed{1}", r"<think> a</think>\boxed{2}"]
    earned = mixer(completions, [_sample("1")] * 3)
    assert isinstance(earned, Rewards)
    assert torch.equal(earned.total, torch.tensor([1.5, 1.0, 0.5]))
    assert torch.equal(earned.accuracy, torch.tensor([1.0, 1.0, 0.0]))
    assert torch.equal(earned.named["format"], torch.tensor([1.0, 0.0, 1.0]))
    assert earned.failures == 0


def test_a_failing_reward_costs_its_completion_alone(failing: str, caplog: pytest.LogCaptureFixture) -> None:
    mixer = RewardMixer({"exact_match": 1.0, failing: 1.0}, accuracy="exact_match")
    samples = [_sample("1", "good"), _sample("1", "bad"), _sample("1", "bad")]
    with caplog.at_level(logging.ERROR):
        earned = mixer([r"\boxed{1}"] * 3, samples)
    assert torch.equal(earned.total, torch.tensor([2.0, 1.0, 1.0]))
    assert earned.failures == 2
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1, "one line a reward and sample"
    assert "reward 'brittle' failed on sample 'bad'" in messages[0]
    assert "KeyError" in messages[0]
    assert "boxed{1}" in messages[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None])
def test_what_is_no_finite_number_is_a_failure(failing: str, value) -> None:
    register(failing)(lambda _completion, _sample: value)
    earned = RewardMixer({failing: 1.0}, accuracy=failing)(["x"], [_sample("1")])
    assert earned.total.tolist() == [0.0]
    assert earned.failures == 1


def test_mathematics_outside_the_main_thread_is_said_not_swallowed(caplog: pytest.LogCaptureFixture) -> None:
    # math-verify's time limit is a signal, which only the main thread may set; without the limit a completion such as
    # those of `test_pathological_mathematics_ends` would hang the run.
    mixer = RewardMixer({"math_verify": 1.0}, accuracy="math_verify")
    results = []
    worker = threading.Thread(target=lambda: results.append(mixer([r"\boxed{3}"], [_sample("3")])))
    worker.start()
    worker.join()
    assert results[0].failures == 1
    assert "math_verify" in caplog.text
