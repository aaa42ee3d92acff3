"""Rewards by name, the answers that they take for right, and what happens to a run when one of them fails."""

import csv
import gc
import time
from pathlib import Path

import pytest

from vgpo_train.config import ConfigError
from vgpo_train.data import Sample
from vgpo_train.rewards import RewardMixer, boxed_answer, builtin, get_reward

_ANSWERS = list(csv.DictReader((Path(__file__).parent / "answers.tsv").open(), delimiter="\t", quoting=csv.QUOTE_NONE))


def _sample(answer: str, name: str = "s1", problem: str = "?") -> Sample:
    return Sample(name, problem, answer)


def _boxed(answer: str) -> str:
    return answer if "\\boxed" in answer else rf"\boxed{{{answer}}}"


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
        ("multiple_choice", r"\boxed{AC}", "AC", 1.0),
        ("multiple_choice", r"\boxed{AC}", "A,C", 1.0),
        ("multiple_choice", r"\boxed{C and A}", "AC", 1.0),
        ("multiple_choice", r"\boxed{A}, \boxed{C}", "AC", 1.0),
        ("multiple_choice", r"\boxed{AB}", "AC", 0.0),
        ("multiple_choice", r"\boxed{A}", "AC", 0.0),
        ("multiple_choice", r"\boxed{AC}", "A", 0.0),
        ("multiple_choice", r"\boxed{A, 5}", "A", 1.0),
        ("multiple_choice", r"\boxed{A 5 cm}", "A", 1.0),
        ("multiple_choice", r"\boxed{A - 5}", "A", 1.0),
        ("multiple_choice", r"\boxed{A.12}", "A", 1.0),
        ("multiple_choice", r"\boxed{A. 5 J/K}", "A", 1.0),  # K is no choice
        ("multiple_choice", r"\boxed{A, 5 or B, 6}", "A", 0.0),
        ("multiple_choice", r"\boxed{K}", "K", 1.0),
        ("multiple_choice", r"\boxed{(k) 12}", "K", 1.0),
        ("multiple_choice", r"\boxed{L}", "K", 0.0),
        ("multiple_choice", r"\boxed{K or L}", "K", 0.0),
        ("multiple_choice", r"\boxed{dog}", "dog", 0.0),
        ("exact_match", r"\boxed{x,y}", "x, y", 1.0),
        ("exact_match", r"\boxed{50%}", r"50\%", 1.0),
        ("exact_match", r"\boxed{\$5}", "$5", 1.0),
        ("exact_match", r"\boxed{1 2}", "12", 0.0),
        ("exact_match", r"\boxed{redsquare}", "red square", 0.0),
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
        ("format", r"<think>a</think></think>\boxed{1}", "1", 0.0),
        ("format", r" <think></think> b \boxed{\frac{1}{2}}$. ", "1", 1.0),
        ("format", r"<think>\boxed{1}</think>", "1", 0.0),
        ("format", r"<think>a</think>\fbox{1}", "1", 1.0),
        ("format", r"<think>a</think>\boxed {1}", "1", 1.0),
        ("format", r"<think>a</think>\boxed{1}, \boxed{2}", "1", 1.0),
        ("format", r"<think>a</think>\boxed{1} text}", "1", 0.0),
        ("format", r"<think>a</think>\boxed{1} is it", "1", 0.0),
        ("format", r"<think>a</think>\boxed{1}, \boxed{2", "1", 0.0),
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
    monkeypatch.setattr(builtin, "_LIMIT", 1.0)
    assert get_reward("math_verify")(completion, _sample("3")) == 0.0


def test_the_table_of_answers() -> None:
    """Pairs of a right answer and what was answered, and whether a person calls it right."""
    pairs = [(row["gold"], row["answer"]) for row in _ANSWERS]
    assert len(set(pairs)) == len(pairs) >= 150
    assert {row["right"] for row in _ANSWERS} == {"yes", "no"}
    mixer = RewardMixer({"math_verify": 1.0}, accuracy="math_verify", timeout=60.0)
    earned = mixer([_boxed(answer) for _, answer in pairs], [_sample(gold) for gold, _ in pairs])
    mixer.close()
    said = dict(zip(pairs, earned.total.tolist(), strict=True))
    assert not [pair for pair, row in zip(pairs, _ANSWERS, strict=True) if said[pair] != (row["right"] == "yes")]
    assert earned.failures == 0


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


_PIECES = ["<think>a</think>", "\\boxed", "\\boxed{", "\\boxed{}", "\\boxed{1} and ", "}", " ", "{", "\\", "**a", "$a "]
_PIECES += [" __a", "\\text{", "\\text{{}", "A, ", "(", "²", "\uff41"]


def _long(size: int) -> list[str]:
    """Returns completions of some `size` characters that a careless search goes over again and again."""
    repeated = [piece * (size // len(piece)) for piece in _PIECES]
    nested = ["{" * (size // 2) + "}" * (size // 2), "\\boxed{" * (size // 8) + "}" * (size // 8)]
    nested.append("\\boxed{1" * (size // 9) + "}" * (size // 9))
    numbered = ", ".join(f"\\boxed{{{number}}}" for number in range(size // 14))
    inside = ["\\boxed{A. ^" + text + "}" for text in repeated + nested]
    before = [text + "\\boxed{1}" for text in repeated]
    return ["<think></think>" + text for text in [*inside, *nested, numbered, *before]]


@pytest.mark.parametrize("name", ["format", "exact_match", "word_match", "multiple_choice", "math_verify"])
def test_rewards_of_text_take_linear_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin.processes, "is_worker", lambda: True)  # no limit of time

    def seconds(completion: str) -> float:
        gc.disable()  # a collection among the objects of a long session takes a second by itself
        try:
            began = time.thread_time()
            get_reward(name)(completion, _sample("1"))
            return time.thread_time() - began
        finally:
            gc.enable()

    for short, long in zip(_long(10_000), _long(100_000), strict=True):
        took = seconds(long)
        assert took < 1.0, long[:40]
        assert took < 0.2 or seconds(long) < 40 * seconds(short), long[:40]
