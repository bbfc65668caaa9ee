"""Graded rows as an array of answers, resampled by problem: what the statistics stand on.

A row is a mapping with these keys, one row for each completion:

    problem           id of the problem
    alpha             position of the valve, None for a system without a dial
    sample            0, 1, ... among the completions of this problem at this alpha
    tokens            generated ids
    reasoning_tokens  those of them up to and including the end-of-thinking mark
    finish            'stop', 'length' (truncated) or 'error' (could not be run)
    correct           what grading said
    predicted         the answer that was read, None when none was found
    reason            why it is wrong, empty when right (not used here)
    subset            a part of the data set that is also reported on its own, or empty

A completion is right when grading says so and the model ended its turn: truncated and errored ones are
wrong and stay in the denominator. Lengths are of completions that ran: an error has no length, not length 0.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cotvalve.errors import DataError
from cotvalve.types import Interval

Row = Mapping[str, Any]
Floats = NDArray[np.float64]

_BLOCK = 2**17
"""Array elements of one block of resamples: 1 MB, which stays in the cache."""
_NEEDED = ("problem", "alpha", "sample", "tokens", "reasoning_tokens", "finish", "correct", "predicted")


@dataclass(frozen=True, slots=True)
class Answers:
    """One system's completions, P problems by S samples; errors have 0 in `tokens` and `ran`."""

    problems: tuple[str, ...]
    right_P_S: Floats
    tokens_P_S: Floats
    ran_P_S: Floats


def answers(rows: Sequence[Row], where: str) -> Answers:
    """The rows as arrays; `where` names them in an error. Raises DataError for rows that do not make a full table."""
    if not rows:
        raise DataError(f"{where}: no rows; a point needs at least one graded completion")
    by_problem: dict[str, dict[Any, Row]] = {}
    for number, row in enumerate(rows, 1):
        for key in _NEEDED:
            if key not in row:
                raise DataError(f"{where}: row {number} has no '{key}'; a row needs {', '.join(_NEEDED)}")
        samples = by_problem.setdefault(str(row["problem"]), {})
        if row["sample"] in samples:
            raise DataError(f"{where}: problem '{row['problem']}' has sample {row['sample']} twice")
        samples[row["sample"]] = row
    problems = tuple(sorted(by_problem))
    width = len(by_problem[problems[0]])
    for problem in problems:
        if len(by_problem[problem]) != width:
            raise DataError(
                f"{where}: problem '{problem}' has {len(by_problem[problem])} completions, '{problems[0]}' has "
                f"{width}; finish the run, so that every problem has as many"
            )
    table = [list(by_problem[problem].values()) for problem in problems]
    ran = np.array([[row["finish"] != "error" for row in line] for line in table], dtype=np.float64)
    right = np.array(
        [[bool(row["correct"]) and row["finish"] == "stop" for row in line] for line in table], dtype=np.float64
    )
    tokens = np.array([[row["tokens"] for row in line] for line in table], dtype=np.float64)
    return Answers(problems, right, tokens * ran, ran)


def resamples(problems: int, seed: int, draws: int) -> Iterator[Floats]:
    """Blocks [draws, P] of how often each problem was drawn; a problem brings all its completions."""
    random = np.random.default_rng(seed)
    block = max(1, _BLOCK // problems)
    for start in range(0, draws, block):
        size = min(block, draws - start)
        drawn = random.integers(0, problems, size=(size, problems)) + problems * np.arange(size)[:, None]
        yield np.bincount(drawn.ravel(), minlength=size * problems).reshape(size, problems).astype(np.float64)


def interval(draws: Floats, estimate: float) -> Interval:
    """The middle 95 % of `draws` of an estimate; nothing but the estimate where there are none."""
    if not len(draws):
        return Interval(estimate, estimate)
    low, high = (float(end) for end in np.quantile(draws, (0.025, 0.975)))
    # Percentiles of few, skewed problems can miss the estimate by a step; an interval has to hold it.
    return Interval(min(low, estimate), max(high, estimate))


def widened(within: Interval, difference_P: Floats) -> Interval:
    """A bootstrap interval of a mean difference in points, reaching to what so few changed problems cannot exclude.

    Resamples of no loss show none, and of a handful too little; so many problems leave room for this much. A problem counts
    by the share of its samples that changed. Resamples of equal values show nothing but that value, whatever it is.

    >>> ends = widened(Interval(0.0, 0.0), np.zeros(400))
    >>> round(ends.low, 2), round(ends.high, 2)
    (-0.92, 0.92)
    """
    problems = len(difference_P)
    if within.high - within.low < 1e-9:
        mean, room = float(difference_P.mean()), at_most(0, problems)
        low, high = max(mean - room, -1.0), min(mean + room, 1.0)
    else:
        few = 5
        gained, lost = (float(np.maximum(side, 0).sum()) for side in (difference_P, -difference_P))
        # To the next whole problem; thirds of one may add up to a hair more.
        most = [at_most(min(math.ceil(changed - 1e-9), few), problems) for changed in (lost, gained)]
        low, high = gained / problems - most[0], most[1] - lost / problems
    return Interval(min(within.low, 100 * low), max(within.high, 100 * high))


def at_most(lost: int, questions: int) -> float:
    """The share that may be lost where so many of these questions were: exact (Clopper-Pearson), one-sided 2.5 %.

    >>> round(at_most(0, 400), 5), round(at_most(1, 400), 5), at_most(3, 3)
    (0.00918, 0.01385, 1.0)
    """
    if lost == questions:
        return 1.0

    def fewer(share: float) -> float:
        """The probability of no more losses than were seen."""
        logs = (math.lgamma(questions + 1) - math.lgamma(k + 1) - math.lgamma(questions - k + 1)
                + k * math.log(share) + (questions - k) * math.log1p(-share) for k in range(lost + 1))  # fmt: skip
        return sum(map(math.exp, logs))

    low, high = lost / questions, 1.0
    for _ in range(60):
        low, high = ((low + high) / 2, high) if fewer((low + high) / 2) > 0.025 else (low, (low + high) / 2)
    return high
