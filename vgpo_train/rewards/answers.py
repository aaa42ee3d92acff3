# ruff: noqa: RUF001 - the signs are meant
r"""What a completion answers: the text of its boxes, and that text without the ways of writing it.

Both take time linear in the length of the text.
"""

import functools
import re
import unicodedata
from typing import NamedTuple

_TOKEN = re.compile(
    r"(?<!\\)\\+(?:boxed|fbox)\s*(?P<box>\{)"  # more than one backslash: an escaped text
    r"|(?<!\\)\\+(?:boxed|fbox)(?![a-zA-Z])\s*(?P<bare>[-+]?\d+(?:\.\d+)?|\\[a-zA-Z]+|[^\s{}\\$])"
    r"|\\.|(?P<open>\{)|(?P<close>\})",
    re.DOTALL,
)
_BETWEEN = re.compile(
    r"(?:\s|[$,;&]|\\\\|\\[()\[\],;]|\\q?quad(?![a-z])|\*\*|\\text\s*\{\s*(?:and|or)\s*\}|(?<![a-z])(?:and|or)(?![a-z])"
    r"|(?<=[\s,$(])[a-zA-Z](?:_\{?\w\}?)?\s*=)*"
)
_JOINS = re.compile(r"[,;]|and|or")
_STYLED = re.compile(
    r"\\(?:text(?:bf|it|rm)?|math(?:rm|bf|it|cal)|mbox|boxed|fbox|boldsymbol|bm|operatorname|underline)"
    r"\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
)
_COLOR = re.compile(r"\\(?:text)?color\s*\{[^{}]*\}(\s*\{)?")
_RAISED, _LOWERED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿˣ]+"), re.compile("[₀₁₂₃₄₅₆₇₈₉₊₋ₙₓ]+")
# What is neither read by math-verify nor normalised by unicode itself.
_SIGNS = {
    "·": r"\cdot ", "×": r"\times ", "−": "-", "–": "-", "—": "-", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ",
    "≈": r"\approx ", "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "°": r"^\circ ",
    "º": r"^\circ ", "∠": r"\angle ", "△": r"\triangle ", "⊥": r"\perp ", "∥": r"\parallel ", "≅": r"\cong ",
    "∽": r"\sim ", "∶": ":", "。": ".", "、": ", ", "：": ": ", "′": "'", "’": "'", "‘": "'", "“": '"', "”": '"',
    "【": "(", "】": ")", "⁄": "/", "∛": r"\sqrt[3]",
    "ℝ": r"\mathbb{R}", "∧": r"\land ", "∨": r"\lor ", "或": " or ", "和": " and ", "且": " and ",
}  # fmt: skip
_GREEK = re.compile(r"GREEK (?:SMALL|(CAPITAL)) LETTER ([A-Z]+)")
CIRCLED = "①②③④⑤⑥⑦⑧⑨⑩"  # statements, such as ①③ for those that are true
_LATEX = [
    (re.compile(r"\\(?:left|right|[bB]igg?[lr]?)\s*(?![a-zA-Z])\.?|\\!"), ""),
    (re.compile(r"\\(?:displaystyle|bf|rm|it|[lL]arge|LARGE|[hH]uge|small)(?![a-zA-Z])"), ""),
    (re.compile(r"(?<!\\)\\[,;:> ]|\\q?quad(?![a-zA-Z])|(?<!\\)~|(?<!\\)\\[()\[\]]"), " "),
    (re.compile(r"\\degree|\^\s*(?:\{\s*)?\\circ(?:\s*\})?"), r"^\\circ "),
    (re.compile(r"(?<=\d)\s*\^\s*(?:\{\s*[oO]\s*\}|[oO](?![a-zA-Z]))"), r"^\\circ "),
    (re.compile(r"\^\s*(?:\{\s*)?\\prime(?![a-zA-Z])(?:\s*\})?"), "'"),
    (re.compile(r"(?<![\\a-zA-Z\d])m\s*(?=\\angle(?![a-zA-Z]))"), ""),  # the measure of an angle
    (re.compile(r"\\(?:overset|stackrel)\s*\{\s*\\frown\s*\}"), r"\\widehat"),
    (re.compile(r"\\overrightarrow(?![a-zA-Z])"), r"\\vec"),
    (re.compile(r"(?<=[A-Z])\s*//\s*(?=[A-Z])"), r" \\parallel "),
    (re.compile(r"(?<=[\d\s])\{\s*([A-Za-z/]+)\s*\}"), r" \1 "),
    (re.compile(r"\\(?:[cdst]|nice)frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(le|ge|ne)q(?:slant)?(?![a-zA-Z])"), r"\\\1"),
    (re.compile(r"\\varnothing"), r"\\emptyset"),
    (re.compile(r"\\langle(?![a-zA-Z])"), "("),
    (re.compile(r"\\rangle(?![a-zA-Z])"), ")"),
]
_DOLLARS = re.compile(r"(?<!\\)\$\$?(?=[^\s$])([^$]*?[^\s$\\])\$\$?(?!\d)")
_BOLD = re.compile(r"(?<![\w)}*])(\*\*|__|[`*'\"])(?=\S)((?:(?!\1)[^*`])+)(?<=\S)\1(?![\w({*])")


def boxed_answer(completion: str) -> str | None:
    r"""Returns what the last `\boxed{...}` or `\fbox{...}` holds, None without one or if it is cut off.

    Braces are those of LaTeX: `\{` and `\}` are none. Without braces a box holds a number, a command or a character.
    """
    found = boxes(completion)
    return found[-1].content(completion) if found else None


def final_answer(completion: str) -> str | None:
    r"""Returns `boxed_answer`, or the last boxes joined by commas if nothing but commas, "and" or "or" separates them.

    `\boxed{1}, \boxed{2}` is "1, 2"; `\boxed{1}. No, it is \boxed{2}` is "2".
    """
    found = boxes(completion)
    if not found:
        return None
    texts = {found[-1].content(completion): None}  # a set in order
    for before, after in zip(found[-2::-1], found[:0:-1], strict=False):
        between = completion[before.end : min(after.begin, before.end + 81)]
        if len(between) > 80 or not _JOINS.search(between) or not _BETWEEN.fullmatch(between):
            break
        texts[before.content(completion)] = None
    return ", ".join(reversed(texts))


def gold_answer(answer: str) -> str:
    r"""Returns a sample's answer without its `\boxed{}`, if it has one."""
    boxed = final_answer(answer)
    return answer if boxed is None else boxed


class Box(NamedTuple):
    """Where a box and what it holds begin and end in a text."""

    begin: int
    end: int
    inside: tuple[int, int]

    def content(self, text: str) -> str:
        """Returns what the box in `text` holds."""
        return text[slice(*self.inside)].strip()


def boxes(text: str) -> list[Box]:
    """Returns the outermost boxes; nothing if the last to begin has no end."""
    opened: list[tuple[int, int] | None] = []  # for each open brace: where a box and its content begin, None for others
    found: list[Box] = []
    last = -1  # where the last box begins
    for token in _TOKEN.finditer(text):
        if token.group("box"):
            last = token.start()
            opened.append(token.span())
        elif token.group("bare"):
            last = token.start()
            found.append(Box(*token.span(), token.span("bare")))
        elif token.group("open"):
            opened.append(None)
        elif token.group("close") and opened:
            begun = opened.pop()
            if begun is None:
                continue
            inside = begun[1], token.start()
            count = len(found)
            while found and found[-1].begin > begun[0]:
                inner = found.pop()
            if count - len(found) == 1 and not (text[inside[0] : inner.begin] + text[inner.end : inside[1]]).strip():
                inside = inner.inside  # nothing but a box
            found.append(Box(begun[0], token.end(), inside))
    return found if found and not any(begun and begun[0] == last for begun in opened) else []


def tidy(text: str) -> str:
    """Returns an answer as LaTeX without what does not change its meaning: styles, spaces, delimiters, bold, signs."""
    text = _COLOR.sub(lambda match: r"\text{" if match[1] else "", _ascii(text))
    for _ in range(3):  # the innermost first: \\textbf{\\text{(B)}}
        text = _STYLED.sub(r" \1 ", text)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    text = _BOLD.sub(r"\2", _DOLLARS.sub(r" \1 ", text))
    text = " ".join(text.split())
    bare = text.strip("`*_ ").rstrip(",;: \\")
    return bare[:-1].rstrip() if bare.endswith(".") and not bare.endswith("..") else bare


def _ascii(text: str) -> str:
    text = _LOWERED.sub(lambda match: "_{" + unicodedata.normalize("NFKC", match[0]) + "}", text)
    text = _RAISED.sub(lambda match: "^{" + unicodedata.normalize("NFKC", match[0]) + "}", text)
    text = re.sub(r"(?<=\d)\s*([¼-¾⅐-⅞])", r"\1", text)  # a mixed number
    return "".join(map(_character, text)).replace("{,}", ",")


@functools.lru_cache(maxsize=4096)
def _character(character: str) -> str:
    if character.isascii() or character in CIRCLED:
        return character
    if character in _SIGNS:
        return _SIGNS[character]
    greek = _GREEK.fullmatch(unicodedata.name(character, ""))
    if greek:
        name = greek[2].lower().replace("lamda", "lambda")
        return "\\" + (name.capitalize() if greek[1] else name) + " "
    if unicodedata.category(character) == "Cf":  # zero-width spaces, byte order marks
        return ""
    plain = unicodedata.normalize("NFKC", character)  # full-width digits and letters, ℃, ㎝
    above, slash, below = plain.partition("⁄")
    if slash:
        return rf"\frac{{{above}}}{{{below}}}" if below else character
    return plain if plain == character else _ascii(plain)
