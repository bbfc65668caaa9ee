"""The vLLM engine and its dial. Skipped where vLLM is not installed; `make test-vllm` runs them in an environment of its own.

vLLM's CPU build in fp32 must give the transformers engine's greedy chains, token for token, whatever alphas share
a batch. Every engine here is a real one, with its core in a process of its own.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import models
import pytest
import torch

from cotvalve import Valve, engines
from cotvalve.adapters import Factor
from cotvalve.card import Card
from cotvalve.checkpoints import read_tensors
from cotvalve.direction import Direction
from cotvalve.engines.vllm import Options, VllmEngine, capture_sizes
from cotvalve.engines.vllm_adapters import rank_of, write_baked, write_direction
from cotvalve.engines.vllm_support import missing, unsupported
from cotvalve.errors import DirectionMismatch, EngineError, SettingError
from cotvalve.problems import load
from cotvalve.prompts import prompt, render
from cotvalve.records import read_json
from cotvalve.taskvector import TaskVector
from cotvalve.types import Completion, Request

installed = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed; `make test-vllm` runs these tests")
ALPHAS = (0.0, -0.5, 0.25, 0.5, 1.0, 1.7, 3.0)


@pytest.fixture(scope="module", autouse=True)
def settings() -> Iterator[None]:
    """What vLLM's CPU build needs on a small machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def tiny() -> Valve:
    return Valve.load("tiny-reasoner", "tiny-valve", device="cpu")


@pytest.fixture(scope="module")
def engine(tiny: Valve) -> Iterator[VllmEngine]:
    made = VllmEngine(tiny, options=Options(batch=8, dial=True))
    yield made
    made.close()


def questions(valve: Valve, count: int) -> list[str]:
    return [render(valve.tokenizer, p.question, prompt("boxed")) for p in load("arithmetic", split="test", limit=count)]


def requests(prompts: Sequence[str], alphas: Sequence[float], tokens: int = 40, mark: str = "") -> list[Request]:
    return [Request(f"{mark}{i}|{a}", text, a, tokens) for i, text in enumerate(prompts) for a in alphas]


def by_id(found: Iterator[Completion]) -> dict[str, Completion]:
    made = {c.id: c for c in found}
    return dict(sorted(made.items()))


def ours(valve: Valve, asked: Sequence[Request]) -> dict[str, Completion]:
    return by_id(engines.pick("transformers", valve).generate(asked))


# Without vLLM


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm_the_error_is_one_line_that_helps(tiny: Valve) -> None:
    with pytest.raises(EngineError, match=r"vLLM is not installed; pip install 'cotvalve\[vllm\]'") as error:
        engines.pick("vllm", tiny)
    assert "\n" not in str(error.value)
    assert missing()


def test_what_it_cannot_run_is_said() -> None:
    base = models.qwen2()
    assert unsupported(Valve(base, models.tokenizer())) == ""
    vector = TaskVector.between(base, models.moved(base))
    assert "exact task vector" in unsupported(Valve(base, models.tokenizer(), vector))


def test_graphs_reach_the_whole_batch() -> None:
    for batch in (1, 2, 7, 8, 100, 256, 300, 1024):
        sizes = capture_sizes(batch)
        assert sizes[-1] == batch
        assert sizes == sorted(set(sizes))


def test_a_written_direction_is_the_same_change_with_one_rank_and_scale(tmp_path: Path) -> None:
    """vLLM passes over rank_pattern and alpha_pattern in silence: the folder must not need them."""
    generator = torch.Generator().manual_seed(0)

    def factor(rank: int, lora_alpha: float) -> Factor:
        return Factor(torch.randn(rank, 6, generator=generator), torch.randn(5, rank, generator=generator), lora_alpha, True)

    direction = Direction({"m.0.q_proj": factor(2, 3.0), "m.0.o_proj": factor(4, 7.0)}, Card("base"))
    first, second = write_direction(direction, tmp_path / "a"), write_direction(2 * direction, tmp_path / "b")
    assert first != second, "the fingerprint keys the prefix cache"
    state = read_tensors(tmp_path / "a" / "adapter_model.safetensors")
    read = {
        name: {part: state[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB"} for name in direction.factors
    }
    fields = read_json(tmp_path / "a" / "adapter_config.json")
    assert fields["r"] == fields["lora_alpha"] == rank_of(direction) == 4
    assert "rank_pattern" not in fields
    for name, made in read.items():
        assert torch.allclose(made["B"] @ made["A"], direction.factors[name].delta(), rtol=1e-6, atol=1e-6)
    write_baked(direction, tmp_path / "half", tmp_path / "a", 0.5)
    assert read_json(tmp_path / "half" / "adapter_config.json")["lora_alpha"] == 2
    assert (tmp_path / "half" / "adapter_model.safetensors").samefile(tmp_path / "a" / "adapter_model.safetensors")
    write_baked(direction, tmp_path / "zero", tmp_path / "a", 0.0)
    assert not any(made.B.any() for made in Direction.load(tmp_path / "zero").factors.values())


# With it


@installed
def test_a_mixed_batch_gives_the_transformers_engine_s_chains(tiny: Valve, engine: VllmEngine) -> None:
    asked = requests(questions(tiny, 3), ALPHAS)
    found = by_id(engine.generate(asked))
    assert found == ours(tiny, asked)
    assert len({c.text for c in found.values() if c.id.startswith("0|")}) > 2, "alpha must matter"
    assert "dial" in engine.facts()["engine"]


@installed
def test_more_alphas_than_rows_and_base_rows_among_them(tiny: Valve, engine: VllmEngine) -> None:
    """vLLM's CPU kernels gave rows without an adapter the last slot's when all slots were full (0.23 to 0.32)."""
    alphas = [0.0, *(round(0.1 * i - 0.95, 2) for i in range(20)), 0.0]
    asked = [replace(r, id=f"{r.id}#{i}") for i, r in enumerate(requests(questions(tiny, 2), alphas, 24))]
    found = by_id(engine.generate(asked))
    assert found == ours(tiny, asked)
    plain = Valve.load("tiny-reasoner", device="cpu")
    zeros = [r for r in asked if r.alpha == 0]
    assert {r.id: found[r.id] for r in zeros} == ours(plain, zeros)


@installed
def test_the_prefix_cache_is_not_shared_between_alphas(tiny: Valve, engine: VllmEngine) -> None:
    text = " ".join(questions(tiny, 12))
    asked = requests([text], (1.0, 0.0, 1.5, 1.0), 16)
    for request in asked:
        assert by_id(engine.generate([request])) == ours(tiny, [request])

    def cached(alpha: float) -> int:
        """Prompt tokens taken from the cache."""
        server = engine._server
        server._add("one", engine._codec.encode([Request("one", text, alpha, 2)])[0][0])
        taken = 0
        while server._engine.has_unfinished_requests():
            taken = max([taken, *(output.num_cached_tokens or 0 for output in server._engine.step())])
        return taken

    assert cached(0.35) == 0, "no other alpha's keys and values"
    assert cached(0.35) > 0, "but its own"


@installed
def test_a_request_s_seed_decides_its_chain(tiny: Valve, engine: VllmEngine) -> None:
    [text] = questions(tiny, 1)
    asked = [Request(str(seed), text, 0.5, 24, temperature=2.0, top_p=0.99, seed=seed) for seed in range(5)]
    together = by_id(engine.generate(asked))
    assert together == by_id(c for r in reversed(asked) for c in engine.generate([r]))
    assert len({c.text for c in together.values()}) > 1
    with pytest.raises(SettingError, match="vLLM refuses the request"):
        list(engine.generate([replace(asked[0], temperature=-1.0)]))


@installed
def test_rows_that_cannot_run_and_lists_that_were_left(tiny: Valve, engine: VllmEngine) -> None:
    good = requests(questions(tiny, 6), (1.0,), 200)
    bad = [Request("long", "seven " * 3000, 1.0, 8), Request("empty", "", 1.0, 8)]
    found = by_id(engine.generate([*good[:2], *bad]))
    assert (found["long"].finish, found["empty"].finish) == ("error", "error")
    assert "context" in found["long"].reason
    assert {c.id: c for c in found.values() if c.finish != "error"} == ours(tiny, good[:2])
    left = engine.generate(good)
    next(left)
    with pytest.raises(EngineError, match="another list"):
        list(engine.generate(good[:1]))
    left.close()
    assert by_id(engine.generate(good[:3])) == ours(tiny, good[:3])


@installed
def test_directions_can_be_changed_and_one_with_nan_is_refused(tiny: Valve, engine: VllmEngine) -> None:
    """NaN in rows of alpha 1 reached rows of alpha 0 through pages of the cache that changed hands."""
    direction = tiny.direction
    assert isinstance(direction, Direction)
    asked = requests(questions(tiny, 2), (0.0, 1.0), 24)
    before = ours(tiny, asked)
    for part in ("A", "B"):
        name, factor = next(iter(direction.factors.items()))
        broken = replace(factor, **{part: torch.full_like(getattr(factor, part), float("nan"))})
        with pytest.raises(DirectionMismatch, match=f"{name}: holds NaN or infinity"):
            engine._server.turn_to(Direction({**direction.factors, name: broken}, direction.card))
        assert by_id(engine.generate(asked)) == before
    engine._server.turn_to(-1 * direction)
    turned = by_id(engine.generate([replace(r, alpha=-r.alpha) for r in asked]))
    assert {i: c.text for i, c in turned.items()} == {i: c.text for i, c in before.items()}
    engine._server.turn_to(direction)
    assert by_id(engine.generate(asked)) == before


@installed
def test_the_engine_follows_a_valve_that_is_turned_to_another_direction(engine: VllmEngine) -> None:
    """A sweep starts vLLM once and turns the valve."""
    turned = Valve.load("tiny-reasoner", "tiny-valve", device="cpu")
    first = turned.direction
    assert isinstance(first, Direction)
    own = VllmEngine(turned, options=Options(batch=4, eager=True))
    asked = requests(questions(turned, 2), (0.0, 1.0), 24)
    assert by_id(own.generate(asked)) == by_id(engine.generate(asked))
    assert turned.turn_to(2 * first) is False, "another scale is another layer"
    other = Direction({name: replace(f, B=2 * f.B) for name, f in first.factors.items()}, first.card)
    assert turned.turn_to(first) is False
    assert turned.turn_to(other) is True
    found = by_id(own.generate(asked))
    own.close()
    assert found == ours(turned, asked)


@installed
@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_other_architectures(name: str, tmp_path: Path) -> None:
    """Random weights; rsLoRA, tied and untied heads, biases on q, k and v, half of the modules."""
    model = models.MAKERS[name](tied=name == "llama", hidden=128)
    folder = models.save(model, tmp_path / "model")
    targets = models.PROJECTIONS if name == "qwen2" else ("q_proj", "v_proj", "up_proj")
    peft = models.lora(model, rank=3, lora_alpha=5, targets=targets, use_rslora=name == "llama", by=0.1)
    peft.save_pretrained(tmp_path / "direction")
    valve = Valve.load(folder, tmp_path / "direction", device="cpu")
    engine = VllmEngine(valve, options=Options(batch=16, dial=True, eager=True))
    asked = requests(["seven plus two", "what is it?", "x" * 100], ALPHAS, 20)
    found, wanted = by_id(engine.generate(asked)), ours(valve, asked)
    engine.close()
    assert found == wanted
    assert len({c.text for c in wanted.values()}) > 6


@installed
def test_stock_multi_lora_is_said_and_gives_the_same_chains(tiny: Valve) -> None:
    engine = VllmEngine(tiny, options=Options(batch=8, dial=False, stock_slots=2, eager=True))
    said: list[str] = []
    asked = requests(questions(tiny, 2), ALPHAS[:5], 24)
    found = by_id(engine.generate(asked, lambda *told: said.append(" ".join(map(str, told)))))
    assert found == ours(tiny, asked)
    # Positions of another direction had the numbers of the first one's, by which vLLM had kept their weights.
    direction = tiny.direction
    assert isinstance(direction, Direction)
    for sign in (-1, 1):
        engine._server.turn_to(sign * direction)
        turned = by_id(engine.generate([replace(r, alpha=sign * r.alpha) for r in asked]))
        assert {i: c.text for i, c in turned.items()} == {i: c.text for i, c in found.items()}
    engine.close()
    assert "stock multi-LoRA, because it was asked for" in engine.facts()["engine"]
    assert "stock multi-LoRA" in said[0]


@installed
def test_an_unknown_vllm_gets_no_dial(tiny: Valve, monkeypatch: pytest.MonkeyPatch) -> None:
    from cotvalve.engines import vllm_support as module

    assert module.stock_because(tiny) == ""
    monkeypatch.setattr(module, "TESTED", ((0, 1), (0, 2)))
    assert "not among those the dial was tested with" in module.stock_because(tiny)
    with pytest.raises(EngineError, match="the dial cannot be put into vLLM"):
        VllmEngine(tiny, options=Options(dial=True))


@installed
def test_a_vllm_that_dies_loses_nothing(tiny: Valve) -> None:
    """Its core is killed in the middle; what was finished stands, the rest comes from a new one."""
    engine = VllmEngine(tiny, options=Options(batch=4, eager=True))
    asked = requests(questions(tiny, 3), (0.0, 0.5, 1.0), 60)
    found: list[Completion] = []
    for completion in engine.generate(asked):
        found.append(completion)
        if len(found) == 2:
            children = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=True).stdout
            cores = [int(line.split()[0]) for line in children.splitlines() if "EngineCore" in line or "multiprocessing.spawn" in line]
            assert cores, children
            for core in cores:
                os.kill(core, signal.SIGKILL)
    engine.close()
    assert len(found) == len(asked)
    assert by_id(iter(found)) == ours(tiny, asked)


@installed
def test_two_workers_share_each_layer(tiny: Valve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor parallelism: each has a part of A or B, and the chains are those of one."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    engine = engines.pick("vllm", tiny, 16, gpus=2)
    assert isinstance(engine, VllmEngine)
    asked = requests(questions(tiny, 4), (0.0, 0.4, 1.0))
    found = by_id(engine.generate(asked))
    engine.close()
    assert "dial, 16 chains at once, 2 GPUs" in engine.facts()["engine"]
    assert found == ours(tiny, asked)


@installed
def test_the_dial_touches_only_engines_that_ask() -> None:
    """In a fresh interpreter: the plugin is installed, and a vLLM that did not ask gets its own manager."""
    code = """
from types import SimpleNamespace as N
from cotvalve.engines import vllm_dial as dial
dial.register(); dial.register()
from vllm.v1.worker import lora_model_runner_mixin as mixin
assert mixin.LRUCacheWorkerLoRAManager is dial.make_manager
import unittest.mock as mock
with mock.patch.object(dial, "DialManager") as ours, mock.patch.object(dial, "LRUCacheWorkerLoRAManager") as theirs:
    for config in ({}, {"other": 1}, {dial.OPTION: False}):
        dial.make_manager(N(additional_config=config))
    assert theirs.call_count == 3 and not ours.called
    dial.make_manager(N(additional_config={dial.OPTION: True}))
    assert ours.call_count == 1
assert dial.unfit() == ""
name = dial.position(-0.1, 3, "/x", "abc").lora_name
assert dial.alpha_of(name) == -0.1 and dial.position(-0.0, 1, "/x", "abc").lora_name == dial.position(0.0, 1, "/x", "abc").lora_name
"""
    root = Path(__file__).parent.parent
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, check=False)
    assert done.returncode == 0, done.stderr
