"""Why a position loses: the questions that it gets wrong and the plain model right, by what happened in their chains.

    python benchmarks/losses.py results/reproduction/0/main-asdiv --system CoT-Valve --alpha 1

Takes a finished sweep whose rows have their texts. "Had it" counts chains that give the gold number as a result ("= 16")
and go on to another answer; it is looked for where the answer is a number.
"""

import argparse
import re
from pathlib import Path

from cotvalve.baselines import PLAIN
from cotvalve.errors import CotvalveError, DataError
from cotvalve.problems import load
from cotvalve.records import Json, read_json, read_parquet


def had_it(gold: str, text: str) -> bool:
    """Whether `gold` stands behind an equals sign, as a whole number of its own.

    >>> had_it("64", "75 - 11 = 64, 64 - 11 = 53"), had_it("6", "60 + 4 = 64"), had_it("6", "2 * 3 = $6.")
    (True, False, True)
    """
    return re.search(rf"=\s*\$?{re.escape(gold)}(?![\d.]*\d)", text) is not None


def losses(folder: Path, system: str, alpha: float, data_dir: str | None) -> list[str]:
    """One line for each data set of the sweep."""
    rows = read_parquet(folder / "rows.parquet")
    if "text" not in rows[0]:
        raise DataError(f"{folder}: its rows were published without their texts")
    split, said = read_json(folder / "run.json")["settings"]["split"], list[str]()
    for name in dict.fromkeys(row["dataset"] for row in rows):
        golds = {problem.id: problem for problem in load(name, split=split, data_dir=data_dir)}

        def at(who: str, where: float, name: str = name) -> dict[str, Json]:
            return {row["problem"]: row for row in rows if (row["dataset"], row["system"], row["alpha"]) == (name, who, where)}

        plain, here = at(PLAIN, 0.0), at(system, alpha)
        if not here:
            raise DataError(f"{folder}: has no {system} at alpha {alpha:g}")
        lost = [q for q in plain if plain[q]["correct"] and not here[q]["correct"]]
        won = sum(here[q]["correct"] and not plain[q]["correct"] for q in plain)
        numbers = [q for q in lost if golds[q].kind == "number"]
        others = sum(golds[q].kind != "number" for q in plain)
        said.append(
            f"{name}, {len(plain):,} questions: {system} at alpha {alpha:g} loses {len(lost)} that the plain model has, and wins {won}. Of those lost "
            f"{sum(here[q]['finish'] == 'length' for q in lost)} are cut, {len(lost) - len(numbers)} have no single number as their answer (as {others} of all "
            f"have none), and {sum(had_it(golds[q].answer, here[q]['text']) for q in numbers)} of the other {len(numbers)} had it and went on."
        )
    return said


def main() -> None:
    """Prints the lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="run folder of a sweep")
    parser.add_argument("--system", required=True)
    parser.add_argument("--alpha", type=float, required=True)
    parser.add_argument("--data-dir", help="folder with local copies of the data sets")
    given = parser.parse_args()
    try:
        print("\n".join(losses(given.folder, given.system, given.alpha, given.data_dir)))
    except CotvalveError as error:
        raise SystemExit(f"losses: {error}") from None


if __name__ == "__main__":
    main()
