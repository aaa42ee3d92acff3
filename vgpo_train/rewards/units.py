"""Units of measure at the end of an answer: what they measure, and how many of the dimension's first unit they are."""

import re
from collections import Counter
from typing import NamedTuple

_PREFIXES = {"k": 1e3, "c": 1e-2, "m": 1e-3, r"\mu": 1e-6, "u": 1e-6, "n": 1e-9, "M": 1e6, "G": 1e9, "d": 1e-1}
_LONG_PREFIXES = {"kilo": 1e3, "centi": 1e-2, "milli": 1e-3, "micro": 1e-6, "nano": 1e-9, "mega": 1e6, "deci": 1e-1}
# By dimension: symbols that take a prefix, words that take a prefix, and further units with their size.
_METRIC: dict[str, tuple[str, str, float]] = {
    "length": ("m", "meter metre", 1.0),
    "mass": ("g", "gram gramme", 1e-3),
    "volume": ("L l", "liter litre", 1e-3),
    "time": ("s", "", 1.0),
    "force": ("N", "newton", 1.0),
    "energy": ("J eV", "joule", 1.0),
    "power": ("W", "watt", 1.0),
    "pressure": ("Pa", "pascal", 1.0),
    "voltage": ("V", "volt", 1.0),
    "current": ("A", "ampere amp", 1.0),
    "resistance": (r"\Omega", "ohm", 1.0),
    "frequency": ("Hz", "hertz", 1.0),
    "amount": ("mol", "mole", 1.0),
    "capacitance": ("F", "farad", 1.0),
    "charge": ("C", "coulomb", 1.0),
    "field": ("T", "tesla", 1.0),
}
_OTHER: dict[str, dict[str, float]] = {
    "length": {
        "in inch inches": 0.0254, "ft foot feet": 0.3048, "yd yard yards": 0.9144, "mi mile miles": 1609.344,
    },
    "mass": {"t ton tons tonne tonnes": 1e3, "lb lbs pound pounds": 0.45359237, "oz ounce ounces": 0.028349523125},
    "volume": {"gal gallon gallons": 3.785411784e-3, "cc": 1e-6},
    "time": {
        "sec secs second seconds": 1.0, "min mins minute minutes": 60.0, "h hr hrs hour hours": 3600.0,
        "d day days": 86400.0, "wk week weeks": 604800.0, "month months": 2629746.0, "yr yrs year years": 31556952.0,
    },
    "angle": {r"^\circ deg degree degrees": 3.141592653589793 / 180, "rad radian radians": 1.0},
    "energy": {"cal calorie calories": 4.184},
    "Celsius": {r"^\circC celsius": 1.0},
    "Fahrenheit": {r"^\circF fahrenheit": 1.0},
    "level": {"dB decibel decibels": 1.0},
    "kelvin": {"K kelvin kelvins": 1.0},
    "dollar": {r"\$ $ dollar dollars USD usd": 1.0, "cent cents": 0.01},
    "euro": {"€ euro euros EUR": 1.0},
    "pound sterling": {"£ GBP": 1.0},
    "yuan": {"¥ ￥ yuan RMB CNY 元": 1.0},
    "rupee": {"₹ rupee rupees Rs INR": 1.0},
    "unit": {"unit units": 1.0},
}  # fmt: skip
_WORD_POWERS = {"square": 2, "squared": 2, "sq": 2, "cubic": 3, "cubed": 3, "cu": 3}
_SPEEDS = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h", "kmph": "km/h", "fps": "ft/s", "rpm": "rpm"}
# Letters that stand for variables at least as often: units after a space alone.
_RISKY = {"s", "F", "l", "L", "h", "d", "t", "A", "C", "J", "K", "N", "T", "V", "W"}


class Unit(NamedTuple):
    """A product of powers of dimensions, and its size."""

    dimensions: tuple[tuple[str, int], ...]
    size: float


def _table() -> dict[str, tuple[str, float]]:
    table: dict[str, tuple[str, float]] = {}
    for dimension, (symbols, words, size) in _METRIC.items():
        for symbol in symbols.split():
            scale = size * (1.602176634e-19 if symbol == "eV" else 1)
            table[symbol] = (dimension, scale)
            table |= {prefix + symbol: (dimension, factor * scale) for prefix, factor in _PREFIXES.items()}
        for word in words.split():
            for prefix, factor in {"": 1.0, **_LONG_PREFIXES}.items():
                table |= {prefix + word + plural: (dimension, factor * size) for plural in ("", "s")}
    for prefix, factor in _LONG_PREFIXES.items():
        table |= {prefix + word: ("time", factor) for word in ("second", "seconds")}
    table["kcal"] = ("energy", 4184.0)
    for dimension, units in _OTHER.items():
        for names, size in units.items():
            table |= dict.fromkeys(names.split(), (dimension, size))
    return table


_UNITS = _table()
_UNITS.pop("cd", None)
_NAMES = "|".join(re.escape(name) for name in sorted(_UNITS, key=len, reverse=True))
_POWER = r"(?:\s*\^\s*\{?\s*(-?[123])\s*\}?|(?<=[mt])([23])(?![0-9]))?"
_TERM = re.compile(rf"({_NAMES}){_POWER}(?![A-Za-z])")
_WORD_POWER = re.compile(rf"\b({'|'.join(_WORD_POWERS)})\b\.?\s*")
_OVER = re.compile(r"\s*(/|\bper\b|\\div|\bp\.)\s*")
_TIMES = re.compile(r"\s*(?:\\cdot|\\times|\*|\.|-)?\s*")


def parse_unit(text: str) -> Unit | None:
    """Returns the unit that `text`, tidy LaTeX, names; None where it names none."""
    text = text.strip()
    if text.startswith("(") and text.endswith(")"):
        text = text[1:-1].strip()
    text = re.sub(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", text)
    text = re.sub(r"\\mu\s+", r"\\mu", re.sub(r"\^\\circ\s*", r"^\\circ", text))
    text = re.sub(r"(?:\bdegrees?\s+|\^\\circ)(celsius|fahrenheit|[CF]\b)", _degrees, text, flags=re.IGNORECASE)
    text = re.sub(r"(?<![\\A-Za-z])[A-Za-z]{3,}", lambda match: _known_case(match.group()), text)
    text = _SPEEDS.get(text, text)
    dimensions: Counter[str] = Counter()
    size, sign, place, pending = 1.0, 1, 0, 0
    while place < len(text):
        over = _OVER.match(text, place)
        if over:
            sign, place = -1, over.end()
            continue
        word = _WORD_POWER.match(text, place)
        if word:
            pending, place = _WORD_POWERS[word.group(1)], word.end()
            continue
        term = _TERM.match(text, place)
        if not term:
            return None
        after = re.match(r"\s*(squared|cubed)\b", text[term.end() :])
        power = int(term.group(2) or term.group(3) or pending or (_WORD_POWERS[after.group(1)] if after else 1))
        dimension, one = _UNITS[term.group(1)]
        dimensions[dimension] += sign * power
        size *= one ** (sign * power)
        pending = 0
        place = term.end() + (after.end() if after else 0)
        if not _OVER.match(text, place):
            place = _TIMES.match(text, place).end()  # type: ignore[union-attr]
    if not dimensions or pending:
        return None
    volume = dimensions.pop("volume", 0)
    dimensions["length"] += 3 * volume
    return Unit(tuple(sorted((name, power) for name, power in dimensions.items() if power)), size)


def _degrees(match: re.Match[str]) -> str:
    return r"^\circ" + match.group(1)[0].upper()


def _known_case(word: str) -> str:
    return word if word in _UNITS else word.lower()


def may_touch(unit: str) -> bool:
    """Whether a unit may stand at a number without a space, as in `5m`; `5h` may be five times h."""
    return unit.strip() not in _RISKY
