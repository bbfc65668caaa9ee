"""Settings: typed, frozen, an unknown field named with its nearest; the same at the command line, in one line."""

from collections.abc import Callable
from pathlib import Path
from typing import get_type_hints

import pytest
from pydantic import ValidationError

from cotvalve.calibrate import CalibrateSettings
from cotvalve.errors import CotvalveError, SettingError, unknown
from cotvalve.fitting import FitSettings
from cotvalve.mixchain import MixSettings, Sampling
from cotvalve.pipeline import VERBS
from cotvalve.records import Run
from cotvalve.serve import ServeSettings
from cotvalve.settings import Alphas, ModelSettings, Settings
from cotvalve.sweep import SweepSettings
from cotvalve.train import TrainSettings
from cotvalve.verbs import FuseSettings, fuse
from tests import models

CLASSES = [verb.settings() for verb in VERBS.values()]


class Sample(Settings):
    """For these tests."""

    alphas: Alphas = (0.0, 1.0)
    """Positions."""
    limit: int | None = None
    """A number."""
    out: str = "runs/sample"
    """A folder."""

    def model_post_init(self, context: object, /) -> None:  # noqa: ARG002
        if self.limit == 13:
            raise ValueError("limit cannot be 13")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("0,0.5,1", (0.0, 0.5, 1.0)),
        ("0 0.5  1", (0.0, 0.5, 1.0)),
        ("-1, 2.5", (-1.0, 2.5)),
        ([0, "0.5", 1], (0.0, 0.5, 1.0)),
        (0.3, (0.3,)),
        (1, (1.0,)),
        ("1e-1", (0.1,)),
        ("-0", (0.0,)),
    ],
)
def test_alphas_in_any_spelling(given: object, expected: tuple[float, ...]) -> None:
    assert repr(Sample(alphas=given).alphas) == repr(expected)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("0,half,1", "'half' is not a number; write alphas like 0,0.25,0.5,1"),
        ("0,nan", "'nan' is not a finite number"),
        ("inf", "'inf' is not a finite number"),
        ([0.5, None], "'None' is not a number"),
        ("", "no alpha was given"),
        ("0,1,1.0", "alpha 1 is given twice"),
        ("0,-0", "alpha 0 is given twice"),
        (" , ", "no alpha was given"),
        ([], "no alpha was given"),
    ],
)
def test_an_alpha_that_is_not_a_number(given: object, says: str) -> None:
    with pytest.raises(SettingError, match=says) as failed:
        Sample(alphas=given)
    assert str(failed.value).startswith("setting 'alphas': ")


def test_an_unknown_field_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(SettingError, match=r"unknown setting 'limitt': did you mean 'limit'\? Known: alphas, limit, out"):
        Sample(limitt=3)
    with pytest.raises(SettingError, match="did you mean 'learning_rate'"):
        TrainSettings.read({"learning-rat": 1e-4})
    with pytest.raises(SettingError, match="unknown setting 'zzz': Known"):
        Sample(zzz=3)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"limit": "many"}, r"setting 'limit': .*integer.*given: 'many'"),
        ({"limit": 1.5}, r"setting 'limit': .*integer.*1\.5"),
        ({"out": None}, r"setting 'out': .*string"),
        ({"limit": 13}, "limit cannot be 13"),
    ],
)
def test_a_value_of_another_type_is_one_line_with_the_value(values: dict[str, object], says: str) -> None:
    with pytest.raises(SettingError, match=says) as failed:
        Sample(**values)
    assert "\n" not in str(failed.value)


def test_settings_are_frozen_and_changed_by_copy() -> None:
    one = Sample(limit=3)
    with pytest.raises(ValidationError, match="frozen"):
        one.limit = 4  # pyright: ignore[reportAttributeAccessIssue]
    other = one.but(alphas="0.5")
    assert (other.limit, other.alphas, one.alphas) == (3, (0.5,), (0.0, 1.0))
    with pytest.raises(SettingError, match="cannot be 13"):
        one.but(limit=13)
    with pytest.raises(SettingError, match="did you mean 'limit'"):
        one.but(limti=3)


def test_dashes_are_taken_for_underscores() -> None:
    assert MixSettings.read({"max-new-tokens": 5, "top_p": 0.5}).max_new_tokens == 5


def test_text_from_a_shell_is_read_as_its_type() -> None:
    made = TrainSettings.read({"learning-rate": "1e-3", "rank": "8", "dora": "true", "limit": "100", "modules": "q_proj"})
    assert (made.learning_rate, made.rank, made.dora, made.limit, made.modules) == (1e-3, 8, True, 100, "q_proj")


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_field_says_what_it_is(cls: type[Settings]) -> None:
    """The string under a field is its help at the command line."""
    silent = [name for name, info in cls.model_fields.items() if not (info.description or "").strip()]
    assert silent == []


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_defaults_are_valid(cls: type[Settings]) -> None:
    needed = {name: "x" for name, info in cls.model_fields.items() if info.is_required()}
    made = cls(**needed)
    assert cls.read(made.model_dump(mode="json")) == made, "a run folder's settings can be read again"


def test_flags_mean_the_same_everywhere() -> None:
    """--model --direction --data --data-dir --alphas --engine --out --seed: one type each, in every verb that has them."""
    for name in ("model", "data", "data_dir", "alphas", "engine", "out", "seed", "limit", "dtype", "device"):
        types = {str(get_type_hints(cls, include_extras=True)[name]) for cls in CLASSES if name in cls.model_fields}
        assert len(types) == 1, (name, types)
    assert issubclass(MixSettings, Sampling)
    assert issubclass(SweepSettings, ModelSettings)


@pytest.mark.parametrize(
    ("cls", "values", "says"),
    [
        (MixSettings, {"samples": 0}, "1 or more"),
        (MixSettings, {"samples": 2, "temperature": 0}, "give a temperature"),
        (SweepSettings, {"max_new_tokens": 0}, "1 or more"),
        (SweepSettings, {"temperature": -1}, "temperature"),
        (SweepSettings, {"top_p": 1.5}, "top_p"),
        (SweepSettings, {"top_p": -0.1}, "top_p"),
        (SweepSettings, {"temperature": float("nan")}, "temperature.*greater than or equal to 0|temperature.*finite"),
        (SweepSettings, {"slots": 0}, "slots.*greater than or equal to 1"),
        (CalibrateSettings, {"tolerance": float("nan")}, "tolerance"),
        (ServeSettings, {"temperature": -1}, "temperature"),
        (ServeSettings, {"top_p": -3}, "top_p"),
        (ServeSettings, {"slots": 0}, "slots"),
        (SweepSettings, {"alphas": "0.3333333,0.33333334"}, "alpha 0.333333 is given twice"),
        (FitSettings, {"rank": 0}, "rank.*greater than or equal to 1"),
        (FitSettings, {"dropout": 1.5}, "dropout.*less than 1"),
        (FitSettings, {"learning_rate": float("nan")}, "learning_rate.*finite"),
        (FitSettings, {"warmup": 1.5}, "warmup.*less than 1"),
        (FitSettings, {"micro_batch": 0}, "micro_batch.*greater than or equal to 1"),
        (FitSettings, {"seed": -1}, "seed.*greater than or equal to 0"),
        (TrainSettings, {"direction": "runs/plus", "full": True}, "leave direction out"),
        (TrainSettings, {"recipe": "reward", "dropout": 0.1}, "without dropout"),
        (TrainSettings, {"prompt": "budget"}, "asks for a token budget"),
        (SweepSettings, {"prompt": "plain", "budget": 50}, "the prompt 'plain' names no token budget; leave budget out"),
        *((cls, {"prompt": "budget-qwq"}, "the prompt 'budget-qwq' needs a token budget; give budget, for example 100") for cls in (MixSettings, SweepSettings, CalibrateSettings)),
        *((verb.settings(), {"limit": limit}, "setting 'limit': Input should be greater than or equal to 1") for verb in VERBS.values() if "limit" in verb.settings().model_fields for limit in (0, -5)),
        (SweepSettings, {"prompt": "budget", "budget": 0}, "setting 'budget': Input should be greater than or equal to 1"),
        (FitSettings, {"batch": 0}, "batch.*greater than or equal to 1"),
        (FitSettings, {"epochs": 0}, "epochs.*greater than 0"),
        (FitSettings, {"dora": True, "full": True}, "exclude each other"),
        (FitSettings, {"schedule": "cosin"}, "cosine"),
        (TrainSettings, {"recipe": "pluss"}, "'plus'"),
        (TrainSettings, {"toward": "shortr"}, "'shorter'"),
    ],
)
def test_values_that_make_no_sense(cls: type[Settings], values: dict[str, object], says: str) -> None:
    with pytest.raises(SettingError, match=says):
        cls(**values)


def test_unknown_lists_what_is_known_and_offers_only_what_is_near() -> None:
    assert unknown("data set", "gsm8", ["gsm8k", "math500"]).startswith("unknown data set 'gsm8': did you mean 'gsm8k'?")
    assert "did you mean" not in unknown("data set", "qqqq", ["gsm8k", "math500"])


# The same, at the command line: one line, exit code 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["mix", "--alphas", "0,half"], "setting 'alphas': 'half' is not a number"),
        (["mix", "--data", "gsm8"], "unknown data set 'gsm8': did you mean 'gsm8k'?"),
        (["mix", "--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["mix", "--data", "arithmetic", "--limit", "0"], "setting 'limit': Input should be greater than or equal to 1"),
        (["mix", "--data", "arithmetic", "--prompt", "boxd"], "unknown prompt 'boxd': did you mean 'boxed'?"),
        (["mix", "--data", "arithmetic", "--engine", "vlm"], "unknown engine 'vlm'"),
        (["mix", "--data", "arithmetic", "--model", "tiny-reasonr"], "'tiny-reasonr'"),
        (["sweep", "--data", "arithmetic", "--split", "tset"], "unknown split of arithmetic 'tset': did you mean 'test'?"),
        (["sweep", "--data", "arithmetic", "--direction", "nowhere"], "'nowhere': no such folder"),
        (["sweep", "--data", "arithmetic", "--budgets", "50,few", "--baselines", "budget"], "'few' is not a whole number"),
        (["sweep", "--data", "arithmetic", "--budgets", "", "--baselines", "budget"], "the baseline 'budget' asks for a token budget and none is named"),
        (["train", "pluss"], "setting 'recipe'"),
        (["train", "plus", "--data", "arithmetic"], "recipe 'plus' needs several chains per question"),
        (["train", "valve", "--rank", "many"], "setting 'rank'"),
        (["mix", "--alpha", "0"], "--alpha"),
        (["fuse", "--direction", "tiny-valve", "--alpha", "half"], "setting 'alpha'"),
        (["sweep", "--data", "arithmetic", "--alphas", "0,nan"], "setting 'alphas': 'nan' is not a finite number"),
        (["swep"], "did you mean 'sweep'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_a_user_can_mend_is_one_line_and_exit_code_2(
    arguments: list[str], says: str, command: Callable[..., tuple[int, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, said = command(*arguments)
    line = [part for part in said.splitlines() if part.startswith("cotvalve: ")]
    assert (code, len(line)) == (2, 1), said
    assert says in line[0]
    assert said.splitlines()[-1] == line[0]
    assert "Traceback" not in said


def _files(folder: Path, name: str) -> None:
    """Puts the file or folder `name` of the table below into `folder`."""
    path = folder / name
    if name == "fused":
        base = models.save(models.qwen2(), folder / "base")
        models.lora(models.qwen2()).save_pretrained(str(folder / "adapter"))
        fuse(FuseSettings(model=str(base), direction=str(folder / "adapter"), device="cpu", out=str(path)))
    elif name == "truncated":
        weights = models.save(models.qwen2(), path) / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif name == "cut-in-its-header":
        weights = models.save(models.qwen2(), path) / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:100])
    elif name in ("base", "one-layer", "narrow"):
        models.save(models.qwen2(layers=1 if name == "one-layer" else 2, hidden=16 if name == "narrow" else 32), path)
    elif name == "adapter":
        models.lora(models.qwen2()).save_pretrained(str(path))
    elif name == "other-verb":
        with Run(path, "train", {"rank": 4}) as at:
            at.rows.add("a", {})
    elif name == "other-alphas":
        with Run(path, "mix", {"alphas": [0.25]}) as at:
            at.rows.add("a", {})
    elif name == "someones":
        path.mkdir()
        (path / "thesis.txt").write_text("x")
    else:
        path.write_text(ROWS[name], encoding="utf-8")


ROWS = {
    "empty.jsonl": "",
    "broken.jsonl": '{"question": "2 + 3?", "answer": "5"}\n{"question": "2 + 4?", "answ\n',
    "no-answer.jsonl": '{"question": "2 + 3?", "answer": "5"}\n{"question": "2 + 4?"}\n',
    "list.jsonl": '{"question": "2 + 3?", "answer": "5"}\n[1, 2]\n',
    "many.jsonl": '{"question": "2 + 3?", "answer": "5"}\n{"question": "2 + 4?", "answer": "many", "kind": "number"}\n',
}
MIX = ["mix", "--data", "arithmetic", "--limit", "1", "--prompt", "plain", "--device", "cpu"]


@pytest.mark.parametrize(
    ("files", "arguments", "says"),
    [
        (["truncated"], [*MIX, "--model", "truncated"], "truncated: truncated or not safetensors"),
        (["cut-in-its-header"], [*MIX, "--model", "cut-in-its-header"], "cut-in-its-header: truncated or not safetensors"),
        ([], [*MIX, "--model", "./nowhere"], "'./nowhere': no such folder"),
        (["someones"], [*MIX, "--model", "someones"], "someones: no config.json in it"),
        (["adapter"], [*MIX, "--model", "adapter"], "adapter: is a direction, not a model"),
        (["one-layer", "adapter"], [*MIX, "--model", "one-layer", "--direction", "adapter"], "model.layers.1.mlp.down_proj"),
        (["narrow", "adapter"], [*MIX, "--model", "narrow", "--direction", "adapter"], "model.layers.0.mlp.down_proj"),
        (["fused"], [*MIX, "--model", "fused", "--direction", "adapter"], "was fused at alpha 1.0 and has no dial any more"),
        (["empty.jsonl"], ["mix", "--data", "empty.jsonl"], "empty.jsonl: no rows in it"),
        (["broken.jsonl"], ["mix", "--data", "broken.jsonl"], "broken.jsonl: row 2 is not JSON"),
        (["list.jsonl"], ["mix", "--data", "list.jsonl"], "list.jsonl: row 2 is list"),
        (["no-answer.jsonl"], ["mix", "--data", "no-answer.jsonl"], "no-answer.jsonl: row 2: no field 'answer'"),
        (["many.jsonl"], ["mix", "--data", "many.jsonl"], "many.jsonl: row 2: gold answer 'many' cannot be read as number"),
        (["base", "other-verb"], [*MIX, "--model", "base", "--out", "other-verb"], "other-verb: holds a run of 'train', not 'mix'"),
        (["base", "other-alphas"], [*MIX, "--model", "base", "--out", "other-alphas"], "other-alphas: holds a run with alphas=[0.25]"),
        (["base", "someones"], [*MIX, "--model", "base", "--out", "someones"], "someones: not empty and not a run folder"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, list) and "--data" not in value else "",
)
def test_what_is_wrong_with_a_file_is_one_line_and_exit_code_2(
    files: list[str],
    arguments: list[str],
    says: str,
    command: Callable[..., tuple[int, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in files:
        _files(tmp_path, name)
    test_what_a_user_can_mend_is_one_line_and_exit_code_2(arguments, says, command, tmp_path, monkeypatch)


def test_a_bug_keeps_its_traceback(command: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the four errors are the user's."""

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("cotvalve.mixchain.run", broken)
    with pytest.raises(ZeroDivisionError):
        command("mix")
    assert not issubclass(ZeroDivisionError, CotvalveError)
