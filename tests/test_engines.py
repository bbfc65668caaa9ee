"""Engines: requests in, completions out; the same chains whatever shares the batch, and the sampler itself."""

import copy
import math
import os
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM, OPTConfig, OPTForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from cotvalve import Valve, checkpoints
from cotvalve.direction import Card, Direction
from cotvalve.engines import (
    Engine,
    attend,
    between,
    branch,
    draw,
    gated,
    joined,
    kernels,
    layers,
    pick,
    rotation,
    sampling,
    slots,
    thin,
)
from cotvalve.engines.batch import Batch
from cotvalve.engines.generate import GenerateEngine
from cotvalve.engines.norms import fused_norms
from cotvalve.engines.replaced import replaced
from cotvalve.engines.sampling import BLOCK, Codec, invert, sample, uniforms
from cotvalve.engines.transformers import TransformersEngine, unsupported
from cotvalve.errors import EngineError, SettingError
from cotvalve.inlets import Parts
from cotvalve.taskvector import TaskVector
from cotvalve.types import Completion, Request
from tests import models

ENGINES = {"transformers": TransformersEngine, "generate": GenerateEngine}
CONTEXT = 512
"""Of the tiny random models."""

LONG = Request("long", "the long one", 0.6, 120, 0.9, 0.9, 77)
"""A chain that goes on for more than 60 tokens on the tiny model."""

engines = pytest.mark.parametrize("name", ENGINES)


def direction(make: Any = models.llama) -> Direction:
    wrapped = models.lora(make(), by=0.15)
    factors = {name.replace(".default", ""): weight for name, weight in wrapped.named_parameters() if "lora_" in name}
    return Direction.from_peft(wrapped.peft_config["default"], factors, Card("base"))


@cache
def valve() -> Valve:
    return Valve(models.llama(), models.tokenizer(["</think>"]), direction())


def engine(name: str, batch: int | None = None, on: Valve | None = None) -> Engine:
    return ENGINES[name](on or valve(), batch=batch)


def run(of: Engine, requests: Sequence[Request]) -> dict[str, Completion]:
    found = list(of.generate(requests))
    assert len(found) == len(requests)
    assert {c.id for c in found} == {r.id for r in requests}
    return {c.id: c for c in found}


def mixture(count: int = 14) -> list[Request]:
    """Rows that differ in everything: alpha, prompt length (from one token), budget, greedy or sampled, seed."""
    rng = random.Random(5)
    return [
        Request(
            id=f"r{i}",
            prompt="".join(rng.choices("abcdefgh 123", k=[1, 2, 40, 9, 130, 17][i % 6])),
            alpha=[0.0, 0.5, 1.0, -0.5, 1.7][i % 5],
            max_new_tokens=[1, 24, 5, 40][i % 4],
            temperature=[0.0, 0.0, 0.8][i % 3],
            top_p=[1.0, 0.9][i % 2],
            seed=1000 + i,
        )
        for i in range(count)
    ]


@cache
def alone() -> dict[str, Completion]:
    """Each of the mixture in a batch of its own: what every batch has to reproduce."""
    return {request.id: run(engine("transformers"), [request])[request.id] for request in mixture()}


# What shares a batch does not matter


@engines
@pytest.mark.parametrize("slots", [1, 2, 3, 5, 14, 64])
def test_a_batch_of_mixed_alphas_gives_the_chains_of_separate_runs(name: str, slots: int) -> None:
    """Greedy and sampled rows, refill (slots < rows), compaction (the last rows), prompts of 1 to 130 tokens."""
    assert run(engine(name, slots), mixture()) == alone()


def test_the_separate_runs_are_worth_comparing() -> None:
    chains = alone().values()
    assert len({c.text for c in chains}) > 10
    assert {c.finish for c in chains} == {"stop", "length"} or max(c.tokens for c in chains) == 40
    moved = [Request("0", "2 + 2", alpha, 24) for alpha in (0.0, 1.0)]
    assert len({run(engine("transformers"), [request])["0"].text for request in moved}) == 2


@engines
def test_the_order_of_requests_does_not_matter(name: str) -> None:
    shuffled = mixture()
    random.Random(1).shuffle(shuffled)
    assert run(engine(name, 4), shuffled) == alone()


def test_refill_begins_while_long_chains_are_still_running() -> None:
    """A slot is refilled when its chain ends; the long chain does not hold the short ones up."""
    requests = [LONG, *(Request(f"s{i}", "b", 1.0, 4) for i in range(10))]
    found = list(engine("transformers", 2).generate(requests))
    assert (found[-1].id, len(found)) == ("long", 11)
    assert found[-1].tokens > 10 * 4


def test_compaction_moves_rows_with_all_their_state() -> None:
    """16 rows of which one goes on: the rows are halved again and again under it."""
    rng = random.Random(7)
    requests = [
        Request(f"{i}", "".join(rng.choices("xyz01", k=5 + i)), 1.7 - i / 10, [6, 8, 12, 16][i % 4], 0.7 * (i % 2), 0.95, i)
        for i in range(16)
    ]
    requests[11] = LONG
    separate = {r.id: run(engine("transformers"), [r])[r.id] for r in requests}
    assert separate["long"].tokens > 60
    assert run(engine("transformers", 16), requests) == separate


@engines
def test_a_seed_decides_a_chain_and_nothing_else_does(name: str) -> None:
    same = [Request(f"{i}", "tell me", 0.5, 20, 1.0, 0.95, seed=3) for i in range(3)]
    other = [Request(f"{i}", "tell me", 0.5, 20, 1.0, 0.95, seed=i + 50) for i in range(3)]
    torch.manual_seed(1)
    first = run(engine(name), same)
    torch.manual_seed(2)
    np.random.seed(2)
    state = torch.get_rng_state()
    again = run(engine(name, 2), [*other, *(Request(f"again {r.id}", r.prompt, r.alpha, 20, 1.0, 0.95, 3) for r in same)][3:])
    assert torch.equal(torch.get_rng_state(), state), "no global generator is used"
    assert len({c.text for c in first.values()} | {c.text for c in again.values()}) == 1
    assert len({c.text for c in run(engine(name), other).values()}) == 3


def test_a_larger_budget_goes_on_with_the_same_chain() -> None:
    short = run(engine("transformers"), [Request("0", "go", 0.5, 10, 1.0, 1.0, 9)])["0"]
    long = run(engine("transformers"), [Request("0", "go", 0.5, 30, 1.0, 1.0, 9)])["0"]
    assert long.text.startswith(short.text)
    assert long.tokens > short.tokens == 10


@engines
def test_an_exact_task_vector_runs_one_alpha_after_the_other(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("pair")
    base = models.llama()
    ends = models.save(base, folder / "base"), models.save(models.moved(base), folder / "reasoner")
    turned = Valve(base, models.tokenizer(), TaskVector.between(*ends))
    before = {n: w.clone() for n, w in base.state_dict().items()}
    requests = [Request(f"{i}", "abc" * (i + 1), [1.0, 0.0, 0.4][i % 3], 12) for i in range(7)]
    separate = {r.id: run(engine(name, on=turned), [r])[r.id] for r in requests}
    assert run(engine(name, 3, turned), requests) == separate
    assert all(torch.equal(w, before[n]) for n, w in base.state_dict().items())
    plain = Valve(models.llama(), models.tokenizer())
    assert {c.text for c in run(engine(name, on=plain), requests[1:2]).values()} == {separate["1"].text}


# Parity with transformers


@pytest.mark.parametrize("make", models.MAKERS.values(), ids=models.MAKERS)
@pytest.mark.parametrize("alpha", [0.0, 0.8])
def test_greedy_is_model_generate(make: object, alpha: float) -> None:
    turned = Valve(make(), models.tokenizer(), direction())  # pyright: ignore[reportCallIssue]
    prompts = ["a", "what is 2 + 2?", "x" * 90]
    found = run(engine("transformers", on=turned), [Request(p, p, alpha, 40) for p in prompts])
    for prompt in prompts:
        ids = turned.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
        with turned.at(alpha) as model, torch.inference_mode():
            out = model.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=256)[0, ids.shape[1] :].tolist()
        stopped = out[-1] == 258
        assert found[prompt].tokens == len(out)
        assert found[prompt].finish == ("stop" if stopped else "length")
        assert found[prompt].text == turned.tokenizer.decode(out[:-1] if stopped else out)


@engines
def test_nothing_of_the_checkpoint_s_own_sampling_is_mixed_in(name: str) -> None:
    """Qwen2.5's generation_config has a repetition penalty, top_k and a temperature: a request says how it is sampled."""
    strange = Valve(models.llama(), models.tokenizer(["</think>"]), direction())
    own = strange.model.generation_config
    own.do_sample, own.temperature, own.top_k, own.top_p, own.repetition_penalty = True, 0.3, 2, 0.5, 5.0
    own.no_repeat_ngram_size, own.min_new_tokens, own.max_length = 2, 30, 37
    requests = [r for r in mixture() if len(r.prompt) < 100]
    assert run(engine(name, 4, strange), requests) == {r.id: alone()[r.id] for r in requests}


def test_auto_takes_the_fast_engine_where_it_can() -> None:
    assert pick("auto", valve()).name == "transformers"
    assert pick("generate", valve()).name == "generate"
    shape = {
        "vocab_size": models.VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "eos_token_id": 258, "pad_token_id": 256,
    }  # fmt: skip
    gemma = Gemma2ForCausalLM(Gemma2Config(sliding_window=16, **shape))
    mistral = MistralForCausalLM(MistralConfig(sliding_window=16, **shape))
    for model, says in ((gemma, "other than full attention"), (mistral, "sliding-window")):
        assert says in unsupported(model)
        windowed = Valve(model.eval(), models.tokenizer())
        assert pick("auto", windowed).name == "generate"
        with pytest.raises(EngineError, match=f"{type(model).__name__}.*{says}.*generate"):
            pick("transformers", windowed)
        requests = [Request(f"{i}", "abcdefghij" * (i + 1), 0.0, 24) for i in range(4)]
        separate = {r.id: run(pick("auto", windowed), [r])[r.id] for r in requests}
        assert run(pick("auto", windowed, 3), requests) == separate
    assert not unsupported(MistralForCausalLM(MistralConfig(sliding_window=None, **shape)))
    with pytest.raises(SettingError, match="did you mean 'transformers'"):
        pick("transformer", valve())
    with pytest.raises(SettingError, match=r"gpus is 2, but this machine shows none"):
        pick("auto", valve(), gpus=2)


def test_the_model_s_own_attention_is_put_back() -> None:
    before = valve().model.config._attn_implementation
    run(engine("transformers"), mixture(3))
    assert valve().model.config._attn_implementation == before
    chains = engine("transformers", 1).generate(mixture(3))
    next(chains)
    chains.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert valve().model.config._attn_implementation == before


# What is counted


@engines
def test_tokens_are_counted_from_ids(name: str) -> None:
    """Not from words or from encoding the text again: "aa" that was generated as two ids is two tokens."""
    seen: dict[str, list[int]] = {}

    class Watched(Codec):
        def completions(self, ended):
            seen.update((encoded.request.id, list(ids)) for encoded, ids in ended)
            return super().completions(ended)

    of = engine(name, 5)
    of._codec = Watched(valve().model, valve().tokenizer)  # pyright: ignore[reportAttributeAccessIssue]
    found = run(of, mixture())
    for request in mixture():
        chain, ids = found[request.id], seen[request.id]
        assert chain.tokens == len(ids) <= request.max_new_tokens
        assert chain.prompt_tokens == len(request.prompt)  # one token a byte
        if chain.finish == "stop":
            assert ids[-1] == 258
            assert 258 not in ids[:-1]
        else:
            assert 258 not in ids
            assert chain.truncated
            assert len(ids) == request.max_new_tokens


@pytest.mark.parametrize(
    ("prompt", "ids", "finish", "reasoning", "answer"),
    [
        ("q", [259, 97, 98, 260, 99, 258], "stop", 4, 2),
        ("q<think>\n", [97, 98, 260, 99, 100, 258], "stop", 3, 3),
        ("q", [259, 97, 98, 99], "length", 4, 0),
        ("q<think>\n", [97, 98], "length", 2, 0),
        ("q", [97, 98, 258], "stop", 0, 3),
        ("q", [97], "length", 0, 1),
        ("q", [259, 97, 260, 98, 260, 99], "length", 3, 3),
    ],
)
def test_reasoning_and_answer_tokens_are_counted_apart(
    prompt: str, ids: list[int], finish: str, reasoning: int, answer: int
) -> None:
    """259 opens the thinking block, 260 closes it, 258 ends the turn."""
    codec = Codec(valve().model, valve().tokenizer)
    (encoded,), _ = codec.encode([Request("0", prompt, 0.0, 10)])
    made = codec.completion(encoded, ids)
    assert (made.finish, made.reasoning_tokens, made.answer_tokens) == (finish, reasoning, answer)
    assert made.tokens == len(ids) == made.reasoning_tokens + made.answer_tokens
    assert made.truncated == (finish == "length")


def test_texts_of_many_chains_are_those_of_each() -> None:
    """All at once by the library behind the tokenizer, or one by one where the tokenizer cleans up behind it."""
    tokenizer = checkpoints.load_tokenizer("tiny-reasoner")
    codec = Codec(models.llama(), tokenizer)
    draw = random.Random(0)
    chains = [[draw.randrange(len(tokenizer)) for _ in range(draw.randrange(40))] for _ in range(30)] + [[]]
    (encoded,), _ = codec.encode([Request("0", "q", 0.0, 10)])
    each = [tokenizer.decode(ids, skip_special_tokens=False) for ids in chains]
    for cleans in (False, True):
        tokenizer.clean_up_tokenization_spaces = cleans
        found = [made.text for made in codec.completions([(encoded, ids) for ids in chains])]
        stops = [bool(ids) and ids[-1] in codec.stops for ids in chains]
        assert [text for text, stop in zip(found, stops, strict=True) if not stop] == [text for text, stop in zip(each, stops, strict=True) if not stop]
    assert codec.completions([]) == []


def test_prompts_become_the_ids_that_their_tokenizer_gives() -> None:
    """Each prompt once, by the library behind the tokenizer; by the tokenizer where that library was set to cut or pad."""
    tokenizer = checkpoints.load_tokenizer("tiny-reasoner")
    prompts = ["Tom has 3.", "<|im_start|>user\nhé 😀<|im_end|>", "Tom has 3.", " ", "Tom has 4 and\n\n5."]
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    asked = [Request(str(i), prompt, i / 4, 10 + i) for i, prompt in enumerate(prompts)]
    backend = tokenizer.backend_tokenizer
    for how in ("as it is", "cuts", "pads"):
        if how == "cuts":
            backend.enable_truncation(2)
        elif how == "pads":
            backend.no_truncation()
            backend.enable_padding(length=64)
        found, refused = Codec(models.llama(), tokenizer).encode(asked)
        assert refused == []
        assert [(e.request, e.ids, e.room) for e in found] == [(r, i, r.max_new_tokens) for r, i in zip(asked, ids, strict=True)]


@pytest.fixture(scope="module")
def reasoner() -> Valve:
    return Valve.load("tiny-reasoner", device="cpu")


@engines
def test_a_thinking_model_is_counted_apart(reasoner: Valve, name: str) -> None:
    from cotvalve.problems import load
    from cotvalve.prompts import prompt, render

    problem = min(load("arithmetic", split="validation", limit=40), key=lambda p: len(p.solution or ""))
    text = render(reasoner.tokenizer, problem.question, prompt("boxed"))
    whole, cut = (run(engine(name, on=reasoner), [Request("0", text, 0.0, n)])["0"] for n in (700, 60))
    assert whole.finish == "stop"
    assert whole.text.startswith("<think>")
    thought, _, said = whole.text.partition("</think>")
    ids = [len(reasoner.tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (thought + "</think>", said)]
    # this tokenizer never joins across the mark, so that encoding the text again gives the ids that were generated
    assert [whole.reasoning_tokens, whole.answer_tokens] == [ids[0], ids[1] + 1]
    assert whole.answer_tokens > 5
    assert (cut.finish, cut.tokens, cut.reasoning_tokens, cut.answer_tokens) == ("length", 60, 60, 0)
    assert whole.text.startswith(cut.text)


# Rows that cannot run, ends of ranges


@engines
def test_what_does_not_fit_the_context_is_a_row_with_a_reason(name: str) -> None:
    room = 3
    requests = [
        Request("long", "x" * (CONTEXT + 1), 0.5, 10),
        Request("full", "x" * CONTEXT, 0.5, 10),
        Request("tight", "x" * (CONTEXT - room), 0.0, 10),
        Request("empty", "", 1.0, 10),
        Request("good", "x", 0.0, 10),
    ]
    found = run(engine(name), requests)
    for identity in ("long", "full", "empty"):
        chain = found[identity]
        assert (chain.finish, chain.text, chain.tokens) == ("error", "", 0)
        assert not chain.truncated
    assert str(CONTEXT + 1) in found["long"].reason
    assert str(CONTEXT) in found["long"].reason
    assert "empty" in found["empty"].reason
    assert found["tight"].tokens <= room
    assert found["good"].reason == ""
    assert found["good"].tokens > 0
    assert found["long"].alpha == 0.5


@engines
def test_no_requests(name: str) -> None:
    assert run(engine(name), []) == {}
    assert all(c.finish == "error" for c in run(engine(name), [Request("0", "", 0.0, 4)]).values())


@engines
def test_progress_counts_every_request(name: str) -> None:
    seen: list[tuple[int, int]] = []
    requests = [*mixture(), Request("refused", "", 0.0, 4)]
    list(engine(name, 4).generate(requests, lambda _task, done, total, _note="": seen.append((done, total))))
    assert seen[-1] == (15, 15)
    assert all(a <= b for a, b in pairwise(seen))


def test_running_out_of_memory_halves_the_slots_and_loses_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's own error, raised at the boundary: above 3 rows the model 'does not fit'."""
    turned = Valve(models.llama(), models.tokenizer(["</think>"]), direction())
    forward = turned.model.forward

    def small(*args: object, **kwargs: object) -> object:
        if kwargs["input_ids"].shape[0] > 3:  # pyright: ignore[reportAttributeAccessIssue]
            raise torch.OutOfMemoryError("out of memory")
        return forward(*args, **kwargs)

    monkeypatch.setattr(turned.model, "forward", small)
    assert run(engine("transformers", 14, turned), mixture()) == alone()
    monkeypatch.setattr(turned.model, "forward", lambda **_: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    with pytest.raises(EngineError, match="single chain"):
        run(engine("transformers", 4, turned), mixture())


def test_out_of_memory_in_the_middle_loses_nothing_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chains that ended in the burst before are handed over while the next one starts, which may fail."""
    launch, count, noted = Batch.launch, 0, []

    def failing(batch: Batch) -> None:
        nonlocal count
        count += 1
        if count in (3, 6):
            raise torch.OutOfMemoryError("out of memory")
        launch(batch)

    monkeypatch.setattr(Batch, "launch", failing)
    found = list(engine("transformers", 14).generate(mixture(), lambda *said: noted.append(said[3])))
    assert {c.id: c for c in found} == alone()
    assert len(found) == len(mixture()), "none twice"
    assert [note for note in noted if "out of memory" in note] == ["out of memory: going on with 7 slots", "out of memory: going on with 3 slots"]


# The sampler


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """Pearson's statistic in standard deviations from its mean (rarely above 3 when the draws are right)."""
    freedom = len(counts) - 1
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("size", [7, BLOCK, 3 * BLOCK + 11])
def test_invert_draws_each_index_as_often_as_its_weight_says(size: int) -> None:
    draws = 400 * size if size < 100 else 200_000
    generator = torch.Generator().manual_seed(11)
    weights = torch.rand(size, generator=generator) ** 2 + 0.05
    weights[3] = 0.0
    uniform = torch.from_numpy(np.random.Generator(np.random.Philox(4)).random(draws, dtype=np.float32))
    drawn = torch.cat([invert(weights.expand(len(part), -1), part) for part in uniform.split(2000)])
    counts = np.bincount(drawn.numpy(), minlength=size)
    assert counts[3] == 0
    kept = np.arange(size) != 3
    exact = weights.double().numpy() / float(weights.double().sum()) * draws
    assert abs(chi_square(counts[kept], exact[kept])) < 4
    shifted = np.roll(exact[kept], 1)
    assert chi_square(counts[kept], shifted) > 20, "the test would see an index that is off by one"


def test_invert_is_exact_at_the_ends_and_the_seams() -> None:
    """Weights of 1/4: every boundary is a number that fp32 holds, inside a block and between two blocks."""
    weights = torch.zeros(1, 2 * BLOCK)
    places = [5, BLOCK - 1, BLOCK, 2 * BLOCK - 1]
    weights[0, places] = 0.25
    below = float(np.nextafter(np.float32(1), np.float32(0)))
    at = torch.tensor([0.0, 0.2499, 0.25, 0.4999, 0.5, 0.7499, 0.75, below])
    drawn = invert(weights.expand(len(at), -1), at)
    assert drawn.tolist() == [places[i] for i in (0, 0, 1, 1, 2, 2, 3, 3)]


def test_invert_never_draws_a_weight_of_zero() -> None:
    """Rounding of a running sum over a large vocabulary must not run over its last weight."""
    generator = torch.Generator().manual_seed(3)
    weights = torch.rand(64, 150_000, generator=generator)
    weights[:, 100_000:] = 0
    weights[:, ::3] = 0
    uniform = torch.rand(64, generator=generator)
    uniform[:8] = float(np.nextafter(np.float32(1), np.float32(0)))
    uniform[8:16] = 0
    drawn = invert(weights, uniform)
    assert bool((weights.gather(1, drawn[:, None]) > 0).all())


def counted(logits: Tensor, temperature: float, top_p: float | None, count: int = 60_000) -> np.ndarray:
    uniform = torch.from_numpy(np.random.Generator(np.random.Philox(8)).random(count, dtype=np.float32))
    rows = logits.expand(count, -1)
    tokens = sample(rows, uniform, torch.full((count,), temperature), None if top_p is None else torch.full((count,), top_p))
    return np.bincount(tokens.numpy(), minlength=logits.numel())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_is_the_softmax_s(temperature: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 1.5, 0.3])
    exact = torch.softmax(logits.double() / temperature, -1).numpy() * 60_000
    assert abs(chi_square(counted(logits, temperature, None), exact)) < 4


@pytest.mark.parametrize(("top_p", "kept"), [(1.0, 4), (0.95, 4), (0.9, 3), (0.6, 2), (0.5, 1), (0.01, 1), (0.0, 1)])
def test_top_p_keeps_the_fewest_tokens_with_that_mass(top_p: float, kept: int) -> None:
    """Probabilities .5 .3 .1 .1 (the second stands first): a token stays while the mass before it is below top_p.

    top_p 0 keeps the likeliest token; it used to keep none, and a token of weight 0 was drawn.
    """
    probabilities = torch.tensor([0.3, 0.5, 0.1001, 0.0999])
    counts = counted(probabilities.log(), 1.0, top_p)
    order = [1, 0, 2, 3]
    exact = probabilities.double().numpy()[order[:kept]]
    exact = exact / exact.sum() * 60_000
    assert counts[order[kept:]].sum() == 0
    if kept > 1:
        assert abs(chi_square(counts[order[:kept]], exact)) < 4


def test_greedy_and_sampled_rows_share_a_batch() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.9], [0.0, 3.0, 2.9], [5.0, 0.0, 0.0]])
    tokens = sample(logits, torch.tensor([0.99, 0.99, 0.0]), torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0.1, 1.0, 1.0]))
    assert tokens.tolist() == [1, 2, 0]


def on_card(test: Any) -> Any:
    """A test of kernels: with Triton on a GPU, or in Triton's interpreter (`make test-kernels`)."""
    runs = find_spec("triton") is not None and (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1")
    return pytest.mark.kernel(pytest.mark.skipif(not runs, reason="needs Triton and a GPU, or Triton and TRITON_INTERPRET=1")(test))


@on_card
@pytest.mark.parametrize("vocab", [5, 100, 8192, 20_000])
def test_a_drawn_token_is_the_one_at_its_number(vocab: int) -> None:
    """Greedy rows and warm ones together; numbers at both ends; weights of 0 and ties; rows cut out of a wider tensor."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    generator = torch.Generator().manual_seed(11)
    rows = 24
    logits = (3 * torch.randn(rows, 2, vocab, generator=generator)).to(device, dtype)[:, -1]
    logits[:, 1] = -torch.inf
    logits[3] = -torch.inf
    logits[3, vocab // 2 :: 2] = 1.0  # the rest has no weight, and all others the same
    uniform = torch.rand(rows, generator=generator).to(device)
    uniform[:2], uniform[2:5] = 0.0, float(np.nextafter(np.float32(1), np.float32(0)))
    temperature = torch.tensor([0.7, 0.0, 1.0, 2.0] * 6, device=device)
    token = draw.drawn(logits, uniform, temperature)
    assert draw.fair(logits, uniform, temperature, token)
    warm = temperature > 0
    near = torch.roll(logits, 1, 0)
    assert vocab < 100 or not draw.fair(near[warm], uniform[warm], temperature[warm], token[warm])
    assert draw.drawn(logits).tolist() == logits.argmax(1).tolist()
    broken = logits.clone()
    broken[0, vocab // 3] = torch.nan
    assert int(draw.drawn(broken)[0]) == vocab // 3


def test_draws_are_taken_where_they_are_right_and_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's arithmetic by PyTorch and the test's own clock; the same chains, rows with top_p left to PyTorch."""
    expected = run(engine("transformers"), mixture(6))
    calls: list[bool] = []

    def by_parts(logits: Tensor, uniform: Tensor | None = None, temperature: Tensor | None = None) -> Tensor:
        calls.append(uniform is not None)
        if uniform is None or temperature is None:
            return logits.argmax(-1)
        return own(logits, uniform, temperature, None) * (0 if wrong else 1)

    own, wrong = sampling.sample, False
    monkeypatch.setattr(draw, "MANY", 32)
    monkeypatch.setattr(draw, "drawn", by_parts)
    took = {"drawn": 1.0, "other": 2.0}
    monkeypatch.setattr(kernels, "seconds", lambda work: took["drawn" if work.func is by_parts else "other"])
    found = [*draw.faster_draws(valve().model)]
    assert [(owner, name) for owner, name, _ in found] == [(sampling, "greedy"), (sampling, "sample")]
    monkeypatch.setattr(TransformersEngine, "_find_faster", lambda _: found)
    calls.clear()
    assert run(engine("transformers"), mixture(6)) == expected
    warm = [replace(request, temperature=0.8, top_p=1.0) for request in mixture(6)]
    monkeypatch.undo()
    drawn = run(engine("transformers"), warm)
    monkeypatch.setattr(draw, "drawn", by_parts)
    monkeypatch.setattr(TransformersEngine, "_find_faster", lambda _: found)
    calls.clear()
    assert run(engine("transformers"), warm) == drawn
    assert True in calls
    assert sampling.sample is own
    monkeypatch.setattr(kernels, "seconds", lambda work: took["drawn" if work.func is by_parts else "other"])
    wrong = True
    assert [name for _, name, _ in draw.faster_draws(valve().model)] == ["greedy"]
    took["drawn"] = 3.0
    assert not [*draw.faster_draws(valve().model)]


def test_a_request_s_numbers_are_its_seed_s() -> None:
    one, two = Request("a", "x", 0.0, 8, 1.0, seed=1), Request("b", "y", 1.0, 20, 0.5, seed=1)
    assert np.array_equal(uniforms(one, 8), uniforms(two, 16)[:8]), "a prefix: a longer budget goes on with the same numbers"
    assert not np.array_equal(uniforms(one, 8), uniforms(Request("a", "x", 0.0, 8, 1.0, seed=2), 8))
    assert uniforms(one, 8).dtype == np.float32
    many = uniforms(Request("a", "x", 0.0, 100_000, 1.0, seed=2**63 - 1), 100_000)
    assert float(many.min()) >= 0
    assert float(many.max()) < 1
    assert abs(float(many.mean()) - 0.5) < 0.005


def by_rows(query: Tensor, key: Tensor, value: Tensor, ends: slots.Ends, scaling: float | None) -> Tensor:
    """What the kernel on the card computes, row by row."""
    assert ends.queries.tolist() == list(range(len(query) + 1))
    heads = query.shape[1] // key.shape[1]
    out: list[Tensor] = []
    for q, start, used in zip(query, ends.starts[:-1].tolist(), ends.used.tolist(), strict=True):
        k, v = (part[start : start + used].repeat_interleave(heads, 1).transpose(0, 1) for part in (key, value))
        out.append(torch.nn.functional.scaled_dot_product_attention(q[:, None], k, v, scale=scaling)[:, 0])
    return torch.stack(out)


@pytest.mark.parametrize("batch", [3, 64])
def test_rows_that_read_their_own_length(monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    """The layout for the card's kernel, with the kernel's arithmetic on a CPU: refills, and rows moved to the front."""
    monkeypatch.setattr("cotvalve.engines.batch.reads_rows", lambda _: True)
    monkeypatch.setattr(slots, "read_rows", by_rows)
    assert run(engine("transformers", batch), mixture()) == alone()


def test_each_row_reads_its_own_length_on_16_bit_cards_only() -> None:
    assert not slots.reads_rows(models.llama())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_norms_give_the_same_numbers(dtype: torch.dtype) -> None:
    torch.manual_seed(0)  # of the norms' weights
    model = models.llama().to(dtype)
    for norm in (m for m in model.modules() if type(m).__name__ == "LlamaRMSNorm"):
        torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    ids = torch.arange(1, 40)[None]
    before = model(ids).logits
    found = [*fused_norms(model)]
    with replaced(found):
        assert len(found) == 2 * model.config.num_hidden_layers + 1
        off = (model(ids).logits - before).float().std() / before.float().std()
    assert off < (1e-5 if dtype == torch.float32 else 0.03)
    assert torch.equal(model(ids).logits, before)


def test_a_norm_that_computes_otherwise_is_not_fused() -> None:
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = Gemma2ForCausalLM(Gemma2Config(**shape, num_key_value_heads=2, head_dim=8))
    for norm in (m for m in model.modules() if type(m).__name__ == "Gemma2RMSNorm"):
        torch.nn.init.constant_(norm.weight, 0.2)  # scales by 1.2
    assert not [*fused_norms(model)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dim", [64, 128])
def test_the_kernel_of_a_gpu_computes_row_by_row(dim: int) -> None:
    """Fewer key heads than query heads, slots that are partly filled, rows that are fewer than slots."""
    draw, length = torch.Generator("cuda").manual_seed(0), 512
    used = torch.tensor([1, 2, 63, 64, 65, 300, 511, 512], dtype=torch.int32, device="cuda")
    query = torch.randn(8, 14, dim, generator=draw, device="cuda", dtype=torch.bfloat16)
    key, value = (torch.randn(10 * length, 2, dim, generator=draw, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    numbers = torch.arange(9, dtype=torch.int32, device="cuda")
    ends = slots.Ends(numbers, numbers * length, used, length)
    found, wanted = slots.read_rows(query, key, value, ends, None), by_rows(query.float(), key.float(), value.float(), ends, None)
    assert torch.allclose(found.float(), wanted, atol=0.02)


@pytest.mark.parametrize("make", [models.llama, models.qwen2])
def test_layers_of_one_input_are_one_product(make: Any, tmp_path: Path) -> None:
    """W x and A x of each as apart, its weights still its own; another direction and another engine go on; a model that was moved is seen."""
    both: list[Direction] = []
    for by in (0.15, 0.3):
        wrapped = models.lora(make(), by=by)
        factors = {name.replace(".default", ""): by * factor for name, factor in wrapped.named_parameters() if "lora_" in name}
        both.append(Direction.from_peft(wrapped.peft_config["default"], factors, Card("base")))
    turned = Valve(make(), models.tokenizer(), both[0])
    dial, layer = turned.dial, turned.model.model.layers[0]
    assert dial is not None
    before, saved = {name: parameter.clone() for name, parameter in turned.model.named_parameters()}, turned.fuse(0.7).state_dict()
    sides = [[getattr(layer.self_attn, name) for name in ("q_proj", "k_proj", "v_proj")], [layer.self_attn.o_proj], [layer.mlp.gate_proj, layer.mlp.up_proj]]
    x, alpha = torch.randn(5, 3, 32), torch.linspace(-1, 1, 5)

    def check(found: joined.Joined, group: list[Any]) -> None:
        with torch.no_grad(), dial.at(alpha):
            made = found.sides(dial, x)
            assert made is not None
            assert torch.equal(made.alpha, alpha[:, None, None])
            for (y, thin_, b, scale), own in zip(made.parts, group, strict=True):
                assert torch.allclose(y, own.base_layer(x), atol=1e-6)
                assert torch.allclose(thin_.view(5, 3, -1), own.lora_A["default"](x), atol=1e-6)
                assert b is own.lora_B["default"].weight
                assert scale == own.scaling["default"]
        with torch.no_grad():
            closed = found.sides(dial, x)
            assert closed is not None
            assert all(torch.allclose(y, own.base_layer(x), atol=1e-6) and t is None for (y, t, *_), own in zip(closed.parts, group, strict=True))
        assert found.sides(dial, x) is None  # gradients are left to PEFT

    kept: list[joined.Joined] = []
    for group in sides:
        with dial.at(0.5):  # what is known of the factors
            found = joined.join(group, dial)
        assert found is not None
        assert len(found.matrix) % (joined.LINE if len(group) > 1 else 16) == 0
        assert not found.attached
        check(found, group)
        found.attach()
        assert found.attached
        assert joined.join(group, dial) is found
        kept.append(found)
        own, values = group[0].base_layer, [parameter.clone() for parameter in group[0].base_layer.parameters()]
        with torch.no_grad():
            for parameter in own.parameters():
                parameter.add_(0.1)
        check(found, group)
        with torch.no_grad():
            for parameter, value in zip(own.parameters(), values, strict=True):
                parameter.copy_(value)
        check(found, group)
        for other in both[::-1]:
            assert turned.turn_to(other)
            check(found, group)
    assert joined.join([layer.self_attn.q_proj], dial) is None  # not all that read it
    assert joined.join(sides[0][:1], None) is None  # nothing to join
    assert all(torch.equal(parameter, before[name]) for name, parameter in turned.model.named_parameters())
    fused = turned.fuse(0.7)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in fused.state_dict().items())
    fused.save_pretrained(tmp_path)
    again = type(fused).from_pretrained(tmp_path)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in again.state_dict().items())
    layer.self_attn.k_proj.base_layer.weight.data = layer.self_attn.k_proj.base_layer.weight.data.clone()
    assert [one.attached for one in kept] == [False, True, True]


@on_card
@pytest.mark.parametrize("tile", gated.TILES)
@pytest.mark.parametrize("rank", [5, 8, 24])
@pytest.mark.parametrize("dial", [False, True], ids=["closed", "turned"])
def test_the_gated_kernel_is_what_pytorch_computes_apart(dial: bool, tile: gated.Tile, rank: int) -> None:
    """Rows, columns and ranks that fill no tile; both branches cut from one product, as an inlet gives them."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    draw = torch.Generator().manual_seed(1)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(device, dtype)

    rows, width = 37, 150
    gate, up, turned, b_gate, b_up = some(rows, 1, width), some(rows, 1, width), some(rows, 2 * rank), some(width, rank), some(width, rank)
    sides: list[Parts] = [(gate, None, None, 0.5), (up, None, None, 2.0)]
    if dial:
        sides = [(gate, turned[:, :rank], b_gate, 0.5), (up, turned[:, rank:], b_up, 2.0)]
    wide = [
        (y[:, 0] if thin is None or b is None else torch.addmm(y[:, 0], thin, b.t(), alpha=scale)) for y, thin, b, scale in sides
    ]
    wanted = torch.nn.functional.silu(wide[0]) * wide[1]
    found = gated.gated(*sides, tile)[:, 0]
    assert torch.allclose(found, wanted, rtol=0.02 if dtype == torch.bfloat16 else 1e-5, atol=0.05 if dtype == torch.bfloat16 else 1e-4)
    a = some(rank, width)
    again, sums = gated.gated_ahead(*sides, tile, None, a)
    assert torch.equal(again[:, 0], found)
    made = sums.sum(0)[:, :rank]
    assert sums.shape == (-(-width // tile.columns), rows, kernels.power(rank))
    assert torch.allclose(made, found.float() @ a.float().t(), rtol=1e-3, atol=1e-3 * float(made.abs().max()))
    # The same from one joined product, alpha to come; a closed row is as if nothing were added, whatever A x is there.
    joined = torch.cat([gate[:, 0], up[:, 0], turned], 1)[:, None]
    alpha = torch.randn(rows, 1, 1, generator=draw).to(device)
    alpha[0] = 0
    if dial:
        joined[0, 0, 2 * width :] = torch.inf
    cut: list[Parts] = [(joined[..., :width], None, None, 0.5), (joined[..., width : 2 * width], None, None, 2.0)]
    if dial:
        thins = joined[:, 0, 2 * width :].split(rank, 1)
        cut = [(y, thin, b, scale) for (y, *_, scale), thin, b in zip(cut, thins, (b_gate, b_up), strict=True)]
    by = torch.where(alpha[:, 0] == 0, 0.0, turned.float() * alpha[:, 0]).to(dtype)
    late: list[Parts] = [(y, by[:, start : start + rank] if dial else None, b, scale) for (y, _, b, scale), start in zip(sides, (0, rank), strict=True)]
    assert torch.equal(gated.gated(*cut, tile, alpha), gated.gated(*late, tile))


@on_card
@pytest.mark.parametrize(("rows", "tokens", "alphas"), [(37, 1, 37), (5, 9, 5), (5, 9, 45), (3, 7, 1), (90, 50, 90)])
@pytest.mark.parametrize(("width", "rank"), [(96, 4), (300, 24), (520, 48), (200, 100), (100, 140)])
def test_the_thin_product_is_what_pytorch_computes_apart(rows: int, tokens: int, alphas: int, width: int, rank: int) -> None:
    """One alpha a row, a token, or for all; widths and ranks that fill no tile; a rank that is too wide for one."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    draw = torch.Generator().manual_seed(2)
    x = torch.randn(rows, tokens, width, generator=draw).to(device, dtype)
    a = torch.randn(rank, width, generator=draw).to(device, dtype)
    alpha = torch.randn({1: (1, 1, 1), rows: (rows, 1, 1)}.get(alphas, (rows, tokens, 1)), generator=draw).to(device)
    alpha[0, 0, 0] = 0
    # An open valve of a broken branch would be NaN; a closed one is exactly nothing.
    x[0, 0, 0] = torch.inf
    found = thin.thin(x, a, alpha)
    wanted = torch.where(alpha == 0, 0.0, (x @ a.t()) * alpha).to(dtype)
    assert found.shape == wanted.shape
    assert torch.equal(found[0, 0], torch.zeros_like(found[0, 0]))
    finite = wanted.isfinite()
    assert torch.equal(found.isfinite(), finite)
    loose = dtype == torch.bfloat16
    assert torch.allclose(found[finite], wanted[finite], rtol=0.02 if loose else 1e-4, atol=0.3 if loose else 1e-3)


@on_card
@pytest.mark.parametrize(("dim", "heads", "others"), [(64, 14, 2), (16, 3, 3), (24, 9, 1), (128, 8, 8)])
@pytest.mark.parametrize(("rows", "tokens", "shared"), [(5, 1, False), (3, 7, False), (3, 7, True)])
def test_the_rotation_is_that_of_transformers(dim: int, heads: int, others: int, rows: int, tokens: int, shared: bool) -> None:
    """Heads that fill no block, halves that are no power of two, queries and keys cut as layers cut them; one cos for all rows."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    draw = torch.Generator().manual_seed(3)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(device, dtype)

    joined = some(rows, tokens, heads + others, dim).transpose(1, 2)
    q, k = joined[:, :heads], joined[:, heads:]
    cos, sin = some(1 if shared else rows, tokens, dim), some(1 if shared else rows, tokens, dim)
    found, wanted = rotation.rotated(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, rtol=0.01 if dtype == torch.bfloat16 else 1e-6, atol=0.02 if dtype == torch.bfloat16 else 1e-6)


@on_card
@pytest.mark.parametrize(("dim", "heads", "others"), [(64, 14, 2), (128, 12, 2), (24, 3, 3), (16, 40, 2), (80, 8, 1)])
@pytest.mark.parametrize("tile", attend.TILES)
def test_our_attention_is_that_of_each_row(dim: int, heads: int, others: int, tile: attend.Tile) -> None:
    """Query heads that fill no tile, rows that end in and at the edge of a block, queries cut as layers cut them, old keys behind an end."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    draw, length = torch.Generator().manual_seed(4), 160
    used = torch.tensor([1, 31, 64, 65, 160], dtype=torch.int32, device=device)
    query = torch.randn(5, heads + others, dim, generator=draw).to(device, dtype)[:, :heads]
    key, value = (torch.randn(6 * length, others, dim, generator=draw).to(device, dtype) for _ in range(2))
    for row in range(4):
        key[row * length + int(used[row]) : (row + 1) * length] = torch.nan
        value[row * length + int(used[row]) : (row + 1) * length] = torch.inf
    numbers = torch.arange(6, dtype=torch.int32, device=device)
    ends = slots.Ends(numbers, numbers * length, used, length)
    for scaling in (None, 0.3):
        found, wanted = attend.attended(tile, query, key, value, ends, scaling), by_rows(query.float(), key.float(), value.float(), ends, scaling)
        assert found.shape == wanted.shape
        assert torch.allclose(found.float(), wanted, atol=0.02 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.kernel
@pytest.mark.skipif(find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1", reason="needs Triton, uninterpreted; no GPU")
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_cards_and_read_widely(capability: int) -> None:
    """Without a card: what an interpreter does not see. Sizes and pointers divisible by 16, as Triton finds them in a model."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from cotvalve.engines import between_tiles, tiles

    whole = {"rows", "width", "tokens", "rank", "out_1", "out_2", "out_3", "rank_1", "rank_2", "rank_3", "rank_g", "rank_u", "stride_g", "stride_u"}
    whole |= {"length", "dim", "shared", "q_row", "q_head", "token", "head", "stride", "blocks"}
    whole |= {"vocab", "step", "rank_a", "heads", "others", "half", "cos_row", "stride_q", "stride_k", "stride_v", "rank_q", "rank_k", "rank_v"}
    odd = {"tokens", "rank", "rank_1", "rank_2", "rank_3", "rank_g", "rank_u", "shared", "heads", "others", "rank_q", "rank_k", "rank_v"}
    odd |= {"blocks", "rank_a", "stride", "stride_q", "stride_k", "stride_v"}
    whole |= {"wide", "each", "wide_q", "wide_k", "wide_v"}
    odd |= {"each"}

    def compiled(kernel: Any, constants: dict[str, int], warps: int, stages: int) -> str:
        names = [name for name in kernel.arg_names if name not in constants]
        kinds = {name: "i32" if name in whole else "fp32" if name.startswith(("scale", "eps")) else "*bf16" for name in names}
        kinds |= {name: kind for name, kind in (("alpha", "*fp32"), ("uniform", "*fp32"), ("temperature", "*fp32"), ("used", "*i32"), ("position", "*i64")) if name in names}
        source = ASTSource(
            fn=kernel, signature=kinds | dict.fromkeys(constants, "constexpr"),
            constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
            attrs={
                (place,): [["tt.divisibility", 16]] for place, name in enumerate(kernel.arg_names)
                if name in kinds and name not in odd and kinds[name] != "fp32"
            },
        )  # fmt: skip
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages}).asm["ptx"]

    for tile in attend.TILES:
        for dim in (64, 128):
            made = compiled(tiles.attend_tile, {"SHARED": 16, "DIM": dim, "KEYS": tile.keys}, tile.warps, tile.stages)
            assert "cp.async" in made  # keys are on their way while the ones before are used
            assert "ld.global.v4" in made
    for tile in gated.TILES:
        constants = {"RANK": 16, "RANK_A": 16, "EIGHTS": True, "DIAL": True, "LATE": True, "AHEAD": False, "ROWS": tile.rows, "COLUMNS": tile.columns}
        made = compiled(tiles.gated_tile, constants | {"LATE": False}, tile.warps, 3)
        assert made.count("ld.global") < 25  # a row of B is one load, not eight
        compiled(tiles.gated_tile, constants | {"AHEAD": True}, tile.warps, 3)
    made = compiled(tiles.branch_tile, {"RANK": 32, "EIGHTS": True, "ROWS": 16, "DEEP": 256, "COLUMNS": branch.COLUMNS}, 4, 3)
    assert made.count("ld.global") < 30
    assert "cp.async" in compiled(tiles.thin_tile, {"RANK": 16, "ROWS": 16, "DEEP": 256, "PARTS": 4}, 4, 3)
    on = dict.fromkeys(("ADD", "BRANCH", "EIGHTS", "LATE"), True)
    for columns, warps, blocks in ((1024, 8, 0), (1024, 8, 32), (2048, 16, 0), (2048, 16, 64)):
        made = compiled(between_tiles.norm_tile, on | {"RANK": 16, "BLOCKS": blocks, "ROWS": 16, "COLUMNS": columns}, warps, 3)
        assert "ld.global.v4" in made
    made = compiled(tiles.draw_tile, {"SAMPLED": True, "BLOCK": draw.BLOCK}, 16, 3)
    assert "ld.global.v4" in made
    made = compiled(between_tiles.heads_tile, dict.fromkeys(("DIAL", "LATE", "PLACED", "EIGHTS"), True) | {"RANK": 16, "ROWS": 32, "HALF": 32}, 4, 3)
    assert "ld.global.v4" in made


def test_our_attention_is_taken_where_it_is_right_and_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """With clocks and kernels of the test's own: for few rows and for many the fastest of the right ones, or PyTorch's."""
    model = models.llama()
    took = {(2, None): 5.0, (2, 32): 4.0, (2, 64): 6.0, (2, 128): 7.0, (9, None): 5.0, (9, 32): 4.0, (9, 64): 3.0, (9, 128): 2.0}
    monkeypatch.setattr(slots, "reads_rows", lambda _: True)
    monkeypatch.setattr(slots, "read_rows", by_rows)
    monkeypatch.setattr(attend, "LOADS", ((2, 16), (9, 8)))
    monkeypatch.setattr(attend, "FEW", 4)
    used: list[int] = []

    def ours(tile: attend.Tile, *given: Any) -> Tensor:
        used.append(tile.keys)
        return by_rows(*given) * (1.2 if tile.keys == 128 else 1.0)

    def seconds(work: Any) -> float:
        tile = work.args[0] if isinstance(work.args[0], attend.Tile) else None
        return took[len(work.args[0 if tile is None else 1]), tile and tile.keys]

    monkeypatch.setattr(attend, "attended", ours)
    monkeypatch.setattr(kernels, "seconds", seconds)
    ((owner, name, best),) = attend.faster_attention(model)
    assert (owner, name) == (slots, "read_rows")
    shape = attend._sample(4, 8, 4, 2, 16, model), attend._sample(5, 8, 4, 2, 16, model)
    used.clear()
    found = [best(*sample, None) for sample in shape]
    assert used == [32, 64]
    assert all(torch.equal(out, by_rows(*sample, None)) for out, sample in zip(found, shape, strict=True))
    took[9, None] = 1.0
    ((_, _, best),) = attend.faster_attention(model)
    used.clear()
    best(*shape[1], None)
    assert not used
    took[2, None] = 1.0
    assert not [*attend.faster_attention(model)]


def test_tiles_that_the_card_has_no_room_for_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tile too wide for a direction of rank 256 raised, and all kernels that were still to be tried were left out."""

    class TooLarge(Exception):
        pass

    def refused(*_: object) -> Tensor:
        raise TooLarge

    monkeypatch.setattr(kernels, "_refusals", lambda: (TooLarge,))
    assert kernels.seconds(refused) == math.inf
    assert TooLarge in kernels.failures()
    with pytest.raises(ZeroDivisionError):
        kernels.seconds(lambda: 1 // 0)
    model = models.llama()
    monkeypatch.setattr(slots, "reads_rows", lambda _: True)
    monkeypatch.setattr(slots, "read_rows", by_rows)
    monkeypatch.setattr(attend, "LOADS", ((2, 16), (9, 8)))

    def ours(tile: attend.Tile, *given: Any) -> Tensor:
        return refused() if tile.keys > 32 else by_rows(*given)

    def seconds(work: Any) -> float:
        try:
            work()
        except TooLarge:
            return math.inf
        return 1.0 if isinstance(work.args[0], attend.Tile) else 2.0

    monkeypatch.setattr(attend, "attended", ours)
    monkeypatch.setattr(kernels, "seconds", seconds)
    ((_, _, best),) = attend.faster_attention(model)
    assert [load.args[0].keys for load in best.args] == [32, 32]


@on_card
@pytest.mark.parametrize(("ranks", "alphas"), [((4, 4, 4), 37), ((3, 8, 5), 1), ((8, 8, 8), 37), (None, 0)])
@pytest.mark.parametrize(("dim", "heads", "others"), [(64, 3, 1), (24, 2, 2), (128, 5, 1)])
@pytest.mark.parametrize(("placed", "tile"), [(False, between.TILES[0]), *((True, tile) for tile in between.TILES)])
def test_heads_are_those_of_transformers(
    ranks: tuple[int, int, int] | None, alphas: int, dim: int, heads: int, others: int, placed: bool, tile: between.Tile
) -> None:
    """Branches, rotation and the cache in one kernel: tokens that fill no tile, halves that are no power of two, ranks of any width."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    draw = torch.Generator().manual_seed(6)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(device, dtype)

    rows, tokens = (37, 1) if placed else (5, 9)
    counts = heads, others, others
    y = [some(rows, tokens, count * dim) for count in counts]
    parts: list[Parts] = [(one, None, None, 1.0) for one in y]
    if ranks:
        # As an inlet gives them where A is one matrix, and apart.
        joined = some(rows * tokens, sum(ranks))
        thins = joined.split(ranks, 1) if alphas > 1 else [some(rows * tokens, rank) for rank in ranks]
        parts = [(one, t, some(one.shape[-1], t.shape[1]), scale) for one, t, scale in zip(y, thins, (0.5, 2.0, 1.0), strict=True)]
    cos, sin = some(rows, tokens, dim), some(rows, tokens, dim)
    whole = [one if t is None or b is None else (one.float() + scale * (t @ b.t()).float().view(one.shape)).to(dtype) for one, t, b, scale in parts]
    q, k, v = (one.view(rows, tokens, -1, dim).transpose(1, 2) for one in whole)
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    wanted = [one.transpose(1, 2) for one in (q, k, v)]
    loose = {"rtol": 0.03, "atol": 0.01 * float(max(one.abs().max() for one in whole))} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    if not placed:
        found = between.turned_heads(parts, cos, sin, None, tile)
    else:
        position = torch.randperm(200, generator=draw)[:rows].to(device)
        caches = [some(200, others, dim) for _ in range(2)]
        before = [cache.clone() for cache in caches]
        query, *_ = between.turned_heads(parts, cos, sin, (caches[0], caches[1], position), tile)
        found = [query, *(cache[position][:, None] for cache in caches)]
        rest = torch.ones(200, dtype=torch.bool, device=device).index_fill(0, position, False)
        assert all(torch.equal(cache[rest], old[rest]) for cache, old in zip(caches, before, strict=True))
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, **loose)
    # The same cut from one joined product, alpha to come.
    alpha = torch.randn(rows, 1 if alphas == 1 else tokens, 1, generator=draw).to(device)
    alpha[0] = 0
    by = alpha.expand(rows, tokens, 1).reshape(-1, 1)
    widths = [one.shape[-1] for one in y]
    joined = torch.cat([*y, *(part[1].view(rows, tokens, -1) for part in parts if part[1] is not None)], -1)
    cut = joined.split(widths + [part[1].shape[1] for part in parts if part[1] is not None], -1)
    thins = [one.reshape(-1, joined.shape[-1])[:, 0:0] if part[1] is None else joined.view(rows * tokens, -1)[:, -sum(ranks or ()) :].split(ranks or (), 1)[place]
             for place, (one, part) in enumerate(zip([joined] * 3, parts, strict=True))]  # fmt: skip
    apart = [(one, None if t is None else (t.float() * by).to(dtype), b, scale) for one, t, b, scale in parts]
    together = [(one, None if part[1] is None else thin, *part[2:]) for one, thin, part in zip(cut[:3], thins, parts, strict=True)]
    assert all(map(torch.equal, between.turned_heads(together, cos, sin, None, tile, alpha), between.turned_heads(apart, cos, sin, None, tile)))


@on_card
@pytest.mark.parametrize("width", [96, 300, 2048])
@pytest.mark.parametrize("more", ["none", "plain", 5, 8])
def test_a_sum_and_its_norm_are_those_of_pytorch(width: int, more: str | int) -> None:
    """With and without a product to add, and its branch, which an inlet may have cut out of a wider one."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    draw = torch.Generator().manual_seed(7)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(device, dtype)

    hidden, y, w, rows = some(37, 1, width), some(37, 1, width), some(width), 37
    total, parts = hidden, None
    if isinstance(more, int):
        t, b = some(rows, 2 * more)[:, :more], some(width, more)
        parts, total = (y, t, b, 0.5), hidden + (y.float() + 0.5 * (t @ b.t()).float()[:, None]).to(dtype)
    elif more == "plain":
        parts, total = (y, None, None, 1.0), hidden + y
    loose = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    found, norm = between.normed(hidden, parts, w, 1e-6)
    assert torch.allclose(found, total, **loose)
    assert (found is hidden) == (parts is None)
    assert torch.allclose(norm, torch.nn.functional.rms_norm(found, [width], w, 1e-6), **loose)
    if isinstance(more, int) and parts is not None and parts[2] is not None:
        # The same with A x in 5 parts, alpha to come; closed rows are as if nothing were added, whatever A x is there.
        alpha = torch.randn(rows, 1, 1, generator=draw).to(device)
        alpha[0] = 0
        sums = torch.randn(5, rows, kernels.power(more), generator=draw).to(device)
        sums[:, 0] = torch.inf
        t = torch.where(alpha[:, :, 0] == 0, 0.0, sums.sum(0)[:, :more].to(dtype).float() * alpha[:, :, 0]).to(dtype)
        found, norm = between.normed(hidden, (y, None, parts[2], 0.5), w, 1e-6, sums, alpha)
        assert torch.allclose(found, hidden + (y.float() + 0.5 * (t @ parts[2].t()).float()[:, None]).to(dtype), **loose)
        assert torch.equal(found[0], (hidden + y)[0])
        assert torch.allclose(norm, torch.nn.functional.rms_norm(found, [width], w, 1e-6), **loose)
        # And cut from one joined product.
        joined = torch.cat([y, some(rows, 1, more)], -1)
        joined[0, 0, width:] = torch.inf
        thin = joined[:, 0, width:]
        t = torch.where(alpha[:, 0] == 0, 0.0, thin.float() * alpha[:, 0]).to(dtype)
        ours = between.normed(hidden, (joined[..., :width], thin, parts[2], 0.5), w, 1e-6, None, alpha)
        assert all(map(torch.equal, ours, between.normed(hidden, (y, t, parts[2], 0.5), w, 1e-6)))


@pytest.mark.kernel
@pytest.mark.skipif(find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton and TRITON_INTERPRET=1")
@pytest.mark.parametrize(
    ("which", "ahead", "joining"),
    [
        *((which, ahead, "") for which in ("all", "attention", "mlp", "k_proj", "none") for ahead in (False, True)),
        *((which, False, "heads mixed gate down") for which in ("all", "biased", "attention", "mlp", "k_proj", "none")),
        ("all", True, "heads gate"), ("biased", True, "heads gate"), ("all", False, "down"),
    ],
)  # fmt: skip
def test_whole_layers_give_the_same_chains(monkeypatch: pytest.MonkeyPatch, which: str, ahead: bool, joining: str) -> None:
    """The engine with all layers in the kernels' hands, in an interpreter: prompts and steps, any part with a branch; all given back."""
    monkeypatch.setattr("cotvalve.inlets.JOINED", {"cpu"})
    make = models.qwen2 if which == "biased" else models.llama
    kept = {"all": "", "biased": "", "attention": "self_attn", "none": "nothing"}.get(which, which)
    factors = {name: factor for name, factor in direction(make).factors.items() if kept in name}
    asked = mixture(6) if factors else [replace(request, alpha=0.0) for request in mixture(6)]
    turned = Valve(make(), models.tokenizer(["</think>"]), Direction(factors, Card("base")) if factors else None)
    expected = run(engine("transformers", on=turned), asked)

    def seconds(work: Any) -> float:
        work()
        if not isinstance(work, partial) or not isinstance(work.func, layers.Layer):
            return own_takes
        joins = sum((joined is not None) != (name in joining) for name, joined in work.func.joins._asdict().items())
        return 1.0 + (work.func.tile != between.TILES[2]) + (work.func.ahead != ahead) + joins / 10

    for module in ("batch", "slots"):
        monkeypatch.setattr(f"cotvalve.engines.{module}.reads_rows", lambda _: True)
    monkeypatch.setattr(slots, "read_rows", by_rows)
    monkeypatch.setattr(kernels, "available", lambda _: True)
    monkeypatch.setattr(kernels, "seconds", seconds)
    monkeypatch.setattr(layers, "MANY", 6)
    monkeypatch.setattr("cotvalve.engines.transformers.faster_attention", lambda _: [])
    monkeypatch.setattr("cotvalve.engines.transformers.faster_draws", lambda _: [])
    monkeypatch.setattr("cotvalve.engines.transformers.faster_branches", lambda *_, **__: [])
    seen: list[bool] = []
    summed: list[bool] = []
    own, normed = layers.turned_heads, layers.normed
    monkeypatch.setattr(layers, "normed", lambda *given: summed.append(given[4] is not None) or normed(*given))
    monkeypatch.setattr(layers, "turned_heads", lambda *given: seen.append(given[3] is not None) or own(*given))
    own_takes = 1.5 + (ahead and not factors)  # without a dial nothing is made ahead
    before = {name: parameter.clone() for name, parameter in turned.model.named_parameters()}
    of = engine("transformers", on=turned)
    assert run(of, asked) == expected
    summed.clear()  # of the measurements, which try both ways
    assert run(of, asked) == expected
    assert isinstance(of._faster, list)
    found = [found for _, _, found in of._faster if isinstance(found, layers.Layer)]
    assert len(found) == turned.model.config.num_hidden_layers
    assert {(one.tile, one.ahead) for one in found} == {(between.TILES[2], ahead and bool(factors))}
    can = {"all": "heads mixed gate down", "biased": "heads mixed gate down", "attention": "heads mixed gate", "mlp": "heads gate down", "k_proj": "gate", "none": "heads gate"}[which]
    (joins,) = {tuple(name for name, joined in one.joins._asdict().items() if joined is not None) for one in found}
    assert {*joins} == {*joining.split()} & {*can.split()}
    assert layers.current(of._faster)
    told = of.facts()["kernels"].split(", ")
    assert ("one product for gate and up" in told) == ("gate" in joins)
    assert {"whole layers", "gated layers", "rotation"} <= {*told}
    assert all(torch.equal(parameter, before[name]) for name, parameter in turned.model.named_parameters())
    assert summed.count(True) > 20 if ahead and which in ("all", "biased", "mlp") else True not in summed
    assert seen.count(True) > 20
    assert False in seen
    assert not any("forward" in vars(module) for module in [*turned.model.model.layers, turned.model.model.norm])
    own_takes = 0.5
    slower = engine("transformers", on=turned)
    assert run(slower, asked) == expected
    assert not any(isinstance(found, layers.Layer) for _, _, found in slower._faster)


def test_rotation_is_replaced_where_it_is_that_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the kernel's hands, its arithmetic by PyTorch; another formula is left alone; afterwards all is as it was."""
    model = models.llama()
    beside = sys.modules[type(model).__module__]
    own = vars(beside)[rotation.NAME]
    monkeypatch.setattr(rotation, "rotated", own)
    ((owner, name, other),) = rotation.fused_rotation(model)
    assert (owner, name) == (beside, rotation.NAME)
    with replaced([(owner, name, other)]):
        assert vars(beside)[rotation.NAME] is other
    assert vars(beside)[rotation.NAME] is own
    monkeypatch.setattr(rotation, "rotated", lambda q, k, cos, sin: own(q, k, sin, cos))
    assert not [*rotation.fused_rotation(model)]


def test_the_dial_takes_an_engines_own_product_and_gives_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's chains with alpha * A x in a kernel's hands, the kernel's arithmetic by PyTorch."""
    turned = Valve(models.llama(), models.tokenizer(["</think>"]), direction())
    expected = run(engine("transformers", on=turned), mixture(6))
    calls = 0

    def by_parts(x: Tensor, a: Tensor, alpha: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.where(alpha == 0, 0.0, x @ a.t() * alpha)

    monkeypatch.setattr(thin, "thin", by_parts)
    monkeypatch.setattr(kernels, "available", lambda _: True)
    monkeypatch.setattr(gated, "gated_layers", lambda *_: [])
    monkeypatch.setattr("cotvalve.engines.transformers.fused_rotation", lambda _: [])
    monkeypatch.setattr("cotvalve.engines.transformers.faster_branches", lambda *_, **__: [])
    monkeypatch.setattr("cotvalve.engines.transformers.faster_layers", lambda *_, **__: [])
    monkeypatch.setattr("cotvalve.engines.transformers.faster_attention", lambda _: [])
    monkeypatch.setattr("cotvalve.engines.transformers.faster_draws", lambda _: [])
    assert run(engine("transformers", on=turned), mixture(6)) == expected
    assert calls > 20
    assert turned.dial is not None
    assert turned.dial.kernel is None
    # A kernel that is wrong on this card proves nothing and is left alone.
    monkeypatch.setattr(thin, "thin", lambda x, a, alpha: 1.1 * by_parts(x, a, alpha))
    assert run(engine("transformers", on=turned), mixture(6)) == expected


@on_card
@pytest.mark.parametrize("spread", branch.SPREADS)
@pytest.mark.parametrize(("rows", "tokens", "alphas"), [(37, 1, 37), (5, 9, 45), (3, 7, 1)])
@pytest.mark.parametrize(("width", "out", "ranks"), [(96, (300, 64, 64), (4, 4, 4)), (300, (130,), (24,)), (520, (96, 260), (3, 16))])
def test_a_branch_adds_what_pytorch_adds_apart(
    spread: int, rows: int, tokens: int, alphas: int, width: int, out: tuple[int, ...], ranks: tuple[int, ...]
) -> None:
    """Layers of other widths and ranks, which fill no tile; closed rows stay as they are, whatever A x is there."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    draw = torch.Generator().manual_seed(5)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(device, dtype)

    x, a = some(rows, tokens, width), some(sum(ranks), width)
    sides = [(some(rows, tokens, wide), some(wide, rank), scale) for wide, rank, scale in zip(out, ranks, (0.5, 2.0, 1.0), strict=False)]
    alpha = torch.randn({1: (1, 1, 1), rows: (rows, 1, 1)}.get(alphas, (rows, tokens, 1)), generator=draw).to(device)
    if alphas > 1:
        alpha[0, 0, 0] = 0
        x[0, 0, 0] = torch.inf
    thin_ = torch.where(alpha == 0, 0.0, (x @ a.t()) * alpha).to(dtype).split(ranks, -1)
    before = [side[0].clone() for side in sides]
    branch.branched(spread, x, a, alpha, sides)
    for y, t, (found, b, scale) in zip(before, thin_, sides, strict=True):
        wanted = (y.float() + scale * (t @ b.t()).float()).to(dtype)
        if alphas > 1:
            assert torch.equal(found[0, 0], y[0, 0])
        finite = wanted.isfinite()
        loose = dtype == torch.bfloat16
        assert torch.allclose(found[finite], wanted[finite], rtol=0.03 if loose else 1e-4, atol=0.5 if loose else 1e-3)


def test_branches_are_taken_where_they_are_right_and_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's arithmetic by PyTorch and the test's own clock: the same chains, the gated layers left out, all given back."""
    monkeypatch.setattr("cotvalve.inlets.JOINED", {"cpu"})
    turned = Valve(models.llama(), models.tokenizer(["</think>"]), direction())
    expected = run(engine("transformers", on=turned), mixture(6))
    dial = turned.dial
    assert dial is not None
    calls: list[int] = []

    def by_parts(spread: int, x: Tensor, a: Tensor, alpha: Tensor, sides: Sequence[tuple[Tensor, Tensor, float]]) -> None:
        calls.append(len(sides))
        thin_ = torch.where(alpha == 0, 0.0, (x @ a.t()) * alpha).split([side[1].shape[1] for side in sides], -1)
        for t, (y, b, scale) in zip(thin_, sides, strict=True):
            y.add_((t @ b.t()) * scale * (wrong if spread == branch.SPREADS[0] else 1.0))

    def one_by_one(here: Any, there: Any) -> tuple[Tensor, Tensor]:
        calls.append(0)
        one, two = here(), there()
        return one, two

    def seconds(work: Any) -> float:
        work()
        tried = [inlet for inlet in dial.inlets.of.values() if inlet.branch or inlet.beside]
        return took[None if not tried else "beside" if tried[0].branch is None else tried[0].branch.args[0]]

    monkeypatch.setattr(branch, "branched", by_parts)
    monkeypatch.setattr(kernels, "seconds", seconds)
    monkeypatch.setattr(kernels, "aside", lambda _: one_by_one)
    wrong, took = 2.0, {None: 3.0, "beside": 2.5, branch.SPREADS[0]: 1.0, branch.SPREADS[1]: 2.0}
    found = [*branch.faster_branches(dial)]
    assert len(found) == 4 * turned.model.config.num_hidden_layers  # q, k, v; o; gate, up; down
    for owner, name, other in found:
        gated_ = "gate_proj" in owner.names
        assert name == ("beside" if gated_ else "branch")
        assert gated_ or other.args[0] == branch.SPREADS[1]  # the fastest is wrong
    monkeypatch.setattr(TransformersEngine, "_find_faster", lambda _: found)
    calls.clear()
    assert run(engine("transformers", on=turned), mixture(6)) == expected
    assert set(calls) == {0, 1, 3}
    assert not any(inlet.branch or inlet.beside for inlet in dial.inlets.of.values())
    took["beside"], took[branch.SPREADS[1]] = 3.5, 3.5
    assert not [*branch.faster_branches(dial)]


@pytest.mark.parametrize("error", [RuntimeError("Failed to find C compiler"), torch.OutOfMemoryError("CUDA out of memory")])
def test_kernels_that_cannot_be_tried_are_left_out_with_a_word(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    turned = Valve(models.llama(), models.tokenizer(["</think>"]), direction())
    expected = run(engine("transformers", on=turned), mixture(6))

    def broken(*_: object) -> Tensor:
        raise error

    monkeypatch.setattr(kernels, "available", lambda _: True)
    monkeypatch.setattr(thin, "thin", broken)
    with pytest.warns(UserWarning, match=f"our kernels are left out.*{error}"):
        assert run(engine("transformers", on=turned), mixture(6)) == expected


@pytest.mark.parametrize("only_attention", [False, True])
def test_gated_layers_give_the_same_chains(monkeypatch: pytest.MonkeyPatch, only_attention: bool) -> None:
    """The engine with the layers in the kernel's hands, the kernel's arithmetic by PyTorch; a direction without MLP too."""

    def by_parts(gate: Parts, up: Parts) -> Tensor:
        one, two = (y if t is None or b is None else y + (t @ b.t() * s).view(y.shape) for y, t, b, s in (gate, up))
        return torch.nn.functional.silu(one) * two

    factors = direction().factors
    if only_attention:
        factors = {name: factor for name, factor in factors.items() if ".mlp." not in name}
    turned = Valve(models.llama(), models.tokenizer(["</think>"]), Direction(factors, Card("base")))
    expected = run(engine("transformers", on=turned), mixture(6))
    calls = 0

    def counted(gate: Parts, up: Parts, tile: gated.Tile) -> Tensor:
        nonlocal calls
        calls += 1
        tiles.add(tile)
        return by_parts(gate, up)

    tiles: set[gated.Tile] = set()

    def seconds(work: Any) -> float:
        work()
        return -work.args[2].columns  # the widest is the fastest

    monkeypatch.setattr(gated, "MANY", 8)
    monkeypatch.setattr(kernels, "seconds", seconds)
    monkeypatch.setattr(gated, "gated", counted)
    monkeypatch.setattr(kernels, "available", lambda _: True)
    monkeypatch.setattr(thin, "proves", lambda _: False)
    monkeypatch.setattr("cotvalve.engines.transformers.fused_rotation", lambda _: [])
    monkeypatch.setattr("cotvalve.engines.transformers.faster_branches", lambda *_, **__: [])
    monkeypatch.setattr("cotvalve.engines.transformers.faster_layers", lambda *_, **__: [])
    monkeypatch.setattr("cotvalve.engines.transformers.faster_attention", lambda _: [])
    monkeypatch.setattr("cotvalve.engines.transformers.faster_draws", lambda _: [])
    of = engine("transformers", on=turned)
    assert run(of, mixture(6)) == expected
    assert tiles == set(gated.TILES)
    tiles.clear()
    assert run(of, mixture(6)) == expected
    assert {tile.columns for tile in tiles} == {max(tile.columns for tile in gated.TILES)}
    assert calls > 20
    assert not any("forward" in vars(m) for name, m in turned.model.named_modules() if name.endswith("mlp"))


@pytest.mark.parametrize("name", ["auto", "generate"])
def test_a_model_that_folds_rows_runs_one_alpha_after_the_other(name: str) -> None:
    """OPT's feed-forward layers see a batch as one row of tokens: no alpha but 0 could be asked for, by any engine."""
    config = OPTConfig(
        vocab_size=models.VOCABULARY, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=512, pad_token_id=256,
    )  # fmt: skip
    make = cache(lambda: models._filled(OPTForCausalLM(config), 0))  # pyright: ignore[reportPrivateUsage]
    wrapped = models.lora(copy.deepcopy(make()), targets=["q_proj", "fc1", "fc2"], by=0.6)
    factors = {key.replace(".default", ""): weight for key, weight in wrapped.named_parameters() if "lora_" in key}
    on = Valve(copy.deepcopy(make()), models.tokenizer(), Direction.from_peft(wrapped.peft_config["default"], factors, Card("base")))
    asked = [Request(f"{i}", "ab"[i % 2] * (i + 1), alpha, 6) for i, alpha in enumerate((0.0, 0.5, 1.0, 0.5, 0.0, 1.0))]
    together = run(pick(name, on, 16), asked)
    for request in asked:
        plain = Valve(on.fuse(request.alpha), models.tokenizer())
        assert together[request.id].text == run(GenerateEngine(plain), [replace(request, alpha=0.0)])[request.id].text
    assert len({together[request.id].text for request in asked}) > 2
