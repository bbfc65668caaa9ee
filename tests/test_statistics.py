"""The statistics against the paper's printed values, hand-computed ones and brute force."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotvalve import resampling, statistics
from cotvalve.errors import DataError, SettingError
from cotvalve.resampling import answers, resamples
from cotvalve.statistics import acu, mcnemar, paired, paired_over_grid, point, points, spearman, travel, wilson
from cotvalve.types import Interval

AIME = 100 / 30

# (table and row, accuracy in percent, billions of parameters, mean tokens, ACU as printed)
PRINTED_ACU = [
    ("1 Llama-3.3-70B-Instruct", 92.6, 70, 235.4, "0.56"),
    ("1 Llama-3.1-405B-Instruct", 95.6, 405, 186.7, "0.13"),
    ("1 Qwen2.5-32B-Instruct", 93.1, 32, 269.3, "1.09"),
    ("1 Qwen2.5-Math-72B-Instruct", 95.8, 72, 312.1, "0.43"),
    ("1 QwQ-32B-Preview", 95.1, 32, 741.1, "0.40"),
    ("1 Prompt (Han)", 93.6, 32, 355.5, "0.82"),
    ("1 Prompt (Ding)", 95.5, 32, 617.7, "0.48"),
    ("1 CoT-Valve ground truth", 94.0, 32, 352.8, "0.83"),
    ("1 CoT-Valve++ MixChain-C", 94.4, 32, 276.3, "1.07"),
    ("1 CoT-Valve+P 4..1", 96.1, 32, 317.1, "0.95"),
    ("1 CoT-Valve+P 4..0", 94.9, 32, 225.5, "1.32"),
    ("1 Overthink SFT", 94.8, 32, 749.5, "0.40"),
    ("1 Overthink SimPO", 94.8, 32, 326.2, "0.91"),
    ("1 O1-Pruner SFT", 95.7, 32, 717, "0.42"),
    ("1 O1-Pruner", 96.5, 32, 534, "0.56"),
    ("1 CoT-Valve+P PRM12K", 95.4, 32, 288.5, "1.03"),
    ("2 Qwen2.5-32B-Instruct", 4 * AIME, 32, 1794.2, "0.023"),
    ("2 Qwen2.5-Math-72B-Instruct", 7 * AIME, 72, 1204.5, "0.061"),
    ("2 QwQ-32B-Preview", 14 * AIME, 32, 6827.3, "0.021"),
    ("2 Prompt (Han)", 13 * AIME, 32, 6102.5, "0.022"),
    ("2 Prompt (Ding)", 13 * AIME, 32, 5562.3, "0.024"),
    ("2 Overthink", 13 * AIME, 32, 5154.5, "0.026"),
    ("2 CoT-Valve GSM8K", 14 * AIME, 32, 5975.0, "0.024"),
    ("2 CoT-Valve++ MixChain-C", 13 * AIME, 32, 5360.5, "0.025"),
    ("2 CoT-Valve+P MixChain-Z", 13 * AIME, 32, 4629.6, "0.029"),
    ("2 Qwen-32B-LIMO", 15 * AIME, 32, 10498.2, "0.015"),
    ("2 LIMO CoT-Valve", 11 * AIME, 32, 6365.2, "0.018"),
    ("2 LIMO SFT solution 1", 13 * AIME, 32, 5368.0, "0.025"),
    ("2 LIMO CoT-Valve solution 1", 15 * AIME, 32, 8174.8, "0.019"),
    ("4 8-shot", 45.9, 1, 104.3, "44.008"),
    ("4 0-shot", 45.9, 1, 199.8, "22.973"),
    ("4 SFT full GSM8k", 46.1, 1, 139.4, "33.070"),
    ("4 SFT GSM8k", 43.8, 1, 137.7, "31.808"),
    ("4 Prompt", 46.7, 1, 209.9, "22.249"),
    ("4 SFT QwQ distill", 52.7, 1, 759.3, "6.941"),
    ("4 CoT-Valve QwQ distill", 55.5, 1, 267.0, "20.786"),
    ("4 CoT-Valve+P MixChain-Z", 55.8, 1, 291.0, "19.175"),
    ("4 SFT solution 1", 57.0, 1, 288.4, "19.764"),
    ("4 CoT-Valve solution 1", 58.9, 1, 275.4, "21.387"),
    ("5 8-shot", 56.9, 8, 282.1, "2.521"),
    ("5 0-shot", 15.7, 8, 915.0, "0.214"),
    ("5 SFT-LoRA GSM8k", 59.0, 8, 191.9, "3.843"),
    ("5 SFT-LoRA QwQ distill", 76.3, 8, 644.8, "1.479"),
    ("5 CoT-Valve QwQ distill", 77.5, 8, 569.8, "1.700"),
    ("5 CoT-Valve+P MixChain-Z", 77.1, 8, 371.2, "2.596"),
    ("5 CoT-Valve solution 1", 75.7, 8, 264.1, "3.583"),
    ("7 solution 4", 95.68, 32, 597.3, "0.50"),
    ("7 solutions 4..3", 94.84, 32, 458.4, "0.65"),
    ("7 solutions 4..2", 94.84, 32, 339.9, "0.87"),
    ("7 solutions 4..1", 96.13, 32, 317.1, "0.95"),
    ("7 solutions 4..0", 94.92, 32, 225.5, "1.32"),
    ("7 solution 0 direct", 92.19, 32, 250.5, "1.15"),
    ("11 K+V", 95.0, 32, 687.7, "0.43"),
    ("11 Q", 95.2, 32, 621.4, "0.48"),
    ("11 O", 95.2, 32, 484.2, "0.61"),
    ("11 Attention", 94.2, 32, 284.2, "1.04"),
    ("11 MLP", 93.5, 32, 221.8, "1.32"),
    ("11 All linear", 92.4, 32, 227.6, "1.27"),
]
MISPRINTS = {"1 Qwen2.5-32B-Instruct": 1.08, "2 Qwen2.5-Math-72B-Instruct": 0.027}


def row(problem, tokens=10, correct=True, alpha=0.0, sample=0, finish="stop", predicted="1", reasoning=0, subset=""):
    return {
        "problem": problem,
        "alpha": alpha,
        "sample": sample,
        "tokens": tokens,
        "reasoning_tokens": reasoning,
        "finish": finish,
        "correct": correct,
        "predicted": predicted,
        "reason": "",
        "subset": subset,
    }


def many(right, tokens, alpha=0.0, sample=0):
    return [row(f"p{i}", t, bool(r), alpha, sample) for i, (r, t) in enumerate(zip(right, tokens, strict=True))]


@pytest.mark.parametrize(
    ("name", "accuracy", "billions", "tokens", "printed"), PRINTED_ACU, ids=[r[0] for r in PRINTED_ACU]
)
def test_acu_is_the_papers_but_for_its_two_misprints(name, accuracy, billions, tokens, printed):
    # Accuracy and tokens are printed with one digit, so the printed ACU can stem from anything within these ends.
    half_digit = 0.5 * 10 ** -len(printed.split(".")[1])
    low = acu(accuracy - 0.05, billions, tokens + 0.05) - half_digit
    high = acu(accuracy + 0.05, billions, tokens - 0.05) + half_digit
    assert (low <= float(printed) <= high) is (name not in MISPRINTS)
    if name in MISPRINTS:
        assert low <= MISPRINTS[name] <= high


def test_the_acu_table_is_whole():
    assert len(PRINTED_ACU) == 58
    assert len({name for name, *_ in PRINTED_ACU}) == 58


@pytest.mark.parametrize("given_values", [(50, 0, 10), (50, -1, 10), (50, 1, 0), (50, math.nan, 10), (50, 1, math.inf)])
def test_acu_refuses_to_divide_by_nothing(given_values):
    with pytest.raises(SettingError, match="expected a number above 0"):
        acu(*given_values)


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    # Newcombe 1998, method 3, table I, and the closed forms of the two ends.
    [(81, 263, 25.53, 36.62), (15, 148, 6.24, 16.05), (0, 20, 0, 16.11), (1, 29, 0.61, 17.18), (30, 30, 88.65, 100)],
)
def test_wilson_is_the_published_interval(correct, total, low, high):
    interval = wilson(correct, total)
    assert interval.low == pytest.approx(low, abs=0.006)
    assert interval.high == pytest.approx(high, abs=0.006)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_wilson_covers_the_truth_as_often_as_it_says(share):
    # Exact, by the binomial's own probabilities; Wilson's coverage swings round .95 and stays above .92 here.
    total = 240
    chance = [math.comb(total, k) * share**k * (1 - share) ** (total - k) for k in range(total + 1)]
    covered = sum(p for k, p in enumerate(chance) if wilson(k, total).low <= 100 * share <= wilson(k, total).high)
    assert 0.92 < covered < 0.98


@given(st.integers(1, 2000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_wilson_holds_its_estimate_and_mirrors(counts):
    correct, total = counts
    interval, mirror = wilson(correct, total), wilson(total - correct, total)
    assert 0 <= interval.low <= 100 * correct / total <= interval.high <= 100
    assert interval.low < interval.high
    assert interval.low == pytest.approx(100 - mirror.high, abs=1e-9)


@pytest.mark.parametrize("counts", [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(counts):
    with pytest.raises(SettingError, match="expected 0 <= right <= total"):
        wilson(*counts)


def test_mcnemar_is_the_binomial_test():
    for a in range(12):
        for b in range(12):
            n = a + b
            likelier = sum(math.comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= abs(a - b))
            assert mcnemar(a, b) == likelier / 2**n
    assert mcnemar(0, 10) == 2 / 1024
    assert mcnemar(3000, 2700) == mcnemar(2700, 3000) == pytest.approx(7.5e-5, rel=0.05)  # normal: z = 3.96


def test_a_point_counts_everything_by_hand():
    rows = [
        row("a", 10, True, reasoning=4),
        row("b", 20, False, predicted="2", reasoning=6),
        row("c", 60, True, finish="length", reasoning=60),
        row("d", 0, True, finish="error", predicted=None),
        row("e", 30, False, predicted=None),
    ]
    made = point("valve", "set", 0.0, rows, 2.0, draws=99)
    assert (made.problems, made.correct, made.samples) == (5, 1, 1)
    assert made.accuracy == 20.0
    assert made.accuracy_ci == wilson(1, 5)
    assert made.tokens_mean == (10 + 20 + 60 + 30) / 4
    assert made.tokens_median == 25.0
    assert made.reasoning_tokens == 70 / 4
    assert made.answer_tokens == 30 - 70 / 4
    assert (made.truncated, made.unreadable) == (1, 2)
    assert made.acu == 100 * 20 / (2 * 30)


def test_resampled_statistics_equal_a_plain_loop():
    rows = [row(f"p{i}", 3 + 7 * i * (s + 1) % 23, (i + s) % 3 == 0, sample=s) for i in range(6) for s in range(3)]
    rows[4]["finish"] = "error"
    table = answers(rows, "here")
    found = statistics._resampled_point(table, 5, 50)
    draw = 0
    for counts in resamples(6, 5, 50):
        for line in counts:
            taken = np.repeat(np.arange(6), line.astype(int))
            ran = table.ran_P_S[taken] > 0
            assert len(taken) == 6
            assert found[0][draw] == pytest.approx(100 * table.right_P_S[taken].mean())
            assert found[1][draw] == pytest.approx(table.tokens_P_S[taken][ran].mean())
            assert found[2][draw] == np.median(table.tokens_P_S[taken][ran])
            draw += 1
    assert draw == 50


def test_bootstrap_of_the_mean_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(0)
    truth, hits, trials = math.exp(5 + 0.5**2 / 2), 0, 200
    for _ in range(trials):
        made = point("s", "d", 0.0, many([1] * 80, random.lognormal(5, 0.5, 80)), 1, draws=399)
        hits += made.tokens_mean_ci.low <= truth <= made.tokens_mean_ci.high
    assert 0.90 <= hits / trials <= 0.99  # .95 give or take three standard errors of 200 trials


def test_several_samples_are_clustered_by_problem():
    # Four samples that always agree are one answer: the interval must not shrink as if there were four.
    random = np.random.default_rng(1)
    right, tokens = random.random(60) < 0.5, random.integers(50, 150, 60)
    once = point("s", "d", 0.0, many(right, tokens), 1)
    rows = [one for sample in range(4) for one in many(right, tokens, sample=sample)]
    four = point("s", "d", 0.0, rows, 1)
    assert four.samples == 4
    assert four.correct == 4 * once.correct
    assert four.tokens_mean_ci == once.tokens_mean_ci
    width = four.accuracy_ci.high - four.accuracy_ci.low
    assert width == pytest.approx(once.accuracy_ci.high - once.accuracy_ci.low, rel=0.12)
    assert width > 1.7 * (wilson(four.correct, 240).high - wilson(four.correct, 240).low)


def test_all_right_in_several_samples_is_not_certainty():
    rows = [row(f"p{i}", sample=s) for i in range(10) for s in range(4)]
    assert point("s", "d", 0.0, rows, 1, draws=99).accuracy_ci == wilson(10, 10)


def test_resamples_of_errors_alone_have_no_length():
    """They had length 0: one question of three that did not fit the context took the interval of the others' 30 and 40 down to 0, its median's to 15."""
    rows = [row("a", 30), row("b", 40), row("c", 0, False, finish="error", predicted=None)]
    made = point("s", "d", 0.0, rows, 1)
    assert (made.tokens_mean_ci, made.tokens_median_ci) == (Interval(30, 40), Interval(30, 40))


def test_nothing_ran():
    made = point("s", "d", 0.0, [row("a", 0, False, finish="error", predicted=None)], 1, draws=99)
    assert (made.accuracy, made.tokens_mean, made.tokens_median, made.acu) == (0, 0, 0, 0)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 5000)), min_size=1, max_size=25))
def test_every_interval_holds_its_estimate(cells):
    made = point("s", "d", 0.0, many(*zip(*cells, strict=True)), 1, draws=60)
    for low, estimate, high in (
        (made.accuracy_ci.low, made.accuracy, made.accuracy_ci.high),
        (made.tokens_mean_ci.low, made.tokens_mean, made.tokens_mean_ci.high),
        (made.tokens_median_ci.low, made.tokens_median, made.tokens_median_ci.high),
    ):
        assert low <= estimate <= high


def test_an_interval_reaches_to_its_estimate():
    draws = np.array([2.0, 3.0])
    assert [(found.low, found.high) for found in (resampling.interval(draws, 1.0), resampling.interval(draws, 4.0))] == [(1.0, 2.975), (2.025, 4.0)]


def test_the_seed_decides_and_the_order_of_rows_does_not():
    rows = many([1, 0, 1, 1, 0, 1], [5, 90, 30, 41, 7, 66])
    first = point("s", "d", 0.0, rows, 1, seed=3, draws=199)
    assert point("s", "d", 0.0, rows[::-1], 1, seed=3, draws=199) == first
    assert point("s", "d", 0.0, rows, 1, seed=4, draws=199) != first


def test_points_by_alpha_and_subset():
    rows = [row(f"p{i}", alpha=a, subset="numeric" if i < 2 else "") for a in (1.0, 0.0) for i in range(3)]
    made = points("valve", "asdiv", rows, 1, draws=49)
    assert [(p.dataset, p.alpha, p.problems) for p in made] == [
        ("asdiv", 0.0, 3),
        ("asdiv", 1.0, 3),
        ("asdiv (numeric)", 0.0, 2),
        ("asdiv (numeric)", 1.0, 2),
    ]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "no rows"),
        ([{"problem": "a"}], "row 1 has no 'alpha'"),
        ([row("a"), row("a")], "problem 'a' has sample 0 twice"),
        ([row("a"), row("a", sample=1), row("b")], "problem 'b' has 1 completions, 'a' has 2"),
        ([row("a"), row("b", alpha=0.5)], "problem 'b' has a row of alpha 0.5"),
    ],
)
def test_rows_that_do_not_make_a_point_are_refused(rows, said):
    with pytest.raises(DataError, match=said):
        point("s", "d", 0.0, rows, 1)


def test_paired_by_hand():
    a = many([1, 1, 1, 0, 1], [10, 10, 10, 10, 10])
    b = many([1, 0, 0, 1, 1], [20, 20, 20, 20, 20])
    pair = paired(a, b, dataset="d", a="A", b="B", draws=999)
    assert (pair.only_a, pair.only_b, pair.mcnemar_p) == (2, 1, 1.0)
    assert pair.accuracy_difference == pytest.approx(20)
    assert pair.token_ratio == pytest.approx(0.5)
    assert (pair.token_ratio_ci.low, pair.token_ratio_ci.high) == pytest.approx((0.5, 0.5))
    assert pair.token_p == 2 / 2**5, "five questions that all go one way: what their signs can show, and not 2 of 1,000 draws"
    assert pair.accuracy_p > 0.3


def test_few_problems_that_differ_leave_the_difference_open():
    """Ends of 0.0 and 0.0 where all agreed: of two systems a fifth of a point apart, every second pair of runs on 400 problems."""
    same = paired([row(i) for i in range(400)], [row(i) for i in range(400)], dataset="d", a="a", b="b", draws=99)
    room = 100 * (1 - 0.025 ** (1 / 400))
    assert (same.accuracy_difference_ci.low, same.accuracy_difference_ci.high) == pytest.approx((-room, room))
    one = paired([row(i, correct=i > 0) for i in range(400)], [row(i) for i in range(400)], dataset="d", a="a", b="b", draws=999)
    assert one.accuracy_difference_ci.low == pytest.approx(-1.385, abs=0.001)
    assert one.accuracy_difference_ci.high == pytest.approx(room - 0.25)
    # A share that is truly lost or gained is held by the interval as often as it says.
    random, lost, gained, held = np.random.default_rng(0), 0.002, 0.001, 0
    for _ in range(100):
        draw = random.random(400)
        a, b = [row(i, correct=draw[i] >= lost) for i in range(400)], [row(i, correct=draw[i] < 1 - gained) for i in range(400)]
        found = paired(a, b, dataset="d", a="a", b="b", draws=99).accuracy_difference_ci
        held += found.low <= 100 * (gained - lost) <= found.high
    assert held >= 93


def test_pairing_sees_what_separate_intervals_cannot():
    # The same 150 problems, 12 mended and none broken: the intervals overlap, the paired test does not doubt it.
    right = np.arange(150) < 75
    a, b = many(right | (np.arange(150) >= 138), [9] * 150), many(right, [9] * 150)
    pair = paired(a, b, dataset="d", a="A", b="B")
    apart = point("A", "d", 0.0, a, 1, draws=9), point("B", "d", 0.0, b, 1, draws=9)
    assert apart[0].accuracy_ci.low < apart[1].accuracy_ci.high
    assert pair.mcnemar_p == 2 / 2**12
    assert pair.accuracy_difference_ci.low > 0
    assert pair.accuracy_p < 0.001


def test_a_p_is_no_smaller_than_the_draws_can_show():
    shorter = paired(many([1] * 40, range(10, 50)), many([1] * 40, range(30, 70)), dataset="d", a="A", b="B", draws=999)
    assert shorter.token_p == 2 / 1000


def test_shares_that_sum_to_nothing_are_on_neither_side_of_it():
    """.8 - .5 and .5 - .2 differ in their last bit: a tie that was counted as a gain."""
    right = {"A": [8, 2, 6, 8], "B": [5, 5, 5, 5]}
    a, b = ([row(p, correct=s < most, sample=s) for p, most in enumerate(right[name]) for s in range(10)] for name in "AB")
    tenths = np.concatenate(list(resamples(4, 0, 999))) @ np.subtract(right["A"], right["B"])
    assert (tenths == 0).sum() > 50
    wanted = 2 * (1 + min((tenths <= 0).sum(), (tenths >= 0).sum())) / 1000
    assert paired(a, b, dataset="d", a="A", b="B", draws=999).accuracy_p == pytest.approx(wanted)


def test_errors_have_no_length_in_a_ratio():
    ran, failed = many([1, 1, 1], [20, 20, 20]), [row("p0"), row("p1"), row("p2", tokens=0, correct=False, finish="error")]
    assert paired(failed, ran, dataset="d", a="A", b="B", draws=99).token_ratio == pytest.approx(0.5)
    one = [row(f"p{i}", tokens=10 * (i == 0), correct=i == 0, finish="stop" if i == 0 else "error") for i in range(3)]
    few = paired(one, ran, dataset="d", a="A", b="B", draws=99)
    assert (few.token_ratio_ci.low, few.token_ratio_ci.high) == pytest.approx((0.5, 1.0)), "1 where a draw has no length at all"


def test_the_seed_decides_a_comparison():
    a, b = many([1, 0, 1, 1] * 5, range(10, 30)), many([1, 1, 0, 1] * 5, range(35, 15, -1))
    first, again, other = (paired(a, b, dataset="d", a="A", b="B", seed=seed, draws=199) for seed in (0, 0, 1))
    assert first == again
    assert first.token_ratio_ci != other.token_ratio_ci


def test_no_difference_is_no_difference():
    same = many([1, 0, 1], [4, 9, 3])
    pair = paired(same, same, dataset="d", a="A", b="B", draws=99)
    assert (pair.accuracy_p, pair.mcnemar_p, pair.token_p, pair.token_ratio) == (1, 1, 1, 1)


CELLS = st.tuples(st.booleans(), st.booleans(), st.integers(1, 3000), st.integers(1, 3000))


@settings(max_examples=40, deadline=None)
@given(st.lists(CELLS, min_size=1, max_size=20))
def test_swapping_the_sides_mirrors_the_test(cells):
    right_a, right_b, tokens_a, tokens_b = zip(*cells, strict=True)
    a, b = many(right_a, tokens_a), many(right_b, tokens_b)
    one = paired(a, b, dataset="d", a="A", b="B", draws=99)
    two = paired(b, a, dataset="d", a="B", b="A", draws=99)
    assert one.accuracy_difference == pytest.approx(-two.accuracy_difference)
    assert one.accuracy_difference_ci.low == pytest.approx(-two.accuracy_difference_ci.high)
    assert one.accuracy_difference_ci.low <= one.accuracy_difference <= one.accuracy_difference_ci.high
    assert (one.accuracy_p, one.mcnemar_p, one.token_p) == (two.accuracy_p, two.mcnemar_p, two.token_p)
    assert (one.only_a, one.only_b) == (two.only_b, two.only_a)
    assert one.token_ratio == pytest.approx(1 / two.token_ratio)
    assert one.token_ratio_ci.low == pytest.approx(1 / two.token_ratio_ci.high)
    assert one.token_ratio_ci.low <= one.token_ratio <= one.token_ratio_ci.high


def test_different_problems_are_refused_by_name():
    with pytest.raises(DataError, match=r"different problems \(2 of them, the first is 'x', only in B\)"):
        paired([row("y"), row("z")], [row("x"), row("z")], dataset="d", a="A", b="B")


def test_mcnemar_is_left_out_where_problems_have_several_answers():
    a = [row(f"p{i}", sample=s) for i in range(3) for s in range(2)]
    pair = paired(a, many([1, 0, 1], [5, 5, 5]), dataset="d", a="A", b="B", draws=99)
    assert pair.mcnemar_p is pair.only_a is pair.only_b is None
    assert pair.accuracy_difference == pytest.approx(100 / 3)


def test_several_answers_that_differ_nowhere_leave_the_difference_open_too():
    """'0.0 [0.0 to 0.0]' for four problems, where one answer each leaves 60 points either way."""
    for a, b in (("++++", "++++"), ("++++", "----"), ("+-+-", "+-+-")):
        sides = [[row(p, correct=sign == "+", sample=s) for p, sign in enumerate(signs) for s in range(2)] for signs in (a, b)]
        several = paired(*sides, dataset="d", a="a", b="b", draws=99)
        once = paired(*([one for one in side if one["sample"] == 0] for side in sides), dataset="d", a="a", b="b", draws=99)
        assert several.accuracy_difference_ci == once.accuracy_difference_ci
        assert several.accuracy_difference_ci.high - several.accuracy_difference_ci.low > 60
        assert several.mcnemar_p is None


def test_grids_are_compared_by_mean_accuracy_and_problem():
    a = many([1, 1, 1, 0], [9] * 4, 0.0) + many([1, 1, 0, 0], [3] * 4, 1.0)
    b = many([1, 1, 1, 0], [9] * 4, 0.0) + many([0, 0, 0, 0], [3] * 4, 1.0)
    pair = paired_over_grid(a, b, dataset="d", a="++", b="plain", draws=1999)
    assert (pair.accuracy_mean_a, pair.accuracy_mean_b) == (62.5, 37.5)
    assert pair.accuracy_difference == 25
    # Per problem the differences are 50, 50, 0, 0 points: 0 of 4 from the first two has chance 1/16 > .025.
    assert (pair.accuracy_difference_ci.low, pair.accuracy_difference_ci.high) == (0, 50)
    assert pair.problems == 4
    with pytest.raises(DataError, match="same grid"):
        paired_over_grid(a, b[:4], dataset="d", a="++", b="plain")


def test_spearman_by_hand():
    assert spearman([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert spearman([0, 1, 2], [7, 7, 7]) == 0
    assert spearman([0, 0.5, 1, 2], [1, 2, 4, 800]) == 1
    with pytest.raises(SettingError, match="2 or more"):
        spearman([0], [1])


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=12))
def test_spearman_is_odd_and_bounded(tokens):
    alphas = list(range(len(tokens)))
    assert -1 <= spearman(alphas, tokens) <= 1
    assert spearman(alphas, tokens) == -spearman(alphas, [-t for t in tokens])


def test_travel_shows_a_dial_that_works_in_its_first_quarter_only():
    # One H100 run, plain CoT-Valve: alpha 0 to 2; more than half of the travel sits in the first tenth.
    shares = travel([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 2], [296, 130, 105, 102, 95, 93, 86, 103])
    assert shares[0] == pytest.approx(0.8 * math.log(296 / 130) / math.log(296 / 86))
    assert shares[0] > 0.5
    assert shares[-1] < 0  # past 1.5 the chains grow again
    assert sum(shares) == pytest.approx(math.log(296 / 103) / math.log(296 / 86))


@given(st.lists(st.floats(1, 1e4), min_size=2, max_size=10), st.floats(0.1, 10))
def test_travel_of_a_monotone_dial_adds_up_either_way(lengths, scale):
    falling, alphas = sorted(lengths, reverse=True), list(range(len(lengths)))
    shares = travel(alphas, falling)
    assert all(share >= -1e-9 for share in shares)
    assert sum(shares) == pytest.approx(0 if falling[0] == falling[-1] else 1)
    if math.log(falling[0] / falling[-1]) > 1e-6:
        assert travel(alphas, [scale * t for t in falling]) == pytest.approx(shares, abs=1e-6)
        assert travel([-a for a in alphas], falling) == pytest.approx(shares[::-1])


@pytest.mark.parametrize(("alphas", "tokens"), [([0], [5]), ([0, 0], [5, 6]), ([0, 1], [5, 0]), ([0, 1], [5])])
def test_travel_refuses_what_is_no_dial(alphas, tokens):
    with pytest.raises(SettingError):
        travel(alphas, tokens)


def test_blocks_do_not_change_what_is_drawn(monkeypatch):
    whole = np.concatenate(list(resamples(7, 0, 40)))
    monkeypatch.setattr(resampling, "_BLOCK", 21)
    parts = list(resamples(7, 0, 40))
    assert [len(part) for part in parts] == [3] * 13 + [1]
    assert (np.concatenate(parts).sum(1) == 7).all()
    assert (np.concatenate(parts) == whole).all()
    assert not any((one == two).all() for one, two in pairwise(parts[:-1]))




def test_unreadable_are_those_that_ended_and_could_not_be_compared():
    rows = [row("a"), {**row("b"), "correct": False, "reason": "not a plain number", "predicted": "x"},
            {**row("c"), "correct": False, "reason": "not equal to the gold answer"},
            {**row("d"), "correct": False, "finish": "length", "predicted": None, "reason": "truncated"}]  # fmt: skip
    made = point("s", "d", 0.0, rows, 1)
    assert (made.unreadable, made.truncated, made.correct) == (1, 1, 1)


def test_few_questions_prove_little():
    """One question asked four times has an interval; three that go one way have no p below what their signs show."""
    alone = point("s", "d", 0.0, [row("a", sample=i, correct=i > 0) for i in range(4)], 1)
    assert alone.accuracy_ci.high - alone.accuracy_ci.low > 60
    three = paired(many([1, 1, 1], [10] * 3), many([0, 0, 0], [20] * 3), dataset="d", a="A", b="B", draws=999)
    assert three.accuracy_p == three.mcnemar_p == 0.25
