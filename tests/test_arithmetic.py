"""The embedded world: exact, disjoint, reproducible; chains of every length that never say a wrong equation."""

import re
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from random import Random

import pytest

from cotvalve.errors import SettingError
from cotvalve.problems.arithmetic import LIMIT, SALE_LIMIT, SIZES, Step, generate, load, stories
from cotvalve.problems.arithmetic_chains import BRIEF, LONG, Style, evenly, inverse, split_up, write_chain
from cotvalve.problems.arithmetic_words import FAMILIES

EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
FEATURES = ("restate", "knowns", "plan", "sentences", "work", "check", "recheck")

FIRST_TEST_PROBLEM = (
    "An old factory makes 62 wheels. A new factory makes six times as many. "
    "It ships 11 wheels to each of 12 clients. It sells every wheel for 27 dollars. How many dollars does it get?",
    "6480",
    "62 * 6 = 372. 12 * 11 = 132. 372 - 132 = 240. 240 * 27 = 6480.",
)


def holds(a: str, op: str, b: str, result: str) -> bool:
    """Whether an equation is right, by rational arithmetic and not by the generator's own."""
    left, right = Fraction(a), Fraction(b)
    value = {"+": left + right, "-": left - right, "*": left * right, "/": left / (right or 1)}[op]
    return value == int(result)


def words(text: str) -> int:
    return len(re.findall(r"\d|[A-Za-z]+|[^\w\s]", text))


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_load_gives_the_same_numbered_problems_every_time(split: str) -> None:
    problems = load(split)
    assert len(problems) == SIZES[split]
    assert [problem.id for problem in problems[:2]] == [f"arithmetic/{split}/0001", f"arithmetic/{split}/0002"]
    assert len({problem.id for problem in problems}) == len({problem.question for problem in problems}) == len(problems)
    problems.clear()
    assert len(load(split)) == SIZES[split]


def test_the_world_does_not_drift() -> None:
    """The stored models were measured on these very problems: another generator needs new models and a new card."""
    first = load("test")[0]
    assert (first.question, first.answer, first.solution) == FIRST_TEST_PROBLEM


def test_no_test_problem_shares_its_equations_with_another_split() -> None:
    """By construction, so it holds for every seed: the hash of the equations decides the split."""
    test = {problem.solution for problem in load("test")}
    validation = {problem.solution for problem in load("validation")}
    train = {problem.solution for seed in (1, 2, 3) for problem in generate(seed, 2000, "train")}
    train |= {problem.solution for problem in load("train")}
    assert not test & train
    assert not test & validation
    assert not validation & train


def test_generate_depends_on_its_seed_alone() -> None:
    assert generate(7, 20, "train") == generate(7, 20, "train")
    assert generate(7, 20, "train") == generate(7, 40, "train")[:20]
    assert generate(7, 20, "train") != generate(8, 20, "train")


def test_unknown_split_names_the_nearest() -> None:
    with pytest.raises(SettingError, match="unknown split of arithmetic 'tests': did you mean 'test'"):
        load("tests")


def test_problems_are_right_and_varied() -> None:
    for problem in load("test"):
        equations = EQUATION.findall(problem.solution or "")
        assert 2 <= len(equations) <= 6
        assert all(holds(*equation) for equation in equations), problem
        assert equations[-1][3] == problem.answer
        assert all(int(result) <= LIMIT for *_, result in equations[:-1])
        assert int(problem.answer) <= SALE_LIMIT
        assert "{" not in problem.question
        assert problem.question.endswith("?")
    assert {problem.subset for problem in load("test")} == set(FAMILIES)
    assert {len(EQUATION.findall(problem.solution or "")) for problem in load("test")} == {2, 3, 4, 5, 6}


def test_every_number_of_the_first_operation_is_in_the_question() -> None:
    """A question that does not hold its numbers could not be answered; words stand for 2 to 6 and for fractions."""
    spoken = {2: "twice|half", 3: "three|third", 4: "four|quarter", 5: "five|fifth", 6: "six"}
    for story in stories(3, 500, "train"):
        results = {step.result for step in story.steps}
        for step in story.steps:
            for number in (step.a, step.b):
                told = re.search(rf"\b{number}\b", story.question) or re.search(
                    spoken.get(number, "$^"), story.question
                )
                assert told or number in results, (story, number)


def test_every_step_is_needed_for_the_answer() -> None:
    for story in stories(4, 500, "train"):
        for at, step in enumerate(story.steps[:-1]):
            later = story.steps[at + 1 :]
            assert any(step.result in (other.a, other.b) for other in later), story


def test_chains_never_say_a_wrong_equation() -> None:
    rng = Random(0)
    for story in stories(5, 400, "train"):
        for style in (LONG, evenly(0.5), Style(work=1), Style(check=1)):
            chain = write_chain(story, style, rng)
            equations = EQUATION.findall(chain)
            assert len(equations) >= len(story.steps)
            assert all(holds(*equation) for equation in equations), chain


def test_all_features_dropped_leaves_the_brief_solution() -> None:
    for story in stories(6, 50, "train"):
        assert write_chain(story, BRIEF, Random(0)) == story.solution


def test_every_chain_holds_the_steps_in_order() -> None:
    rng = Random(1)
    for story in stories(7, 200, "train"):
        chain = write_chain(story, evenly(rng.random()), rng)
        at = 0
        for step in story.steps:
            at = chain.index(f"{step.equation}.", at) + 1


@pytest.mark.parametrize("feature", FEATURES)
def test_each_feature_lengthens_alone_and_can_be_dropped_alone(feature: str) -> None:
    """The valve's travel is made of these: if one did nothing, lengths between brief and long would have a gap."""
    some = list(stories(8, 200, "train"))

    def mean(style: Style) -> float:
        rng = Random(2)
        return sum(words(write_chain(story, style, rng)) for story in some) / len(some)

    assert mean(BRIEF) < mean(replace(BRIEF, **{feature: 1.0}))
    assert mean(replace(LONG, **{feature: 0.0})) < mean(LONG)


def test_long_chains_are_several_times_the_brief_ones_and_lengths_between_exist() -> None:
    some = list(stories(9, 300, "train"))
    rng = Random(3)
    means = [sum(words(write_chain(story, evenly(p), rng)) for story in some) for p in (0, 0.25, 0.5, 0.75, 1)]
    assert means == sorted(means)
    # In a model's tokens, closing lines included, the ratio is about 7; bare chains differ by more.
    assert 5 < means[-1] / means[0] < 14
    steps = [after - before for before, after in pairwise(means)]
    assert max(steps) < 0.4 * (means[-1] - means[0])


def test_split_up_ends_in_the_result_and_leaves_easy_operations_alone() -> None:
    cases: dict[tuple[int, str, int], list[str]] = {
        (47, "+", 38): ["47 + 30 = 77", "77 + 8 = 85"],
        (85, "-", 38): ["85 - 30 = 55", "55 - 8 = 47"],
        (47, "*", 6): ["40 * 6 = 240", "7 * 6 = 42", "240 + 42 = 282"],
        (282, "/", 6): ["6 * 40 = 240", "282 - 240 = 42", "6 * 7 = 42", "40 + 7 = 47"],
        (41, "+", 38): [],
        (40, "*", 6): [],
        (54, "/", 6): [],
    }
    for (a, op, b), lines in cases.items():
        assert split_up(Step(a, op, b, "")) == lines  # type: ignore[arg-type]
    for story in stories(10, 300, "train"):
        for step in story.steps:
            lines = split_up(step)
            assert not lines or lines[-1].endswith(f" = {step.result}")


def test_inverse_leads_back() -> None:
    for story in stories(11, 100, "train"):
        for step in story.steps:
            assert inverse(step).result == step.a


def test_the_world_needs_no_heavy_library() -> None:
    """The training script runs where only torch and transformers are; the world itself needs neither."""
    code = (
        "import sys, cotvalve.problems.arithmetic_chains;"
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
