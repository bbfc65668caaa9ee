"""examples/one_page.py as a user runs it: a process of its own, on the embedded model."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

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
    plain, plus = tokens(printed, "CoT-Valve"), tokens(printed, "CoT-Valve++")
    assert list(plain) == list(plus) == [0, 0.25, 0.5, 0.75, 1], printed
    assert plain[0] > plain[0.5] > plain[1], printed
    assert plain[1] < plain[0] / 2, printed


def test_it_says_what_became_of_the_chains(printed: str) -> None:
    found = re.search(r"MixChain-C: (\d+) of (\d+) chains are right, (\d+) have a beta above 0", printed)
    assert found, printed
    right, sampled, trained = map(int, found.groups())
    # Each question's longest chain has beta 0, so not every right chain is trained on.
    assert 0 < trained < right <= sampled
    assert f"CoT-Valve++: {trained} chains at their beta" in printed


def test_it_is_one_page_of_plain_libraries() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
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
