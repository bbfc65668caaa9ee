"""Writes cotvalve/assets/unseen.json: digests of all questions of the test sets and the held-out training questions.

    PYTHONPATH=. python benchmarks/unseen.py --data-dir FOLDER

Run it again when a data set is added. A question that stands in two sets is listed under the first.
"""

import argparse
import json
from pathlib import Path

from cotvalve import problems
from cotvalve.problems import unseen

EVALUATED = ("test", "validation", problems.HELD_OUT)
"""Splits that results are reported on or things are chosen on."""


def digests(data_dir: str | None) -> dict[str, str]:
    """The joined digests by set and split, each digest once."""
    seen: set[str] = set()
    found: dict[str, str] = {}
    for name in problems.NAMES:
        for split in (*problems.splits(name), problems.HELD_OUT):
            if split not in EVALUATED or (split == problems.HELD_OUT and "train" not in problems.splits(name)):
                continue
            new = {unseen.key(problem.question) for problem in problems.load(name, split=split, data_dir=data_dir)} - seen
            seen |= new
            found[f"{name} {split}"] = "".join(sorted(new))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder with local copies of the data sets")
    path = Path(__file__).parent.parent / "cotvalve" / unseen.ASSET
    path.write_text(json.dumps(digests(parser.parse_args().data_dir), indent=0) + "\n", encoding="utf-8")
    print(path)
