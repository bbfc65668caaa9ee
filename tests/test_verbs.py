"""extract, fuse and sweep on the embedded models, as a user runs them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cotvalve import calibrate, sweep
from cotvalve.errors import DataError, DirectionMismatch, SettingError
from cotvalve.records import Run, read_json, read_parquet, write_parquet
from cotvalve.valve import Valve
from cotvalve.verbs import ExtractSettings, FuseSettings, extract, fuse


@pytest.fixture(scope="module")
def pair_direction(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded pair's difference at rank 8."""
    return extract(ExtractSettings(base="tiny", reasoner="tiny-reasoner", rank=8, out=str(tmp_path_factory.mktemp("x") / "d")))


def test_extract_makes_a_direction_that_turns_and_says_what_it_kept(pair_direction: Path) -> None:
    told = json.loads((pair_direction / "extraction.json").read_text())
    assert told["rank"] == 8
    assert 0 < told["energy"] < told["energy_within_modules"] < 1
    valve = Valve.load("tiny", pair_direction)
    brief, _ = valve.generate("What is 2 + 3?", alpha=[0.0, 1.0], prompt="plain", max_new_tokens=24)
    assert brief.text == Valve.load("tiny").generate("What is 2 + 3?", prompt="plain", max_new_tokens=24)[0].text


def test_extract_and_fuse_refuse_a_folder_with_something_in_it(tmp_path: Path, pair_direction: Path) -> None:
    (tmp_path / "kept").write_text("x")
    with pytest.raises(DataError, match="not empty; name another --out"):
        extract(ExtractSettings(base="tiny", reasoner="tiny-reasoner", out=str(tmp_path)))
    with pytest.raises(DataError, match="not empty; name another --out"):
        fuse(FuseSettings(model="tiny", direction=str(pair_direction), out=str(tmp_path)))


@pytest.mark.parametrize("out", [".", "", "link"])
def test_an_empty_folder_that_is_there_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    """`--out .` was a traceback, and in the place of a link (or a mounted disk) nothing can be put: told when all was computed."""
    home = tmp_path / "home"
    (home / ".part" / "half").mkdir(parents=True)  # of a killed one
    (tmp_path / "link").symlink_to(home, target_is_directory=True)
    monkeypatch.chdir(tmp_path if out == "link" else home)
    kept = home.stat().st_ino
    extract(ExtractSettings(base="tiny", reasoner="tiny-reasoner", rank=2, out=out))
    assert home.stat().st_ino == kept
    assert {path.name for path in home.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "direction.json", "extraction.json"}
    assert Valve.load("tiny", home).rows
    with pytest.raises(DataError, match="not empty; name another --out"):
        extract(ExtractSettings(base="tiny", reasoner="tiny-reasoner", rank=2, out=out))


def test_a_failed_extract_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    with pytest.raises(SettingError):
        extract(ExtractSettings(base="tiny", reasoner="tiny-reasoner", rank=0, out=str(tmp_path / "d")))
    assert not (tmp_path / "d").exists()


def test_a_fused_model_answers_and_has_no_dial_any_more(tmp_path: Path) -> None:
    folder = fuse(FuseSettings(model="tiny-reasoner", direction="tiny-valve", alpha=1.0, out=str(tmp_path / "fused")))
    question = "Tom has 12 apples. He buys 7 more. How many apples does he have?"
    fused = Valve.load(folder, dtype="float32").generate(question, prompt="plain", max_new_tokens=200)[0]
    turned = Valve.load("tiny-reasoner", "tiny-valve").generate(question, alpha=1.0, prompt="plain", max_new_tokens=200)[0]
    assert fused.text == turned.text
    with pytest.raises(DirectionMismatch, match=r"was fused at alpha 1\.0 and has no dial any more"):
        Valve.load(folder, "tiny-valve")


def test_a_report_is_made_again_from_the_rows_alone(tmp_path: Path) -> None:
    settings = sweep.SweepSettings(
        model="tiny-reasoner", direction="++=tiny-valve", data="arithmetic", prompt="plain", limit=3, alphas="0,1",
        max_new_tokens=40, baselines="shortcut", slots=8, out=str(tmp_path / "s"),
    )  # fmt: skip
    folder = sweep.run(settings).parent
    points = (folder / "points.json").read_text()
    assert {(p["system"], p["alpha"]) for p in json.loads(points)["points"] if p["dataset"] == "arithmetic"} == {
        ("plain model", None), ("prompt: shortcut", None), ("++", 0.0), ("++", 1.0),
    }  # fmt: skip
    sweep.redo(folder)
    assert (folder / "points.json").read_text() == points
    for left in folder.glob("rows.sqlite*"):
        left.unlink()
    sweep.redo(folder)
    assert (folder / "points.json").read_text() == points
    # Published rows have lost their texts: all but the examples is there.
    write_parquet(folder / "rows.parquet", ({k: v for k, v in row.items() if k != "text"} for row in read_parquet(folder / "rows.parquet")))
    sweep.redo(folder)
    assert json.loads((folder / "points.json").read_text())["facts"]["prompt"] == "plain"
    again = json.loads((folder / "points.json").read_text())["points"]
    assert [(p["system"], p["alpha"], p["accuracy"]) for p in again] == [(p["system"], p["alpha"], p["accuracy"]) for p in json.loads(points)["points"]]


def test_a_report_made_again_says_what_the_first_one_said(tmp_path: Path) -> None:
    """The sentence about what was chosen where was lost, baselines and data sets changed places, and a bar in a name was a traceback."""
    for name in ("z.jsonl", "a|b.jsonl"):
        (tmp_path / name).write_text('{"question": "2 + 3?", "answer": "5"}\n')
    settings = sweep.SweepSettings(
        model="tiny-reasoner", direction="++=tiny-valve", data=f"{tmp_path / 'z.jsonl'},{tmp_path / 'a|b.jsonl'}", prompt="plain", alphas="0,1",
        max_new_tokens=4, baselines="shortcut,budget", budgets="50,100", chosen_on="10 held-out questions", out=str(tmp_path / "s"),
    )  # fmt: skip
    folder = sweep.run(settings).parent
    told = [(folder / name).read_text() for name in ("report.md", "points.json")]
    assert "come from 10 held-out questions" in told[0]
    assert "- prompt: plain\n" in told[0]
    sweep.redo(folder)
    assert [(folder / name).read_text() for name in ("report.md", "points.json")] == told
    for left in folder.glob("rows.sqlite*"):
        left.unlink()
    sweep.redo(folder)
    assert [(folder / name).read_text() for name in ("report.md", "points.json")] == told


def test_a_report_reads_its_data_where_the_sweep_did(tmp_path: Path, command: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """It knew no --data-dir: the finished sweep of a folder of data was looked for on the hub, and its one line named --data-dir."""
    monkeypatch.delenv("COTVALVE_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "data" / "gsm8k").mkdir(parents=True)
    (tmp_path / "data" / "gsm8k" / "test.jsonl").write_text('{"question": "2 + 3?", "answer": "so #### 5"}\n')
    where = ("--data-dir", str(tmp_path / "data"))
    line = ("sweep", "--data", "gsm8k", "--prompt", "plain", "--max-new-tokens", "4", "--out", str(tmp_path / "s"))
    assert command(*line, *where)[0] == 0
    (tmp_path / "s" / "report.html").unlink()
    code, said = command("report", str(tmp_path / "s"), *where)
    assert (code, said) == (0, "")
    assert (tmp_path / "s" / "report.html").exists()


def test_a_report_of_a_data_set_that_changed_since_is_refused(tmp_path: Path) -> None:
    """Its page showed the new question above the old one's chains, and a file with a row more was a sweep that had not ended."""
    data = tmp_path / "mine.jsonl"
    data.write_text('{"question": "2 + 3?", "answer": "5"}\n')
    folder = sweep.run(sweep.SweepSettings(model="tiny-reasoner", data=str(data), prompt="plain", max_new_tokens=4, out=str(tmp_path / "s"))).parent
    page = (folder / "report.html").read_text()
    for changed in ('{"question": "2 + 4?", "answer": "6"}\n', data.read_text() + '{"question": "2 + 4?", "answer": "6"}\n'):
        data.write_text(changed)
        with pytest.raises(DataError, match=r"s: holds a run on another data set of the same name .* put the data set back as it was"):
            sweep.redo(folder)
    assert (folder / "report.html").read_text() == page


def test_a_baseline_that_is_named_twice_is_run_and_counted_once(tmp_path: Path) -> None:
    """It was sampled once and counted twice: `report` took the finished sweep for a stopped one."""
    settings = sweep.SweepSettings(
        model="tiny-reasoner", data="arithmetic", prompt="plain", limit=2, max_new_tokens=4, baselines="budget,budget", budgets="50,50", out=str(tmp_path / "s"),
    )  # fmt: skip
    assert [other.name for other in sweep.baselines_of(settings)] == ["prompt: budget 50"]
    sweep.redo(sweep.run(settings).parent)


def test_a_sweep_that_has_not_ended_is_not_drawn(tmp_path: Path) -> None:
    """Short chains end first: their table would flatter, and be taken for a finished sweep's."""
    settings = sweep.SweepSettings(
        model="tiny-reasoner", direction="tiny-valve", data="arithmetic", prompt="plain", limit=4, alphas="0,1", max_new_tokens=40, slots=2, out=str(tmp_path / "s"),
    )  # fmt: skip

    class Stopped(Exception):
        pass

    def stop(_task: str, done: int, _total: int, _note: str = "") -> None:
        if done >= 4:
            raise Stopped

    with pytest.raises(Stopped):
        sweep.run(settings, stop)
    with pytest.raises(DataError, match=r"s: \d of 8 chains are there; give the sweep's command again to finish it"):
        sweep.redo(tmp_path / "s")
    assert not (tmp_path / "s" / "points.json").exists()
    sweep.run(settings)
    sweep.redo(tmp_path / "s")


def test_a_report_keeps_out_of_a_folder_that_a_sweep_is_at_work_in(tmp_path: Path) -> None:
    """It wrote the files that the sweep's own end writes: whoever came second found its half of rows.parquet gone, as a FileNotFoundError."""
    settings = sweep.SweepSettings(
        model="tiny-reasoner", data="arithmetic", prompt="plain", limit=2, max_new_tokens=4, out=str(tmp_path / "s"),
    )  # fmt: skip
    folder = sweep.run(settings).parent
    found = read_json(folder / "run.json")
    with Run(folder, "sweep", found["settings"]), pytest.raises(DataError, match="s: another process is at work in it; wait until it is done"):
        sweep.redo(folder)
    sweep.redo(folder)
    sweep.redo(folder)


@pytest.mark.parametrize("text", ['{"lr": 0.1}', "{}", "[1]", '{"verb": "sweep"}'])
def test_another_programs_run_json_is_told_in_one_line_and_kept(tmp_path: Path, text: str) -> None:
    """It was a KeyError or a TypeError, and where nothing else stood in the folder a run wrote over it."""
    (tmp_path / "run.json").write_text(text)
    for act in (lambda: sweep.redo(tmp_path), lambda: calibrate.run(calibrate.CalibrateSettings(direction="tiny-valve", data="arithmetic", sweep=str(tmp_path), out=str(tmp_path / "c"))),
                lambda: Run(tmp_path, "sweep", {})):  # fmt: skip
        with pytest.raises(DataError, match="not a run folder"):
            act()
    assert (tmp_path / "run.json").read_text() == text
    assert calibrate._trained_here(tmp_path) is False


def test_a_file_where_a_folder_belongs_is_told_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(DataError, match=r"file/run\.json: no such file"):
        sweep.redo(file)
    for act in (lambda: extract(ExtractSettings(base="tiny", reasoner="tiny-reasoner", out=str(file))),
                lambda: fuse(FuseSettings(model="tiny-reasoner", direction="tiny-valve", out=str(file)))):  # fmt: skip
        with pytest.raises(DataError, match="file: a file, not a folder; name another --out"):
            act()
    (tmp_path / "dir.jsonl").mkdir()
    with pytest.raises(DataError, match=r"dir\.jsonl: no such file"):
        sweep.run(sweep.SweepSettings(model="tiny-reasoner", data=str(tmp_path / "dir.jsonl"), out=str(tmp_path / "s")))


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_no_model_is_fused_at_what_is_no_position(tmp_path: Path, alpha: float) -> None:
    """It is told before a model is loaded."""
    with pytest.raises(SettingError, match=r"setting 'alpha': .* a finite number"):
        FuseSettings(model="tiny-reasoner", direction="tiny-valve", alpha=alpha, out=str(tmp_path / "fused"))
    with pytest.raises(SettingError, match="is not a finite number"):
        Valve.load("tiny-reasoner", "tiny-valve").fuse(alpha)


def test_no_model_is_fused_at_what_fp32_cannot_hold() -> None:
    with pytest.raises(SettingError, match=r"alpha 1e\+39 is not a finite number"):
        Valve.load("tiny-reasoner", "tiny-valve").fuse(1e39)


@pytest.mark.parametrize("how", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 2.0}, {"seed": -1}])
def test_numbers_that_no_chain_can_be_sampled_with_are_refused(how: dict[str, float]) -> None:
    with pytest.raises(SettingError, match=r"(temperature|max_new_tokens) has to be .*\(given: "):
        Valve.load("tiny-reasoner").generate("1 + 1?", **how)  # pyright: ignore[reportArgumentType]


def test_a_report_of_another_verbs_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"verb": "train", "settings": {}, "facts": {}}')
    with pytest.raises(DataError, match="holds a run of 'train', not 'sweep'"):
        sweep.redo(tmp_path)
