"""Data sets: the same problems from every source, bad rows named, every gold answer graded as right."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cotvalve import problems
from cotvalve.cli import data_app
from cotvalve.errors import DataError, SettingError
from cotvalve.mixchain import MixSettings
from cotvalve.problems import aime, asdiv, gsm8k, jsonl, math500, prm12k, unseen
from cotvalve.problems.dataset import local_rows, rows_of

CASES = Path(__file__).parent / "cases"
ROOT = Path(__file__).parents[1]
FULL = Path(os.environ.get("COTVALVE_DATA") or ROOT.parent / "shared" / "data")
full_data = pytest.mark.skipif(not FULL.is_dir(), reason="needs the full data sets: set COTVALVE_DATA")

ASDIV_XML = """<?xml version="1.0" encoding="UTF-8" ?>
<Machine-Reading-Corpus-File><ProblemSet>
<Problem ID="a-1" Grade="1"><Body>There are 7 red  and 2 green caps.</Body><Question>How many caps?</Question>
<Solution-Type>Addition</Solution-Type><Answer>9 (caps)</Answer><Formula>7+2=9</Formula></Problem>
<Problem ID="a-2" Grade="1"><Body>Ann and Bob.</Body><Question>How old are they?</Question>
<Solution-Type>Algebra-2</Solution-Type><Answer>5 (years old); 15 (years old)</Answer><Formula>x</Formula></Problem>
<Problem ID="a-3" Grade="1"><Body></Body><Question>What is the ratio?</Question>
<Solution-Type>Ratio</Solution-Type><Answer>22:15</Answer><Formula>x</Formula></Problem>
<Problem ID="a-4" Grade="1"><Body></Body><Question>What time is it?</Question>
<Solution-Type>Sum</Solution-Type><Answer>22:15</Answer><Formula>x</Formula></Problem>
<Problem ID="a-5" Grade="1"><Body></Body><Question>Which number?</Question>
<Solution-Type>Algebra-1</Solution-Type><Answer>-(1/3)</Answer><Formula>x</Formula></Problem>
</ProblemSet></Machine-Reading-Corpus-File>
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small data folder in the layout of docs/data.md."""
    for name in ("gsm8k", "math500", "asdiv", "aime", "prm12k"):
        (tmp_path / name).mkdir()
    for split in ("train", "test"):
        shutil.copy(CASES / "gsm8k_excerpt.jsonl", tmp_path / "gsm8k" / f"{split}.jsonl")
    shutil.copy(CASES / "math500_excerpt.jsonl", tmp_path / "math500" / "test.jsonl")
    (tmp_path / "asdiv" / "ASDiv.xml").write_text(ASDIV_XML)
    (tmp_path / "aime" / "aime2025.jsonl").write_text('{"problem": "What is 2 + 3?", "answer": 5, "id": "0"}\n')
    return tmp_path


def write(path: Path, *rows: object) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_gsm8k(folder: Path) -> None:
    first = problems.load("gsm8k", data_dir=folder)[0]
    assert (first.id, first.answer, first.kind) == ("gsm8k/test/0", "18", "number")
    assert first.solution is not None
    assert first.solution.startswith("Janet sells 16 - 3 - 4 = 9 duck eggs a day.\nShe makes 9 * 2 = $18 every day")
    assert "<<" not in first.solution
    assert "####" not in first.solution


def test_asdiv_kinds_and_numeric_subset(folder: Path) -> None:
    found = problems.load("asdiv", data_dir=folder)
    assert [(each.answer, each.kind, each.subset) for each in found] == [
        ("9", "number", "numeric"),
        ("5; 15", "list", ""),
        ("22:15", "ratio", ""),
        ("22:15", "time", ""),
        ("-(1/3)", "number", "numeric"),
    ]
    assert found[0].question == "There are 7 red and 2 green caps. How many caps?"
    assert found[0].id == "asdiv/a-1"


def test_aime_answers_are_text(folder: Path) -> None:
    assert problems.load("aime25", data_dir=folder)[0].answer == "5"


def test_the_hub_and_a_folder_give_the_same_problems(folder: Path, tmp_path: Path) -> None:
    """The hub's tables come through `datasets`; here it reads local files, the mapping is the same function."""
    import datasets

    def table(path: Path) -> "datasets.Dataset":
        return datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))

    gsm = table(folder / "gsm8k" / "test.jsonl")
    assert gsm8k.problems(rows_of(gsm, "hub"), "test") == problems.load("gsm8k", data_dir=folder)
    math = table(folder / "math500" / "test.jsonl")
    assert math500.problems(rows_of(math, "hub")) == problems.load("math500", data_dir=folder)
    contest = table(folder / "aime" / "aime2025.jsonl")
    assert aime.problems(rows_of(contest, "hub"), "aime25") == problems.load("aime25", data_dir=folder)


def test_prm12k_from_the_join_and_from_math_itself(folder: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (CASES / "math500_excerpt.jsonl").read_text().splitlines()]
    join = tmp_path / "prm12k" / "train.jsonl.gz"
    placed = [{**row, "math_split": "train", "math_row": number} for number, row in enumerate(rows)]
    with gzip.open(join, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in reversed(placed))
    whole = prm12k.published(local_rows(folder / "math500" / "test.jsonl"), "train", set())
    assert problems.load("prm12k", split="train", data_dir=folder) == whole
    held_out = {"".join(rows[1]["problem"].split())}
    rest = prm12k.published(local_rows(folder / "math500" / "test.jsonl"), "train", held_out)
    assert [each.id for each in rest] == ["prm12k/train/0", "prm12k/train/2"]


def test_the_environment_names_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COTVALVE_DATA", str(folder))
    assert problems.load("gsm8k") == problems.load("gsm8k", data_dir=folder)


def test_limit_is_a_seeded_nested_subset_in_the_order_of_the_set() -> None:
    everything = problems.load("arithmetic")
    some, more = (problems.load("arithmetic", limit=limit, seed=3) for limit in (50, 120))
    assert len(some) == 50
    assert set(some) < set(more)
    assert [each for each in everything if each in set(more)] == more
    assert some != everything[:50]
    assert some == problems.load("arithmetic", limit=50, seed=3)
    assert some != problems.load("arithmetic", limit=50, seed=4)
    assert problems.load("arithmetic", limit=10**6) == everything
    with pytest.raises(SettingError, match="limit must be 1 or more"):
        problems.load("arithmetic", limit=0)


def test_offset_goes_on_in_the_same_draw_and_begins_again_where_it_ends() -> None:
    everything = problems.training("arithmetic")
    parts = [problems.training("arithmetic", limit=700, offset=offset, seed=3) for offset in range(0, len(everything), 700)]
    assert parts[0] == problems.training("arithmetic", limit=700, seed=3)
    seen = [problem.id for part in parts for problem in part]
    assert set(seen) == {problem.id for problem in everything}
    assert [len(part) for part in parts] == [700] * len(parts), "the last part goes on from the beginning"
    assert len({problem.id for part in parts[:2] for problem in part}) == 1400
    assert problems.training("arithmetic", limit=700, offset=len(everything), seed=3) == parts[0]
    with pytest.raises(SettingError, match="offset 0 or more"):
        problems.training("arithmetic", limit=5, offset=-1)
    with pytest.raises(SettingError, match="give its size as limit"):
        MixSettings(offset=5)


def test_fingerprint_sees_content_and_order() -> None:
    some = problems.load("arithmetic", limit=3)
    assert problems.fingerprint(some) == problems.fingerprint(list(some))
    assert problems.fingerprint(some) != problems.fingerprint(some[::-1])
    assert problems.fingerprint(some) != problems.fingerprint(some[:2])
    assert len(problems.fingerprint([])) == 64


def test_unknown_names_offer_the_nearest() -> None:
    with pytest.raises(SettingError, match="unknown data set 'gsm8': did you mean 'gsm8k'"):
        problems.load("gsm8")
    with pytest.raises(SettingError, match=r"unknown split of prm12k 'test'.*Known: heldout, train"):
        problems.load("prm12k")
    assert problems.splits("gsm8k") == ("train", "test")
    assert problems.splits("mine.jsonl") == ("test",)


def test_your_own_json_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mine.jsonl",
        {"question": "What is 2 + 3?", "answer": 5},
        {"problem": "Which?", "answer": "Rug B", "id": "w"},
        {"question": "Half?", "answer": "It is 1/2.\n#### 1/2"},
        {"question": "Root?", "answer": "So \\boxed{\\sqrt{2}}."},
        {"question": "When?", "answer": "3:30", "kind": "ratio", "solution": "3 to 30"},
    )
    found = problems.load(path)
    assert [(each.id, each.answer, each.kind) for each in found] == [
        ("mine/1", "5", "number"),
        ("w", "Rug B", "word"),
        ("mine/3", "1/2", "number"),
        ("mine/4", "\\sqrt{2}", "math"),
        ("mine/5", "3:30", "ratio"),
    ]
    assert found[2].solution == "It is 1/2."
    assert found[4].solution == "3 to 30"
    assert all(each.passed for each in problems.check([path]))


GOOD = {"question": "What is 2 + 3?", "answer": "5"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD, '{"question": "cut'], "row 2 is not JSON"),
        ([GOOD, "[1]"], "row 2 is list"),
        ([GOOD, {"question": "What?"}], "row 2: no field 'answer'; it has: question"),
        ([{"text": "What?", "answer": "5"}], "row 1: no field 'question' or 'problem'"),
        ([{"question": "What?", "answer": ""}], "row 1: field 'answer' is empty"),
        ([{"question": "What?", "answer": [5]}], "row 1: field 'answer' is list, expected text"),
        ([{**GOOD, "answer": "many", "kind": "number"}], "row 1: gold answer 'many' cannot be read as number"),
        ([{**GOOD, "kind": "numbr"}], "row 1: unknown kind 'numbr': did you mean 'number'"),
        ([{**GOOD, "id": "a"}, {**GOOD, "id": "a"}], "the id 'a' stands on more than one row"),
        (['{"question": "What?", "answer": NaN}'], "row 1: field 'answer' is empty"),
        (['{"question": null, "problem": "", "answer": 5}'], "row 1: field 'problem' is empty"),
        (['{"question": null, "answer": 5}'], "row 1: field 'question' is empty"),
        (['{"question": "Half \\ud83d?", "answer": "5"}'], "row 1 holds \\ud83d, half of a character"),
        ([], "no rows in it"),
        (["", "  "], "no rows in it"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, rows: list[object], message: str) -> None:
    path = write(tmp_path / "bad.jsonl", *rows)
    with pytest.raises(DataError) as caught:
        problems.load(path)
    assert message in str(caught.value)
    assert "bad.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_pandas_writes_for_missing_is_missing(tmp_path: Path) -> None:
    """NaN was read as the word "nan": a gold answer, and a solution to train on."""
    path = write(tmp_path / "mine.jsonl", '{"question": "What?", "answer": 5.0, "id": NaN, "solution": NaN, "kind": NaN, "subset": NaN}')
    (problem,) = problems.load(path)
    assert (problem.id, problem.answer, problem.solution, problem.kind, problem.subset) == ("mine/1", "5.0", None, "number", "")


def test_missing_and_broken_files(folder: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        problems.load("aime24", data_dir=folder)
    with pytest.raises(DataError, match="no such file"):
        problems.load(str(folder / "none.jsonl"))
    (folder / "asdiv" / "ASDiv.xml").write_text(ASDIV_XML[:200])
    with pytest.raises(DataError, match="not readable as XML"):
        problems.load("asdiv", data_dir=folder)
    (folder / "prm12k" / "train.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(DataError, match="not a readable gzip file"):
        problems.load("prm12k", split="train", data_dir=folder)
    (folder / "gsm8k" / "test.jsonl").write_text('{"question": "What?", "answer": "18"}\n')
    with pytest.raises(DataError, match="row 1: no '####' before the gold answer"):
        problems.load("gsm8k", data_dir=folder)


@pytest.mark.parametrize("name", ["gsm8k", "asdiv"])
def test_offline_without_a_copy_is_one_line_that_says_what_to_do(name: str, tmp_path: Path) -> None:
    code = (
        f"from cotvalve import errors, problems\ntry: problems.load('{name}')\nexcept errors.DataError as e: print(e)"
    )
    dead = "http://127.0.0.1:9"
    environment = {key: value for key, value in os.environ.items() if key != "COTVALVE_DATA"} | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path),
        "HTTPS_PROXY": dead,
        "https_proxy": dead,
        "NO_PROXY": "",
    }
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert len(ran.stdout.splitlines()) == 1, ran.stdout + ran.stderr
    assert "--data-dir" in ran.stdout


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("data fetch gsm8k", "--data-dir"),
        ("data fetch asdiv", "--data-dir"),
        ("train valve --model tiny --device cpu --data horseee/MixChain-Z-GSM8K --out {out}", "name a file of it as --data"),
    ],
)
def test_without_a_network_the_command_line_says_one_line(line: str, says: str, tmp_path: Path) -> None:
    """The hub's library tells each of its tries, and waits between them; only the last word is ours."""
    code = f"import sys, time; time.sleep = lambda s: None; from cotvalve.cli import main; sys.argv = {['cotvalve', *line.format(out=tmp_path).split()]!r}; main()"
    dead = "http://127.0.0.1:9"
    environment = {key: value for key, value in os.environ.items() if key not in ("COTVALVE_DATA", "HF_HUB_OFFLINE")} | {
        "HF_HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "HTTPS_PROXY": dead, "https_proxy": dead, "NO_PROXY": "", "no_proxy": "",
    }  # fmt: skip
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert ran.returncode == 2, ran.stderr
    assert ran.stdout == ""
    *where, said = ran.stderr.splitlines()
    assert all(told.startswith("tiny on cpu, ") for told in where), "where the model runs, and nothing of the library's"
    assert said.startswith("cotvalve: data set '")
    assert says in said


def test_kinds_told_from_answers() -> None:
    golds = ["-1,080.5", "3:30 pm", "22:15", "5:6", "x", "x+1", "\\pi", "1; 2", "yes", "$5"]
    kinds = ["number", "time", "time", "ratio", "math", "math", "math", "list", "word", "number"]
    assert [jsonl.kind_of(gold) for gold in golds] == kinds
    assert asdiv.kind_of("The 60th caller.") == "number"


def test_check_reports_what_is_wrong_or_missing(folder: Path) -> None:
    found = problems.check(["gsm8k", "arithmetic"], folder)
    assert [(each.name, each.split, each.wrong) for each in found if each.name == "gsm8k"] == [
        ("gsm8k", "train", ()),
        ("gsm8k", "test", ()),
    ]
    assert [each.passed for each in found] == [False, False, True, True, True], "the excerpts lack rows"
    text = (folder / "gsm8k" / "test.jsonl").read_text().replace("#### 18", "The answer is \\\\boxed{17}\\n#### 18")
    (folder / "gsm8k" / "test.jsonl").write_text(text)
    wrong = problems.check(["gsm8k"], folder)[1].wrong
    assert len(wrong) == 1
    assert wrong[0].startswith("gsm8k/test/0: solution: read '17', gold '18'")


def test_the_data_commands_show_sets_and_verdicts(folder: Path) -> None:
    shown = CliRunner().invoke(data_app, ["list"]).output
    assert [line.split()[0] for line in shown.splitlines()] == list(problems.NAMES)
    assert "train 7,473, test 1,319" in shown

    made = CliRunner().invoke(data_app, ["check", "arithmetic"])
    assert made.exit_code == 0
    assert "arithmetic test: passed; 1,000 of 1,000 problems, 4,000 texts graded, 0 wrong, 0 explained" in made.output

    lacking = CliRunner().invoke(data_app, ["check", "gsm8k", "--data-dir", str(folder)])
    assert lacking.exit_code == 1
    assert "gsm8k test: failed; 4 of 1,319 problems" in lacking.output


def test_the_docs_name_every_set_and_every_exception() -> None:
    page = (ROOT / "docs" / "data.md").read_text()
    for name in problems.NAMES:
        assert f"`{name}`" in page
        assert all(identity in page for identity in problems.describe(name).explained)
    assert all(identity in page for identity in prm12k.EMPTY_BOXES)


def test_what_must_stay_unseen_is_known_by_its_words() -> None:
    for split in ("test", "validation", "heldout"):
        assert {unseen.origin(p.question) for p in problems.load("arithmetic", split=split)} == {f"arithmetic {split}"}
    assert not [p.id for p in problems.training("arithmetic") if unseen.origin(p.question)]


@full_data
def test_the_list_of_what_must_stay_unseen_is_whole() -> None:
    """benchmarks/unseen.py has to run again when a set is added; no question that may be learned is on the list."""
    for name in problems.NAMES:
        for split in (*problems.splits(name), "heldout"):
            if split == "train" or (split == "heldout" and "train" not in problems.splits(name)):
                continue
            missing = [p.id for p in problems.load(name, split=split, data_dir=FULL) if unseen.origin(p.question) is None]
            assert not missing, f"{name} {split}: {missing[:3]}"
        if "train" in problems.splits(name):
            assert not [p.id for p in problems.training(name, data_dir=FULL) if unseen.origin(p.question)]


@full_data
def test_every_gold_answer_of_every_set_grades_as_right() -> None:
    for found in problems.check(data_dir=FULL):
        assert found.passed, (found.name, found.split, found.problems, found.wrong[:5])


@full_data
def test_asdiv_in_full() -> None:
    found = problems.load("asdiv", data_dir=FULL)
    kinds = Counter(each.kind for each in found)
    assert kinds == {"number": 2096, "list": 90, "word": 58, "ratio": 43, "time": 18}
    assert sum(each.subset == "numeric" for each in found) == 2096


@full_data
def test_prm12k_holds_none_of_math500() -> None:
    held_out = {"".join(each.question.split()) for each in problems.load("math500", data_dir=FULL)}
    trained = {"".join(each.question.split()) for each in problems.load("prm12k", split="train", data_dir=FULL)}
    assert not held_out & trained


def test_a_file_so_short_that_a_split_is_empty_is_told(tmp_path: Path) -> None:
    """A sweep loaded the model, sampled nothing, and said "no points; run `cotvalve sweep` first"."""
    rows = [{"question": f"{i} + 1?", "answer": str(i + 1), "id": f"{i}"} for i in range(60)]
    mine = write(tmp_path / "mine.jsonl", *rows)
    held = {problem.id for problem in problems.load(mine, split="heldout")}
    for some, other in ((True, "all its questions are held out"), (False, "none of its [0-9]+ questions is held out")):
        path = write(tmp_path / "few.jsonl", *(row for row in rows if (row["id"] in held) == some))
        assert problems.load(path, split="heldout" if some else "test")
        with pytest.raises(DataError, match=rf"few\.jsonl': {other}"):
            problems.training(path) if some else problems.load(path, split="heldout")


def test_a_question_on_several_rows_is_held_out_by_all_of_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Rows are held out by their ids: of a file that has each question three times nearly all held-out ones were trained on."""
    rows = [{"question": f"What is {i} + 3{'?' * (1 + k)}", "answer": str(i + 3)} for k in range(3) for i in range(60)]
    path = str(write(tmp_path / "again.jsonl", *rows))
    held = {problem.answer for problem in problems.load(path, split="heldout")}
    with caplog.at_level("WARNING", "cotvalve"):
        learned = problems.training(path)
    assert held
    assert not held & {problem.answer for problem in learned}
    assert len(learned) == 3 * (60 - len(held))
    left_out = 180 - len(problems.load(path, split="heldout")) - len(learned)
    assert caplog.messages == [f"{path}: {left_out} of {left_out + len(learned)} training questions are held out by another row with the same words: they were left out"]
    caplog.clear()
    problems.training(str(write(tmp_path / "once.jsonl", *rows[:60])))
    assert not caplog.messages


def test_a_file_has_the_splits_test_and_heldout_and_no_other(tmp_path: Path) -> None:
    """A misspelt 'heldout' gave all rows, those that are trained on among them."""
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i} + 1?", "answer": str(i + 1)}) + "\n" for i in range(60)))
    assert len(problems.load(str(path))) == 60
    assert 0 < len(problems.load(str(path), split="heldout")) < 20
    with pytest.raises(SettingError, match="did you mean 'heldout'"):
        problems.load(str(path), split="hedlout")
