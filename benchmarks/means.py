"""The mean of directions, exact: ranks stand side by side.

    python benchmarks/means.py runs/means/A+B A B

Alpha 1 of the mean moves the weights half of A's way and half of B's. recipes/reproduction/means.yaml sweeps such means.
"""

import sys
from functools import reduce
from operator import add
from pathlib import Path

from cotvalve import Direction


def mean(folders: list[str], out: str) -> Path:
    """Saves the mean of the directions in `folders` as `out`."""
    return (reduce(add, map(Direction.load, folders)) / len(folders)).save(out)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit("means.py OUT DIRECTION DIRECTION...: a folder to write, and two directions or more")
    print(mean(sys.argv[2:], sys.argv[1]))
