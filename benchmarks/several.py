"""Several dials at once: what they do to a set of questions, or how they differ from other dials on it.

    python benchmarks/several.py results/reproduction/mathsteps0/{bold,bolder}-math500 results/reproduction/mathsteps0/{bold,bolder}-heldout --alphas 1
    python benchmarks/several.py results/reproduction/mathsteps0/ended-heldout --against results/reproduction/mathsteps{0,1}/bolder-heldout

A sweep of a run folder is named by its step, and all its dials count, each alike. Their mean is taken question by question, beside
the plain model of the same sweeps, or beside the mean of the sweeps that --against names at the same position: at positions that all
of the dials have, on questions of a set that all of its dials answered. One dial of many is chosen by luck as well; the mean over all
of them is not. The last line of a set is the mean over its positions, and sweeps of several sets are told together too, every question
alike. Intervals are 95 %, over questions (bootstrap): the dials are held as they are, so they say what other questions would show and
not what other training would.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cotvalve.baselines import PLAIN  # noqa: E402
from cotvalve.errors import CotvalveError, DataError  # noqa: E402
from cotvalve.figures import alpha_label  # noqa: E402
from cotvalve.records import Json, read_json, read_parquet  # noqa: E402
from cotvalve.report import number, signed, span, table  # noqa: E402
from cotvalve.resampling import Floats, interval, resamples, widened  # noqa: E402
from cotvalve.types import Interval  # noqa: E402

Dial = dict[float, dict[str, list[float]]]
"""By position and question what `values` gives."""
MEASURES = ("right", "tokens", "truncated")


@dataclass(frozen=True, slots=True)
class Compared:
    """Two sides on the same questions: P questions by the three MEASURES."""

    where: str
    asked: int
    """Questions that any of the dials answered."""
    position: str
    ours_P_3: Floats
    theirs_P_3: Floats


def side(steps: Sequence[Path], plain: bool) -> dict[str, list[Dial]]:
    """The dials of these sweeps by data set, or in place of each the plain model of its sweep, which is the same at every position."""
    found: dict[str, list[Dial]] = {}
    if len({step.resolve() for step in steps}) < len(steps):
        raise DataError("a sweep is named twice, and its dials would count twice")
    for step in steps:
        if not (step / "rows.parquet").exists():
            raise DataError(f"{step}: no rows.parquet; name a finished sweep's folder, as results/reproduction/0/main-gsm8k")
        split = read_json(step / "run.json")["settings"]["split"]
        systems: dict[tuple[str, str], dict[float, dict[str, list[Json]]]] = {}
        for row in read_parquet(step / "rows.parquet"):
            if row["finish"] == "error":
                raise DataError(f"{step}: question {row['problem']} could not be run; finish the sweep")
            systems.setdefault((row["dataset"], row["system"]), {}).setdefault(row["alpha"], {}).setdefault(row["problem"], []).append(row)
        for (dataset, system), dial in systems.items():
            positions = [alpha for alpha in dial if alpha]  # control by prompt has none
            if system == PLAIN or not positions:
                continue
            if plain:
                dial = dict.fromkeys(positions, systems[dataset, PLAIN][0.0])
            own = {alpha: {name: values(rows) for name, rows in dial[alpha].items()} for alpha in positions}
            found.setdefault(dataset if split == "test" else f"{dataset} {split}", []).append(own)
    return found


def values(rows: Sequence[Json]) -> list[float]:
    """A question's share of right and of truncated chains, and its mean tokens."""
    right = [bool(row["correct"]) and row["finish"] == "stop" for row in rows]
    return [float(np.mean(each)) for each in (right, [row["tokens"] for row in rows], [row["finish"] == "length" for row in rows])]


def compared(steps: Sequence[Path], against: Sequence[Path], alphas: Sequence[float], prefix: str = "") -> list[Compared]:
    """Each set at each position and over all of them, then the sets together; only questions whose ids begin with `prefix`."""
    ours, theirs = side(steps, plain=False), side(against or steps, plain=not against)
    if apart := sorted(ours.keys() ^ theirs.keys()):
        raise DataError(f"only one side has a sweep of {apart[0]}; name one for the other too, or none")
    dials = {where: [*ours[where], *theirs[where]] for where in ours}
    if not dials:
        raise DataError("no sweep has a dial: a direction at a position other than 0")
    places = sorted(set.intersection(*(set(dial) for own in dials.values() for dial in own)))
    all_have = f"all have {', '.join(f'{alpha:g}' for alpha in places)}" if places else "they have none in common"
    if missing := [alpha for alpha in alphas if alpha not in places]:
        raise DataError(f"not every dial has alpha {missing[0]:g}; {all_have}")
    used = [alpha for alpha in places if (alpha in alphas if alphas else alpha > 0)]
    if not used:
        raise DataError(f"the dials have no position above 0 in common; {all_have}")
    answered = {where: [{name for name in at if name.startswith(prefix)} for dial in own for at in dial.values()] for where, own in dials.items()}
    asked = {where: len(set.union(*each)) for where, each in answered.items()}
    names = {where: sorted(set.intersection(*each)) for where, each in answered.items() if asked[where]}
    if not names:
        raise DataError(f"no question has an id that begins with '{prefix}'")
    if alone := [where for where, each in names.items() if not each]:
        raise DataError(f"no question of {alone[0]} was answered by all of its dials")
    found: list[Compared] = []
    for where, sets in [*((where, [where]) for where in names), *[("together", [*names])] * (len(names) > 1)]:
        for at in [*[[alpha] for alpha in used], *[used] * (len(used) > 1)]:
            both = [
                np.array([np.mean([dial[alpha][name] for dial in each[one] for alpha in at], axis=0) for one in sets for name in names[one]])
                for each in (ours, theirs)
            ]
            found.append(Compared(where, sum(asked[one] for one in sets), alpha_label(at[0]) if len(at) == 1 else "all of them", *both))
    return found


def changes(here: Compared, draws: int) -> dict[str, tuple[float, Interval]]:
    """Points of accuracy, times shorter and points of truncated chains, of the first side against the second."""

    def all_three(drawn: Floats) -> Floats:
        ours, theirs = (drawn @ each / len(each) for each in (here.ours_P_3, here.theirs_P_3))
        return np.stack([100 * (ours[:, 0] - theirs[:, 0]), theirs[:, 1] / ours[:, 1], 100 * (ours[:, 2] - theirs[:, 2])])

    problems = len(here.ours_P_3)
    seen = all_three(np.ones((1, problems)))[:, 0]
    drawn = np.concatenate([all_three(block) for block in resamples(problems, 0, draws)], axis=1)
    found: dict[str, tuple[float, Interval]] = {}
    for column, (name, estimate, own) in enumerate(zip(MEASURES, seen, drawn, strict=True)):
        ends = interval(own, float(estimate))
        if name != "tokens" and np.ptp(own) < 1e-9:  # resamples of equal values have no width, which no sample of questions gives
            ends = widened(ends, here.ours_P_3[:, column] - here.theirs_P_3[:, column])
        found[name] = float(estimate), ends
    return found


def tables(steps: Sequence[Path], against: Sequence[Path], alphas: Sequence[float], draws: int, prefix: str = "") -> str:
    """The table, with a line above it that says what was compared."""
    lines = compared(steps, against, alphas, prefix)
    told = {id(line): changes(line, draws) for line in lines}

    def mean(line: Compared, column: int, digits: int = 1) -> str:
        scale = 1 if MEASURES[column] == "tokens" else 100
        return f"{number(scale * line.ours_P_3[:, column].mean(), digits)}, {number(scale * line.theirs_P_3[:, column].mean(), digits)}"

    def change(line: Compared, name: str) -> str:
        estimate, ends = told[id(line)][name]
        return f"{number(estimate, 2)} [{span(ends, 2)}]" if name == "tokens" else f"{signed(estimate)} [{signed(ends.low)} to {signed(ends.high)}]"

    def data(line: Compared) -> str:
        used = len(line.ours_P_3)
        return f"{line.where}, {used:,}" + f" of {line.asked:,}" * (used < line.asked)

    columns = {
        "data": data,
        "alpha": lambda line: line.position,
        "accuracy %": lambda line: mean(line, 0),
        "points": lambda line: change(line, "right"),
        "tokens": lambda line: mean(line, 1),
        "times shorter": lambda line: change(line, "tokens"),
        "truncated %": lambda line: mean(line, 2),
        "points of truncated": lambda line: change(line, "truncated"),
    }
    other = f"the mean over those of {len(against)} other sweeps" if against else "the plain model of each sweep"
    return f"The mean over the dials of {len(steps)} sweeps, {other} behind the comma:\n\n{table(columns, lines, words=2)}"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("steps", type=Path, nargs="+", help="sweeps of run folders, as results/reproduction/0/main-gsm8k")
    parser.add_argument("--against", type=Path, nargs="+", default=[], help="other sweeps of the same questions, in place of the plain model")
    parser.add_argument("--alphas", type=float, nargs="+", default=[], help="only these positions; all above 0 without it")
    parser.add_argument("--questions", default="", metavar="PREFIX", help="only questions whose ids begin with this, as prm12k/test/")
    parser.add_argument("--draws", type=int, default=1999, help="bootstrap resamples")
    given = parser.parse_args()
    try:
        print(tables(given.steps, given.against, given.alphas, given.draws, given.questions))
    except CotvalveError as error:
        raise SystemExit(f"several: {error}") from None


if __name__ == "__main__":
    main()
