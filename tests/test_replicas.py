"""Copies of an engine in processes of their own: the same chains, whoever makes them, also when one of them dies."""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cotvalve import Valve, problems
from cotvalve.direction import Direction
from cotvalve.engines import pick
from cotvalve.engines.replicas import Replicas
from cotvalve.errors import EngineError, SettingError
from cotvalve.prompts import prompt, render
from cotvalve.types import Completion, Request

MODEL, DIRECTION = "tiny-reasoner", "tiny-valve"


@pytest.fixture(scope="module")
def valve() -> Valve:
    return Valve.load(MODEL, DIRECTION, device="cpu")


@pytest.fixture(scope="module")
def engine(valve: Valve) -> Iterator[Replicas]:
    """The engine here, and two more."""
    made = Replicas(valve, pick("transformers", valve, 8), ["cpu", "cpu"], 8)
    yield made
    made.close()


def asked(valve: Valve, count: int, tokens: int = 24) -> list[Request]:
    """At five positions, greedy and warm in turn; one id twice."""
    questions = problems.load("arithmetic", split="train", limit=count)
    return [
        Request(f"{i % (count - 1)}", render(valve.tokenizer, one.question, prompt("boxed")), [0.0, 0.5, 1.0, -0.3, 1.5][i % 5], tokens, 0.8 * (i % 2), seed=i)
        for i, one in enumerate(questions)
    ]  # fmt: skip


def shown(made: list[Completion]) -> list[tuple[str, float, str, int]]:
    return sorted((one.id, one.alpha, one.text, one.tokens) for one in made)


def test_copies_make_the_chains_of_one(valve: Valve, engine: Replicas) -> None:
    requests = asked(valve, 30)
    told: list[tuple[int, int, str]] = []
    made = list(engine.generate(requests, lambda _, done, total, note: told.append((done, total, note))))
    assert shown(made) == shown(list(pick("transformers", valve, 8).generate(requests)))
    assert [done for done, _, _ in told] == list(range(31))
    assert engine.facts()["engine"] == "transformers, 3 copies"
    assert told[0][2] == "engine transformers, 3 copies"


def test_copies_turn_with_the_valve(valve: Valve, engine: Replicas) -> None:
    before = valve.direction
    assert isinstance(before, Direction)
    try:
        assert valve.turn_to(Direction({name: replace(factor, B=-0.5 * factor.B) for name, factor in before.factors.items()}, before.card))
        requests = asked(valve, 9)
        made = list(engine.generate(requests))
        assert shown(made) == shown(list(pick("transformers", valve, 8).generate(requests)))
    finally:
        valve.turn_to(before)
    assert shown(list(engine.generate(requests))) != shown(made)


def test_a_death_loses_nothing(valve: Valve, engine: Replicas) -> None:
    """Killed as another process would: what it had left is dealt out again; with nobody else left the engine goes on alone."""
    requests = asked(valve, 60, 48)
    wanted = shown(list(pick("transformers", valve, 8).generate(requests)))
    told: list[str] = []
    made: list[Completion] = []
    for completion in engine.generate(requests, lambda *given: told.append(given[3])):
        if not made:
            os.kill(engine._copies[0]._process.pid or 0, signal.SIGKILL)
        made.append(completion)
    assert shown(made) == wanted
    assert [copy.alive for copy in engine._copies] == [False, True]
    assert any("died" in note for note in told)
    first = next(iter(chains := engine.generate(requests)))
    assert first.tokens > 0
    chains.close()  # a caller that has had enough: nobody makes the rest
    assert not any(copy.alive for copy in engine._copies)
    assert shown(list(engine.generate(requests))) == wanted


def test_what_a_copy_cannot_do_is_said(valve: Valve, tmp_path: Path) -> None:
    other = Valve.load(MODEL, device="cpu")
    own = pick("transformers", other, 2)
    assert other.source is not None
    other.source["model"] = tmp_path / "gone"
    engine = Replicas(other, own, ["cpu"], 2)
    with pytest.raises(EngineError, match=r"on cpu: .*gone"):
        list(engine.generate([replace(request, alpha=0.0) for request in asked(valve, 6)]))
    other.source = None
    with pytest.raises(SettingError, match=r"Valve\.load.*gpus to 1"):
        Replicas(other, own, ["cpu"])
    if not torch.cuda.is_available():
        with pytest.raises(SettingError, match="gpus is 2, but this machine shows none"):
            pick("auto", other, gpus=2)
