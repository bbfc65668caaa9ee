"""Draws long work at a terminal, or as a line now and then in a log. Used by the command line only."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

LOG_EVERY = 15.0
"""Seconds between two lines when the output is not a terminal."""


class Drawn:
    """A `Progress` on standard error: bars with rate and time left."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._live = self._console.is_terminal
        self._bars = Bars(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn("left"), TimeRemainingColumn(), TextColumn("[dim]{task.fields[note]}"),
            console=self._console, disable=not self._live,
        )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}
        self._began: dict[str, tuple[float, int]] = {}
        self._said: dict[str, float] = {}

    def __enter__(self) -> "Drawn":
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
        left = f", {(total - done) / rate:,.0f} s left" if rate and done < total else ""
        print(f"{task}: {done}/{total}{left}{', ' + note if note else ''}", file=sys.stderr, flush=True)
