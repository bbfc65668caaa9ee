"""A LoRA direction: its arithmetic as laws, its folder, and what it refuses."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from transformers import GPT2Config, GPT2LMHeadModel

from cotvalve.adapters import Factor, endings
from cotvalve.direction import Card, Direction, check_fits, load_direction
from cotvalve.engines.vllm_adapters import write_direction
from cotvalve.errors import DirectionMismatch, SettingError
from tests import models

CARD = Card("base", "shorter", "valve", "trained on short chains", {"seed": "0"})
RANKS = {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"v_proj": 3}}


def direction(seed: int = 2, card: Card = CARD, **config: object) -> Direction:
    wrapped = models.lora(models.qwen2(), seed=seed, **config)
    return Direction.from_peft(wrapped.peft_config["default"], _factors(wrapped), card)


def _factors(wrapped: PeftModel) -> dict[str, torch.Tensor]:
    return {name.replace(".default", ""): weight for name, weight in wrapped.named_parameters() if "lora_" in name}


def assert_equal(a: Direction, b: Direction) -> None:
    """The same factors, bit for bit."""
    assert a.factors.keys() == b.factors.keys()
    for name, factor in a.factors.items():
        other = b.factors[name]
        assert torch.equal(factor.A, other.A)
        assert torch.equal(factor.B, other.B)
        assert (factor.lora_alpha, factor.rslora) == (other.lora_alpha, other.rslora)


def assert_change(a: Direction, expected: dict[str, torch.Tensor]) -> None:
    """The same change of weights, up to the rounding of fp32 products of random normal factors."""
    assert a.factors.keys() == expected.keys()
    for name, factor in a.factors.items():
        torch.testing.assert_close(factor.delta(), expected[name], rtol=1e-5, atol=1e-6)


def change(a: Direction) -> dict[str, torch.Tensor]:
    return {name: factor.delta() for name, factor in a.factors.items()}


# Laws


def test_delta_is_scale_times_b_a() -> None:
    factor = Factor(A=torch.tensor([[1.0, 2.0]]), B=torch.tensor([[3.0], [0.0], [-1.0]]), lora_alpha=2)
    assert factor.delta().tolist() == [[6, 12], [0, 0], [-2, -4]]
    assert factor.shape == (3, 2)


@pytest.mark.parametrize(
    ("rank", "lora_alpha", "rslora", "scale"), [(4, 8, False, 2), (16, 8, True, 2), (2, 3, False, 1.5)]
)
def test_scale(rank: int, lora_alpha: float, rslora: bool, scale: float) -> None:
    assert Factor(torch.zeros(rank, 5), torch.zeros(7, rank), lora_alpha, rslora).scale == scale


def test_scaling_is_exact_and_undone_by_its_inverse() -> None:
    d = direction()
    assert_equal(1 * d, d)
    assert_equal(2 * d, d * 2)
    assert_equal((2 * d) / 2, d)
    assert_equal(-1 * -d, d)
    assert_equal(-2 * d, -(2 * d))
    assert_change(2 * d, {name: 2 * delta for name, delta in change(d).items()})
    assert_change(-d, {name: -delta for name, delta in change(d).items()})
    assert_change(0 * d, {name: torch.zeros_like(delta) for name, delta in change(d).items()})


def test_sums_add_changes_and_ranks() -> None:
    d, e = direction(2), direction(3, lora_alpha=3)
    both = {name: delta + change(e)[name] for name, delta in change(d).items()}
    assert_change(d + e, both)
    assert_change(e + d, both)
    assert_change(d + d, change(2 * d))
    assert_change(d - d, change(0 * d))
    assert {factor.rank for factor in (d + e).factors.values()} == {8}


def test_sum_takes_modules_of_either_and_plain_and_rslora() -> None:
    d, e = direction(2, targets=["q_proj"]), direction(3, targets=["v_proj"], use_rslora=True)
    total = d + e
    assert_change(total, {**change(d), **change(e)})
    assert total.targets == ("q_proj", "v_proj")


def test_bf16_factors_with_two_scales_are_not_rounded_again() -> None:
    def factor(seed: int, lora_alpha: float) -> Factor:
        generator = torch.Generator().manual_seed(seed)
        A, B = torch.randn(2, 8, generator=generator), torch.randn(8, 2, generator=generator)
        return Factor(A.bfloat16(), B.bfloat16(), lora_alpha)

    a, b = factor(0, 1), factor(1, 3)
    torch.testing.assert_close((a + b).delta(), a.delta() + b.delta(), rtol=1e-5, atol=1e-6)


def test_negation_turns_toward_round_and_a_sum_of_both_ways_has_none() -> None:
    d = direction()
    assert (d.card.toward, (-d).card.toward, (3 * d).card.toward, (0 * d).card.toward) == (
        "shorter",
        "longer",
        "shorter",
        None,
    )
    assert (d - d).card.toward is None
    assert (-Direction(d.factors, Card("base"))).card.toward is None


def test_its_digest_is_of_the_change_and_of_nothing_else() -> None:
    one = Factor(torch.ones(1, 2), torch.ones(3, 1), 1)
    others = [Factor(2 * one.A, one.B, 1), Factor(one.A, 2 * one.B, 1), Factor(one.A, one.B, 2), Factor(one.A.bfloat16(), one.B.bfloat16(), 1)]
    found = [Direction({"a": one, "b": factor}, CARD).sha256() for factor in (one, *others)]
    assert len(set(found)) == 5
    assert Direction({"b": one, "c": one}, CARD).sha256() not in found
    assert Direction({"b": others[0], "a": one}, Card("another")).sha256() == found[1], "in any order, with any card"


def test_it_is_immutable() -> None:
    d = direction()
    with pytest.raises(TypeError):
        d.factors["x"] = next(iter(d.factors.values()))  # pyright: ignore[reportIndexIssue]
    with pytest.raises(AttributeError):
        d.card = CARD  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("by", [math.nan, math.inf])
def test_multiplier_must_be_finite(by: float) -> None:
    with pytest.raises(SettingError, match=f"a direction was multiplied by {by}; expected a finite number"):
        _ = by * direction()


def test_divisor_must_not_be_0() -> None:
    with pytest.raises(SettingError, match="a direction was divided by 0"):
        _ = direction() / 0


def test_sum_of_different_bases_names_the_module() -> None:
    wide = models.lora(models.qwen2(hidden=64))
    other = Direction.from_peft(wide.peft_config["default"], _factors(wide), CARD)
    with pytest.raises(
        DirectionMismatch, match=r"model.layers.0.self_attn.q_proj: changes a weight of \[32, 32\] in one"
    ):
        _ = direction() + other


# The folder


@pytest.mark.parametrize(
    "config", [{}, {"use_rslora": True}, {"lora_alpha": 2.96}, RANKS, {"use_rslora": True, **RANKS}]
)
@pytest.mark.parametrize("make", models.MAKERS.values(), ids=models.MAKERS)
def test_peft_reads_our_folder_and_agrees(tmp_path: Path, make: object, config: dict[str, object]) -> None:
    """Guarantee 5: the scale PEFT applies is ours, for LoRA and rsLoRA, with ranks and alphas by module."""
    wrapped = models.lora(make(), **config)  # pyright: ignore[reportCallIssue]
    d = Direction.from_peft(wrapped.peft_config["default"], _factors(wrapped), CARD)
    again = PeftModel.from_pretrained(make(), d.save(tmp_path / "d"))  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(models.logits(again), models.logits(wrapped), rtol=0, atol=1e-5)
    for name, module in again.base_model.model.named_modules():
        if name in d.factors:
            assert module.scaling["default"] == d.factors[name].scale


@pytest.mark.parametrize("by", [2, -1, 0.37, -1.5])
def test_a_scaled_direction_is_scaled_in_peft(tmp_path: Path, by: float) -> None:
    d = direction(**RANKS)
    model = models.qwen2()
    with torch.no_grad():
        for name, delta in change(d).items():
            model.get_submodule(name).weight += by * delta
    scaled = PeftModel.from_pretrained(models.qwen2(), (by * d).save(tmp_path / "d"))
    # fp32; the merged weights are summed in another order than the branch.
    torch.testing.assert_close(models.logits(scaled), models.logits(model), rtol=1e-5, atol=2e-5)


def test_round_trip_is_exact_to_the_byte(tmp_path: Path) -> None:
    d = 1.0 * direction(lora_alpha=7, use_rslora=True, **RANKS)
    d.save(tmp_path / "one")
    loaded = Direction.load(tmp_path / "one")
    loaded.save(tmp_path / "two")
    assert_equal(loaded, d)
    assert loaded.card == CARD
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == CARD.base
    assert repr(config["lora_alpha"]) == "7", "not 7.0: some readers take integers only"
    for file in ("adapter_config.json", "adapter_model.safetensors", "direction.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_modules_may_share_a_factor(tmp_path: Path) -> None:
    """safetensors does not write one piece of memory under two names: saving was its RuntimeError."""
    shared = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    names = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"
    d = Direction({name: Factor(shared, 1.0 + torch.arange(64.0).view(32, 2), 4) for name in names}, CARD)
    again = Direction.load(d.save(tmp_path / "direction"))
    assert all(torch.equal(again.factors[name].A, shared) for name in names)
    assert again.sha256() == d.sha256()
    write_direction(d, tmp_path / "vllm")


def test_peft_s_own_folder_is_read(tmp_path: Path) -> None:
    """An adapter trained elsewhere has no card: its base is PEFT's, where it leads is not known."""
    base = models.qwen2()
    base.name_or_path = str(models.save(models.qwen2(), tmp_path / "base"))
    wrapped = models.lora(base, **RANKS)
    wrapped.save_pretrained(str(tmp_path / "d"))
    found = load_direction(tmp_path / "d")
    assert isinstance(found, Direction)
    assert found.card == Card(base.name_or_path, None, "adapter")
    assert_equal(found, Direction.from_peft(wrapped.peft_config["default"], _factors(wrapped), CARD))


def test_lora_config_and_state_dict_put_the_direction_on_a_model() -> None:
    d = direction(use_rslora=True, **RANKS)
    model = models.qwen2()
    assert check_fits(d, model) == len(d.factors) == 14
    wrapped = get_peft_model(model, d.lora_config())
    told = set_peft_model_state_dict(wrapped, d.state_dict())
    assert not told.unexpected_keys
    assert not [key for key in told.missing_keys if "lora_" in key]
    expected = models.lora(models.qwen2(), use_rslora=True, **RANKS)
    torch.testing.assert_close(models.logits(wrapped), models.logits(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", ["all-linear", r".*\.(q|v)_proj"])
def test_targets_are_endings_not_whole_names(tmp_path: Path, how: str) -> None:
    d = direction(targets=how)
    expected = sorted(models.PROJECTIONS) if how == "all-linear" else ["q_proj", "v_proj"]
    d.save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == expected


def test_a_direction_on_some_layers_reaches_no_other(tmp_path: Path) -> None:
    """layers_to_transform=[0] with the ending q_proj would put empty factors on layer 1 as well."""
    d = direction(targets=["q_proj"], layers_to_transform=[0])
    assert d.targets == ("model.layers.0.self_attn.q_proj",)
    again = PeftModel.from_pretrained(models.qwen2(), d.save(tmp_path))
    assert sum("lora_A" in name for name, _ in again.named_parameters()) == 1


def test_a_direction_on_the_first_layers_by_a_pattern_reaches_no_other(tmp_path: Path) -> None:
    """The ending q_proj stood for layer 0 alone, and put empty factors on layer 1 as well."""
    d = direction(targets=r"model\.layers\.0\..*\.(q|up)_proj")
    assert d.targets == ("model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj")
    again = PeftModel.from_pretrained(models.qwen2(), d.save(tmp_path))
    assert sum("lora_A" in name for name, _ in again.named_parameters()) == 2


def test_endings_keep_whole_names_where_layers_differ() -> None:
    assert endings(["m.layers.0.q", "m.layers.1.q", "m.layers.0.v", "m.layers.1.v"]) == ("q", "v")
    assert endings(["m.layers.0.q", "m.layers.2.q"]) == ("m.layers.0.q", "m.layers.2.q")
    assert endings(["m.layers.0.q", "m.layers.1.v"]) == ("m.layers.0.q", "m.layers.1.v")


# Fitting a model


def test_it_fits_its_base_wrapped_or_not() -> None:
    assert check_fits(direction(), models.qwen2()) == 14
    assert check_fits(direction(), models.lora(models.qwen2())) == 14


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (
            lambda: models.qwen2(layers=1),
            "model.layers.1.mlp.down_proj: not in the model; 7 of 14 modules of the direction for 'base' match; "
            "give the direction's own base",
        ),
        (
            lambda: models.qwen2(hidden=64),
            "model.layers.0.mlp.down_proj: the direction for 'base' changes a weight of [32, 64], the model's is "
            "[64, 128]; give the direction's own base",
        ),
        (
            lambda: torch.nn.Sequential(torch.nn.Linear(2, 2)),
            "model.layers.0.mlp.down_proj: 0 of 14 modules of the direction for 'base' are in the model; the nearest "
            "it has is '0'; give the direction's own base",
        ),
    ],
    ids=["layers", "shape", "none"],
)
def test_a_direction_that_does_not_fit_names_the_module(tmp_path: Path, model: object, says: str) -> None:
    d = Direction.load(direction().save(tmp_path))
    with pytest.raises(DirectionMismatch) as error:
        check_fits(d, model())  # pyright: ignore[reportCallIssue]
    assert str(error.value) == says


def test_a_layer_that_is_not_linear_is_named_as_what_it_is() -> None:
    """GPT-2's are Conv1D: "give the direction's own base" was no help to those who had."""
    base = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=2, n_positions=8))
    d = Direction({"transformer.h.0.attn.c_attn": Factor(torch.ones(1, 8), torch.ones(24, 1), 1)}, CARD)
    with pytest.raises(DirectionMismatch, match=r"^transformer\.h\.0\.attn\.c_attn: is a Conv1D in the model"):
        check_fits(d, base)


def test_a_merged_adapter_is_recognised() -> None:
    """PEFT turns the scale of a merged adapter without a word and without effect (PAPER.md, section 6)."""
    wrapped = models.lora(models.qwen2())
    wrapped.merge_adapter()
    with pytest.raises(
        DirectionMismatch, match=r"q_proj: an adapter is merged into this weight, so alpha could not move it"
    ):
        check_fits(direction(), wrapped)


def test_a_fused_model_is_recognised() -> None:
    model = models.qwen2()
    model.config.cotvalve_fused = {"alpha": 0.7, "base": "owner/base"}
    with pytest.raises(
        DirectionMismatch, match=r"was fused at alpha 0.7 and has no dial any more; load the base .*owner/base"
    ):
        check_fits(direction(), model)


def test_training_that_goes_on_does_not_change_a_direction_that_was_taken() -> None:
    wrapped = models.lora(models.qwen2())
    taken = Direction.from_peft(wrapped.peft_config["default"], _factors(wrapped), CARD)
    with torch.no_grad():
        for weight in _factors(wrapped).values():
            weight.zero_()
    assert_equal(taken, direction())


def test_plain_and_rslora_modules_do_not_make_one_direction() -> None:
    with pytest.raises(DirectionMismatch, match="one flag for all"):
        Direction({name: Factor(torch.ones(2, 3), torch.ones(3, 2), 1, name == "a") for name in "ab"}, CARD)


def test_a_direction_without_modules() -> None:
    with pytest.raises(DirectionMismatch, match="needs at least one module with LoRA factors; 0 were given"):
        Direction({}, CARD)
