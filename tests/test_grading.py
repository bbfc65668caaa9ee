"""Grading as a table of real outputs, and the promise that nothing a model writes can hang it."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cotvalve import mathjudge
from cotvalve.answers import boxes
from cotvalve.errors import DataError
from cotvalve.grading import extract, grade
from cotvalve.types import Problem

TABLE = Path(__file__).parent / "cases" / "grading.jsonl"
CASES = [json.loads(line) for line in TABLE.read_text(encoding="utf-8").split("\n") if line]
LIMIT = 5.0
"""Seconds one grade may cost, whatever the text."""


@pytest.mark.parametrize("case", CASES, ids=[f"{number}-{case['source']}" for number, case in enumerate(CASES, 1)])
def test_table(case: dict[str, object]) -> None:
    outcome = grade((case["gold"], case["kind"]), case["text"], truncated=case.get("truncated", False))
    assert outcome.correct == case["correct"], outcome
    assert outcome.correct == (not outcome.reason), "wrong has a reason, right has none"


def test_the_table_is_large_and_from_many_sources() -> None:
    assert len(CASES) >= 150
    # `model_output` marks what a model wrote: not a human's solution, not an answer respelled by hand.
    assert sum(case.get("model_output", False) for case in CASES) >= 150
    assert sum(not case["correct"] for case in CASES) >= 50
    assert len({case["source"].split(":")[0] for case in CASES}) >= 12


def test_nothing_never_equals_nothing() -> None:
    """A public scorer counted None == None as right and reported 1319 of 1319."""
    for text in ("", " ", "\\boxed{}", "####", "I do not know.", "<think>5"):
        outcome = grade(("5", "number"), text)
        assert (outcome.correct, outcome.predicted) == (False, None)
        assert outcome.reason
    for kind in ("number", "math", "ratio", "time", "list", "word"):
        with pytest.raises(DataError, match="cannot be read"):
            grade(Problem("set/7", "?", "  ", kind), "")


def test_a_gold_answer_that_cannot_be_read_names_its_problem() -> None:
    with pytest.raises(DataError, match=r"problem set/7: gold answer 'many' cannot be read as number"):
        grade(Problem("set/7", "?", "many", "number"), "5")


def test_what_was_cut_in_its_thinking_is_truncated_and_a_wrong_answer_is_told_as_it_was_given() -> None:
    reasons = [grade(("5", "number"), "<think>5", truncated=truncated).reason for truncated in (True, False)]
    assert reasons == ["truncated", "thinking not finished"]
    assert [grade(("5", "number"), rf"\boxed{{{given}}}").predicted for given in ("5.0", "6")] == ["5.0", "6"]


def test_extract() -> None:
    assert extract("<think>\\boxed{1}</think>\\boxed{2} \\boxed{cut") == "2"
    assert extract("analysis\\boxed{1}assistantfinal It is \\boxed{2}") == "2"
    assert extract("<|channel|>analysis<|message|>\\boxed{1}") is None
    assert extract("#### 1. Count the eggs\nThere are 3.\n#### 2. Sell them\nThat makes 7.") == "7"
    assert extract("#### 1,080\nThe answer is 5") == "1,080"
    assert extract("The answer is 3. Really, the answer is $4 for 5.") == "4"
    assert extract("no numbers") is None
    assert boxes("\\boxed{\\boxed{5}} \\boxed{\\{1, 2\\}}") == ["5", "\\boxed{5}", "\\{1, 2\\}"]


@given(st.integers(-(10**9), 10**9), st.sampled_from(["{}", "{:,}", "{}.0", "${:,}", "{} dollars", "about {}", "{}."]))
@settings(max_examples=200, deadline=None)
def test_whole_numbers_in_any_spelling(value: int, form: str) -> None:
    for text in (f"\\boxed{{{form.format(value)}}}", f"#### {form.format(value).removeprefix('about ')}"):
        assert grade((str(value), "number"), text).correct
        assert not grade((str(value + 1), "number"), text).correct


@given(st.fractions(max_denominator=10**6))
@settings(max_examples=100, deadline=None)
def test_fractions_are_exact(value: Fraction) -> None:
    gold = (f"{value.numerator}/{value.denominator}", "number")
    assert grade(gold, f"\\boxed{{\\frac{{{value.numerator}}}{{{value.denominator}}}}}").correct
    assert not grade(gold, f"\\boxed{{\\frac{{{value.numerator}}}{{{value.denominator + 1}}}}}").correct or not value


@pytest.fixture(scope="module")
def _warm() -> None:
    """Starting the worker is no part of any grade's time; a verdict that is known starts none."""
    mathjudge._verdicts.clear()
    assert grade(("\\sqrt{8}", "math"), "\\boxed{2\\sqrt{2}}").correct


HOSTILE = [
    "9^9^9^9",
    "9^{9^{9^9}}",
    "10^{10^8}",
    "1000000!",
    "\\binom{1000000}{500000}",
    "(" * 300 + "1" + ")" * 300,
    "{" * 300 + "1" + "}" * 300,
    "\\sqrt{" * 200 + "2" + "}" * 200,
    "1e999999999",
    "1" * 10**6,
    "1/0",
    "\\frac{1}{0}",
]


@pytest.mark.usefixtures("_warm")
@pytest.mark.parametrize("kind", ["math", "number", "list", "ratio", "time", "word"])
@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:12])
def test_hostile_answers_are_wrong_with_a_reason(text: str, kind: str) -> None:
    golds = {"math": "7", "number": "7", "list": "7; 8", "ratio": "7:8", "time": "7:08", "word": "seven"}
    begin = time.monotonic()
    outcome = grade((golds[kind], kind), f"So \\boxed{{{text}}}")
    assert time.monotonic() - begin < LIMIT
    assert not outcome.correct
    assert outcome.reason


def test_what_would_take_algebra_long_is_not_handed_to_it() -> None:
    assert grade(("x", "math"), f"\\boxed{{{'x+' * 400}x}}").reason == "answer of more than 600 characters"
    assert grade(("x", "math"), f"\\boxed{{{'(' * 31}x+1{')' * 31}}}").reason == "brackets nested more than 30 deep"
    for number in ("1" * 500, "1e999"):
        assert grade(("7", "number"), f"\\boxed{{{number}}}").reason == "number of more than 400 digits"


@pytest.mark.parametrize("kind", ["math", "number", "list", "ratio", "time", "word"])
@pytest.mark.parametrize(
    "piece",
    [
        "\\boxed{",
        "1",
        "1,",
        "1/",
        "1:",
        "1 ",
        "\n",
        "#### ",
        "answer is ",
        "$",
        "{",
        "-",
        "\\frac{1}",
        "\\(",
        "<think>",
        "*",
        ".",
    ],
)
def test_a_megabyte_of_anything_is_quick(piece: str, kind: str) -> None:
    golds = {"math": "7", "number": "7", "list": "7; 8", "ratio": "7:8", "time": "7:08", "word": "seven"}
    begin = time.monotonic()
    assert not grade((golds[kind], kind), piece * (10**6 // len(piece))).correct
    assert time.monotonic() - begin < LIMIT


@pytest.mark.usefixtures("_warm")
def test_grading_goes_on_after_a_hostile_answer_and_after_a_killed_worker() -> None:
    assert "too long" in grade(("7", "math"), "\\boxed{8^{8^{8^8}}}").reason
    assert grade(("\\sqrt{12}", "math"), "\\boxed{2\\sqrt{3}}").correct
    worker = mathjudge._judge._process
    assert worker is not None
    worker.kill()
    worker.wait()
    assert grade(("\\sqrt{20}", "math"), "\\boxed{2\\sqrt{5}}").correct


@pytest.mark.usefixtures("_warm")
def test_ctrl_c_is_for_the_process_that_samples_and_not_for_its_worker() -> None:
    """At a terminal it reached both: the run ended with "the math-verify worker did not start", and the chains that waited for a grade were lost."""
    worker = mathjudge._judge._process
    assert worker is not None
    assert os.getpgid(worker.pid) == worker.pid != os.getpgrp()


def test_a_worker_whose_run_was_killed_ends_by_itself() -> None:
    """It computed 9^9^9^9 on a core of its own for as long as the machine was up."""
    code = "from cotvalve import mathjudge; mathjudge.ABANDONED_SECONDS = 1; mathjudge.main()"
    worker = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert worker.stdin
        worker.stdin.write(b'{"gold": "7", "given": "9^{9^{9^9}}"}\n')
        worker.stdin.flush()
        assert worker.wait(60) == -signal.SIGALRM
    finally:
        worker.kill()
        worker.communicate()


def test_a_pair_that_ran_out_of_a_shared_deadline_is_not_remembered_as_wrong() -> None:
    """One hostile part of a list must not spoil the verdict on its other parts."""
    spent = mathjudge.Deadline(0.0)
    assert mathjudge.judge("\\sqrt{28}", "2\\sqrt{7}", spent) == mathjudge.TOO_LONG
    assert mathjudge.judge("\\sqrt{28}", "2\\sqrt{7}", mathjudge.Deadline()) == ""


def _expressions(number: int) -> bool:
    return grade((f"{number}x+\\sqrt{{2}}", "math"), f"\\boxed{{\\sqrt{{2}}+{number} x}}").correct


def test_from_many_threads() -> None:
    """math-verify's own time limit is an alarm, which raises outside the main thread."""
    right: list[bool] = []
    threads = [threading.Thread(target=lambda n=n: right.append(_expressions(n))) for n in range(2, 18)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 16


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.usefixtures("_warm")
def test_after_a_fork() -> None:
    """Two processes on one worker's pipes would read each other's answers."""
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert all(pool.map(_expressions, range(20, 30)))
    assert _expressions(31)


def test_importing_grading_is_light() -> None:
    heavy = "print([name for name in ('torch', 'sympy', 'math_verify', 'datasets') if name in sys.modules])"
    code = f"import sys, cotvalve.problems; {heavy}"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_worker_that_starts_slowly_does_not_cost_the_question(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imports from a cold disk took four seconds once: every pair was "too slow" then, and its verdict kept."""
    start = mathjudge.Judge._start

    def slowly(self: mathjudge.Judge) -> None:
        start(self)
        time.sleep(3.2)

    monkeypatch.setattr(mathjudge.Judge, "_start", slowly)
    judge = mathjudge.Judge()
    try:
        assert judge.ask("(x+1)^2", "x^2+2x+1", 3.0) == ""
    finally:
        judge.close()
