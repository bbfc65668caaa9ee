"""math-verify in a process of its own, so that no text can hang or bloat the process that grades it.

`judge(gold, given)` asks the worker; the worker is started when first needed (`python -m cotvalve.mathjudge`,
JSON lines over pipes), lives on, and is killed and replaced when an answer takes it too long or too much
memory. math-verify's own limit is an alarm signal, which fails outside the main thread; this works from any
thread and after a fork.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from cotvalve.errors import EngineError

SECONDS = 4.0
"""What one grade may cost in all. The slowest of MATH-500's answers takes 0.2 s; a new worker, 1 s more."""
START_SECONDS = 120.0
ABANDONED_SECONDS = 60
"""A worker that still evaluates then has lost the process that asked, which would have ended it."""
MEMORY = 2 << 30
"""Bytes of address space the worker may use."""

TOO_LONG = "took too long to evaluate"
FAILED = "could not be evaluated (too much memory, or math-verify failed on it)"
NOT_EQUAL = "not equal to the gold answer"
NOT_READ = "not readable as mathematics"


class Judge:
    """The worker process and its pipes; one question at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._parents: subprocess.Popen[str] | None = None

    def ask(self, gold: str, given: str, seconds: float) -> str:
        """Empty when equal, else the reason why not; back within `seconds` once a worker has the question (twice that, when one dies of it)."""
        line = json.dumps({"gold": gold, "given": given}) + "\n"
        with self._lock:
            for _ in range(2):  # a worker that died may have been killed by others: the question gets a second one
                if self._process is None or self._process.poll() is not None:
                    self._start()  # takes its own time: imports on a busy machine are not the question's slowness
                answer = self._exchange(line, seconds)
                if answer is None:
                    return TOO_LONG
                if answer:
                    return json.loads(answer)["reason"]
        return FAILED

    def close(self) -> None:
        """Ends the worker."""
        with self._lock:
            self._discard()

    def _start(self) -> None:
        self._discard()
        paths = [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cotvalve.mathjudge"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
            process_group=0,  # a Ctrl-C at the terminal is for this process, which has chains to grade before it ends
        )
        if not self._exchange("", START_SECONDS):
            raise EngineError(
                "the math-verify worker did not start; see why with: python -m cotvalve.mathjudge < /dev/null"
            )

    def _exchange(self, line: str, seconds: float) -> str | None:
        """The worker's next line; empty when the worker died, None when it was killed for its slowness."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            process.kill()

        timer = threading.Timer(seconds, expire)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline()
        except OSError:
            answer = ""
        finally:
            timer.cancel()
            timer.join()
        if expired.is_set() or not answer.endswith("\n"):
            self._discard()
        return None if expired.is_set() else answer

    def _discard(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            try:
                if pipe:
                    pipe.close()
            except OSError:  # a line that could not be written to the dead worker
                pass
        process.wait()

    def after_fork(self) -> None:
        """A child process leaves its parent's worker alone and starts its own."""
        self._lock = threading.Lock()
        self._parents, self._process = self._process, None  # kept, for dropping it would warn that it still runs
        if self._parents and self._parents.stdin and self._parents.stdout:
            self._parents.stdin.close()
            self._parents.stdout.close()


_judge = Judge()
atexit.register(_judge.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_judge.after_fork)


_verdicts: dict[tuple[str, str], str] = {}
MAX_VERDICTS = 50_000


class Deadline:
    """When a grade of several parts must be done."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds that remain."""
        return self._end - time.monotonic()


def judge(gold: str, given: str, deadline: Deadline) -> str:
    """Empty when math-verify takes `given` for `gold`, else the reason why not. Verdicts are kept."""
    known = _verdicts.get((gold, given))
    if known is not None:
        return known
    seconds = deadline.left()
    if seconds <= 0:
        return TOO_LONG
    reason = _judge.ask(gold, given, seconds)
    if reason != TOO_LONG or seconds > 0.9 * SECONDS:  # a pair that had little time left may do better alone
        if len(_verdicts) >= MAX_VERDICTS:
            _verdicts.clear()
        _verdicts[gold, given] = reason
    return reason


def _limit_memory() -> None:
    try:
        import resource
    except ImportError:  # Windows has no such limit; the time limit still holds
        return
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ValueError, OSError):  # macOS refuses a limit on address space
        return


def main() -> None:
    """Answers questions on standard input until it closes."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints cannot mix with the answers
    from math_verify import parse, verify

    _limit_memory()
    answers.write("{}\n")
    answers.flush()
    alarm = getattr(signal, "alarm", lambda _seconds: 0)  # Windows has none
    for line in sys.stdin:
        question = json.loads(line)
        alarm(ABANDONED_SECONDS)  # nothing handles it: the kernel ends this process, whatever it computes
        try:
            gold = parse(f"${question['gold']}$", parsing_timeout=0)
            given = parse(f"${question['given']}$", parsing_timeout=0)
            reason = NOT_READ if not given else "" if verify(gold, given, timeout_seconds=0) else NOT_EQUAL
        except (MemoryError, RecursionError):
            reason = FAILED
        alarm(0)
        answers.write(json.dumps({"reason": reason}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
