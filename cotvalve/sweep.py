"""Stage 4: accuracy against tokens, per alpha and data set, with the baselines in the same table.

Comes in: a model, one or more directions, data sets. Goes out: rows of graded chains, `points.json`,
`report.html` with the curve, and Markdown tables. Alpha 0 is the plain model: its chains are sampled once and
stand at the start of every direction's curve. Nothing is chosen here; the table shows every alpha that was run.

    cotvalve sweep --model BASE --direction D --data gsm8k --out sweep
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cotvalve.baselines import PLAIN, PROMPTED, Baseline, baselines
from cotvalve.card import DIRECTION_SHA256
from cotvalve.direction import Direction, check_fits, load_direction
from cotvalve.engines import pick
from cotvalve.errors import DataError, SettingError
from cotvalve.mixchain import Asked, Sampling, requests_for, sample_rows
from cotvalve.problems import fingerprint, load
from cotvalve.records import (
    Json,
    RowStore,
    Run,
    alone,
    read_json,
    read_parquet,
    read_run,
    refuse_other,
    write_json,
    write_parquet,
)
from cotvalve.report import Example, ReportData, write_report
from cotvalve.settings import Count
from cotvalve.statistics import Paired, paired, paired_over_grid, points
from cotvalve.types import Completion, Grade, Point, Problem, Progress, Sweep, silent

POINTS = "points.json"
"""What a run folder of `sweep` holds of its tables."""


class SweepSettings(Sampling):
    """Settings of `sweep`."""

    direction: str = ""
    """Directions, with commas; NAME=FOLDER names one in the tables. Empty: only the plain model and the baselines."""
    data: str = "gsm8k"
    """Data sets, with commas: gsm8k, math500, asdiv, aime24, aime25, arithmetic, or a .jsonl file."""
    split: str = "test"
    """Part of the data sets: choose alpha on 'heldout' (training questions nothing is trained on), report on 'test'."""
    limit: Count | None = None
    """A seeded random subset of this many problems per data set."""
    baselines: str = ""
    """Prompt baselines, with commas: budget, shortcut, budget-qwq, budget-llama."""
    budgets: str = "50,100,200"
    """Token budgets for the budget prompts, with commas."""
    chosen_on: str = ""
    """Where alpha or epoch were chosen, for the report: for example '500 training questions'."""
    out: str = "runs/sweep"
    """Run folder."""

    def model_post_init(self, context: Any, /) -> None:
        super().model_post_init(context)
        _ = baselines_of(self), named_directions(self.direction)


def problems_of(settings: SweepSettings) -> dict[str, list[Problem]]:
    """The problems of each data set that the settings name."""
    found = {
        name: load(name, split=settings.split, data_dir=settings.data_dir, limit=settings.limit, seed=settings.seed)
        for name in (part.strip() for part in settings.data.split(","))
        if name
    }
    if not found:
        raise SettingError("no data set was given; name one with --data, for example gsm8k")
    return found


def redo(folder: Path, data_dir: str | None = None) -> Path:
    """Points, tables and report again from a run folder's rows; nothing is sampled.

    Reads `rows.sqlite`, or `rows.parquet` in a folder that was published without it. A folder of data sets is none of a
    run's settings, so `data_dir` names it here as well.
    """
    found = read_run(folder)
    if found["verb"] != "sweep":
        raise DataError(f"{folder}: holds a run of '{found['verb']}', not 'sweep'; name a sweep's folder")
    handle = alone(folder)  # a sweep that is at its end, or another report, writes the same files
    try:
        return _again(folder, found, data_dir)
    finally:
        os.close(handle)


def _again(folder: Path, found: Json, data_dir: str | None) -> Path:
    """What `redo` does in a folder that nobody else is at work in; `found` is its run.json."""
    # No setting of the run, since the same chains may be reported with another: it stands beside the points.
    said = read_json(folder / POINTS).get("chosen_on", "") if (folder / POINTS).exists() else ""
    settings = SweepSettings.read({**found["settings"], "chosen_on": said, "data_dir": data_dir, "out": str(folder)})
    rows: dict[tuple[str, str], list[Json]] = {}
    sets = problems_of(settings)
    # The page shows the questions beside their chains, and the data set says how many chains there have to be.
    refuse_other(folder, found, "sweep", found["settings"], {"data": _told(sets, settings)})
    asked, directions = [PLAIN, *(other.name for other in baselines_of(settings))], named_directions(settings.direction)
    order = [*((name, system) for name in sets for system in asked), *((name, label) for label in directions for name in sets)]
    if (folder / "rows.sqlite").exists():
        with closing(RowStore(folder / "rows.sqlite")) as store:
            # Short chains end first: a table of those that are there would flatter.
            wanted = _chains(settings, sets)
            if len(store) < wanted:
                raise DataError(f"{folder}: {len(store):,} of {wanted:,} chains are there; give the sweep's command again to finish it")
            for name, system in order:
                own = store.rows(f"{name}|{system}|")
                if system in directions:
                    own = [*rows[name, PLAIN], *own]
                rows[name, system] = [{**row, "alpha": None} for row in own] if system.startswith(PROMPTED) else own
    else:
        for row in read_parquet(folder / "rows.parquet"):
            rows.setdefault((row.pop("dataset"), row.pop("system")), []).append(row)
    return finish(folder, found["facts"], {key: rows[key] for key in order if key in rows}, sets, settings)


def _chains(settings: SweepSettings, sets: dict[str, list[Problem]]) -> int:
    """How many a finished sweep has: the plain model, each baseline, and each direction at each alpha but 0."""
    positions = 1 + len(baselines_of(settings)) + len(named_directions(settings.direction)) * sum(alpha != 0 for alpha in settings.alphas)
    return positions * settings.samples * sum(map(len, sets.values()))


def _told(sets: dict[str, list[Problem]], settings: SweepSettings) -> str:
    """The data sets as a run's facts name them, with the hashes that tell them from others of the same name."""
    return ", ".join(f"{name} {settings.split} ({len(problems)} problems, {fingerprint(problems)[:12]})" for name, problems in sets.items())


def baselines_of(settings: SweepSettings) -> list[Baseline]:
    """The prompt baselines that the settings name, a budget prompt once for each budget."""
    budgets = [_whole(part) for part in settings.budgets.split(",") if part.strip()]
    asked = baselines([part.strip() for part in settings.baselines.split(",") if part.strip()], budgets)
    return list({other.name: other for other in asked}.values())  # given twice it is run once


def run(settings: SweepSettings, progress: Progress = silent) -> Path:
    """Samples what is missing, writes the tables and the report; returns the report's path."""
    directions = named_directions(settings.direction)
    others = baselines_of(settings)
    sets = problems_of(settings)
    valve = settings.load_valve()
    billions, plain_facts = valve.billions(), valve.facts()
    hashes: list[str] = []
    short: list[str] = []
    for label, where in directions.items():
        # What does not fit is said now, not after hours of sampling the plain model.
        found = load_direction(where, valve.model)
        _ = check_fits(found, valve.model) if isinstance(found, Direction) else found.check_fits(valve.model)
        hashes.append(f"{label} {found.sha256()[:16]}")
        if found.card.method == "valve":
            short.append(f"{label} at alpha 1")
    facts = {
        **plain_facts,
        **({DIRECTION_SHA256: ", ".join(hashes)} if hashes else {}),
        **({"SFT on the short chains": f"{', '.join(short)} (eq. 2 is that SFT)"} if short else {}),
        "billions": str(billions),
        "data": _told(sets, settings),
        "decoding": f"{settings.drawn()}, up to {settings.max_new_tokens} new tokens, {settings.samples} per problem, seed {settings.seed}",
    }  # fmt: skip
    decisive = settings.model_dump(mode="json", exclude={"out", "engine", "gpus", "slots", "chosen_on", "data_dir", "device"})
    with Run(Path(settings.out), "sweep", decisive, facts) as at:
        rows: dict[tuple[str, str], list[Json]] = {}
        wanted = [0.0]  # also where no alpha 0 was asked for: everything is compared with the plain model
        turned = [alpha for alpha in settings.alphas if alpha != 0]
        work = (_chains(settings, sets) - len(at.rows)) * settings.max_new_tokens
        # The first direction is on the model from the start: at alpha 0 it is the plain model, and vLLM starts once.
        if where := next(iter(directions.values()), None):
            valve.turn_to(load_direction(where, valve.model))
        engine = pick(settings.engine, valve, settings.slots, work=work, longest=settings.max_new_tokens, gpus=settings.gpus)
        asked: dict[str, Asked] = {}
        for name, problems in sets.items():
            asked[f"{name}|{PLAIN}|"] = problems, requests_for(problems, settings, valve.tokenizer, wanted, paired=True)
            for other in others:
                how = settings.but(prompt=other.prompt, budget=other.budget)
                asked[f"{name}|{other.name}|"] = problems, requests_for(problems, how, valve.tokenizer, wanted, paired=True)
        sampled: dict[str, list[Json]] = {}
        for number, (label, where) in enumerate(directions.items()):
            if number and not valve.turn_to(load_direction(where, valve.model)):
                del engine
                engine = pick(settings.engine, valve, settings.slots, work=work, longest=settings.max_new_tokens, gpus=settings.gpus)
            for name, problems in sets.items():
                asked[f"{name}|{label}|"] = problems, requests_for(problems, settings, valve.tokenizer, turned, paired=True)
            sampled |= sample_rows(at, engine, asked, progress)
            asked = {}
        sampled |= sample_rows(at, engine, asked, progress)  # without a direction
        for name in sets:
            rows[name, PLAIN] = sampled[f"{name}|{PLAIN}|"]
            rows |= {(name, other.name): [{**row, "alpha": None} for row in sampled[f"{name}|{other.name}|"]] for other in others}
        rows |= {(name, label): [*rows[name, PLAIN], *sampled[f"{name}|{label}|"]] for label in directions for name in sets}
        del engine, valve
        return finish(at.folder, at.facts, rows, sets, settings)


def finish(folder: Path, facts: Json, rows: dict[tuple[str, str], list[Json]], sets: dict[str, list[Problem]], settings: SweepSettings) -> Path:  # fmt: skip
    """Points, tests, tables and the report of finished rows."""
    measured: list[Point] = []
    tests: list[Paired] = []
    billions = float(facts["billions"])
    dials = [key for key in rows if any(row["alpha"] for row in rows[key])]
    for (name, system), found in rows.items():
        if not found:
            continue
        plain = rows[name, PLAIN]
        shown = [{**row, "alpha": None} for row in found] if system == PLAIN else found
        measured += points(system, name, shown, billions, seed=settings.seed)
        for alpha in sorted({row["alpha"] for row in found if row["alpha"] != 0}, key=lambda a: a or 0.0) if plain else []:
            here = [row for row in found if row["alpha"] == alpha]
            label = system if alpha is None else f"{system} at {alpha:g}"
            tests.append(paired(here, plain, dataset=name, a=label, b=PLAIN, seed=settings.seed))
    for i, (name, a) in enumerate(dials):
        for other, b in dials[i + 1 :]:
            if name == other:
                tests.append(paired_over_grid(rows[name, b], rows[name, a], dataset=name, a=b, b=a, seed=settings.seed))
    # Said here and not when the run begins, so that reports of folders from before have it as well.
    asked = settings.prompt + (f", budget {settings.budget}" if settings.budget else "")
    sweep = Sweep(tuple(measured), {**{key: str(value) for key, value in facts.items()}, "prompt": asked})
    told = {"points": [asdict(p) for p in measured], "paired": [asdict(t) for t in tests], "facts": sweep.facts, "chosen_on": settings.chosen_on}
    write_json(folder / POINTS, told)
    write_parquet(folder / "rows.parquet", ({"dataset": n, "system": s, **row} for (n, s), found in rows.items() for row in found))
    return write_report(
        ReportData(
            title=f"Chain length and accuracy of {settings.model}", points=sweep.points, facts=sweep.facts,
            paired=tuple(tests), examples=tuple(_examples(rows, sets)), chosen_on=settings.chosen_on,
        ),
        folder,
    )  # fmt: skip


def _examples(rows: dict[tuple[str, str], list[Json]], sets: dict[str, list[Problem]]) -> Iterator[Example]:
    """The first question of each data set at five alphas of each direction; never picked by its answers."""
    for (name, system), found in rows.items():
        alphas = sorted({row["alpha"] for row in found if row["alpha"] is not None})
        if len(alphas) < 2 or "text" not in found[0]:  # published rows are without
            continue
        chosen = [alphas[round(i * (len(alphas) - 1) / 4)] for i in range(5)] if len(alphas) > 5 else alphas
        problem = sets[name][0]
        shown = [row for alpha in chosen for row in found if row["alpha"] == alpha and row["problem"] == problem.id and row["sample"] == 0]
        yield Example(
            problem,
            tuple(Completion(problem.id, r["alpha"], r["text"], r["tokens"], r["finish"], r["prompt_tokens"], r["reasoning_tokens"]) for r in shown),
            tuple(Grade(r["correct"], r["predicted"], r["reason"]) for r in shown),
            system,
        )  # fmt: skip


def named_directions(text: str) -> dict[str, str]:
    """'a,b=folder' as {name: folder}; the name is the folder's last part where none is given.

    >>> named_directions("runs/valve,++=runs/lr=1e-4/plus")
    {'valve': 'runs/valve', '++': 'runs/lr=1e-4/plus'}
    """
    found: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        # A name has no slash: what stands behind the first one, 'runs/lr=1e-4', is a folder's.
        first, slash, rest = part.partition("/")
        label, _, first = first.rpartition("=")
        where = first + slash + rest
        label = label or Path(where).name
        if label in found or label == PLAIN:
            raise SettingError(f"direction name '{label}' is taken; name it like other={where}")
        found[label] = where
    return found


def _whole(text: str) -> int:
    if not text.strip().isdecimal() or not int(text):
        raise SettingError(f"budget '{text.strip()}' is not a whole number of tokens")
    return int(text)
