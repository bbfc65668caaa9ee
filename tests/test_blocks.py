"""The Python of the README and the docs runs as it stands, page by page, on the embedded model.

A block that cannot run here says so in its first line (`# needs a download`, `# needs ...`) and is skipped with
that reason; method.md's blocks are quotations, which test_docs.py holds against the source.
"""

import contextlib
import io
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from test_docs import PAGES, blocks, text

from cotvalve import pipeline, sweep

QUOTED = "# cotvalve/"
ELSEWHERE = {"reproduction": "needs the model of its tables"}
NEEDS = re.compile(r"# (needs .+)")


def code() -> Iterator[Any]:
    for page in PAGES:
        for number, body in enumerate(blocks(page, "python")):
            if not body.startswith(QUOTED):
                yield pytest.param(page, body, id=f"{page.stem}-{number}")


@lru_cache
def namespace(_page: Path) -> dict[str, Any]:
    """What a page's earlier blocks defined is there in its later ones."""
    return {"__name__": "__main__"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader stands: runs/heldout is there, as start.md makes it."""
    home = tmp_path_factory.mktemp("reader")
    settings = sweep.SweepSettings(
        model="tiny-reasoner", direction="CoT-Valve++=tiny-valve", data="arithmetic", split="heldout", prompt="plain", limit=2,
        alphas="0,1", max_new_tokens=20, device="cpu", out=str(home / "runs" / "heldout"),
    )  # fmt: skip
    sweep.run(settings)
    return home


@pytest.mark.parametrize(("page", "body"), list(code()))
def test_a_block_runs(page: Path, body: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = NEEDS.match(body)
    if needs or page.stem in ELSEWHERE:
        pytest.skip(f"{page.name}: {needs[1] if needs else ELSEWHERE[page.stem]}")
    monkeypatch.chdir(folder)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(body, f"{page.name}", "exec"), namespace(page))
    if shown := expected(page, body):
        assert re.findall(r"^(\d\.\d+ \d+ \w+) ", said.getvalue(), re.MULTILINE) == shown, "the page shows other lengths"


def expected(page: Path, body: str) -> list[str]:
    """alpha, tokens and finish of each chain in the block of output behind `body`, if there is one."""
    behind = text(page).partition(f"```python\n{body}```\n")[2]
    found = re.match(r"\n```\n(.*?)^```$", behind, re.MULTILINE | re.DOTALL)
    return re.findall(r"^(\d\.\d+ \d+ \w+) ", found[1], re.MULTILINE) if found else []


def test_the_check_can_fail(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nprint('0.0 2 stop yes')\n```\n\n```\n0.0 3 stop yes\n```\n")
    (body,) = blocks(page, "python")
    assert expected(page, body) == ["0.0 3 stop"]
    here = os.getcwd()
    with pytest.raises(AssertionError, match="the page shows other lengths"), pytest.MonkeyPatch.context() as patch:
        test_a_block_runs(page, body, tmp_path, patch)
    os.chdir(here)
    with pytest.raises(ZeroDivisionError), pytest.MonkeyPatch.context() as patch:
        test_a_block_runs(page, "1 / 0", tmp_path, patch)
    os.chdir(here)


def test_most_of_it_runs() -> None:
    """A marker is for what a test cannot have; a page that marks all of it would not be tested."""
    bodies = [param.values[1] for param in code()]
    assert sum(1 for body in bodies if not NEEDS.match(body)) >= 4
    assert any("Valve.load" in body for body in bodies if not NEEDS.match(body))


# The commands of start.md, one after the other


LEFT = {"serve": "runs until it is stopped; tests/test_serve.py starts it", "run tiny": "`cotvalve demo` in full"}
SMALL = {"--limit": "2", "--budgets": "50", "--alphas": "0,1", "--max-new-tokens": "500", "--batch": "4"}
"""Put in place of a command's own values, where its verb has them: the same way, in seconds."""
BRIEF = {"sweep": {"--max-new-tokens": "80"}}
"""Only what learns from chains, or is fitted to their lengths, needs them whole."""


def lines() -> list[str]:
    """The commands of the page with its first line of variables, the embedded one, filled in."""
    page = next(page for page in PAGES if page.stem == "start")
    words = dict(re.findall(r"(\w+)=(\S+)", re.findall(r"^MODEL=.*$", text(page), re.MULTILINE)[0]))
    found = [line for body in blocks(page, "") for line in body.splitlines() if line.startswith("cotvalve ")]
    return [re.sub(r"\$(\w+)", lambda word: words[word[1]], line) for line in found]


def test_the_commands_of_start_md_run_in_their_order(
    folder: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., tuple[int, str]]
) -> None:
    """What a stranger pastes: each command finds what the ones before it made."""
    monkeypatch.chdir(folder)
    shutil.rmtree(folder / "runs" / "heldout")
    ran = 0
    for line in lines():
        arguments = shlex.split(line, comments=True)[1:]
        if any(" ".join(arguments).startswith(left) for left in LEFT) or "horseee/" in line:
            continue  # a hub's data set needs a download
        verb = pipeline.VERBS.get(arguments[0])
        fields = verb.settings().model_fields if verb else {}
        for flag, value in (SMALL | BRIEF.get(arguments[0], {})).items():
            if flag[2:].replace("-", "_") in fields:
                arguments = [*arguments, flag, value]
        code, said = command(*arguments)
        assert code == 0, f"{line}\n{said}"
        ran += 1
    assert ran >= 15
    assert (folder / "runs" / "heldout" / "report.html").exists()
