"""Measures a direction's dial: sample held-out training questions over a grid of alphas, fit, judge the fit.

Comes in: a model, a direction, a data set with training questions. Goes out: graded rows in the run folder,
`calibration.json` there and beside the direction, and `calibration.md` with the table and the errors. The
questions are the held-out ones, which `train` and `mix` never see; a test set is never touched.

    cotvalve calibrate --model BASE --direction D --data gsm8k --out calibrate
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cotvalve.calibration import FILE, Calibration, Error, Position, around_zero, fingerprint, fit
from cotvalve.card import DIRECTION_SHA256
from cotvalve.chains import JSON_LINES
from cotvalve.checkpoints import DIRECTION_FILES, fetch
from cotvalve.direction import load_direction
from cotvalve.engines import pick
from cotvalve.errors import DataError, SettingError
from cotvalve.mixchain import Sampling, is_mixchain, requests_for, sample_rows
from cotvalve.problems import HELD_OUT, NAMES, load
from cotvalve.problems import fingerprint as data_fingerprint
from cotvalve.records import Json, Run, disk, read_json, read_parquet, read_run, write_text
from cotvalve.repetition import loops
from cotvalve.resampling import answers, widened
from cotvalve.settings import Alphas, Count, NotNegative
from cotvalve.statistics import paired, point
from cotvalve.types import Interval, Progress, silent

SPLITS = 50
"""Random halvings of the questions that the curve's error is averaged over."""


class CalibrateSettings(Sampling):
    """Settings of `calibrate`."""

    direction: str = ""
    """The direction whose dial is measured."""
    data: str = "gsm8k"
    """A data set with training questions: those that `train` and `mix` never see are answered."""
    limit: Count | None = 400
    """So many of them, chosen by the seed; all when there are fewer."""
    # Trained dials do most of their travel in the first quarter, so the grid is finest there.
    alphas: Alphas = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5, 0.75, 1.0, 1.25, 1.5)
    """Positions of the valve, with commas; 0 is always measured."""
    tolerance: NotNegative = 5.0
    """Percentage points of accuracy that the safe range may lose, by the lower end of the paired interval."""
    degenerate: NotNegative = 5.0
    """An alpha with this many percentage points more cut or looping chains than alpha 0 is not used."""
    sweep: str = ""
    """A finished sweep of this direction with --split heldout: its chains are taken, and nothing is sampled or loaded."""
    out: str = "runs/calibrate"
    """Run folder."""

    def model_post_init(self, context: Any, /) -> None:
        super().model_post_init(context)
        if self.limit is not None and (few := _too_few(self.limit)):
            raise ValueError(few)


def run(settings: CalibrateSettings, progress: Progress = silent) -> Path:
    """Samples what is missing and writes the calibration; returns the path of `calibration.md`."""
    if not settings.direction:
        raise SettingError("no direction was given; name one with --direction")
    home = fetch(settings.direction, DIRECTION_FILES)
    if settings.sweep:
        return _from_sweep(settings, home)
    problems = load(settings.data, split=HELD_OUT, data_dir=settings.data_dir, limit=settings.limit, seed=settings.seed)
    if few := _too_few(len(problems)):
        raise DataError(few)
    valve = settings.load_valve(settings.direction)
    chosen_on = f"{len(problems)} {_origin(home, settings.data)}"
    alphas = sorted({0.0, *settings.alphas})
    facts = {
        **valve.facts(),
        "direction": settings.direction,
        "data": f"{chosen_on}, {data_fingerprint(problems)[:12]}",
    }
    with _opened(settings, home, facts) as at:
        engine = pick(settings.engine, valve, settings.slots, gpus=settings.gpus)
        asked = requests_for(problems, settings, valve.tokenizer, alphas, paired=True)
        rows = sample_rows(at, engine, {"": (problems, asked)}, progress)[""]
        decoding = (
            f"{settings.drawn()}, up to {settings.max_new_tokens} new tokens, {settings.samples} per question, prompt '{settings.prompt}', seed {settings.seed}"
        )
        return _save(at, home, rows, {**at.facts, "decoding": decoding}, chosen_on, settings)


def _from_sweep(settings: CalibrateSettings, home: Path) -> Path:
    """The same from chains that a sweep has made. The direction is known there by its weights, whatever it is called."""
    folder = Path(settings.sweep)
    found = read_run(folder)
    if found["verb"] != "sweep" or found["settings"]["split"] != HELD_OUT:
        raise DataError(f"{folder}: not a sweep of held-out questions; make one with sweep --split {HELD_OUT}")
    digest = load_direction(settings.direction).sha256()[:16]
    systems = dict((sha, name) for name, _, sha in (part.rpartition(" ") for part in found["facts"].get(DIRECTION_SHA256, "").split(", ")))
    if digest not in systems:
        raise DataError(f"{folder}: holds no chain of {settings.direction}; its directions are {', '.join(systems.values()) or 'none'}, with other weights")
    rows = [row for row in read_parquet(folder / "rows.parquet") if (row["dataset"], row["system"]) == (settings.data, systems[digest])]
    if not rows:
        raise DataError(f"{folder}: has no {settings.data}; its data is {found['settings']['data']}")
    if "text" not in rows[0]:
        raise DataError(f"{folder}: its rows were published without their texts, so that looping chains cannot be told")
    # What the chains were made with is the sweep's to say: model, positions, prompt, decoding, seed.
    settings = settings.but(**{name: value for name, value in found["settings"].items() if name in {*Sampling.model_fields, "limit"}})
    chosen_on = f"{len({row['problem'] for row in rows})} {_origin(home, settings.data)}"
    told = {**found["facts"], "direction": settings.direction}
    with _opened(settings, home, {key: told[key] for key in ("direction", "data")}) as at:
        return _save(at, home, rows, told, chosen_on, settings)


def _opened(settings: CalibrateSettings, home: Path, facts: Json) -> Run:
    ours = {"out", "engine", "gpus", "slots", "data_dir", "device", "tolerance", "degenerate"}
    if not settings.sweep:
        ours.add("sweep")  # so that a folder from before this setting goes on
    return Run(Path(settings.out), "calibrate", {**settings.model_dump(mode="json", exclude=ours), "fingerprint": fingerprint(home)}, facts)


def _save(at: Run, home: Path, rows: Sequence[Json], facts: Json, chosen_on: str, settings: CalibrateSettings) -> Path:
    made = measure(
        rows, tolerance=settings.tolerance, degenerate=settings.degenerate, chosen_on=chosen_on,
        fingerprint=fingerprint(home), facts={key: str(value) for key, value in {**facts, "prompt": settings.prompt}.items()}, seed=settings.seed,
    )  # fmt: skip
    made.save(at.folder)
    # A hub's cache and an installed package are not ours to write to.
    local = Path(settings.direction).is_dir()
    with disk(home):
        where = made.save(home) if local else at.folder / FILE
    write_text(at.folder / "calibration.md", describe(made, where, local))
    return at.folder / "calibration.md"


def measure(
    rows: Sequence[Json], *, tolerance: float = 5.0, degenerate: float = 5.0, chosen_on: str = "",
    fingerprint: str = "", facts: dict[str, str] | None = None, seed: int = 0,
) -> Calibration:  # fmt: skip
    """The calibration that graded rows (as `sample_rows` returns them) make; alpha 0 has to be among them."""
    by_alpha: dict[float, list[Json]] = {}
    for row in rows:
        by_alpha.setdefault(row["alpha"], []).append(row)
    if 0.0 not in by_alpha:
        raise DataError("a calibration needs chains at alpha 0: everything is measured against them")
    plain = by_alpha[0.0]
    positions: list[Position] = []
    for alpha, found in sorted(by_alpha.items()):
        at = point("dial", "held-out", alpha, found, 1.0, seed=seed)
        test = paired(found, plain, dataset="held-out", a=f"{alpha:g}", b="0", seed=seed)
        # Alpha 0 differs from itself by nothing, for sure.
        difference = widened(test.accuracy_difference_ci, _rights(found) - _rights(plain)) if alpha else Interval(0.0, 0.0)
        cut = np.array([row["finish"] == "length" for row in found])
        looping = np.array([loops(row["text"]) for row in found])
        positions.append(
            Position(
                alpha, at.tokens_mean, at.tokens_mean_ci, at.accuracy, at.accuracy_ci, test.accuracy_difference,
                difference, 100 * float(cut.mean()), 100 * float(looping.mean()),
                100 * float((cut | looping).mean()), None,
            )
        )  # fmt: skip
    base = next(p for p in positions if p.alpha == 0)
    if base.tokens == 0:
        raise DataError("no chain could be run at alpha 0, so there is nothing to measure against")
    used = around_zero(positions, lambda p: p.tokens > 0 and p.degenerate <= base.degenerate + degenerate)
    curve = dict(zip((p.alpha for p in used), fit([p.tokens for p in used]), strict=True))
    tables = [answers(by_alpha[alpha], f"alpha {alpha:g}") for alpha in curve]
    tokens_A_P = np.array([t.tokens_P_S.sum(1) for t in tables]), np.array([t.ran_P_S.sum(1) for t in tables])
    lengths = [
        row["tokens"] / curve[row["alpha"]] for row in rows if row["alpha"] in curve and row["finish"] != "error"
    ]
    single = np.quantile(lengths, (0.1, 0.9))
    return Calibration(
        tuple(replace(p, fitted=curve.get(p.alpha)) for p in positions), tolerance, degenerate,
        Error(*_errors(list(curve), *tokens_A_P, seed), Interval(float(single[0]), float(single[1]))),
        len(tables[0].problems), chosen_on, fingerprint, facts or {},
    )  # fmt: skip


def _rights(rows: Sequence[Json]) -> NDArray[np.float64]:
    """The share of each question's samples that is right."""
    return answers(rows, "dial").right_P_S.mean(1)


def _errors(
    alphas: list[float], tokens_A_P: NDArray[np.float64], ran_A_P: NDArray[np.float64], seed: int
) -> tuple[float, float, float | None]:
    """Mean and worst relative error from one half of the questions to the other, and that between measured alphas."""
    questions = tokens_A_P.shape[1]
    if few := _too_few(questions):
        raise DataError(few)
    random = np.random.default_rng(seed)
    missed: list[NDArray[np.float64]] = []
    between: list[float] = []
    for _ in range(SPLITS):
        order = random.permutation(questions)
        halves = [
            tokens_A_P[:, half].sum(1) / np.maximum(ran_A_P[:, half].sum(1), 1)
            for half in (order[: questions // 2], order[questions // 2 :])
        ]
        if min(float(half.min()) for half in halves) <= 0:
            continue
        for seen, unseen in (halves, halves[::-1]):
            missed.append(np.abs(np.array(fit([float(t) for t in seen])) / unseen - 1))
            for i in range(1, len(alphas) - 1):
                rest = [k for k in range(len(alphas)) if k != i]
                logs = np.log(fit([float(seen[k]) for k in rest]))
                guess = float(np.exp(np.interp(alphas[i], [alphas[k] for k in rest], logs)))
                between.append(abs(guess / float(unseen[i]) - 1))
    if not missed:
        raise DataError("too few chains could be run to measure the calibration's error; see the reasons in the rows")
    by_alpha = np.mean(missed, axis=0)
    return float(by_alpha.mean()), float(by_alpha.max()), float(np.mean(between)) if between else None


def _too_few(questions: int) -> str:
    return "" if questions > 1 else f"{questions} question: a calibration needs 2 or more to know its own error; raise --limit, or give more questions"


def _origin(folder: Path, data: str) -> str:
    """What to call the held-out questions of `data`: they are unseen for sure only by what was trained here."""
    return f"held-out training questions of {data}" + (
        "" if _trained_here(folder) else ", which a direction made elsewhere may have seen"
    )


def _trained_here(folder: Path) -> bool:
    """True when the run folders say that all a direction was trained on came through `train` and `mix`."""
    if not (folder / "run.json").exists():
        return False
    found = read_json(folder / "run.json")
    told = found.get("settings") if isinstance(found, dict) else None
    if not isinstance(told, dict):  # of another program, which made the adapter
        return False
    data, before = str(told.get("data") or ""), str(told.get("direction") or "")
    own = (
        data in NAMES
        or (Path(data) / "run.json").exists()
        or (data.endswith(JSON_LINES) and Path(data).exists() and not is_mixchain(data))
    )
    return own and (not before or _trained_here(Path(before)))


def describe(made: Calibration, where: Path, beside: bool) -> str:
    """The table, the safe range and the errors, as Markdown."""
    span, reach, error = made.span, made.reach, made.error
    lines = [
        f"# Calibration on {made.chosen_on}", "",
        "| alpha | mean tokens | on the curve | accuracy % | against alpha 0 | cut % | looping % | |",
        "|--:|--:|--:|--:|--:|--:|--:|---|",
    ]  # fmt: skip
    for p in made.positions:
        note = "safe" if made.is_safe(p.alpha) else "" if p.fitted is not None else "degenerates: not used"
        lines.append(
            f"| {p.alpha:g} | {p.tokens:.1f} ({p.tokens_ci.low:.1f} to {p.tokens_ci.high:.1f}) | "
            f"{'' if p.fitted is None else f'{p.fitted:.1f}'} | {p.accuracy:.1f} ({p.accuracy_ci.low:.1f} to {p.accuracy_ci.high:.1f}) | "
            f"{p.difference:+.1f} ({p.difference_ci.low:+.1f} to {p.difference_ci.high:+.1f}) | {p.truncated:.1f} | {p.looping:.1f} | {note} |"
        )
    savings = [(points, made.at_most_loss(points)) for points in (1.0, 2.0, 5.0, 10.0)]
    between = "" if error.between is None else f"; {error.between:.1%} at alphas left out of the curve as well"
    lines += [
        "", f"Reach: {reach.low:.0f} to {reach.high:.0f} tokens over alpha {span.low:g} to {span.high:g}.",
        f"Safe range: alpha {made.safe.low:g} to {made.safe.high:g} (at most {made.tolerance:g} points lost by the lower end of the paired "
        f"95 % interval; at most {made.degenerate:g} points more cut or looping chains than at alpha 0).",
        "At most so many points lost: "
        + "; ".join(f"{points:g}: alpha {s.alpha:g}, {s.tokens:.0f} tokens, {s.shorter:.0%} shorter" for points, s in savings) + ".",
        f"Error on the half of the questions that was left out: {error.questions:.1%} on average, {error.worst:.1%} at the worst alpha{between}. "
        f"Single chains: 80 % lie between {error.single.low:.2f} and {error.single.high:.2f} times the curve.",
        "", f"Written to {where}" + ("." if beside else "; copy it into the direction's folder to use it."), "",
    ]  # fmt: skip
    return "\n".join(lines)
