"""Recipes are read and refused before anything runs; steps run once."""

import shutil
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import yaml

from cotvalve import pipeline
from cotvalve.errors import DataError, SettingError
from cotvalve.mixchain import MixSettings
from cotvalve.records import RowStore, read_json, write_json
from cotvalve.sweep import SweepSettings, named_directions
from cotvalve.train import TrainSettings
from cotvalve.verbs import ExtractSettings
from tests import models

GOOD = """
name: mine
about: a test
common: {model: some/model, data: gsm8k, rank: 4, seed: 3}
steps:
  valve: {verb: train, learning_rate: 1e-5, epochs: 2}
  mix: {verb: mix, direction: $valve, alphas: "0, .5, 1"}
  mix-z: {verb: mix, model: other/model, alphas: [0, 1]}
  plus: {verb: train, recipe: plus, data: $mix}
  plus-z: {verb: train, recipe: plus, data: $mix-z}
  sweep: {verb: sweep, direction: "A=$valve,B=$plus-z/checkpoint"}
"""


def write(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def read(folder: Path, text: str = GOOD, **changed: str) -> dict[str, object]:
    return {step.name: step.settings for step in pipeline.read(write(folder, text), **changed).steps}


def refused(folder: Path, text: str, kind: type[Exception] = SettingError) -> str:
    with pytest.raises(kind) as error:
        pipeline.read(write(folder, text))
    said = str(error.value)
    assert said.startswith(str(folder / "recipe.yaml"))
    assert "\n" not in said
    return said.removeprefix(f"{folder / 'recipe.yaml'}: ")


def test_a_sweep_finds_its_directions_whatever_the_folder_is_called(tmp_path: Path) -> None:
    """'A=runs/lr=1e-4/valve' was the folder '1e-4/valve' called 'A=runs/lr', which was told after the training."""
    swept = read(tmp_path, out=str(tmp_path / "lr=1e-4"))["sweep"]
    assert isinstance(swept, SweepSettings)
    assert named_directions(swept.direction) == {"A": f"{tmp_path}/lr=1e-4/valve", "B": f"{tmp_path}/lr=1e-4/plus-z/checkpoint"}
    assert named_directions("runs/lr=1e-4,lr=2=runs/b,mine,here=d/") == {"lr=1e-4": "runs/lr=1e-4", "lr=2": "runs/b", "mine": "mine", "here": "d/"}
    with pytest.raises(SettingError, match=r"in 'runs/1,5/mine', and a comma parts the directions of a sweep; name another --out"):
        read(tmp_path, out="runs/1,5/mine")


def test_common_fields_reach_the_steps_that_have_them_and_a_step_s_own_win(tmp_path: Path) -> None:
    steps = read(tmp_path)
    valve, mix, other = steps["valve"], steps["mix"], steps["mix-z"]
    assert isinstance(valve, TrainSettings)
    assert isinstance(mix, MixSettings)
    assert isinstance(other, MixSettings)
    assert (valve.model, valve.data, valve.rank, valve.seed, valve.epochs) == ("some/model", "gsm8k", 4, 3, 2)
    assert (mix.model, mix.data, mix.seed) == ("some/model", "gsm8k", 3)
    assert other.model == "other/model"


def test_numbers_as_people_write_them(tmp_path: Path) -> None:
    """PyYAML reads 1e-5 (without a dot) as text; a recipe must not care."""
    steps = read(tmp_path)
    valve, mix = steps["valve"], steps["mix"]
    assert isinstance(valve, TrainSettings)
    assert isinstance(mix, MixSettings)
    assert valve.learning_rate == 1e-5
    assert mix.alphas == (0.0, 0.5, 1.0)


def test_references_become_folders_by_their_whole_name(tmp_path: Path) -> None:
    """`$mix-z` starts with `$mix`; reading only the start would give `.../mix-z` by luck and `.../plus` by mistake."""
    steps = read(tmp_path, out="runs/here")
    plus, plus_z, sweep = steps["plus"], steps["plus-z"], steps["sweep"]
    assert isinstance(plus, TrainSettings)
    assert isinstance(plus_z, TrainSettings)
    assert isinstance(sweep, SweepSettings)
    assert (plus.data, plus_z.data) == ("runs/here/mix", "runs/here/mix-z")
    assert sweep.direction == "A=runs/here/valve,B=runs/here/plus-z/checkpoint"
    assert sweep.out == "runs/here/sweep"


def test_model_is_that_of_common_or_the_one_given_instead(tmp_path: Path) -> None:
    """`base` of an extract is no `model`, so --model alone would leave the recipe's own base in its place."""
    pair = "  pair: {verb: extract, base: $model, reasoner: $valve}\n"
    for given, base in ((None, "some/model"), ("third/model", "third/model")):
        found = read(tmp_path, GOOD + pair, **({"model": given} if given else {}))["pair"]
        assert isinstance(found, ExtractSettings)
        assert (found.base, found.reasoner) == (base, "runs/mine/valve")
    # A step of that name goes first, and without a model in common there is none.
    named = read(tmp_path, GOOD.replace("valve: {verb: train", "model: {verb: train").replace("$valve", "$model") + "  pair: {verb: extract, base: $model, reasoner: $mix}\n")
    assert isinstance(named["pair"], ExtractSettings)
    assert named["pair"].base == "runs/mine/model"
    assert "unknown step 'model'" in refused(tmp_path, "steps: {pair: {verb: extract, base: $model, reasoner: b}}")


def test_arguments_replace_the_recipe_s_own(tmp_path: Path) -> None:
    assert pipeline.read(write(tmp_path, GOOD)).out == Path("runs/mine")
    steps = read(tmp_path, model="third/model", data_dir="sets", out="elsewhere")
    valve, other = steps["valve"], steps["mix-z"]
    assert isinstance(valve, TrainSettings)
    assert isinstance(other, MixSettings)
    assert (valve.model, valve.data_dir, valve.out) == ("third/model", "sets", "elsewhere/valve")
    assert other.model == "other/model"
    told = write(tmp_path, f"out: runs/told\n{GOOD}")
    assert (pipeline.read(told).out, pipeline.read(told, out="elsewhere").out) == (Path("runs/told"), Path("elsewhere"))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("about:", "abuot:", "unknown field 'abuot': did you mean 'about'? Known: about, common, name, out, sizes, steps"),
        ("verb: sweep", "verb: swep", "step 'sweep': unknown verb 'swep': did you mean 'sweep'?"),
        ("epochs: 2", "epoch: 2", "step 'valve': unknown setting 'epoch': did you mean 'epochs'?"),
        ("rank: 4", "rnak: 4", "common: unknown setting 'rnak': did you mean 'rank'?"),
        ("data: $mix}", "data: $mixx}", "step 'plus': unknown step 'mixx': did you mean 'mix'? Known: mix, mix-z, valve"),
        ("direction: $valve", "direction: $plus", "step 'mix': unknown step 'plus': Known: valve"),
        ("direction: $valve", "direction: $mix", "step 'mix': unknown step 'mix': Known: valve"),
        ("direction: $valve", "direction: $", "step 'mix': unknown step '': Known: valve"),
        ("epochs: 2", "epochs: many", "step 'valve': setting 'epochs': Input should be a valid number"),
        ("epochs: 2", "epochs: 0", "step 'valve': setting 'epochs': Input should be greater than 0"),
        ('"0, .5, 1"', '"0, nan"', "step 'mix': setting 'alphas': 'nan' is not a finite number"),
        ("valve: {verb: train, ", "valve: {", "step 'valve': has no verb; expected verb: "),
        ("valve: {verb: train, learning_rate: 1e-5, epochs: 2}", "valve: 3", "step 'valve': has no verb"),
        # These were told when their step began, after the hours of those before it.
        ("verb: sweep", "verb: sweep, prompt: bxoed", "step 'sweep': unknown prompt 'bxoed': did you mean 'boxed'?"),
        ("epochs: 2", "epochs: 2, prompt: plian", "step 'valve': unknown prompt 'plian': did you mean 'plain'?"),
        ("verb: sweep", "verb: sweep, baselines: bugdet", "step 'sweep': unknown prompt 'bugdet': did you mean 'budget'?"),
        ("verb: sweep", "verb: sweep, baselines: budget, budgets: '50,-5'", "step 'sweep': budget '-5' is not a whole number of tokens"),
        ("verb: sweep", "verb: [sweep]", "step 'sweep': unknown verb '['sweep']': did you mean 'sweep'?"),
    ],
)
def test_what_is_refused_and_how(tmp_path: Path, old: str, new: str, says: str) -> None:
    assert GOOD.count(old) == 1
    assert refused(tmp_path, GOOD.replace(old, new)).startswith(says)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "a recipe needs `steps:`"),
        ("- 1", "a recipe needs `steps:`"),
        ("steps: []", "a recipe needs `steps:`"),
        ("steps: {}", "a recipe needs `steps:`"),
        ("common: 3\nsteps: {a: {verb: mix}}", "`common:` is int, expected names with values"),
        ("sizes: [1]\nsteps: {a: {verb: mix}}", "`sizes:` is list, expected names with values"),
        ("steps: {a: {verb: mix}", "not readable as YAML ("),
        # Of two steps of one name the first was gone without a word.
        ("steps:\n  a: {verb: mix}\n  b: {verb: sweep}\n  a: {verb: mix, seed: 2}", "not readable as YAML ('a' stands there twice in "),
        ("steps: {a: {verb: mix, seed: 1, seed: 2}}", "not readable as YAML ('seed' stands there twice in "),
    ],
)
def test_what_is_no_recipe(tmp_path: Path, text: str, says: str) -> None:
    assert refused(tmp_path, text, DataError).startswith(says)


def test_a_recipe_that_is_no_text_is_told_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"name: \xff")
    with pytest.raises(DataError, match=r"bytes\.yaml: not readable as YAML \('utf-8' codec"):
        pipeline.read(str(tmp_path / "bytes.yaml"))
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(SettingError, match=r"unknown recipe '.*folder\.yaml'"):
        pipeline.read(str(tmp_path / "folder.yaml"))
    (tmp_path / "merged.yaml").write_text("steps:\n  a: &a {verb: mix, seed: 1}\n  b: {<<: *a, seed: 2}\n")
    assert [getattr(step.settings, "seed") for step in pipeline.read(str(tmp_path / "merged.yaml")).steps] == [1, 2]  # noqa: B009


def test_recipes_are_found_by_name_and_the_nearest_one_is_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny").write_text("a file of that name is no recipe")
    monkeypatch.chdir(tmp_path)
    assert pipeline.read("tiny").name == "tiny"
    assert pipeline.read("recipes/tiny.yaml").name == "tiny"
    assert pipeline.recipe_path("qwq-32b-preview").name == "qwq-32b-preview.yaml"
    with pytest.raises(SettingError, match=r"unknown recipe 'qwq-32b': did you mean 'qwq-32b-preview'\?"):
        pipeline.read("qwq-32b")
    with pytest.raises(SettingError, match=r"unknown recipe 'nowhere/tiny\.yaml': .*, or a path to a \.yaml file that is there"):
        pipeline.read("nowhere/tiny.yaml")


def test_a_finished_step_is_passed_over_and_another_run_s_folder_is_refused(tmp_path: Path) -> None:
    base = models.qwen2()
    models.save(base, tmp_path / "base")
    models.save(models.moved(base), tmp_path / "reasoner")
    text = f"""
common: {{base: {tmp_path}/base, reasoner: {tmp_path}/reasoner}}
steps:
  exact: {{verb: extract}}
  low: {{verb: extract, rank: 4}}
"""
    recipe = pipeline.read(write(tmp_path, text), out=str(tmp_path / "out"))
    assert all(isinstance(step.settings, ExtractSettings) for step in recipe.steps)
    told: list[str] = []

    def progress(task: str, done: int, total: int, note: str = "") -> None:
        assert 0 <= done <= total, note
        told.append(task)

    ran = dict(pipeline.run(recipe, progress))
    assert ran == {name: tmp_path / "out" / name for name in ("exact", "low")}
    assert set(told) == {"low: extract"}
    assert read_json(ran["low"] / "extraction.json")["rank"] == 4

    told.clear()
    assert dict(pipeline.run(recipe, progress)) == ran
    assert told == []
    # Another rank into the same folder would mix two runs: refused, nothing is overwritten.
    changed = pipeline.read(write(tmp_path, text.replace("rank: 4", "rank: 2")), out=str(tmp_path / "out"))
    with pytest.raises(DataError, match="not empty"):
        dict(pipeline.run(changed))
    assert read_json(ran["low"] / "extraction.json")["rank"] == 4


SHRUNK: dict[str, dict[str, Any]] = {
    "valve": {"limit": 4, "epochs": 2},
    "mix": {"limit": 6},
    "plus": {"epochs": 1},
    "sweep": {"limit": 3, "split": "validation", "alphas": "0, 0.5, 1", "max_new_tokens": 60},
}
"""What makes the demo's recipe small; everything else is as it stands in recipes/tiny.yaml."""


def shrunk(folder: Path) -> str:
    recipe = yaml.safe_load(pipeline.recipe_path("tiny").read_text(encoding="utf-8"))
    recipe["common"] |= {"device": "cpu", "max_new_tokens": 300}
    for name, smaller in SHRUNK.items():
        recipe["steps"][name] |= smaller
    return write(folder, yaml.safe_dump(recipe, sort_keys=False))


def rows(folder: Path) -> list[dict[str, Any]]:
    with closing(RowStore(folder / "rows.sqlite")) as store:
        return store.rows()


def test_the_demo_s_recipe_runs_whole_and_goes_on(tmp_path: Path) -> None:
    """Stopped after two of its steps, run to its end, and once more with a step's record lost."""
    recipe = pipeline.read(shrunk(tmp_path), out=str(tmp_path / "out"), seed=0)
    names = [step.name for step in recipe.steps]
    assert set(SHRUNK) <= set(names)
    told: list[str] = []

    def progress(task: str, done: int, total: int, note: str = "") -> None:
        assert 0 <= done <= total, note
        told.append(task.partition(":")[0])

    begun = dict(islice(pipeline.run(recipe, progress), 2))
    assert list(begun) == names[:2] == ["valve", "mix"]
    assert not (tmp_path / "out" / names[2]).exists()
    sampled = rows(begun["mix"])
    mixed = next(step.settings for step in recipe.steps if step.name == "mix")
    assert isinstance(mixed, MixSettings)
    assert len(sampled) == 6 * len(mixed.alphas) * mixed.samples

    told.clear()
    made = dict(pipeline.run(recipe, progress))
    assert list(made) == names
    assert set(told).isdisjoint(begun), "finished steps are passed over"
    assert rows(begun["mix"]) == sampled
    for name in names:
        assert read_json(tmp_path / "out" / name / "run.json")["settings"]
    report = tmp_path / "out" / "sweep" / "report.html"
    assert made["sweep"] == report
    assert "<svg" in report.read_text(encoding="utf-8")
    assert "CoT-Valve++" in report.with_suffix(".md").read_text(encoding="utf-8")
    assert {row["problem"].split("/")[1] for row in rows(tmp_path / "out" / "sweep")} == {"validation"}

    # As if the process had been killed between a step's last row and the note that it is done.
    record = tmp_path / "out" / "steps.json"
    done = read_json(record)
    del done["mix"]
    write_json(record, done)
    # Marked, because rows sampled again with the same seed would look the same.
    stamped = [{**row, "text": f"{row['text']} (kept)"} for row in sampled]
    with closing(RowStore(begun["mix"] / "rows.sqlite")) as store:
        keys = sorted(store.keys())
    (begun["mix"] / "rows.sqlite").unlink()
    with closing(RowStore(begun["mix"] / "rows.sqlite")) as store:
        for key, row in zip(keys, stamped, strict=True):
            store.add(key, row)
    told.clear()
    assert dict(pipeline.run(recipe, progress)) == made
    assert rows(begun["mix"]) == stamped
    assert set(told) <= {"mix"}
    assert set(read_json(record)) == set(names)




def test_a_step_whose_input_was_made_anew_is_not_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "two.yaml"

    def go(rank: int) -> dict[str, Path]:
        file.write_text(f"name: two\nsteps:\n  pair: {{verb: extract, base: tiny, reasoner: tiny-reasoner, rank: {rank}}}\n"
                        "  plain: {verb: fuse, model: tiny, direction: $pair, alpha: 1}\n")  # fmt: skip
        return dict(pipeline.run(pipeline.read(str(file), out=str(tmp_path / "out"))))

    made = go(2)
    before = (made["plain"] / "model.safetensors").read_bytes()
    shutil.rmtree(made["pair"])
    assert go(2) == made, "what needs it is there, so it is not made again"
    assert not made["pair"].exists()
    with pytest.raises(DataError, match="out/plain: was made from another 'pair', which was made anew or changed; remove this folder"):
        go(4)
    # A record from before steps had ids says nothing of its input.
    record = tmp_path / "out" / "steps.json"
    noted = read_json(record)
    write_json(record, {**noted, "plain": {**noted["plain"], "inputs": {"pair": ""}}})
    assert go(4) == made
    write_json(record, noted)
    shutil.rmtree(made["plain"])
    assert (go(4)["plain"] / "model.safetensors").read_bytes() != before


def test_a_step_that_is_made_anew_and_stopped_is_not_done(tmp_path: Path) -> None:
    """Its folder was there again, and the old record still said that it was done."""
    recipe = pipeline.read(write(tmp_path, """
common: {model: tiny, data: arithmetic, prompt: plain, device: cpu, limit: 3}
steps:
  mix: {verb: mix, alphas: [0], fewest: 1, max_new_tokens: 100}
  valve: {verb: train, recipe: valve, data: $mix, batch: 2}
"""), out=str(tmp_path / "out"))  # fmt: skip

    def stopping(task: str, *_: object) -> None:
        if task.startswith("mix"):
            raise KeyboardInterrupt

    def ids() -> dict[str, str]:
        return {name: step["id"] for name, step in read_json(tmp_path / "out" / "steps.json").items()}

    with pytest.raises(KeyboardInterrupt):
        dict(pipeline.run(recipe, stopping))
    begun = ids()
    assert begun["mix"], "stopped on its way, it has an id as well"
    made = dict(pipeline.run(recipe))
    before = ids()
    assert before["mix"] == begun["mix"], "gone on with, it is the same"
    shutil.rmtree(made["mix"])
    kept = shutil.move(made["valve"], tmp_path / "kept")
    with pytest.raises(KeyboardInterrupt):
        dict(pipeline.run(recipe, stopping))
    assert made["mix"].exists()
    assert dict(islice(pipeline.run(recipe), 1)) == {"mix": made["mix"]}
    assert (made["mix"] / "mixchain.parquet").exists()
    assert ids()["mix"] != before["mix"]
    shutil.move(kept, made["valve"])
    with pytest.raises(DataError, match="out/valve: was made from another 'mix'"):
        dict(pipeline.run(recipe))


def test_what_a_step_is_made_from_is_found_behind_a_space(tmp_path: Path) -> None:
    """`$plus` in "A=$valve, $plus" was no input: made anew, or gone, it was not told."""
    spaced = pipeline.read(write(tmp_path, GOOD.replace('"A=$valve,B=$plus-z/checkpoint"', '"A=$valve, $plus-z/checkpoint , mix"')))
    done = {step.name: {"id": step.name} for step in spaced.steps}
    inputs = {step.name: set(pipeline.inputs(spaced, step, done)) for step in spaced.steps}
    assert inputs == {"valve": set(), "mix": {"valve"}, "mix-z": set(), "plus": {"mix"}, "plus-z": {"mix-z"}, "sweep": {"valve", "plus-z"}}


def test_a_step_whose_file_changed_is_not_passed_over(tmp_path: Path) -> None:
    """A finished step's folder is not opened, so that its own check of the data's hash is not reached."""
    data = tmp_path / "mine.jsonl"
    one = '{"question": "1 + 1?", "answer": "2", "solution": "1 + 1 = 2"}\n'
    data.write_text(one, encoding="utf-8")
    recipe = pipeline.read(write(tmp_path, f"steps: {{valve: {{verb: train, model: tiny, device: cpu, data: {data}}}}}"), out=str(tmp_path / "out"))
    made = dict(pipeline.run(recipe))
    assert dict(pipeline.run(recipe)) == made
    data.write_text(one.replace("1", "2").replace('"2"', '"4"'), encoding="utf-8")
    with pytest.raises(DataError, match=r"out/valve: was made from another '.*mine\.jsonl', which was made anew or changed"):
        dict(pipeline.run(recipe))
    data.write_text(one, encoding="utf-8")
    assert dict(pipeline.run(recipe)) == made
    data.unlink()
    assert dict(pipeline.run(recipe)) == made, "finished work does not need it"
