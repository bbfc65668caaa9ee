"""Your own problems: a JSON lines file, one object on each line.

    {"question": "What is 2 + 3?", "answer": "5"}

`problem` is taken for `question`. Optional: `id`, `kind` (number, math, ratio, time, list, word; else it is
told from the answer), `solution`, `subset`. An answer with a "####" line or a box in it, as GSM8K and MATH
have, is split into solution and answer.
"""

import re
from pathlib import Path
from typing import get_args

from cotvalve.answers import boxes
from cotvalve.errors import DataError, unknown
from cotvalve.grading import why_unreadable
from cotvalve.problems.dataset import Row, local_rows
from cotvalve.types import AnswerKind, Problem

KINDS: tuple[AnswerKind, ...] = get_args(AnswerKind)


def kind_of(answer: str) -> AnswerKind:
    r"""How an answer is compared when its row does not say.

    >>> [kind_of(gold) for gold in ("1,080", "7.50 dollars", "3:4", "3:30 pm", r"\frac{\pi}{2}", "x+1", "5; 15", "Rug B")]
    ['number', 'number', 'ratio', 'time', 'math', 'math', 'list', 'word']
    """
    if re.search(r"\d:\d\d(?!\d)", answer):
        return "time"
    if re.fullmatch(r"\d+(?:\.\d+)?(?:\s?:\s?\d+(?:\.\d+)?)+", answer):
        return "ratio"
    if not why_unreadable(answer, "number"):
        return "number"
    if re.search(r"[\\^_={}<>+*/|()\[\]]", answer) or re.fullmatch(r"[\w.]", answer):
        return "math"
    if ";" in answer and not why_unreadable(answer, "list"):
        return "list"
    return "word" if re.search(r"[^\W\d_]{2}", answer) else "math"


def problems(path: Path) -> list[Problem]:
    """The problems of `path`; DataError names the row that is broken or doubled."""
    found = [_problem(row, path) for row in local_rows(path)]
    if not found:
        raise DataError(f"{path}: no rows in it")
    return found


def _problem(row: Row, path: Path) -> Problem:
    answer, solution = row.text("answer"), row.optional("solution")
    if "####" in answer:
        chain, _, answer = (part.strip() for part in answer.rpartition("####"))
        solution = solution or chain or None
    elif boxes(answer):
        solution, answer = solution or answer, boxes(answer)[-1]
    kind = row.optional("kind") or kind_of(answer)
    if kind not in KINDS:
        raise DataError(f"{row.where}: {unknown('kind', kind, KINDS)}")
    reason = why_unreadable(answer, kind)
    if reason:
        raise DataError(f"{row.where}: gold answer {answer!r} cannot be read as {kind} ({reason})")
    return Problem(
        id=row.optional("id") or f"{path.name.split('.')[0]}/{row.number}",
        question=row.text("question", "problem"),
        answer=answer,
        kind=kind,
        solution=solution,
        subset=row.optional("subset") or "",
    )
