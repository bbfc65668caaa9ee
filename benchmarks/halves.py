"""A set whose own questions choose: what a user gets who calibrates on half of them, told on the other half.

    python benchmarks/halves.py results/reproduction/steps0 --data asdiv
    python benchmarks/halves.py results/reproduction/0 results/reproduction/2 --data asdiv --table main

ASDiv has no training questions, and those of GSM8K choose positions that are too short for it. So its questions are
parted in two, at random; the position that one half chooses (the fewest tokens among those that lose at most --loss points
on it) is told on the other, and the other way round: every question is told at a position that it had no say in. That is
done for --splits such halves, and a line is the mean over them; beside it how often which position was chosen. The last
line chooses the dial as well. A folder is one seed; intervals as in benchmarks/reproduction.py, over questions (and
seeds) with the choices as they fell.
"""

import argparse
import hashlib
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.reproduction import Measured, Seeds, line, lines_table, part, questions, read, rough  # noqa: E402
from cotvalve.baselines import PLAIN, PROMPTED  # noqa: E402
from cotvalve.errors import CotvalveError, DataError, SettingError, unknown  # noqa: E402
from cotvalve.figures import alpha_label  # noqa: E402

Place = tuple[str, str, float | None]
"""A table, one of its systems, and a position."""


def halves(ids: set[str], seed: int) -> tuple[set[str], set[str]]:
    """The questions in two halves, which depend on their names and the seed alone.

    >>> a, b = halves(set("uvwxyz"), 0)
    >>> len(a), len(b), sorted(a | b)
    (3, 3, ['u', 'v', 'w', 'x', 'y', 'z'])
    """
    order = sorted(ids, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).hexdigest())
    return set(order[::2]), set(order[1::2])


def choice(found: dict[str, Measured], places: Sequence[Place], ids: set[str], loss: float) -> Place:
    """The place with the fewest tokens among those that lose at most `loss` points on these questions; the most accurate if none does."""
    at = {place: rough(place[1], place[2], part(found[place[0]].systems[place[1]][place[2]], ids)) for place in places}
    least = {table: rough(PLAIN, None, part(here.systems[PLAIN][None], ids)).accuracy - loss for table, here in found.items()}
    safe = [place for place in places if at[place].accuracy >= least[place[0]] - 1e-9]
    return min(safe, key=lambda place: at[place].tokens_mean) if safe else max(places, key=lambda place: at[place].accuracy)


def tables(folders: Sequence[Path], data: str, only: Sequence[str], loss: float, draws: int, splits: int) -> str:
    """Each dial at the positions that halves chose, and the dial that they chose."""
    found = {table: here for (table, dataset, apart), here in read(folders).items() if dataset == data and not apart}
    if missing := [table for table in only if table not in found]:
        raise SettingError(unknown("table", missing[0], list(found)))
    found = {table: here for table, here in found.items() if not only or table in only}
    if not found:
        raise DataError(f"{', '.join(map(str, folders))}: no sweep of {data} in it")
    places = [
        (table, system, alpha) for table, here in found.items() for system, dial in here.systems.items()
        if system != PLAIN and not system.startswith(PROMPTED) for alpha in dial
    ]  # fmt: skip
    first = next(iter(found.values()))
    seeds = set(first.systems[PLAIN][None])
    if other := next((f"{table}: {system}" for table, system, alpha in places if set(found[table].systems[system][alpha]) != seeds), None):
        raise DataError(f"{other} is not in every folder; a folder is a seed, so give those of one recipe")
    asked = {table: questions(here) for table, here in found.items()}
    ids = next(iter(asked.values()))
    if other := next((table for table, own in asked.items() if own != ids), None):
        raise DataError(f"table {other} has other questions of {data} than {next(iter(asked))}; name one with --table")
    lines = [line("", PLAIN, None, first, data, draws, PLAIN)]
    dials = list(dict.fromkeys(place[:2] for place in places))
    for name, own in [*((f"{table}: {system}", [p for p in places if p[:2] == (table, system)]) for table, system in dials), ("any of them", places)]:
        here, plain, often = Seeds(), Seeds(), Counter[str]()
        for split in range(splits):
            both = halves(ids, split)
            for judge, told in (both, both[::-1]):
                table, system, alpha = choice(found, own, judge, loss)
                often[alpha_label(alpha) if name != "any of them" else f"{table}: {system}, {alpha_label(alpha)}"] += 1
                for rows, into in ((found[table].systems[system][alpha], here), (found[table].systems[PLAIN][None], plain)):
                    for folder, some in part(rows, told).items():
                        # Samples of a question, one from each split.
                        into.setdefault(folder, []).extend({**row, "alpha": None, "sample": (split, row["sample"])} for row in some)
        joined = Measured({PLAIN: {None: plain}, name: {None: here}}, billions=first.billions)
        first_three = often.most_common(3)
        others = often.total() - sum(count for _, count in first_three)
        where = "; ".join(f"{place} ({100 * count / often.total():.0f} %)" for place, count in [*first_three, *[("others", others)] * (others > 0)])
        lines.append(line(where, name, None, joined, data, draws, PLAIN))
    return f"{data}, {len(ids):,} questions in two halves, {splits} times; what each half chose, told on the other:\n\n{lines_table(lines, PLAIN)}"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="the --out of cotvalve run, one for each seed")
    parser.add_argument("--data", default="asdiv", help="the set whose questions choose")
    parser.add_argument("--table", action="append", default=[], help="only this one; can be given several times")
    parser.add_argument("--loss", type=float, default=1.0, help="points that a position may lose on the half that chooses")
    parser.add_argument("--draws", type=int, default=1999, help="bootstrap resamples")
    parser.add_argument("--splits", type=int, default=20, help="how often to part the questions")
    given = parser.parse_args()
    try:
        print(tables(given.folders, given.data, given.table, given.loss, given.draws, given.splits))
    except CotvalveError as error:
        raise SystemExit(f"halves: {error}") from None


if __name__ == "__main__":
    main()
