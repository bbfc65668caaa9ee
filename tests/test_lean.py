"""Training's own forward pass is PEFT's: losses and gradients agree, layers that are more than a plain LoRA are left alone."""

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import Lfm2Config, Lfm2ForCausalLM, OPTConfig, OPTForCausalLM

from cotvalve import Valve
from cotvalve import lean as module
from cotvalve.batches import IGNORED, collate, collate_flat, encode, pack, portions
from cotvalve.direction import Card, Direction
from cotvalve.errors import EngineError, SettingError
from cotvalve.fitting import FitSettings
from cotvalve.headloss import compiled, loss_and_slope
from cotvalve.lean import LeanLinear, Position, can_lie_flat, lean, tells_rows_apart
from cotvalve.learner import Learner
from cotvalve.recipes import Example, Stage
from cotvalve.records import Json
from cotvalve.train import fit
from cotvalve.types import Chain, Problem
from cotvalve.valve import ADAPTER
from tests import models

ALPHAS = (0.0, 0.25, 0.6, 1.0, 1.5, 0.4, 0.9, -0.3)
CARD = Card("base", "shorter", "valve")


def rows(alphas: tuple[float, ...] = ALPHAS) -> list[Json]:
    texts = ("2", "one, two", "it is 7 because 3 + 4", "no", "then 5 - 2 = 3 and 3 * 3 = 9", "ok, 12", "a b c d e", "42!")
    stage = Stage(
        "s", tuple(Example(Problem(str(i), f"q{i}?", "1"), Chain(t, 1), a) for i, (t, a) in enumerate(zip(texts, alphas, strict=True)))
    )
    return encode(stage, models.tokenizer(), "plain", 4096)[0]


def turned(make: Callable[..., models.PreTrainedModel] = models.llama, dtype: torch.dtype = torch.float32, **config: object) -> Valve:
    """A valve whose LoRA is not zero and learns; factors in fp32 as in training."""
    wrapped = models.lora(make(), by=0.1, **config)  # pyright: ignore[reportArgumentType]
    factors = {name.replace(".default", ""): weight for name, weight in wrapped.named_parameters() if "lora_" in name}
    valve = Valve(make(dtype=dtype), models.tokenizer(), Direction.from_peft(wrapped.peft_config["default"], factors, CARD))
    for name, parameter in valve.model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    return valve


def learn(valve: Valve, batch: dict[str, Tensor], alpha: float | None = None, position: Position | None = None) -> tuple[float, dict[str, Tensor]]:
    valve.model.zero_grad()
    batch = dict(batch)
    own = batch.pop("alpha")
    own = own if alpha is None else torch.full_like(own, alpha)
    with position.at(own) if position else valve.at(own):
        loss = Learner(valve)(**batch, divisor=100)
        loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in valve.model.named_parameters() if p.grad is not None}


def same(one: tuple[float, dict[str, Tensor]], other: tuple[float, dict[str, Tensor]], to: float = 1e-6) -> None:
    """Equal up to fp32 sums in another order, of the largest entry of each gradient."""
    assert math.isclose(one[0], other[0], rel_tol=to)
    assert one[1].keys() == other[1].keys()
    assert one[1]
    for name, gradient in one[1].items():
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, other[1][name], rtol=0, atol=10 * to * float(other[1][name].abs().max()) + 1e-12)


@pytest.mark.parametrize("alpha", [None, 1.0, 0.0, 0.37], ids=["rows", "one", "closed", "middle"])
@pytest.mark.parametrize("make", [models.llama, models.qwen2], ids=["llama", "qwen2 with biases"])
def test_losses_and_gradients_are_peft_s(make: Callable[..., models.PreTrainedModel], alpha: float | None) -> None:
    valve, batch = turned(make), collate(rows())
    peft = learn(valve, batch, alpha)
    with lean(valve) as position:
        assert position.others == 0
        ours = learn(valve, batch, alpha, position)
    same(ours, peft)
    assert any(bool(g.any()) for g in ours[1].values()) == (alpha != 0.0)
    assert learn(valve, batch, alpha)[0] == peft[0], "and PEFT's again on leaving, bit for bit"


@pytest.mark.parametrize("config", [{"use_rslora": True}, {"lora_alpha": 3}, {"rank": 1}, {"targets": ["q_proj", "down_proj"]}], ids=str)
def test_scales_ranks_and_targets(config: dict[str, object]) -> None:
    valve, batch = turned(**config), collate(rows())
    peft = learn(valve, batch)
    with lean(valve) as position:
        same(learn(valve, batch, position=position), peft)


def test_per_token_alphas_of_packed_rows() -> None:
    valve, batch = turned(), collate(pack(rows(), 200))
    peft = learn(valve, batch)
    with lean(valve) as position:
        same(learn(valve, batch, position=position), peft)


def test_gradient_checkpointing_runs_the_same_layers_again() -> None:
    valve, batch = turned(), collate(rows())
    peft = learn(valve, batch)
    valve.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    valve.model.train()
    with lean(valve) as position:
        same(learn(valve, batch, position=position), peft)


def test_sixteen_bits_are_as_close_to_the_truth_as_peft_s() -> None:
    """bf16 has 8 bits: both ways are compared with fp32, and ours may not be the worse one by more than a fifth."""
    batch = collate(rows())
    truth = learn(turned(), batch)[1]
    valve = turned(dtype=torch.bfloat16)

    def error(found: dict[str, Tensor]) -> float:
        return math.sqrt(sum(float((g - truth[n]).square().sum()) for n, g in found.items()))

    peft = error(learn(valve, batch)[1])
    with lean(valve) as position:
        ours = error(learn(valve, batch, position=position)[1])
    size = math.sqrt(sum(float(g.square().sum()) for g in truth.values()))
    assert peft / size < 0.05
    assert ours < 1.2 * peft


def test_a_broken_direction_does_not_reach_rows_at_alpha_0() -> None:
    valve = turned()
    with torch.no_grad():
        for layer in valve.dial.layers.values() if valve.dial else ():
            layer.lora_A[ADAPTER].weight[0, 0] = float("nan")
    batch = collate(rows((0.0,) * 8))
    healthy, _ = learn(turned(), batch)
    with lean(valve) as position:
        loss, _ = learn(valve, batch, position=position)
    assert loss == pytest.approx(healthy, rel=1e-6)


def test_what_is_more_than_a_plain_lora_stays_peft_s() -> None:
    valve = turned()
    assert valve.dial is not None
    first, second, *_ = valve.dial.layers.values()
    first.lora_dropout[ADAPTER] = nn.Dropout(0.1)
    second.base_layer = type("Quantized", (nn.Linear,), {})(second.in_features, second.out_features)
    with lean(valve) as position:
        assert position.others == 2
        assert type(first) is type(second) is LoraLinear
        assert sum(isinstance(layer, LeanLinear) for layer in valve.model.modules()) == len(valve.dial.layers) - 2
    assert not any(isinstance(layer, LeanLinear) for layer in valve.model.modules())


def folding(**_how: object) -> models.PreTrainedModel:
    """An OPT: its feed-forward layers see the rows of a batch as one."""
    config = OPTConfig(
        vocab_size=models.VOCABULARY, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=512, dropout=0.0, pad_token_id=256,
    )  # fmt: skip
    return models._filled(OPTForCausalLM(config), 0)  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("alpha", [1.0, 0.0, 0.37])
def test_layers_that_fold_rows_learn_at_one_alpha_and_refuse_several(alpha: float, dropout: bool) -> None:
    """An alpha for each row of them was a RuntimeError about shapes, though they all were 1."""
    valve, batch = turned(folding, targets=["q_proj", "fc1", "fc2"]), collate(rows())
    own = batch.pop("alpha")
    peft = learn(valve, {**batch, "alpha": torch.tensor(alpha)})
    assert valve.dial is not None
    if dropout:  # of nothing, but PEFT's own layers
        for layer in valve.dial.layers.values():
            layer.lora_dropout[ADAPTER] = nn.Dropout(0.0)
    with lean(valve) as position:
        same(learn(valve, {**batch, "alpha": own}, alpha, position), peft, 3e-6)  # a ReLU's small gradients are sums of larger ones
        with pytest.raises(EngineError, match="cannot be told apart"):
            learn(valve, {**batch, "alpha": own}, position=position)
        same(learn(valve, {**batch, "alpha": own}, alpha, position), peft, 3e-6)


def test_layers_that_see_heads_apart_have_an_alpha_for_each_row() -> None:
    """[B, 1, 1] was spread over [B, heads, T, r] from behind: over the heads, where there are as many as rows."""
    valve = turned()
    assert valve.dial is not None
    layer, x = next(iter(valve.dial.layers.values())), torch.randn(2, 2, 5, 32)
    for alpha in (torch.tensor([0.3, 1.0]), torch.tensor([0.0, -1.0])):
        with valve.at(alpha):
            expected = layer(x)
        with lean(valve) as position, position.at(alpha):
            torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-5)


def test_everything_is_undone_after_an_error() -> None:
    valve = turned()
    with pytest.raises(KeyboardInterrupt), lean(valve, compiled=True, flat=True):
        raise KeyboardInterrupt
    assert not any(isinstance(layer, LeanLinear) for layer in valve.model.modules())
    assert valve.model.config._attn_implementation == "sdpa"
    assert all(block._compiled_call_impl is None for block in module.blocks(valve.model))
    assert not any("position" in vars(layer) for layer in valve.model.modules())


# Rows one behind the other


@contextmanager
def kernel(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """PyTorch has its flat attention for GPUs alone; here each row is computed by itself."""

    def each(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scaling: float | None) -> Tensor:
        ends = starts.tolist()
        assert ends[0] == 0
        assert ends[-1] == len(q)
        assert longest >= max(b - a for a, b in pairwise(ends))
        out = [
            nn.functional.scaled_dot_product_attention(
                *(part[a:b].transpose(0, 1)[None] for part in (q, k, v)), is_causal=True, scale=scaling, enable_gqa=True
            )[0].transpose(0, 1)
            for a, b in pairwise(ends)
        ]
        return torch.cat(out)

    monkeypatch.setattr(module, "varlen_attention", each)
    yield


@pytest.mark.parametrize("make", [models.llama, models.qwen2], ids=["llama", "qwen2"])
def test_flat_rows_are_the_rows(make: Callable[..., models.PreTrainedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    valve, encoded = turned(make), rows()
    padded = learn(valve, collate(encoded))
    batch = collate_flat(encoded)
    assert batch["input_ids"].shape == (1, sum(len(row["input_ids"]) for row in encoded))
    with kernel(monkeypatch), lean(valve, flat=True) as position:
        same(learn(valve, batch, position=position), padded)
        same(learn(valve, collate_flat(pack(encoded, 200)), position=position), padded)


def test_flat_rows_need_a_gpu() -> None:
    assert not can_lie_flat(models.llama())
    assert not can_lie_flat(models.llama(dtype=torch.bfloat16))


def convolving() -> models.PreTrainedModel:
    """An LFM2: convolutions between its layers of attention."""
    config = Lfm2Config(
        vocab_size=models.VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
    )  # fmt: skip
    return models.moved(Lfm2ForCausalLM(config), by=0.2)


def test_rows_of_layers_that_carry_a_state_are_not_put_one_behind_the_other(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A convolution read the end of the row before, on a GPU without anybody having asked for packing."""
    valve = Valve(convolving(), models.tokenizer())

    def loss(encoded: list[Json]) -> float:
        batch = collate(encoded)
        batch.pop("alpha")
        with torch.no_grad():
            return float(Learner(valve)(**batch, divisor=1.0))

    assert loss(rows()) == pytest.approx(sum(loss([row]) for row in rows()), rel=1e-6)
    assert loss(pack(rows(), 4096)) != pytest.approx(loss(rows()), rel=1e-5)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))

    def on_a_gpu(model: models.PreTrainedModel) -> Any:
        here = {"device": torch.device("cuda"), "dtype": torch.bfloat16}
        return SimpleNamespace(config=model.config, _supports_attention_backend=True, _is_stateful=model._is_stateful, **here)  # pyright: ignore[reportPrivateUsage]

    plain = models.llama(), models.qwen2()
    assert all(tells_rows_apart(model) and can_lie_flat(on_a_gpu(model)) for model in plain)
    assert not tells_rows_apart(valve.model)
    assert not can_lie_flat(on_a_gpu(valve.model))
    stateful = on_a_gpu(plain[0])
    stateful._is_stateful = True
    assert not can_lie_flat(stateful)
    stage = Stage("s", (Example(Problem("0", "q?", "1"), Chain("2", 1), 1.0),))
    with pytest.raises(SettingError, match="packing needs attention in every layer; Lfm2ForCausalLM"):
        fit(valve, [stage], FitSettings(packing=True), tmp_path, CARD)


# Portions of a step


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("tokens", [1, 40, 100, 200, 10_000])
def test_portions_hold_every_row_once_within_the_room(tokens: int, flat: bool) -> None:
    encoded = rows()
    parts = portions(encoded, tokens, flat=flat)
    sizes = [[len(row["input_ids"]) for row in part] for part in parts]
    assert sorted(id(row) for part in parts for row in part) == sorted(map(id, encoded))
    for part in sizes:
        assert len(part) == 1 or (sum(part) if flat else len(part) * max(part)) <= tokens
    if tokens == 1:
        assert len(parts) == len(encoded)
    if tokens == 10_000:
        assert len(parts) == 1


def test_portions_are_even() -> None:
    """Cut at the limit, 17 rows of 100 tokens in 1,600 would be 16 and 1."""
    encoded: list[Json] = [{"input_ids": [1] * 100} for _ in range(17)]
    assert [len(part) for part in portions(encoded, 1600)] == [9, 8]
    assert [len(part) for part in portions(encoded, 1600, flat=True)] == [9, 8]
    assert max(len(part) for part in portions(encoded, 1600, 4)) == 4


def test_places_are_the_positions_before_what_is_learned() -> None:
    encoded = rows()
    for batch in (collate(encoded), collate_flat(encoded)):
        labels = batch["labels"].flatten()
        assert len(batch["places"]) == sum(label != IGNORED for row in encoded for label in row["labels"])
        assert bool((labels[batch["places"] + 1] != IGNORED).all())
    unasked: list[Json] = [{"input_ids": [5, 6], "labels": [5, 6], "alpha": 1.0}, {"input_ids": [7, 8], "labels": [7, 8], "alpha": 0.5}]
    assert collate(unasked)["places"].tolist() == [0, 2]
    assert collate_flat(unasked)["places"].tolist() == [0, 2], "the last token of a row does not predict the next row's first"


def test_flat_positions_are_those_within_a_row() -> None:
    """Rotary positions would not tell: they only see differences."""
    encoded = rows()
    expected = [place for row in encoded for place in range(len(row["input_ids"]))]
    assert collate_flat(encoded)["position_ids"].flatten().tolist() == expected
    packed = pack(encoded, 200)
    assert collate_flat(packed)["position_ids"].flatten().tolist() == [place for row in packed for place in row["position_ids"]]


def test_the_loss_of_logits_in_16_bits_is_summed_in_32() -> None:
    logits = (10 * torch.randn(7, 301, generator=torch.Generator().manual_seed(0))).bfloat16()
    wanted = torch.arange(7)[:, None]
    loss, slope = loss_and_slope(logits, wanted)
    assert torch.allclose(loss, torch.nn.functional.cross_entropy(logits.float(), wanted[:, 0], reduction="none"), rtol=1e-5)
    assert slope.dtype == torch.bfloat16


def test_the_fused_loss_is_the_written_one() -> None:
    """What a GPU compiles for its loss, compiled for the CPU: loss and gradient of large logits."""
    draw = torch.Generator().manual_seed(0)
    logits = 20 * torch.randn(7, 301, generator=draw)
    wanted = torch.randint(301, (7, 1), generator=draw)
    (loss, slope), (fused, fused_slope) = loss_and_slope(logits.clone(), wanted), compiled()(logits.clone(), wanted)
    assert torch.allclose(fused, loss)
    assert torch.allclose(fused_slope, slope, atol=1e-6)
    leaf = logits.clone().requires_grad_()
    torch.nn.functional.cross_entropy(leaf, wanted[:, 0], reduction="sum").backward()
    assert leaf.grad is not None
    assert torch.allclose(slope, leaf.grad, atol=1e-6)
