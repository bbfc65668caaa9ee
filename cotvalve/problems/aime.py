"""AIME 2024 and 2025: 30 problems each, answers are whole numbers from 0 to 999. For evaluation only."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

from cotvalve.problems.dataset import DataSet, Row, hub_rows, local_rows
from cotvalve.types import Problem

_LICENCE = "problems by the Mathematical Association of America: for evaluation only"
_HUB = {
    "aime24": ("HuggingFaceH4/aime_2024", "train", "2fe88a2f1091d5048c0f36abc874fb997b3dd99a"),
    "aime25": ("math-ai/aime25", "test", "563bb8404243c5f09de6ec262f2db674fe5bce9b"),
}
_LOCAL = {"aime24": "aime2024.jsonl", "aime25": "aime2025.jsonl"}


def problems(rows: Iterable[Row], name: str) -> list[Problem]:
    """The problems of the published rows (problem, answer, id; 2024 also solution)."""
    return [
        Problem(
            id=f"{name}/{row.text('id')}",
            question=row.text("problem"),
            answer=row.text("answer"),
            kind="number",
            solution=row.optional("solution"),
        )
        for row in rows
    ]


def _read(name: str, _split: str, folder: Path | None) -> list[Problem]:
    repository, hub_split, revision = _HUB[name]
    rows = local_rows(folder / "aime" / _LOCAL[name]) if folder else hub_rows(repository, None, hub_split, revision)
    return problems(rows, name)


AIME24 = DataSet("aime24", {"test": 30}, f"hub: {_HUB['aime24'][0]}", _LICENCE, partial(_read, "aime24"))
AIME25 = DataSet("aime25", {"test": 30}, f"hub: {_HUB['aime25'][0]}", _LICENCE, partial(_read, "aime25"))
