"""Rows of graded completions become points with intervals; two systems are compared on the same problems.

resampling.py says what a row holds and what counts as right. All intervals are 95 %. Every draw comes
from a generator seeded by the caller. Numpy only; nothing is fitted and no distribution is assumed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from cotvalve.errors import DataError, SettingError
from cotvalve.mathanswers import NOT_EQUAL
from cotvalve.resampling import Answers, Floats, Row, answers, interval, resamples, widened
from cotvalve.types import Interval, Point

DRAWS = 9_999
"""Bootstrap resamples; one less than a round number, so that the smallest p is 2 / 10,000."""

_NORMAL_975 = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Paired:
    """System `a` against system `b` on the same problems."""

    dataset: str
    a: str
    b: str
    problems: int
    accuracy_difference: float
    """a - b in percentage points."""
    accuracy_difference_ci: Interval
    """Paired bootstrap over problems, as wide as none of them that differ, or with one completion each a handful, leave it open."""
    accuracy_p: float
    """Two-sided, from the same bootstrap."""
    only_a: int | None
    """Problems that only `a` got right; None when either side has several completions per problem."""
    only_b: int | None
    mcnemar_p: float | None
    """Exact, two-sided; None like `only_a`."""
    token_ratio: float
    """Mean tokens of a / mean tokens of b."""
    token_ratio_ci: Interval
    """Paired bootstrap of the logarithm of the ratio."""
    token_p: float
    accuracy_mean_a: float
    """In percent."""
    accuracy_mean_b: float


def acu(accuracy_percent: float, billions_of_parameters: float, mean_tokens: float) -> float:
    """Accuracy per computation unit, eq. 5, in the paper's unit of 10^2.

    >>> round(acu(95.1, 32, 741.1), 2), round(acu(94.9, 32, 225.5), 2)  # table 1: QwQ; CoT-Valve+P
    (0.4, 1.32)
    """
    for name, value in (("billions of parameters", billions_of_parameters), ("mean tokens", mean_tokens)):
        if not (value > 0 and math.isfinite(value)):
            raise SettingError(f"ACU (eq. 5) divides by {name}: given {value}, expected a number above 0")
    return 100 * accuracy_percent / (billions_of_parameters * mean_tokens)


def wilson(correct: int, total: int) -> Interval:
    """Wilson's 95 % interval of a share, in percent; stays inside 0 to 100 and is never empty.

    >>> wilson(10, 10).high, round(wilson(10, 10).low, 2)
    (100.0, 72.25)
    """
    if not 0 <= correct <= total or total == 0:
        raise SettingError(f"{correct} right of {total}: expected 0 <= right <= total and a total above 0")
    share, z2 = correct / total, _NORMAL_975**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = _NORMAL_975 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    # The ends are exact in the formula; floating point leaves them a hair inside.
    low = 0.0 if correct == 0 else 100 * (centre - half)
    high = 100.0 if correct == total else 100 * (centre + half)
    return Interval(low, high)


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided McNemar test: p of so uneven a split of the problems that only one side got right.

    >>> mcnemar(5, 1), mcnemar(0, 0)
    (0.21875, 1.0)
    """
    if only_a < 0 or only_b < 0:
        raise SettingError(f"McNemar's test counts problems: given {only_a} and {only_b}, expected 0 or more of each")
    discordant, fewer = only_a + only_b, min(only_a, only_b)
    term = tail = 1
    for k in range(1, fewer + 1):
        term = term * (discordant - k + 1) // k
        tail += term
    return min(1.0, 2 * tail / 2**discordant)


def point(
    system: str,
    dataset: str,
    alpha: float | None,
    rows: Sequence[Row],
    billions_of_parameters: float,
    *,
    seed: int = 0,
    draws: int = DRAWS,
) -> Point:
    """The point that `rows` (all of one system at `alpha` on one data set) make.

    Accuracy has Wilson's interval when there is one completion per problem, else a bootstrap over problems;
    lengths always have the bootstrap. Raises DataError for no rows, a missing key, a row of another alpha,
    a completion that is there twice, or problems with unequal numbers of completions.
    """
    where = f"{system} on {dataset} at alpha {alpha}"
    table = answers(rows, where)
    for row in rows:
        if row["alpha"] != alpha:
            raise DataError(
                f"{where}: problem '{row['problem']}' has a row of alpha {row['alpha']}; give one alpha's rows"
            )
    problems, samples = table.right_P_S.shape
    correct = int(table.right_P_S.sum())
    ran = int(table.ran_P_S.sum())
    mean = float(table.tokens_P_S.sum() / ran) if ran else 0.0
    reasoning = sum(row["reasoning_tokens"] for row in rows if row["finish"] != "error") / max(ran, 1)
    median = float(np.median(table.tokens_P_S[table.ran_P_S > 0])) if ran else 0.0
    accuracy = 100 * correct / (problems * samples)
    accuracies, means, medians = _resampled_point(table, seed, draws)
    if samples == 1:
        accuracy_ci = wilson(correct, problems)
    elif len(shares := set(table.right_P_S.mean(1).tolist())) == 1:
        # Resampling equal values gives an interval of width 0; count each problem once instead.
        accuracy_ci = wilson(round(shares.pop() * problems), problems)
    else:
        accuracy_ci = interval(accuracies, accuracy)
    return Point(
        system=system,
        dataset=dataset,
        alpha=alpha,
        problems=problems,
        correct=correct,
        accuracy=accuracy,
        accuracy_ci=accuracy_ci,
        tokens_mean=mean,
        tokens_mean_ci=interval(means, mean),
        tokens_median=median,
        tokens_median_ci=interval(medians, median),
        reasoning_tokens=reasoning,
        answer_tokens=mean - reasoning,
        truncated=sum(row["finish"] == "length" for row in rows),
        # What was cut is counted as such; a wrong answer that could be read and compared has this one reason.
        unreadable=sum(row["finish"] == "stop" and not row["correct"] and row["reason"] != NOT_EQUAL for row in rows),
        acu=acu(accuracy, billions_of_parameters, mean) if mean else 0.0,
        samples=samples,
    )


def points(
    system: str, dataset: str, rows: Sequence[Row], billions_of_parameters: float, *, seed: int = 0, draws: int = DRAWS
) -> tuple[Point, ...]:
    """A point for every alpha in `rows`, ascending; then the same for each subset, as data set 'name (subset)'."""
    parts: list[tuple[str, Sequence[Row]]] = [(dataset, rows)]
    subsets = {str(row.get("subset", "")) for row in rows}
    for name in sorted(subsets - {""}):
        parts.append((f"{dataset} ({name})", [row for row in rows if row.get("subset") == name]))
    made: list[Point] = []
    for name, part in parts:
        for alpha in _alphas(part):
            here = [row for row in part if row["alpha"] == alpha]
            made.append(point(system, name, alpha, here, billions_of_parameters, seed=seed, draws=draws))
    return tuple(made)


def paired(
    a_rows: Sequence[Row],
    b_rows: Sequence[Row],
    *,
    dataset: str,
    a: str,
    b: str,
    seed: int = 0,
    draws: int = DRAWS,
) -> Paired:
    """`a` against `b`: accuracy difference and token ratio with intervals, and McNemar's exact test.

    Raises DataError when the two sides do not hold the same problems.
    """
    left, right = answers(a_rows, f"{a} on {dataset}"), answers(b_rows, f"{b} on {dataset}")
    if left.problems != right.problems:
        apart = sorted(set(left.problems) ^ set(right.problems))
        side = a if apart[0] in left.problems else b
        raise DataError(
            f"{a} and {b} on {dataset} hold different problems ({len(apart)} of them, the first is '{apart[0]}', "
            f"only in {side}); a paired test needs the same problems on both sides"
        )
    alone = left.right_P_S.shape[1] == right.right_P_S.shape[1] == 1
    difference_P = left.right_P_S.mean(1) - right.right_P_S.mean(1)
    better, worse = int((difference_P > 0).sum()), int((difference_P < 0).sum())
    differences, log_ratios = _resampled_pair(left, right, seed, draws)
    accuracy_a, accuracy_b = 100 * float(left.right_P_S.mean()), 100 * float(right.right_P_S.mean())
    ci = interval(differences, accuracy_a - accuracy_b)
    if alone or np.ptp(differences) < 1e-9:  # resampling equal values gives no width: each problem is counted once instead
        ci = widened(ci, difference_P)
    log_ratio = _log_ratio(left, right, np.ones((1, len(left.problems))))[0]
    ratio_ci = interval(log_ratios, log_ratio)
    return Paired(
        dataset=dataset,
        a=a,
        b=b,
        problems=len(left.problems),
        accuracy_difference=accuracy_a - accuracy_b,
        accuracy_difference_ci=ci,
        accuracy_p=_p(differences, better + worse),
        only_a=better if alone else None,
        only_b=worse if alone else None,
        mcnemar_p=mcnemar(better, worse) if alone else None,
        token_ratio=math.exp(log_ratio),
        token_ratio_ci=Interval(math.exp(ratio_ci.low), math.exp(ratio_ci.high)),
        token_p=_p(log_ratios, len(left.problems)),
        accuracy_mean_a=accuracy_a,
        accuracy_mean_b=accuracy_b,
    )


def paired_over_grid(
    a_rows: Sequence[Row],
    b_rows: Sequence[Row],
    *,
    dataset: str,
    a: str,
    b: str,
    seed: int = 0,
    draws: int = DRAWS,
) -> Paired:
    """`a` against `b` in mean accuracy, and tokens, over the whole alpha grid; alphas weigh the same.

    Problems are resampled with all their alphas, since one problem's answers along the dial are not
    independent. Raises DataError when the grids or the problems differ.
    """
    grids = _alphas(a_rows), _alphas(b_rows)
    if grids[0] != grids[1]:
        raise DataError(f"{a} has alphas {grids[0]}, {b} has {grids[1]}; compare them over the same grid")
    sides = [[{**row, "sample": (row["alpha"], row["sample"])} for row in rows] for rows in (a_rows, b_rows)]
    pair = paired(sides[0], sides[1], dataset=dataset, a=a, b=b, seed=seed, draws=draws)
    return replace(pair, a=f"{a}, mean over the dial", b=f"{b}, mean over the dial")


def spearman(alphas: Sequence[float], tokens: Sequence[float]) -> float:
    """Rank correlation of alpha and length, ties at their mean rank; -1 means tokens fall all the way.

    0 when either side is constant: a dial that changes nothing orders nothing.

    >>> spearman([0, 0.25, 0.5, 1], [296, 130, 105, 95])
    -1.0
    """
    if len(alphas) != len(tokens) or len(alphas) < 2:
        raise SettingError(
            f"rank correlation of {len(alphas)} alphas and {len(tokens)} lengths: expected as many, 2 or more"
        )
    ranks = [_ranks(np.asarray(values, dtype=np.float64)) for values in (alphas, tokens)]
    x, y = (rank - rank.mean() for rank in ranks)
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return round(float(x @ y) / scale, 12) if scale else 0.0


def travel(alphas: Sequence[float], tokens: Sequence[float], parts: int = 10) -> tuple[float, ...]:
    """How the dial's travel spreads: the share of the whole log-length range in each tenth of the alphas' range.

    Between two alphas, log length is taken as linear. Shares are positive where length moves the way it
    moves from end to end, negative where it turns back; without a turn they sum to 1. An even dial has .1
    everywhere; .9 in the first place is a dial whose whole effect sits in its first tenth.

    >>> [round(share, 2) for share in travel([0, 0.5, 1], [400, 200, 100], parts=4)]
    [0.25, 0.25, 0.25, 0.25]
    """
    if len(alphas) != len(tokens) or len(set(alphas)) != len(alphas) or len(alphas) < 2:
        raise SettingError(
            f"travel needs 2 or more different alphas with a length each: given {list(alphas)}, {list(tokens)}"
        )
    if min(tokens) <= 0:
        raise SettingError(f"travel is of the logarithm of length: given {min(tokens)} tokens, expected above 0")
    order = np.argsort(np.asarray(alphas, dtype=np.float64))
    x, y = np.asarray(alphas, dtype=np.float64)[order], np.log(np.asarray(tokens, dtype=np.float64)[order])
    span = float(y.max() - y.min())
    if span == 0:
        return (0.0,) * parts
    way = -1.0 if y[-1] < y[0] else 1.0
    ends: Floats = np.interp(np.linspace(float(x[0]), float(x[-1]), parts + 1), x, y)
    return tuple(way * float(after - before) / span for before, after in pairwise(ends))


def _resampled_point(table: Answers, seed: int, draws: int) -> tuple[Floats, Floats, Floats]:
    """Accuracy in percent of every resample; mean tokens and median tokens of those in which anything ran."""
    right_P, ran_P = table.right_P_S.sum(1), table.ran_P_S.sum(1)
    tokens_P, samples = table.tokens_P_S.sum(1), table.right_P_S.shape[1]
    owner, lengths = np.nonzero(table.ran_P_S)[0], table.tokens_P_S[table.ran_P_S > 0]
    order = np.argsort(lengths, kind="stable")
    owner, lengths = owner[order], np.append(lengths[order], 0.0)
    accuracies, means, medians = list[Floats](), list[Floats](), list[Floats]()
    for counts in resamples(len(right_P), seed, draws):
        accuracies.append(100 * (counts @ right_P) / (samples * len(right_P)))
        total = counts @ ran_P
        counts, total = counts[total > 0], total[total > 0]
        means.append(counts @ tokens_P / total)
        below = counts[:, owner].cumsum(1, dtype=np.int32)
        middle = [(below <= rank[:, None]).sum(1) for rank in ((total - 1) // 2, total // 2)]
        medians.append((lengths[middle[0]] + lengths[middle[1]]) / 2)
    return np.concatenate(accuracies), np.concatenate(means), np.concatenate(medians)


def _log_ratio(a: Answers, b: Answers, counts: Floats) -> Floats:
    """Log of mean tokens of `a` over that of `b` in each resample; 0 where either side has no length."""
    sums = [counts @ values.sum(1) for values in (a.tokens_P_S, a.ran_P_S, b.tokens_P_S, b.ran_P_S)]
    known = np.minimum.reduce(sums) > 0
    a_tokens, a_ran, b_tokens, b_ran = (np.log(np.where(known, value, 1.0)) for value in sums)
    return (a_tokens - a_ran) - (b_tokens - b_ran)


def _resampled_pair(a: Answers, b: Answers, seed: int, draws: int) -> tuple[Floats, Floats]:
    """Accuracy difference in points and log token ratio of every resample, both sides drawn together."""
    difference_P = 100 * (a.right_P_S.mean(1) - b.right_P_S.mean(1))
    found = [
        (counts @ difference_P / len(difference_P), _log_ratio(a, b, counts))
        for counts in resamples(len(difference_P), seed, draws)
    ]
    return np.concatenate([one for one, _ in found]), np.concatenate([two for _, two in found])


def _p(draws: Floats, problems: int) -> float:
    """Two-sided p of 'no difference': twice the smaller share of resamples on either side of 0.

    At least what the signs of so many problems that differ can show: three of them, all one way, are no p below 1/4.
    """
    # Sums of equal numbers in another order differ in the last bits; that is 0, not a side.
    tiny = 1e-9
    fewer = min(int((draws <= tiny).sum()), int((draws >= -tiny).sum()))
    return min(1.0, max(2 * (1 + fewer) / (1 + len(draws)), 2.0 ** (1 - problems)))


def _alphas(rows: Sequence[Row]) -> list[float | None]:
    found = {row["alpha"] for row in rows}
    return sorted(found, key=lambda alpha: -math.inf if alpha is None else alpha)


def _ranks(values: Floats) -> Floats:
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(sizes)
    return (last - (sizes - 1) / 2)[group]
