"""Set before anything imports torch: two threads that spin for each other crawl on a shared machine."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cotvalve import cli

ROOT = Path(__file__).parent.parent


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs `cotvalve ARGUMENTS` in this process; returns its exit code and what it said on standard error."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["cotvalve", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), capsys.readouterr().err

    return run


@pytest.fixture
def killed() -> Callable[[list[str], Callable[[], bool]], str]:
    """Starts Python with the arguments, kills it with SIGKILL as soon as `when` is true; returns its standard error.

    A process that ends by itself before that is a failure: the test would not test what it says.
    """

    def run(arguments: list[str], when: Callable[[], bool]) -> str:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline and not when():
            time.sleep(0.005)
        process.kill()
        said = process.communicate()[1]
        assert process.returncode == -9, f"it was to be killed, but ended with {process.returncode}: {said[-2000:]}"
        return said

    return run
