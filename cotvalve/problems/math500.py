"""MATH-500: 500 competition problems of the MATH test set (Hendrycks et al., 2021; the subset of Lightman et al., 2023)."""

from collections.abc import Iterable
from pathlib import Path

from cotvalve.problems.dataset import DataSet, Row, hub_rows, local_rows
from cotvalve.types import Problem

REPOSITORY = "HuggingFaceH4/MATH-500"
REVISION = "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be"


def problems(rows: Iterable[Row]) -> list[Problem]:
    """The problems of the published rows (problem, solution, answer, subject, level, unique_id)."""
    return [
        Problem(
            id="math500/" + row.text("unique_id").removesuffix(".json"),
            question=row.text("problem"),
            answer=row.text("answer"),
            kind="math",
            solution=row.text("solution"),
        )
        for row in rows
    ]


def read(split: str, folder: Path | None) -> list[Problem]:
    """The problems from `folder`/math500/test.jsonl, or from the hub."""
    rows = local_rows(folder / "math500" / "test.jsonl") if folder else hub_rows(REPOSITORY, None, split, REVISION)
    return problems(rows)


MATH500 = DataSet("math500", {"test": 500}, f"hub: {REPOSITORY}", "MIT", read)
