"""Several dials at once: what they do to a set of questions, or how they differ from other dials on it.

    python benchmarks/several.py results/reproduction/mathsteps0/{bold,bolder}-math500 results/reproduction/mathsteps0/{bold,bolder}-heldout --alphas 1
    python benchmarks/several.py results/reproduction/mathsteps0/ended-heldout --against results/reproduction/mathsteps{0,1}/bolder-heldout

A sweep of a run folder is named by its step, and all its dials count. Their mean is taken question by question, beside the
plain model of the same sweeps, or beside the mean of the sweeps that --against names at the same position. One dial of many is
chosen by luck as well; the mean over all of them is not. The last line of a set is the mean over its positions, and sweeps of several
sets are told together too, every question alike. Intervals are 95 %, over questions (bootstrap): the dials are held as they
are, so they say what other questions would show and not what other training would.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cotvalve.baselines import PLAIN, PROMPTED  # noqa: E402
from cotvalve.errors import CotvalveError, DataError  # noqa: E402
from cotvalve.figures import alpha_label  # noqa: E402
from cotvalve.records import Json, read_parquet  # noqa: E402
from cotvalve.report import number, signed, span, table  # noqa: E402
from cotvalve.resampling import Floats, interval, resamples  # noqa: E402
from cotvalve.types import Interval  # noqa: E402

Place = tuple[str, float]
"""A data set and a position."""
MEASURES = ("right", "tokens", "truncated")


@dataclass(frozen=True, slots=True)
class Compared:
    """Two sides on the same questions: P questions by the three MEASURES."""

    where: str
    position: str
    ours_P_3: Floats
    theirs_P_3: Floats


def side(steps: Sequence[Path], plain: bool) -> dict[str, dict[Place, list[Json]]]:
    """Rows by question, data set and position, of all dials of these sweeps or of their plain models."""
    found: dict[str, dict[Place, list[Json]]] = {}
    for step in steps:
        if not (step / "rows.parquet").exists():
            raise DataError(f"{step}: no rows.parquet; name a finished sweep's folder, as results/reproduction/0/main-gsm8k")
        rows = read_parquet(step / "rows.parquet")
        steered = {(row["system"], row["alpha"]) for row in rows if row["system"] != PLAIN and not row["system"].startswith(PROMPTED) and row["alpha"]}
        for row in rows:
            if row["finish"] == "error":
                raise DataError(f"{step}: question {row['problem']} could not be run; finish the sweep")
            own = [place for place in steered if place == (row["system"], row["alpha"])]
            # Once for every dial that is compared with it, so that both sides weigh the sweeps alike.
            for _, alpha in [place for place in steered if row["system"] == PLAIN] if plain else own:
                found.setdefault(row["problem"], {}).setdefault((row["dataset"], alpha), []).append(row)
    return found


def values(rows: Sequence[Json]) -> list[float]:
    """A question's share of right and of truncated chains, and its mean tokens."""
    right = [bool(row["correct"]) and row["finish"] == "stop" for row in rows]
    return [float(np.mean(each)) for each in (right, [row["tokens"] for row in rows], [row["finish"] == "length" for row in rows])]


def compared(steps: Sequence[Path], against: Sequence[Path], alphas: Sequence[float], prefix: str = "") -> list[Compared]:
    """Each set at each position and over all of them, then the sets together; only questions whose ids begin with `prefix`."""
    ours, theirs = side(steps, plain=False), side(against or steps, plain=not against)
    shared = {name for name in ours.keys() & theirs.keys() if name.startswith(prefix)}
    if not shared:
        raise DataError(f"no question in common whose id begins with '{prefix}'" if prefix else "the two sides have no question in common")
    places = sorted(set.intersection(*({alpha for _, alpha in each[name]} for name in shared for each in (ours, theirs))))
    if missing := [alpha for alpha in alphas if alpha not in places]:
        raise DataError(f"not every sweep has alpha {missing[0]:g}; all have {', '.join(f'{alpha:g}' for alpha in places)}")
    used = [alpha for alpha in places if not alphas or alpha in alphas]
    named = {name: next(iter(ours[name]))[0] for name in sorted(shared)}
    sets = list(dict.fromkeys(named.values()))
    found: list[Compared] = []
    for where in [*sets, *["together"] * (len(sets) > 1)]:
        names = [name for name, own in named.items() if where in (own, "together")]
        for at in [*[[alpha] for alpha in used], *[used] * (len(used) > 1)]:
            both = [np.array([np.mean([values(each[name][named[name], alpha]) for alpha in at], axis=0) for name in names]) for each in (ours, theirs)]
            found.append(Compared(where, alpha_label(at[0]) if len(at) == 1 else "all of them", *both))
    return found


def changes(here: Compared, draws: int) -> dict[str, tuple[float, Interval]]:
    """Points of accuracy, times shorter and points of truncated chains, of the first side against the second."""

    def all_three(drawn: Floats) -> Floats:
        ours, theirs = (drawn @ each / len(each) for each in (here.ours_P_3, here.theirs_P_3))
        return np.stack([100 * (ours[:, 0] - theirs[:, 0]), theirs[:, 1] / ours[:, 1], 100 * (ours[:, 2] - theirs[:, 2])])

    problems = len(here.ours_P_3)
    seen = all_three(np.ones((1, problems)))[:, 0]
    drawn = np.concatenate([all_three(block) for block in resamples(problems, 0, draws)], axis=1)
    return {name: (float(estimate), interval(own, float(estimate))) for name, estimate, own in zip(MEASURES, seen, drawn, strict=True)}


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

    columns = {
        "data": lambda line: f"{line.where}, {len(line.ours_P_3):,}",
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
