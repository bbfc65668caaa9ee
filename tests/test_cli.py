"""What the command line shows: help in one order with its defaults, and nothing on the screen that is not ours."""

import errno
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from typer.main import get_command

from cotvalve import cli, pipeline, problems
from cotvalve.progress import Notes


def verbs() -> dict[str, Any]:
    cli._register()
    return dict(get_command(cli.app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", [*pipeline.VERBS, "serve"])
def test_help_begins_with_what_every_call_gives(name: str) -> None:
    """Model, data, direction and out come first in this order, and how models are loaded comes last."""
    shown = [param.name for param in verbs()[name].params]
    given = [field for field in cli.FIRST if field in shown]
    arguments = pipeline.VERBS[name].arguments if name in pipeline.VERBS else ()
    assert tuple(shown[: len(arguments)]) == arguments
    assert shown[len(arguments) :][: len(given)] == given
    if "dtype" in shown:
        assert set(shown[-5:]) <= set(cli.ModelSettings.model_fields)


def test_help_tells_the_defaults() -> None:
    """In square brackets they were taken for markup, and not shown at all."""
    ran = subprocess.run([sys.executable, "-m", "cotvalve", "sweep", "--help"], capture_output=True, text=True, check=True, cwd=ROOT)
    plain = " ".join(re.sub(r"[│╭╮╰╯─]|\x1b\[[0-9;]*m", " ", ran.stdout).split())
    for default in ("tiny-reasoner", "gsm8k", "0,0.25,0.5,0.75,1", "runs/sweep", "1024", "50,100,200"):
        assert f"(default: {default})" in plain, default


@pytest.mark.parametrize(
    "line",
    [
        "fuse --model tiny-reasoner --direction tiny-valve",
        "sweep --model tiny-reasoner --direction tiny-valve --data arithmetic --limit 2 --alphas 0,1 --max-new-tokens 8",
    ],
)
def test_only_our_own_progress_is_drawn(line: str, tmp_path: Path) -> None:
    """transformers draws a bar for loading and one for writing each model."""
    ran = subprocess.run(
        [sys.executable, "-m", "cotvalve", *line.split(), "--device", "cpu", "--out", str(tmp_path / "out")],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    lines = ran.stderr.splitlines()
    assert lines
    for told in lines:
        assert re.match(r"(fuse|sample): \d+/\d+|tiny-reasoner on cpu, \d+ threads, float32$", told), ran.stderr
    assert "\r" not in ran.stderr


def test_a_warning_is_one_line_and_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    Notes.on()
    Notes.on()
    logging.getLogger("cotvalve.valve").warning("two\nlines of %s", "it")
    assert capsys.readouterr().err == "cotvalve: note: two lines of it\n"


def test_a_path_that_cannot_be_reached_is_told_in_one_line(tmp_path: Path, command: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only folder, another's file, and --out below a file were tracebacks."""
    (tmp_path / "file").write_text("")
    code, said = command("extract", "tiny", "tiny-reasoner", "--rank", "2", "--out", str(tmp_path / "file" / "d"))
    assert (code, said.splitlines()[-1].partition(" (")[0]) == (2, f"cotvalve: {tmp_path}/file/.d.part: cannot be read or written")

    def denied(*_args: object, **_kwargs: object) -> None:  # a test that runs as root has every permission
        raise PermissionError(errno.EACCES, "Permission denied", "data.jsonl")

    monkeypatch.setattr(problems, "load", denied)
    code, said = command("data", "fetch", "data.jsonl")
    assert (code, said) == (2, "cotvalve: data.jsonl: cannot be read or written (Permission denied); mend its permissions, or name another path\n")


def test_ctrl_c_says_that_the_same_command_goes_on(command: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """typer made an exit code of it before our line was said: a stopped command ended without a word."""

    def stopped(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(problems, "load", stopped)
    code, said = command("data", "fetch", "arithmetic")
    assert (code, said.strip()) == (130, "cotvalve: stopped; the same command goes on where it was")
