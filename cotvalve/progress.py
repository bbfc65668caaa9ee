"""What the command line says beside its results: long work as bars or lines, and the package's warnings as lines.

Used by the command line only. The bars and warnings of the libraries underneath are silenced there: they would
stand between ours. Downloads from the hub keep theirs, which have the rate and the time left.
"""

import logging
import os
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text

LOG_EVERY = 15.0
"""Seconds between two lines when the output is not a terminal."""


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Rows, steps or chains a second."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.3g}/s" if speed else "", style="dim")


class Drawn:
    """A `Progress` on standard error: bars with rate and time left."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._live = self._console.is_terminal
        self._bars = Bars(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), TextColumn("[dim]{task.fields[note]}"),
            console=self._console, disable=not self._live,
        )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}
        self._began: dict[str, tuple[float, int]] = {}
        self._said: dict[str, float] = {}

    def __enter__(self) -> "Drawn":
        hush()
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.stop()

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        """See `types.Progress`."""
        if self._live:
            # A task that starts over (the next direction of a sweep) gets a new bar.
            if task not in self._tasks or (known := self._bars.tasks[self._tasks[task]]).completed > done or known.finished:
                self._tasks[task] = self._bars.add_task(task, total=total, note=note)
            self._bars.update(self._tasks[task], completed=done, total=total, note=note)
            return
        now = time.monotonic()
        if task not in self._began or done < self._began[task][1]:
            self._began[task] = now, done
        if now - self._said.get(task, -LOG_EVERY) < LOG_EVERY and done < total:
            return
        self._said[task] = now
        since, first = self._began[task]
        rate = (done - first) / (now - since) if now > since else 0.0
        left = f", {rate:,.3g}/s, {(total - done) / rate:,.0f} s left" if rate and done < total else ""
        print(f"{task}: {done}/{total}{left}{', ' + note if note else ''}", file=sys.stderr, flush=True)


class Notes(logging.Handler):
    """What the package logs, each as one line on standard error: where a model runs, and warnings as notes."""

    def emit(self, record: logging.LogRecord) -> None:
        """Says the line where standard error is now: bars and tests put another in its place."""
        mark = "cotvalve: note: " if record.levelno >= logging.WARNING else ""
        print(f"{mark}{' '.join(record.getMessage().split())}", file=sys.stderr, flush=True)

    @classmethod
    def on(cls) -> None:
        """Puts one on the package's logger."""
        logger = logging.getLogger("cotvalve")
        if not any(isinstance(handler, cls) for handler in logger.handlers):
            logger.addHandler(cls())
        logger.setLevel(logging.INFO)


def hush() -> None:
    """Turns off the bars and warnings of transformers and datasets, in this process."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging as transformers_logging

    downloads = not are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # the hub's too
    if downloads:
        enable_progress_bars()
