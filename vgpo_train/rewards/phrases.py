"""Words in answers: what stands before one, number words, mathematics typed as plain text, names of values."""

import re

_PREAMBLE = re.compile(
    r"(?:(?:so|thus|therefore|hence)\b,?\s*)?"
    r"(?:(?:(?:the\s+)?(?:final\s+|correct\s+|right\s+)?"
    r"(?:answer|option|choice|solution|result|figure|graph|statement|picture|image|diagram)s?)"
    r"(?:\s+(?:is|are))?\s*[:=]?\s*"
    r"|(?:[A-Za-z][a-z']*\s+){1,8}?(?:is|are|was|were|equals|measures)(?:\s+equal\s+to)?\s*:?\s+(?!not\b)"
    r"|(?:the\s+)?(?:points?|coordinates?|intervals?|vector)\s+(?=[(\[\\])|i\s+(?:choose|pick|select)\s+"
    r"|(?:it\s+is|it's|that's|there\s+are|there\s+is)\s+(?!not\b))",
    re.IGNORECASE,
)
_AFTER = re.compile(r"\s+(?:in total|altogether|in all|\(?approx\.?\)?|approximately)$", re.IGNORECASE)
_ABOUT = re.compile(
    r"(?:approximately|approx\.?|about|roughly|around|nearly|\\approx|\\sim|~|=)\s*(?=[-+\d\\.$])", re.IGNORECASE
)
_ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_NUMBER_WORDS = {word: value for value, word in enumerate(_ONES)} | {
    word: 10 * place for place, word in enumerate(_TENS, start=2)
}
_NUMBER_WORDS |= {f"{ten}-{one}": 10 * t + o for t, ten in enumerate(_TENS, 2) for o, one in enumerate(_ONES[1:10], 1)}
_COUNTS = "|".join(sorted(_NUMBER_WORDS, key=len, reverse=True))
_PARTS = {
    "third": 3, "fourth": 4, "quarter": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8, "ninth": 9, "tenth": 10,
}  # fmt: skip
_COUNT = re.compile(rf"({_COUNTS})(?=$|\s+[A-Za-z]+(?:\s+[A-Za-z]+)?$)", re.IGNORECASE)
_HALF = re.compile(r"^(?:a\s+|one[- ])?half(?!\w)", re.IGNORECASE)
_SHARE = re.compile(rf"^({_COUNTS})[- ]({'|'.join(_PARTS)})s?(?!\w)", re.IGNORECASE)  # two thirds
_NEGATIVE = re.compile(r"^(?:negative|minus)\s+", re.IGNORECASE)
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_PERIOD = re.compile(r"(\d{0,9})\.(\d{0,9}?)(?:\\(?:overline|bar|dot)\s*\{(\d{1,9})\}|(\d{1,6}?)\4{2,9}\.\.\.)")
_FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|lg|exp|max|min|gcd|lcm"
_GREEK = "alpha|beta|gamma|delta|epsilon|theta|lambda|mu|pi|rho|sigma|tau|phi|omega"
_PLAIN = [
    (re.compile(r"\\(?:approx|simeq|doteq)(?![a-z])"), "="),
    (re.compile(r"\b([ap])\.\s?m\b\.?", re.IGNORECASE), r"\1m"),
    (re.compile(r"(?<=\d)\s+to\s+(?=\d)"), ":"),
    (re.compile(r"(?<=\d)\s*dozen(?![a-z])"), r" \\times 12 "),
    (re.compile(r"(?<![\d/.])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d/])"), r"\1\\frac{\2}{\3}"),
    (re.compile(r"√\s*(?=[{(])"), "sqrt"),
    (re.compile(r"√\s*(\d+(?:\.\d+)?|\\?[A-Za-z]+)"), r"\\sqrt{\1}"),
    (re.compile(r"∛\s*(\d+|[A-Za-z])"), r"\\sqrt[3]{\1}"),
    (re.compile(r"(?<![\\A-Za-z])sqrt\s*\{"), r"\\sqrt{"),
    (re.compile(r"(?<![\\A-Za-z])sqrt\s*(\d+(?:\.\d+)?)"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![A-Za-z\\])(\d+(?:\.\d+)?|\.\d+)[eE]([-+]?)(\d+)(?![A-Za-z\d.])"),
     lambda m: rf"{m[1]} \times 10^{{{m[2].strip('+')}{m[3]}}}"),
    (re.compile(r"(?<=\d)\s*[xX*]\s*(?=10\s*\^)"), r" \\times "),
    (re.compile(r"(?<=\d)\s+x\s+(?=\d)"), r" \\times "),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\^\s*\(\s*([^()]*)\s*\)"), r"^{\1}"),
    (re.compile(r"\^\s*(-?\d+(?:\.\d+)?)(?!\d)"), r"^{\1}"),
    (re.compile(r"(?<![\\A-Za-z])infinity(?![A-Za-z])|(?<![\\A-Za-z])inf(?![A-Za-z])", re.IGNORECASE), r"\\infty "),
    (re.compile(r"<=|=<"), r"\\le "),
    (re.compile(r">=|=>"), r"\\ge "),
    (re.compile(r"!="), r"\\ne "),
    (re.compile(rf"(?<![\\A-Za-z])({_GREEK})(?![A-Za-z])"), r"\\\1 "),
    (re.compile(rf"(?<![\\A-Za-z])({_FUNCTIONS})(?=[\s(^_\\\d])"), r"\\\1 "),
    (re.compile(r"(?:\\?%|\s*\b(?:percent|percentage|pct)\b)(?:\s+points?\b)?", re.IGNORECASE), r"\\%"),
    (re.compile(r"(?<=\d)(?:st|nd|rd|th)(?![A-Za-z])"), ""),
]  # fmt: skip
_SCALED = re.compile(rf"(?<=\d)\s*({'|'.join(_SCALES)})(?![A-Za-z])", re.IGNORECASE)
_SYNONYMS = {
    "no solution": "none", "no solutions": "none", "no real solution": "none", "no real solutions": "none",
    "empty set": "none", "does not exist": "undefined", "dne": "undefined", "not defined": "undefined",
    "\\emptyset": "none", "\\{ \\}": "none", "\\{\\}": "none",
}  # fmt: skip
_SPELLINGS = {"grey": "gray", "colour": "color", "centre": "center", "metre": "meter", "litre": "liter"}
_KNOWN_WORDS = {"no", "up", "on", "in", "at", "by", "he", "it", "we", "us", "to", "of", "so", "ok", "go"}
_NOT_WORDS = {*_FUNCTIONS.split("|"), *_GREEK.split("|"), "frac", "sqrt", "cdot", "times", "div", "begin", "end"}
_OF_NUMBERS = re.compile(r"\\(?:frac|sqrt|times|cdot|div|pi|pm)(?![a-z])")
_NAME = re.compile(
    r"((?:\\(?:angle|triangle|overline|vec|hat|bar|Delta|alpha|beta|theta|gamma|phi|omega|lambda|mu|rho|sigma)\s*)?"
    r"(?:\{?[A-Za-z]{1,4}'?\}?|[A-Za-z]{3,}(?:\s[A-Za-z]+){0,3}|(?<=[a-z]))"
    r"(?:_(?:\{[^{}]*\}|\w))?(?:\s*\([^()=]*\))?(?:\^\{\d\})?|\([a-z](?:,\s*[a-z])+\)|\|[A-Za-z]+\|"
    r"|\\(?:angle|alpha|beta|theta|gamma|phi|omega|lambda|mu|rho|sigma)\s*\d?)\s*(?:=|:(?!\d))\s*(?![=<>])"
)


def _fraction(match: re.Match[str]) -> str:
    """Returns a decimal number with digits that repeat for ever as a fraction."""
    before, after, period = match.group(1) or "0", match.group(2), match.group(3) or match.group(4)
    digits = 10 ** len(after)
    below = digits * (10 ** len(period) - 1)
    above = int(before + after) * (10 ** len(period) - 1) + int(period)
    return rf"\frac{{{above}}}{{{below}}}"


def without_preamble(text: str) -> str:
    """Returns an answer without what leads to it, such as `The answer is` and `approximately`."""
    match = _PREAMBLE.match(text)
    if match and match.end() < len(text):
        text = text[match.end() :]
    text = _AFTER.sub("", text)
    return _ABOUT.sub("", text, count=1) if _ABOUT.match(text) else text


def plain_math(text: str) -> str:
    """Returns tidy text with mathematics typed as plain text, number words and percent words as LaTeX."""
    text = _HALF.sub(r"\\frac{1}{2}", _PERIOD.sub(_fraction, text))
    text = _SHARE.sub(lambda m: rf"\frac{{{_NUMBER_WORDS[m[1].lower()]}}}{{{_PARTS[m[2].lower()]}}}", text)
    text = _NEGATIVE.sub("-", text)
    counted = _COUNT.match(text, int(text.startswith("-")))
    if counted:
        text = text[: counted.start()] + str(_NUMBER_WORDS[counted.group(1).lower()]) + text[counted.end() :]
    text = _SCALED.sub(lambda match: rf" \times 10^{{{_SCALES[match.group(1).lower()]}}}", text)
    for pattern, replacement in _PLAIN:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())


def is_words(text: str) -> bool:
    """Whether `text` is to be read as words, not as a product of letters."""
    if text.lower() in _SYNONYMS:
        return True
    words = re.findall(r"(?<![\\A-Za-z])[A-Za-z]+", text)
    return any(
        ((len(word) > 2 and word.lower() not in _NOT_WORDS) or word.lower() in _KNOWN_WORDS)
        and not re.search(rf"[_{{]{word}", text)
        for word in words
    )


def normal_words(text: str) -> str:
    """Returns words without case, articles, punctuation, plurals and differences of spelling."""
    text = text.lower().strip()
    text = _SYNONYMS.get(text, text)
    first = re.match(r"(yes|no|true|false)(?:[,.;:!]|\s*$)", text)
    if first:
        return first.group(1)
    words = re.sub(r"[^\w\s\\^{}+*/=<>.%-]|(?<=[a-z])[-.](?=[a-z]|\s|$)", " ", text).split()
    return " ".join(_SPELLINGS.get(word, _singular(word)) for word in words if word not in ("a", "an", "the"))


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


def split_name(text: str) -> tuple[str, str]:
    """Returns the name and the value of `x = 5` and of `x = 2 + 3 = 5`; no name for what is no assignment."""
    if "=" in text and not re.search(r"[A-Za-z<>]", _OF_NUMBERS.sub("", text)):
        return "", text.split("=")[-1].strip()  # 17/4 = 4.25
    match = _NAME.match(text)
    if not match or not text[match.end() :].strip():
        return "", text
    rest = text[match.end() :]
    last = re.split(r"(?<![\\<>!])=", rest)[-1].strip()
    return match.group(1).strip(), (last if "," not in rest else rest) or rest


def same_name(one: str, other: str) -> bool:
    """Whether two names may be of one value: words may be of any, symbols of their own alone."""
    symbols = [re.sub(r"[\s{}]", "", name) for name in (one, other)]
    if any(re.match(r"[A-Za-z]{3,}", name) and not name.isupper() for name in symbols):
        return True
    if any("_" not in name for name in symbols):  # x_1 = 1, x_2 = 2 beside x = 1 or x = 2
        symbols = [name.partition("_")[0] for name in symbols]
    return symbols[0] in (symbols[1], symbols[1][::-1])
