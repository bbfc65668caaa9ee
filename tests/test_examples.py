"""examples/one_page.py as a user runs it: a process of its own, on the embedded model."""

import ast
import re
import runpy
import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import nn

from cotvalve.types import Problem

PAGE = ROOT / "examples" / "one_page.py"
ALLOWED = {"torch", "peft", "transformers", "cotvalve", *sys.stdlib_module_names}


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What `python examples/one_page.py --quick` prints, run from elsewhere."""
    code = f"import sys, runpy; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['one_page.py', '--quick']; runpy.run_path({str(PAGE)!r}, run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path_factory.mktemp("away"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def tokens(printed: str, system: str) -> dict[float, float]:
    """Mean tokens by alpha in the printed table."""
    rows = re.findall(rf"^{re.escape(system)} +(\d\.\d+) +\d+\.\d +(\d+\.\d) +\d+$", printed, re.MULTILINE)
    return {float(alpha): float(mean) for alpha, mean in rows}


def test_tokens_fall_along_alpha(printed: str) -> None:
    plain, plus, progressive = (tokens(printed, f"CoT-Valve{system}") for system in ("", "++", "+P"))
    assert list(plain) == list(plus) == list(progressive) == [0, 0.25, 0.5, 0.75, 1], printed
    assert plain[0] == plus[0] == progressive[0], "alpha 0 is the base, whatever was learned"
    # Eight questions at temperature 1: only what is far apart is compared.
    assert plain[0] > plain[0.75] > plain[1], printed
    assert plain[1] < plain[0] / 2, printed


def test_it_says_what_became_of_the_chains(printed: str) -> None:
    found = re.search(r"MixChain-C: (\d+) of (\d+) chains are right, (\d+) have a beta above 0", printed)
    assert found, printed
    right, sampled, trained = map(int, found.groups())
    # Each question's longest chain has beta 0, so not every right chain is trained on.
    assert 0 < trained < right <= sampled
    assert f"CoT-Valve++: {trained} chains at their beta" in printed
    assert re.search(r"CoT-Valve\+P: 3 stages of \d+ chains at alpha 1", printed), printed


def test_the_pair_goes_to_longer_chains(printed: str) -> None:
    found = dict(re.findall(r"theta1 \+ (\d\.\d+) \* \(theta2 - theta1\): (\d+\.\d) tokens", printed))
    assert float(found["0.75"]) > 1.5 * float(found["0.00"]), printed


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """The page's functions, nothing run."""
    return runpy.run_path(str(PAGE))


def test_moved_weights_come_back_bit_for_bit(page: dict[str, Any]) -> None:
    torch.manual_seed(0)
    theta1, theta2 = nn.Linear(5, 3), nn.Linear(5, 3)
    before = theta1.weight.clone()
    with pytest.raises(RuntimeError, match="inside"), page["moved"](theta1, theta2, 0.3):  # noqa: PT012
        assert torch.allclose(theta1.weight, 0.7 * before + 0.3 * theta2.weight)
        raise RuntimeError("inside")
    assert torch.equal(theta1.weight, before)
    with page["moved"](theta1, theta2, 1.0):
        assert torch.allclose(theta1.weight, theta2.weight)
    assert torch.equal(theta1.weight, before)


def test_plus_has_betas_and_progressive_has_ranks(page: dict[str, Any]) -> None:
    """Eq. 4 by question; a stage of +P has every question once, from long to short."""

    def sample(problem: Problem, tokens: int, answer: str) -> tuple[Problem, float, str, int]:
        return problem, 0.5, f"{tokens} \\boxed{{{answer}}}", tokens

    one, two, three = (Problem(name, "?", "7") for name in ("one", "two", "three"))
    samples = [sample(one, n, "7") for n in (10, 40, 20, 30, 50)] + [sample(two, n, "7") for n in (8, 4)]
    mix = page["mixchain"]([*samples, sample(two, 2, "6"), sample(three, 9, "7")])
    assert [[tokens for *_, tokens in kept] for kept in mix] == [[50, 40, 30, 20, 10], [8, 4]]
    assert [(p.id, beta) for p, _, beta in page["at_beta"](mix)] == [
        ("one", 0.25),
        ("one", 0.5),
        ("one", 0.75),
        ("one", 1),
        ("two", 1),
    ]
    stages = [[(p.id, int(chain.split()[0]), alpha) for p, chain, alpha in stage] for stage in page["stages"](mix)]
    assert stages == [[("one", n, 1), ("two", m, 1)] for n, m in ((50, 8), (30, 8), (10, 4))]


def test_it_is_one_page_of_plain_libraries() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 240
    ours: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert {name.partition(".")[0] for name in names} <= ALLOWED, names
            ours += [name for name in names if name.partition(".")[0] == "cotvalve"]
    assert set(ours) == {"cotvalve", "cotvalve.problems", "cotvalve.types"}, (
        "the model's folder and the problems, nothing else"
    )


def test_what_it_leaves_out_is_where_it_says() -> None:
    """The docstring's right column names modules of the package."""
    named = re.findall(
        r"(\w+\.py|\w+/)(?=,|$| *\n)",
        (ast.get_docstring(ast.parse(PAGE.read_text(encoding="utf-8"))) or "").partition("Left out")[2],
    )
    assert len(named) > 8
    for name in named:
        assert (ROOT / "cotvalve" / name).exists(), name
