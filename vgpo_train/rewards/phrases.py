"""Words in answers: what stands before one, number words, mathematics typed as plain text, names of values."""

import re

_PREAMBLE = re.compile(
    r"(?:(?:so|thus|therefore|hence)\b,?\s*)?"
    r"(?:(?:the\s+)?(?:final\s+|correct\s+|right\s+)?(?:answer|option|choice|solution|result|figure|statement|image)s?"
    r"(?:\s+(?:is|are))?\s*[:=]?\s*"
    r"|(?:[A-Za-z][a-z']*\s+){1,8}?(?:is|are|was|were|equals|measures)(?:\s+equal\s+to)?\s*:?\s+(?!not\b)"
    r"|(?:the\s+)?(?:points?|coordinates?|intervals?|vector)\s+(?=[(\[\\]|[A-Z]'?$)|i\s+(?:choose|pick|select)\s+"
    r"|it's\s+(?!not\b)|[故应]?(?:答案|选项?)[是为]?\s*[:,]?\s*)",
    re.IGNORECASE,
)
_CORRECT = re.compile(r"(?<=\b[A-J])(\)?)\s(?:is|are)\s(?:the\s)?(?:correct|right)(?:\s(?:answer|option|choice)s?)?$")
_ABOUT = re.compile(r"(?:approximately|approx\.?|about|\\approx|\\sim|~|=)\s*(?=[-+\d\\.$])", re.IGNORECASE)
_NUMBER_WORDS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_AFTER_NUMBERS = {
    "dozen": r" \times 12 ", "hundred": r" \times 10^{2}", "thousand": r" \times 10^{3}", "million": r" \times 10^{6}",
    "billion": r" \times 10^{9}", "trillion": r" \times 10^{12}", "half": "/2", "halve": "/2", "third": "/3",
    "quarter": "/4", "fourth": "/4", "fifth": "/5", "sixth": "/6", "eighth": "/8", "tenth": "/10",
}  # fmt: skip
_COUNT = re.compile(
    rf"((?:negative|minus)\s)?(?:({'|'.join(_TENS)})(?:(?:[\s-]({'|'.join(_NUMBER_WORDS[1:10])}))(?![a-z]))?"
    rf"|({'|'.join(reversed(_NUMBER_WORDS))})|an?(?=\s(?:{'|'.join(_AFTER_NUMBERS)})$)|(?=half$))"
    r"(?=$|(?:[\s-][A-Za-z]+){1,2}$|half$)",
    re.IGNORECASE,
)
_REPEATING = re.compile(r"(\d{0,9})\.(\d{0,9}?)(?:\\(?:overline|bar|dot)\s*\{(\d{1,9})\}|(\d{1,6}?)\4{2,9}\.\.\.)")
_FUNCTIONS = "arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|log|ln|lg|exp|max|min"
_GREEK = "alpha|beta|gamma|delta|theta|lambda|mu|pi|rho|omega"
# What math-verify does not read as it is meant.
_PLAIN = [
    (re.compile(r"^(?:negative|minus)\s+(?=\d)", re.IGNORECASE), "-"),
    (re.compile(r"(?<=\d)(\s*[ap])\.?\s?m\b\.?", re.IGNORECASE), lambda match: match[1].lower() + "m"),
    (re.compile(r"(?<=\d)\s+to\s+(?=\d)"), ":"),
    (re.compile(r"(?<![\d/.])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d/])"), r"\1\\frac{\2}{\3}"),
    (re.compile(r"(?<![\d.,(\[{])\d{1,3}([ ,'])\d{3}(?:\1\d{3})*(?![\d,])"),
     lambda match: match[0].replace(match[1], "")),
    (re.compile(r"√\s*(?=[{(])"), "sqrt"),
    (re.compile(r"(?<![A-Za-z\\])C_(\d|\{\d+\})\s*\^\s*(\d|\{\d+\})"), r"\\binom{\1}{\2}"),
    (re.compile(r"(?:√|(?<![\\A-Za-z])sqrt|\\sqrt(?=\[))(\[\d\])?\s*(\d+(?:\.\d+)?|\\?[A-Za-z]+)"), r"\\sqrt\1{\2}"),
    (re.compile(r"(?<![A-Za-z\\])(\d+(?:\.\d+)?|\.\d+)[eE]\+?(-?\d+)(?![A-Za-z\d.])"), r"\1 \\times 10^{\2}"),
    (re.compile(r"(?<=\d)(?:\s+x\s+(?=\d)|\s*[xX]\s*(?=10\s*\^))"), r" \\times "),
    (re.compile(r"(?<![\w\\^.])(\d+(?:\.\d+)?|\([^()]*\))\s*(?=\(-?\d+(?:\.\d+)?\))"), r"\1 \\cdot "),  # no sum
    (re.compile(r"\^\s*(-?\d+(?:\.\d+)?(?!\d)|[-+]$)"), r"^{\1}"),
    (re.compile(r"(?<![A-Za-z])([A-Z])\.(?=[A-Z](?![a-z]))"), r"\1"),  # U.S.
    (re.compile(r"(?<![\\A-Za-z])infinity(?![A-Za-z])", re.IGNORECASE), r"\\infty "),
    (re.compile(rf"(?<![\\A-Za-z])({_GREEK})(?![A-Za-z])"), r"\\\1 "),
    (re.compile(rf"(?<![\\A-Za-z])({_FUNCTIONS})(?=[\s(^_\\\d])"), r"\\\1 "),
    (re.compile(r"(\\(?:sin|cos|tan|cot)\s*\(?)\s*(\d+(?:\.\d+)?)\s*\^\\circ"), r"\1{(\\frac{\2 \\pi}{180})}"),
    (re.compile(r"\\?%|\s*\bpercent\b", re.IGNORECASE), r"\\%"),
    (re.compile(rf"(?<=\d)[\s-]*({'|'.join(_AFTER_NUMBERS)})s?(?![A-Za-z])", re.IGNORECASE),
     lambda match: _AFTER_NUMBERS[match[1].lower()]),
]  # fmt: skip
_SYNONYMS = {
    "no solution": "none", "no solutions": "none", "no real solution": "none", "no real solutions": "none",
    "\\emptyset": "none", "\\{\\}": "none", "does not exist": "undefined", "dne": "undefined", "grey": "gray",
}  # fmt: skip
_OPPOSITES = {"yes": "no", "no": "yes", "true": "false", "false": "true"}
_NOT_COUNTED = {*_NUMBER_WORDS, *_TENS, "but", "not", "wrong", "incorrect"}
_SPELT = [(re.compile(r"(?<=[a-z]{3})our(?=s?$)"), "or"), (re.compile(r"(?<=[a-z]{2})tre(?=s?$)"), "ter")]  # British
_PLURAL = re.compile(r"(?<=..[^sui])s$")
_SHORT_WORDS = {"no", "on", "up", "in", "at", "by", "to", "of"}
_NOT_WORDS = {*_FUNCTIONS.split("|"), *_GREEK.split("|"), "sqrt"}
_OF_NUMBERS = re.compile(r"\\(?:frac|sqrt|times|cdot|div|pi|pm)(?![a-z])")
_NAME = re.compile(
    r"((?:\\[A-Za-z]+\s*){0,2}(?:\{?[A-Za-z]{1,4}'?\}?|[A-Za-z]{3,}(?:\s[A-Za-z]+){0,3}|(?<=[a-z\s])\d?)"
    r"(?:_(?:\{[^{}]*\}|\w))?(?:\s*\([^()=]*\))?|\([a-z](?:,\s*[a-z])+\)|\|[A-Za-z]+\|)\s*(?:=|:(?!\d))\s*(?![=<>])"
)
_POINT = re.compile(r"([A-Z]'?)\s*(\((?:[^()]|\([^()]*\))*,(?:[^()]|\([^()]*\))*\))")  # A(1, 2)
_TURNED = re.compile(r"([^=<>]+?)\s*=\s*([A-Za-z])")  # 12 = x


def _fraction(match: re.Match[str]) -> str:
    """Returns a decimal number with repeating digits as a fraction."""
    before, after, period = match[1] or "0", match[2], match[3] or match[4]
    nines = 10 ** len(period) - 1
    return rf"\frac{{{int(before + after) * nines + int(period)}}}{{{10 ** len(after) * nines}}}"


def without_preamble(text: str) -> str:
    """Returns an answer without words about it, such as `The answer is`, `approximately`, `B is correct`."""
    text = _CORRECT.sub(r"\1", text)
    match = _PREAMBLE.match(text)
    if match and match.end() < len(text):
        text = text[match.end() :]
    return _ABOUT.sub("", text, count=1) if _ABOUT.match(text) else text


def plain_math(text: str) -> str:
    """Returns tidy text with mathematics typed as plain text, number words and percent words as LaTeX."""
    text = _REPEATING.sub(_fraction, text)
    counted = _COUNT.match(text)
    if counted:
        text = _digits(counted) + text[counted.end() :]
    for pattern, replacement in _PLAIN:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())


def _digits(counted: re.Match[str]) -> str:
    """Returns a number in words as digits."""
    sign, tens, after, alone = (part and part.lower() for part in counted.groups())
    number = 20 + 10 * _TENS.index(tens) + _NUMBER_WORDS.index(after or "zero") if tens else 1  # a dozen
    return ("-" if sign else "") + str(_NUMBER_WORDS.index(alone) if alone else number)


def follows_a_number(words: str) -> bool:
    """Whether words after a number leave its value as it is: not `of two` and `apples but wrong`."""
    return not _NOT_COUNTED & set(words.lower().split())


def is_words(text: str) -> bool:
    """Whether `text` is to be read as words, not as a product of letters."""
    if text.lower() in _SYNONYMS or re.search("[一-鿿]", text):
        return True
    words = re.findall(r"(?<![\\A-Za-z_{])[A-Za-z]+", text)
    return any((len(word) > 2 and word.lower() not in _NOT_WORDS) or word.lower() in _SHORT_WORDS for word in words)


def normal_words(text: str) -> str:
    """Returns words without case, articles, punctuation and plurals."""
    text = text.lower().strip()
    text = _SYNONYMS.get(text, text)
    first = re.match(r"(yes|no|true|false)(?:[,.;:!]|\s*$)", text)
    if first and not re.search(rf"(?<!not )\b{_OPPOSITES[first[1]]}\b(?=\W*$|[,.;:!])", text):  # no, wait, yes
        return first[1]
    words = re.sub(r"[^\w\s\\^{}+*/=<>.%-]|(?<=[a-z])[-.](?=[a-z]|\s|$)", " ", text).split()
    for pattern, replacement in (*_SPELT, (_PLURAL, "")):
        words = [pattern.sub(replacement, word) for word in words]
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def split_name(text: str) -> tuple[str, str]:
    """Returns the name and the value of `x = 5` and of `x = 2 + 3 = 5`; no name for what is no assignment."""
    if "=" in text and not re.search(r"[A-Za-z<>]", _OF_NUMBERS.sub("", text)):
        return "", text.split("=")[-1].strip()  # 17/4 = 4.25
    if point := _POINT.fullmatch(text):
        return point[1], point[2]
    match = _NAME.match(text)
    if not match or not text[match.end() :].strip():
        turned = _TURNED.fullmatch(text)
        return (turned[2], turned[1]) if turned else ("", text)
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
