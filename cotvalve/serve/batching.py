"""One worker thread between the requests that wait and the engine: chains of any alpha share its batch.

`submit` may be called from any thread; what becomes of a request is told to its own listener, from the worker.
A chain that fails takes nobody with it where the failure is its own; when the backend fails, all chains that
run are told so and the worker goes on with new ones.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from cotvalve.engines import pick
from cotvalve.engines.generate import GenerateEngine
from cotvalve.engines.sampling import Codec, Encoded
from cotvalve.errors import EngineError, SettingError
from cotvalve.types import Completion, Request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cotvalve.engines import Engine
    from cotvalve.engines.live import Piece
    from cotvalve.valve import Valve

Told = Callable[["str | Completion | EngineError"], None]
"""What a listener hears: text that a chain has grown by, at last its completion, or why there will be none."""


class Busy(EngineError):
    """More requests wait than the server takes."""


class Front(Protocol):
    """What the worker turns: `Live`, or `Whole` around an engine that cannot be joined on the way."""

    streams: bool
    """True when chains are told piece by piece."""
    slots: int
    """Chains at once."""

    @property
    def busy(self) -> bool: ...
    @property
    def waiting(self) -> int:
        """Requests that were added and do not run yet."""
        ...

    def add(self, encoded: Encoded, *, watch: bool = False) -> None: ...
    def drop(self, id: str) -> None: ...
    def step(self) -> Sequence[Piece | Completion]: ...
    def close(self) -> None: ...


class Whole:
    """Batch after batch on an engine that takes a list and gives completions: what comes in waits for the next."""

    streams = False

    def __init__(self, valve: Valve, engine: Engine) -> None:
        self.valve, self.engine = valve, engine
        # vLLM, the other one, looks after its memory by itself.
        self.slots = engine.batch if isinstance(engine, GenerateEngine) else 1
        self._waiting: list[Encoded] = []

    @property
    def busy(self) -> bool:
        """True while a request waits."""
        return bool(self._waiting)

    @property
    def waiting(self) -> int:
        """Requests of the next batch."""
        return len(self._waiting)

    def add(self, encoded: Encoded, *, watch: bool = False) -> None:  # noqa: ARG002  nothing can be watched here
        """Puts a request into the next batch."""
        self._waiting.append(encoded)

    def drop(self, id: str) -> None:
        """Takes a request out of the next batch."""
        self._waiting = [e for e in self._waiting if e.request.id != id]

    def step(self) -> list[Piece | Completion]:
        """Runs the next batch; with an exact task vector, the requests of one alpha."""
        if not self._waiting:  # all of them were dropped
            return []
        first = self._waiting[0].request.alpha
        now = [e for e in self._waiting if self.valve.rows or e.request.alpha == first]
        self._waiting = [e for e in self._waiting if e not in now]
        return list(self.engine.generate([e.request for e in now]))

    def close(self) -> None:
        """Nothing is held."""


class Unfold:
    """Token ids to text as they come: what it gives, put together, is the whole text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = self._read = 0
        self.text = ""
        """Everything given so far."""

    def add(self, ids: Sequence[int]) -> str:
        """The text that `ids` complete; a character whose bytes are not all there waits for the rest."""
        self._ids += ids
        # The tokens before are decoded along: a token's text may depend on its neighbour (leading spaces).
        before = str(self._tokenizer.decode(self._ids[self._start : self._read], skip_special_tokens=False))
        after = str(self._tokenizer.decode(self._ids[self._start :], skip_special_tokens=False))
        if after.endswith("\ufffd") or not after.startswith(before):
            return ""
        self._start, self._read = self._read, len(self._ids)
        grown = after[len(before) :]
        self.text += grown
        return grown

    def rest(self, whole: str) -> str:
        """What of the finished text was not given yet."""
        return whole[len(self.text) :] if whole.startswith(self.text) else ""


@dataclass(slots=True)
class _Job:
    encoded: Encoded
    told: Told
    text: Unfold | None
    """None for a request that only wants its completion."""
    running: bool = False
    """Whether the engine has it, in a slot or waiting for one."""


class Batcher:
    """The queue, the worker and the engine of one server."""

    def __init__(
        self, valve: Valve, *, engine: str = "auto", slots: int | None = None, context: int = 8192, queue: int = 256
    ) -> None:
        """Up to `slots` chains at once of up to `context` tokens with their prompt; `queue` more may wait."""
        self.valve, self.queue = valve, queue
        limit = int(getattr(valve.model.config, "max_position_embeddings", 0) or context)
        self.context = min(context, limit)
        self._codec = Codec(valve.model, valve.tokenizer)
        self._slots = slots
        self._engine = pick(engine, valve, slots)
        self._front = self._open()
        self.streams = self._front.streams
        """True when text comes as it is written; else a chain comes whole."""
        self._wake = threading.Condition()
        self._arrived: deque[_Job] = deque()
        self._gone: deque[str] = deque()
        self._jobs: dict[str, _Job] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="cotvalve-batch", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """True while the worker works."""
        return self._thread.is_alive() and not self._closing

    @property
    def load(self) -> tuple[int, int]:
        """Requests that run, and that wait."""
        jobs = list(self._jobs.values())
        front = getattr(self, "_front", None)  # none while a fresh one is opened
        running = max(0, sum(job.running for job in jobs) - (front.waiting if front else 0))
        return running, len(jobs) - running

    def encode(self, request: Request) -> Encoded:
        """The request with its prompt's ids; SettingError when the prompt does not fit."""
        fits, refused = self._codec.encode([request])
        if refused:
            raise SettingError(f"{refused[0].reason}; send a shorter conversation")
        room = min(fits[0].room, self.context - len(fits[0].ids))
        if room < 1:
            raise SettingError(
                f"the prompt has {len(fits[0].ids)} tokens, the server takes {self.context}; send a shorter conversation"
            )
        # The request's random numbers are drawn for all of its budget at once.
        return Encoded(replace(request, max_new_tokens=room), fits[0].ids, room)

    def submit(self, wanted: Sequence[Encoded], told: Sequence[Told], *, watch: bool = False) -> None:
        """Queues requests, all or none; each listener is called from the worker. Raises Busy when too many wait."""
        with self._wake:
            if not self.alive:
                raise EngineError("the server is stopping")
            if self.load[1] + len(wanted) > self.queue:
                raise Busy(f"{self.load[1]} requests wait already, the server takes {self.queue}; try again later")
            for encoded, listener in zip(wanted, told, strict=True):
                unfold = Unfold(self.valve.tokenizer) if watch else None
                job = self._jobs[encoded.request.id] = _Job(encoded, listener, unfold)
                self._arrived.append(job)
            self._wake.notify()

    def drop(self, ids: Sequence[str]) -> None:
        """Forgets requests whose client has gone; finished ones are none the worse."""
        with self._wake:
            self._gone.extend(id for id in ids if self._jobs.pop(id, None) is not None)
            self._wake.notify()

    def stop(self) -> None:
        """Takes nothing more and tells whoever still waits; the worker ends after the step it is at."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._fail("the server is stopping")

    def close(self, seconds: float = 10.0) -> None:
        """Stops the worker; whoever still waits is told so."""
        self.stop()
        self._thread.join(seconds)

    def _open(self) -> Front:
        import torch

        from cotvalve.engines.transformers import TransformersEngine

        if isinstance(self._engine, TransformersEngine):
            from cotvalve.engines.live import Live

            try:
                return Live(self.valve, slots=self._slots, context=self.context)
            except torch.OutOfMemoryError as error:
                raise EngineError(
                    f"{self._slots or 'slots'} chains of {self.context} tokens do not fit into the device's memory; "
                    "give fewer --slots or a smaller --context"
                ) from error
        return Whole(self.valve, self._engine)

    def _work(self) -> None:
        try:
            while self._take():
                try:
                    events = self._front.step()
                # Whatever torch raises (out of memory first of all) is a RuntimeError.
                except (RuntimeError, EngineError) as error:
                    self._recover(error)
                    continue
                for event in events:
                    self._tell(event)
        finally:
            self._closing = True
            if front := getattr(self, "_front", None):  # none when opening a fresh one failed as well
                front.close()
            self._fail("the server is stopping")

    def _take(self) -> bool:
        """Hands what has arrived to the engine; sleeps while there is nothing to do. False when it is time to stop."""
        with self._wake:
            while not (self._closing or self._arrived or self._gone or self._front.busy):
                self._wake.wait()
            while self._gone:
                self._front.drop(self._gone.popleft())
            while self._arrived:
                job = self._arrived.popleft()
                if self._jobs.get(job.encoded.request.id) is job:
                    job.running = True
                    self._front.add(job.encoded, watch=job.text is not None)
            return not self._closing

    def _tell(self, event: Piece | Completion) -> None:
        job = self._jobs.get(event.id)
        if job is None:
            return
        if not isinstance(event, Completion):
            if job.text is not None and (grown := job.text.add(event.ids)):
                job.told(grown)
            return
        with self._wake:
            self._jobs.pop(event.id, None)
        if job.text is not None and (rest := job.text.rest(event.text)):
            job.told(rest)
        job.told(event)

    def _recover(self, error: RuntimeError | EngineError) -> None:
        """After a failure of the backend: its chains are told, and a fresh batch, smaller when memory ran out, is opened."""
        import torch

        self._front.close()
        out = isinstance(error, torch.OutOfMemoryError)
        if out:
            self._slots = max(1, self._front.slots // 2)
            if isinstance(self._engine, GenerateEngine):
                self._engine.batch = self._slots
        said = (
            f"out of memory; the server goes on with {self._slots} slots, try again"
            if out
            else f"the engine failed: {error}"
        )
        self._fail(said, only_running=True)
        # The frames in the traceback hold the old batch's memory.
        error.__traceback__ = None
        del self._front
        if out:
            torch.cuda.empty_cache()
        self._front = self._open()

    def _fail(self, why: str, *, only_running: bool = False) -> None:
        with self._wake:
            failed = [job for job in self._jobs.values() if job.running or not only_running]
            for job in failed:
                self._jobs.pop(job.encoded.request.id, None)
        for job in failed:
            job.told(EngineError(why))
