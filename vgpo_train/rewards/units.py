"""Units of measure at the end of an answer, read by pint."""

import re

import pint
from pint import Unit

_REGISTRY = pint.UnitRegistry(on_redefinition="ignore")
for _definition in (
    "dollar = [dollar] = USD = usd", "cent = 0.01 dollar", "euro = [euro] = EUR", "sterling = [sterling] = GBP",
    "yuan = [yuan] = RMB = CNY", "rupee = [rupee] = INR = Rs", "unit = [unit] = _ = units",
    "ton = 1000 kilogram", "kmh = kilometer / hour",
):  # fmt: skip
    _REGISTRY.define(_definition)
DEGREE, RADIAN = _REGISTRY.degree, _REGISTRY.radian
# Of short names only these are units: to pint `a` is a year, `c` the speed of light and `ab` a barn.
_SHORT = re.compile(r"[kcmundMGµ]?[mgsLlJNWVACFTΩ]|[hdtK]|in|ft|yd|mi|lb|oz|hr|yr|dB|eV|Hz|Pa|cc|sq|Rs")
_RISKY = {*"sFlLhdtACJKNTVW"}  # as often variables: units after a space alone
_CHINESE = {
    "平方": "square ", "立方": "cubic ", "每": " per ", "厘米": "cm", "毫米": "mm", "分米": "dm", "千米": "km",
    "公里": "km", "米": "m", "千克": "kg", "公斤": "kg", "克": "g", "吨": "ton", "毫升": "mL", "升": "L",
    "小时": "hour", "时": "hour", "分钟": "minute", "分": "minute", "秒": "second", "度": "degree", "元": "yuan",
}  # fmt: skip
_PLAIN = [
    (re.compile("|".join(_CHINESE)), lambda match: _CHINESE[match[0]]),
    (re.compile(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"\1/\2"),
    (re.compile(r"\\mu\s*"), "µ"), (re.compile(r"\\Omega"), "Ω"),
    (re.compile(r"(?:\bdegrees?\s+|\^\\circ\s*)([cf])(?:elsius|ahrenheit|\b)", re.IGNORECASE),
     lambda match: "deg" + match[1].upper()),
    (re.compile(r"\^\\circ(?:\s*degrees?)?"), " degree "),
    (re.compile(r"\^\s*\{?\s*(-?\d)\s*\}?|(?<=[mt])(?=[23]\b)"), r"**\1"),  # cm^{2}, cm2
    (re.compile(r"\bms(?=\*\*-)"), "m s"),
    (re.compile(r"\\cdot|\\times"), "*"),
    (re.compile(r"\\div"), "/"),
    (re.compile(r"(?<=[A-Za-z])\.(?=\s|$)"), ""),  # sq. ft.
    (re.compile(r"^\s*\((.*)\)\s*$"), r"\1"),
    (re.compile(r"\\?\$"), "dollar"), (re.compile("€"), "euro"), (re.compile("£"), "sterling"),
    (re.compile("¥"), "yuan"), (re.compile("₹"), "rupee"),
    (re.compile(r"(?<![A-Za-z])[A-Z][a-z]{2,}"), lambda match: match[0].lower()),
]  # fmt: skip


def parse_unit(text: str) -> Unit | None:
    """Returns the unit that `text`, tidy LaTeX, names; None if it names none."""
    for pattern, replacement in _PLAIN:
        text = pattern.sub(replacement, text)
    words = re.findall(r"[^\W\d_]+", text)
    if not words or not all(len(word) > 2 or _SHORT.fullmatch(word) for word in words):
        return None
    try:
        return _REGISTRY.parse_units(text.strip())
    except Exception:  # pint raises many kinds
        return None


def same_amount(one: float, unit: Unit, other: float, other_unit: Unit) -> bool:
    """Whether two numbers with their units are equal in six digits."""
    if not unit.is_compatible_with(other_unit):
        return False
    converted = _REGISTRY.Quantity(one, unit).m_as(other_unit)
    return abs(converted - other) <= 1e-6 * max(abs(converted), abs(other))


def may_touch(unit: str) -> bool:
    """Whether a unit may stand at a number without a space, as in `5m`; `5h` may be five times h."""
    return unit.strip() not in _RISKY
