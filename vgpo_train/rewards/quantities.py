"""Whether two values are equal: numbers with their units, words, expressions."""

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import math_verify
from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
from math_verify import LatexExtractionConfig

from vgpo_train.rewards.phrases import is_words, normal_words
from vgpo_train.rewards.units import Unit, may_touch, parse_unit

_NO_LIMIT = 3600  # seconds; the pool's limit comes before, and None would be warned of
_DIGITS = 6  # in which a decimal number must be right
_TINY = 1e-4  # numbers below are all 0 to math-verify, which rounds after the point
_POINTS = re.compile(r"((?:\\[a-z]+\s*)?)\{?([A-Z]{2,4})\}?")  # a segment, an angle: named from either end
_COUNTED = re.compile(
    r"([-+]?(?:[\d.,]*\d(?:/\d+)?|\d*\s*\\frac\{\d+\}\{\d+\})(?:\\%)?)\s*(\(?[A-Za-z]{3,}(?:[ -][A-Za-z]+){0,3}\)?)"
)
_QUALIFIED = re.compile(r"(.+?)\s+([A-Za-z]{2,}(?:\s[A-Za-z]+){0,3})")  # 5 m/s to the left
_RANGE = re.compile(r"\d+\s*-\s*\d+")
_CURRENCY = re.compile(r"([-+]?)\s*(\\\$|[$€£¥₹]|Rs\b\.?)\s*(?=[\d.])")
_BEFORE_UNIT = re.compile(r"(?<=[\w})!])\s*(?=\^\\circ|[A-Za-z(\\€£¥₹$元])")
_GROUPED = re.compile(r"[-+]?\s*\d{1,3}(?:([ ,'])\d{3})(?:\1\d{3})*(?:\.\d+)?")
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
_DEGREES = re.compile(r"(\d+(?:\.\d+)?)\s*\^\\circ")
_ANGLE = (("angle", 1),)
# Units are taken off before; math-verify's own list also takes `2c` for 2.
_LATEX = LatexExtractionConfig(
    normalization_config=NormalizationConfig(basic_latex=True, malformed_operators=True, nits=True, boxed="none")
)


class _Quantity(NamedTuple):
    number: str
    unit: Unit | None = None
    words: str = ""  # what is counted, such as apples
    certain: bool = True  # the unit cannot be a variable


def same_value(gold: str, answer: str) -> bool:
    """Whether two values, tidy LaTeX without names and lists, are equal; a unit may be missing but not another one."""
    if close_up(gold) == close_up(answer):
        return True
    named = _POINTS.fullmatch(gold), _POINTS.fullmatch(answer)
    if all(named):
        return named[0][1].strip() == named[1][1].strip() and named[0][2] in (named[1][2], named[1][2][::-1])
    if _RANGE.fullmatch(gold) and _RANGE.fullmatch(answer):
        return False  # years or pages, not differences
    one, other = _quantity(gold), _quantity(answer)
    if one is None and other is None and (is_words(gold) or is_words(answer)):
        return normal_words(gold).replace(" ", "") == normal_words(answer).replace(" ", "")  # north-east
    one, other = one or _Quantity(gold), other or _Quantity(answer)
    if not one.certain and not (other.unit or other.words):
        return same_expression(gold, answer)  # 5h beside no unit is five times h
    if one.words and other.words:
        counted, also = (set(normal_words(quantity.words).split()) for quantity in (one, other))
        if not (counted <= also or also <= counted):
            return False
    elif (one.words and not one.unit and other.unit) or (other.words and not other.unit and one.unit):
        return False
    if one.unit and other.unit:
        return _same_measure(one, other)
    return same_expression(one.number, other.number) or _same_angle(one, other)


def same_expression(gold: str, answer: str) -> bool:
    """Whether math-verify finds two expressions equal."""
    gold, answer = (_radians(_ungrouped(text)) for text in (gold, answer))
    if close_up(gold) == close_up(answer):
        return True
    if is_words(gold) or is_words(answer):
        return False
    parsed = _parse(gold), _parse(answer)
    if not all(parsed):
        return False
    one, other = (_number(found[0]) for found in parsed)
    if one is not None and other is not None and 0 < max(abs(one), abs(other)) < _TINY:
        return math.isclose(one, other, rel_tol=10**-_DIGITS)
    return math_verify.verify(*parsed, float_rounding=_DIGITS, allow_set_relation_comp=True, timeout_seconds=_NO_LIMIT)


def close_up(text: str) -> str:
    """Returns a text without spaces, but for those between digits, and a letter's index as H2O has it."""
    return re.sub(r"(?<=[A-Za-z])_\{?(\d+)\}?", r"\1", re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text))


def _same_measure(gold: _Quantity, answer: _Quantity) -> bool:
    if gold.unit.dimensions != answer.unit.dimensions:
        return False
    if gold.unit.size == answer.unit.size:
        return same_expression(gold.number, answer.number)
    one, other = (_number((_parse(_ungrouped(quantity.number)) or [None])[0]) for quantity in (gold, answer))
    return None not in (one, other) and math.isclose(
        one * gold.unit.size, other * answer.unit.size, rel_tol=10**-_DIGITS
    )


def _same_angle(gold: _Quantity, answer: _Quantity) -> bool:
    """Whether one is an angle in degrees and the other, without a unit, the same one in terms of pi."""
    for degrees, other in ((gold, answer), (answer, gold)):
        if degrees.unit and degrees.unit.dimensions == _ANGLE and degrees.unit.size != 1 and r"\pi" in other.number:
            return same_expression(rf"\frac{{({degrees.number}) \pi}}{{180}}", other.number)
    return False


def _quantity(text: str) -> _Quantity | None:
    """Takes a number and its unit apart; None for what has no unit."""
    currency = _CURRENCY.match(text)
    if currency:
        number = currency.group(1) + text[currency.end() :]
        inner = _quantity(number)
        unit = parse_unit(currency.group(2))
        if inner is None or inner.unit == unit:
            return _Quantity(inner.number if inner else number, unit)
    for number, space, rest in _unit_splits(text):
        unit = parse_unit(rest)
        if unit is not None:
            return _Quantity(number, unit, certain=bool(space) or may_touch(rest))
        qualified = _QUALIFIED.fullmatch(rest)
        unit = parse_unit(qualified.group(1)) if qualified else None
        if unit is not None and is_words(qualified.group(2)):
            return _Quantity(number, unit, qualified.group(2))
    counted = _COUNTED.fullmatch(text)
    if counted and is_words(counted.group(2)):
        return _Quantity(counted.group(1), words=counted.group(2).strip("()"))
    return None


def _unit_splits(text: str) -> Iterator[tuple[str, str, str]]:
    """Yields the ways of dividing a text into a value, space and what may be a unit."""
    for match in _BEFORE_UNIT.finditer(text):
        number, space, rest = text[: match.start()], match.group(), text[match.end() :]
        if _TRIGONOMETRY.search(number):
            continue
        if not number[-1].isalpha() or number.endswith(r"\pi") or (space and may_touch(rest)):
            yield number, space, rest


def _radians(text: str) -> str:
    """Returns the degrees in an expression of angles, such as \\sin 30^\\circ, as radians."""
    return _DEGREES.sub(r"{(\\frac{\1 \\pi}{180})}", text) if _TRIGONOMETRY.search(text) else text


def _ungrouped(number: str) -> str:
    """Returns 1,234,567 and 1 234 567 as 1234567."""
    return re.sub(r"(?<=\d)[ ,'](?=\d)", "", number) if _GROUPED.fullmatch(number) else number


def _parse(text: str) -> list[Any]:
    """Returns what math-verify reads, nothing where it cannot."""
    plain = text.replace(r"\$", "").replace("$", "")
    return math_verify.parse(f"${plain}$", [_LATEX], fallback_mode="no_fallback", parsing_timeout=_NO_LIMIT)


def _number(parsed: Any) -> float | None:
    """Returns a parsed number as a float; None for what is none."""
    if not getattr(parsed, "is_number", False):
        return None
    try:
        value = float(parsed.doit().evalf())
    except Exception:  # sympy raises many kinds
        return None
    return value if math.isfinite(value) else None
