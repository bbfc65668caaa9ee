"""benchmarks/agreement.py, halves.py, hardness.py, losses.py and the table of sampling.py on rows made by hand."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import agreement, halves, hardness, losses, reproduction, sampling
from cotvalve import problems
from cotvalve.baselines import PLAIN
from cotvalve.errors import DataError, SettingError
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


def test_who_pays_is_told_by_the_length_of_the_human_solution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine questions, the last ones with the longest solutions: the dial loses those, and nothing else."""
    nine = [replace(one, id=f"gsm8k/test/{i}", solution="step " * (9 - i)) for i, one in enumerate(problems.load("arithmetic", limit=9))]
    monkeypatch.setattr(hardness, "load", lambda *_, **__: nine)
    step = tmp_path / "0" / "main-gsm8k"
    step.mkdir(parents=True)
    rows: list[dict[str, Any]] = [
        {
            "dataset": "gsm8k", "system": system, "problem": one.id, "alpha": alpha, "sample": 0, "tokens": 100 - int(50 * alpha), "reasoning_tokens": 0,
            "prompt_tokens": 9, "finish": "stop", "correct": alpha == 0 or i >= 3, "predicted": "1", "reason": "", "subset": "", "text": "",
        }
        for system, alpha in ((PLAIN, 0.0), ("V", 0.0), ("V", 1.0)) for i, one in enumerate(nine)
    ]  # fmt: skip
    write_parquet(step / "rows.parquet", rows)
    write_json(step / "run.json", {"verb": "sweep", "settings": {"split": "test", "model": "m"}, "facts": {"billions": "1"}})
    lines = [line.split(" | ") for line in hardness.tables([tmp_path / "0"], "main", ["V"], [1.0, 3.0], 99, None).splitlines() if line.startswith("| V")]
    assert [line[1] for line in lines] == list(hardness.THIRDS)
    assert [line[3].split()[0] for line in lines] == ["100.0", "100.0", "0.0"]
    assert [line[6].split()[0] for line in lines] == ["0.0", "0.0", f"{MINUS}100.0"]
    assert all(line[7].startswith("2.00") for line in lines)
    # Held-out questions of the same set choose positions and are told nowhere.
    held = tmp_path / "0" / "main-heldout"
    held.mkdir()
    write_parquet(held / "rows.parquet", [{**row, "correct": False} for row in rows])
    write_json(held / "run.json", {"verb": "sweep", "settings": {"split": "heldout", "model": "m"}, "facts": {"billions": "1"}})
    assert [line.split(" | ") for line in hardness.tables([tmp_path / "0"], "main", ["V"], [1.0, 3.0], 99, None).splitlines() if line.startswith("| V")] == lines
    shutil.rmtree(held)
    # A sweep of some questions only: the thirds are of those, and so is the count.
    monkeypatch.setattr(hardness, "load", lambda *_, **__: [*nine, *(replace(one, id=f"gsm8k/test/{i}", solution="s" * 99) for i, one in enumerate(nine, 9))])
    some = hardness.tables([tmp_path / "0"], "main", ["V"], [1.0], 99, None)
    assert some.startswith("gsm8k, 9 questions in thirds")
    assert [line.split(" | ")[3].split()[0] for line in some.splitlines() if line.startswith("| V")] == ["100.0", "100.0", "0.0"]
    monkeypatch.setattr(hardness, "load", lambda *_, **__: nine)
    # By answers: the three that the dial loses are the words.
    kinds = [replace(one, kind="word" if i < 3 else "number") for i, one in enumerate(nine)]
    monkeypatch.setattr(hardness, "load", lambda *_, **__: kinds)
    by = [line.split(" | ") for line in hardness.tables([tmp_path / "0"], "main", ["V"], [1.0], 99, None, "answer").splitlines() if line.startswith("| V")]
    assert [(line[1], line[6].split()[0]) for line in by] == [("number (6)", "0.0"), ("word (3)", f"{MINUS}100.0")]
    monkeypatch.setattr(hardness, "load", lambda *_, **__: nine)
    with pytest.raises(DataError, match="no sweep of table 'main' on a set with several kinds of answers"):
        hardness.tables([tmp_path / "0"], "main", ["V"], [1.0], 99, None, "answer")
    # A system that one data set does not have is told for the others.
    other = tmp_path / "0" / "main-math500"
    other.mkdir()
    write_parquet(other / "rows.parquet", [{**row, "dataset": "math500"} for row in rows if row["system"] == PLAIN])
    write_json(other / "run.json", {"verb": "sweep", "settings": {"split": "test", "model": "m"}, "facts": {"billions": "1"}})
    both = hardness.tables([tmp_path / "0"], "main", ["V"], [1.0], 99, None)
    assert both.count("| V") == 3
    assert both.count("| plain model") == 6
    with pytest.raises(DataError, match="no 'W' in table main; it has"):
        hardness.tables([tmp_path / "0"], "main", ["W"], [1.0], 99, None)
    with pytest.raises(DataError, match="no sweep of table 'other'"):
        hardness.tables([tmp_path / "0"], "other", ["V"], [1.0], 99, None)
    write_parquet(other / "rows.parquet", [{**row, "dataset": "math500"} for row in rows if row["system"] == "V"])
    with pytest.raises(DataError, match="table main has no plain model on math500"):
        hardness.tables([tmp_path / "0"], "main", ["V"], [1.0], 99, None)
    with pytest.raises(DataError, match="without human solutions"):
        hardness.thirds([replace(one, solution="") for one in nine])


def test_a_half_is_told_at_what_the_other_half_chose(tmp_path: Path) -> None:
    """V at alpha 1 has half the tokens and is wrong on one half, which therefore stays at 0; the other half turns it up, and is told so on the first."""
    names = [f"asdiv/{i}" for i in range(8)]
    _, kept = halves.halves(set(names), 0)
    step = tmp_path / "0" / "main-asdiv"
    step.mkdir(parents=True)
    rows: list[dict[str, Any]] = [
        {
            "dataset": "asdiv", "system": system, "problem": name, "alpha": alpha, "sample": 0, "tokens": 100 - int(50 * alpha), "reasoning_tokens": 0,
            "prompt_tokens": 9, "finish": "stop", "correct": alpha == 0 or name in kept, "predicted": "1", "reason": "", "subset": "", "text": "",
        }
        for system, alpha in ((PLAIN, 0.0), ("V", 0.0), ("V", 1.0)) for name in names
    ]  # fmt: skip
    write_parquet(step / "rows.parquet", rows)
    write_json(step / "run.json", {"verb": "sweep", "settings": {"split": "test", "model": "m"}, "facts": {"billions": "1"}})

    def told(splits: int) -> list[list[str]]:
        return [line.split(" | ") for line in halves.tables([tmp_path / "0"], "asdiv", [], 1.0, 99, splits).splitlines() if line.startswith(("| main: V", "| any"))]

    for line in told(1):
        assert {place.split()[-3] for place in line[1].split("; ")} == {"0", "1"}
        # All of `kept` at alpha 0, none of the others at alpha 1; 75 tokens of 100.
        assert (line[3].split()[0], line[4].split()[0], line[6].split()[0], line[7].split()[0]) == ("50.0", "75.0", f"{MINUS}50.0", "1.33")
    # With other halves both have lost questions: they stay at 0 and lose nothing, and the mean over splits lies between.
    assert 50 < float(told(20)[0][3].split()[0]) <= 100
    with pytest.raises(DataError, match="no sweep of gsm8k"):
        halves.tables([tmp_path / "0"], "gsm8k", [], 1.0, 99, 1)
    with pytest.raises(SettingError, match="mian"):
        halves.tables([tmp_path / "0"], "asdiv", ["mian"], 1.0, 99, 1)
    fewer = tmp_path / "0" / "other-asdiv"
    fewer.mkdir()
    write_parquet(fewer / "rows.parquet", [row for row in rows if row["problem"] != names[0]])
    write_json(fewer / "run.json", {"verb": "sweep", "settings": {"split": "test", "model": "m"}, "facts": {"billions": "1"}})
    with pytest.raises(DataError, match="table other has other questions of asdiv than main"):
        halves.tables([tmp_path / "0"], "asdiv", [], 1.0, 99, 1)
    assert "main: V" in halves.tables([tmp_path / "0"], "asdiv", ["main"], 1.0, 99, 1)
    shutil.rmtree(fewer)
    second = tmp_path / "1" / "main-asdiv"
    second.mkdir(parents=True)
    write_parquet(second / "rows.parquet", [row for row in rows if row["system"] == PLAIN])
    write_json(second / "run.json", {"verb": "sweep", "settings": {"split": "test", "model": "m"}, "facts": {"billions": "1"}})
    with pytest.raises(DataError, match="main: V is not in every folder"):
        halves.tables([tmp_path / "0", tmp_path / "1"], "asdiv", [], 1.0, 99, 1)


def test_a_half_chooses_the_shortest_within_its_loss_of_its_own_table_s_plain_model(tmp_path: Path) -> None:
    """In the table `easy` the plain model has all right, in `hard` half of it: what a position loses is told against its own."""

    def sweep(name: str, split: str, systems: dict[tuple[str, float | None], tuple[str, int]]) -> None:
        rows = [
            {
                "dataset": "asdiv", "system": system, "problem": f"q{i}", "alpha": alpha, "sample": 0, "tokens": tokens, "reasoning_tokens": 0,
                "prompt_tokens": 9, "finish": "stop", "correct": sign == "+", "predicted": "1", "reason": "", "subset": "", "text": "",
            }
            for (system, alpha), (signs, tokens) in systems.items() for i, sign in enumerate(signs)
        ]  # fmt: skip
        (tmp_path / "0" / name).mkdir(parents=True)
        write_parquet(tmp_path / "0" / name / "rows.parquet", rows)
        write_json(tmp_path / "0" / name / "run.json", {"verb": "sweep", "settings": {"split": split, "model": "m"}, "facts": {"billions": "1"}})

    sweep("easy-asdiv", "test", {(PLAIN, 0.0): ("++++", 100), ("prompt: shortcut", None): ("++++", 1), ("V", 0.0): ("++++", 100), ("V", 1.0): ("+++-", 60)})
    sweep("hard-asdiv", "test", {(PLAIN, 0.0): ("++--", 80), ("W", 0.0): ("++--", 80), ("W", 1.0): ("++--", 40)})
    sweep("easy-heldout", "heldout", {(PLAIN, 0.0): ("++++", 100), ("V", 2.0): ("++++", 2)})
    found = {table: here for (table, _, held), here in reproduction.read([tmp_path / "0"]).items() if not held}
    ids = {f"q{i}" for i in range(4)}
    easy, hard = [("easy", "V", 0.0), ("easy", "V", 1.0)], [("hard", "W", 0.0), ("hard", "W", 1.0)]
    assert [halves.choice(found, easy, ids, loss) for loss in (24.9, 25.0)] == easy
    assert halves.choice(found, easy + hard, ids, 1.0) == ("hard", "W", 1.0)
    told = halves.tables([tmp_path / "0"], "asdiv", [], 0.0, 99, 3)
    assert "shortcut" not in told
    assert "alpha 2" not in told
    (anyone,) = [line.split(" | ") for line in told.splitlines() if line.startswith("| any of them")]
    assert anyone[1] == "hard: W, 1 (100 %)"
    assert (anyone[6].split()[0], anyone[7].split()[0]) == ("0.0", "2.00"), "against the plain model of that table"


def test_rates_are_compared_by_medians_and_by_the_best() -> None:
    def row(name: str, *rates: float) -> dict[str, Any]:
        return {"part": name.partition(",")[0], "rows": [{"name": name, "rates": list(rates), "tokens_per_second": max(rates)}]}

    steps = [{"part": part, "step_ms": ms, "kernels": 7, "busy_ms": ms} for part, ms in (("engine_profile", 5.0), ("engine_base_profile", 4.0))]
    told = sampling.table([row("engine, 8 alphas", 70, 90, 80), row("engine_base", 100, 120, 90), row("stock, 8 alphas", 9, 10), *steps])
    ours, bare, stock, *rest = told.splitlines()[1:]
    assert ours.split()[3:8] == ["80", "90", "70", "80.0%", "75.0%"]
    assert bare.split()[1:4] == ["100", "120", "90"]
    assert "9.00x" in stock
    assert rest[-1] == "a step with the dial is at 80.0% of one without LoRA"
    sized = sampling.table([row("engine, 8 alphas, 64 requests", 50), row("engine_base, 32 requests", 10), row("engine_base, 64 requests", 100)])
    assert sized.splitlines()[1].split()[5:10] == ["50", "50", "50", "50.0%", "50.0%"]  # those of as many requests
