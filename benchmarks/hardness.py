"""Who pays for short chains: what a dial costs on easy and on hard questions.

    python benchmarks/hardness.py results/reproduction/0 results/reproduction/1 --table main --system CoT-Valve++ --alphas 0.5,1

Questions are put in thirds by the length of their human solution, which no model had a say in, or (--by answer) by what
their gold answer is: a number, a list of numbers, a word, a ratio, a time. A folder is one seed; intervals as in
benchmarks/reproduction.py. Needs the data sets for the solutions and answers (--data, COTVALVE_DATA, or the hub).
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.reproduction import Line, Measured, line, lines_table, part, questions, read  # noqa: E402
from cotvalve.baselines import PLAIN  # noqa: E402
from cotvalve.errors import CotvalveError, DataError  # noqa: E402
from cotvalve.problems import load  # noqa: E402
from cotvalve.types import Problem  # noqa: E402

THIRDS = ("short solutions", "middle", "long solutions")


def thirds(problems: Sequence[Problem]) -> list[set[str]]:
    """Ids of the questions whose solutions are short, of middle length, and long.

    >>> from dataclasses import replace
    >>> one = load("arithmetic", limit=1)[0]
    >>> [sorted(third) for third in thirds([replace(one, id=str(n), solution="x" * n) for n in (9, 1, 5, 7, 3)])]
    [['1'], ['3', '5'], ['7', '9']]
    """
    if not any(problem.solution for problem in problems):
        raise DataError("these questions come without human solutions; gsm8k and math500 have them")
    order = [problem.id for problem in sorted(problems, key=lambda problem: (len(problem.solution), problem.id))]
    ends = [len(order) * i // 3 for i in range(4)]
    return [set(order[a:b]) for a, b in pairwise(ends)]


def answers(problems: Sequence[Problem]) -> dict[str, set[str]]:
    """Ids of the questions with each kind of answer, the most frequent kind first; empty when all are of one kind.

    >>> from dataclasses import replace
    >>> one = load("arithmetic", limit=1)[0]
    >>> kinds = {str(n): kind for n, kind in enumerate(("word", "number", "number"))}
    >>> {kind: sorted(ids) for kind, ids in answers([replace(one, id=n, kind=kind) for n, kind in kinds.items()]).items()}
    {'number': ['1', '2'], 'word': ['0']}
    """
    often = Counter(problem.kind for problem in problems).most_common()
    return {kind: {problem.id for problem in problems if problem.kind == kind} for kind, _ in often} if len(often) > 1 else {}


def solutions(problems: Sequence[Problem]) -> dict[str, set[str]]:
    """Ids of the questions of each third; empty when they come without human solutions."""
    return dict(zip(THIRDS, thirds(problems), strict=True)) if any(problem.solution for problem in problems) else {}


PARTS: dict[str, Callable[[Sequence[Problem]], dict[str, set[str]]]] = {"solution": solutions, "answer": answers}


def among(here: Measured, ids: set[str]) -> Measured:
    """What was measured on the questions `ids`."""
    return replace(here, systems={system: {alpha: part(seeds, ids) for alpha, seeds in dial.items()} for system, dial in here.systems.items()})


def tables(folders: Sequence[Path], table: str, systems: Sequence[str], alphas: Sequence[float], draws: int, data_dir: str | None, by: str = "solution") -> str:
    """One table for each data set that can be parted so; a system may have been measured on some of them only."""
    parts: list[str] = []
    tests = {dataset: here for (name, dataset, held), here in read(folders).items() if name == table and not held}
    known = list(dict.fromkeys(system for here in tests.values() for system in here.systems))
    if tests and (missing := [system for system in systems if system not in known]):
        raise DataError(f"there is no '{missing[0]}' in table {table}; it has {', '.join(known)}")
    for dataset, here in tests.items():
        if PLAIN not in here.systems:
            raise DataError(f"table {table} has no {PLAIN} on {dataset}, which the others stand against; sweep it there")
        # A sweep with a limit answered some of them: thirds and counts are of those.
        asked = questions(here)
        problems = [problem for problem in load(dataset, split="test", data_dir=data_dir) if problem.id in asked]
        lines: list[Line] = []
        for label, ids in PARTS[by](problems).items():
            some = among(here, ids)
            label = f"{label} ({len(ids):,})" if by == "answer" else label
            lines.append(line(label, PLAIN, None, some, dataset, draws))
            for system in systems:
                if system not in some.systems:
                    continue
                lines += [line(label, system, alpha, some, dataset, draws, PLAIN) for alpha in alphas if alpha in some.systems[system]]
        if lines:
            how = "in thirds" if by == "solution" else "by kind of answer"
            parts.append(f"{dataset}, {len(problems):,} questions {how}:\n\n{lines_table(lines, PLAIN)}")
    if not parts:
        what = "human solutions" if by == "solution" else "several kinds of answers"
        raise DataError(f"no sweep of table '{table}' on a set with {what} in {', '.join(map(str, folders))}")
    return "\n\n".join(parts)


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="run folders of recipes/reproduction/, one for each seed")
    parser.add_argument("--table", default="main")
    parser.add_argument("--system", action="append", required=True, help="can be given several times")
    parser.add_argument("--alphas", default="0.5,1")
    parser.add_argument("--by", choices=PARTS, default="solution", help="how questions are parted")
    parser.add_argument("--draws", type=int, default=1999, help="bootstrap resamples")
    parser.add_argument("--data", help="folder with local copies of the data sets")
    given = parser.parse_args()
    try:
        print(tables(given.folders, given.table, given.system, [float(part) for part in given.alphas.split(",")], given.draws, given.data, given.by))
    except CotvalveError as error:
        raise SystemExit(f"hardness: {error}") from None


if __name__ == "__main__":
    main()
