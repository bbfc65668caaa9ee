"""The HTTP side: routes, streams and errors. Everything that takes time happens in the batch's worker."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from cotvalve import types
from cotvalve.engines.sampling import Encoded
from cotvalve.errors import EngineError, SettingError
from cotvalve.prompts import render_messages
from cotvalve.serve.batching import Batcher, Busy
from cotvalve.serve.protocol import Ask, Dial, Json, Refused, Split, choice, parse, usage
from cotvalve.types import Completion

if TYPE_CHECKING:
    import socket

    from cotvalve.serve import ServeSettings
    from cotvalve.valve import Valve

PATIENCE = 5
"""Seconds in which chains that run may end when the server is stopped; then their clients are told that it stops."""
FAREWELL = 2
"""Seconds more in which they can be told, before their connections are cut."""

Event = tuple[int, "str | Completion | EngineError"]

_GONE = 499
"""The status that nobody reads: the client has closed the connection."""
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class Service:
    """One valve being served."""

    def __init__(self, valve: Valve, settings: ServeSettings) -> None:
        self.valve, self.settings = valve, settings
        self.began = int(time.time())
        self.batcher = Batcher(
            valve, engine=settings.engine, slots=settings.slots, context=settings.context, queue=settings.queue
        )
        self.dial = Dial.of(valve, settings, self.batcher.streams)

    async def read(self, request: Request) -> Ask:
        """The request's body, no longer than allowed, checked."""
        # Another site's page may not post JSON here without asking the browser first, which nobody answers.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(400, "the content-type is not application/json")
        most, body = self.settings.most_bytes, bytearray()
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise Refused(
                    413, f"the body is larger than {most} bytes; send a shorter conversation", code="request_too_large"
                )
        return parse(bytes(body))

    def requests(self, ask: Ask, alpha: float, id: str, seed: int) -> list[Encoded]:
        """One request to the engine per choice; choice i has the seed plus i."""
        how = self.settings
        count, most = ask.n or 1, min(how.most_choices, how.queue)  # all choices are queued, or none
        if count > most:
            raise Refused(400, f"n is {count}, this server gives up to {most} choices", param="n")
        budget = ask.max_completion_tokens or ask.max_tokens or how.max_new_tokens
        try:
            prompt = render_messages(self.valve.tokenizer, [message.plain() for message in ask.messages])
            first = self.batcher.encode(
                types.Request(
                    f"{id}-0", prompt, alpha, min(budget, self.batcher.context),
                    how.temperature if ask.temperature is None else ask.temperature,
                    how.top_p if ask.top_p is None else ask.top_p, seed,
                )
            )  # fmt: skip
        except SettingError as error:
            code = "context_length_exceeded" if "tokens" in str(error) else None
            raise Refused(400, str(error), param="messages", code=code) from None
        return [
            Encoded(replace(first.request, id=f"{id}-{i}", seed=(seed + i) % 2**63), first.ids, first.room)
            for i in range(count)
        ]

    def start(self, wanted: list[Encoded], watch: bool) -> asyncio.Queue[Event]:
        """Queues the choices; what becomes of them arrives in the returned queue as (choice, what)."""
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def listener(index: int) -> Any:
            def told(event: str | Completion | EngineError) -> None:
                # The loop may be gone when the server stops while chains still run.
                with suppress(RuntimeError):
                    loop.call_soon_threadsafe(events.put_nowait, (index, event))

            return told

        try:
            self.batcher.submit(wanted, [listener(i) for i in range(len(wanted))], watch=watch)
        except Busy as error:
            raise Refused(429, str(error), code="queue_full") from None
        except EngineError as error:
            raise Refused(503, str(error)) from None
        return events

    async def answer(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        ask = await self.read(request)
        alpha = self.dial.position(ask)
        id = f"chatcmpl-{secrets.token_hex(12)}"
        # A drawn seed is one that JavaScript's numbers hold, so that who reads it can send it back.
        seed = (secrets.randbits(53) if ask.seed is None else ask.seed) % 2**63
        wanted = self.requests(ask, alpha, id, seed)
        head = {"id": id, "created": int(time.time()), "model": self.dial.name, "seed": seed, **self.dial.told(alpha)}
        events = self.start(wanted, bool(ask.stream))
        if ask.stream:
            options = ask.stream_options
            lines = self._stream(head, wanted, events, options is not None and options.include_usage)
            return StreamingResponse(
                lines, media_type="text/event-stream", headers={"cache-control": "no-cache", "x-accel-buffering": "no"}
            )
        try:
            completions = await self._gather(request, events, len(wanted))
        finally:
            self.batcher.drop([e.request.id for e in wanted])
        if completions is None:
            return Response(status_code=_GONE)
        choices = [choice(i, c, wanted[i].request.prompt) for i, c in enumerate(completions)]
        return JSONResponse({**head, "object": "chat.completion", "choices": choices, "usage": usage(completions)})

    async def _gather(self, request: Request, events: asyncio.Queue[Event], count: int) -> list[Completion] | None:
        """All choices, or None when the client has gone."""
        found: dict[int, Completion] = {}
        left = asyncio.ensure_future(_left(request))
        try:
            while len(found) < count:
                event = asyncio.ensure_future(events.get())
                await asyncio.wait({event, left}, return_when=asyncio.FIRST_COMPLETED)
                if not event.done():
                    event.cancel()
                    return None
                index, what = event.result()
                if isinstance(what, EngineError):
                    raise Refused(503, str(what))
                if isinstance(what, Completion):
                    found[index] = what
        finally:
            left.cancel()
        return [found[i] for i in range(count)]

    async def _stream(
        self, head: Json, wanted: list[Encoded], events: asyncio.Queue[Event], with_usage: bool
    ) -> AsyncIterator[str]:
        head = {**head, "object": "chat.completion.chunk"}
        splits = [Split(e.request.prompt) for e in wanted]
        found: list[Completion] = []

        def chunk(index: int, delta: Json, finish: str | None = None) -> str:
            return _line(
                {**head, "choices": [{"index": index, "delta": delta, "finish_reason": finish, "logprobs": None}]}
            )

        try:
            for i in range(len(wanted)):
                yield chunk(i, {"role": "assistant", "content": ""})
            told: set[int] = set()
            while len(found) < len(wanted):
                index, what = await events.get()
                if isinstance(what, EngineError):
                    yield _line(Refused(503, str(what)).body())
                    return
                if isinstance(what, str):
                    told.add(index)
                    if delta := splits[index].add(what):
                        yield chunk(index, delta)
                    continue
                # An engine that cannot be watched gives its text here, in one piece.
                if delta := splits[index].add("" if index in told else what.text, last=True):
                    yield chunk(index, delta)
                found.append(what)
                yield chunk(index, {}, what.finish)
            if with_usage:
                yield _line({**head, "choices": [], "usage": usage(found)})
            yield "data: [DONE]\n\n"
        finally:
            # Reached as well when the client has gone: its slots are free for others.
            self.batcher.drop([e.request.id for e in wanted])

    def models(self) -> Json:
        """GET /v1/models."""
        one = {
            "id": self.dial.name,
            "object": "model",
            "created": self.began,
            "owned_by": "cotvalve",
            "dial": self.dial.card(),
        }
        return {"object": "list", "data": [one]}

    def health(self) -> tuple[int, Json]:
        """GET /health: status code and body."""
        running, waiting = self.batcher.load
        alive = self.batcher.alive
        return 200 if alive else 503, {"status": "ok" if alive else "stopped", "running": running, "waiting": waiting}


def create_app(valve: Valve, settings: ServeSettings) -> FastAPI:
    """The application around a loaded valve; the batch's worker stops with the application."""
    service = Service(valve, settings)
    page = (files("cotvalve") / "serve" / "page.html").read_text(encoding="utf-8")

    @asynccontextmanager
    async def life(_app: FastAPI) -> AsyncGenerator[None]:
        yield
        await asyncio.to_thread(service.batcher.close)

    # FastAPI's own documentation pages load scripts from elsewhere.
    app = FastAPI(title="cotvalve", lifespan=life, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.dial, app.state.service = service.dial, service

    async def refused(_request: Request, error: Exception) -> JSONResponse:
        headers = None
        if isinstance(error, HTTPException):
            headers = error.headers
            there = f"send {headers['Allow']}" if headers and "Allow" in headers else "there is /v1/chat/completions, /v1/models, /health and /"
            error = Refused(error.status_code, f"{error.detail}: {there}")
        assert isinstance(error, Refused)
        return JSONResponse(error.body(), error.status, headers)

    async def failed(_request: Request, _error: Exception) -> JSONResponse:
        return JSONResponse(Refused(500, "the server failed; its log says why").body(), 500)

    async def gone(_request: Request, _error: Exception) -> Response:
        return Response(status_code=_GONE)

    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(Exception, failed)
    app.add_exception_handler(HTTPException, refused)

    async def health(_request: Request) -> JSONResponse:
        status, body = service.health()
        return JSONResponse(body, status)

    async def models(_request: Request) -> JSONResponse:
        return JSONResponse(service.models())

    async def model(request: Request) -> JSONResponse:
        (only,) = service.models()["data"]
        if (name := request.path_params["name"]) != only["id"]:
            raise Refused(404, f"model '{name}' is not served; expected '{only['id']}'", param="model", code="model_not_found")
        return JSONResponse(only)

    async def index(_request: Request) -> HTMLResponse:
        return HTMLResponse(page, headers={"content-security-policy": _POLICY, "referrer-policy": "no-referrer"})

    app.add_route("/v1/chat/completions", service.answer, methods=["POST"])
    app.add_route("/v1/models", models, methods=["GET"])
    app.add_route("/v1/models/{name:path}", model, methods=["GET"])  # a hub id has a slash
    app.add_route("/health", health, methods=["GET"])
    app.add_route("/", index, methods=["GET"])
    return app


class Server(uvicorn.Server):
    """uvicorn, which cuts off whoever still waits when it stops (500 and a traceback), and here tells them first."""

    def __init__(self, app: FastAPI) -> None:
        """`app` is from `create_app`."""
        super().__init__(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=PATIENCE + FAREWELL))
        self._batcher: Batcher = app.state.service.batcher

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        telling = asyncio.get_running_loop().call_later(PATIENCE, self._batcher.stop)
        await super().shutdown(sockets)
        telling.cancel()


async def _left(request: Request) -> None:
    """Returns when the client has closed the connection (its body has been read)."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _line(body: Json) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
