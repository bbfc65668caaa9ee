"""Whether two engines give the same accuracy: two sweeps of the same questions, paired question by question where both have a position.

    cotvalve sweep --model MODEL --direction CoT-Valve=D --data gsm8k --split heldout --limit 300 \\
        --alphas 0,0.25,0.5,0.75,1 --engine transformers --out runs/own
    (the same with --engine vllm --out runs/vllm)
    python benchmarks/agreement.py runs/own runs/vllm

In bf16 greedy chains of two engines part where two tokens are nearly as likely, so texts differ and accuracies may not.
Prints, for each position, the second engine against the first with 95 % intervals (bootstrap over questions).
"""

import argparse
from pathlib import Path

from cotvalve.errors import CotvalveError, DataError
from cotvalve.figures import DASH, alpha_label
from cotvalve.records import Json, read_parquet
from cotvalve.report import number, signed, span, table
from cotvalve.statistics import Paired, paired
from cotvalve.types import Interval


def positions(folder: Path) -> dict[tuple[str, float], dict[str, Json]]:
    """Rows by system and alpha, then by problem."""
    found: dict[tuple[str, float], dict[str, Json]] = {}
    for row in read_parquet(folder / "rows.parquet"):
        if row["alpha"] is not None:
            found.setdefault((row["system"], row["alpha"]), {})[row["problem"]] = row
    return found


def compare(first: Path, second: Path, draws: int) -> str:
    """The table, as Markdown."""
    a, b = positions(first), positions(second)
    common = [at for at in a if at in b]
    if not common or any(a[at].keys() != b[at].keys() for at in common):
        raise DataError(f"{first} and {second}: hold other questions, or no position in common")
    # Alpha 0 stands in a sweep twice: as the plain model and at the start of the dial.
    turned = [at for at in common if at[1] != 0 or at == common[0]]
    pairs = [
        (at, paired(list(b[at].values()), list(a[at].values()), dataset="", a="second", b="first", draws=draws)) for at in turned
    ]  # fmt: skip
    right = {at: [sum(row["correct"] for row in side[at].values()) for side in (a, b)] for at in turned}
    # Published rows may be without their texts.
    texts = {at: [(a[at][name].get("text"), b[at][name].get("text")) for name in a[at]] for at in turned}
    same = {at: DASH if any(None in pair for pair in both) else str(sum(one == two for one, two in both)) for at, both in texts.items()}

    def times(pair: Paired) -> str:
        ends = pair.token_ratio_ci
        return f"{number(pair.token_ratio, 2)} [{span(Interval(ends.low, ends.high), 2)}]"

    return table(
        {
            "system": lambda row: row[0][0],
            "alpha": lambda row: alpha_label(row[0][1]),
            "right": lambda row: ", ".join(map(str, right[row[0]])),
            "of": lambda row: str(len(a[row[0]])),
            "same text": lambda row: same[row[0]],
            "points": lambda row: f"{signed(row[1].accuracy_difference)} [{signed(row[1].accuracy_difference_ci.low)} to {signed(row[1].accuracy_difference_ci.high)}]",
            "tokens, times": lambda row: times(row[1]),
        },
        pairs,
        words=1,
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", type=Path, nargs=2, help="run folders of two sweeps")
    parser.add_argument("--draws", type=int, default=9999, help="bootstrap resamples")
    given = parser.parse_args()
    try:
        print(compare(*given.folders, given.draws))
    except CotvalveError as error:
        raise SystemExit(f"agreement: {error}") from None


if __name__ == "__main__":
    main()
