"""Low-rank factors of the difference of two checkpoints: what they keep, what they cannot carry."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM, Llama4ForCausalLM, Llama4TextConfig

from cotvalve import Valve
from cotvalve.adapters import Factor
from cotvalve.direction import Direction, check_fits
from cotvalve.errors import DataError, DirectionMismatch, SettingError
from cotvalve.extraction import extract, low_rank
from cotvalve.fitting import target_modules
from cotvalve.taskvector import TaskVector
from cotvalve.weights import Anatomy
from tests import models
from tests.test_taskvector import EMBEDDINGS, HEAD, Make, pair


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("make", models.MAKERS.values(), ids=models.MAKERS)
def test_full_rank_is_the_difference_itself(make: Make, tied: bool) -> None:
    base = make(tied=tied)
    reasoner = models.moved(base)
    found = extract(base, reasoner, rank=1000)
    assert isinstance(found.direction, Direction)
    assert check_fits(found.direction, base) == 14
    for module, factor in found.direction.factors.items():
        delta = reasoner.get_submodule(module).weight - base.get_submodule(module).weight
        torch.testing.assert_close(factor.delta(), delta, rtol=1e-4, atol=1e-6)
        # Balanced: neither factor carries the other's scale.
        torch.testing.assert_close(factor.A.norm(), factor.B.norm())
    assert all(kept.energy == pytest.approx(1, abs=1e-5) for kept in found.kept)


def test_energy_is_what_the_factors_keep_and_grows_with_rank() -> None:
    base = models.qwen2()
    reasoner = models.moved(base)
    before: dict[str, float] = {}
    for rank in (1, 2, 4, 8, 16, 32):
        found = extract(base, reasoner, rank=rank)
        assert isinstance(found.direction, Direction)
        for kept in found.kept:
            delta = reasoner.get_submodule(kept.module).weight - base.get_submodule(kept.module).weight
            left = (delta - found.direction.factors[kept.module].delta()).square().sum() / delta.square().sum()
            assert kept.energy == pytest.approx(1 - float(left.detach()), abs=1e-4)
            assert kept.energy > before.get(kept.module, 0) or kept.energy == pytest.approx(1)
            before[kept.module] = kept.energy
        in_modules = 1 - sum(found.left_out.values())
        assert found.energy == pytest.approx(found.within * in_modules, abs=1e-5)
    assert found.within == pytest.approx(1, abs=1e-5)


def test_what_lora_cannot_carry_is_reported_by_kind() -> None:
    base = models.qwen2()
    reasoner = models.moved(base)
    found = extract(base, reasoner, rank=2)
    square = {
        name: float((reasoner.get_parameter(name) - base.get_parameter(name)).detach().double().square().sum())
        for name, _ in base.named_parameters()
    }
    total = sum(square.values())
    assert found.left_out == {
        "embeddings": pytest.approx(square[EMBEDDINGS] / total),
        "output layer": pytest.approx(square[HEAD] / total),
        "norms": pytest.approx(sum(value for name, value in square.items() if "norm" in name) / total),
        "biases": pytest.approx(sum(value for name, value in square.items() if "bias" in name) / total),
        "other": 0,
    }
    assert extract(models.llama(tied=True), models.moved(models.llama(tied=True)), rank=2).left_out["output layer"] == 0
    assert "of the whole change kept" in str(found)


def test_a_low_rank_change_is_found_again(tmp_path: Path) -> None:
    """Extracting base -> base + LoRA gives a direction that PEFT turns back into the same model."""
    wrapped = models.lora(models.llama(), rank=3)
    merged = wrapped.merge_and_unload()
    found = extract(models.llama(), merged, rank=3, toward="shorter")
    assert found.energy == pytest.approx(1, abs=1e-6)
    # Its embeddings, the first tensor there is, did not move.
    assert isinstance(extract(models.llama(), merged).direction, TaskVector)
    found.save(tmp_path / "d")
    assert json.loads((tmp_path / "d" / "extraction.json").read_text())["rank"] == 3
    assert Direction.load(tmp_path / "d").card.toward == "shorter"
    again = PeftModel.from_pretrained(models.llama(), tmp_path / "d")
    # fp32 rounding of the merge and of the SVD, through two layers.
    torch.testing.assert_close(models.logits(again), models.logits(merged), rtol=1e-4, atol=1e-4)


def test_modules_are_chosen_by_ending_and_reach_no_other(tmp_path: Path) -> None:
    base, reasoner = models.llama(), models.moved(models.llama())
    found = extract(base, reasoner, rank=2, modules=["up_proj", "layers.1.self_attn.q_proj"])
    assert isinstance(found.direction, Direction)
    assert sorted(found.direction.factors) == [
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
    ]
    assert found.energy + sum(found.left_out.values()) <= 1
    # PEFT puts a LoRA on all that the folder names.
    for number, some in enumerate((found, extract(base, reasoner, rank=2, modules=["layers.0.mlp.up_proj"]))):
        assert isinstance(some.direction, Direction)
        again = PeftModel.from_pretrained(models.llama(), some.save(tmp_path / str(number)))
        held = [name.removeprefix("base_model.model.") for name, module in again.named_modules() if isinstance(module, LoraLayer)]
        assert sorted(held) == sorted(some.direction.factors)
    with pytest.raises(SettingError, match=r"unknown module 'up_prj': did you mean 'up_proj'\?"):
        extract(base, reasoner, rank=2, modules=["up_prj"])
    with pytest.raises(SettingError, match="unknown module 'proj'"):  # half a name: "1.mlp.up_proj" would be layer 11's as well
        extract(base, reasoner, rank=2, modules=["proj"])


def test_shares_are_those_of_whole_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are summed by blocks of rows, of which these models have one and a vocabulary dozens."""
    base, reasoner = models.qwen2(), models.moved(models.qwen2())
    whole = extract(base, reasoner, rank=2)
    monkeypatch.setattr("cotvalve.extraction._BLOCK_ROWS", 7)
    blocks = extract(base, reasoner, rank=2)
    assert blocks.left_out == pytest.approx(dict(whole.left_out), rel=1e-6)
    assert (blocks.energy, blocks.within) == pytest.approx((whole.energy, whole.within), rel=1e-6)


def test_sketches_are_the_seed_s_and_keep_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of large matrices, on small ones."""
    monkeypatch.setattr("cotvalve.extraction._EXACT_UP_TO", 8)
    monkeypatch.setattr("cotvalve.extraction._EXTRA_COLUMNS", 2)
    monkeypatch.setattr("cotvalve.extraction._POWER_ITERATIONS", 1)
    base, reasoner = models.llama(), models.moved(models.llama())
    one, same, other = (extract(base, reasoner, rank=4, seed=seed) for seed in (0, 0, 1))
    assert isinstance(one.direction, Direction)
    assert isinstance(same.direction, Direction)
    assert isinstance(other.direction, Direction)
    assert one.direction.sha256() == same.direction.sha256() != other.direction.sha256()
    for kept in one.kept:
        delta = reasoner.get_submodule(kept.module).weight - base.get_submodule(kept.module).weight
        left = (delta - one.direction.factors[kept.module].delta()).square().sum() / delta.square().sum()
        assert kept.energy == pytest.approx(1 - float(left.detach()), abs=1e-4)


def test_bf16_checkpoints_are_subtracted_in_fp32(tmp_path: Path) -> None:
    base = models.llama(dtype=torch.bfloat16)
    reasoner = models.moved(base)
    found = extract(*pair(tmp_path, base, reasoner), rank=32)
    assert isinstance(found.direction, Direction)
    module, factor = next(iter(found.direction.factors.items()))
    delta = reasoner.get_submodule(module).weight.float() - base.get_submodule(module).weight.float()
    torch.testing.assert_close(factor.delta(), delta, rtol=1e-4, atol=1e-6)


def test_no_rank_is_the_exact_vector_and_progress_is_told() -> None:
    base, reasoner = models.llama(), models.moved(models.llama())
    assert isinstance(extract(base, reasoner).direction, TaskVector)
    told: list[tuple[int, int]] = []
    extract(base, reasoner, rank=1, progress=lambda _task, done, total, _note="": told.append((done, total)))
    assert told[0] == (0, 21)
    assert told[-1] == (21, 21)


def test_bad_extractions() -> None:
    base = models.llama()
    with pytest.raises(DataError, match="are equal: there is no direction between them"):
        extract(base, models.llama(), rank=2)
    with pytest.raises(DataError, match="are equal: there is no direction between them"):
        extract(base, models.llama())
    with pytest.raises(SettingError, match="rank is 0; expected 1 or more"):
        extract(base, models.moved(base), rank=0)
    with pytest.raises(SettingError, match="modules were chosen without a rank"):
        extract(base, models.moved(base), modules=["q_proj"])


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj", "model.norm"])
def test_a_checkpoint_that_diverged_is_named_by_its_tensor(name: str) -> None:
    reasoner = models.moved(models.llama())
    with torch.no_grad():
        reasoner.get_parameter(f"{name}.weight").view(-1)[0] = float("nan")
    with pytest.raises(DataError, match=rf"{name}\.weight: .*holds NaN or infinity"):
        extract(models.llama(), reasoner, rank=2)


def test_a_layer_that_gives_more_than_its_product_gets_no_factors() -> None:
    """Llama 4's routers are a kind of nn.Linear that gives scores and logits: the direction failed at the first token."""
    config = Llama4TextConfig(
        vocab_size=272, hidden_size=32, intermediate_size=32, intermediate_size_mlp=32, num_hidden_layers=1, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=2, pad_token_id=256, bos_token_id=None, eos_token_id=258,
    )  # fmt: skip
    base = models._filled(Llama4ForCausalLM(config), 0)  # pyright: ignore[reportPrivateUsage]
    found = extract(base, models.moved(base), rank=2).direction
    assert isinstance(found, Direction)
    assert "model.layers.0.self_attn.q_proj" in found.factors
    assert not [name for name in found.factors if "router" in name]
    before = models.logits(base)
    with Valve(base, models.tokenizer(), found).at(1.0) as model:
        assert not torch.equal(models.logits(model), before)


def test_matrices_of_which_all_singular_values_can_be_had_are_not_sketched() -> None:
    delta = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    A, B, values = low_rank(delta, 2)
    assert torch.equal(A, low_rank(delta, 2, seed=1)[0])
    assert float((delta - B @ A).square().sum()) == pytest.approx(float(torch.linalg.svdvals(delta)[2:].square().sum()), rel=1e-5)
    torch.testing.assert_close(values, torch.linalg.svdvals(delta)[:2])


def test_large_matrices_keep_almost_the_optimum() -> None:
    """Randomised against exact singular values on a slowly falling spectrum, as deltas of fine-tuning have."""
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(1300, 1100, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(1400, 1100, generator=generator)).Q
    spectrum = 1 / torch.arange(1, 1101).sqrt()
    delta = left * spectrum @ right.T
    A, B, values = low_rank(delta, 16)
    best, kept = float(spectrum[:16].square().sum()), float(values.square().sum())
    assert 0.99 * best < kept <= best * 1.00001
    residual = float((delta - B @ A).square().sum())
    assert residual == pytest.approx(float(spectrum.square().sum()) - kept, rel=1e-4)
    again = low_rank(delta, 16)
    assert torch.equal(A, again[0])
    assert not torch.equal(A, low_rank(delta, 16, seed=1)[0])


@pytest.mark.parametrize(("kind", "bare"), [("jamba", ["dt_proj"]), ("mamba", ["dt_proj", "out_proj"])])
def test_a_layer_whose_weight_the_model_reads_by_itself_gets_no_factors(kind: str, bare: list[str]) -> None:
    """Mamba multiplies with dt_proj.weight: a LoRA there turned nothing. On its out_proj PEFT ended in a traceback."""
    sizes = {"vocab_size": 272, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(kind, **sizes, time_step_rank=4, mamba_dt_rank=4, num_experts=2, attn_layer_period=2, attn_layer_offset=1, pad_token_id=0)
    base = models._filled(AutoModelForCausalLM.from_config(config).float(), 0)  # pyright: ignore[reportPrivateUsage]
    reasoner = models.moved(base)
    with torch.no_grad():
        for name in Anatomy.of(base).shapes:
            if name.removesuffix(".weight") not in Anatomy.of(base).linears:
                reasoner.get_parameter(name).copy_(base.get_parameter(name))
    expected = models.logits(reasoner)
    found = extract(base, reasoner, rank=64).direction
    assert isinstance(found, Direction)
    assert not [name for name in found.factors if name.endswith(tuple(bare))]
    with Valve(base, models.tokenizer(), found).at(1.0) as model:
        torch.testing.assert_close(models.logits(model), expected, rtol=0, atol=1e-3)
    module = next(name for name, _ in base.named_modules() if name.endswith(f".{bare[-1]}"))
    wide = base.get_submodule(module)
    other = Direction({module: Factor(torch.ones(1, wide.in_features), torch.ones(wide.out_features, 1), 1)}, found.card)  # pyright: ignore
    with pytest.raises(DirectionMismatch, match=rf"{bare[-1]}: .* reads its weight without calling it"):
        check_fits(other, base)
    assert not {*bare} & {*target_modules(base, "all")}


def test_a_tensor_without_dimensions_counts_as_any_other() -> None:
    """Apertus has single numbers in its activations: they were an IndexError."""
    config = AutoConfig.for_model("apertus", vocab_size=272, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, pad_token_id=0)
    base = models._filled(AutoModelForCausalLM.from_config(config).float(), 0)  # pyright: ignore[reportPrivateUsage]
    assert any(shape == () for shape in Anatomy.of(base).shapes.values())
    found = extract(base, models.moved(base), rank=2)
    assert found.energy + sum(found.left_out.values()) <= 1
