"""Learning by reward: what chains are worth, weights in the loss, and what a step does to right and wrong chains."""

import gc
import json
import math
import sqlite3
import weakref
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from cotvalve import Valve, rounds
from cotvalve.batches import IGNORED, collate, collate_flat, encode, pack
from cotvalve.chains import judged
from cotvalve.direction import Card, Direction
from cotvalve.errors import DataError, SettingError
from cotvalve.headloss import Worth, compiled
from cotvalve.learner import Learner, _Order  # pyright: ignore[reportPrivateUsage]
from cotvalve.mixchain import MixSettings
from cotvalve.mixchain import run as mix
from cotvalve.prompts import end_of_turn
from cotvalve.recipes import Example, Stage, reward, worths
from cotvalve.records import Json, read_json, write_json
from cotvalve.rounds import RewardSettings
from cotvalve.train import TrainSettings
from cotvalve.train import run as train
from cotvalve.types import Chain, Judged, Problem
from tests import models
from tests.test_train import assert_same_bits, assert_same_gradients, fit, settings, turned

SEVEN = Problem("p", "3+4?", "7")


def one(tokens: int, *, right: bool, alpha: float = 1.0, text: str = "", truncated: bool = False) -> Judged:
    return Judged(Chain(text or f"{tokens} {right}", tokens, alpha), right, truncated)


# What a chain is worth


def test_a_right_chain_is_worth_more_than_a_wrong_one_and_a_short_one_more_than_a_long_one() -> None:
    group = [one(100, right=True), one(200, right=True), one(300, right=True), one(50, right=False)]
    assert worths(group, 0.0) == pytest.approx([0.25, 0.25, 0.25, -0.75])
    assert worths(group, 0.4) == pytest.approx([1 - 0.6, 0.8 - 0.6, 0.6 - 0.6, -0.6])


def test_where_all_chains_earn_the_same_nothing_is_learned() -> None:
    for right in (True, False):
        assert worths([one(100, right=right)] * 3, 0.5) == [0, 0, 0]
    with pytest.raises(DataError, match="all 3 chains are worth as much"):
        reward([(SEVEN, [one(100, right=True)] * 3)], 0.5)


def test_each_position_is_a_group_of_its_own() -> None:
    """A long chain at 0.5 is not measured against the short ones at 1."""
    (stage,) = reward([(SEVEN, [
        one(300, right=True, alpha=0.5), one(400, right=True, alpha=0.5), one(100, right=True), one(90, right=False),
    ])], 0.2)  # fmt: skip
    assert [(e.alpha, e.chain.tokens, round(e.weight, 6)) for e in stage.examples] == [(0.5, 300, 0.1), (0.5, 400, -0.1), (1, 100, 0.5), (1, 90, -0.5)]


def test_truncated_chains_count_in_the_mean_and_are_not_learned() -> None:
    (stage,) = reward([(SEVEN, [one(100, right=True), one(640, right=False, truncated=True)])], 0.2)
    assert [(e.chain.tokens, e.weight) for e in stage.examples] == [(100, 0.5)]
    assert stage.skipped == 1


def test_truncated_chains_are_unlearned_without_an_end_where_it_is_asked_for() -> None:
    chains = [Judged(Chain("3 + 4 = 7", 100, 1.0), True), Judged(Chain("3 + 3 + 3", 640, 1.0), False, truncated=True)]
    (stage,) = reward([(SEVEN, chains)], 0.2, truncated=True)
    assert [(e.chain.tokens, e.weight, e.ended) for e in stage.examples] == [(100, 0.5, True), (640, -0.5, False)]
    assert stage.skipped == 0
    tokenizer = models.tokenizer()
    told = [[label for label in row["labels"] if label != IGNORED] for row in encode(stage, tokenizer, "plain", 4096)[0]]
    ends = tokenizer(end_of_turn(tokenizer), add_special_tokens=False)["input_ids"]
    assert told[0] == tokenizer("3 + 4 = 7", add_special_tokens=False)["input_ids"] + ends
    assert told[1] == tokenizer("3 + 3 + 3", add_special_tokens=False)["input_ids"]


def test_the_plain_end_of_the_dial_is_not_learned() -> None:
    with pytest.raises(DataError, match="at each alpha but 0"):
        reward([(SEVEN, [one(100, right=True, alpha=0.0), one(90, right=False, alpha=0.0)])], 0.2)


# Weights in the loss


TEXTS, WEIGHTS, ALPHAS = ("2", "it is 7 because 3 + 4", "no", "then 5 - 2 = 3"), (0.5, -0.25, 1.0, -1.5), (1.0, 0.5, 1.5, 0.7)


def weighted(texts: tuple[str, ...] = TEXTS, weights: tuple[float, ...] = WEIGHTS, alphas: tuple[float, ...] = ALPHAS) -> list[Json]:
    found = tuple(Example(SEVEN, Chain(t, len(t)), a, w) for t, a, w in zip(texts, alphas, weights, strict=True))
    return encode(Stage("s", found), models.tokenizer(), "plain", 4096)[0]


def loss_and_gradients(valve: Valve, batch: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    batch = dict(batch)
    valve.model.zero_grad()
    with valve.at(batch.pop("alpha")):
        loss = Learner(valve)(**batch, divisor=1.0)
        loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in valve.model.named_parameters() if p.grad is not None}


def by_hand(valve: Valve) -> tuple[float, dict[str, Tensor]]:
    """Each chain's own loss times its weight, one after the other."""
    total, summed = 0.0, dict[str, Tensor]()
    for text, weight, alpha in zip(TEXTS, WEIGHTS, ALPHAS, strict=True):
        loss, gradients = loss_and_gradients(valve, collate(weighted((text,), (1.0,), (alpha,))))
        total += weight * loss
        summed = {name: weight * g + summed.get(name, 0) for name, g in gradients.items()}
    return total, summed


def test_rows_have_weights_only_where_examples_differ() -> None:
    assert "weights" not in collate(weighted(weights=(1.0,) * 4))
    batch = collate(weighted())
    assert len(batch["weights"]) == len(batch["places"]) == sum(len(text) + 1 for text in TEXTS)


@pytest.mark.parametrize("way", ["rows", "packed", "own head", "learned head"])
def test_a_weight_multiplies_its_chain_s_loss_and_gradient(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    valve, encoded = turned(), weighted()
    batch = collate(pack(encoded, 100) if way == "packed" else encoded)
    assert len(batch["input_ids"]) == (2 if way == "packed" else 4)
    expected = by_hand(valve)
    if way == "own head":
        monkeypatch.setattr(valve.model.config, "logits_scaling", 2.0, raising=False)
    if way == "learned head":
        head = valve.model.get_output_embeddings()
        assert head is not None
        monkeypatch.setattr("cotvalve.learner.LOSS_SLICE", 7)
        head.weight.requires_grad_(True)
    loss, gradients = loss_and_gradients(valve, batch)
    assert math.isclose(loss, expected[0], rel_tol=1e-5)
    assert_same_gradients({name: g for name, g in gradients.items() if ".lora_" in name}, expected[1])


def test_slices_and_flat_batches_take_their_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    valve, encoded = turned(), weighted()
    whole = loss_and_gradients(valve, collate(encoded))
    monkeypatch.setattr("cotvalve.headloss.LOSS_SLICE", 7)
    sliced = loss_and_gradients(valve, collate(encoded))
    assert math.isclose(sliced[0], whole[0], rel_tol=1e-6)
    assert_same_gradients(sliced[1], whole[1])
    flat = collate_flat(encoded)
    learned = [row["weight"] for row in encoded for label in row["labels"] if label >= 0]
    assert flat["weights"].tolist() == learned


def test_the_fused_loss_tells_tokens_apart() -> None:
    logits, wanted = torch.randn(5, 11, generator=torch.Generator().manual_seed(0)), torch.arange(5)[:, None]
    loss, _ = compiled()(logits, wanted)
    assert torch.allclose(loss, torch.nn.functional.cross_entropy(logits, wanted[:, 0], reduction="none"))


# How far a step may go


def test_a_token_that_has_gone_far_enough_counts_no_more() -> None:
    """Objective and slope against PPO's equation 7 written out, by autograd."""
    draw = torch.Generator().manual_seed(0)
    loss, before, weights = (torch.randn(200, generator=draw, dtype=torch.float64) for _ in range(3))
    loss = (loss.abs()).requires_grad_()
    worth = Worth(weights, -loss.detach() + 0.4 * before, 0.2)
    ratio = torch.exp(-loss - worth.before) if worth.before is not None else loss
    value = -torch.minimum(ratio * weights, torch.clamp(ratio, 0.8, 1.2) * weights)
    assert torch.allclose(worth.of(loss), value)
    (gradient,) = torch.autograd.grad(value.sum(), loss)
    assert torch.allclose(worth.slope(loss.detach()), gradient)
    stopped = gradient == 0
    assert 40 < int(stopped.sum()) < 160
    assert bool(((ratio > 1.2)[weights > 0] == stopped[weights > 0]).all())
    assert bool(((ratio < 0.8)[weights < 0] == stopped[weights < 0]).all())


@pytest.mark.parametrize("own_head", [False, True])
def test_likelihoods_are_each_token_s_log_p(own_head: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    valve, encoded = turned(), weighted()
    if own_head:
        monkeypatch.setattr(valve.model.config, "logits_scaling", 2.0, raising=False)
    monkeypatch.setattr("cotvalve.learner.LOSS_SLICE", 7)
    batch = collate(encoded)
    batch.pop("weights")
    with valve.at(batch.pop("alpha")):
        found = Learner(valve).likelihoods(**batch).split([len(text) + 1 for text in TEXTS])
    for text, alpha, own in zip(TEXTS, ALPHAS, found, strict=True):
        assert math.isclose(float(own.sum()), likelihood(valve, text, alpha), rel_tol=1e-5)


@pytest.mark.parametrize("way", ["rows", "own head", "learned head"])
def test_where_nothing_has_moved_yet_the_gradient_is_the_reward_s(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    valve, encoded = turned(), weighted()
    free = loss_and_gradients(valve, collate(encoded))[1]
    for row, text, alpha in zip(encoded, TEXTS, ALPHAS, strict=True):
        batch = collate(weighted((text,), (1.0,), (alpha,)))
        with valve.at(batch.pop("alpha")):
            row["before"] = Learner(valve).likelihoods(**batch).tolist()
    if way == "own head":
        monkeypatch.setattr(valve.model.config, "logits_scaling", 2.0, raising=False)
    if way == "learned head":
        head = valve.model.get_output_embeddings()
        assert head is not None
        head.weight.requires_grad_(True)
    for slices in (2048, 7):
        monkeypatch.setattr("cotvalve.headloss.LOSS_SLICE", slices)
        monkeypatch.setattr("cotvalve.learner.LOSS_SLICE", slices)
        loss, found = loss_and_gradients(valve, collate(encoded))
        assert_same_gradients({name: g for name, g in found.items() if ".lora_" in name}, free)
        # Where p has not moved, the objective of a token is its worth.
        assert loss == pytest.approx(-sum(weight * (len(text) + 1) for text, weight in zip(TEXTS, WEIGHTS, strict=True)), rel=1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_the_first_step_of_a_round_has_the_reward_s_gradient(tmp_path: Path, packing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a token was before is found at its own chain's position, whatever the portions and their order."""
    seen = models.gradients_of_steps(monkeypatch)
    stage = Stage("s", tuple(Example(SEVEN, Chain(t, len(t)), a, w) for t, a, w in zip(TEXTS, ALPHAS, WEIGHTS, strict=True)))
    for trust, more in ((0.0, {}), (0.2, {"packing": packing, "max_length": 100, "micro_batch": 2})):
        how = settings(batch=4, clip=0, trust=trust, **more)
        fit(turned(), [stage], how, tmp_path / str(trust), Card("base", "shorter", "reward"), ask="plain")
    free, bound = seen
    assert_same_gradients(bound, free)


def pushed(folder: Path, trust: float, **how: object) -> Valve:
    """A valve after forty steps up and down the same two chains."""
    valve = turned()
    (stage,) = reward([(SEVEN, [one(9, right=True, text="3 + 4 = 7"), one(9, right=False, text="so it is 9")])], 0.0)
    fit(valve, [stage], settings(**{"learning_rate": 3e-3, "epochs": 40, "trust": trust, **how}), folder, Card("base", "shorter", "reward"), ask="plain")
    return valve


def test_trust_bounds_what_one_round_does(tmp_path: Path) -> None:
    before = [likelihood(turned(), text, 1.0) for text in ("3 + 4 = 7", "so it is 9")]
    bound, free = pushed(tmp_path / "bound", 0.2), pushed(tmp_path / "free", 0.0)
    for text, then, sign in zip(("3 + 4 = 7", "so it is 9"), before, (1, -1), strict=True):
        near, far = (sign * (likelihood(valve, text, 1.0) - then) for valve in (bound, free))
        assert 0.2 < near < far / 2, f"{text}: {near:.2f} of {far:.2f}"


def test_a_smaller_trust_bounds_it_closer(tmp_path: Path) -> None:
    """In steps that are small beside both: 0.2, the default, was as good as any other number."""
    before = [likelihood(turned(), text, 1.0) for text in ("3 + 4 = 7", "so it is 9")]
    tight, bound = (pushed(tmp_path / str(trust), trust, learning_rate=3e-4) for trust in (0.02, 0.2))
    for text, then, sign in zip(("3 + 4 = 7", "so it is 9"), before, (1, -1), strict=True):
        nearest, near = (sign * (likelihood(valve, text, 1.0) - then) for valve in (tight, bound))
        assert 0 < nearest < near / 2, f"{text}: {nearest:.2f} of {near:.2f}"


def test_a_round_that_was_stopped_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    """What a token was before the first step is known again from the direction that the round began with."""

    class Stopped(Exception):
        pass

    told = list[str]()

    def stop(_task: str, done: int, _total: int, note: str = "") -> None:
        told.append(note)
        if done == 20:
            raise Stopped

    whole = pushed(tmp_path / "whole", 0.2)
    valve = turned()
    (stage,) = reward([(SEVEN, [one(9, right=True, text="3 + 4 = 7"), one(9, right=False, text="so it is 9")])], 0.0)
    how, card = settings(learning_rate=3e-3, epochs=40, trust=0.2, checkpoint_every=10), Card("base", "shorter", "reward")
    with pytest.raises(Stopped):
        fit(valve, [stage], how, tmp_path / "part", card, ask="plain", progress=stop)
    assert "how likely its chains are before: 0 of 2" in told
    again = turned()
    fit(again, [stage], how, tmp_path / "part", card, ask="plain")
    assert_same_bits(again, whole)


# A step


def likelihood(valve: Valve, text: str, alpha: float) -> float:
    """log p of a chain at a position."""
    batch = collate(weighted((text,), (1.0,), (alpha,)))
    with torch.no_grad(), valve.at(batch.pop("alpha")):
        return -float(Learner(valve)(**batch, divisor=1.0))


def test_right_chains_become_likelier_and_wrong_ones_less_so_at_their_own_position(tmp_path: Path) -> None:
    right, wrong = "3 + 4 = 7", "3 + 4 = 9"
    valve = turned()
    before = [likelihood(valve, text, 0.5) for text in (right, wrong)]
    stages = reward([(SEVEN, [one(9, right=True, alpha=0.5, text=right), one(9, right=False, alpha=0.5, text=wrong)])], 0.0)
    fit(valve, stages, settings(learning_rate=1e-3, epochs=4), tmp_path, Card("base", "shorter", "reward"), ask="plain")
    after = [likelihood(valve, text, 0.5) for text in (right, wrong)]
    assert after[0] - after[1] > before[0] - before[1] + 0.1


# Steps of many chains


def test_long_and_short_chains_are_in_every_step() -> None:
    """A step is divided by its tokens: with like lengths together a short chain's tokens would count for more than a long one's."""

    def steps(weights: tuple[float, float]) -> list[list[int]]:
        texts = tuple("7" * (1 + 9 * (i % 8)) for i in range(256))
        rows = weighted(texts, tuple(weights[i % 2] for i in range(256)), (1.0,) * 256)
        trainer = SimpleNamespace(train_dataset=rows, args=SimpleNamespace(train_batch_size=16, seed=0), state=SimpleNamespace(global_step=0))
        order = list(_Order(trainer))  # pyright: ignore[reportArgumentType]
        assert sorted(order) == list(range(256))
        return [[len(rows[i]["input_ids"]) for i in order[start : start + 16]] for start in range(0, 256, 16)]

    means = [sum(lengths) / 16 for lengths in steps((0.5, -0.5))]
    assert max(means) < 1.5 * min(means)
    assert all(len(set(lengths)) > 4 for lengths in steps((0.5, -0.5)))
    # Chains that all count alike are learned by like lengths, which costs less.
    assert max(sum(lengths) / 16 for lengths in steps((1.0, 1.0))) > 1.5 * min(sum(lengths) / 16 for lengths in steps((1.0, 1.0)))


@pytest.mark.parametrize("broken", ["memory", "compiler"])
def test_what_was_likely_before_is_found_where_memory_or_compiler_fail(tmp_path: Path, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pushed(tmp_path / "whole", 0.2)
    likelihoods, seen = Learner.likelihoods, list[int]()

    def fails(self: Learner, input_ids: Tensor, **batch: object) -> Tensor:
        seen.append(len(input_ids))
        if broken == "memory" and len(input_ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if broken == "compiler" and len(seen) == 1:
            raise TorchDynamoException("no C compiler found")
        return likelihoods(self, input_ids, **batch)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Learner, "likelihoods", fails)
    other = pushed(tmp_path / "other", 0.2)
    assert seen == ([2, 1, 1] if broken == "memory" else [2, 2])
    for text in ("3 + 4 = 7", "so it is 9"):
        assert likelihood(other, text, 1.0) == pytest.approx(likelihood(whole, text, 1.0), rel=1e-2)


# From the command line's side


def sampled(out: Path, **how: object) -> Path:
    given = {"model": "tiny-reasoner", "direction": "tiny-valve", "data": "arithmetic", "prompt": "plain", "limit": 12, "alphas": (1.0,), "samples": 4,
             "temperature": 1.0, "max_new_tokens": 96, "fewest": 1, "dtype": "float32", "device": "cpu", "out": str(out)}  # fmt: skip
    return mix(MixSettings(**{**given, **how}))  # pyright: ignore[reportArgumentType]


def learns(data: Path, out: Path, **how: object) -> Path:
    given = {"recipe": "reward", "model": "tiny-reasoner", "direction": "tiny-valve", "data": str(data), "prompt": "plain", "learning_rate": 1e-3, "warmup": 0,
             "dtype": "float32", "device": "cpu", "out": str(out)}  # fmt: skip
    return train(TrainSettings(**{**given, **how}))  # pyright: ignore[reportArgumentType]


def test_chains_of_a_run_are_learned_by_what_they_are_worth(tmp_path: Path) -> None:
    data = sampled(tmp_path / "mix")
    groups, made = judged(data)
    assert made["settings"]["samples"] == 4
    assert len(groups) == 12
    rows = [row for _, chains in groups for row in chains]
    assert len(rows) == 48
    assert {row.right for row in rows} == {True, False}
    out = learns(data, tmp_path / "reward")
    report = read_json(out / "train.json")["stages"][0]
    (stage,) = reward(groups, 0.2)
    assert report["examples"] == len(stage.examples)
    assert report["skipped_chains"] == stage.skipped
    assert report["steps"] == 1
    found = Direction.load(out)
    assert found.card.method == "reward"
    assert found.sha256() != Direction.load("tiny-valve").sha256()


def test_a_run_that_unlearns_truncated_chains_learns_from_more_of_them(tmp_path: Path) -> None:
    data = sampled(tmp_path / "mix", max_new_tokens=110)
    cut = sum(row.truncated for _, chains in judged(data)[0] for row in chains)
    assert 0 < cut < 48
    counts = [read_json(learns(data, tmp_path / str(which), truncated=which) / "train.json")["stages"][0] for which in (False, True)]
    assert counts[0]["examples"] < counts[1]["examples"]
    assert all(count["examples"] + count["skipped_chains"] == 48 for count in counts)
    assert counts[0]["skipped_chains"] >= cut


def test_a_truncated_chain_is_not_right_whatever_stood_before_the_cut(tmp_path: Path) -> None:
    """One that gave its answer and ran on into the limit earned as a long right chain does, and the others' brevity was measured against it."""
    data = sampled(tmp_path / "mix")
    with closing(sqlite3.connect(data / "rows.sqlite")) as db, db:
        (key, row), *_ = ((key, json.loads(value)) for key, value in db.execute("SELECT key, value FROM rows") if json.loads(value)["correct"])
        db.execute("UPDATE rows SET value = ? WHERE key = ?", (json.dumps({**row, "finish": "length"}), key))
    (chain,) = [one for _, chains in judged(data)[0] for one in chains if one.truncated and one.chain.text == row["text"]]
    assert not chain.right


def test_a_chain_without_the_box_that_was_asked_for_is_not_right(tmp_path: Path) -> None:
    """One that ended in an unclosed box was read all the same, a token shorter, and twelve rounds made a tenth of the chains such."""
    data = sampled(tmp_path / "mix", prompt="boxed", limit=3)
    ends = (r"\boxed{7}", r"\boxed{7", "The answer is 7.", r"<think>\boxed{7}</think>So it is 7.")
    with closing(sqlite3.connect(data / "rows.sqlite")) as db, db:
        found = [(key, json.loads(value)) for key, value in db.execute("SELECT key, value FROM rows ORDER BY key")][:4]
        for (key, row), end in zip(found, ends, strict=True):
            db.execute("UPDATE rows SET value = ? WHERE key = ?", (json.dumps({**row, "text": end, "correct": True, "finish": "stop"}), key))
    right = {one.chain.text: one.right for _, chains in judged(data)[0] for one in chains}
    assert [right[end] for end in ends] == [True, False, False, False]
    made = read_json(data / "run.json")
    write_json(data / "run.json", {**made, "settings": {**made["settings"], "prompt": "plain"}})
    right = {one.chain.text: one.right for _, chains in judged(data)[0] for one in chains}
    assert all(right[end] for end in ends), "nobody asked for a box"


def test_a_model_that_leaves_out_every_box_is_told_how_to_ask(tmp_path: Path) -> None:
    """All its chains were wrong, and it was told to sample several at each alpha but 0."""
    data = sampled(tmp_path / "mix", prompt="boxed", limit=3)
    with closing(sqlite3.connect(data / "rows.sqlite")) as db, db:
        found = [(key, json.loads(value)) for key, value in db.execute("SELECT key, value FROM rows")]
        for key, row in found:
            db.execute("UPDATE rows SET value = ? WHERE key = ?", (json.dumps({**row, "text": "The answer is 7.", "correct": key == found[0][0], "finish": "stop"}), key))
    with pytest.raises(DataError, match=r"all 1 right answers stand outside of the box that the prompt 'boxed' asks for, and count as wrong; ask with --prompt plain"):
        judged(data)


def test_chains_that_are_no_sample_of_the_direction_are_refused(tmp_path: Path) -> None:
    data = sampled(tmp_path / "mix")
    with pytest.raises(SettingError, match=r"chains of another direction \(tiny-valve\) than the one that learns \(a new one\)"):
        learns(data, tmp_path / "a", direction="")
    with pytest.raises(SettingError, match="give --prompt plain"):
        learns(data, tmp_path / "b", prompt="boxed")
    with pytest.raises(SettingError, match="chains of another model"):
        learns(data, tmp_path / "b", model="tiny", direction="")
    with pytest.raises(SettingError, match="asked with the chat template None, training would ask with plain"):
        learns(data, tmp_path / "b", chat_template="plain")
    record = read_json(data / "run.json")
    write_json(data / "run.json", {**record, "settings": {**record["settings"], "temperature": 0.7}})
    with pytest.raises(SettingError, match="reward needs both at 1"):
        learns(data, tmp_path / "c")
    write_json(data / "run.json", {**record, "settings": {**record["settings"], "seed": 5}})
    with pytest.raises(DataError, match="is not among the questions of arithmetic now"):
        learns(data, tmp_path / "c")
    (data / "mix.json").unlink()
    with pytest.raises(DataError, match="not a finished run folder of `cotvalve mix`"):
        learns(data, tmp_path / "d")


def test_a_right_chain_is_never_worth_less_than_a_wrong_one() -> None:
    with pytest.raises(SettingError, match="brevity has to be between 0 and 1"):
        TrainSettings(recipe="reward", brevity=1.5)
    with pytest.raises(SettingError, match=r"trust.*greater than or equal to 0"):
        TrainSettings(recipe="reward", trust=-0.1)


def test_the_plain_model_s_own_chains_are_a_new_direction_s(tmp_path: Path) -> None:
    """Delta is zero at first, so what the plain model says is what alpha 1 says."""
    data = sampled(tmp_path / "mix", direction="", limit=6, max_new_tokens=200)
    groups, _ = judged(data)
    assert {row.chain.alpha for _, chains in groups for row in chains} == {1.0}
    out = learns(data, tmp_path / "reward", direction="", rank=2)
    assert read_json(out / "train.json")["stages"][0]["examples"] > 0


# Rounds


ROUNDS = {"model": "tiny-reasoner", "direction": "tiny-valve", "data": "arithmetic", "prompt": "plain", "limit": 4, "alphas": (0.75, 1.0), "samples": 4,
          "max_new_tokens": 200, "rounds": 2, "learning_rate": 1e-3, "dtype": "float32", "device": "cpu"}  # fmt: skip


def rounds_in(out: Path) -> RewardSettings:
    return RewardSettings(**ROUNDS, out=str(out))  # pyright: ignore[reportArgumentType]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Two rounds, and the tasks that they told of."""
    out, told = tmp_path_factory.mktemp("rounds") / "reward", list[str]()
    assert rounds.run(rounds_in(out), lambda task, *_: told.append(task)) == out / "rounds.md"
    return out, told


def test_a_round_samples_what_the_round_before_learned_on_other_questions(whole: tuple[Path, list[str]]) -> None:
    out, told = whole
    settings, table = rounds_in(out), out / "rounds.md"
    assert {"round 1 of 2: sample", "round 1 of 2: reward", "round 2 of 2: sample", "round 2 of 2: reward"} <= set(told)
    first, second = (judged(out / f"round-{number}" / "mix") for number in (1, 2))
    assert first[1]["settings"]["direction"] == "tiny-valve"
    assert second[1]["settings"]["direction"] == str(out / "round-1" / "direction")
    asked = [{problem.id for problem, _ in groups} for groups, _ in (first, second)]
    assert [len(ids) for ids in asked] == [4, 4]
    assert not asked[0] & asked[1]
    assert second[1]["facts"]["direction_sha256"] != first[1]["facts"]["direction_sha256"]
    last = Direction.load(out)
    assert last.sha256() == Direction.load(out / "round-2" / "direction").sha256()
    assert last.card.method == "reward"
    report = read_json(out / "train.json")
    assert [stage["stage"] for stage in report["stages"]] == ["reward", "reward"]
    assert read_json(out / "run.json")["facts"]["base_sha256"]
    lines = table.read_text(encoding="utf-8").splitlines()
    assert [line.split(" | ")[:2] for line in lines[4:]] == [["| 1", "0.75"], ["| 1", "1"], ["| 2", "0.75"], ["| 2", "1"]]
    right = [one.right for _, chains in second[0] for one in chains if one.chain.alpha == 1]
    tokens = [one.chain.tokens for _, chains in second[0] for one in chains if one.chain.alpha == 1 and one.right]
    assert lines[-1] == f"| 2 | 1 | {100 * sum(right) / len(right):.1f} | {sum(tokens) / len(tokens):.1f} |"
    told = list[str]()
    before = {path: path.stat().st_mtime_ns for path in out.glob("round-*/*/*.json")}
    rounds.run(settings, lambda task, *_: told.append(task))
    assert not told, "nothing was left to do"
    assert {path: path.stat().st_mtime_ns for path in out.glob("round-*/*/*.json")} == before
    with pytest.raises(DataError, match=r"holds a run with brevity=0\.5, this one has 0\.3"):
        rounds.run(RewardSettings(**{**ROUNDS, "brevity": 0.3}, out=str(out)))  # pyright: ignore[reportArgumentType]


def test_rounds_that_go_on_from_others_ask_what_those_have_not_asked(tmp_path: Path) -> None:
    settings = rounds_in(tmp_path)
    later = settings.model_copy(update={"offset": settings.rounds * (settings.limit or 0)})
    asked = [sample.offset for one in (settings, later) for sample, _ in rounds.parts(one)]
    assert asked == [0, 4, 8, 12]


def test_rounds_that_were_stopped_go_on_to_the_same_direction(whole: tuple[Path, list[str]], tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(task: str, done: int, _total: int, _note: str = "") -> None:
        if task == "round 2 of 2: sample" and done >= 8:
            raise Stopped

    part = rounds_in(tmp_path / "part")
    with pytest.raises(Stopped):
        rounds.run(part, stop)
    assert not (tmp_path / "part" / "round-2" / "mix" / "mix.json").exists()
    rounds.run(part)
    homes = whole[0], tmp_path / "part"
    texts = [[(one.chain.text, one.right) for _, chains in judged(home / "round-2" / "mix")[0] for one in chains] for home in homes]
    assert texts[0] == texts[1]
    assert len({Direction.load(home).sha256() for home in homes}) == 1


def test_the_model_of_the_part_before_is_gone_when_the_next_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round loads its model twice; up to two earlier ones lay in a GPU's memory beside it, until the collector happened to come by."""
    settings = MixSettings(model="tiny-reasoner", dtype="float32", device="cpu")
    load, alive = Valve.load, list[bool]()

    def loads(*args: object, **named: object) -> Valve:
        alive.append(any(weight() is not None for weight in weights))
        return load(*args, **named)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Valve, "load", loads)
    weights: list[weakref.ref[Tensor]] = []
    gc.disable()
    try:
        for _ in range(2):
            dial = settings.load_valve("tiny-valve").dial
            assert dial is not None
            weights += [weakref.ref(layer.base_layer.weight) for layer in dial.layers.values()]
            del dial
    finally:
        gc.enable()
    assert alive == [False, False]


def test_what_a_round_would_refuse_is_refused_before_the_first() -> None:
    for wrong, said in (({"temperature": 0.7}, "have to be 1"), ({"rounds": 0}, "rounds has to be 1 or more"), ({"brevity": 2}, "between 0 and 1"), ({"rank": 0}, "rank.*greater than or equal to 1"), ({"dropout": 0.1}, "without dropout"), ({"prompt": "budget", "budget": 50}, "asks for a token budget"), ({"seed": -1}, "seed"), ({"warmup": -1}, "warmup"), ({"full": True}, "learns a plain LoRA"),
                        ({"samples": 1}, "needs 2 samples or more"), ({"offset": -1}, "offset has to be 0 or more"), ({"offset": 5, "limit": None}, "give its size as limit"), ({"alphas": (0.0,)}, "a position other than 0")):  # fmt: skip
        with pytest.raises(SettingError, match=said):
            RewardSettings(**wrong)  # pyright: ignore[reportArgumentType]
