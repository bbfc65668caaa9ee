"""What the demo has to reach, printed: its time, tokens along alpha, and CoT-Valve++ against plain CoT-Valve.

    python benchmarks/demo.py --seeds 0            # what `make demo` does
    python benchmarks/demo.py --seeds 0 1 2        # how far it depends on the seed

Aims: 5 minutes or less on 2 cores with packages already there; tokens strictly falling along alpha 0, .25, .5, .75, 1 for
both; ++ above plain in mean accuracy over the grid, with its 95 % interval. Nothing here is asserted.
"""

import argparse
import json
import resource
import time
from itertools import pairwise
from pathlib import Path

from cotvalve.pipeline import demo


def main() -> None:
    """Runs the demo for each seed and prints one block per seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo-benchmark"), help="one folder per seed goes into it")
    options = parser.parse_args()
    for seed in options.seeds:
        began = time.monotonic()
        folder = demo(options.out / f"seed-{seed}", seed)
        seconds = time.monotonic() - began
        found = json.loads((folder / "points.json").read_text())
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"seed {seed}: {seconds:.0f} s (a folder that was finished before takes seconds), peak memory {memory:.1f} GB")
        for system in ("CoT-Valve", "CoT-Valve++"):
            curve = [p for p in found["points"] if p["system"] == system and p["dataset"] == "arithmetic"]
            tokens = [p["tokens_mean"] for p in curve]
            falls = all(a > b for a, b in pairwise(tokens))
            print(f"  {system}: " + ", ".join(f"{p['alpha']:g}: {p['tokens_mean']:.1f} tokens {p['accuracy']:.1f} %" for p in curve))
            print(f"    tokens strictly falling: {'yes' if falls else 'NO'}")
        for pair in found["paired"]:
            if "mean over the dial" in pair["a"] and pair["dataset"] == "arithmetic":
                low, high = pair["accuracy_difference_ci"]["low"], pair["accuracy_difference_ci"]["high"]
                print(f"  {pair['a']} - {pair['b']}: {pair['accuracy_difference']:+.1f} points [{low:+.1f} to {high:+.1f}], "
                      f"tokens x {pair['token_ratio']:.2f}, {pair['problems']} questions")  # fmt: skip


if __name__ == "__main__":
    main()
