"""benchmarks/lm_eval_check.py sorts the differences between lm-eval's grades and cotvalve's; lm-eval itself is not needed for that."""

import pytest

from benchmarks.lm_eval_check import KINDS, Seen, document, explain, points
from cotvalve.grading import grade
from cotvalve.types import Problem

CASES = {
    "mark": ("strict-match", "2", r"So \boxed{2}.", "[invalid]", False),
    "behind": ("flexible-extract", "2", r"She needs \(\boxed{2}\) more cows for 25 liters of milk.", "25", False),
    "no box": ("boxed", "5", "10 - 5 = 5.\nThe answer is 5.", "", False),
    "first": ("cot strict-match", "20", "The answer is 32-12=20.\nThe answer is 20.", "32", False),
    "earlier": ("cot strict-match", "2", "He needs 20 / 5 = 4. The answer is 4.\nStep by step: he has 3 of 5.\nHe needs \\boxed{2} more.", "4", False),
    "computed": ("cot strict-match", "35", "All the dogs have 20 puppies. The answer is 7/20 * 100 = 35%.", "7", False),
    "spelling": ("flexible-extract", "42", r"Roy has \boxed{42.00}.", "42.00", False),
    "cut": ("flexible-extract", "4", "He will be 40 + 2*16 = 72 inches tall.\nAdam is 4", "4", True),
    "chance": ("flexible-extract", "3", r"It costs \boxed{0} dollars more than 1/3 pound.", "3", False),
    "part": ("flexible-extract", "20", r"It goes every \(\boxed{\frac{1}{20}}\) days.", "20", False),
    "part of a time": ("math_verify", "2", "So 5:00 - 2 hours 40 minutes = 2:20.\nThe answer is 2:20.", "2; 2", False),
    "thousands": ("math_verify", "9500", r"409 500 - 400 000 = \boxed{9 500}.", "509; 9 500", False),
    "percent": ("math_verify", "20", r"It is $\frac{4}{20} \times 100 = \boxed{20\%}$.", r"100; 20\%", False),
    "sum": ("math_verify", "296", r"The total is \(\boxed{240 + 56} = 296\) dollars.", "56 + 240; 240 + 56", False),
    "apart": ("math_verify", "128", r"86 glasses and 42 plates. The answer is \boxed{86 42}.", "128; 86 42", False),
    "several": ("math_verify", "30", r"It is $6+8+16+\boxed{0}=\boxed{30}$ ounces.", "{0, 30}; 0,30", False),
    "heading": ("math_verify", "10", "It matches.\n\n### Final Answer\nThe height of the beanstalk after 3 weeks is **10 inches**.", "10; 10", False),
    "unboxed": ("math_verify", "17", "12/4 = 3 for boys, so 4+3=7 on varsity. So, the number of students not on varsity is 17.", "4; 4", False),
    "words": ("math_verify", "310", r"$22 \times 10 = 220$. So Mason needs \boxed{310 ounces}.", "310*E*c*n*o*s*u; 310 ounces", False),
    "silent": ("flexible-extract", "25", r"Amy left 25 candles lit. \boxed{\text{We can't determine the exact number}}", "25", False),
    "remark": ("math_verify", "240", "He uses $4 \\times 60 = 240$ sheets.\nThere are 30 sheets on a pad, so assuming 4 weeks is appropriate.", "240; 240", False),
    "hour": ("math_verify", "2", r"It is \boxed{2:00 \text{ pm}}.", "zoo; 2:00", False),
    "other": ("flexible-extract", "7", r"It is \boxed{7}.", "8", False),
    "other of a letter": ("math_verify", "5", r"So $x = 5$, that is \boxed{x}.", "5; 5", False),
    "other of a number before": ("math_verify", "4", "There are $4$ boys. The number of students is 17.", "4; 4", False),
}


@pytest.mark.parametrize(("kind", "case"), CASES.items())
def test_differences_have_their_class(kind: str, case: tuple[str, str, str, str, bool]) -> None:
    view, gold, text, read, cut = case
    problem = Problem("gsm8k/test/0", "How many?", gold)
    assert explain(view, Seen(text, problem, grade(problem, text, truncated=cut), read)) == kind.partition(" of")[0]
    assert kind.partition(" of")[0] in KINDS


@pytest.mark.parametrize(
    ("kind", "gold", "text", "read"),
    [
        ("base", "4210_{5}", r"The final answer is \boxed{4210}.", "4210; 4210"),
        ("repeated", "1", r"The possible values are \boxed{1, 1, 1}.", "{1}; 1, 1, 1"),
        ("inequality", r"(5,\infty)", r"The answer is \(\boxed{x > 5}\).", "x > 5; x > 5"),
        ("choice", r"\text{(C)}", "It is parallel to the $xy$-plane. The answer is (C).", "x*y; xy"),
    ],
)
def test_differences_of_math_have_their_class(kind: str, gold: str, text: str, read: str) -> None:
    problem = Problem("math500/test/0", "What?", gold, kind="math")
    assert explain("math_verify", Seen(text, problem, grade(problem, text), read)) == kind
    assert kind in KINDS


def test_what_is_dropped_as_a_unit_has_its_class() -> None:
    problem = Problem("math500/test/0", "What?", "x=5", kind="math")
    text = r"The values are \(\boxed{5 \text{ and } 1}\)."
    assert explain("boxed", Seen(text, problem, grade(problem, text), "not told")) == "unit"


def test_documents_are_rows_of_the_data_sets_of_the_tasks() -> None:
    problem = Problem("gsm8k/test/0", "How many?", "18", solution="9 + 9 = 18")
    assert document("gsm8k/gsm8k", problem, "x")["answer"] == "9 + 9 = 18\n#### 18"
    assert document("aime/aime24", problem, "x")["Answer"] == "18"
    assert document("minerva_math/minerva_math500", problem, "x")["solution"] == r"$\boxed{18}$"


def test_a_difference_shows_its_sign() -> None:
    assert [points(each) for each in (0.04, 1.26, -66.2)] == ["0.0", "+1.3", "\N{MINUS SIGN}66.2"]
