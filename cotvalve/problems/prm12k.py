"""PRM12K: MATH train and test without MATH-500, the 12,000 problems the paper trains on beside GSM8K.

Problems stand in MATH's own order: train then test, the seven subjects by name, rows as published.
"""

from collections.abc import Iterable
from pathlib import Path

from cotvalve.answers import boxes
from cotvalve.errors import DataError
from cotvalve.problems import math500
from cotvalve.problems.dataset import DataSet, Row, hub_rows, local_rows
from cotvalve.types import Problem

REPOSITORY = "EleutherAI/hendrycks_math"
SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
SIZE = 12_000
EMPTY_BOXES = {"train/5341": "0", "train/5343": "0"}
"""Rows published with an empty box, and the answer that their own words give ("there are no primes")."""


def joined(rows: Iterable[Row]) -> list[Problem]:
    """The problems of the joined file (problem, solution, math_split, math_row), in MATH's order."""
    placed = [(row.text("math_split"), int(row.text("math_row")), row) for row in rows]
    placed.sort(key=lambda place: (place[0] != "train", place[1]))
    return [_problem(row, split, number) for split, number, row in placed]


def published(rows: Iterable[Row], split: str, without: set[str]) -> list[Problem]:
    """The problems of MATH's rows of one split (problem, solution), all subjects in order, less the questions `without`."""
    made = [_problem(row, split, number) for number, row in enumerate(rows)]
    return [problem for problem in made if "".join(problem.question.split()) not in without]


def _problem(row: Row, split: str, number: int) -> Problem:
    solution = row.text("solution")
    if f"{split}/{number}" in EMPTY_BOXES:
        solution = solution.replace("\\boxed{}", f"\\boxed{{{EMPTY_BOXES[f'{split}/{number}']}}}")
    answers = boxes(solution)
    if not answers:
        raise DataError(f"{row.where}: no \\boxed{{}} in its solution")
    return Problem(
        id=f"prm12k/{split}/{number}",
        question=row.text("problem"),
        answer=answers[-1],
        kind="math",
        solution=solution,
    )


def read(_split: str, folder: Path | None) -> list[Problem]:
    """The problems from `folder`/prm12k/train.jsonl.gz, or from the hub's MATH and MATH-500."""
    if folder:
        return joined(local_rows(folder / "prm12k" / "train.jsonl.gz"))
    held_out = {"".join(problem.question.split()) for problem in math500.read("test", None)}
    found: list[Problem] = []
    for split in ("train", "test"):
        rows = (row for subject in SUBJECTS for row in hub_rows(REPOSITORY, subject, split, None))
        found += published(rows, split, held_out)
    if len(found) != SIZE:
        raise DataError(
            f"hub:{REPOSITORY} less MATH-500 gives {len(found)} problems, expected {SIZE}; name a --data-dir"
        )
    return found


PRM12K = DataSet("prm12k", {"train": SIZE}, f"hub: {REPOSITORY}, less MATH-500", "MIT", read)
