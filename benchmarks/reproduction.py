"""The tables of the reproduction, from the run folders of recipes/reproduction/ for one or several seeds.

    for seed in 0 1 2; do cotvalve run recipes/reproduction/main.yaml --out runs/reproduction/$seed --seed $seed; done
    python benchmarks/reproduction.py runs/reproduction/*                          # every table that is there
    python benchmarks/reproduction.py runs/reproduction/* --table main             # Tables 1, 4, 8, 12 and the dial
    python benchmarks/reproduction.py runs/reproduction/* --table table7 --against "solution 0 directly"
    python benchmarks/reproduction.py runs/reproduction/* --table main --subset numeric
    python benchmarks/reproduction.py runs/reproduction/* --figures docs/reproduction  # the curves and dials as PNG too
    python benchmarks/reproduction.py runs/reproduction/* --figures docs/reproduction --curve "+P=main:CoT-Valve+P" --curve "bounded=bounded4:4 rounds"
    python benchmarks/reproduction.py runs/reproduction/* --publish results/reproduction --texts 0/main-gsm8k

A folder is one seed. In it every finished sweep counts, by the first word of its step's name (table7-heldout,
table7-gsm8k). A sweep of held-out training questions chooses positions, the others are reported: what was measured
on a test set has no say in which position is shown.

Intervals are 95 %. With one seed they are those of cotvalve.statistics, over questions. With several, questions and
seeds are both drawn anew, the same questions in every seed (Owen 2007). Three seeds say little about how seeds vary:
such an interval is a lower bound, so every seed's own accuracy stands beside it.
"""

import argparse
import math
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from cotvalve import figures
from cotvalve.baselines import PLAIN, PROMPTED
from cotvalve.errors import CotvalveError, DataError, SettingError, unknown
from cotvalve.figures import DASH, alpha_label
from cotvalve.problems import HELD_OUT
from cotvalve.records import Json, read_json, read_parquet, write_parquet
from cotvalve.repetition import loops
from cotvalve.report import number, signed, span, table
from cotvalve.resampling import Floats, answers, interval, resamples, widened
from cotvalve.statistics import Paired, paired, point, spearman, travel
from cotvalve.types import Interval, Point

Seeds = dict[str, list[Json]]
"""Rows of one system at one position, by run folder."""
Dial = dict[float | None, Seeds]
"""One system's positions; the plain model and the prompts have only None."""


LOOPS = "loops"
"""Column in place of the text in published rows."""


Place = tuple[str, str]
"""A table and a system of it."""


@dataclass
class Measured:
    """All that was measured for one table on one data set."""

    systems: dict[str, Dial] = field(default_factory=dict[str, Dial])
    models: dict[str, str] = field(default_factory=dict[str, str])
    """By run folder."""
    billions: float = 0.0


@dataclass(frozen=True, slots=True)
class Line:
    """One row of a table."""

    label: str
    point: Point
    pair: Paired | None
    """Against the plain model, or the system that --against names."""
    by_seed: tuple[float, ...]
    """Accuracy of each seed."""


@dataclass(frozen=True, slots=True)
class Travel:
    """How tokens change along one dial, or the part of it up to alpha 1."""

    system: str
    alphas: list[float]
    tokens: list[float]
    by_seed: list[list[float]]

    def falls(self) -> str:
        """Whether every position is shorter than the one before: all seeds together, and each alone."""
        strict = [all(after < before for before, after in pairwise(tokens)) for tokens in (self.tokens, *self.by_seed)]
        return f"{'yes' if strict[0] else 'no'} ({sum(strict[1:])} of {len(strict) - 1} seeds)"


def read(folders: Sequence[Path], subset: str = "", also: Mapping[Place, Place] | None = None) -> dict[tuple[str, str, bool], Measured]:
    """What was measured, by table, data set and whether its questions were held out; seeds are called by their folders.

    Of test sets only the questions of `subset`, if one is named. A place of `also` counts as a further seed of the other.
    """
    also = also or {}
    under = {name: to for (name, _), (to, _) in also.items()}
    known: set[Place] = set()
    found: dict[tuple[str, str, bool], Measured] = {}
    for folder in folders:
        for step in sorted(path.parent for path in folder.glob("*/run.json")):
            run = read_json(step / "run.json")
            if run["verb"] != "sweep":
                continue
            if not (step / "rows.parquet").exists():
                print(f"{step}: not finished, left out", file=sys.stderr)
                continue
            settings, rows = run["settings"], read_parquet(step / "rows.parquet")
            fresh: dict[tuple[str, str, float | None], list[Json]] = {}
            for row in rows:
                if subset and row["subset"] != subset and settings["split"] != HELD_OUT:
                    continue
                if row["system"] == PLAIN:
                    row["alpha"] = None
                fresh.setdefault((row["dataset"], row["system"], row["alpha"]), []).append(row)
            named = step.name.partition("-")[0]
            name, seed = under.get(named, named), f"{folder}, {named}" if named in under else str(folder)
            for (dataset, system, alpha), own in fresh.items():
                known.add((named, system))
                if named in under and system != PLAIN:
                    if (named, system) not in also:
                        continue
                    system = also[named, system][1]
                here = found.setdefault((name, dataset, settings["split"] == HELD_OUT), Measured())
                if here.models.setdefault(str(folder), settings["model"]) != settings["model"]:
                    raise DataError(f"{step}: measures {settings['model']}, but its table has {here.models[str(folder)]}; call the step otherwise")
                here.billions = float(run["facts"]["billions"])
                # Two sweeps of one table may both have the plain model: the same chains when they are greedy.
                here.systems.setdefault(system, {}).setdefault(alpha, {}).setdefault(seed, own)
    if not found:
        raise DataError(f"{', '.join(map(str, folders))}: no finished sweep in it; name the --out of `cotvalve run recipes/reproduction/...`")
    for place in {*also, *also.values()} - known:
        raise SettingError(unknown("dial", ":".join(place), [":".join(each) for each in sorted(known) if each[1] != PLAIN]))
    return found


def pair_of_places(told: str) -> tuple[Place, Place]:
    """The two of "again:3 rounds=published:reward", the second first."""

    def place(part: str) -> Place:
        table, _, system = part.strip().partition(":")
        if not system:
            raise SettingError(f"--also {told}: give TABLE:SYSTEM=TABLE:SYSTEM")
        return table, system

    to, _, name = told.partition("=")
    return place(name), place(to)


def looped(row: Json) -> bool:
    """Whether the chain repeats itself; noted in rows that were published without their text."""
    return row[LOOPS] if LOOPS in row else loops(row["text"])


def questions(here: Measured) -> set[str]:
    """The ids of what was asked."""
    return {row["problem"] for rows in here.systems[PLAIN][None].values() for row in rows}


def part(seeds: Seeds, ids: set[str]) -> Seeds:
    """The rows of the questions `ids`."""
    return {seed: [row for row in rows if row["problem"] in ids] for seed, rows in seeds.items()}


def pooled(seeds: Seeds) -> list[Json]:
    """The rows of all seeds as samples of the same questions."""
    return [{**row, "sample": (seed, row["sample"])} for seed, rows in seeds.items() for row in rows]


def drawn(sides: Sequence[Seeds], draws: int) -> tuple[Floats, Floats]:
    """Accuracy and mean tokens [side, draw] of each side in draws over questions and seeds that are the same for all sides.

    A draw takes as many questions, and as many of the seeds that all sides have, as there are: both with replacement.
    """
    common = [seed for seed in sides[0] if all(seed in side for side in sides)]
    tables = [[answers(side[seed], seed) for seed in common] for side in sides]
    if len({each.problems for side in tables for each in side}) != 1:
        raise DataError(f"{', '.join(sides[0])}: hold different questions or no common seed; give every seed the same --data and limit")
    stacked = [np.stack([[t.right_P_S.mean(1), t.tokens_P_S.sum(1), t.ran_P_S.sum(1)] for t in side], -1) for side in tables]
    generator, seeds = np.random.default_rng(0), len(common)
    accuracies: list[Floats] = []
    lengths: list[Floats] = []
    for counts in resamples(stacked[0].shape[1], 0, draws):
        weights = generator.multinomial(seeds, np.full(seeds, 1 / seeds), len(counts)) / seeds
        # [side, right | tokens | ran, draw]
        sums = np.array([[(counts @ values * weights).sum(1) for values in side] for side in stacked])
        accuracies.append(100 * sums[:, 0] / counts.shape[1])
        lengths.append(sums[:, 1] / sums[:, 2])
    return np.concatenate(accuracies, 1), np.concatenate(lengths, 1)


def line(label: str, system: str, alpha: float | None, here: Measured, dataset: str, draws: int, against: str | None = None) -> Line:
    """One system at one position, and against another system on the same seeds (its alpha 1 where it has a dial)."""
    seeds = here.systems[system][alpha]
    other = here.systems[against] if against else {}
    other = other.get(None) or other.get(1.0) or {}
    base = {seed: other[seed] for seed in seeds if seed in other}
    made = point(system, dataset, alpha, pooled(seeds), here.billions, draws=draws)
    each = tuple(float(100 * answers(rows, seed).right_P_S.mean()) for seed, rows in seeds.items())
    pair = None
    if against and len(base) == len(seeds) and base != seeds:
        pair = paired(pooled(seeds), pooled(base), dataset=dataset, a=system, b=against, draws=draws)
    if len(seeds) > 1:
        accuracy, tokens = drawn([seeds, base] if pair else [seeds], draws)
        # Draws of answers that are all right, or all wrong, are all the same, as are those of differences: there the interval over questions stays.
        right = interval(accuracy[0], made.accuracy) if np.ptp(accuracy[0]) else made.accuracy_ci
        made = replace(made, accuracy_ci=right, tokens_mean_ci=interval(tokens[0], made.tokens_mean))
        if pair:
            ends, apart = interval(np.log(tokens[0] / tokens[1]), math.log(pair.token_ratio)), accuracy[0] - accuracy[1]
            pair = replace(
                pair, accuracy_difference_ci=interval(apart, pair.accuracy_difference) if np.ptp(apart) > 1e-9 else pair.accuracy_difference_ci,
                token_ratio_ci=Interval(math.exp(ends.low), math.exp(ends.high)),
            )  # fmt: skip
    return Line(label, made, pair, each)


def rough(system: str, alpha: float | None, seeds: Seeds) -> Point:
    """Accuracy and tokens without their intervals, to choose by."""
    return point(system, "", alpha, pooled(seeds), 1.0, draws=1)


def choose(held: Measured, system: str, loss: float) -> dict[str, float | None]:
    """Positions of `system` chosen on held-out questions, by the rule that chose them.

    "no loss": the fewest tokens among those whose accuracy is at most `loss` points below the plain model's (alpha 0
    is always one of them); "most accurate", of equal ones the shortest; "shortest": the fewest tokens of all.
    """
    plain = rough(PLAIN, None, held.systems[PLAIN][None])
    dial = [rough(system, alpha, seeds) for alpha, seeds in held.systems[system].items()]
    safe = [p for p in dial if p.accuracy >= plain.accuracy - loss - 1e-9]

    def tokens(p: Point) -> float:
        return p.tokens_mean

    rules = {f"no loss (within {loss:g})": min(safe, key=tokens).alpha} if safe else {}
    return {**rules, "most accurate": min(dial, key=lambda p: (-p.accuracy, tokens(p))).alpha, "shortest": min(dial, key=tokens).alpha}


def lines_table(lines: Sequence[Line], against: str) -> str:
    """Systems at their positions, with what they lose and gain."""

    def pair(show: Callable[[Paired], str]) -> Callable[[Line], str]:
        return lambda row: show(row.pair) if row.pair else DASH

    columns: dict[str, Callable[[Line], str]] = {
        "system": lambda row: row.point.system,
        "position": lambda row: row.label,
        "alpha": lambda row: alpha_label(row.point.alpha),
        "accuracy %": lambda row: f"{number(row.point.accuracy)} [{span(row.point.accuracy_ci)}]",
        "mean tokens": lambda row: f"{number(row.point.tokens_mean)} [{span(row.point.tokens_mean_ci)}]",
        "ACU": lambda row: number(row.point.acu, 2),
        f"against {against}, points": pair(
            lambda q: f"{signed(q.accuracy_difference)} [{signed(q.accuracy_difference_ci.low)} to {signed(q.accuracy_difference_ci.high)}]"
        ),
        "times shorter": pair(
            lambda q: f"{number(1 / q.token_ratio, 2)} [{span(Interval(1 / q.token_ratio_ci.high, 1 / q.token_ratio_ci.low), 2)}]"
        ),
        "each seed": lambda row: ", ".join(number(accuracy) for accuracy in row.by_seed),
    }
    return table(columns, lines, words=2)


def systems_tables(here: Measured, held: Measured | None, dataset: str, against: str, loss: float, draws: int, at: Sequence[float] = ()) -> list[str]:
    """The main table (as trained, as chosen on held-out questions, and at the alphas `at`) and the shortest reachable (Table 8)."""
    main = [line("", PLAIN, None, here, dataset, draws, against)]
    shortest: list[Line] = []
    prompts: list[tuple[float, Line]] = []
    missed: list[str] = []
    for system, dial in here.systems.items():
        if system == PLAIN:
            continue
        chosen = choose(held, system, loss) if held and system in held.systems else {}
        if system.startswith(PROMPTED):
            main.append(line("", system, None, here, dataset, draws, against))
            if held and chosen:
                prompts.append((rough(system, None, held.systems[system][None]).tokens_mean, main[-1]))
            continue
        missed += [f"{system}: {rule} at {alpha_label(alpha)}" for rule, alpha in chosen.items() if alpha not in dial]
        labels: dict[float | None, list[str]] = {1.0: ["as trained"]} if 1.0 in dial else {}
        for rule, alpha in chosen.items():
            labels.setdefault(alpha, []).append(rule)
        if not chosen and dial:  # no held-out question chose: the far end is a position that no result has chosen either
            labels.setdefault(max(alpha or 0.0 for alpha in dial), []).append("end of the dial")
        for alpha in at:
            labels.setdefault(alpha, ["not chosen"])
        made = [line(", ".join(rules), system, alpha, here, dataset, draws, against) for alpha, rules in labels.items() if alpha in dial]
        main += made
        shortest += [replace(each, label="shortest") for each in made if each.point.alpha == chosen.get("shortest")]
    parts = [lines_table(main, against)]
    if missed:
        parts.append(f"Chosen on the held-out questions, but not run on these: {'; '.join(missed)}.")
    if prompts:
        shortest = [replace(min(prompts, key=lambda prompt: prompt[0])[1], label="shortest prompt"), *shortest]
    if shortest:
        parts += ["Shortest reachable (Table 8), chosen on the held-out questions:", lines_table(shortest, against)]
    return parts


def dials_of(here: Measured) -> dict[str, Dial]:
    """What was measured at three positions or more."""
    return {name: dial for name, dial in here.systems.items() if None not in dial and len(dial) > 2}


def dial_tables(here: Measured, dataset: str, against: str, draws: int) -> list[str]:
    """Accuracy and tokens at every position, how evenly each dial travels, and all systems against one dial at its length."""
    dials = dials_of(here)
    if not dials:
        return []
    rows = [line("", name, alpha, here, dataset, draws) for name, dial in dials.items() for alpha in sorted(dial, key=lambda a: a or 0.0)]

    def share(row: Line, bad: Callable[[Json], bool]) -> str:
        found = [bad(each) for rows in here.systems[row.point.system][row.point.alpha].values() for each in rows]
        return number(100 * sum(found) / len(found))

    columns: dict[str, Callable[[Line], str]] = {
        "system": lambda row: row.point.system,
        "alpha": lambda row: alpha_label(row.point.alpha),
        "accuracy %": lambda row: f"{number(row.point.accuracy)} [{span(row.point.accuracy_ci)}]",
        "mean tokens": lambda row: f"{number(row.point.tokens_mean)} [{span(row.point.tokens_mean_ci)}]",
        "truncated %": lambda row: share(row, lambda each: each["finish"] == "length"),
        "degenerate %": lambda row: share(row, lambda each: each["finish"] == "length" or looped(each)),
    }
    travels: list[Travel] = []
    for name, dial in dials.items():
        for last in sorted({1.0, max(alpha or 0.0 for alpha in dial)}):
            used = sorted(alpha for alpha in dial if alpha is not None and 0 <= alpha <= last)
            if len(used) > 2 and used[-1] == last:
                seeds = [seed for seed in dial[last] if all(seed in dial[alpha] for alpha in used)]
                by_seed = [[rough(name, alpha, {seed: dial[alpha][seed]}).tokens_mean for alpha in used] for seed in seeds]
                travels.append(Travel(name, used, [rough(name, alpha, dial[alpha]).tokens_mean for alpha in used], by_seed))
    how: dict[str, Callable[[Travel], str]] = {
        "system": lambda t: t.system,
        "from alpha to": lambda t: f"{t.alphas[0]:g} to {t.alphas[-1]:g}, {len(t.alphas)} positions",
        "Spearman": lambda t: number(spearman(t.alphas, t.tokens), 2),
        "strictly falling": lambda t: t.falls(),
        "log-length range in each tenth, %": lambda t: ", ".join(f"{round(100 * part):d}" for part in travel(t.alphas, t.tokens)),
        "largest": lambda t: f"{round(100 * max(travel(t.alphas, t.tokens), key=abs)):d}",
    }
    return ["The dial:", table(columns, rows, words=1), table(how, travels, words=2), *gaps_table(here, against, draws)]


def gaps_table(here: Measured, against: str, draws: int) -> list[str]:
    """All systems against one dial (the first, or --against) at its length; nothing where there is no other."""
    dials = dials_of(here)
    if not dials:
        return []
    first = against if against in dials else next(iter(dials))
    gaps = [(name, equal_length(dial, dials[first], draws)) for name, dial in here.systems.items() if name != first and 1.0 in dial]
    if not gaps:
        return []
    columns: dict[str, Callable[[tuple[str, Gap]], str]] = {
        "system": lambda gap: gap[0],
        f"points above {first} at equal length": lambda gap: str(gap[1]),
        "positions": lambda gap: f"{gap[1].compared} of {gap[1].positions}",
    }
    return [f"Accuracy at equal length, mean over the positions above 0 up to 1 whose chains are as long as some of {first}'s:", table(columns, gaps, words=1)]


@dataclass(frozen=True, slots=True)
class Gap:
    """Accuracy of one dial above another at equal length."""

    points: float | None
    """None where no position has a length that the other dial has too."""
    within: Interval
    compared: int
    positions: int

    def __str__(self) -> str:
        return DASH if self.points is None else f"{signed(self.points)} [{signed(self.within.low)} to {signed(self.within.high)}]"


def equal_length(a: Dial, b: Dial, draws: int) -> Gap:
    """Points by which `a` is above the curve of `b` at the same mean tokens, mean over the positions of `a` above 0 up to 1.

    The curve is straight in the logarithm of tokens between b's positions from 0 to 1 and those beyond that go on, by 3 % in
    length or more: where chains stand or turn back they only get worse. Positions of `a` whose chains are shorter than b's
    shortest or longer than its longest (by more than 2 %) have no equal and are left out.
    """
    # Of a dial with more seeds only those that both have: the interval is over these. (`drawn` refuses sides without any.)
    if both := set.intersection(*(set(seeds) for dial in (a, b) for seeds in dial.values())):
        a, b = ({alpha: {seed: seeds[seed] for seed in seeds if seed in both} for alpha, seeds in dial.items()} for dial in (a, b))
    dial = [(alpha, seeds) for alpha, seeds in sorted(b.items(), key=lambda each: each[0] or 0.0) if alpha is not None and alpha >= 0]
    way = np.abs(np.log([rough("", alpha, seeds).tokens_mean for alpha, seeds in dial]) - math.log(rough("", *dial[0]).tokens_mean))
    curve = [seeds for i, (alpha, seeds) in enumerate(dial) if alpha <= 1 or way[i] > way[:i].max() + 0.03]
    sides = [*curve, *(seeds for alpha, seeds in a.items() if alpha is not None and 0 < alpha <= 1)]
    known = len(curve)
    plain = [rough("", next(iter(seeds.values()))[0]["alpha"], seeds) for seeds in sides]
    lengths = np.array([p.tokens_mean for p in plain])
    least, most = lengths[:known].min() / 1.02, lengths[:known].max() * 1.02
    used = known + np.flatnonzero((lengths[known:] >= least) & (lengths[known:] <= most))

    def gap(accuracy: Floats, tokens: Floats) -> float:
        order, x = np.argsort(tokens[:known]), np.log(tokens)
        return float(np.mean(accuracy[used] - np.interp(x[used], x[order], accuracy[order])))

    if not len(used):
        return Gap(None, Interval(0.0, 0.0), 0, len(sides) - known)
    estimate = gap(np.array([p.accuracy for p in plain]), lengths)
    accuracy, tokens = drawn(sides, draws)
    gaps = np.array([gap(accuracy[:, i], tokens[:, i]) for i in range(accuracy.shape[1])])
    within = interval(gaps, estimate)
    if np.ptp(gaps) < 1e-9:  # every question has the gap of them all
        asked = {row["problem"] for rows in sides[0].values() for row in rows}
        within = widened(within, np.full(len(asked), estimate / 100))
    return Gap(estimate, within, len(used), len(sides) - known)


def document(folders: Sequence[Path], only: Sequence[str], against: str, loss: float, draws: int, subset: str = "", at: Sequence[float] = (),
             also: Mapping[Place, Place] | None = None, held_out: bool = False) -> str:  # fmt: skip
    """All tables, or those named, as Markdown; with `held_out` those of the held-out questions, whatever test set there is."""
    found = {place: here for place, here in read(folders, subset, also).items() if place[2] or not held_out}
    names = list(dict.fromkeys(name for name, _, _ in found))
    parts: list[str] = []
    for name in only or names:
        if name not in names:
            raise SettingError(unknown("table", name, names))
        held = [(dataset, here) for (other, dataset, apart), here in found.items() if other == name and apart]
        if len(held) > 1:
            raise DataError(f"table {name} has held-out questions of {', '.join(dataset for dataset, _ in held)}; positions are chosen on one set")
        tests = {dataset: here for (other, dataset, apart), here in found.items() if other == name and not apart}
        known = list(dict.fromkeys(system for here in tests.values() or [here for _, here in held] for system in here.systems))
        if against not in known:
            raise SettingError(unknown("system", against, known))
        for dataset, here in held if not tests else []:
            parts.append(f"## {name}: {len(questions(here)):,} held-out training questions of {dataset}, of no test set")
            parts.append(lines_table([line("", system, alpha, here, dataset, draws, against) for system, dial in here.systems.items() for alpha in sorted(dial, key=lambda a: a or 0.0)], against))
            parts += gaps_table(here, against, draws)
        for dataset, here in tests.items():
            if against not in here.systems:  # it was measured on others of them only
                continue
            plain = here.systems[PLAIN][None]
            parts.append(f"## {name}: {dataset}, {len(questions(here)):,} questions, {len(plain)} seed{'s' * (len(plain) > 1)}")
            for where, chosen in held:
                parts.append(f"Positions were chosen on {len(questions(chosen)):,} held-out training questions of {where}, over all seeds together.")
            parts += systems_tables(here, held[0][1] if held else None, dataset, against, loss, draws, at)
            parts += dial_tables(here, dataset, against, draws)
    return "\n\n".join(parts) + "\n"


def draw(folders: Sequence[Path], only: Sequence[str], draws: int, home: Path) -> list[Path]:
    """Accuracy against tokens, and tokens against alpha, of every table with a dial, all seeds together; gives the files."""
    made: list[Path] = []
    for (name, dataset, apart), here in read(folders).items():
        if apart or (only and name not in only) or all(None in dial for dial in here.systems.values()):
            continue
        points = [line("", system, alpha, here, dataset, draws).point for system, dial in here.systems.items() for alpha in dial]
        for kind, figure in (("curve", figures.curve), ("dial", figures.dial)):
            made.append(figures.save(figure(points), home / f"{name}-{dataset}-{kind}.png"))
    return made


def together(folders: Sequence[Path], curves: Sequence[str], draws: int, home: Path, also: Mapping[Place, Place] | None = None) -> list[Path]:
    """Accuracy against tokens of dials from several tables, LABEL=TABLE:SYSTEM each, beside the plain model of the first; gives the files."""
    found = read(folders, also=also)
    chosen = [(label, *place.partition(":")[::2]) for label, _, place in (curve.partition("=") for curve in curves)]
    made: list[Path] = []
    for dataset in dict.fromkeys(dataset for name, dataset, apart in found if name == chosen[0][1] and not apart):
        points = [line("", PLAIN, None, found[chosen[0][1], dataset, False], dataset, draws).point]
        for label, name, system in chosen:
            here = found.get((name, dataset, False), Measured())
            points += [replace(line("", system, alpha, here, dataset, draws).point, system=label) for alpha in here.systems.get(system, {}) if alpha]
        if {point.system for point in points} == {PLAIN, *(label for label, *_ in chosen)}:
            made.append(figures.save(figures.curve(points), home / f"together-{dataset}-curve.png"))
    if not made:
        raise SettingError(f"no data set has all of {', '.join(curves)}; a curve is LABEL=TABLE:SYSTEM")
    return made


def publish(folders: Sequence[Path], home: Path, texts: Sequence[str]) -> None:
    """What a repository keeps of run folders: settings, facts, counts, and rows, nearly all of whose bytes are the texts.

    `texts` names the sweeps, as FOLDER/STEP, that keep them.
    """
    # A run of `reward` has a folder for each of its rounds' two halves.
    places = ("*/run.json", "*/round-*/*/run.json", "*/extraction.json")
    for step, target in sorted({(path.parent, home / folder.name / path.parent.relative_to(folder)) for folder in folders for place in places for path in folder.glob(place)}):
        kept = [path for name in ("run.json", "train.json", "mix.json", "extraction.json") if (path := step / name).exists()]
        if (step / "rows.parquet").exists():
            rows = read_parquet(step / "rows.parquet")
            if f"{step.parent.name}/{step.name}" not in texts:
                rows = [{**{key: value for key, value in row.items() if key != "text"}, LOOPS: looped(row)} for row in rows]
            target.mkdir(parents=True, exist_ok=True)
            write_parquet(target / "rows.parquet", rows, level=19)
        elif len(kept) < 2 and not (step / "extraction.json").exists():
            continue  # not finished; an extraction has nothing else
        for path in kept:
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="the --out of cotvalve run, one for each seed")
    parser.add_argument("--table", action="append", default=[], help="only this one: main, table7, ...; can be given several times")
    parser.add_argument("--against", default=PLAIN, help="the system that all are compared with: at its alpha 1, and along its dial")
    parser.add_argument("--subset", default="", help="only the questions of this part of a test set: numeric, of asdiv")
    parser.add_argument("--loss", type=float, default=1.0, help="points of held-out accuracy that 'no loss' may cost")
    parser.add_argument("--at", type=float, nargs="+", default=[], help="further alphas for the main tables, marked as not chosen")
    parser.add_argument("--held-out", action="store_true", help="every position on the held-out questions, in place of the test sets: seeds that were measured on no other count too")
    parser.add_argument("--also", action="append", default=[], help="TABLE:SYSTEM=TABLE:SYSTEM, where the second is a further seed of the first under another name")
    parser.add_argument("--draws", type=int, default=1999, help="bootstrap resamples")
    parser.add_argument("--figures", type=Path, help="a folder for the figures")
    parser.add_argument("--curve", action="append", default=[], help="LABEL=TABLE:SYSTEM, a dial in one figure with the other --curve ones, in place of the tables")
    parser.add_argument("--publish", type=Path, help="a folder for the small parts of the runs, in place of the tables")
    parser.add_argument("--texts", action="append", default=[], help="FOLDER/STEP of a sweep that keeps its texts there; can be given several times")
    given = parser.parse_args()
    try:
        also = dict(pair_of_places(told) for told in given.also)
        if given.publish:
            publish(given.folders, given.publish, given.texts)
            return
        if given.curve:
            print(*together(given.folders, given.curve, given.draws, given.figures or Path(), also), sep="\n")
            return
        if given.figures:
            for path in draw(given.folders, given.table, given.draws, given.figures):
                print(path, file=sys.stderr)
        print(document(given.folders, given.table, given.against, given.loss, given.draws, given.subset, given.at, also, given.held_out))
    except CotvalveError as error:
        raise SystemExit(f"reproduction: {error}") from None


if __name__ == "__main__":
    main()
