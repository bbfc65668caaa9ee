"""The verbs by name, and recipes: a YAML file of steps, each a verb with its settings.

    name: tiny
    common: {model: tiny-reasoner, data: arithmetic}
    steps:
      valve: {verb: train, recipe: valve}
      mix:   {verb: mix, direction: $valve}          # $valve is the folder of the step called valve
      plus:  {verb: train, recipe: plus, data: $mix}

Steps run in their order, each in its own run folder under the recipe's `out`; the same command goes on where
it stopped. A recipe's fields are the flags of its verbs.
"""

import importlib
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from cotvalve.errors import DataError, SettingError, unknown
from cotvalve.records import read_json, sha256, write_json
from cotvalve.settings import Settings
from cotvalve.types import Progress, silent, within


@dataclass(frozen=True, slots=True)
class Verb:
    """A command: the module that has its settings class and its `run`."""

    module: str
    class_name: str
    help: str
    arguments: tuple[str, ...] = ()
    """Settings given by position at the command line."""
    function: str = "run"
    example: str = ""
    """A command as someone would type it, and what comes next: the last lines of --help."""

    def settings(self) -> type[Settings]:
        """The verb's settings class."""
        return getattr(importlib.import_module(self.module), self.class_name)

    def run(self, settings: Any, progress: Progress = silent) -> Path:
        """Does the work; returns the folder or file it made."""
        return getattr(importlib.import_module(self.module), self.function)(settings, progress)


VERBS: dict[str, Verb] = {
    "extract": Verb(
        "cotvalve.verbs", "ExtractSettings", "A direction from two checkpoints: exact, or low rank with its energy.",
        ("base", "reasoner"), "extract",
        "cotvalve extract Qwen/Qwen2.5-Math-7B deepseek-ai/DeepSeek-R1-Distill-Qwen-7B --rank 64 --out runs/pair\n\nThen: cotvalve sweep --direction runs/pair",
    ),
    "train": Verb(
        "cotvalve.train", "TrainSettings", "Learn a direction: valve, plus (++), progressive (+P) or reward.", ("recipe",),
        example="cotvalve train valve --model MODEL --data gsm8k --out runs/valve\n\nThen: cotvalve mix --direction runs/valve, and train plus --data runs/mix",
    ),
    "mix": Verb(
        "cotvalve.mixchain", "MixSettings", "MixChain data: sample over alphas, grade, keep what is right.",
        example="cotvalve mix --model MODEL --direction runs/valve --data gsm8k --out runs/mix\n\nThen: cotvalve train plus --data runs/mix",
    ),
    "reward": Verb(
        "cotvalve.rounds", "RewardSettings", "Sample and learn in turns: right and brief chains become likelier, wrong ones less so.",
        example="cotvalve reward --model MODEL --direction runs/progressive --data gsm8k --out runs/reward\n\nThen: cotvalve sweep --direction runs/reward --split heldout",
    ),
    "sweep": Verb(
        "cotvalve.sweep", "SweepSettings", "Accuracy, tokens and ACU over alphas, with baselines and intervals.",
        example="cotvalve sweep --model MODEL --direction CoT-Valve=runs/valve,++=runs/plus --data gsm8k --limit 400 --baselines budget,shortcut\n\nThen open report.html",
    ),
    "calibrate": Verb(
        "cotvalve.calibrate", "CalibrateSettings", "Alpha <-> tokens and the safe range, on held-out training questions.",
        example="cotvalve calibrate --model MODEL --direction runs/plus --data gsm8k\n\nThen: cotvalve serve --direction runs/plus, and ask for tokens or shorter",
    ),
    "fuse": Verb(
        "cotvalve.verbs", "FuseSettings", "A plain checkpoint at one alpha; it has no dial any more.", (), "fuse",
        "cotvalve fuse --model MODEL --direction runs/plus --alpha 0.5 --out runs/fused",
    ),
}  # fmt: skip
"""Everything that makes a run folder. The verbs are also the steps of a recipe."""


STEPS = "steps.json"
"""What a recipe's folder holds of its steps."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a recipe, its settings checked."""

    name: str
    verb: str
    settings: Settings


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe, read and checked."""

    name: str
    about: str
    out: Path
    steps: tuple[Step, ...]
    sizes: Mapping[str, Any]
    """For plans made without the models and the data at hand: `models`, `data` and `steps` (plan.py reads them)."""


class _EachOnce(yaml.SafeLoader):
    """YAML in which a name stands once: of two steps of one name the first would be gone without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names: set[str] = set()
        for key, _ in node.value:
            if key.value in names:
                raise yaml.MarkedYAMLError(problem=f"'{key.value}' stands there twice", problem_mark=key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                names.add(key.value)
        return super().construct_mapping(node, deep)


def recipe_path(name: str) -> Path:
    """The file of a recipe: a path, or the name of one that comes with the package."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    here = [Path(str(files("cotvalve") / "assets" / "recipes")), Path(__file__).parent.parent / "recipes"]
    known = {found.stem: found for folder in here if folder.is_dir() for found in sorted(folder.glob("*.yaml"))}
    if path.name.removesuffix(".yaml") in known and str(path.parent) in (".", "recipes"):
        return known[path.name.removesuffix(".yaml")]
    raise SettingError(unknown("recipe", name, known) + ", or a path to a .yaml file that is there")


def read(
    name: str, out: str | None = None, data_dir: str | None = None, model: str | None = None, seed: int | None = None
) -> Recipe:
    """A recipe with all settings checked before anything runs; the arguments replace its own fields."""
    path = recipe_path(name)
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _EachOnce)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(found, dict) or not isinstance(found.get("steps"), dict) or not found["steps"]:
        raise DataError(f"{path}: a recipe needs `steps:` with a verb in each; see recipes/tiny.yaml")
    for field in ("common", "sizes"):
        if not isinstance(found.get(field) or {}, dict):
            raise DataError(f"{path}: `{field}:` is {type(found[field]).__name__}, expected names with values")
    for field in found:
        if field not in ("name", "about", "out", "common", "steps", "sizes"):
            raise SettingError(f"{path}: {unknown('field', field, ['name', 'about', 'out', 'common', 'steps', 'sizes'])}")
    home = Path(out or found.get("out") or f"runs/{found.get('name') or path.stem}")
    if "," in str(home):
        raise SettingError(f"{path}: its steps would lie in '{home}', and a comma parts the directions of a sweep; name another --out")
    common = {**(found.get("common") or {}), **{k: v for k, v in (("data_dir", data_dir), ("model", model), ("seed", seed)) if v is not None}}
    folders: dict[str, Path] = {}
    base = str(common.get("model") or "")
    steps: list[Step] = []
    for step, fields in ((str(name), fields) for name, fields in found["steps"].items()):
        if not isinstance(fields, dict) or "verb" not in fields:
            raise SettingError(f"{path}: step '{step}': has no verb; expected verb: {' or '.join(VERBS)}")
        fields = dict(fields)
        verb = str(fields.pop("verb"))
        if verb not in VERBS:
            raise SettingError(f"{path}: step '{step}': {unknown('verb', verb, VERBS)}")
        cls = VERBS[verb].settings()
        for field in common:
            if not any(field in v.settings().model_fields for v in VERBS.values()):
                raise SettingError(f"{path}: common: {unknown('setting', field, {f for v in VERBS.values() for f in v.settings().model_fields})}")
        values = {**{k: v for k, v in common.items() if k in cls.model_fields}, **fields}
        folders[step] = home / step
        try:
            settings = cls.read({**{k: _filled(v, folders, step, base) for k, v in values.items()}, "out": str(folders[step])})
        except SettingError as error:
            raise SettingError(f"{path}: step '{step}': {error}") from None
        steps.append(Step(step, verb, settings))
    return Recipe(str(found.get("name") or path.stem), str(found.get("about") or ""), home, tuple(steps), found.get("sizes") or {})


def _filled(value: Any, folders: Mapping[str, Path], step: str, model: str) -> Any:
    """`$name` inside text becomes that earlier step's folder; `$model` the model that the steps have in common."""
    if not isinstance(value, str):
        return value

    def folder(match: re.Match[str]) -> str:
        if match[1] == "model" and model and "model" not in folders:
            return model
        if match[1] == step or match[1] not in folders:
            raise SettingError(unknown("step", match[1], [name for name in folders if name != step]))
        return str(folders[match[1]])

    # The whole word: `$mixx` must not be read as the folder of `mix` with an x behind it.
    return re.sub(r"\$([\w-]*)", folder, value)


def run(recipe: Recipe, progress: Progress = silent) -> Iterator[tuple[str, Path]]:
    """Runs the steps in order; yields (step, what it made). Finished steps are passed over.

    One whose folder is gone is made again where a step that is not finished needs it, or none at all does. A step whose
    input was made anew, or is a file that changed, has to be made anew as well: DataError names the folder to remove.
    """
    for step in recipe.steps:
        if not passed_over(recipe, step):
            begin(recipe, step)
            end(recipe, step, VERBS[step.verb].run(step.settings, within(step.name, progress)))
        yield step.name, Path(_record(recipe)[step.name]["made"])


def passed_over(recipe: Recipe, step: Step) -> bool:
    """Whether this step is done, as `run` tells it."""
    done = _record(recipe)

    def finished(step: Step) -> bool:
        return _as_now(done, step) and Path(done[step.name]["made"]).exists()

    users = [other for other in recipe.steps if _uses(other, recipe.out / step.name)]
    spent = bool(users) and all(finished(user) for user in users)
    if not (_as_now(done, step) and (spent or finished(step))):
        return False
    now = inputs(recipe, step, done)
    if stale := [name for name, id in now.items() if id and done[step.name].get("inputs", now).get(name, id) not in ("", id)]:
        raise DataError(f"{recipe.out / step.name}: was made from another '{stale[0]}', which was made anew or changed; remove this folder, and run again")
    return True


def begin(recipe: Recipe, step: Step) -> None:
    """Notes that a step is being made, where its folder is not there yet: stopped on its way, it is neither done nor what it was before."""
    if not (recipe.out / step.name).exists():
        done = _record(recipe)
        done[step.name] = {"settings": step.settings.model_dump(mode="json"), "made": None, "id": secrets.token_hex(8), "inputs": inputs(recipe, step, done)}
        write_json(recipe.out / STEPS, done)


def end(recipe: Recipe, step: Step, made: Path) -> None:
    """Notes that a step is done. A folder that was gone on in stays what others were made from."""
    done = _record(recipe)
    id = done.get(step.name, {}).get("id", "")
    done[step.name] = {"settings": step.settings.model_dump(mode="json"), "made": str(made), "id": id, "inputs": inputs(recipe, step, done)}
    write_json(recipe.out / STEPS, done)


def _record(recipe: Recipe) -> dict[str, Any]:
    """What was noted of each step. Read each time: several recipes may have their steps in one folder."""
    return read_json(recipe.out / STEPS) if (recipe.out / STEPS).exists() else {}


def _as_now(done: Mapping[str, Any], step: Step) -> bool:
    """Whether the step was made to its end, with these settings."""
    known = done.get(step.name, {})
    return bool(known.get("made")) and known["settings"] == step.settings.model_dump(mode="json")


def inputs(recipe: Recipe, step: Step, done: Mapping[str, Any]) -> dict[str, str]:
    """What a step is made from, and what tells whether it is still the same: the id of a step, the digest of a file."""
    files = {name: sha256(Path(name)) for text in _texts(step) for part in text.split(",") if os.path.isfile(name := part.strip())}
    return files | {other.name: done[other.name].get("id", "") for other in recipe.steps if other.name in done and _uses(step, recipe.out / other.name)}


def _uses(step: Step, folder: Path) -> bool:
    """Whether one of a step's settings names this folder, or a part of it."""
    return any(re.search(rf"(^|[=,])\s*{re.escape(str(folder))}\s*($|[/,])", text) for text in _texts(step))


def _texts(step: Step) -> list[str]:
    return [value for value in step.settings.model_dump(mode="json", exclude={"out"}).values() if isinstance(value, str)]


def demo(out: Path, seed: int = 0, progress: Progress = silent) -> Path:
    """The recipe `tiny` on the embedded model; returns the sweep's folder, which holds the report."""
    made = dict(run(read("tiny", out=str(out), seed=seed), progress))
    return made["sweep"].parent
