r"""Are two LaTeX answers the same? What can be decided by reading alone is decided here; only algebra is left.

math-verify takes (3,4) for {3,4}, drops the base of 4210_5, reads 12:30 as 12 and merges several values into
a set. So both sides are first brought to one spelling and compared by shape: words, numbers with a base,
clock times and ratios, plain numbers, then sets, lists, tuples and intervals part by part. What is left, one
expression against one expression, is handed to `algebra` (the worker of mathjudge).
Order matters, as in math-verify: the gold answer comes first.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from cotvalve.values import Unreadable, clock, number, phrase, plain_digits, ratio, same_clock, same_number

Algebra = Callable[[str, str], str]
"""(gold, given) -> empty when equal, else the reason why not."""

MAX_LENGTH = 600
"""Characters; the longest gold answer of MATH has 160."""
MAX_DEPTH = 30
"""Nested brackets; parsers spend seconds on a few hundred."""
MAX_PARTS = 20
NOT_EQUAL = "not equal to the gold answer"
NO_BASE = "the base of the number is missing"

_SPELLING: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), into)
    for pattern, into in (
        (r"(?<=\d),\\!\s{0,9}(?=\d{3})|(?<=\d)\\,(?=\d{3}(?!\d))|\\!", ""),
        (r"\\\$|\$|\\displaystyle|\\[Bb]igg?[lr]?(?![a-zA-Z])", ""),
        (r"\\left(?![a-zA-Z])|\\right(?![a-zA-Z])", ""),
        (r"\\lbrace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![a-zA-Z])", " "),
        (r"\{,\}", ","),
        (r"\\[dtc]frac", r"\\frac"),
        (r"\\frac\s?(\d)\s?(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s?(\d)\s?\{", r"\\frac{\1}{"),
        (r"\\frac\s?\{([^{}]{0,80})\}\s?(\d)", r"\\frac{\1}{\2}"),
        (r"\\sqrt\s?(\d|[a-z])", r"\\sqrt{\1}"),
        (r"\\sqrt\s?\{\s?-\s?1\s?\}", " i "),
        (r"\\sqrt\s?\{\s?-\s?(\d{1,9})\s?\}", r" i \\sqrt{\1}"),
        (r"\^\s?(?:\{\s?\\circ\s?\}|\\circ)|\\degrees?(?![a-zA-Z])|°", ""),
        (r"\\leq?(?![a-zA-Z])|≤|\\leqslant", r"\\leq "),
        (r"\\geq?(?![a-zA-Z])|≥|\\geqslant", r"\\geq "),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"[\u2212\u2013]", "-"),
        (r"∞|\+\\infty", r"\\infty"),
        (r"π", r"\\pi "),
        (r"√", r"\\sqrt "),
        (r"\u222a", r"\\cup "),
        (r"\\(?:dots|ldots|cdots)", r"\\dots"),
        (r"\[\s?-\s?\\infty", r"(-\\infty"),  # an infinite end belongs to no set, however it is written
        (r"\\infty\s?\]", r"\\infty)"),
        (r"\\%", "%"),
        (r"\\\\\[[^\]]{0,9}\]", r"\\\\"),
        (r"[bv]matrix\}", "pmatrix}"),
    )
)
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf|operatorname)\s?\{([^{}]{0,200})\}")
_WORD = re.compile(r"[A-Za-z][A-Za-z' -]+|\(?[A-Z]\)?")
_DIFFERENCE = re.compile(r"[A-Za-z]{1,2}(?:\s?-\s?[A-Za-z]{1,2})+")
"""'p - q' is no phrase with a hyphen: as one, 'p + q' had the same words."""
_BASE = re.compile(r"(-?[0-9A-Z.]+)_\{?(\d+|two|ten)\}?")
_COLON = re.compile(r"\d\s?:\s?\d")
_MATRIX = re.compile(r"(-?(?:(?!\\begin|[-=+,;]).){0,60}?)\\begin\{pmatrix\}((?:(?!\\begin).){1,500})\\end\{pmatrix\}", re.DOTALL)
_NAME = r"(?:[A-Za-z](?:_\{?\w{1,3}\}?)?(?:\([a-z]\))?|\([a-z](?:,[a-z])+\))"
_CHAIN = re.compile(r"([^<>\\]{1,80}|-?\\[^<>]{1,80}?)(<|\\leq)\s{0,3}[a-zA-Z]\s{0,3}(<|\\leq)(.{1,80})")
_HALF = re.compile(r"[a-zA-Z]\s{0,3}(<|>|\\leq|\\geq)(.{1,80})")


def spelled(text: str) -> str:
    """`text` in one spelling of LaTeX; what it means is unchanged."""
    text = plain_digits(text)
    for pattern, into in _SPELLING:
        text = pattern.sub(into, text)
    return text.strip().rstrip(".").strip()


_OPEN = re.compile(r"\\[lc]?dots\b|\.\.\.|…")


def compare(gold: str, given: str, algebra: Algebra) -> str:
    """Empty when `given` is the gold answer, else the reason why not."""
    if squeezed(gold) == squeezed(given):
        return ""
    if _OPEN.search(given) and not _OPEN.search(gold):
        return "left open with dots"  # math-verify reads the first term of 2+4+8+...
    if len(given) > MAX_LENGTH:
        return f"answer of more than {MAX_LENGTH} characters"
    if _depth(given) > MAX_DEPTH:
        return f"brackets nested more than {MAX_DEPTH} deep"
    return _compare(spelled(gold), spelled(given), algebra, parts=True)


def squeezed(text: str) -> str:
    """`text` for the comparison of spellings: no spaces, no marks of text."""
    return re.sub(r"\s+", "", _WRAPPED.sub(r"\1", spelled(text)))


def _compare(gold: str, given: str, algebra: Algebra, *, parts: bool) -> str:
    if squeezed(gold) == squeezed(given):
        return ""
    if not given:
        return "no answer found"
    word = _WRAPPED.sub(r"\1", gold).strip()
    if _WORD.fullmatch(word) and (word != gold or (len(word) > 3 and not _DIFFERENCE.fullmatch(word))):
        said = _WRAPPED.sub(r"\1", given).strip()
        chosen = re.match(r"\(([A-Z])\)", said)  # "(A) Line" for the choice (A)
        same = _letters(word) in (_letters(said), [chosen[1].casefold()] if chosen else None)
        return "" if same else NOT_EQUAL
    based = _based(gold, given)
    if based is not None:
        return based
    if _COLON.search(gold) or _COLON.search(given):
        return "" if _same_colons(_WRAPPED.sub(r"\1", gold), _WRAPPED.sub(r"\1", given)) else NOT_EQUAL
    gold, given = _without_name(gold, given)
    if squeezed(gold) == squeezed(given):
        return ""
    # x + y + z = 0 is an equation, which math-verify reads as three values of 0; a + b = 7 may name what was asked for.
    if re.search(r"=\s?0$", gold) and "=" not in given:
        return NOT_EQUAL
    try:
        return "" if same_number(number(gold, units=False), number(given, units=False)) else NOT_EQUAL
    except Unreadable as error:
        if "digits" in str(error):
            return str(error)
    if parts:
        shapes = _shape(_interval(gold, given)), _shape(_interval(given, gold))
        if shapes[0].parts or shapes[1].parts:
            return _compare_parts(*shapes, algebra)
    return algebra(gold, given)


def _same_colons(gold: str, given: str) -> bool:
    """Times of day as times; ratios as ratios, also against a fraction."""
    times = [re.match(r"\d{1,2}\s?:\s?\d\d(?!\d)", side) for side in (gold, given)]
    try:
        return same_clock(clock(gold), clock(given)) if all(times) else ratio(gold) == ratio(given)
    except Unreadable:
        return False


def _letters(word: str) -> list[str]:
    return phrase(word.replace("(", " ").replace(")", " ").replace("\\", " "))


def _based(gold: str, given: str) -> str | None:
    """The verdict where either side is a numeral with its base; None where neither is."""
    sides = [_BASE.fullmatch(squeezed(side)) for side in (gold, given)]
    if not sides[0] and not sides[1]:
        return None
    digits = [(side[1] if side else squeezed(text)).lstrip("0") or "0" for side, text in zip(sides, (gold, given), strict=True)]
    if sides[0] and sides[1]:
        return "" if digits[0] == digits[1] and sides[0][2] == sides[1][2] else NOT_EQUAL
    if digits[0] != digits[1]:
        return NOT_EQUAL
    return NO_BASE if sides[0] else ""  # some golds of MATH leave the base out, which an answer may say


def _without_name(gold: str, given: str) -> tuple[str, str]:
    """Both sides without 'x =' or 'x \\in' in front, unless both are equations.

    A gold equation whose right side has letters of its own (a line, a plane) keeps its left side.
    """
    named = [re.fullmatch(rf"{_NAME}\s?(?:=|\\in(?![a-zA-Z]))(.+)", side) for side in (gold, given)]
    if (
        named[0]
        and (named[1] or not re.search(r"(?<![\\a-zA-Z])[a-zA-Z](?![a-zA-Z])", named[0][1]))
        and "=" not in named[0][1]
    ):
        if named[1] or "=" not in given:
            gold = named[0][1].strip()
            given = named[1][1].strip() if named[1] and "=" not in named[1][1] else given
    elif named[1] and not named[0] and "=" not in gold and "=" not in named[1][1]:
        given = named[1][1].strip()
    elif "=" not in gold and given.count("=") == 1 and not given.endswith("= 0") and not given.endswith("=0"):
        given = given.split("=")[1].strip()
    return gold, given


@dataclass(frozen=True, slots=True)
class Shape:
    """An answer of several parts."""

    opening: str
    """'(' or '[' of a tuple or an interval, 'matrix of N rows'; '' of a set or a list, whose order does not matter."""
    closing: str
    parts: tuple[str, ...]
    """Empty when the answer is one expression."""


def _shape(text: str) -> Shape:
    matrix = _MATRIX.fullmatch(text)
    if matrix:
        rows = [row.split("&") for row in matrix[2].strip().removesuffix("\\\\").split("\\\\")]
        cells = tuple(_times(matrix[1].strip(), cell.strip()) for row in rows for cell in row)
        return Shape(f"matrix of {len(rows)} rows", "", cells)
    if "\\cup" in text or "\\begin" in text:
        return Shape("", "", ())
    inner, opening, closing = text, "", ""
    if text.startswith("\\{") and text.endswith("\\}"):
        inner = text[2:-2]
    elif text[:1] in ("(", "[") and text[-1:] in (")", "]") and _encloses(text):
        inner, opening, closing = text[1:-1], text[0], text[-1]
    parts = _split(inner)
    if not opening:
        parts = [piece for part in parts for piece in _signs(part)]
    braced = inner is not text and not opening
    return Shape(opening, closing, tuple(parts) if len(parts) > 1 or braced else ())


def _times(factor: str, cell: str) -> str:
    """One cell with the factor in front of its matrix. The dot is for algebra, which reads 2(1) as no product."""
    return rf"{'-1' if factor == '-' else factor} \cdot ({cell})" if factor else cell


def _encloses(text: str) -> bool:
    depth = 0
    for position, character in enumerate(text):
        depth += (character in "([") - (character in ")]")
        if depth == 0:
            return position == len(text) - 1
    return False


def _split(text: str) -> list[str]:
    """The parts between commas, semicolons and 'and' outside of brackets."""
    text = re.sub(r"\\(?:text|mbox|textrm)\s?\{\s*,?\s*(?:and|or)\s*\}|,?\s+(?:and|or)\s+", " , ", text)
    if re.fullmatch(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?", text.strip()):
        return [text.strip()]
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character in ",;" and depth == 0:
            parts.append(text[start:position].strip())
            start = position + 1
    parts.append(text[start:].strip())
    return [part for part in parts if part]


def _signs(part: str) -> list[str]:
    """'1 \\pm \\sqrt{19}' as its two values."""
    if part.count("\\pm") != 1:
        return [part]
    before, after = part.split("\\pm")
    return [f"{before}+{after}".strip().removeprefix("+"), f"{before}-{after}".strip()]


def _interval(text: str, other: str) -> str:
    """`text` as an interval when it is an inequality for one letter and `other` is written as an interval."""
    if other[:1] not in ("(", "[") or not re.search(r"<|>|\\leq|\\geq", text):
        return text
    chain = _CHAIN.fullmatch(text)
    if chain:
        low, high = ("(" if chain[2] == "<" else "["), (")" if chain[3] == "<" else "]")
        return f"{low}{chain[1].strip()},{chain[4].strip()}{high}"
    half = _HALF.fullmatch(text)
    if not half:
        return text
    end = half[2].strip()
    return {
        "<": f"(-\\infty,{end})",
        "\\leq": f"(-\\infty,{end}]",
        ">": f"({end},\\infty)",
        "\\geq": f"[{end},\\infty)",
    }[half[1]]


def _compare_parts(gold: Shape, given: Shape, algebra: Algebra) -> str:
    if (gold.opening, gold.closing) != (given.opening, given.closing):
        return "brackets of another kind: a tuple, an interval and a set are different answers"
    if len(gold.parts) != len(given.parts) or len(gold.parts) > MAX_PARTS:
        return NOT_EQUAL
    if gold.opening:
        reasons = (_compare(*pair, algebra, parts=False) for pair in zip(gold.parts, given.parts, strict=True))
        return next((reason for reason in reasons if reason), "")
    left = list(given.parts)
    for part in gold.parts:
        hit = next((other for other in left if not _compare(part, other, algebra, parts=False)), None)
        if hit is None:
            return NOT_EQUAL
        left.remove(hit)
    return ""


def _depth(text: str) -> int:
    deepest = depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest
