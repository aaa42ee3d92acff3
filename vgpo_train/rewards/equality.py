"""Whether an answer is the gold one: the same choice, list, system or value.

math-verify compares expressions (`quantities`). What it does not read, or reads in another sense, is taken
apart before: choices with their text, lists, names, words (to a parser of LaTeX "east" is a product, equal to "seat").
"""

import re
from typing import NamedTuple

from vgpo_train.rewards.answers import CIRCLED, tidy
from vgpo_train.rewards.phrases import normal_words, plain_math, same_name, split_name, without_preamble
from vgpo_train.rewards.quantities import approximates, close_up, contradict, same_expression, same_value

_LONGEST = 2000  # characters of an answer that is taken apart
_LETTERS = re.compile(r"([A-J])\s*[=:]\s*(?!\1)[A-J]")  # options or sets, not a name with its value
_OPTION = re.compile(r"(?<![A-Za-z0-9\\])\(?([A-J])\s*[).:]\s*")
_SYSTEM = re.compile(
    r"(?:\\\{|\{)?\s*\\begin\s*\{(cases|array|aligned|split|gathered|matrix)\}\s*(?:\{[lcr|]*\})?(.*)\\end\s*\{\1\}\s*(?:\\\}|\})?",
    re.DOTALL,
)
_SEPARATOR = re.compile(r"\s*\\cup(?![a-z])\s*|\s*[,;]\s*(?:(?:and|or)(?![a-z]))?|\s+(?:and|or)\s+|\s*\\\\(?![a-zA-Z])")
_RELATION = re.compile(r"(?<![<>!])=|\\(?:parallel|perp|cong|sim)(?![a-zA-Z])")  # the same from either side
_BUILT_SET = re.compile(r"^(?:[A-Z]\s*=\s*)?\\?\{\s*[a-z]\s*(?:\||\\mid|:)(.*?)\\?\}$", re.DOTALL)  # {x | x > 1}


def same_answer(gold: str, answer: str, problem: str = "") -> bool:
    """Whether `answer` means what `gold` does.

    Args:
        gold: the right answer, as text or LaTeX, without its box.
        answer: what was answered, without its box.
        problem: the question; the options A, B, ... that it lists make letter and text of a choice one answer.
    """
    if gold.strip() == answer.strip() != "":
        return True
    if max(len(gold), len(answer)) > _LONGEST:
        return tidy(gold) == tidy(answer)
    gold, answer = (without_preamble(tidy(text)) for text in (gold, answer))
    if not gold or not answer:
        return False
    chosen = _same_choice(gold, answer, _options(problem))
    return _same(gold, answer) if chosen is None else chosen


def same_choice(gold: str, answer: str) -> bool:
    r"""Whether both choose the same letters: A, (A) text, A: text, A, 5 and \text{A} choose A, `A dog` nothing."""
    gold, answer = (without_preamble(tidy(text)) for text in (gold, answer))
    for choices in (_TO_J, _TO_Z):
        if several := choices.several(gold):
            return several == choices.several(answer)
        if letter := choices.one(gold)[0]:
            return letter == choices.chosen(answer)
    return False


class _Choices:
    """Reads choices whose letters are in a range, such as A-J."""

    def __init__(self, letters: str) -> None:
        self._one = re.compile(
            rf"\(?\s*([{letters}])\s*(?:\)\s*[.:]?\s*(.*)|(?:\.|:(?!\d))\s*(.*))?", re.DOTALL | re.IGNORECASE
        )
        self._chosen = re.compile(
            rf"([{letters}])(?:\s*[,-]\s+(?!and\b|or\b)|\s*=\s*(?=[-\d\\])|\s+(?=[\d\\(])).*", re.DOTALL
        )
        another = rf"(?:[,;/]|\bor\b|\band\b)\s*\(?[{letters}]"
        self._another, self._further = re.compile(rf"{another}\b"), re.compile(rf"{another}\s*(?:[).:]|$)")
        self._mark = mark = f"[{letters}{CIRCLED}]"
        self._several = re.compile(rf"\(?{mark}\)?(?:(?:\s*[,;&]\s*(?:and\s+)?|\s+and\s+|\s*)\(?{mark}\)?)+")

    def one(self, text: str) -> tuple[str | None, str]:
        """Returns letter and text of a choice."""
        match = self._one.fullmatch(text)
        if match is None:
            return None, ""
        said = (match.group(2) or match.group(3) or "").strip()
        if self._further.search(said) or self._one.fullmatch(said):  # A. 5 or B. 6 and (A)(B) choose nothing
            return None, ""
        return match.group(1).upper(), said

    def chosen(self, text: str) -> str | None:
        """Returns the letter of a choice that is known to be one: `A, 5` and `A = 5`, too."""
        letter = self.one(text)[0]
        if letter or self.several(text) or self._another.search(text):
            return letter
        match = self._chosen.fullmatch(text)
        return match[1] if match else None

    def several(self, text: str) -> list[str]:
        """Returns the letters of several choices, such as A, C or ACD, in order."""
        letters = re.findall(self._mark, text) if self._several.fullmatch(text) else []
        return sorted(letters) if len(set(letters)) == len(letters) else []


_TO_J, _TO_Z = _Choices("A-J"), _Choices("A-Z")


def _options(problem: str) -> dict[str, str]:
    """Returns the options A, B, ... that a problem lists, by letter."""
    options: dict[str, str] = {}
    _, *pieces = _OPTION.split(problem)  # letter, text, letter, text, ...
    for letter, text in zip(pieces[::2], pieces[1::2], strict=True):
        if letter == "ABCDEFGHIJ"[len(options) : len(options) + 1]:
            options[letter] = text.strip().partition("\n")[0].strip(" ,;")
    return options if len(options) > 1 else {}


def _same_choice(gold: str, answer: str, options: dict[str, str]) -> bool | None:
    """Compares as choices; None if neither is one, or the text of a letter is not known."""
    several, also = _TO_J.several(gold), _TO_J.several(answer)
    if (several or also) and re.search(r"\bor\b", gold + " " + answer):
        return False
    if several and also:
        return several == also
    (gold_letter, gold_text), (letter, text) = _TO_J.one(gold), _TO_J.one(answer)
    if gold_letter and not gold_text and not letter:
        letter = _TO_J.chosen(answer)
    if gold_letter and letter:
        return gold_letter == letter and (not gold_text or not text or _same(gold_text, text))
    if not gold_letter and not letter:
        return None
    chosen, said, other = (gold_letter, gold_text, answer) if gold_letter else (letter, text, gold)
    said = said or tidy(options.get(chosen or "", ""))
    return _same(said, other) if said else None


class _Parts(NamedTuple):
    """A list, tuple, set, interval or system."""

    items: list[str]
    brackets: str  # both in one; nothing for a bare list
    point: str = ""  # the name of a point


def _same(gold: str, answer: str) -> bool:
    if close_up(gold) == close_up(answer):
        return True
    if normal_words(gold) in ("yes", "no", "true", "false", "none", "undefined"):
        return normal_words(gold) == normal_words(answer)
    gold, answer = (_BUILT_SET.sub(r"\1", plain_math(text)) for text in (gold, answer))
    if re.fullmatch("[A-J]", gold) and _LETTERS.fullmatch(answer):
        return False
    golds, answers = _alternatives(gold), _alternatives(answer)
    if len(golds) + len(answers) > 2:
        return any(_same(value, other) for value in golds for other in answers)
    if _turned(gold, answer):
        return True
    one, other = _parts(gold), _parts(answer)
    if one and other:
        return _same_parts(one, other) or (r"\cup" in gold + answer and same_expression(gold, answer))
    if one or other:  # such as an interval and an inequality, or a set of one
        return same_expression(gold, answer)
    (gold_name, gold_value), (name, value) = split_name(gold), split_name(answer)
    if gold_name and name and not same_name(gold_name, name):
        return bool(re.search("[a-z]", gold_value)) and same_expression(gold, answer)  # y = x and x = y
    sides = answer.split("=")[bool(name) :]
    if len(sides) > 1 and contradict(sides[0], sides[-1]):  # 6 = 5
        return False
    if bool(gold_name) != bool(name) and "=" in gold_value + value:
        return same_expression(gold, answer)
    return same_value(gold_value, value)


def _alternatives(text: str) -> list[str]:
    r"""Returns value and number of `value \approx number`, the text itself otherwise."""
    value, approximate, number = (part.strip() for part in text.rpartition(r"\approx"))
    return [value, number] if approximate and approximates(number, split_name(value)[1]) else [text]


def _turned(gold: str, answer: str) -> bool:
    """Whether `answer` is the relation `gold` from its other side, such as BD = AC for AC = BD."""
    relations = _RELATION.findall(gold)
    if len(relations) != 1 or relations != _RELATION.findall(answer):
        return False
    (left, right), (first, last) = ([side.strip() for side in _RELATION.split(text)] for text in (gold, answer))
    return same_value(left, last) and same_value(right, first)


def _same_parts(gold: _Parts, answer: _Parts) -> bool:
    if len(gold.items) != len(answer.items) or not _brackets_agree(gold, answer):
        return False
    if gold.point and answer.point and gold.point != answer.point:
        return False
    if _in_order(gold, answer):
        return all(_same(one, other) for one, other in zip(gold.items, answer.items, strict=True))
    rest = list(answer.items)
    for item in gold.items:
        found = next((other for other in rest if _same(item, other)), None)
        if found is None:
            return False
        rest.remove(found)
    return True


def _brackets_agree(gold: _Parts, answer: _Parts) -> bool:
    if gold.brackets and answer.brackets:
        return gold.brackets == answer.brackets
    # A point may lose its brackets, a set its braces; an interval with an end of its own not.
    return gold.brackets not in ("[]", "[)", "(]") and answer.brackets not in ("[)", "(]")


def _in_order(gold: _Parts, answer: _Parts) -> bool:
    if "()" in (gold.brackets, answer.brackets) or gold.brackets == answer.brackets in ("[]", "[)", "(]"):
        return True
    names, also = ([split_name(item)[0] for item in parts.items] for parts in (gold, answer))
    # x = 1, y = 2 beside 1, 2
    return any(len(set(one)) > 1 and not any(other) for one, other in ((names, also), (also, names)))


def _parts(text: str) -> _Parts | None:
    """Takes a list apart; None for what is none."""
    system = _SYSTEM.fullmatch(text)
    if system:
        lines = [line.replace("&", " ").strip(" ,;.") for line in system.group(2).split(r"\\")]
        return _Parts([line for line in lines if line], "") if any("=" in line for line in lines) else None
    if r"\begin" in text:
        return None
    name, value = split_name(text)
    value = re.sub(r"[a-zA-Z]\s*\\in(?![a-z])\s*", "", value)
    value = value.replace(r"\{", "{").replace(r"\}", "}")
    if value[:1] + value[-1:] in ("{}", "()", "[]", "(]", "[)"):
        items = _split(value[1:-1])
        if items is not None and (len(items) > 1 or value[0] == "{"):
            return _Parts(items, value[0] + value[-1], name if re.fullmatch("[A-Z]'?", name) else "")
    items = _split(text)
    return _Parts(items, "") if items is not None and len(items) > 1 else None


def _split(text: str) -> list[str] | None:
    """Splits at commas, semicolons, "and" and "or" outside of brackets; None if brackets do not match."""
    items = []
    depth = start = place = 0
    while place < len(text):
        separator = _SEPARATOR.match(text, place) if depth == 0 else None
        if separator:
            items.append(text[start:place])
            start = place = separator.end()
            continue
        depth += (text[place] in "([{") - (text[place] in ")]}")
        if depth < 0:
            return None
        place += 1
    items.append(text[start:])
    return [item.strip() for item in items if item.strip()] if depth == 0 else None
