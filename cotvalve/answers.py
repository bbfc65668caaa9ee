r"""Text to answer: finds the final answer in a completion.

Comes in: what a model (or a human) wrote. Goes out: the part of it that is the answer, as text (values and
mathanswers read it). Every pattern is linear in the text, so a megabyte of it costs milliseconds.
Left out on purpose: answers spread over several places of a text.
"""

import re
from dataclasses import dataclass

from cotvalve.types import AnswerKind
from cotvalve.values import MAX_ANSWER, NUMBER, RATIO, SCALE, TIME, Unreadable, clean

MAX_MARKS = 20
"""Places that say "the answer is" that are looked at, from the last one back."""

_THINKING_END = re.compile(r"</think>|<\|channel\|>final<\|message\|>|assistantfinal")
_THINKING_OPEN = re.compile(r"<think>|<\|channel\|>analysis")
_BOX = re.compile(r"(?P<box>\\(?:boxed|fbox|framebox)\s*+\{)|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\\boxed\s++([^\s{}$\\]++)")
_HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*+([^\n]*+)(\n?)")
_NUMBERED_HEADING = re.compile(r"\W{0,4}\d+[.)]\s+[A-Za-z]")
_ANSWER_IS = re.compile(
    r"\banswer\s{1,9}(?:is|was)\b[ \t]*+:?|^[#*_ \t]*+(?:the[ \t]{1,9})?(?:final[ \t]{1,9})?answer[*_ \t]*+(?:[:=]|\n)",
    re.IGNORECASE | re.MULTILINE,
)
_SENTENCE_END = re.compile(r"(?<!\b[ap])(?<!\b[ap]\.m)(?<!\bMr)(?<!\bM[rs]s)(?<!\bDr)\.(?=\s|$)|\n")
_MATH_SPAN = re.compile(r"(?<!\\)\$\$?((?:[^$\\]|\\.){1,400}+)\$\$?|\\\(([^\n]{1,400}?)\\\)|\\\[(.{1,400}?)\\\]", re.DOTALL)
_DISPLAY = re.compile(r"\\\[.*?\\\]|\$\$.*?\$\$", re.DOTALL)
# Behind another backslash a bracket begins no formula: the "\\[2pt]" of a matrix ends its row.
_DISPLAYS = ((re.compile(r"(?<!\\)\\\["), r"\]"), (re.compile(r"\$\$"), "$$"))
_OPEN_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*+\{(?!\s*\})")
_FORMULA_END = re.compile(r"(?<!\\)(?:\\[)\]]|\$)")


def visible(text: str) -> str:
    """The text after the thinking block.

    Raises Unreadable when a thinking block was opened and not closed.
    """
    end = 0
    for match in _THINKING_END.finditer(text):
        end = match.end()
    if _THINKING_OPEN.search(text, end):
        raise Unreadable("thinking not finished")
    return text[end:]


def boxes(text: str) -> list[str]:
    r"""Contents of every complete \boxed{}, \fbox{} or \framebox{}, in order of closing; empty ones left out.

    >>> boxes(r"\boxed{3} and then \boxed{\frac{1}{2}} and \boxed{cut")
    ['3', '\\frac{1}{2}']
    """
    return [contents for _, contents in _boxes(text)]


def _boxes(text: str) -> list[tuple[int, str]]:
    """Where the contents of each complete box begin, and the contents."""
    found: list[tuple[int, str]] = []
    opened: list[int] = []  # where the contents of each open brace begin; -1 for a brace that is no box
    for match in _BOX.finditer(text):
        if match["box"]:
            opened.append(match.end())
        elif match[0] == "{":
            opened.append(-1)
        elif match[0] == "}" and opened:
            start = opened.pop()
            if start >= 0 and text[start : match.start()].strip():
                found.append((start, text[start : match.start()].strip()))
    return found or [(match.start(1), match[1]) for match in _BARE_BOX.finditer(text)]


@dataclass(frozen=True, slots=True)
class Found:
    """The part of a text that is its answer."""

    text: str
    complete: bool
    """True when it was marked as final (a box, a '####' line), so that a cut later in the text cannot matter."""


def find(text: str, kind: AnswerKind) -> Found | None:
    """The final answer: the last box, else '####', else 'the answer is', else what the kind reads last.

    `text` is without its thinking block. Empty boxes and '####' headings of a document are passed over.
    """
    boxed = _boxes(text)
    if boxed:
        # The one that is opened last: of a box in a box the inner one, though the outer is closed last.
        last = max(boxed)[1]
        return Found(_last_run(text, last) if kind == "list" else last, complete=True)
    hashes = [match for match in _HASHES.finditer(text) if not _NUMBERED_HEADING.match(match[1])]
    for match in reversed(hashes[-MAX_MARKS:]):
        value = _leading(match[1][:MAX_ANSWER], kind, marked=True)
        if value:
            return Found(value, complete=bool(match[2]))
    for match in reversed(list(_ANSWER_IS.finditer(text))[-MAX_MARKS:]):
        sentence = _sentence(text[match.end() : match.end() + MAX_ANSWER], kind)
        value = _leading(sentence, kind, marked=False)
        # "The answer is 2:20." is an answer, if none to a question for a number: no number elsewhere is.
        if value or (kind == "number" and any(map(str.isdigit, sentence))):
            return Found(value or sentence, complete=False)
    value = _last(text, kind)
    return Found(value, complete=False) if value else None


def _last_run(text: str, last: str) -> str:
    """The boxes of the last line that has any: several values are often boxed one by one."""
    together = next((found for line in reversed(text.splitlines()) if "box" in line and (found := boxes(line))), [])
    return ", ".join(together) if len(together) > 1 else last


def _sentence(rest: str, kind: AnswerKind) -> str:
    rest = rest.lstrip(" \t\n:*_#")
    if kind == "math" and (apart := _DISPLAY.match(rest)):
        return apart[0]
    cut = _SENTENCE_END.search(rest)
    return (rest[: cut.start()] if cut else rest).strip()


def _leading(part: str, kind: AnswerKind, *, marked: bool) -> str | None:
    """The answer at the head of `part`, the text behind a mark."""
    part = part.strip().strip("*_").strip()
    if kind == "number":
        plain = clean(part)
        if marked:
            first = NUMBER.search(plain)
            return _token(first) if first and not re.search(r"[A-Za-z\d]", plain[: first.start()]) else None
        plain = plain.rsplit("=", 1)[-1] if "=" in plain and NUMBER.search(plain.rsplit("=", 1)[-1]) else plain
        return _token(NUMBER.search(plain))
    if kind == "ratio":
        match = RATIO.search(clean(part))
        return match[0] if match else None
    if kind == "time":
        match = TIME.search(clean(part))
        return match[0] if match else None
    if kind == "math":
        if _OPEN_BOX.search(part):
            return _opened(part)
        span = _MATH_SPAN.search(part)
        if span and not marked:
            return _span(span)
    return part.removesuffix(".").strip() or None


def _last(text: str, kind: AnswerKind) -> str | None:
    tail = text[-20_000:]
    if kind == "word":
        sentences = [piece.strip(" *_#\t\r") for piece in _SENTENCE_END.split(tail)]
        return next((piece for piece in reversed(sentences) if any(map(str.isalpha, piece))), None)
    lines = [line for line in tail.splitlines() if line.strip()]
    if kind == "list":
        return next((line.strip() for line in reversed(lines) if NUMBER.search(clean(line))), None)
    if kind == "math" and lines and (formula := _formula(tail, lines[-1])):
        return formula
    pattern = RATIO if kind == "ratio" else TIME if kind == "time" else NUMBER
    last: re.Match[str] | None = None
    for last in pattern.finditer(clean(tail)):  # noqa: B007
        pass
    return (_token(last) if pattern is NUMBER else last[0]) if last else None


def _formula(tail: str, line: str) -> str | None:
    r"""What the formula says that a text ends with: in a box that is never closed, in the last line, or set apart from it.

    >>> _formula(text := r"so \(\boxed{\frac{1}{2}\) of it", text), _formula(text := r"so \(x = 1 + 2 = 3\)", text)
    ('\\frac{1}{2}', '3')
    """
    apart = _apart(tail.rstrip().rstrip(" \t\r\n."))
    if _OPEN_BOX.search(line if apart is None else apart):
        return _opened(line if apart is None else apart)
    if apart is not None:
        return _result(apart)
    spans = list(_MATH_SPAN.finditer(line))
    return _result(_span(spans[-1])) if spans else None


def _apart(tail: str) -> str | None:
    """The formula that the text ends with, where it is set apart, also in several lines."""
    for begin, end in _DISPLAYS:
        begins = list(begin.finditer(tail, 0, len(tail) - len(end))) if tail.endswith(end) else []
        # Of an odd number of "$$" the last one begins a formula that is missing.
        if begins and (end == r"\]" or len(begins) % 2):
            return tail[begins[-1].end() : -len(end)]
    return None


def _result(formula: str) -> str | None:
    """What stands behind the last "=" of a formula; an equation with 0 there is an answer itself."""
    before, _, value = formula.rpartition("=")
    value = _bare(value)
    return (_bare(formula) if value == "0" and "=" not in before else value) or None


def _opened(text: str) -> str | None:
    """What the last box says that is never closed: the rest of its formula."""
    return _result(_FORMULA_END.split(_OPEN_BOX.split(text)[-1])[0])


def _bare(formula: str) -> str:
    """A formula without the full stop behind it, and without the end of an environment that began before it."""
    formula = formula.strip()
    if formula.count(r"\end{") > formula.count(r"\begin{"):
        formula = formula.rpartition(r"\end{")[0].rstrip().removesuffix(r"\\").rstrip()
    return formula.removesuffix(".").strip()


def _span(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group is not None).strip()


def _token(match: re.Match[str] | None) -> str | None:
    if match is None:
        return None
    scale = SCALE.match(match.string, match.end())
    return match[0] + (scale[0] if scale else "")
