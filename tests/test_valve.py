"""The dial: its algebra, its scale against PEFT's own, its end at the base, and what it refuses."""

import copy
from collections.abc import Generator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from cotvalve import Valve
from cotvalve.adapters import Factor
from cotvalve.checkpoints import load_model
from cotvalve.direction import Card, Direction, load_direction
from cotvalve.errors import DirectionMismatch, EngineError, SettingError
from cotvalve.fitting import FitSettings
from cotvalve.mover import Mover
from cotvalve.prompts import PROMPTS, render
from cotvalve.taskvector import TaskVector
from cotvalve.valve import ADAPTER, Dial
from cotvalve.weights import Anatomy
from tests import models

CARD = Card("base", "shorter", "valve")
DTYPES = [torch.float32, torch.bfloat16]
ALPHAS = (-1.0, 0.0, 0.37, 1.0, 3.0)

SAME = {"rtol": 0, "atol": 2e-5}
"""fp32 logits of about 5 that were summed in another order: 40 times their rounding, and the smallest step of
alpha that is compared (0.01) moves them by 1e-2."""


def direction(seed: int = 2, **config: object) -> Direction:
    return usual() if seed == 2 and not config else made(seed, **config)


@cache
def usual() -> Direction:
    return made(2)


def made(seed: int, **config: object) -> Direction:
    wrapped = models.lora(models.llama(), seed=seed, **config)
    factors = {name.replace(f".{ADAPTER}", ""): weight for name, weight in wrapped.named_parameters() if "lora_" in name}
    return Direction.from_peft(wrapped.peft_config[ADAPTER], factors, CARD)


def valve(found: Direction | TaskVector | None = None, dtype: torch.dtype = torch.float32) -> Valve:
    return Valve(models.llama(dtype=dtype), models.tokenizer(), direction() if found is None else found)


def at(on: Valve, alpha: float | Sequence[float] | Tensor, **how: int) -> Tensor:
    with on.at(alpha) as model:
        return models.logits(model, **how)


def bits(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(model: torch.nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(after[name], before[name])] == []


# Alpha 0 is the base


@pytest.mark.parametrize("rows", [0.0, [0.0, 0.0]], ids=["one alpha", "an alpha per row"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alpha_0_is_the_base_bit_for_bit(dtype: torch.dtype, rows: float | list[float]) -> None:
    base = models.logits(models.llama(dtype=dtype))
    turned = valve(dtype=dtype)
    assert torch.equal(at(turned, rows), base)
    assert torch.equal(models.logits(turned.model), base), "outside `at` the valve is closed"
    assert not torch.equal(at(turned, 0.01), base), "and the direction is really there"


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_cannot_leak_through_alpha_0(dtype: torch.dtype, poison: float, grad: bool) -> None:
    """0 * NaN is NaN: a product alone would let a diverged direction into the base model."""
    base = models.logits(models.llama(dtype=dtype), rows=3)
    turned = valve(dtype=dtype)
    sick = [layer for layer in turned.model.modules() if isinstance(layer, LoraLayer)]
    with torch.no_grad():
        sick[0].lora_A[ADAPTER].weight[0, 0] = poison
        sick[1].lora_B[ADAPTER].weight[0, 0] = poison
        sick[2].lora_B[ADAPTER].weight.fill_(poison)

    ids = torch.randint(0, 256, (3, 7), generator=torch.Generator().manual_seed(3))  # as models.logits
    with torch.set_grad_enabled(grad):
        assert torch.equal(turned.model(input_ids=ids).logits, base), "closed"
        with turned.at(0.0) as model:
            assert torch.equal(model(input_ids=ids).logits, base), "alone"
        with turned.at([1.0, 0.0, 0.5]) as model:
            mixed = model(input_ids=ids).logits
    assert not mixed[0].isfinite().any()
    assert torch.equal(mixed[1], base[1]), "beside rows that are sick"


@pytest.mark.parametrize(("dtype", "factor", "x"), [(torch.float16, 100.0, 1e3), (torch.float32, 1e15, 1e30)], ids=str)
def test_a_product_that_overflows_cannot_leak_through_alpha_0(dtype: torch.dtype, factor: float, x: float) -> None:
    """A and B are finite, A x is not: 0 * inf is NaN."""
    dial = valve(dtype=dtype).dial
    assert dial is not None
    layer = next(iter(dial.layers.values()))
    rows = torch.full((2, 3, layer.lora_A[ADAPTER].in_features), x, dtype=dtype)
    with torch.no_grad():
        layer.lora_A[ADAPTER].weight.fill_(factor)
        with dial.at(torch.tensor([0.0, 1.0])):
            out = layer(rows)
        assert torch.equal(out[0], layer.base_layer(rows)[0])
    assert not out[1].isfinite().any()


def test_alpha_0_per_token_is_the_base_up_to_the_first_other_token() -> None:
    """Causal attention: what the dial does to token 4 cannot be seen in the tokens before it."""
    turned = valve()
    alphas = torch.zeros(2, 7)
    alphas[:, 4:] = 1.0
    base, mixed = models.logits(models.llama()), at(turned, alphas)
    assert torch.equal(mixed[:, :4], base[:, :4])
    assert not torch.equal(mixed[:, 4], base[:, 4])


# The dial's algebra


def test_alpha_moves_the_logits() -> None:
    """A public port's dial was dead: 0.2 and 2.0 gave the same logits."""
    turned = valve()
    seen = [at(turned, alpha) for alpha in (0.0, 0.2, 0.21, 1.0, 2.0)]
    for i, one in enumerate(seen):
        for other in seen[i + 1 :]:
            assert float((one - other).abs().max()) > 1e-3


def test_a_position_is_a_multiple_of_the_direction() -> None:
    d = direction()
    torch.testing.assert_close(at(valve(2 * d), 1.0), at(valve(d), 2.0), **SAME)
    torch.testing.assert_close(at(valve(-d), 0.7), at(valve(d), -0.7), **SAME)
    torch.testing.assert_close(at(valve(d / 4), 2.0), at(valve(d), 0.5), **SAME)


def test_nothing_plus_nothing_is_the_base() -> None:
    base, d = models.logits(models.llama()), direction()
    torch.testing.assert_close(at(valve(d - d), 1.0), base, **SAME)
    torch.testing.assert_close(at(valve(0 * d), 3.0), base, rtol=0, atol=0)


def test_positions_of_two_directions_add_up() -> None:
    d, e = direction(2), direction(5)
    torch.testing.assert_close(at(valve(0.3 * d + 0.8 * e), 1.0), at(valve(e + 0.375 * d), 0.8), **SAME)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_what_it_would_be_alone(dtype: torch.dtype) -> None:
    turned, alphas = valve(dtype=dtype), list(ALPHAS)
    together = at(turned, alphas, rows=len(alphas))
    for row, alpha in enumerate(alphas):
        everywhere = at(turned, alpha, rows=len(alphas))
        assert torch.equal(together[row], everywhere[row]), f"row {row} at {alpha}"


def test_one_alpha_per_token_is_one_per_row_where_they_are_equal() -> None:
    turned = valve()
    tokens = torch.tensor([[0.3] * 7, [1.7] * 7])
    assert torch.equal(at(turned, tokens), at(turned, [0.3, 1.7]))


def test_alpha_stays_fp32_on_a_bf16_model() -> None:
    """bf16 has 3 digits: 1.003 and 1 are one number there. The branch is summed in fp32, so they stay two."""
    turned = valve(dtype=torch.bfloat16)
    assert torch.tensor(1.003).bfloat16() == 1
    layer = next(m for m in turned.model.modules() if isinstance(m, LoraLayer))
    x = torch.randn(1, 64, layer.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        with turned.at(1.0):
            one = layer(x)
        with turned.at(1.003):
            other = layer(x)
    assert not torch.equal(one, other)


def test_with_and_without_gradients_the_dial_says_the_same() -> None:
    turned, alphas = valve(), [0.4, 1.6]
    ids = torch.randint(0, 256, (2, 7), generator=torch.Generator().manual_seed(3))
    with turned.at(alphas) as model:
        learning = model(input_ids=ids).logits
    assert learning.requires_grad
    torch.testing.assert_close(learning.detach(), at(turned, alphas), **SAME)


def test_a_bf16_model_is_turned_without_no_grad_too() -> None:
    """fp32 alpha times bf16 activations is fp32, which the bf16 B refused."""
    turned = valve(dtype=torch.bfloat16)
    ids = torch.randint(0, 256, (2, 7), generator=torch.Generator().manual_seed(3))
    with turned.at([0.4, 1.6]) as model:
        learning = model(input_ids=ids).logits
    # one more rounding to bf16 (2^-8 of each branch) than without gradients, on logits of about 5
    torch.testing.assert_close(learning.detach(), at(turned, [0.4, 1.6]), rtol=0, atol=0.3)


# The scale, against PEFT itself


def peft_at(alpha: float, **config: object) -> Tensor:
    wrapped = models.lora(models.llama(), **config)
    for layer in wrapped.modules():
        if isinstance(layer, LoraLayer):
            layer.set_scale(ADAPTER, alpha)
    return models.logits(wrapped)


def peft_merged(alpha: float, **config: object) -> Tensor:
    wrapped = models.lora(models.llama(), **config)
    for layer in wrapped.modules():
        if isinstance(layer, LoraLayer):
            layer.set_scale(ADAPTER, alpha)
    return models.logits(wrapped.merge_and_unload())


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(
    "config",
    [
        {"rank": 4, "lora_alpha": 8},
        {"rank": 16, "lora_alpha": 8, "use_rslora": True},
        {"rank": 4, "lora_alpha": 3, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 5}},
    ],
    ids=["LoRA", "rsLoRA", "patterns"],
)
def test_the_scale_is_peft_s_own(config: dict[str, object], alpha: float) -> None:
    turned = at(valve(direction(**config)), alpha)
    # B A x is summed into W x inside one product here and added after it there
    torch.testing.assert_close(turned, peft_at(alpha, **config), rtol=0, atol=2e-5)
    # merging sums W + s BA before the product instead of after it
    torch.testing.assert_close(turned, peft_merged(alpha, **config), rtol=0, atol=2e-4)
    if alpha:
        off = at(valve(direction(**config)), 1.001 * alpha)
        assert not torch.allclose(turned, off, rtol=0, atol=2e-4), "the tolerance sees a scale that is off by 0.1 %"


def test_autocast_turns_the_dial_as_peft_does() -> None:
    """Our short way adds to W x in place, which autocast has made bf16 beside factors in fp32."""
    turned, wrapped = valve(), models.lora(models.llama())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(at(turned, 0.0), models.logits(models.llama()))
        torch.testing.assert_close(at(turned, [0.0, 1.0])[1], models.logits(wrapped)[1], rtol=0, atol=0.1)  # bf16 of 5


def test_dora_is_refused_by_the_dial() -> None:
    wrapped = models.lora(models.llama(), use_dora=True)
    with pytest.raises(DirectionMismatch, match=r"self_attn\.q_proj.*DoRA"):
        Dial(wrapped)


def test_dora_goes_through_its_exact_weight_difference(tmp_path: Path) -> None:
    base = models.save(models.llama(), tmp_path / "base")
    wrapped = models.lora(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), use_dora=True)
    wrapped.save_pretrained(tmp_path / "dora")
    turned = Valve.load(base, tmp_path / "dora", device="cpu")
    assert not turned.rows, "an exact weight difference moves all weights: one alpha per batch"
    plain = models.logits(models.llama())
    assert torch.equal(at(turned, 0.0), plain)
    torch.testing.assert_close(at(turned, 1.0), models.logits(wrapped), rtol=0, atol=1e-4)
    with turned.at(0.25) as model:
        quarter = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = wrapped.merge_and_unload().state_dict()
    for name, weight in models.llama().state_dict().items():
        # straight from the base to the merged adapter, in the weights
        torch.testing.assert_close(quarter[name], weight + 0.25 * (merged[name] - weight), rtol=0, atol=1e-6)


def test_a_dora_adapter_in_training_has_no_dial_and_says_so() -> None:
    """`at(0)` used to give the model with the adapter fully on."""
    base = models.llama()
    fresh = Valve.fresh(base, models.tokenizer(), FitSettings(rank=2, dora=True).lora(base))
    assert not fresh.rows
    for alpha in (0.0, 1.0, [0.0, 1.0]):
        with pytest.raises(DirectionMismatch, match=r"DoRA.*no dial"), fresh.at(alpha):
            pass
    with pytest.raises(DirectionMismatch, match="DoRA"):
        fresh.fuse(0.5)
    with pytest.raises(DirectionMismatch, match="DoRA"):
        fresh.generate("q", alpha=1.0)


# Restoring


def both_kinds(tmp_path: Path) -> list[Valve]:
    base = models.llama()
    ends = models.save(base, tmp_path / "base"), models.save(models.moved(base), tmp_path / "reasoner")
    return [valve(), Valve(models.llama(), models.tokenizer(), TaskVector.between(*ends))]


def test_at_restores_bit_for_bit(tmp_path: Path) -> None:
    for turned in both_kinds(tmp_path):
        weights, plain = bits(turned.model), models.logits(turned.model)
        for alpha in ALPHAS:
            with turned.at(alpha):
                pass
            assert_same_bits(turned.model, weights)
            assert torch.equal(models.logits(turned.model), plain)


def test_at_restores_after_an_exception(tmp_path: Path) -> None:
    for turned in both_kinds(tmp_path):
        weights, plain = bits(turned.model), models.logits(turned.model)
        with pytest.raises(ZeroDivisionError), turned.at(0.8) as model:  # noqa: PT012
            assert not torch.equal(models.logits(model), plain)
            _ = 1 / 0
        assert_same_bits(turned.model, weights)
        assert torch.equal(models.logits(turned.model), plain)


def test_at_restores_the_outer_position_when_nested(tmp_path: Path) -> None:
    for turned in both_kinds(tmp_path):
        weights, plain = bits(turned.model), models.logits(turned.model)
        alone = {alpha: at(turned, alpha) for alpha in (0.3, 0.8, 0.0)}
        with turned.at(0.3) as model:
            with turned.at(0.8):
                assert torch.equal(models.logits(model), alone[0.8])
                with pytest.raises(ZeroDivisionError), turned.at(0.0):  # noqa: PT012
                    assert torch.equal(models.logits(model), plain)
                    _ = 1 / 0
                assert torch.equal(models.logits(model), alone[0.8])
            assert torch.equal(models.logits(model), alone[0.3])
        assert_same_bits(turned.model, weights)
        assert torch.equal(models.logits(turned.model), plain)


def test_a_generator_that_is_dropped_half_way_closes_the_valve() -> None:
    turned = valve()
    plain = models.logits(turned.model)
    chains = turned_chains(turned)
    next(chains)
    chains.close()
    assert torch.equal(models.logits(turned.model), plain)


def turned_chains(turned: Valve) -> Generator[Tensor, None, None]:
    with turned.at(1.0) as model:
        while True:
            yield models.logits(model)


def test_the_weights_never_move_under_a_lora() -> None:
    """Never merged in place: at every position the stored weights are the base's own."""
    turned, base = valve(), models.llama().state_dict()
    for alpha in ALPHAS:
        with turned.at(alpha) as model:
            models.logits(model)
            assert not any(layer.merged for layer in model.modules() if isinstance(layer, LoraLayer))
            mine = {name.replace(".base_layer", ""): w for name, w in model.state_dict().items() if ".lora_" not in name}
            assert mine.keys() == base.keys()
            assert all(torch.equal(mine[name], base[name]) for name in base)


# Refusals


def test_zero_modules_is_an_error() -> None:
    with pytest.raises(DirectionMismatch, match="0 modules matched"):
        Dial(models.llama())


def test_a_merged_adapter_is_refused() -> None:
    """Once an adapter is merged PEFT's scale does nothing and raises nothing."""
    turned = valve()
    turned.peft_model.merge_adapter()
    with pytest.raises(DirectionMismatch, match="merged"), turned.at(0.5):
        pass
    with pytest.raises(DirectionMismatch, match="merged"):
        turned.fuse(0.5)
    with pytest.raises(DirectionMismatch, match="merged"):
        turned.generate("q", alpha=0.5, max_new_tokens=2)
    turned.peft_model.unmerge_adapter()
    with turned.at(0.5):
        pass
    merged = models.lora(models.llama())
    merged.merge_adapter()
    with pytest.raises(DirectionMismatch, match="merged"):
        Valve(merged.get_base_model(), models.tokenizer(), direction())


def test_without_a_direction_only_alpha_0_is_a_position() -> None:
    plain = Valve(models.llama(), models.tokenizer())
    assert torch.equal(at(plain, [0.0, 0.0]), models.logits(models.llama()))
    with pytest.raises(SettingError, match=r"alpha 0\.5.*--direction"), plain.at(0.5):
        pass
    with pytest.raises(SettingError, match="no LoRA direction"):
        _ = plain.peft_model


def test_an_exact_task_vector_takes_one_alpha_per_batch(tmp_path: Path) -> None:
    turned = both_kinds(tmp_path)[1]
    with pytest.raises(EngineError, match="one alpha per batch"), turned.at([0.0, 1.0]):
        pass
    with turned.at([0.5, 0.5]):
        pass


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 1e39, [0.5, float("nan")]])
def test_alpha_must_be_a_finite_number(alpha: float | list[float]) -> None:
    turned = valve()
    with pytest.raises(SettingError, match="finite"), turned.at(alpha):
        pass
    with pytest.raises(SettingError, match="finite"):
        turned.generate("q", alpha=alpha)
    assert torch.equal(models.logits(turned.model), models.logits(models.llama()))


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("alpha", [[0.1, 0.2, 0.3], torch.rand(2, 5)], ids=["rows", "tokens"])
def test_as_many_alphas_as_rows_and_tokens(alpha: list[float] | Tensor, grad: bool) -> None:
    turned = valve()
    ids = torch.zeros(2, 7, dtype=torch.long)
    with torch.set_grad_enabled(grad), turned.at(alpha) as model, pytest.raises(EngineError, match="one alpha for the"):
        model(input_ids=ids)


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_layers_that_see_no_rows_take_one_alpha_and_refuse_several(grad: bool) -> None:
    """Experts see tokens without rows, [tokens, width]: broadcasting would have made [rows, tokens, width] of it."""
    turned = valve()
    layer = next(m for m in turned.model.modules() if isinstance(m, LoraLayer))
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
    with torch.set_grad_enabled(grad):
        with turned.at(0.6):
            flat, rows = layer(x), layer(x[None])
        assert flat.shape == (5, layer.out_features)
        torch.testing.assert_close(flat, rows[0], **SAME)
        with turned.at([0.6, 0.7]), pytest.raises(EngineError, match="rows cannot be told apart"):
            layer(x)


def test_heads_apart_take_alphas_of_rows_and_refuse_those_of_tokens() -> None:
    dial = valve().dial
    assert dial is not None
    apart = torch.zeros(2, 3, 4, 5)
    with dial.at(torch.tensor([0.6, 0.7])):
        assert dial.shaped(apart).shape == (2, 1, 1, 1)
    with dial.at(torch.rand(2, 3)), pytest.raises(EngineError, match="rows cannot be told apart"):
        dial.shaped(apart)


# Fusing


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fusing_is_the_position_in_plain_weights(dtype: torch.dtype, alpha: float) -> None:
    turned = valve(dtype=dtype)
    weights = bits(turned.model)
    fused = turned.fuse(alpha)
    assert_same_bits(turned.model, weights)
    assert type(fused) is type(turned.model)
    assert not any(isinstance(module, LoraLayer) for module in fused.modules())
    assert {tensor.dtype for tensor in fused.state_dict().values()} == {dtype}
    expected, got = at(turned, alpha), models.logits(fused)
    if alpha == 0:
        assert torch.equal(got, expected)
        assert_same_bits(fused, bits(models.llama(dtype=dtype)))
        return
    # fp32 sums in another order. bf16 rounds each weight once (2^-9 of it) where `at` rounds each output.
    tolerance = 2e-4 if dtype == torch.float32 else 0.05
    scale = float(expected.float().abs().max())
    assert float((got.float() - expected.float()).abs().max()) < tolerance * scale
    moved = float((expected.float() - at(turned, 0.0).float()).abs().max())
    assert moved > 4 * tolerance * scale or dtype == torch.bfloat16


def test_fused_weights_are_rounded_once() -> None:
    """W + alpha s BA in fp32, then bf16: not bf16(W) + bf16(alpha s BA)."""
    turned = valve(dtype=torch.bfloat16)
    fused, base = turned.fuse(0.7).state_dict(), models.llama(dtype=torch.bfloat16).state_dict()
    for name, layer in turned.dial.layers.items():  # pyright: ignore[reportOptionalMemberAccess]
        A, B = (getattr(layer, part)[ADAPTER].weight.float() for part in ("lora_A", "lora_B"))
        exact = base[f"{name}.weight"].float() + 0.7 * 2 * (B @ A)
        assert torch.equal(fused[f"{name}.weight"], exact.bfloat16()), name


def test_a_broken_direction_does_not_reach_a_model_fused_at_alpha_0() -> None:
    turned = valve()
    with torch.no_grad():
        next(iter(turned.dial.layers.values())).lora_B[ADAPTER].weight[0, 0] = float("nan")  # pyright: ignore
    assert_same_bits(turned.fuse(0.0), bits(models.llama()))


def test_fusing_leaves_the_dial_of_the_model_it_came_from() -> None:
    """Its config too: a model that says it was fused is refused wherever it is loaded with a direction."""
    turned = valve()
    fused = [turned.fuse(alpha) for alpha in (0.7, 0.3)]
    assert [model.config.cotvalve_fused["alpha"] for model in fused] == [0.7, 0.3]
    assert not hasattr(turned.model.config, "cotvalve_fused")
    assert fused[0].generation_config is not turned.model.generation_config


def test_a_quantized_model_is_not_fused() -> None:
    """Its weights are packed numbers, to which no product can be added."""
    turned = valve()
    turned.model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(EngineError, match="a quantized model cannot be fused; load the base without quantization"):
        turned.fuse(0.7)


def test_a_task_vector_is_fused_exactly(tmp_path: Path) -> None:
    turned = both_kinds(tmp_path)[1]
    weights = bits(turned.model)
    fused = turned.fuse(0.5)
    assert_same_bits(turned.model, weights)
    assert torch.equal(models.logits(fused), at(turned, 0.5))
    assert_same_bits(turned.fuse(1.0), bits(models.moved(models.llama())))


@pytest.mark.parametrize("make", models.MAKERS.values(), ids=models.MAKERS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_plain_transformers_reads_a_fused_model(tmp_path: Path, make: object, tied: bool) -> None:
    base: PreTrainedModel = make(tied=tied)  # pyright: ignore[reportCallIssue]
    base.generation_config.temperature, base.generation_config.do_sample = 0.6, True
    turned = Valve(base, models.tokenizer(), direction())
    fused = turned.fuse(0.6)
    assert (fused.get_output_embeddings().weight is fused.get_input_embeddings().weight) == tied
    fused.save_pretrained(tmp_path / "fused")
    turned.tokenizer.save_pretrained(tmp_path / "fused")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "fused", dtype=torch.float32)
    assert type(again) is type(base)
    assert torch.equal(models.logits(again), models.logits(fused))
    torch.testing.assert_close(models.logits(again), at(turned, 0.6), rtol=0, atol=2e-4)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert again.generation_config.temperature == 0.6


def test_a_fused_model_has_no_dial_any_more(tmp_path: Path) -> None:
    direction().save(tmp_path / "direction")
    turned = valve()
    fused = turned.fuse(0.6)
    with pytest.raises(DirectionMismatch, match=r"fused at alpha 0\.6.*no dial"):
        Valve(fused, models.tokenizer(), direction())
    with pytest.raises(DirectionMismatch, match="no dial"):
        Valve.fresh(fused, models.tokenizer(), FitSettings(rank=2).lora(fused))
    fused.save_pretrained(tmp_path / "fused")
    models.tokenizer().save_pretrained(tmp_path / "fused")
    with pytest.raises(DirectionMismatch, match=r"fused at alpha 0\.6"):
        Valve.load(tmp_path / "fused", tmp_path / "direction")
    plain = Valve.load(tmp_path / "fused", device="cpu")
    assert torch.equal(models.logits(plain.model), models.logits(fused))
    with pytest.raises(SettingError, match="no direction"):
        plain.generate("q", alpha=0.5, max_new_tokens=2)


# Loading and use


def test_a_folder_gives_the_valve_it_was_saved_from(tmp_path: Path) -> None:
    models.save(models.llama(), tmp_path / "base")
    direction().save(tmp_path / "direction")
    loaded = Valve.load(tmp_path / "base", tmp_path / "direction", device="cpu")
    assert torch.equal(at(loaded, 0.7), at(valve(), 0.7))
    assert loaded.model.dtype == torch.float32
    again = loaded.current(CARD)
    assert again.factors.keys() == direction().factors.keys()
    assert all(torch.equal(again.factors[n].B, f.B) and torch.equal(again.factors[n].A, f.A) for n, f in direction().factors.items())


def test_a_peft_adapter_of_others_is_a_direction(tmp_path: Path) -> None:
    models.save(models.llama(), tmp_path / "base")
    wrapped = models.lora(models.llama())
    wrapped.save_pretrained(tmp_path / "adapter")
    loaded = Valve.load(tmp_path / "base", tmp_path / "adapter", device="cpu")
    assert torch.equal(at(loaded, 1.0), models.logits(wrapped))


def test_what_was_saved_works_without_us(tmp_path: Path) -> None:
    turned = valve()
    turned.current(CARD).save(tmp_path / "direction")
    theirs = PeftModel.from_pretrained(models.llama(), tmp_path / "direction")
    assert torch.equal(models.logits(theirs.eval()), at(turned, 1.0))


def test_a_direction_that_does_not_fit_names_the_module(tmp_path: Path) -> None:
    direction().save(tmp_path / "direction")
    models.save(models.llama(hidden=48), tmp_path / "wide")
    models.save(models.llama(layers=1), tmp_path / "short")
    with pytest.raises(DirectionMismatch, match=r"model\.layers\.\d\.\w+\.\w+"):
        Valve.load(tmp_path / "wide", tmp_path / "direction")
    with pytest.raises(DirectionMismatch, match=r"model\.layers\.1\."):
        Valve.load(tmp_path / "short", tmp_path / "direction")


def test_a_fresh_lora_changes_nothing_at_any_alpha() -> None:
    base = models.llama()
    plain = models.logits(base)
    fresh = Valve.fresh(base, models.tokenizer(), FitSettings(rank=2).lora(base))
    assert fresh.rows
    for alpha in ALPHAS:
        assert torch.equal(at(fresh, alpha), plain)


def test_two_valves_on_two_models_do_not_turn_each_other() -> None:
    one, other = valve(), valve()
    plain = models.logits(models.llama())
    with one.at(1.0):
        assert torch.equal(models.logits(other.model), plain)
        with other.at(0.5):
            assert torch.equal(models.logits(one.model), at(valve(), 1.0))


def test_a_deep_copy_of_the_model_keeps_its_weights_to_itself() -> None:
    turned = valve()
    before = at(turned, 1.0)
    clone = copy.deepcopy(turned.model)
    with torch.no_grad():
        for weight in clone.parameters():
            weight.zero_()
    assert torch.equal(at(turned, 1.0), before)


def test_generate_answers_questions_outermost_and_alphas_innermost() -> None:
    turned = valve()
    chains = turned.generate(["one", "two"], alpha=[0.0, 1.0], max_new_tokens=6)
    assert [c.alpha for c in chains] == [0.0, 1.0, 0.0, 1.0]
    for question, both in zip(["one", "two"], (chains[:2], chains[2:]), strict=True):
        for chain in both:
            alone = turned.generate(question, alpha=chain.alpha, max_new_tokens=6)
            assert [(c.text, c.tokens, c.finish) for c in alone] == [(chain.text, chain.tokens, chain.finish)]
    assert [c.alpha for c in turned.generate("one", max_new_tokens=2)] == [0.0]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"alpha": 0.5, "tokens": 100}, "give one of alpha, tokens and shorter"),
        ({"tokens": 100}, "cotvalve calibrate"),
        ({"shorter": 0.4}, "cotvalve calibrate"),
        ({"alpha": "half"}, "alpha is 'half'; expected a number"),
        ({"alpha": [0.5, None]}, "expected a number"),
        ({"alpha": [0.5, float("nan")]}, "alpha nan is not a finite number"),
        ({"prompt": "boxd"}, "did you mean 'boxed'"),
        ({"prompt": "budget"}, "needs a token budget; give budget="),
        ({"prompt": "budget", "budget": 0}, "has to be 1 or more"),
        ({"budget": 50}, "with a prompt that names one"),
    ],
)
def test_generate_says_what_it_cannot_do(how: dict[str, object], says: str) -> None:
    with pytest.raises(SettingError, match=says):
        valve().generate("q", **how)


@pytest.mark.parametrize(
    "alpha",
    [np.float32(0.5), torch.tensor(0.5), torch.tensor([0.5]), np.linspace(0.5, 0.5, 1), (0.5,), iter([0.5])],
    ids=["numpy number", "torch number", "tensor", "array", "tuple", "iterator"],
)
def test_generate_takes_a_number_of_any_library(alpha: float) -> None:
    assert [c.alpha for c in valve().generate("q", alpha=alpha, max_new_tokens=2)] == [0.5]


def test_generate_asks_for_a_budget_where_the_prompt_names_one() -> None:
    turned = valve()
    found, asked = turned.generate("q", prompt="budget", budget=50, max_new_tokens=3), render(turned.tokenizer, "q", PROMPTS["budget"], 50)
    assert found[0].prompt_tokens == len(turned.tokenizer(asked)["input_ids"])


# Another direction on the same model


@pytest.mark.parametrize(("other", "stays"), [({"seed": 5}, True), ({"seed": 5, "rank": 3}, False), ({"seed": 5, "lora_alpha": 4}, False), ({"seed": 5, "targets": ["q_proj"]}, False)], ids=str)
def test_another_direction_in_the_place_of_this_one(other: dict[str, object], stays: bool) -> None:
    """As if it had been loaded on a fresh model, whether or not layers had to be exchanged."""
    found = made(**other)  # pyright: ignore[reportArgumentType]
    turned, fresh = valve(), valve(found)
    with turned.at(0.7):
        pass
    assert turned.turn_to(found) is stays
    assert turned.direction is found
    for alpha in (0.0, 0.7, -1.0):
        assert torch.equal(at(turned, alpha), at(fresh, alpha))
    assert torch.equal(models.logits(turned.model), models.logits(models.llama()))


def test_a_move_that_is_interrupted_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the middle of a task vector's way: what has moved goes back, bit for bit."""
    base = models.llama()
    valve = Valve(base, models.tokenizer(), TaskVector.between(models.llama(), models.moved(models.llama())))
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    write, calls = Mover._write, [0]

    def interrupted(self: Mover, name: str, alpha: float, into: Tensor) -> None:
        calls[0] += 1
        if calls[0] == 6:
            raise KeyboardInterrupt
        write(self, name, alpha, into)

    monkeypatch.setattr(Mover, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt), valve.at(0.7):
        pass
    assert calls[0] == 6 + len(before), "it was on its way, and went all of it back"
    assert all(torch.equal(weight, before[name]) for name, weight in base.state_dict().items())
    with valve.at(0.0):
        assert all(torch.equal(weight, before[name]) for name, weight in base.state_dict().items())


def test_two_valves_on_one_model_are_refused() -> None:
    """They would turn one LoRA, and the first would give neither direction."""
    first = Valve.load("tiny-reasoner", "tiny-valve")
    with pytest.raises(DirectionMismatch, match="has an adapter on it already"):
        Valve(first.model, first.tokenizer, Direction.load("tiny-valve"))
    with pytest.raises(DirectionMismatch, match="has an adapter on it already"):
        Valve.fresh(first.model, first.tokenizer, FitSettings(rank=2).lora(first.model))


@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_a_lora_on_a_tied_output_layer_is_fused_into_a_table_of_its_own(tmp_path: Path, alpha: float) -> None:
    base = models.llama(tied=True)
    random = torch.Generator().manual_seed(0)
    shapes = {name: module.weight.shape for name, module in base.named_modules() if name in ("lm_head", "model.layers.0.self_attn.q_proj")}
    factors = {name: Factor(torch.randn(2, columns, generator=random), torch.randn(rows, 2, generator=random), 2) for name, (rows, columns) in shapes.items()}
    assert len(factors) == 2
    valve = Valve(base, models.tokenizer(), Direction(factors, CARD))
    with valve.at(alpha) as model:
        turned = models.logits(model)
    fused = valve.fuse(alpha)
    assert torch.allclose(models.logits(fused), turned, atol=1e-5)
    fused.save_pretrained(tmp_path)
    assert torch.allclose(models.logits(load_model(tmp_path, device="cpu")), turned, atol=1e-5)
    assert fused.config.tie_word_embeddings == (alpha == 0)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_task_vector_that_unties_the_output_layer_is_fused_untied(tmp_path: Path, alpha: float) -> None:
    """Qwen2.5-Math-1.5B to its R1 distillation: the config was copied before the move untied the model, so that the
    fused model tied its output layer to the input's table again."""
    base = models.qwen2(tied=True)
    turned = Valve(base, models.tokenizer(), TaskVector.between(models.qwen2(tied=True), models.qwen2(tied=False, seed=5)))
    fused = turned.fuse(alpha)
    fused.save_pretrained(tmp_path)
    for one in (fused, load_model(tmp_path, device="cpu")):
        assert torch.equal(models.logits(one), at(turned, alpha))


def test_neighbouring_seeds_draw_other_chains() -> None:
    valve = Valve.load("tiny-reasoner", "tiny-valve")
    texts = [[c.text for c in valve.generate("1 + 2?", alpha=[0.5] * 4, temperature=1.5, seed=seed, prompt="plain", max_new_tokens=60)] for seed in (0, 1)]
    assert len({*texts[0], *texts[1]}) == 8


def test_from_a_lora_to_a_task_vector_and_back() -> None:
    base = models.llama()
    vector = TaskVector.between(base, models.moved(base))
    turned = valve()
    assert not turned.turn_to(vector)
    assert torch.equal(at(turned, 0.5), at(valve(vector), 0.5))
    with pytest.raises(EngineError, match="one alpha per batch"), turned.at([0.1, 0.2]):
        pass
    assert not turned.turn_to(direction())
    assert torch.equal(at(turned, [0.5, 1.0]), at(valve(), [0.5, 1.0]))


def test_another_task_vector_in_the_place_of_this_one() -> None:
    """Inside `at` too: what the first has moved goes back, and the second moves the weights its own way."""
    one, other = (TaskVector.between(models.llama(), models.moved(models.llama(), seed=seed)) for seed in (1, 2))
    turned = valve(one)
    with turned.at(0.5):
        assert not turned.turn_to(other)
        assert torch.equal(models.logits(turned.model), models.logits(models.llama()))
    assert torch.equal(models.logits(turned.model), models.logits(models.llama()))
    assert torch.equal(at(turned, 0.5), at(valve(other), 0.5))


@pytest.mark.parametrize("rank", [None, 1], ids=["same layers", "other layers"])
def test_another_direction_has_other_lengths_and_tells_of_another_base(caplog: pytest.LogCaptureFixture, rank: int | None) -> None:
    turned = Valve.load("tiny-reasoner", "tiny-valve")
    assert turned.calibration is not None
    found = turned.direction
    assert isinstance(found, Direction)
    factors = {name: replace(f, A=f.A[:rank], B=f.B[:, :rank]) for name, f in found.factors.items()}
    assert turned.turn_to(Direction(factors, Card("another", base_sha256="0" * 64))) is (rank is None)
    assert turned.calibration is None
    assert "was made on another base than tiny-reasoner" in caplog.text


def test_a_direction_that_does_not_fit_leaves_the_present_one() -> None:
    turned = valve()
    before = at(turned, 0.7)
    wide = models.lora(models.llama(hidden=64))
    factors = {name.replace(f".{ADAPTER}", ""): weight for name, weight in wide.named_parameters() if "lora_" in name}
    with pytest.raises(DirectionMismatch, match="changes a weight of"):
        turned.turn_to(Direction.from_peft(wide.peft_config[ADAPTER], factors, CARD))
    assert torch.equal(at(turned, 0.7), before)
    with pytest.raises(DirectionMismatch, match="the model's is"):
        turned.turn_to(TaskVector.between(models.llama(hidden=64), models.moved(models.llama(hidden=64))))
    assert torch.equal(at(turned, 0.7), before)


@pytest.mark.parametrize("targets", [r".*layers\.[01]\..*[qv]_proj", [f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)]], ids=["regex", "names"])
def test_a_direction_on_the_first_layers_puts_nothing_on_the_others(tmp_path: Path, targets: str | list[str]) -> None:
    """Training that goes on from it (`--direction`) learned on all layers: its endings are those of the layers above as well."""
    wrapped = models.lora(models.llama(layers=4), targets=targets)
    wrapped.save_pretrained(str(tmp_path))
    found = Direction.load(tmp_path)
    turned = Valve(models.llama(layers=4), models.tokenizer(), found)
    assert turned.dial is not None
    assert turned.dial.layers.keys() == found.factors.keys() == turned.current(CARD).factors.keys()
    assert torch.equal(at(turned, 1.0), models.logits(wrapped))


def test_dora_is_read_on_a_model_that_carries_another_lora(tmp_path: Path) -> None:
    """A sweep turns one model from a LoRA to a DoRA, whose difference is made of the base's own weights."""
    adapter = models.lora(models.llama(), seed=4, use_dora=True)
    adapter.save_pretrained(str(tmp_path))
    turned = valve()
    found = load_direction(tmp_path, turned.model)
    assert isinstance(found, TaskVector)
    assert not turned.turn_to(found)
    fresh = models.llama()
    assert torch.equal(at(turned, 1.0), at(Valve(fresh, models.tokenizer(), load_direction(tmp_path, fresh)), 1.0))


def test_layers_that_read_the_same_input_share_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the same numbers up to the order of sums, also after the factors have changed."""
    apart, joined = valve(), valve()
    for factor in (1.0, 3.0):
        for turned in (apart, joined):
            with torch.no_grad():
                for name, side in turned.model.named_parameters():
                    if "lora_A" in name:
                        side.mul_(factor)
        for alpha in (0.0, 0.7, [1.0, 0.0, 0.5]):
            with monkeypatch.context() as patch:
                wanted = at(apart, alpha, rows=3)
                patch.setattr("cotvalve.inlets.JOINED", {"cpu"})
                found = at(joined, alpha, rows=3)
            assert torch.allclose(found, wanted, **SAME)
    assert joined.dial is not None
    inlets = {inlet for inlet in joined.dial.inlets.of.values() if len(inlet.layers) > 1}
    assert len(inlets) == 2 * joined.model.config.num_hidden_layers
    assert all(inlet.down is not None and inlet.x is None for inlet in inlets)


def test_a_shared_product_is_of_the_input_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass that was cut off leaves the product of its own input behind."""
    apart, joined = valve(), valve()
    one, two = torch.randn(2, 1, 3, 32, generator=torch.Generator().manual_seed(0))
    query = "model.layers.0.self_attn.q_proj"
    with torch.no_grad(), apart.at(0.7):
        wanted = apart.model.get_submodule(query)(two)
    monkeypatch.setattr("cotvalve.inlets.JOINED", {"cpu"})
    with torch.no_grad(), joined.at(0.7):
        joined.model.get_submodule(query)(one)
        torch.testing.assert_close(joined.model.get_submodule(query)(two), wanted, **SAME)


def test_what_else_acts_on_a_layer_is_left_to_peft() -> None:
    """PEFT's own switch turns the adapter off inside `at` as well, and factors in fp32 go with a base in bf16, as in training."""
    turned = valve()
    with turned.at(0.7), turned.peft_model.disable_adapter():
        assert torch.equal(models.logits(turned.model), models.logits(models.llama()))
    mixed = valve(dtype=torch.bfloat16)
    for name, parameter in mixed.model.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    assert torch.equal(at(mixed, 0.0), models.logits(models.llama(dtype=torch.bfloat16)))
    assert not torch.equal(at(mixed, 0.7), at(mixed, 0.0))


@pytest.mark.parametrize("inference", [False, True], ids=["usual tensors", "tensors of inference mode"])
def test_a_captured_graph_reads_the_factors_as_they_are(monkeypatch: pytest.MonkeyPatch, inference: bool) -> None:
    """A graph holds on to memory: A of the joined layers stays where it is, also when its numbers change."""
    monkeypatch.setattr("cotvalve.inlets.JOINED", {"cpu"})
    with torch.inference_mode(inference):
        turned = valve()
    assert turned.dial is not None
    with turned.at(0.5):
        inlet = next(inlet for inlet in turned.dial.inlets.of.values() if len(inlet.layers) > 1)
    assert inlet.down is not None
    place, before = inlet.down.data_ptr(), inlet.down.clone()
    with torch.inference_mode(inference), torch.no_grad():
        inlet.layers[0].lora_A[ADAPTER].weight.mul_(2)
    for inside in (False, True):
        with torch.inference_mode(inside), turned.at(0.5):
            pass
        assert inlet.down.data_ptr() == place
    rank = len(inlet.layers[0].lora_A[ADAPTER].weight)
    assert torch.equal(inlet.down[:rank], 2 * before[:rank])
    assert torch.equal(inlet.down[rank:], before[rank:])


@pytest.mark.parametrize("kind", ["glm4_moe", "laguna"])
def test_a_direction_on_shared_experts_is_put_on_those_modules(kind: str) -> None:
    """PEFT converts adapters of transformers 4 by the names of their modules: that moved these to the stacked experts, or lost them."""
    config = AutoConfig.for_model(
        kind, vocab_size=models.VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, moe_intermediate_size=32, shared_expert_intermediate_size=32, num_experts=4,
        n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    names = [name for name in Anatomy.of(model).linears if name.endswith(("shared_experts.gate_proj", "layers.0.mlp.up_proj", "q_proj"))]
    shapes = [model.get_parameter(f"{name}.weight").shape for name in names]
    found = Direction({n: Factor(torch.randn(2, wide), torch.randn(high, 2), 2) for n, (high, wide) in zip(names, shapes, strict=True)}, CARD)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, factor in found.factors.items():
            moved.get_parameter(f"{name}.weight").add_(0.5 * factor.delta())
    turned = Valve(model, models.tokenizer(), found)
    assert set(turned.dial.layers) == set(names)
    torch.testing.assert_close(at(turned, 0.5), models.logits(moved), **SAME)
    torch.testing.assert_close(models.logits(turned.fuse(0.5)), models.logits(moved), **SAME)
    assert turned.turn_to(-1 * found)
    torch.testing.assert_close(at(turned, -0.5), models.logits(moved), **SAME)


@pytest.mark.parametrize("alpha", [0.0, 0.5, [0.0, 0.7]])
def test_an_alpha_that_is_learned_has_its_slope_at_0_too(alpha: float | list[float]) -> None:
    """It was 0 there, so that an alpha that began at the base stayed there."""
    turned = valve()
    learned = torch.tensor(alpha, requires_grad=True)
    with turned.at(learned) as model:
        ids = torch.arange(14).view(2, 7)
        model(input_ids=ids, labels=ids).loss.backward()
    step = 1e-3
    for place in range(learned.numel()):
        ends = []
        for way in (step, -step):
            shifted = learned.detach().clone()
            shifted.view(-1)[place] += way
            with turned.at(shifted) as model, torch.no_grad():
                ends.append(float(model(input_ids=ids, labels=ids).loss))
        # fp32 losses of about 6 differ by less than 1e-6 from the exact ones, and a slope by 1e-3 of that.
        assert learned.grad is not None
        assert float(learned.grad.view(-1)[place]) == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=5e-3)


def test_a_broken_direction_does_not_leak_through_a_learned_alpha() -> None:
    turned = valve()
    with torch.no_grad():
        next(iter(turned.dial.layers.values())).lora_A[ADAPTER].weight.fill_(float("nan"))
    with turned.at(torch.tensor(0.0, requires_grad=True)) as model:
        assert torch.equal(model(input_ids=torch.arange(14).view(2, 7)).logits, turned.model(input_ids=torch.arange(14).view(2, 7)).logits)


@pytest.mark.parametrize(
    "alpha", [None, "half", {0: 1}, [[0.1], [0.2, 0.3]], torch.full((2, 7, 1), 0.5), [], torch.ones(2, dtype=torch.complex64)], ids=str
)
def test_what_is_no_alpha_is_told_in_one_line(alpha: object) -> None:
    """They were errors of torch, or of unpacking a shape."""
    with pytest.raises(SettingError, match=r"^alpha .*expected a number"), valve().at(alpha):  # pyright: ignore[reportArgumentType]
        pass


@pytest.mark.parametrize("alpha", [np.float32(0.5), torch.tensor(0.5), torch.tensor([0.5])])
def test_a_model_fused_at_a_number_of_another_library_can_be_saved(tmp_path: Path, alpha: float) -> None:
    """config.json takes Python's numbers only: save_pretrained ended in a TypeError."""
    fused = valve().fuse(alpha)
    fused.save_pretrained(tmp_path)
    with pytest.raises(DirectionMismatch, match=r"fused at alpha 0\.5"):
        Valve(AutoModelForCausalLM.from_pretrained(tmp_path), models.tokenizer(), direction())
    with pytest.raises(SettingError, match="alpha is None; expected one number"):
        valve().fuse(None)  # pyright: ignore[reportArgumentType]


def test_beams_are_rows() -> None:
    """transformers repeats a prompt for each of its beams: the alphas of prompts are refused, repeated ones are those of separate runs."""
    turned, alphas = valve(), torch.tensor([0.3, 1.0])
    how = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 256}
    ids = torch.arange(14).view(2, 7)
    with pytest.raises(EngineError, match="or one for each beam"), turned.at(alphas) as model:
        model.generate(input_ids=ids, **how)  # pyright: ignore
    with turned.at(alphas.repeat_interleave(3)) as model:
        together = model.generate(input_ids=ids, **how)  # pyright: ignore
    for row, alpha in enumerate(alphas.tolist()):
        with turned.at(alpha) as model:
            alone = model.generate(input_ids=ids[row : row + 1], **how)  # pyright: ignore
        assert torch.equal(together[2 * row : 2 * row + 2], alone)
