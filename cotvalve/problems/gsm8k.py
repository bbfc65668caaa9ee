"""GSM8K: grade-school word problems whose answers are whole numbers (Cobbe et al., 2021)."""

import re
from collections.abc import Iterable
from pathlib import Path

from cotvalve.errors import DataError
from cotvalve.problems.dataset import DataSet, Row, hub_rows, local_rows
from cotvalve.types import Problem

REPOSITORY = "openai/gsm8k"
REVISION = "740312add88f781978c0658806c59bc2815b9866"
_CALCULATOR = re.compile(r"<<[^<>\n]*>>")


def problems(rows: Iterable[Row], split: str) -> list[Problem]:
    """The problems of the published rows (question, answer)."""
    return [_problem(row, split) for row in rows]


def _problem(row: Row, split: str) -> Problem:
    chain, mark, gold = row.text("answer").rpartition("####")
    if not mark:
        raise DataError(f"{row.where}: no '####' before the gold answer")
    return Problem(
        id=f"gsm8k/{split}/{row.number - 1}",
        question=row.text("question"),
        answer=gold.strip().replace(",", ""),
        kind="number",
        solution=_CALCULATOR.sub("", chain).strip(),
    )


def read(split: str, folder: Path | None) -> list[Problem]:
    """The problems from `folder`/gsm8k/SPLIT.jsonl, or from the hub."""
    rows = local_rows(folder / "gsm8k" / f"{split}.jsonl") if folder else hub_rows(REPOSITORY, "main", split, REVISION)
    return problems(rows, split)


GSM8K = DataSet("gsm8k", {"train": 7473, "test": 1319}, f"hub: {REPOSITORY} (main)", "MIT", read)
