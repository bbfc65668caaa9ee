r"""Completion to Grade: right, or wrong with a reason.

`extract` finds the answer, `grade` compares it with the gold answer by the problem's kind. Numbers are exact
rationals (1.0 is 1, 1/2 is 0.5, 1.33 is not 4/3). No text can hang it: a grade costs 5 s at the very most.
What cannot be read is wrong, with a reason; nothing is ever equal to nothing.

A truncated completion is wrong with the reason 'truncated', unless a whole box or a whole '####' line stood
in it before the cut: then the answer had been given and is graded. (Sweeps and MixChain count every truncated completion as wrong.)

    >>> grade(("1080", "number"), r"So she pays \$1,080. #### 1,080").correct
    True
    >>> grade(("18", "number"), "I do not know.")
    Grade(correct=False, predicted=None, reason='no answer found')
"""

from cotvalve import mathanswers
from cotvalve.answers import find, visible
from cotvalve.errors import DataError
from cotvalve.mathjudge import Deadline, judge
from cotvalve.types import AnswerKind, Grade, Problem
from cotvalve.values import (
    Unreadable,
    clock,
    number,
    phrase,
    ratio,
    same_clock,
    same_number,
    same_phrase,
    several,
)

NO_ANSWER = "no answer found"
TRUNCATED = "truncated"
NOT_EQUAL = mathanswers.NOT_EQUAL


def extract(text: str, kind: AnswerKind = "number") -> str | None:
    r"""The answer that `text` gives, as written; None when it gives none.

    The thinking block is left out; then the last complete box, else the last '####', else the last "the
    answer is", else the last number (for words: the last sentence).

    >>> extract(r"<think>2? \boxed{2}</think> It is \boxed{3}, no, \boxed{4}. I checked 5 times.")
    '4'
    """
    try:
        found = find(visible(text), kind)
    except Unreadable:
        return None
    return found.text if found else None


def grade(problem: Problem | tuple[str, AnswerKind], text: str, *, truncated: bool = False) -> Grade:
    """Grades one completion of `problem` (or of a gold answer and its kind).

    `truncated` says that the token budget cut the text. Raises DataError for a gold answer that cannot be read.
    """
    gold, kind = (problem.answer, problem.kind) if isinstance(problem, Problem) else problem
    unreadable = why_unreadable(gold, kind)
    if unreadable:
        name = f"problem {problem.id}: " if isinstance(problem, Problem) else ""
        raise DataError(f"{name}gold answer {gold!r} cannot be read as {kind} ({unreadable})")
    try:
        found = find(visible(text), kind)
    except Unreadable as error:
        return Grade(False, None, TRUNCATED if truncated else str(error))
    if truncated and not (found and found.complete):
        return Grade(False, None, TRUNCATED)
    if not found:
        return Grade(False, None, NO_ANSWER)
    try:
        reason = _compare(gold, found.text, kind)
    except Unreadable as error:
        reason = str(error)
    return Grade(not reason, found.text, reason)


def why_unreadable(gold: str, kind: AnswerKind) -> str:
    """Empty when `gold` can be graded as `kind`, else why not. Cheap: no algebra is done."""
    try:
        if kind == "number":
            number(gold)
        elif kind == "ratio":
            ratio(gold)
        elif kind == "time":
            clock(gold)
        elif kind == "list":
            several(gold)
        elif kind == "word":
            return "" if phrase(gold) else "no word in it"
        elif kind == "math":
            return "" if mathanswers.squeezed(gold) else "nothing in it"
    except Unreadable as error:
        return str(error)
    return ""


def _compare(gold: str, given: str, kind: AnswerKind) -> str:
    """Empty when equal, else the reason; Unreadable when `given` is not of the kind."""
    if kind == "math":
        deadline = Deadline()
        return mathanswers.compare(gold, given, lambda left, right: judge(left, right, deadline))
    if kind == "number":
        same = same_number(number(gold), number(given))
    elif kind == "ratio":
        same = ratio(gold) == ratio(given)
    elif kind == "time":
        same = same_clock(clock(gold), clock(given))
    elif kind == "list":
        same = several(gold)[0] in several(given)
    else:
        same = same_phrase(phrase(gold), phrase(given))
    return "" if same else NOT_EQUAL
