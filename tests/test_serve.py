"""The server over real HTTP on the loopback: mixed alphas, streams, errors, disconnects, the page."""

import asyncio
import json
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cotvalve import Valve
from cotvalve.adapters import Factor
from cotvalve.calibration import Calibration, Error, Position
from cotvalve.direction import Card, Direction
from cotvalve.engines import pick
from cotvalve.engines.generate import GenerateEngine
from cotvalve.engines.live import Live, Piece
from cotvalve.engines.sampling import Codec, Encoded
from cotvalve.errors import CotvalveError, EngineError, SettingError
from cotvalve.problems import load
from cotvalve.prompts import render_messages
from cotvalve.serve import ServeSettings, listen, run
from cotvalve.serve.batching import Batcher, Busy, Front, Unfold, Whole
from cotvalve.serve.protocol import Ask, Refused, Split, usage
from cotvalve.taskvector import TaskVector
from cotvalve.types import Completion, Interval, Request

httpx = pytest.importorskip("httpx")
pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

QUESTIONS = [problem.question for problem in load("arithmetic", split="test", limit=4)]
ALPHAS = (0.0, 0.3, 0.6, 1.0)
BUDGET = 90


def random_direction(model: torch.nn.Module) -> Direction:
    """Strong enough to change chains at 0.3, on every linear layer of the model."""
    random = torch.Generator().manual_seed(0)
    factors: dict[str, Factor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            rows, columns = module.weight.shape
            a = torch.randn(4, columns, generator=random) / columns**0.5
            factors[name] = Factor(A=a, B=0.3 * torch.randn(rows, 4, generator=random), lora_alpha=8)
    return Direction(factors, Card("tiny-reasoner", "shorter"))


def calibration() -> Calibration:
    """A dial from 300 tokens at 0 to 100 at 1."""
    none = Interval(0.0, 0.0)
    positions = tuple(
        Position(alpha, tokens, Interval(tokens, tokens), 90.0, none, 0.0, Interval(low, 0.0), 0.0, 0.0, 0.0, tokens)
        for alpha, tokens, low in ((0.0, 300.0, 0.0), (0.5, 200.0, -2.0), (1.0, 100.0, -30.0))
    )
    return Calibration(positions, 5.0, 5.0, Error(0.05, 0.08, None, Interval(0.6, 1.5)), 40, "40 held-out questions")


@pytest.fixture(scope="module")
def valve() -> Valve:
    plain = Valve.load("tiny-reasoner", dtype="float32", device="cpu")
    made = Valve(plain.model, plain.tokenizer, random_direction(plain.model))
    made.calibration = calibration()
    return made


@pytest.fixture(scope="module")
def expected(valve: Valve) -> dict[tuple[str, float], Completion]:
    """Every question at every alpha, one run each, before any server holds the model."""
    return {
        (question, alpha): valve.generate(question, alpha=alpha, prompt="plain", max_new_tokens=BUDGET)[0]
        for question in QUESTIONS
        for alpha in ALPHAS
    }


class Server:
    """A server in a thread."""

    def __init__(self, valve: Valve, **how: Any) -> None:
        from cotvalve.serve import app as http

        socket = listen("127.0.0.1", 0)
        app = http.create_app(valve, ServeSettings(model="tiny-reasoner", **{"slots": 8, **how}))
        self.service = app.state.service
        self._server = http.Server(app)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [socket]}, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{socket.getsockname()[1]}"
        self.client = httpx.Client(base_url=self.url, timeout=120)

    def ask(self, question: str = QUESTIONS[0], **fields: Any) -> Any:
        body = {"messages": [{"role": "user", "content": question}], "max_tokens": BUDGET, **fields}
        return self.client.post("/v1/chat/completions", json=body)

    def stream(self, question: str = QUESTIONS[0], **fields: Any) -> list[dict[str, Any]]:
        body = {"messages": [{"role": "user", "content": question}], "max_tokens": BUDGET, "stream": True, **fields}
        with self.client.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            told = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        assert told[-1] == "[DONE]"
        return [json.loads(line) for line in told[:-1]]

    def idle(self, seconds: float = 20) -> bool:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            load = self.client.get("/health").json()
            if load["running"] == load["waiting"] == 0:
                return True
            time.sleep(0.05)
        return False

    def stop_listening(self) -> None:
        self._server.should_exit = True

    def stop(self) -> None:
        self.client.close()
        self.stop_listening()
        self._thread.join(30)
        assert not self._thread.is_alive()


@pytest.fixture(scope="module")
def server(valve: Valve, expected: dict[tuple[str, float], Completion]) -> Iterator[Server]:
    assert expected
    before = valve.model.config._attn_implementation
    started = Server(valve)
    yield started
    started.stop()
    assert valve.model.config._attn_implementation == before


def said(message: dict[str, Any]) -> str:
    """Thinking and answer, without marks and blank lines."""
    return f"{message.get('reasoning_content') or ''}|{message.get('content') or ''}".strip()


def parts(completion: Completion, prompt: str = "") -> str:
    return said(Split(prompt).add(completion.text, last=True))


# One batch, many alphas


def test_requests_of_different_alpha_share_a_batch_and_equal_single_runs(
    server: Server, expected: dict[tuple[str, float], Completion]
) -> None:
    assert len({completion.text for completion in expected.values()}) > len(QUESTIONS) * 2, (
        "the direction changes nothing"
    )
    together = 0

    def one(key: tuple[str, float]) -> tuple[tuple[str, float], dict[str, Any]]:
        response = server.ask(key[0], alpha=key[1])
        assert response.status_code == 200, response.text
        return key, response.json()

    with ThreadPoolExecutor(len(expected)) as pool:
        found = pool.map(one, expected)
        while not together and any(thread.is_alive() for thread in pool._threads):
            together = max(together, server.service.batcher.load[0] - 1)
            time.sleep(0.002)  # not to keep the batcher's thread from running
        for key, body in found:
            completion = expected[key]
            assert said(body["choices"][0]["message"]) == parts(completion)
            assert body["choices"][0]["finish_reason"] == completion.finish
            assert body["alpha"] == key[1]
            assert body["usage"] == {
                "prompt_tokens": completion.prompt_tokens, "completion_tokens": completion.tokens,
                "total_tokens": completion.prompt_tokens + completion.tokens,
                "completion_tokens_details": {"reasoning_tokens": completion.reasoning_tokens},
            }  # fmt: skip
    assert together, "no two requests ever ran at once"


def test_a_stream_is_the_same_chain_piece_by_piece(
    server: Server, expected: dict[tuple[str, float], Completion]
) -> None:
    for alpha in (0.0, 0.6):
        chunks = server.stream(alpha=alpha, stream_options={"include_usage": True})
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
        whole = {field: "".join(delta.get(field, "") for delta in deltas) for field in ("content", "reasoning_content")}
        completion = expected[QUESTIONS[0], alpha]
        assert said(whole) == parts(completion)
        assert len(deltas) > 8, "the text came in one piece"
        assert deltas[0]["role"] == "assistant"
        assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]][-1] == completion.finish
        assert chunks[-1]["usage"]["completion_tokens"] == completion.tokens
        assert {chunk["alpha"] for chunk in chunks} == {alpha}
    assert "usage" not in server.stream(max_tokens=4)[-1]


def test_choices_are_seeded_and_differ(server: Server) -> None:
    first, again = (server.ask(n=3, alpha=1.0, temperature=1.2, seed=5, top_p=0.95).json() for _ in range(2))
    texts = [said(choice["message"]) for choice in first["choices"]]
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts == [said(choice["message"]) for choice in again["choices"]]
    assert first["usage"]["completion_tokens"] > 2 * BUDGET * 0.5
    assert first["seed"] == 5
    # A seed that was drawn gives its chain again also when it went through a double, as it does in JavaScript.
    drawn = server.ask(alpha=1.0, temperature=1.2, max_tokens=20).json()
    told = int(float(drawn["seed"]))
    same = server.ask(alpha=1.0, temperature=1.2, max_tokens=20, seed=told).json()
    assert told == drawn["seed"]
    assert said(same["choices"][0]["message"]) == said(drawn["choices"][0]["message"])
    # Choice i has the seed plus i, so any one of them can be had alone.
    alone = server.ask(alpha=1.0, temperature=1.2, seed=6, top_p=0.95).json()
    assert said(alone["choices"][0]["message"]) == texts[1]
    chunks = server.stream(n=3, alpha=1.0, temperature=1.2, seed=5, top_p=0.95)
    streamed = {0: {}, 1: {}, 2: {}}
    for chunk in chunks:
        for field, text in chunk["choices"][0]["delta"].items():
            streamed[chunk["choices"][0]["index"]][field] = streamed[chunk["choices"][0]["index"]].get(field, "") + text
    assert [said(streamed[i]) for i in range(3)] == texts


def test_turns_go_through_the_chat_template(server: Server, valve: Valve) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text", "text": "2 + 2?"}]},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "And 3 + 3?"},
    ]
    body = server.client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 3}).json()
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}, *messages[2:]]
    rendered = render_messages(valve.tokenizer, plain)
    assert rendered.count("<|im_start|>") == 5
    assert body["usage"]["prompt_tokens"] == len(valve.tokenizer(rendered, add_special_tokens=False)["input_ids"])
    assert body["choices"][0]["finish_reason"] == "length"


# The dial


@pytest.mark.parametrize(
    ("fields", "alpha"),
    [
        ({}, 0.0), ({"model": "tiny-reasoner"}, 0.0), ({"alpha": 0.25}, 0.25), ({"model": "tiny-reasoner@0.4"}, 0.4),
        ({"tokens": 200}, 0.5), ({"shorter": 1 / 3}, 0.5), ({"tokens": 100}, 1.0), ({"alpha": None, "tokens": 300}, 0.0),
    ],
)  # fmt: skip
def test_a_position_can_be_said_in_four_ways(server: Server, fields: dict[str, Any], alpha: float) -> None:
    body = server.ask(max_tokens=1, **fields).json()
    assert body["alpha"] == pytest.approx(alpha)
    assert body["expected_tokens"] == pytest.approx(calibration().tokens(alpha), abs=0.06)
    assert body["safe"] is (alpha <= 0.5)


@pytest.mark.parametrize(
    ("fields", "status", "said"),
    [
        ({"alpha": 1.5}, 400, "this server serves 0 to 1"),
        ({"alpha": "much"}, 400, "alpha: Input should be a valid number"),
        ({"alpha": [0.1, 0.2]}, 400, "alpha: "),
        ({"alpha": True}, 400, "alpha: true is no number"),
        ({"shorter": False}, 400, "shorter: false is no number"),
        ({"tokens": 20}, 400, "measured from 100 to 300 tokens"),
        ({"shorter": 0.9}, 400, "shorter 0.000 to 0.667"),
        ({"alpha": 0.1, "tokens": 120}, 400, "give one of alpha, tokens and shorter"),
        ({"model": "tiny-reasoner@0.4", "alpha": 0.1}, 400, "says alpha already"),
        ({"model": "tiny-reasoner@much"}, 404, "is not a number"),
        ({"model": "tiny-reasoner@nan"}, 400, "out of range"),
        ({"model": "gpt-5"}, 404, "expected 'tiny-reasoner'"),
        ({"max_tokens": 0}, 400, "max_tokens: "),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 400, "differ"),
        ({"temperature": -1}, 400, "temperature: "),
        ({"top_p": 0}, 400, "top_p: "),
        ({"n": 9}, 400, "up to 8 choices"),
        ({"messages": []}, 400, "messages: "),
        ({"messages": "hello"}, 400, "messages: "),
        ({"messages": [{"role": "user"}]}, 400, "messages.0.content: "),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role: "),
        # It said that the content has to be a string, which a list of text parts need not be.
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, 400, "messages.0.content.0.type: Input should be 'text'"),
        ({"messages": [{"role": "user", "content": None}]}, 400, "messages.0.content: Input should be a valid string"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "last message"),
        ({"messages": [{"role": "user", "content": "why " * 3000}]}, 400, "send a shorter conversation"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}, {"role": "user", "content": "x"}]}, 400, "'messages.0.tool_calls' is not supported"),
        ({"messages": [{"role": "assistant", "content": "", "function_call": {"name": "f"}}, {"role": "user", "content": "x"}]}, 400, "'messages.0.function_call' is not supported"),
        ({"stop": ["\n"]}, 400, "'stop' is not supported"),
        ({"tools": [{"type": "function"}]}, 400, "'tools' is not supported"),
        ({"reasoning_effort": "low"}, 400, "alpha, tokens or shorter"),
        ({"alhpa": 0.4}, 400, "did you mean 'alpha'"),
    ],
)
def test_bad_requests_get_one_line_in_openais_shape(
    server: Server, fields: dict[str, Any], status: int, said: str
) -> None:
    for stream in (False, True):
        response = server.ask(**fields, stream=stream)
        assert response.status_code == status, response.text
        assert set(response.json()) == {"error"}
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert said in error["message"]
        assert "\n" not in error["message"]
        assert error["type"] == "invalid_request_error"


def test_neutral_and_harmless_fields_are_taken(server: Server) -> None:
    fields = {"stop": None, "presence_penalty": 0, "response_format": {"type": "text"}, "user": "me", "logprobs": False}
    assert server.ask(max_tokens=1, **fields).status_code == 200


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b"[1]", "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "application/json", 400),
        (b"\xff\xfe", "application/json", 400),
        (b'{"messages": [{"role": "user", "content": "hi"}]}', "text/plain", 400),
        (b" " * 1_100_000, "application/json", 413),
    ],
)
def test_bad_bodies(server: Server, content: bytes, kind: str, status: int) -> None:
    response = server.client.post("/v1/chat/completions", content=content, headers={"content-type": kind})
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_client_that_leaves_within_its_body_is_no_failure() -> None:
    """It was a traceback in the server's log."""
    from cotvalve.serve.app import create_app

    app = create_app(small(), ServeSettings(slots=1, context=64))
    parts = iter([{"type": "http.request", "body": b'{"mess', "more_body": True}, {"type": "http.disconnect"}])
    sent: list[Any] = []

    async def receive() -> Any:
        return next(parts)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }  # fmt: skip
    try:
        asyncio.run(app(scope, receive, send))
    finally:
        app.state.service.batcher.close()
    assert sent[0]["status"] == 499


def test_other_paths_and_methods_get_openais_shape_too(server: Server) -> None:
    assert server.client.get("/v1/nothing").json()["error"]["message"].startswith("Not Found")
    wrong = server.client.get("/v1/chat/completions")
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (405, "invalid_request_error")
    # It named the path that had been asked, and had lost the header that a 405 has to have.
    assert (wrong.json()["error"]["message"], wrong.headers["allow"]) == ("Method Not Allowed: send POST", "POST")
    assert server.client.get("/docs").status_code == 404


def test_models_says_what_the_dial_can_do(server: Server) -> None:
    (model,) = server.client.get("/v1/models").json()["data"]
    assert server.client.get(f"/v1/models/{model['id']}").json() == model
    missing = server.client.get("/v1/models/org/other")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    assert (model["id"], model["object"]) == ("tiny-reasoner", "model")
    dial = model["dial"]
    assert dial["alpha"] == {"low": 0.0, "high": 1.0, "default": 0.0}
    assert dial["streams"] is True
    assert dial["calibration"]["tokens"] == {
        "low": pytest.approx(100),
        "high": pytest.approx(300),
        "at_0": pytest.approx(300),
    }
    assert dial["calibration"]["safe"] == {"low": 0.0, "high": 0.5, "points": 5.0}


# Clients that leave, crowds, failures


def test_a_client_that_leaves_frees_its_slot_and_nobody_else_notices(
    server: Server, expected: dict[tuple[str, float], Completion]
) -> None:
    # A second server's slots are not needed: the long request would hold this one's for hundreds of tokens.
    long = {
        "messages": [{"role": "user", "content": QUESTIONS[1]}],
        "max_tokens": 900,
        "alpha": 1.0,
        "temperature": 2.0,
        "seed": 1,
    }
    with ThreadPoolExecutor(1) as pool:
        with server.client.stream("POST", "/v1/chat/completions", json={**long, "stream": True}) as response:
            next(response.iter_lines())
            other = pool.submit(server.ask, QUESTIONS[2], alpha=0.3)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/chat/completions", json=long, timeout=0.3)
        body = other.result().json()
    assert said(body["choices"][0]["message"]) == parts(expected[QUESTIONS[2], 0.3])
    assert server.idle(), "a client that left still holds a slot"


def test_a_full_queue_says_so(server: Server) -> None:
    server.service.batcher.queue, before = 2, server.service.batcher.queue
    try:
        with ThreadPoolExecutor(24) as pool:
            answers = list(pool.map(lambda i: server.ask(seed=i, n=2, temperature=1.0, max_tokens=40), range(24)))
    finally:
        server.service.batcher.queue = before
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429}
    refused = next(answer for answer in answers if answer.status_code == 429).json()["error"]
    assert (refused["code"], refused["type"]) == ("queue_full", "server_error")
    assert "try again" in refused["message"]
    assert server.idle()


def test_choices_that_no_queue_holds_are_no_full_queue() -> None:
    """'0 requests wait already, try again later' was said of them for ever, and clients did."""
    server = Server(small(), slots=4, context=64, queue=2)
    try:
        refused = server.ask("hi", n=3, max_tokens=1)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
        assert "this server gives up to 2 choices" in refused.json()["error"]["message"]
        assert server.ask("hi", n=2, max_tokens=1).status_code == 200
    finally:
        server.stop()


class Held:
    """A front with one slot, whose chain runs until it is let go."""

    streams = False

    def __init__(self) -> None:
        self.held: list[Encoded] = []
        self.go = threading.Event()

    @property
    def busy(self) -> bool:
        return bool(self.held)

    @property
    def waiting(self) -> int:
        return max(0, len(self.held) - 1)

    def add(self, encoded: Encoded, *, watch: bool = False) -> None:  # noqa: ARG002  nothing can be watched here
        self.held.append(encoded)

    def drop(self, id: str) -> None: ...
    def close(self) -> None: ...

    def step(self) -> Sequence[Piece | Completion]:
        if not self.go.wait(0.01):
            return []
        return [Completion(self.held.pop(0).request.id, 0.0, "", 1, "stop")]


class HeldBatcher(Batcher):
    """A batcher on a front with one slot."""

    def _open(self) -> Front:
        self.front = Held()
        return self.front


def test_what_waits_for_a_slot_is_in_the_queue() -> None:
    """One after the other, each in the engine's hands before the next comes: one runs, two wait, the fourth is one too many."""
    batcher = HeldBatcher(small(), slots=1, context=64, queue=2)
    ended = threading.Semaphore(0)
    try:
        for i in range(3):
            batcher.submit([batcher.encode(Request(f"{i}", "one", 1.0, 4))], [lambda _: ended.release()])
            until = time.monotonic() + 10
            while len(batcher.front.held) <= i and time.monotonic() < until:
                time.sleep(0.005)
            assert batcher.load == (1, i)
        with pytest.raises(Busy, match="2 requests wait already, the server takes 2"):
            batcher.submit([batcher.encode(Request("3", "one", 1.0, 4))], [lambda _: None])
        batcher.front.go.set()
        assert all(ended.acquire(timeout=10) for _ in range(3))
        assert batcher.load == (0, 0)
    finally:
        batcher.close()


def test_the_engine_says_how_many_wait_for_a_slot() -> None:
    live = Live(small(), slots=1, context=256)
    codec = Codec(live.valve.model, live.valve.tokenizer)
    for i in range(3):
        live.add(codec.encode([Request(f"{i}", "one two three", 1.0, 200, 1.5, 1.0, i)])[0][0])
    assert live.waiting == 3
    live.step()
    assert live.waiting == 2
    live.close()


class Failing:
    """A front whose backend fails once."""

    streams = False
    slots = 8
    failures = 1

    def __init__(self, inner: Front) -> None:
        self.inner = inner

    @property
    def busy(self) -> bool:
        return self.inner.busy

    @property
    def waiting(self) -> int:
        return self.inner.waiting

    def add(self, encoded: Any, *, watch: bool = False) -> None:
        self.inner.add(encoded, watch=watch)

    def drop(self, id: str) -> None:
        self.inner.drop(id)

    def close(self) -> None:
        self.inner.close()

    def step(self) -> Sequence[Piece | Completion]:
        if Failing.failures:
            Failing.failures -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.inner.step()


class FailingBatcher(Batcher):
    """A batcher on a backend that fails once."""

    def _open(self) -> Front:
        return Failing(super()._open())


def small(seed: int = 0) -> Valve:
    model = models.llama(seed=seed)
    return Valve(model, models.tokenizer(("</think>",)), random_direction(model))


def wait_for(batcher: Batcher, requests: Sequence[Request], watch: bool = False) -> list[list[Any]]:
    heard: list[list[Any]] = [[] for _ in requests]
    ended = [threading.Event() for _ in requests]

    def listener(i: int) -> Any:
        def told(event: Any) -> None:
            heard[i].append(event)
            if not isinstance(event, str):
                ended[i].set()

        return told

    batcher.submit([batcher.encode(r) for r in requests], [listener(i) for i in range(len(requests))], watch=watch)
    for event in ended:
        assert event.wait(60)
    return heard


def test_when_the_backend_fails_its_chains_are_told_and_the_next_ones_run() -> None:
    Failing.failures = 1
    batcher = FailingBatcher(small(), slots=8, context=128)
    try:
        ((error,),) = wait_for(batcher, [Request("a", "one", 0.5, 6)])
        assert isinstance(error, EngineError)
        assert "goes on with 4 slots" in str(error)
        ((completion,),) = wait_for(batcher, [Request("b", "one", 0.5, 6)])
        assert isinstance(completion, Completion)
        assert batcher.alive
    finally:
        batcher.close()
    with pytest.raises(EngineError, match="stopping"):
        batcher.submit([batcher.encode(Request("c", "one", 0.0, 6))], [lambda _: None])


def test_what_comes_while_a_batch_fails_runs_in_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    batcher = FailingBatcher(small(), slots=8, context=128)
    late: list[Any] = []
    heard = threading.Event()

    def step(front: Failing) -> Sequence[Piece | Completion]:
        if Failing.failures:
            Failing.failures -= 1
            batcher.submit([batcher.encode(Request("late", "one", 0.5, 6))], [lambda event: (late.append(event), heard.set())])
            raise torch.OutOfMemoryError("CUDA out of memory")
        return front.inner.step()

    monkeypatch.setattr(Failing, "step", step)
    Failing.failures = 1
    try:
        ((error,),) = wait_for(batcher, [Request("a", "one", 0.5, 6)])
        assert isinstance(error, EngineError)
        assert heard.wait(60)
        assert isinstance(late[0], Completion)
    finally:
        batcher.close()


def test_out_of_memory_halves_the_batches_of_an_engine_without_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """It said that it went on with one slot, and ran out of memory again with as many rows as before."""
    run = GenerateEngine._run

    def tight(engine: GenerateEngine, batch: list[Encoded]) -> list[Completion]:
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(engine, batch)

    monkeypatch.setattr(GenerateEngine, "_run", tight)
    batcher = Batcher(small(), engine="generate", slots=4, context=128)
    try:
        asked = [Request(f"{i}", "one", 0.5, 6) for i in range(4)]
        told = [event for (event,) in wait_for(batcher, asked)]
        assert all(isinstance(event, EngineError) and "goes on with 2 slots" in str(event) for event in told)
        assert all(isinstance(event, Completion) for (event,) in wait_for(batcher, asked))
    finally:
        batcher.close()


def test_closing_tells_those_who_wait() -> None:
    batcher = Batcher(small(), slots=1, context=500)
    heard: list[Any] = []
    done = threading.Event()
    wanted = [batcher.encode(Request(f"{i}", "one two three", 1.0, 480, 1.5, 1.0, i)) for i in range(3)]
    listeners = [lambda event: (heard.append(event), done.set() if len(heard) == 3 else None) for _ in wanted]
    batcher.submit(wanted, listeners)
    batcher.close()
    assert done.wait(10)
    assert any(isinstance(event, EngineError) for event in heard)
    assert not batcher.alive


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_stops_tells_who_still_waits(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """uvicorn's patience ended in a bare 500, or in the middle of a stream, and in a traceback."""
    monkeypatch.setattr("cotvalve.serve.app.PATIENCE", 0.3)
    started = Server(small(), name="small", context=256)
    started.service.batcher._front = Held()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(started.ask, "hello", stream=stream)
        while not answer.done() and started.service.batcher.load != (1, 0):
            time.sleep(0.01)
        started.stop_listening()
        response = answer.result(20)
    started.stop()
    error = json.loads(response.text.strip().splitlines()[-1].removeprefix("data: "))["error"]
    assert (error["message"], error["type"]) == ("the server is stopping", "server_error")
    assert response.status_code == (200 if stream else 503)


def test_slots_that_do_not_fit_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was a traceback before the server had begun."""

    def full(*_: Any, **__: Any) -> Live:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("cotvalve.engines.live.Live", full)
    with pytest.raises(EngineError, match=r"8 chains of 128 tokens do not fit .* --slots or a smaller --context"):
        Batcher(small(), slots=8, context=128)


def test_all_choices_of_a_request_are_queued_or_none() -> None:
    batcher = Batcher(small(), slots=1, context=64, queue=2)
    try:
        wanted = [batcher.encode(Request(f"{i}", "one", 0.0, 4)) for i in range(3)]
        with pytest.raises(Busy):
            batcher.submit(wanted, [lambda _: None] * 3)
        assert batcher.load == (0, 0)
    finally:
        batcher.close()


def test_an_engine_without_slots_serves_chains_whole() -> None:
    started = Server(small(), engine="generate", context=256, name="small")
    try:
        assert started.client.get("/v1/models").json()["data"][0]["dial"]["streams"] is False
        fields = {"alpha": 0.5, "max_tokens": 12}
        whole = started.ask("hello", **fields).json()["choices"][0]
        chunks = started.stream("hello", **fields)
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        joined = {f: "".join(d.get(f, "") for d in deltas) for f in ("content", "reasoning_content")}
        assert said(joined) == said(whole["message"])
        assert len(deltas) == 3
    finally:
        started.stop()


def test_a_client_that_leaves_an_engine_without_slots_takes_nobody_with_it() -> None:
    """The worker looked for the next batch's first request after the only one had been dropped, and died."""
    batcher = Batcher(small(), engine="generate", context=256)
    try:
        batcher.submit([batcher.encode(Request("gone", "one", 0.5, 6))], [lambda _: None])
        batcher.drop(["gone"])
        ((completion,),) = wait_for(batcher, [Request("stays", "one", 0.5, 6)])
        assert isinstance(completion, Completion)
        assert batcher.alive
    finally:
        batcher.close()


def test_a_batch_along_an_exact_task_vector_has_one_alpha() -> None:
    """Who asked for the first one does not wait for the others."""
    asked: list[list[float]] = []
    engine: Any = SimpleNamespace(generate=lambda requests: asked.append([request.alpha for request in requests]) or [])
    valve: Any = SimpleNamespace(rows=False)
    front = Whole(valve, engine)
    for i, alpha in enumerate((0.5, 0.0, 0.5)):
        front.add(Encoded(Request(str(i), "x", alpha, 4), [1], 4))
    while front.busy:
        front.step()
    assert asked == [[0.5, 0.5], [0.0]]


# The open batch


def requests(count: int, seed: int = 0, alphas: Sequence[float] = (0.0, 0.5, 1.0, -0.5)) -> list[Request]:
    random = torch.Generator().manual_seed(seed)
    made: list[Request] = []
    for i in range(count):
        length, room = (int(torch.randint(1, 40, (1,), generator=random)) for _ in range(2))
        temperature = (0.0, 0.9)[i % 2]
        made.append(
            Request(f"r{i}", "word " * length, alphas[i % len(alphas)], room, temperature, (1.0, 0.8)[i % 3 == 0], i)
        )
    return made


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_requests_that_join_and_leave_change_nobody_elses_chain(slots: int) -> None:
    valve, asked = small(), requests(24)
    expected = {c.id: c for c in pick("transformers", valve).generate(asked)}
    encoded, _ = Codec(valve.model, valve.tokenizer).encode(asked)
    live = Live(valve, slots=slots, context=256)
    random = torch.Generator().manual_seed(1)
    found: dict[str, Completion] = {}
    pieces: dict[str, list[int]] = {}
    waiting, gone = list(encoded), set()
    while waiting or live.busy:
        for _ in range(int(torch.randint(0, 4, (1,), generator=random))):
            if waiting:
                live.add(waiting.pop(0), watch=True)
        for event in live.step():
            if isinstance(event, Completion):
                found[event.id] = event
            else:
                pieces.setdefault(event.id, []).extend(event.ids)
        if len(found) in (3, 9) and f"r{len(found) + 4}" not in found:
            gone.add(f"r{len(found) + 4}")
            live.drop(f"r{len(found) + 4}")
            waiting = [e for e in waiting if e.request.id not in gone]
    live.close()
    assert gone
    assert set(found) == set(expected) - gone
    for id, completion in found.items():
        assert completion == expected[id]
        text = valve.tokenizer.decode(pieces.get(id, []))
        assert completion.text.startswith(text.rstrip("\ufffd"))


def test_an_exact_task_vector_serves_one_alpha_after_the_other() -> None:
    base = models.llama()
    valve = Valve(base, models.tokenizer(), TaskVector.between(models.llama(), models.moved(models.llama())))
    asked = requests(9, alphas=(0.0, 1.0, 0.5))
    expected = {c.id: c for c in pick("transformers", valve).generate(asked)}
    before = {name: weight.clone() for name, weight in valve.model.state_dict().items()}
    live = Live(valve, slots=4, context=256)
    for e in Codec(valve.model, valve.tokenizer).encode(asked)[0]:
        live.add(e)
    found: dict[str, Completion] = {}
    while live.busy:
        found |= {event.id: event for event in live.step() if isinstance(event, Completion)}
    live.close()
    assert found == expected
    assert all(torch.equal(before[name], weight) for name, weight in valve.model.state_dict().items())


# Text in pieces


@settings(deadline=None)
@given(st.text(max_size=40), st.lists(st.integers(1, 7), min_size=1, max_size=40))
def test_unfolded_pieces_are_the_text(text: str, sizes: list[int]) -> None:
    tokenizer = models.tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    whole, unfold, given_out = tokenizer.decode(ids), Unfold(tokenizer), ""
    place = 0
    for size in sizes:
        given_out += unfold.add(ids[place : place + size])
        assert "\ufffd" not in given_out or "\ufffd" in text
        place += size
    given_out += unfold.add(ids[place:])
    assert given_out + unfold.rest(whole) == whole


@given(
    st.sampled_from(
        [
            "<think>\nOne.\n</think>\n\nTwo.",
            "<think>cut",
            "No thinking < at all",
            "<thin",
            "<think></think>A</think>B",
            "",
            "</thin",
        ]
    ),
    st.sampled_from(["", "assistant\n<think>\n"]),
    st.lists(st.integers(1, 9), max_size=12),
)
def test_thinking_is_told_from_the_answer_however_the_text_is_cut(text: str, prompt: str, sizes: list[int]) -> None:
    whole = Split(prompt).add(text, last=True)
    split, place, found = Split(prompt), 0, {"content": "", "reasoning_content": ""}
    cuts = [*sizes, len(text) + 1]
    for i, size in enumerate(cuts):
        for field, part in split.add(text[place : place + size], last=i == len(cuts) - 1).items():
            found[field] += part
        place += size
    assert {field: value for field, value in found.items() if value} == whole
    if text == "<think>\nOne.\n</think>\n\nTwo." and not prompt:
        assert whole == {"reasoning_content": "One.\n", "content": "Two."}
    if prompt and "</think>" not in text:
        assert "content" not in whole


def test_what_was_held_back_comes_with_the_end() -> None:
    """The beginning of a mark that never came is text."""
    assert Split("").add("<thin", last=True) == {"content": "<thin"}
    assert Split("<think>").add("so </thin", last=True) == {"reasoning_content": "so </thin"}


def test_usage_has_the_prompt_once_and_the_thinking_of_every_choice() -> None:
    told = usage([Completion("0", 0.0, "", 10, "stop", 7, 4), Completion("1", 0.0, "", 20, "stop", 7, 6)])
    assert told == {"prompt_tokens": 7, "completion_tokens": 30, "total_tokens": 37, "completion_tokens_details": {"reasoning_tokens": 10}}


# The page, the settings


def test_the_page_needs_nothing_from_elsewhere(server: Server) -> None:
    response = server.client.get("/")
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    text = response.text.replace("http://www.w3.org/2000/svg", "")  # a name of a language, never fetched
    assert not re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}", text)
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)""", text)
    assert "innerHTML" not in text, "a model's text must not become markup"


def test_a_taken_port_and_a_missing_extra_are_one_line(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    port = int(server.url.rpartition(":")[2])
    with pytest.raises(SettingError, match=r"cannot listen on 127\.0\.0\.1 port"):
        run(ServeSettings(model="tiny-reasoner", port=port), lambda _: None)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "cotvalve.serve.app")
    with pytest.raises(EngineError, match=r"needs uvicorn; install it with: pip install 'cotvalve\[serve\]'"):
        run(ServeSettings(), lambda _: None)


@pytest.mark.parametrize(
    "fields", [{"port": 70000}, {"name": "a@b"}, {"queue": 0}, {"hots": "0.0.0.0"}, {"alpha": "x"}, {"highest": "inf"}, {"lowest": "nan"}]
)
def test_bad_settings_are_named(fields: dict[str, Any]) -> None:
    with pytest.raises(CotvalveError):
        ServeSettings.read(fields)


def test_the_default_position_has_to_be_on_the_dial(valve: Valve) -> None:
    from cotvalve.serve.protocol import Dial

    with pytest.raises(SettingError, match="between 0 and 1"):
        Dial.of(valve, ServeSettings(alpha=1.5), streams=True)
    served = Dial.of(valve, ServeSettings(), streams=True)
    assert "prompt" not in served.sentence()
    assert "with the prompt 'boxed', where the server adds no words" in replace(served, calibration=replace(calibration(), facts={"prompt": "boxed"})).sentence()
    # Where the calibration found degenerate chains the curve ends, and so does what is served unasked.
    known = calibration()
    last = known.positions[-1]
    valve.calibration = replace(known, positions=(*known.positions, replace(last, alpha=8.0, degenerate=90.0, fitted=None)))
    try:
        assert Dial.of(valve, ServeSettings(), streams=True).high == 1.0
        assert Dial.of(valve, ServeSettings(highest=8.0), streams=True).high == 8.0
        assert Dial.of(valve, ServeSettings(highest=8.0), streams=True).reach == known.reach
        assert "alpha 0 to 8 (measured from 0 to 1), 300 to 100 tokens, safe" in Dial.of(valve, ServeSettings(highest=8.0), streams=True).sentence()
        # Toward longer the lengths rise with alpha; they were told from the longest down.
        valve.calibration = replace(known, positions=tuple(replace(p, fitted=t) for p, t in zip(known.positions, (50.0, 80.0, 400.0), strict=True)))
        assert "alpha 0 to 1, 50 to 400 tokens" in Dial.of(valve, ServeSettings(), streams=True).sentence()
    finally:
        valve.calibration = known
    # A part of the dial has a part of the lengths: the rest would be refused.
    part = Dial.of(valve, ServeSettings(highest=0.5), streams=True)
    assert "alpha 0 to 0.5, 300 to 200 tokens" in part.sentence()
    told = part.card()["calibration"]
    assert (told["tokens"]["low"], told["shorter"]["high"]) == pytest.approx((200, 1 / 3))
    for fields, alpha in (({"tokens": 200}, 0.5), ({"tokens": 199.6}, 0.5), ({"shorter": 0.3337}, 0.5), ({"tokens": 250}, 0.225)):
        assert part.position(Ask.model_validate({"messages": [{"role": "user", "content": "x"}], **fields})) == pytest.approx(alpha, abs=1e-3)
    for fields in ({"tokens": 199}, {"shorter": 0.34}):
        with pytest.raises(Refused, match=r"=[\d.]+ is out of reach: this server serves 200 to 300 tokens \(shorter 0.000 to 0.333\), alpha 0 to 0.5") as refused:
            part.position(Ask.model_validate({"messages": [{"role": "user", "content": "x"}], **fields}))
        assert (refused.value.param, refused.value.code) == (*fields, "out_of_range")
    assert Dial.of(small(), ServeSettings(model="./runs/mine"), streams=True).name == "mine"
    assert Dial.of(small(), ServeSettings(model="owner/name"), streams=True).name == "owner/name"
    assert Dial.of(small(), ServeSettings(model="./runs/a@b"), streams=True).name == "a-b", "behind an @ stands an alpha"
    plain = Valve(models.llama(), models.tokenizer())
    assert (Dial.of(plain, ServeSettings(), streams=True).low, Dial.of(plain, ServeSettings(), streams=True).high) == (
        0.0,
        0.0,
    )


def test_light_imports() -> None:
    """`cotvalve --help` lists serve without FastAPI."""
    import subprocess

    code = "import sys, cotvalve.serve; assert not {'fastapi', 'uvicorn', 'torch'} & set(sys.modules), 'heavy'"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
