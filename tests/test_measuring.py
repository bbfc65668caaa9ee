"""benchmarks/agreement.py and benchmarks/losses.py on rows made by hand."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import agreement, losses
from cotvalve import problems
from cotvalve.baselines import PLAIN
from cotvalve.errors import DataError
from cotvalve.figures import DASH, MINUS
from cotvalve.records import read_parquet, write_json, write_parquet

QUESTIONS = problems.load("arithmetic", limit=8)


def folder(where: Path, right: dict[tuple[str, float], str], texts: dict[tuple[str, float], list[str]] | None = None) -> Path:
    """A finished sweep: one sign for each question, + right, - wrong, # cut."""
    where.mkdir()
    rows: list[dict[str, Any]] = [
        {
            "dataset": "arithmetic", "system": system, "problem": problem.id, "alpha": alpha, "sample": 0, "tokens": 100 - 50 * int(alpha),
            "reasoning_tokens": 0, "prompt_tokens": 9, "finish": "length" if sign == "#" else "stop", "correct": sign == "+", "predicted": "1",
            "reason": "", "subset": "", "text": (texts or {}).get((system, alpha), [sign] * 8)[i],
        }
        for (system, alpha), signs in right.items() for i, (problem, sign) in enumerate(zip(QUESTIONS, signs, strict=True))
    ]  # fmt: skip
    write_parquet(where / "rows.parquet", rows)
    write_json(where / "run.json", {"verb": "sweep", "settings": {"split": "test"}, "facts": {}})
    return where


def test_two_engines_are_compared_question_by_question(tmp_path: Path) -> None:
    one = folder(tmp_path / "one", {(PLAIN, 0.0): "++++----", ("V", 0.0): "++++----", ("V", 1.0): "++++++--"})
    two = folder(tmp_path / "two", {(PLAIN, 0.0): "++++----", ("V", 0.0): "++++----", ("V", 1.0): "+++----+"})
    lines = agreement.compare(one, two, 99).splitlines()[2:]
    assert [line.split(" | ")[:5] for line in lines] == [[f"| {PLAIN}", "0", "4, 4", "8", "8"], ["| V", "1", "6, 4", "8", "4"]]
    assert f" {MINUS}25.0 [" in lines[1]
    assert "+0.0 [" in lines[0] or " 0.0 [" in lines[0]
    fewer = folder(tmp_path / "fewer", {(PLAIN, 0.0): "++++--++", ("W", 1.0): "++++----"})
    rows = [{name: value for name, value in row.items() if name != "text"} for row in read_parquet(fewer / "rows.parquet")]
    write_parquet(fewer / "rows.parquet", rows)
    assert [line.split(" | ")[:5] for line in agreement.compare(one, fewer, 99).splitlines()[2:]] == [[f"| {PLAIN}", "0", "4, 6", "8", DASH]]
    other = folder(tmp_path / "other", {("W", 1.0): "++++----"})
    with pytest.raises(DataError, match="other questions, or no position in common"):
        agreement.compare(one, other, 99)


def test_what_was_lost_is_told_by_what_happened(tmp_path: Path) -> None:
    gold = QUESTIONS[0].answer
    went_on = [f"So 1 + 1 = {gold}. And {gold} + 1 = 0.", *["= 123456789"] * 7]
    made = folder(tmp_path / "made", {(PLAIN, 0.0): "+++++---", ("V", 1.0): "--#++++-"}, {("V", 1.0): went_on})
    (line,) = losses.losses(made, "V", 1.0, None)
    assert "loses 3 that the plain model has, and wins 2" in line
    assert "1 are cut, 0 have no single number" in line
    assert "1 of the other 3 had it and went on" in line
    with pytest.raises(DataError, match="has no V at alpha 2"):
        losses.losses(made, "V", 2.0, None)
