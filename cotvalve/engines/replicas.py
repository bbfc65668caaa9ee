"""One engine on several GPUs: a copy of the model on each, and the requests dealt out among them.

The first copy is the valve's own, in this process; each further one has a GPU and a process. A request's chain does not
depend on what else is in its batch (in 16 bits but for near ties), so the chains are those of one GPU. A process that dies
loses no finished chain: what it had left is dealt out again.
"""

from __future__ import annotations

import multiprocessing
import pickle
import queue
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import torch

from cotvalve.errors import CotvalveError, EngineError, SettingError
from cotvalve.types import Completion, Progress, Request, silent

if TYPE_CHECKING:
    from cotvalve.engines import Engine
    from cotvalve.valve import Valve

Said = tuple["Copy", str, Any]
"""Who says what: "made" and a completion, "failed" and a line, "done", or "died"."""


class Replicas:
    """An engine and copies of it."""

    def __init__(self, valve: Valve, engine: Engine, devices: Sequence[str], batch: int | None = None) -> None:
        """`engine` is the one on `valve`; a process with the same one starts for each of `devices`, all at once."""
        if valve.source is None:
            raise SettingError("only a model that Valve.load has loaded can be copied to other GPUs; set gpus to 1")
        self.valve, self.name, self._own = valve, engine.name, engine
        self._copies = [Copy(valve.source, device, engine.name, batch, len(devices) + 1) for device in devices]
        self._end = weakref.finalize(self, _end, self._copies)

    def facts(self) -> dict[str, str]:
        """See `Engine.facts`."""
        own = self._own.facts()
        return own | {"engine": f"{own['engine']}, {len(self._copies) + 1} copies"}

    def close(self) -> None:
        """Ends the other processes; this one goes on alone."""
        self._end()

    def generate(self, requests: Iterable[Request], progress: Progress = silent) -> Iterator[Completion]:
        """See `Engine.generate`."""
        if self.valve.direction is not None and not self.valve.rows:
            raise SettingError("an exact task vector runs on one GPU; set gpus to 1, or extract the direction with a rank")
        asked = sorted(requests, key=lambda request: request.alpha)
        left = {str(i): replace(request, id=str(i)) for i, request in enumerate(asked)}
        tokens, began = 0, time.monotonic()
        progress("sample", 0, len(asked), f"engine {self.facts()['engine']}")
        while left:
            for completion in self._round(list(left.values())):
                del left[completion.id]
                tokens += completion.tokens
                progress("sample", len(asked) - len(left), len(asked), f"{tokens / (time.monotonic() - began):,.0f} tokens/s")
                yield replace(completion, id=asked[int(completion.id)].id)
            if left:
                progress("sample", len(asked) - len(left), len(asked), "a process died: what it had left goes to the others")

    def _round(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """What comes of `requests`: of all of them, unless a process dies."""
        running = [copy for copy in self._copies if copy.alive]
        # One by one in the order of alpha, so that each has as many long chains as the others.
        hands = [requests[i :: len(running) + 1] for i in range(len(running) + 1)]
        said: queue.Queue[Said] = queue.Queue()
        for copy, hand in zip(running, hands[1:], strict=True):
            copy.run(self.valve, hand, said)

        def taken() -> Iterator[Completion]:
            copy, what, found = said.get()
            if what == "made":
                yield found
                return
            running.remove(copy)
            if what == "failed":
                raise EngineError(f"on {copy.device}: {found}")

        try:
            for completion in self._own.generate(hands[0]):
                yield completion
                while not said.empty():
                    yield from taken()
            while running:
                yield from taken()
        finally:
            if running:  # nobody waits any more for what they are at
                self.close()


class Copy:
    """A process with the model and its engine."""

    def __init__(self, source: dict[str, Any], device: str, engine: str, batch: int | None, share: int) -> None:
        """Starts it; it is ready when it answers."""
        self.device = device
        context = multiprocessing.get_context("spawn")
        self._line, other = context.Pipe()
        self._process = context.Process(target=_work, args=(other, source, device, engine, batch, share), daemon=True)
        self._process.start()
        other.close()
        self._gone = False
        self._turned_to: object = None

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return not self._gone and self._process.is_alive()

    def run(self, valve: Valve, requests: Sequence[Request], said: queue.Queue[Said]) -> None:
        """Asks for `requests` at the valve's direction; what it says arrives in `said`, at last that it is done, has failed or died."""
        turned = valve.direction if valve.direction is not self._turned_to else None
        self._turned_to = valve.direction
        threading.Thread(target=self._listen, args=(pickle.dumps((turned, list(requests))), said), daemon=True).start()

    def _listen(self, message: bytes, said: queue.Queue[Said]) -> None:
        try:
            self._line.send_bytes(message)
            what = "made"
            while what == "made":
                what, found = pickle.loads(self._line.recv_bytes())
                said.put((self, what, found))
        except (EOFError, OSError):
            self._gone = True  # and not waited for here: two threads that wait for one process confuse each other
            said.put((self, "died", None))

    def end(self) -> None:
        """Kills it."""
        self._gone = True
        self._process.kill()
        self._process.join()


def _end(copies: Sequence[Copy]) -> None:
    for copy in copies:
        copy.end()


def _work(line: Connection, source: dict[str, Any], device: str, engine: str, batch: int | None, share: int) -> None:
    """A copy's process: ends when the one that started it is gone."""
    from cotvalve.engines import pick
    from cotvalve.valve import Valve

    def say(what: str, found: object = None) -> None:
        line.send_bytes(pickle.dumps((what, found)))

    with suppress(EOFError, OSError, KeyboardInterrupt):
        trouble, valve, own = "", None, None
        try:
            if torch.device(device).type == "cuda":
                torch.cuda.set_device(device)
            else:
                torch.set_num_threads(max(1, torch.get_num_threads() // share))
            valve = Valve.load(**source, device=device)
        except (CotvalveError, RuntimeError) as error:
            trouble = str(error)
        while True:
            direction, requests = pickle.loads(line.recv_bytes())
            try:
                if valve is None:
                    raise EngineError(trouble)
                if direction is not None and not valve.turn_to(direction):
                    own = None
                own = own or pick(engine, valve, batch)
                for completion in own.generate(requests):
                    say("made", completion)
                say("done")
            except (CotvalveError, RuntimeError) as error:
                say("failed", str(error))
