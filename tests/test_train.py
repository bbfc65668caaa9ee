"""Learning at a valve position: the loss, what beta does to it, batches, stages, and a training run that is killed."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    TrainerState,
)

from cotvalve import Valve
from cotvalve.batches import IGNORED, collate, encode, pack
from cotvalve.direction import Card, Direction
from cotvalve.errors import DataError, DirectionMismatch, EngineError, SettingError
from cotvalve.fitting import FitSettings, target_modules
from cotvalve.learner import Learner, SkipBadSteps, _Order, save_learned  # pyright: ignore[reportPrivateUsage]
from cotvalve.prompts import prompt, render
from cotvalve.recipes import Example, Stage, beta, plus, progressive
from cotvalve.recipes import valve as short
from cotvalve.records import Json, read_json
from cotvalve.taskvector import TaskVector
from cotvalve.train import TrainSettings, fit, run
from cotvalve.types import Chain, MixChain, Problem
from tests import models

CARD = Card("base", "shorter", "valve")
TEXTS = ("2", "one, two", "it is 7 because 3 + 4", "no", "then 5 - 2 = 3 and 3 * 3 = 9", "ok, 12", "a b c d e", "42!")
END = 258
"""The id of <|im_end|>."""
QUICK = {"rank": 2, "learning_rate": 1e-2, "schedule": "constant", "warmup": 0, "batch": 2, "checkpoint_every": 1000}


def examples(texts: Sequence[str] = TEXTS, alpha: float | Sequence[float] = 1.0, question: str = "q{}?") -> tuple[Example, ...]:
    alphas = [alpha] * len(texts) if isinstance(alpha, float) else alpha
    return tuple(
        Example(Problem(f"p{i}", question.format(i), "1"), Chain(text, len(text) + 1), a)
        for i, (text, a) in enumerate(zip(texts, alphas, strict=True))
    )


def stage(*args: object, name: str = "s", **how: object) -> Stage:
    return Stage(name, examples(*args, **how))  # pyright: ignore[reportArgumentType]


def rows(of: Stage) -> list[Json]:
    return encode(of, models.tokenizer(), "plain", 4096)[0]


def settings(**changed: object) -> FitSettings:
    return FitSettings(**{**QUICK, **changed})


def fresh(how: FitSettings, dtype: torch.dtype = torch.float32) -> Valve:
    """A valve ready to learn; PEFT draws A from the global generator."""
    base = models.llama(dtype=dtype)
    if how.full:
        return Valve(base, models.tokenizer())
    torch.manual_seed(0)
    return Valve.fresh(base, models.tokenizer(), how.lora(base))


def trained(folder: Path, *stages: Stage, on: Valve | None = None, progress: object = None, **changed: object) -> tuple[Valve, Json]:
    how = settings(**changed)
    valve = on or fresh(how)
    extra = {} if progress is None else {"progress": progress}
    return valve, fit(valve, stages or [stage()], how, folder, CARD, ask="plain", **extra)  # pyright: ignore[reportArgumentType]


def learned(valve: Valve) -> dict[str, Tensor]:
    names = [name for name in valve.model.state_dict() if ".lora_" in name] or list(valve.model.state_dict())
    return {name: valve.model.state_dict()[name].clone() for name in names}


def assert_same_bits(a: Valve, b: Valve) -> None:
    mine, theirs = learned(a), learned(b)
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def distance(a: Valve, b: Valve) -> float:
    return max(float((x.float() - y.float()).abs().max()) for x, y in zip(learned(a).values(), learned(b).values(), strict=True))


def turned() -> Valve:
    """A valve whose LoRA is not zero, with gradients switched on for it."""
    wrapped = models.lora(models.llama(), by=0.1)
    factors = {name.replace(".default", ""): weight for name, weight in wrapped.named_parameters() if "lora_" in name}
    valve = Valve(models.llama(), models.tokenizer(), Direction.from_peft(wrapped.peft_config["default"], factors, CARD))
    for name, parameter in valve.model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    return valve


def loss_and_gradients(valve: Valve, batch: dict[str, Tensor], alpha: float | Tensor | None = None) -> tuple[float, dict[str, Tensor]]:
    """Summed loss of a batch at its own alphas (or at `alpha`), and the gradient of each factor."""
    valve.model.zero_grad()
    batch = dict(batch)
    own = batch.pop("alpha")
    with valve.at(own if alpha is None else alpha):
        loss = Learner(valve)(**batch, divisor=1.0)
        loss.backward()
    return float(loss), {n: p.grad.clone() for n, p in valve.model.named_parameters() if p.grad is not None}


def assert_same_gradients(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Equal up to fp32 sums in another order: 1e-5 of the largest entry of each gradient."""
    assert a.keys() == b.keys()
    assert len(a) == 28  # A and B of 7 layers in 2 blocks
    for name, gradient in a.items():
        torch.testing.assert_close(gradient, b[name], rtol=0, atol=1e-5 * float(b[name].abs().max()) + 1e-9)
        assert float(b[name].abs().max()) > 0


# The loss, token by token


def test_labels_are_the_chain_and_its_end_and_nothing_of_the_prompt() -> None:
    (row,) = rows(Stage("s", (Example(Problem("0", "2+2?", "4"), Chain("= 4", 4), 0.5),)))
    asked = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert render(models.tokenizer(), "2+2?", prompt("plain")) == asked
    encoded = models.tokenizer()(asked, add_special_tokens=False)["input_ids"]
    chain = models.tokenizer()("= 4", add_special_tokens=False)["input_ids"]
    assert len(chain) == 3
    assert row["input_ids"] == [*encoded, *chain, END]
    assert row["labels"] == [IGNORED] * len(encoded) + [*chain, END]
    assert row["alpha"] == 0.5


def test_a_question_is_rendered_once_and_all_texts_are_encoded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """One by one, 12,800 chains of 800 questions took 5 s of a round, in which the GPU stood still."""

    class Counted:
        def __init__(self) -> None:
            self.calls, self.own = 0, models.tokenizer()

        def __call__(self, texts: list[str], **how: object) -> object:
            self.calls += 1
            return self.own(texts, **how)  # pyright: ignore[reportArgumentType]

        def __getattr__(self, name: str) -> object:
            return getattr(self.own, name)

    asked: list[str] = []
    monkeypatch.setattr("cotvalve.batches.render", lambda tokenizer, question, how: asked.append(question) or render(tokenizer, question, how))
    tokenizer, many = Counted(), stage(alpha=[0.1 * i for i in range(8)], question="q?")
    found, too_long = encode(many, tokenizer, "plain", 45)  # pyright: ignore[reportArgumentType]
    assert asked == ["q?"]
    assert tokenizer.calls == 2
    apart = [encode(Stage("s", (example,)), models.tokenizer(), "plain", 4096)[0][0] for example in many.examples]
    assert found == [row for row in apart if len(row["input_ids"]) <= 45]
    assert too_long == len(apart) - len(found) == 1


def test_the_loss_is_the_chain_s_own_cross_entropy() -> None:
    """Token k of the chain is predicted at the position before it; counted by hand from the logits."""
    valve, encoded = turned(), rows(stage(alpha=[0.0, 0.3, 1.0, 0.7, 1.0, 2.0, 0.5, -1.0]))
    by_hand, tokens = 0.0, 0
    for row in encoded:
        with valve.at(row["alpha"]) as model, torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
        first = row["labels"].index(next(label for label in row["labels"] if label != IGNORED))
        for place in range(first, len(row["input_ids"])):
            by_hand -= float(torch.log_softmax(logits[place - 1], -1)[row["input_ids"][place]])
            tokens += 1
    assert tokens == sum(len(text) + 1 for text in TEXTS)
    batch = collate(encoded)
    assert int((batch["labels"][:, 1:] != IGNORED).sum()) == tokens
    loss, _ = loss_and_gradients(valve, batch)
    assert math.isclose(loss, by_hand, rel_tol=1e-5)


def test_the_prompt_s_tokens_do_not_teach() -> None:
    """Another label on a prompt position changes nothing; on a chain position it does."""
    valve, batch = turned(), collate(rows(stage(TEXTS[:2])))
    loss, _ = loss_and_gradients(valve, batch)
    in_prompt = {**batch, "input_ids": batch["input_ids"].clone()}
    position = int((batch["labels"][0] != IGNORED).nonzero()[0])
    changed = {**batch, "labels": batch["labels"].clone()}
    changed["labels"][0, position] = 65
    assert loss_and_gradients(valve, changed)[0] != loss
    in_prompt["labels"] = batch["labels"].clone()
    in_prompt["labels"][:, 0] = 65  # nothing predicts the first token
    assert loss_and_gradients(valve, in_prompt)[0] == loss


@pytest.mark.parametrize("field", ["logits_scaling", "logit_scale", "final_logit_softcapping", "logits_soft_cap", "lm_head_multiplier", "logits_mup_width_multiplier"])
def test_heads_that_scale_their_logits_take_the_model_s_own(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    valve, batch = turned(), collate(rows(stage(TEXTS[:3])))
    sliced = loss_and_gradients(valve, batch)
    monkeypatch.setattr(valve.model.config, field, 2.0, raising=False)
    assert not Learner(valve).plain_head
    whole = loss_and_gradients(valve, batch)  # this Llama ignores the field, so that both ways have to agree
    assert math.isclose(sliced[0], whole[0], rel_tol=1e-6)
    assert_same_gradients(sliced[1], whole[1])


def test_a_model_that_sees_images_too_and_caps_its_logits_learns_from_capped_ones() -> None:
    """Gemma 3n and 4 keep the cap in the text model's config: it was not seen there, and the loss was another model's."""
    text = Gemma4TextConfig(
        vocab_size=models.VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        global_head_dim=8, hidden_size_per_layer_input=0, num_kv_shared_layers=0, layer_types=["full_attention"], final_logit_softcapping=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma4ForConditionalGeneration(Gemma4Config(text_config=text, vision_config=None, audio_config=None)).eval()
    batch = collate(rows(stage(TEXTS[:3])))
    batch.pop("alpha")
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")
        assert float(Learner(Valve(model, models.tokenizer()))(**batch, divisor=1.0)) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("learned_head", [False, True])
def test_an_output_layer_s_bias_is_part_of_the_loss(learned_head: bool) -> None:
    """Phi's has one."""
    valve, batch = turned(), collate(rows(stage(TEXTS[:3])))
    head = valve.model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.randn(models.VOCABULARY, generator=torch.Generator().manual_seed(0)), requires_grad=False)
    head.weight.requires_grad_(learned_head)
    alpha = batch.pop("alpha")
    with valve.at(alpha) as model, torch.no_grad():
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")
        assert float(Learner(valve)(**batch, divisor=1.0)) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("head", ["frozen", "learned", "scaled"])
def test_the_loss_is_divided_by_the_tokens_of_the_step(monkeypatch: pytest.MonkeyPatch, head: str) -> None:
    """Each way of the output layer: what is clipped, told and added up over portions is a mean, not a sum."""
    valve, batch = turned(), collate(rows(stage(TEXTS[:3])))
    if head == "scaled":
        monkeypatch.setattr(valve.model.config, "logits_scaling", 2.0, raising=False)
    valve.model.get_output_embeddings().weight.requires_grad_(head == "learned")
    alpha = batch.pop("alpha")
    with valve.at(alpha), torch.no_grad():
        whole, part = (float(Learner(valve)(**batch, divisor=divisor)) for divisor in (1.0, 16.0))
    assert whole == pytest.approx(16 * part)


def test_the_order_of_an_epoch_is_that_of_its_number_and_the_seed() -> None:
    """The epoch stood above the 32 bits of a seed that are read: every epoch had the order of the first."""
    found: dict[tuple[str, int, int], list[int]] = {}
    for kind, weight in (("like lengths", {}), ("weighted", {"weight": 1.0})):
        lengths = [{"input_ids": [0] * (1 + i % 7), **weight} for i in range(64)]
        for seed, step in ((0, 0), (0, 3), (0, 4), (1, 0)):
            trainer = SimpleNamespace(train_dataset=lengths, args=SimpleNamespace(train_batch_size=16, seed=seed), state=SimpleNamespace(global_step=step))
            found[kind, seed, step] = list(_Order(trainer))  # pyright: ignore[reportArgumentType]
    for kind in ("like lengths", "weighted"):
        assert found[kind, 0, 0] == found[kind, 0, 3], "a run that goes on within the epoch"
        assert len({tuple(found[kind, seed, step]) for seed, step in ((0, 0), (0, 4), (1, 0))}) == 3


def test_logits_in_slices_are_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    valve, batch = turned(), collate(rows(stage()))
    whole = loss_and_gradients(valve, batch)
    monkeypatch.setattr("cotvalve.headloss.LOSS_SLICE", 7)
    sliced = loss_and_gradients(valve, batch)
    assert math.isclose(sliced[0], whole[0], rel_tol=1e-6)
    assert_same_gradients(sliced[1], whole[1])


# What beta does


def test_beta_changes_the_loss_of_the_same_example() -> None:
    """A public port stored beta and never used it."""
    valve, batch = turned(), collate(rows(stage(TEXTS[:1])))
    seen = {a: loss_and_gradients(valve, batch, a) for a in (0.0, 0.3, 0.9, 1.0)}
    assert len({round(loss, 4) for loss, _ in seen.values()}) == 4
    assert all(bool((g == 0).all()) for g in seen[0.0][1].values()), "no gradient reaches the direction at alpha 0"
    assert all(bool((g != 0).any()) for g in seen[0.3][1].values())


def test_a_batch_of_mixed_betas_is_its_rows_apart() -> None:
    """The reference turns the dial by PEFT's own scale, one row at a time."""
    alphas = [0.0, 0.25, 0.6, 1.0, 1.5, 0.4, 0.9, -0.3]
    encoded = rows(stage(alpha=alphas))
    loss, gradients = loss_and_gradients(turned(), collate(encoded))
    wrapped = models.lora(models.llama(), by=0.1)
    apart, summed = 0.0, {}
    for row in encoded:
        for layer in wrapped.modules():
            if isinstance(layer, LoraLayer):
                layer.set_scale("default", row["alpha"])
        wrapped.zero_grad()
        logits = wrapped(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        one = torch.nn.functional.cross_entropy(logits, torch.tensor(row["labels"][1:]), ignore_index=IGNORED, reduction="sum")
        one.backward()
        apart += float(one)
        for name, parameter in wrapped.named_parameters():
            if parameter.grad is not None:
                key = name.removeprefix("base_model.model.")
                summed[key] = summed.get(key, 0) + parameter.grad
    assert math.isclose(loss, apart, rel_tol=1e-6)
    assert_same_gradients(gradients, summed)


@pytest.mark.parametrize("length", [80, 200, 4096])
def test_packed_rows_are_the_rows(length: int) -> None:
    """One alpha per token, positions that restart, no token of one chain seen by the next."""
    valve, encoded = turned(), rows(stage(alpha=[0.0, 0.25, 0.6, 1.0, 1.5, 0.4, 0.9, -0.3]))
    packed = pack(encoded, length)
    assert len(packed) == {80: 4, 200: 2, 4096: 1}[length]
    assert all(len(row["input_ids"]) <= length for row in packed)
    assert sum(len(row["input_ids"]) for row in packed) == sum(len(row["input_ids"]) for row in encoded)
    batch = collate(packed)
    assert batch["alpha"].shape == batch["input_ids"].shape == batch["position_ids"].shape
    one, other = loss_and_gradients(valve, collate(encoded)), loss_and_gradients(valve, batch)
    assert math.isclose(one[0], other[0], rel_tol=1e-6)
    assert_same_gradients(one[1], other[1])


def test_padding_and_the_company_of_other_rows_do_not_change_the_loss() -> None:
    valve, encoded = turned(), rows(stage(alpha=[0.5, 0.25, 0.6, 1.0, 1.5, 0.4, 0.9, 0.3]))
    together = loss_and_gradients(valve, collate(encoded))
    apart = [loss_and_gradients(valve, collate([row])) for row in encoded]
    assert math.isclose(together[0], sum(loss for loss, _ in apart), rel_tol=1e-6)
    assert_same_gradients(together[1], {n: sum(g[n] for _, g in apart) for n in together[1]})  # pyright: ignore[reportArgumentType]


def test_gradients_of_a_large_step_survive_16_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp16 a loss over 30,000 tokens lost a sixth of its gradient; here each token counts as if it were one of a million."""
    seen = models.gradients_of_steps(monkeypatch)
    few = Stage("s", tuple(replace(example, weight=1e-4) for example in examples()))
    for dtype in (torch.float32, torch.float16):
        valve = turned()
        valve.model.to(dtype)
        trained(tmp_path / str(dtype), few, on=valve, batch=8, clip=0, trust=0)
    exact, half = seen
    wrong, whole = (sum(float((g - other[name]).pow(2).sum()) for name, g in exact.items()) for other in (half, dict.fromkeys(exact, torch.zeros(()))))
    assert math.sqrt(wrong / whole) < 0.02


def test_training_at_another_beta_learns_another_direction(tmp_path: Path) -> None:
    low, _ = trained(tmp_path / "low", stage(alpha=0.3))
    high, _ = trained(tmp_path / "high", stage(alpha=0.9))
    again, _ = trained(tmp_path / "again", stage(alpha=0.3))
    assert distance(low, high) > 1e-3
    assert_same_bits(low, again)


@pytest.mark.parametrize(
    "changed",
    [
        {"learning_rate": 5e-3}, {"schedule": "linear"}, {"warmup": 0.5}, {"weight_decay": 0.5}, {"clip": 1e-4}, {"epochs": 1.5}, {"seed": 1},
        {"lora_alpha": 8}, {"rslora": True}, {"dropout": 0.5}, {"modules": "mlp"},
    ],
    ids=lambda changed: next(iter(changed)),
)  # fmt: skip
def test_what_is_set_reaches_what_learns(tmp_path: Path, changed: dict[str, object]) -> None:
    usual, _ = trained(tmp_path / "usual")
    other, _ = trained(tmp_path / "other", **changed)
    mine, theirs = learned(usual), learned(other)
    assert [name for name in mine.keys() & theirs.keys() if not torch.equal(mine[name], theirs[name])]


def test_half_an_epoch_is_half_of_its_steps(tmp_path: Path) -> None:
    assert trained(tmp_path, epochs=1.5)[1]["stages"][0]["steps"] == 6


@pytest.mark.parametrize("kind", ["full", "dora"])
def test_what_is_no_lora_does_not_go_on_from_one(kind: str) -> None:
    with pytest.raises(SettingError, match="full and dora start from the model itself; leave direction out"):
        TrainSettings(direction="d", **{kind: True})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        # Steps 0, 4, 9, 14 and 19: four of 20 to rise in, and sixteen to fall.
        ("linear", 0.2, [0, 1, 11 / 16, 6 / 16, 1 / 16]),
        ("cosine", 0.2, [0, *((1 + math.cos(math.pi * step / 16)) / 2 for step in (0, 5, 10, 15))]),
        ("constant", 0.4, [0, 4 / 8, 1, 1, 1]),
        ("constant", 0.0, [1, 1, 1, 1, 1]),
    ],
)
def test_the_learning_rate_rises_and_falls_as_it_is_set(tmp_path: Path, schedule: str, warmup: float, expected: list[float]) -> None:
    """A constant one did not rise, whatever the warm-up."""
    trained(tmp_path, batch=2, epochs=5, schedule=schedule, warmup=warmup, learning_rate=1e-2)
    told = read_json(tmp_path / "stage-0" / "checkpoint-20" / "trainer_state.json")["log_history"]
    assert [100 * log["learning_rate"] for log in told if "loss" in log] == pytest.approx(expected)


def test_alphas_other_than_1_need_a_dial(tmp_path: Path) -> None:
    for changed in ({"full": True}, {"dora": True}):
        with pytest.raises(SettingError, match="other alphas than 1 need a LoRA direction"):
            trained(tmp_path, stage(alpha=[1.0] * 7 + [0.5]), **changed)
    assert not list(tmp_path.iterdir())


# How batches are made does not change what is learned


@pytest.mark.parametrize(
    "changed",
    [{"micro_batch": 1}, {"micro_batch": 2}, {"gradient_checkpointing": True}, {"micro_batch": 3}],
    ids=lambda changed: "-".join(f"{k}={v}" for k, v in changed.items()),
)
def test_the_same_step_in_other_portions(tmp_path: Path, changed: dict[str, object]) -> None:
    """Rows of 1 to 29 tokens: averaging over each portion instead of over all its tokens would weigh them otherwise."""
    how = {"batch": 4, "epochs": 2}
    whole, report = trained(tmp_path / "whole", stage(alpha=[0.5, 1.0] * 4), micro_batch=4, **how)
    portions, other = trained(tmp_path / "portions", stage(alpha=[0.5, 1.0] * 4), **{**how, **changed})
    assert report["stages"][0]["steps"] == other["stages"][0]["steps"] == 4
    # Four Adam steps of 1e-2 move a weight by up to 0.04; where a gradient is near 0, rounding decides its direction.
    moved = distance(whole, fresh(settings()))
    assert moved > 0.02
    close = [
        float(((a - b).abs() < 1e-4).float().mean())
        for a, b in zip(learned(whole).values(), learned(portions).values(), strict=True)
    ]
    assert min(close) > 0.98
    assert math.isclose(report["stages"][0]["last_loss"] or 0, other["stages"][0]["last_loss"] or 0, rel_tol=1e-3)


def test_the_step_is_the_mean_over_its_tokens(tmp_path: Path) -> None:
    """One SGD-like look at the first step: the gradient that Adam sees is the batch's, over its tokens."""
    how = settings(batch=8, micro_batch=2, weight_decay=0.0, clip=0.0)
    valve = fresh(how)
    seen: dict[str, Tensor] = {}
    for name, parameter in valve.model.named_parameters():
        if ".lora_B" in name:
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.__setitem__(name, p.grad.clone()))
    fit(valve, [stage(alpha=[0.25, 0.5, 0.75, 1.0] * 2)], how, tmp_path, CARD, ask="plain")
    other = fresh(how)
    for name, parameter in other.model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    batch = collate(rows(stage(alpha=[0.25, 0.5, 0.75, 1.0] * 2)))
    _, expected = loss_and_gradients(other, batch)
    tokens = int((batch["labels"] != IGNORED).sum())
    assert len(seen) == 14
    for name, gradient in seen.items():
        torch.testing.assert_close(gradient, expected[name] / tokens, rtol=0, atol=1e-5 * float(gradient.abs().max()))


def test_packing_learns_from_every_token_once(tmp_path: Path) -> None:
    apart, one = trained(tmp_path / "apart", batch=8)
    packed, other = trained(tmp_path / "packed", batch=8, packing=True, max_length=512)
    assert one["stages"][0] == {**other["stages"][0], "last_loss": one["stages"][0]["last_loss"]}
    assert one["stages"][0]["learned_tokens"] == sum(len(text) + 1 for text in TEXTS)
    close = [float(((a - b).abs() < 1e-4).float().mean()) for a, b in zip(learned(apart).values(), learned(packed).values(), strict=True)]
    assert min(close) > 0.98


def test_too_long_examples_are_counted_and_never_cut(tmp_path: Path) -> None:
    longest = max(len(row["input_ids"]) for row in rows(stage()))
    _, report = trained(tmp_path / "some", max_length=longest - 1)
    assert (report["stages"][0]["too_long"], report["stages"][0]["examples"]) == (1, 7)
    _, report = trained(tmp_path / "all", max_length=longest)
    assert (report["stages"][0]["too_long"], report["stages"][0]["examples"]) == (0, 8)
    with pytest.raises(DataError, match="0 of 8 examples fit 10 tokens"):
        trained(tmp_path / "none", max_length=10)


def test_a_run_of_one_step_learns(tmp_path: Path) -> None:
    """The first step of a warm-up has a learning rate of 0, and this run has no other."""
    valve, report = trained(tmp_path, batch=64, epochs=1, warmup=0.03)
    assert report["stages"][0]["steps"] == 1
    assert all(float(weight.abs().max()) > 0 for name, weight in learned(valve).items() if ".lora_B" in name)


@pytest.mark.parametrize(("count", "at"), [(1, [1]), (4, [1, 4]), (7, [1, 5, 7])])
def test_the_first_and_the_last_loss_are_told(tmp_path: Path, count: int, at: list[int]) -> None:
    """A run of one to four steps had no loss at all, and one of seven told that of the first five as its last."""
    notes: list[str] = []
    _, report = trained(
        tmp_path, stage(TEXTS[:count]), batch=1, epochs=1,
        progress=lambda _task, done, total, note="": notes.append(f"{done}/{total} {note}"),
    )  # fmt: skip
    told = read_json(tmp_path / "stage-0" / "loss.json")
    assert [each["step"] for each in told] == at
    assert report["stages"][0]["last_loss"] == told[-1]["loss"] > 0
    assert notes[-1] == f"{count}/{count} loss {told[-1]['loss']:.3f}"


# Steps that go wrong


@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_a_step_whose_gradient_is_not_finite_is_skipped_and_reported(tmp_path: Path, clip: float) -> None:
    """One question holds a character whose embedding is infinite: its example alone has no finite loss."""
    how = settings(batch=1, epochs=2, clip=clip)
    sick = fresh(how)
    with torch.no_grad():
        sick.model.get_input_embeddings().weight[models.tokenizer()("~")["input_ids"][0]] = float("inf")
    start = learned(sick)
    notes: list[str] = []
    bad = Example(Problem("bad", "~", "1"), Chain("7", 2), 1.0)
    report = fit(
        sick, [Stage("s", (*examples(TEXTS[:5]), bad))], how, tmp_path, CARD, ask="plain",
        progress=lambda _task, _done, _total, note="": notes.append(note),
    )["stages"][0]  # fmt: skip
    assert report["steps"] == 12
    assert len(report["steps_skipped"]) == 2, "once in each epoch"
    assert report["steps_skipped"][0] <= 6 < report["steps_skipped"][1] <= 12
    assert any("steps skipped" in note for note in notes)
    assert all(bool(weight.isfinite().all()) for weight in learned(sick).values())
    assert any(not torch.equal(start[name], weight) for name, weight in learned(sick).items()), "the others are learned"
    assert report["last_loss"] is not None
    assert math.isfinite(report["last_loss"])


def test_a_skipped_step_leaves_the_weights_alone(tmp_path: Path) -> None:
    how = settings(batch=1, weight_decay=0.5)
    sick = fresh(how)
    with torch.no_grad():
        sick.model.get_input_embeddings().weight[models.tokenizer()("~")["input_ids"][0]] = float("nan")
    start = learned(sick)
    bad = Example(Problem("bad", "~", "1"), Chain("7", 2), 1.0)
    report = fit(sick, [Stage("s", (bad, bad))], how, tmp_path, CARD, ask="plain")
    assert report["stages"][0]["steps_skipped"] == [1, 2]
    assert all(torch.equal(start[name], weight) for name, weight in learned(sick).items())


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_gradient_with_infinity_in_it_is_as_bad_as_one_that_is_no_number(bad: float) -> None:
    """Adam remembers its square: a weight that was stepped by infinity once never moves again."""
    layer = torch.nn.Linear(2, 2)
    skip, state = SkipBadSteps("s", lambda *_: None), TrainerState()
    skip.trainer = SimpleNamespace(model=layer)  # pyright: ignore[reportAttributeAccessIssue]
    for number, skipped in ((1.0, []), (bad, [1])):
        layer(torch.ones(1, 2)).sum().backward()
        layer.bias.grad = torch.tensor([0.0, number])
        skip.on_pre_optimizer_step(None, state, None)  # pyright: ignore[reportArgumentType]
        assert skip.skipped == [log["step"] for log in state.log_history] == skipped
        assert [parameter.grad is None for parameter in layer.parameters()] == [bool(skipped)] * 2


def test_skipped_steps_are_still_known_where_a_run_goes_on(tmp_path: Path) -> None:
    how = settings(batch=1, epochs=4, checkpoint_every=1)

    def go(progress: Callable[..., None]) -> Json:
        sick = fresh(how)
        with torch.no_grad():
            sick.model.get_input_embeddings().weight[models.tokenizer()("~")["input_ids"][0]] = float("inf")
        bad = Example(Problem("bad", "~", "1"), Chain("7", 2), 1.0)
        return fit(sick, [Stage("s", (*examples(TEXTS[:2]), bad))], how, tmp_path, CARD, ask="plain", progress=progress)["stages"][0]

    with pytest.raises(KeyboardInterrupt):
        go(stop_after(10))
    found = go(lambda *_: None)["steps_skipped"]
    assert len(found) == 4, "once in each epoch"
    assert found[0] <= 3


# Memory that does not suffice


def narrow(monkeypatch: pytest.MonkeyPatch, room: int) -> list[int]:
    """A GPU that holds `room` tokens, padding counted; every second failure comes in the backward pass."""
    seen: list[int] = []
    forward = Learner.forward

    def held(self: Learner, input_ids: Tensor, **batch: object) -> Tensor:
        seen.append(input_ids.numel())
        if input_ids.numel() <= room:
            return forward(self, input_ids, **batch)  # pyright: ignore[reportArgumentType]
        if len(seen) % 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        loss = forward(self, input_ids, **batch)  # pyright: ignore[reportArgumentType]
        first = self.model.get_input_embeddings()

        def burst(_gradient: Tensor) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        assert first is not None
        next(p for n, p in self.model.named_parameters() if "layers.0" in n and "q_proj.lora_B" in n).register_hook(burst)
        return loss

    monkeypatch.setattr(Learner, "forward", held)
    return seen


def test_out_of_memory_takes_smaller_portions_of_the_same_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how: dict[str, object] = {"batch": 8, "epochs": 5, "learning_rate": 1e-3}
    whole, report = trained(tmp_path / "whole", stage(alpha=[0.5, 1.0] * 4), **how)
    longest = max(len(row["input_ids"]) for row in rows(stage()))
    narrow(monkeypatch, 3 * longest)
    notes: list[str] = []
    less, other = trained(
        tmp_path / "less", stage(alpha=[0.5, 1.0] * 4), progress=lambda _task, _done, _total, note="": notes.append(note), **how
    )
    said = [note for note in notes if "out of memory" in note]
    assert len(said) == 2, "from 8 rows to 4, and from 4 to 2 or 3; and not again in the later steps"
    assert "tokens at once" in said[0]
    assert other["stages"][0]["steps"] == report["stages"][0]["steps"] == 5
    assert other["stages"][0]["steps_skipped"] == []
    close = [float(((a - b).abs() < 1e-4).float().mean()) for a, b in zip(learned(whole).values(), learned(less).values(), strict=True)]
    assert min(close) > 0.98
    assert math.isclose(other["stages"][0]["last_loss"], report["stages"][0]["last_loss"], rel_tol=1e-4)


def test_one_row_that_does_not_fit_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow(monkeypatch, 1)
    with pytest.raises(EngineError, match=r"one example of \d+ tokens does not fit.*gradient_checkpointing.*max_length"):
        trained(tmp_path)


# Compiled layers


def test_compiled_layers_learn_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a code generator: what is tested is that layers and dial can be captured whole, and give the same."""
    compile_ = torch.nn.Module.compile
    graphs: list[object] = []

    def counted(graph: object, _inputs: object) -> object:
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compile_(self, backend=counted, fullgraph=True, **how))
    torch._dynamo.reset()
    how: dict[str, object] = {"batch": 4, "epochs": 3, "learning_rate": 1e-3}
    whole, report = trained(tmp_path / "whole", stage(alpha=[0.5, 1.0] * 4), **how)
    compiled, other = trained(tmp_path / "compiled", stage(alpha=[0.5, 1.0] * 4), compile="yes", **how)
    assert 1 <= len(graphs) <= 3, "not one per layer, alpha or batch"
    close = [float(((a - b).abs() < 1e-4).float().mean()) for a, b in zip(learned(whole).values(), learned(compiled).values(), strict=True)]
    assert min(close) > 0.98
    assert math.isclose(other["stages"][0]["last_loss"], report["stages"][0]["last_loss"], rel_tol=1e-4)


def test_layers_that_cannot_be_compiled_run_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = torch.nn.Module.compile

    def broken(_graph: object, _inputs: object) -> object:
        raise OSError("no C compiler found")

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compile_(self, backend=broken, **how))
    torch._dynamo.reset()
    whole, _ = trained(tmp_path / "whole")
    notes: list[str] = []
    other, _ = trained(tmp_path / "other", compile="yes", progress=lambda _task, _done, _total, note="": notes.append(note))
    assert [note for note in notes if "no C compiler found" in note and "going on without" in note]
    assert_same_bits(whole, other)


# Stages


def test_progressive_stages_follow_one_another_on_the_same_weights(tmp_path: Path) -> None:
    long, mid, brief = (stage([text * k for text in TEXTS], name=f"x{k}") for k in (3, 2, 1))
    valve, report = trained(tmp_path / "three", long, mid, brief)
    assert [s["stage"] for s in report["stages"]] == ["x3", "x2", "x1"]
    one_by_one, _ = trained(tmp_path / "1", long)
    one_by_one, _ = trained(tmp_path / "2", mid, on=one_by_one)
    one_by_one, _ = trained(tmp_path / "3", brief, on=one_by_one)
    assert_same_bits(valve, one_by_one)
    reverse, _ = trained(tmp_path / "reverse", brief, mid, long)
    assert distance(valve, reverse) > 1e-3
    last, _ = trained(tmp_path / "last", brief)
    assert distance(valve, last) > 1e-3, "the last stage is warm-started"


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    stages = stage(name="one"), stage(alpha=0.5, name="two")
    valve, report = trained(tmp_path, *stages)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("checkpoint-*/*")}
    assert written
    again, other = trained(tmp_path, *stages)
    assert other == report
    assert_same_bits(valve, again)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("checkpoint-*/*")} == written


def test_what_is_learned_lies_in_the_direction_and_the_base_is_not_touched(tmp_path: Path) -> None:
    valve, _ = trained(tmp_path / "run", stage(alpha=[0.5, 1.0] * 4))
    base = models.llama()
    with valve.at(0.0) as model:
        assert torch.equal(models.logits(model), models.logits(base))
    save_learned(valve, CARD, tmp_path / "direction")
    again = Valve(models.llama(), models.tokenizer(), Direction.load(tmp_path / "direction"))
    assert_same_bits(valve, again)
    for alpha in (0.5, 1.0):
        with valve.at(alpha) as one, again.at(alpha) as other:
            assert torch.equal(models.logits(one), models.logits(other))
    assert not any(p.requires_grad for p in valve.model.parameters())


def test_learning_lowers_the_loss_where_it_was_learned(tmp_path: Path) -> None:
    """At the alpha of the examples, and not at alpha 0."""
    how = {"epochs": 15, "batch": 4, "rank": 8}
    valve, _ = trained(tmp_path, stage(alpha=0.5), **how)

    def loss(alpha: float) -> float:
        batch = collate(rows(stage()))
        batch.pop("alpha")
        with valve.at(alpha), torch.no_grad():
            return float(Learner(valve)(**batch, divisor=(batch["labels"] != IGNORED).sum()))

    start = loss(0.0)
    assert loss(0.5) < 0.5 * start
    assert start == pytest.approx(float(loss(0.0)))


def test_a_bf16_base_learns_in_fp32_and_gives_bf16_back(tmp_path: Path) -> None:
    how = settings(learning_rate=1e-4, epochs=3)
    valve = fresh(how, torch.bfloat16)
    seen: set[torch.dtype] = set()
    for name, parameter in valve.model.named_parameters():
        if ".lora_B" in name:
            parameter.register_hook(lambda gradient: seen.add(gradient.dtype))
    fit(valve, [stage()], how, tmp_path, CARD, ask="plain")
    assert seen == {torch.float32}
    assert {w.dtype for w in valve.model.state_dict().values()} == {torch.bfloat16}
    assert any(float(w.abs().max()) > 0 for name, w in learned(valve).items() if ".lora_B" in name)


# Full fine-tuning and DoRA


def test_full_fine_tuning_is_a_checkpoint_and_its_task_vector(tmp_path: Path) -> None:
    base = models.save(models.llama(), tmp_path / "base")
    valve, report = trained(tmp_path / "run", full=True, epochs=2)
    assert report["stages"][0]["steps"] == 8
    save_learned(valve, CARD, tmp_path / "learned")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "learned", dtype=torch.float32)
    assert torch.equal(models.logits(plain), models.logits(valve.model))
    start = models.llama().state_dict()
    still = [name for name, weight in plain.state_dict().items() if torch.equal(weight, start[name])]
    assert still == []
    vector = Valve(models.llama(), models.tokenizer(), TaskVector.between(base, tmp_path / "learned"))
    with vector.at(1.0) as model:
        assert torch.equal(models.logits(model), models.logits(valve.model))


def test_dora_is_learned_at_alpha_1_and_read_back_as_its_exact_difference(tmp_path: Path) -> None:
    base = models.save(models.llama(), tmp_path / "base")
    valve, _ = trained(tmp_path / "run", dora=True, epochs=2)
    with pytest.raises(DirectionMismatch, match="DoRA"), valve.at(0.5):
        pass
    save_learned(valve, CARD, tmp_path / "dora")
    again = Valve.load(base, tmp_path / "dora", device="cpu")
    assert isinstance(again.direction, TaskVector)
    assert again.direction.card.toward == "shorter"
    with again.at(1.0) as model:
        torch.testing.assert_close(models.logits(model), models.logits(valve.model), rtol=0, atol=1e-4)
    with again.at(0.0) as model:
        assert torch.equal(models.logits(model), models.logits(models.llama()))


# A run that is stopped


def stop_after(steps: int) -> Callable[..., None]:
    def progress(_task: str, done: int, _total: int, _note: str = "") -> None:
        if done >= steps:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize(
    ("stop", "changed"),
    [
        (5, {"dropout": 0.2, "schedule": "cosine", "warmup": 0.1}),
        (15, {"dropout": 0.2, "schedule": "cosine", "warmup": 0.1}),
        (15, {"packing": True, "max_length": 120}),
        (15, {"full": True}),
        (15, {"dora": True}),
        (15, {"micro_batch": 1, "gradient_checkpointing": True}),
    ],
    ids=["first epoch", "second epoch", "packed", "full", "DoRA", "accumulated"],
)
def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path, stop: int, changed: dict[str, object]) -> None:
    """Order of examples, dropout, optimizer and learning rate go on where they were, bit for bit.

    The Trainer draws a new order in each epoch from the global generator: a run that was stopped in its second
    epoch used to go on with the order of the first.
    """
    chains = [f"{text}{i}" for i, text in enumerate(TEXTS * 3)]
    how: dict[str, object] = {"epochs": 2, "checkpoint_every": 2, **changed}
    whole, report = trained(tmp_path / "whole", stage(chains), **how)
    per_epoch = report["stages"][0]["steps"] // 2
    assert (per_epoch < stop < 2 * per_epoch) == (stop == 15)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "stopped", stage(chains), progress=stop_after(stop), **how)
    (found,) = (tmp_path / "stopped").rglob("checkpoint-*")
    assert found.name == f"checkpoint-{stop - 1}"
    assert (stop - 1) % per_epoch, "in the middle of an epoch"
    torch.manual_seed(7)
    again, other = trained(tmp_path / "stopped", stage(chains), **how)
    assert_same_bits(whole, again)
    assert other["stages"][0]["steps"] == report["stages"][0]["steps"]


def test_a_checkpoint_that_was_not_written_whole_is_passed_over(tmp_path: Path) -> None:
    """The Trainer writes trainer_state.json last, and not in one piece."""
    how: dict[str, object] = {"epochs": 2, "checkpoint_every": 2}
    whole, _ = trained(tmp_path / "whole", **how)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "stopped", progress=stop_after(5), **how)
    home = tmp_path / "stopped" / "stage-0"
    (found,) = home.glob("checkpoint-*")
    state = (found / "trainer_state.json").read_text(encoding="utf-8")
    for name, text in (("checkpoint-6", None), ("checkpoint-8", ""), ("checkpoint-7", state[: len(state) // 2])):
        (home / name).mkdir()
        if text is not None:
            (home / name / "trainer_state.json").write_text(text, encoding="utf-8")
    again, _ = trained(tmp_path / "stopped", **how)
    assert_same_bits(whole, again)


def mix_file(path: Path, questions: int = 8) -> Path:
    """MixChain in the authors' columns."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(questions):
            chains = {f"solution_{k}": " ".join([f"so {i} + {k}"] * (k + 1)) for k in range(3)}
            file.write(json.dumps({"question": f"what is {i}?", "answer": str(i), **chains}) + "\n")
    return path


def test_a_training_run_that_is_killed_twice_ends_in_the_same_weights(
    tmp_path: Path, killed: Callable[..., str], command: Callable[..., tuple[int, str]]
) -> None:
    """SIGKILL in the first epoch of the first stage, then in the second epoch of the second: `cotvalve train` each time."""
    models.save(models.llama(), tmp_path / "model")
    data = mix_file(tmp_path / "mix.jsonl")

    def train(out: str) -> list[str]:
        return [
            "train", "progressive", "--model", str(tmp_path / "model"), "--data", str(data), "--device", "cpu",
            "--prompt", "plain", "--batch", "2", "--epochs", "2", "--rank", "2", "--dropout", "0.1",
            "--learning-rate", "0.01", "--checkpoint-every", "1", "--seed", "3", "--out", str(tmp_path / out),
        ]  # fmt: skip

    assert command(*train("whole"))[0] == 0
    report = read_json(tmp_path / "whole" / "train.json")
    assert [s["steps"] for s in report["stages"]] == [8, 8, 8]

    def reached(number: int, step: int) -> bool:
        found = (tmp_path / "out" / f"stage-{number}").glob("checkpoint-*/trainer_state.json")
        return any(int(path.parent.name.rpartition("-")[2]) >= step for path in found)

    killed(["-m", "cotvalve", *train("out")], lambda: reached(0, 2))
    assert not reached(0, 8)
    killed(["-m", "cotvalve", *train("out")], lambda: reached(1, 5))
    assert reached(0, 8)
    assert not reached(1, 8)
    assert not (tmp_path / "out" / "train.json").exists()
    assert command(*train("out"))[0] == 0
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    again = read_json(tmp_path / "out" / "train.json")
    assert [(s["stage"], s["steps"], s["learned_tokens"]) for s in again["stages"]] == [
        (s["stage"], s["steps"], s["learned_tokens"]) for s in report["stages"]
    ]
    code, said = command(*train("out"), "--rank", "3")
    assert code == 2
    assert "rank=2" in said
    assert "another --out" in said


# The verb


def test_train_writes_a_direction_that_says_what_it_is(tmp_path: Path) -> None:
    models.save(models.llama(), tmp_path / "model")
    (tmp_path / "qa.jsonl").write_text(
        "".join(json.dumps({"question": f"{i}+1?", "answer": str(i + 1), "solution": f"{i}+1={i + 1}"}) + "\n" for i in range(4))
    )
    out = run(
        TrainSettings(model=str(tmp_path / "model"), data=str(tmp_path / "qa.jsonl"), rank=2, batch=2, device="cpu", prompt="plain",
                      out=str(tmp_path / "out"))
    )  # fmt: skip
    found = Direction.load(out)
    assert (found.card.base, found.card.toward, found.card.method) == (str(tmp_path / "model"), "shorter", "valve")
    assert "4 questions" in found.card.facts["data"]
    assert {factor.A.shape[0] for factor in found.factors.values()} == {2}
    report = read_json(out / "train.json")["stages"][0]
    # "The answer is \boxed{}." and the end mark behind each solution
    assert report["learned_tokens"] == sum(len(f"{i}+1={i + 1}\nThe answer is \\boxed{{{i + 1}}}.") + 1 for i in range(4))
    asked = sum(len(models.tokenizer()(render(models.tokenizer(), f"{i}+1?", prompt("plain")))["input_ids"]) for i in range(4))
    assert report["tokens"] == asked + report["learned_tokens"]
    assert Valve.load(tmp_path / "model", out, device="cpu").rows


@pytest.mark.parametrize("kind", ["MixChain", "human"])
def test_a_limit_takes_so_many_questions_that_the_seed_chooses(tmp_path: Path, kind: str) -> None:
    models.save(models.llama(), tmp_path / "model")
    data = mix_file(tmp_path / "data.jsonl", 40)
    if kind == "human":
        data.write_text("".join(json.dumps({"question": f"{i}+1?", "answer": str(i + 1), "solution": f"{i}+1={i + 1}"}) + "\n" for i in range(40)))
    how = {"model": str(tmp_path / "model"), "data": str(data), "device": "cpu", "prompt": "plain", "batch": 4, "rank": 2, "limit": 3}
    facts, starts = list[str](), list[Tensor]()
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)
        out = run(TrainSettings(**how, seed=seed, out=str(tmp_path / str(number))))  # pyright: ignore[reportArgumentType]
        assert read_json(out / "train.json")["stages"][0]["examples"] == 3
        found = Direction.load(out)
        facts.append(found.card.facts["data"])
        starts.append(next(iter(found.factors.values())).A)
    assert facts[0] == facts[1] != facts[2]
    # What a new LoRA starts with is the seed's as well; one step moves it by no more than the learning rate.
    assert torch.equal(starts[0], starts[1])
    assert float((starts[0] - starts[2]).abs().max()) > 0.01


def test_a_human_solution_is_put_into_a_thinking_block_where_it_is_asked_for(tmp_path: Path) -> None:
    models.save(models.llama(), tmp_path / "model")
    (tmp_path / "qa.jsonl").write_text(json.dumps({"question": "1+1?", "answer": "2", "solution": "1+1=2"}) + "\n")
    how = {"model": str(tmp_path / "model"), "data": str(tmp_path / "qa.jsonl"), "device": "cpu", "prompt": "plain", "rank": 2}
    tokens = [
        read_json(run(TrainSettings(**how, thinking=thinking, out=str(tmp_path / thinking))) / "train.json")["stages"][0]["learned_tokens"]  # pyright: ignore
        for thinking in ("no", "auto", "yes")
    ]
    assert tokens[0] == tokens[1] < tokens[2]


def test_other_chains_of_the_same_questions_are_another_run(tmp_path: Path) -> None:
    models.save(models.llama(), tmp_path / "model")
    data = mix_file(tmp_path / "mix.jsonl")
    how = {"model": str(tmp_path / "model"), "data": str(data), "device": "cpu", "prompt": "plain", "batch": 4, "rank": 2, "out": str(tmp_path / "out")}
    run(TrainSettings(**how))  # pyright: ignore[reportArgumentType]
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    # What changes no result may change.
    run(TrainSettings(**how, micro_batch=1, gradient_checkpointing=True, compile="no"))  # pyright: ignore[reportArgumentType]
    data.write_text(data.read_text().replace("so 3 + 0", "then 3 + 0"))
    with pytest.raises(DataError, match="holds a run on another data set of the same name"):
        run(TrainSettings(**how))  # pyright: ignore[reportArgumentType]
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before


def test_settings_of_a_new_lora_beside_a_direction_are_said_to_be_unused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    models.save(models.llama(), tmp_path / "model")
    how = {"model": str(tmp_path / "model"), "data": str(mix_file(tmp_path / "mix.jsonl")), "device": "cpu", "prompt": "plain", "batch": 4}
    first = run(TrainSettings(**how, rank=2, out=str(tmp_path / "first")))  # pyright: ignore[reportArgumentType]
    caplog.clear()
    run(TrainSettings(**how, rank=2, modules="all", direction=str(first), out=str(tmp_path / "same")))  # pyright: ignore[reportArgumentType]
    assert "is not used" not in caplog.text
    run(TrainSettings(**how, rank=3, modules="attention", direction=str(first), out=str(tmp_path / "other")))  # pyright: ignore[reportArgumentType]
    said = [record.getMessage() for record in caplog.records if "is not used" in record.getMessage()]
    assert said[0] == f"modules attention is not used: training goes on from {first}, which has down_proj,gate_proj,k_proj,o_proj,q_proj,up_proj,v_proj"
    assert said[1:] == [f"rank 3 is not used: training goes on from {first}, which has 2"]


def test_settings_of_another_recipe_are_said_to_be_unused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`train plus --stages 5` trained one stage without a word."""
    models.save(models.llama(), tmp_path / "model")
    how = {"model": str(tmp_path / "model"), "data": str(mix_file(tmp_path / "mix.jsonl")), "device": "cpu", "prompt": "plain", "batch": 4}
    run(TrainSettings(**how, recipe="plus", stages=2, brevity=0.1, out=str(tmp_path / "plus")))  # pyright: ignore[reportArgumentType]
    run(TrainSettings(**how, recipe="valve", stages=2, out=str(tmp_path / "valve")))  # pyright: ignore[reportArgumentType]
    assert [record.getMessage() for record in caplog.records if "is not used" in record.getMessage()] == [
        "stages 2 is not used: it is a setting of valve and progressive, not of plus",
        "brevity 0.1 is not used: it is a setting of reward, not of plus",
        "stages 2 is not used: valve takes it with solution, the number of one of them",
    ]
    caplog.clear()
    run(TrainSettings(**how, recipe="progressive", stages=2, out=str(tmp_path / "progressive")))  # pyright: ignore[reportArgumentType]
    assert "is not used" not in caplog.text


def test_full_fine_tuning_leaves_what_can_be_loaded_both_ways(tmp_path: Path) -> None:
    models.save(models.llama(), tmp_path / "model")
    out = run(
        TrainSettings(model=str(tmp_path / "model"), data=str(mix_file(tmp_path / "mix.jsonl")), full=True, batch=4, device="cpu",
                      prompt="plain", toward="longer", out=str(tmp_path / "out"))
    )  # fmt: skip
    plain = Valve.load(out, device="cpu")
    turned = Valve.load(tmp_path / "model", out, device="cpu")
    assert turned.direction is not None
    assert (turned.direction.card.toward, turned.direction.card.method) == ("longer", "valve")
    with turned.at(1.0) as model:
        assert torch.equal(models.logits(model), models.logits(plain.model))
    with turned.at(0.0) as model:
        assert torch.equal(models.logits(model), models.logits(models.llama()))


def test_plus_needs_chains_of_different_lengths(tmp_path: Path) -> None:
    models.save(models.llama(), tmp_path / "model")
    (tmp_path / "qa.jsonl").write_text(json.dumps({"question": "1+1?", "answer": "2", "solution": "2"}) + "\n")
    for recipe in ("plus", "progressive"):
        with pytest.raises(SettingError, match=f"recipe '{recipe}' needs several chains"):
            run(TrainSettings(recipe=recipe, model=str(tmp_path / "model"), data=str(tmp_path / "qa.jsonl"), out=str(tmp_path / "out")))


@pytest.mark.parametrize(
    ("which", "expected"),
    [
        ("all", sorted(models.PROJECTIONS)),
        ("attention", ["k_proj", "o_proj", "q_proj", "v_proj"]),
        ("mlp", ["down_proj", "gate_proj", "up_proj"]),
        ("q_proj, o_proj", ["o_proj", "q_proj"]),
    ],
)
def test_modules_are_named_by_kind_or_by_name(which: str, expected: list[str]) -> None:
    assert target_modules(models.llama(), which) == expected


@pytest.mark.parametrize(("which", "says"), [("q_proj,w_proj", "'w_proj'.*q_proj"), ("lm_head", "'lm_head'"), ("", "''")])
def test_modules_that_match_nothing_are_an_error(which: str, says: str) -> None:
    with pytest.raises(SettingError, match=says):
        target_modules(models.llama(), which)


# Recipes, where public ports went wrong


def mixchain(*lengths: Sequence[int]) -> list[MixChain]:
    return [
        MixChain(Problem(f"{q}", "?", "1"), tuple(Chain(f"{q}:{n}", n) for n in sorted(own, reverse=True)))
        for q, own in enumerate(lengths)
    ]


def test_beta_is_taken_per_question() -> None:
    """A public port computed it per column of the data set: 100 tokens are short for one question and long for another."""
    (made,) = plus(mixchain([100, 200, 300], [10, 40, 100], [50, 50], [7]))
    assert [(e.chain.text, round(e.alpha, 6)) for e in made.examples] == [
        ("0:200", 0.5), ("0:100", 1.0), ("1:40", round(60 / 90, 6)), ("1:10", 1.0),
    ]  # fmt: skip
    assert made.skipped == 5, "two longest ones, two equally long ones, and one that is alone"
    assert beta(5, 5, 5) is None


def test_a_stage_is_one_solution_of_every_question() -> None:
    """A public port sorted all chains of all questions by length and cut equal buckets."""
    mix = mixchain([1000, 900, 800], [30, 20, 10], [500, 5, 4])
    stages = progressive(mix)
    assert [[e.chain.text for e in s.examples] for s in stages] == [
        ["0:1000", "1:30", "2:500"], ["0:900", "1:20", "2:5"], ["0:800", "1:10", "2:4"],
    ]  # fmt: skip
    assert {e.alpha for s in stages for e in s.examples} == {1.0}


def test_valve_learns_the_shortest_chain_of_each_question() -> None:
    (made,) = short(mixchain([100, 300], [7], [40, 50, 60]))
    assert [(e.chain.text, e.alpha) for e in made.examples] == [("0:100", 1.0), ("1:7", 1.0), ("2:40", 1.0)]
