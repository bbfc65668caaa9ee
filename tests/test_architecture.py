"""What holds for the package as a whole: imports point one way, importing is light, only the command line prints."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "cotvalve"
LINES = 350

ORDER = """
    errors types values baselines repetition records settings
    answers mathanswers mathjudge grading
    problems.dataset problems.arithmetic_words problems.arithmetic problems.arithmetic_chains
    problems.aime problems.asdiv problems.gsm8k problems.math500 problems.jsonl problems.prm12k problems.unseen problems
    prompts
    checkpoints templates adapters weights card direction vocabularies taskvector mover extraction
    inlets tuner valve fusing
    engines engines.sampling engines.slots engines.replaced engines.kernels engines.norms engines.tiles engines.between_tiles engines.gated engines.thin engines.branch engines.rotation engines.attend engines.draw engines.between engines.joined engines.layers engines.batch engines.generate
    engines.transformers engines.replicas engines.live
    engines.vllm_adapters engines.vllm_support engines.vllm_dial engines.vllm
    chains recipes mixchain
    batches headloss lean learner fitting train
    resampling statistics figures rounds report
    sweep verbs pipeline architectures costs sizes plan
    calibration calibrate
    serve serve.protocol serve.batching serve.app
    progress cli
""".split()  # noqa: SIM905
"""Every module, after all that it imports when it is loaded. A new module is put where its imports allow."""

ARROWS = """
    errors types < settings records < grading < problems prompts < direction taskvector < valve < engines < recipes
    mixchain < train < sweep < calibration < serve < cli
"""
"""DESIGN's arrows. report stands before sweep, which draws it; recipes and mixchain before train."""


def modules() -> dict[str, Path]:
    found = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in sorted(found.items())}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def when_loaded(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that run when the module is loaded: not those in functions, not those for type checkers."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from when_loaded(node.orelse)
            continue
        for part in ("body", "orelse", "handlers", "finalbody"):
            yield from when_loaded(getattr(node, part, []))


def imported(path: Path) -> set[str]:
    """Our own modules that `path` imports when it is loaded, without 'cotvalve.'."""
    known, found = modules(), set[str]()
    for node in when_loaded(tree(path).body):
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: write imports out in full"
            names = [f"{node.module}.{name}" for name in names] + [node.module or ""]
        ours = {name.removeprefix("cotvalve.") for name in names if name.startswith("cotvalve.")} & known.keys()
        if isinstance(node, ast.ImportFrom) and len(ours) > 1:
            # `from cotvalve.problems import dataset` needs the package too, which its `__init__` counts for.
            ours -= {name for name in ours if any(other.startswith(f"{name}.") for other in ours)}
        found |= ours
    return found


def test_every_module_has_its_place() -> None:
    assert len(set(ORDER)) == len(ORDER)
    assert set(ORDER) == modules().keys() - {"__init__", "__main__"}, "put a new module into ORDER, where it belongs"


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_one_way(name: str) -> None:
    later = imported(modules()[name]) - set(ORDER[: ORDER.index(name)])
    assert not later, f"{name} imports {', '.join(sorted(later))}, which stand behind it"


def test_the_order_is_the_design_s() -> None:
    groups = [group.split() for group in ARROWS.split("<")]
    for before, after in pairwise(groups):
        assert max(map(ORDER.index, before)) < min(map(ORDER.index, after)), f"{before} < {after}"
    assert ORDER.index("report") < ORDER.index("serve")


def test_the_check_sees_imports() -> None:
    assert {"valve", "taskvector"} <= imported(PACKAGE / "train.py")
    assert "problems.dataset" in imported(PACKAGE / "problems" / "gsm8k.py")
    assert "engines" not in imported(PACKAGE / "valve.py"), "imports in functions are not counted"
    assert "calibration" not in imported(PACKAGE / "valve.py"), "nor are those for type checkers"


def test_importing_is_light() -> None:
    """In a fresh interpreter: what a program pays for `import cotvalve`, and for the modules that need no model."""
    heavy = "torch transformers peft datasets matplotlib accelerate pyarrow"
    code = f"""
import sys
def heavy(): return sorted(set({heavy.split()!r}) & set(sys.modules))
import cotvalve
assert not heavy(), ("cotvalve", heavy())
assert cotvalve.SettingError and not heavy()
for name in "records settings grading problems prompts recipes mixchain statistics baselines cli pipeline verbs".split():
    __import__("cotvalve." + name)
    assert not heavy(), (name, heavy())
assert set(cotvalve.__all__) <= {{*dir(cotvalve), "Valve", "Direction", "TaskVector"}}
try: cotvalve.Vavle
except AttributeError as error: assert "Vavle" in str(error)
else: raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [*modules()])
def test_only_the_command_line_prints(name: str) -> None:
    prints = [
        node.lineno
        for node in ast.walk(tree(modules()[name]))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert name in ("cli", "progress") or not prints, f"{name}: print() in lines {prints}"


@pytest.mark.parametrize("name", [*modules()])
def test_nothing_is_caught_that_was_not_expected(name: str) -> None:
    """`except Exception` and a bare `except` hide bugs; to clean up and raise again is fine."""
    for node in ast.walk(tree(modules()[name])):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = "bare" if node.type is None else ast.unparse(node.type)
        wide = node.type is None or {"Exception", "BaseException"} & set(caught.strip("()").replace(",", " ").split())
        again = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
        assert not wide or again, f"{name}: line {node.lineno} catches {caught}"


@pytest.mark.parametrize("name", [*modules()])
def test_a_file_can_be_read_in_one_go(name: str) -> None:
    lines = len(modules()[name].read_text(encoding="utf-8").splitlines())
    assert lines <= LINES, f"{name} has {lines} lines; split it by what its parts are about"


@pytest.mark.parametrize("name", [*modules()])
def test_every_module_says_what_it_is(name: str) -> None:
    assert ast.get_docstring(tree(modules()[name])), name
