"""Whether two values are equal: numbers with their units, words, expressions."""

import math
import re
from typing import Any, NamedTuple

import math_verify
from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
from math_verify import LatexExtractionConfig

from vgpo_train.rewards.phrases import follows_a_number, is_words, normal_words
from vgpo_train.rewards.units import DEGREE, RADIAN, Unit, may_touch, parse_unit, same_amount

_NO_LIMIT = 3600  # seconds; the pool's limit comes before, and None would be warned of
_DIGITS = 6  # in which a decimal number must be right
_TINY = 1e-4  # numbers below are all 0 to math-verify, which rounds after the point
_POINTS = re.compile(r"((?:\\[a-z]+\s*)?)\{?([A-Z]{2,4})\}?")  # a segment, an angle: named from either end
_RANGE = re.compile(r"(\d+)\s*-\s*(\d+)")
_DATE = re.compile(r"(\d{4})([-/])(\d{1,2})\2(\d{1,2})")
# Words, not a number, before what pint takes for a unit: the circle, a red circle; `a cm` is a in centimetres.
_NO_NUMBER = re.compile(r"(?:[A-Za-z]+\s+)*[A-Za-z]{2,}")
_HALF_DAY = re.compile(r"(?<=\d:\d\d)\s*[ap]m$", re.IGNORECASE)
_DECADE = re.compile(r"(?:the\s)?\d{3}0s")
_NO_FACTOR = re.compile(r"!\s*\d+(?![\d!])")  # 3!1, to math-verify 3! times 1
_CURRENCY = re.compile(r"([-+]?)\s*(\\?\$|[€£¥₹])\s*(?=[\d.])(.*)")
_NUMBER = re.compile(r"[-+]?(?:[\d.,]*\d(?:/\d+)?|\d*\s*\\frac\{\d+\}\{\d+\})(?:\\%)?")
_WORDS = re.compile(r"\(?(?!(?:st|nd|rd|th)\b)[A-Za-z]{2,}(?:[ -](?:[A-Za-z]{2,}|a)){0,3}\)?|[一-鿿]+")
_QUALIFIED = re.compile(r"(.+?)\s+([A-Za-z]{2,}(?:\s[A-Za-z]+){0,3})")  # 5 m/s to the left
_BEFORE_UNIT = re.compile(r"(?<=[\w})!%])\s*(?=\^\\circ|[A-Za-z(\\€£¥₹$Ωµμ一-鿿])")
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
        kind, ends = named[0][1].strip(), named[1][2]
        return kind == named[1][1].strip() and named[0][2] in ((ends,) if kind == r"\vec" else (ends, ends[::-1]))
    ranges = [match for match in (_RANGE.fullmatch(gold), _RANGE.fullmatch(answer)) if match]
    dates = [match and (int(match[1]), int(match[3]), int(match[4])) for match in map(_DATE.fullmatch, (gold, answer))]
    if any(dates):
        return dates[0] == dates[1]
    if len(ranges) == 2 or any(int(match[1]) < int(match[2]) for match in ranges):
        return False  # years or pages, not differences
    if bool(_HALF_DAY.search(gold)) != bool(_HALF_DAY.search(answer)):
        gold, answer = _HALF_DAY.sub("", gold), _HALF_DAY.sub("", answer)
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
    if _is_percent(one, other) or _is_percent(other, one):
        return False
    if not one.unit and other.unit == RADIAN and r"\pi" not in other.number and _more_than_a_turn(other.number):
        return False  # a bare 90 is one of degrees
    if one.unit and other.unit and one.unit != other.unit:
        return _same_amount(one, other)
    if same_expression(one.number, other.number):
        return True
    percent = [number.endswith(r"\%") for number in (one.number, other.number)]
    if any(percent) and not all(percent):  # a sign that is left out
        return same_expression(*(number.removesuffix(r"\%").strip() for number in (one.number, other.number)))
    is_angle = {one.unit, other.unit} == {DEGREE, None} and r"\pi" in one.number + other.number
    return is_angle and _same_amount(one, other)


def _is_percent(one: _Quantity, other: _Quantity) -> bool:
    """Whether `one` is a percentage and `other` counts or measures something."""
    percent = one.number.endswith(r"\%") and not other.number.endswith(r"\%")
    return percent and bool(other.unit or other.words)


def _more_than_a_turn(radians: str) -> bool:
    number = _number(_parse(radians))
    return number is not None and abs(number) > 2 * math.pi


def approximates(number: str, value: str) -> bool:
    """Whether two numbers, whose units do not count, differ by 2% at most."""
    one, other = (_number(_parse((_quantity(side) or _Quantity(side)).number)) for side in (number, value))
    return None not in (one, other) and math.isclose(one, other, rel_tol=0.02)


def contradict(one: str, other: str) -> bool:
    """Whether two sides of an equation are numbers of one unit, or of none, that differ by more than 2%."""
    quantities = [_quantity(side) or _Quantity(side) for side in (one, other)]
    numbers = [_number(_parse(quantity.number)) for quantity in quantities]
    alike = quantities[0].unit == quantities[1].unit and quantities[0].words == quantities[1].words
    return alike and None not in numbers and not math.isclose(*numbers, rel_tol=0.02)


def same_expression(gold: str, answer: str) -> bool:
    """Whether math-verify finds two expressions equal."""
    if close_up(gold) == close_up(answer):
        return True
    if is_words(gold) or is_words(answer) or gold.count("'") != answer.count("'"):
        return False
    letters = [set(re.findall("[A-Za-z]", re.sub(r"\\[a-z]+", "", text))) for text in (gold, answer)]
    if letters[0] != letters[1] and len({frozenset(map(str.lower, each)) for each in letters}) == 1:
        return False  # to math-verify M is m
    parsed = _parse(gold), _parse(answer)
    if not all(parsed):
        return False
    one, other = map(_number, parsed)
    if one is not None and other is not None and 0 < max(abs(one), abs(other)) < _TINY:
        return math.isclose(one, other, rel_tol=10**-_DIGITS)
    return math_verify.verify(*parsed, float_rounding=_DIGITS, allow_set_relation_comp=True, timeout_seconds=_NO_LIMIT)


def close_up(text: str) -> str:
    """Returns a text without spaces, but for those between digits, and a letter's index as H2O has it."""
    return re.sub(r"(?<=[A-Za-z])_\{?(\d+)\}?", r"\1", re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text))


def _same_amount(gold: _Quantity, answer: _Quantity) -> bool:
    """Whether two numbers with units are equal; without a unit they are angles in radians."""
    one, other = (_number(_parse(quantity.number)) for quantity in (gold, answer))
    return None not in (one, other) and same_amount(one, gold.unit or RADIAN, other, answer.unit or RADIAN)


def _quantity(text: str) -> _Quantity | None:
    """Takes a number apart from its unit or from what is counted; None if it has neither."""
    if _DECADE.fullmatch(text):
        return None
    text = _CURRENCY.sub(r"\1\3 \2", text)  # $5
    for match in _BEFORE_UNIT.finditer(text):
        number, space, rest = text[: match.start()], match.group(), text[match.end() :]
        if _NO_NUMBER.fullmatch(number) or (number in ("a", "A") and re.match("[A-Za-z]{3}", rest)):
            continue
        if number[-1].isalpha() and not number.endswith(r"\pi") and not (space and may_touch(rest)):
            continue
        unit = parse_unit(rest)
        if unit is not None:
            return _Quantity(number, unit, certain=bool(space) or may_touch(rest))
        qualified = _QUALIFIED.fullmatch(rest)
        unit = parse_unit(qualified[1]) if qualified and follows_a_number(qualified[2]) else None
        if unit is not None:
            return _Quantity(number, unit, qualified[2])
        if _NUMBER.fullmatch(number) and _WORDS.fullmatch(rest) and is_words(rest):
            words = rest.strip("()")
            return _Quantity(number, words=words) if follows_a_number(words) else None
    return None


def _parse(text: str) -> list[Any]:
    """Returns what math-verify reads, nothing if it cannot."""
    if _NO_FACTOR.search(text):
        return []
    plain = text.replace(r"\$", "").replace("$", "")
    return math_verify.parse(f"${plain}$", [_LATEX], fallback_mode="no_fallback", parsing_timeout=_NO_LIMIT)


def _number(parsed: list[Any]) -> float | None:
    """Returns what was parsed as a float; None for what is no number."""
    try:
        value = float(parsed[0].doit().evalf())
    except Exception:  # sympy raises many kinds
        return None
    return value if math.isfinite(value) else None
