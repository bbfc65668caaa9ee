"""theta2 - theta1: exact at any alpha, from disk or memory; its folder; DoRA; and its low-rank extraction."""

import copy
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from cotvalve.checkpoints import load_model
from cotvalve.direction import load_direction
from cotvalve.errors import DataError, DirectionMismatch, SettingError
from cotvalve.mover import Mover
from cotvalve.taskvector import TaskVector, from_dora
from cotvalve.weights import Checkpoint, Held, Loaded
from tests import models

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
Make = Callable[..., PreTrainedModel]


def pair(tmp_path: Path, base: PreTrainedModel, reasoner: PreTrainedModel | None = None) -> tuple[Path, Path]:
    """A base and its reasoner as folders."""
    reasoner = models.moved(base) if reasoner is None else reasoner
    return models.save(base, tmp_path / "base"), models.save(reasoner, tmp_path / "reasoner")


def assert_same_bits(a: PreTrainedModel, b: PreTrainedModel) -> None:
    mine, theirs = a.state_dict(), b.state_dict()
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


# Exact at any alpha


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("make", models.MAKERS.values(), ids=models.MAKERS)
def test_ends_are_exact_and_nothing_drifts(
    tmp_path: Path, make: Make, tied: bool, dtype: torch.dtype, device: str
) -> None:
    """Alpha 0 is theta1 and alpha 1 theta2, bit for bit, however the dial got there."""
    base = make(tied=tied)
    reasoner = models.moved(base)
    vector = TaskVector.between(*pair(tmp_path, base, reasoner))
    model = load_model(tmp_path / "base", dtype=dtype, device=device)
    expected = len(list(base.parameters()))
    for alpha in (0.3, 1, -2, 0, 0.7, 0, 1):
        assert vector.apply(model, alpha) == expected
        if alpha in (0, 1):
            assert_same_bits(model, copy.deepcopy([base, reasoner][int(alpha)]).to(device, dtype))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_a_broken_theta2_does_not_reach_alpha_0() -> None:
    base = models.llama()
    reasoner = models.moved(base)
    with torch.no_grad():
        reasoner.get_parameter("model.norm.weight")[0] = float("inf")
    vector = TaskVector.between(base, reasoner)
    assert torch.equal(vector.at("model.norm.weight", 0.0), base.get_parameter("model.norm.weight"))
    model = models.llama(seed=9)
    vector.apply(model, 0.0)
    assert_same_bits(model, models.llama())


def test_between_the_ends_it_is_theta1_plus_alpha_delta(tmp_path: Path) -> None:
    base = models.llama(dtype=torch.bfloat16)
    reasoner = models.moved(base)
    vector = TaskVector.between(*pair(tmp_path, base, reasoner))
    model = load_model(tmp_path / "base", dtype=torch.float32, device="cpu")
    for alpha in (0.25, 1.5, -0.5):
        vector.apply(model, alpha)
        for name, weight in model.named_parameters():
            one, two = base.get_parameter(name).float(), reasoner.get_parameter(name).float()
            torch.testing.assert_close(weight, one + alpha * (two - one), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_a_move_in_place_writes_what_at_says(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, stored: torch.dtype) -> None:
    """Alphas one after the other, with ends that stay beside the model they came from; chunks that end inside a row."""
    monkeypatch.setattr("cotvalve.mover.CHUNK", {"cpu": 37})
    model, other = models.llama(dtype=dtype), models.moved(models.llama(dtype=stored))
    vector = TaskVector.between(model, other, note="in memory")
    names = [vector.moves[name].start for name in vector.moves]
    state = list(model.state_dict().values())
    assert isinstance(vector.end, Loaded)
    mover = Mover(vector, model, near=False)
    mover.vector = replace(vector, start=Held(vector.start, names, torch.device("cpu"), state), end=Held(vector.end, names, torch.device("cpu"), state))
    wanted = {alpha: {name: vector.at(name, alpha).to(dtype, copy=True) for name in vector.moves} for alpha in (0.3, 1.4, 0.0, 1.0)}
    for alpha in (0.3, 1.4, 0.0, 1.0, 0.3):
        mover.to(alpha)
        for name, tensor in wanted[alpha].items():
            assert torch.equal(model.state_dict()[name], tensor), (alpha, name)
    assert isinstance(mover.vector.end, Held)
    theirs = mover.vector.end.read(names[0])
    assert theirs.data_ptr() == vector.end.read(names[0]).data_ptr(), "what is not written over is not copied"


def test_sharded_checkpoints_are_streamed(tmp_path: Path) -> None:
    base = models.qwen2()
    reasoner = models.moved(base)
    models.save(base, tmp_path / "base", shard="20KB")
    models.save(reasoner, tmp_path / "reasoner", shard="30KB")
    assert len(Checkpoint(tmp_path / "base").files) > 3
    model = models.qwen2(seed=9)
    TaskVector.between(tmp_path / "base", tmp_path / "reasoner").apply(model, 1)
    assert_same_bits(model, reasoner)


def test_models_in_memory_also_when_one_of_them_is_moved() -> None:
    base = models.qwen2(tied=True)
    copy, reasoner = models.qwen2(tied=True), models.moved(base)
    vector = TaskVector.between(base, reasoner)
    for alpha in (0.5, 1, 0.2, 0):
        vector.apply(base, alpha)
    assert_same_bits(base, copy)
    vector.apply(base, 1)
    assert_same_bits(base, reasoner)


def test_alpha_moves_the_logits(tmp_path: Path) -> None:
    vector = TaskVector.between(*pair(tmp_path, models.qwen2()))
    model = models.qwen2()
    seen = [models.logits(model)]
    for alpha in (0.25, 0.5, 1.0):
        vector.apply(model, alpha)
        seen.append(models.logits(model))
    assert all((a - b).abs().max() > 0.01 for a, b in itertools.combinations(seen, 2))


@pytest.mark.parametrize("alpha", [math.nan, math.inf])
def test_alpha_must_be_finite(tmp_path: Path, alpha: float) -> None:
    vector = TaskVector.between(*pair(tmp_path, models.llama()))
    with pytest.raises(SettingError, match=f"alpha is {alpha}; expected a finite number"):
        vector.apply(models.llama(), alpha)


# Tied embeddings, vocabularies


def test_base_tied_and_reasoner_not(tmp_path: Path) -> None:
    """Qwen2.5-Math-1.5B ties its output layer, the R1 distillation of it does not: the model is untied, and says so."""
    base = models.qwen2(tied=True)
    reasoner = models.qwen2(tied=False, seed=5)
    vector = TaskVector.between(*pair(tmp_path, base, reasoner))
    assert vector.card.facts["untied"] == f"{HEAD} is tied in one checkpoint only; it is moved on its own"
    model = load_model(tmp_path / "base", device="cpu")
    before = models.logits(model)
    vector.apply(model, 1)
    assert_same_bits(model, reasoner)
    assert not model.config.tie_word_embeddings, "readers that trust it alone would tie the two tables again"
    model.save_pretrained(tmp_path / "out")
    assert_same_bits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), reasoner)
    vector.apply(model, 0)
    assert torch.equal(models.logits(model), before)


def test_a_model_untied_in_inference_mode_can_be_moved_outside_of_it(tmp_path: Path) -> None:
    """Engine generate turns the dial inside inference mode: the output layer's new table could not be written after it."""
    base, reasoner = models.qwen2(tied=True), models.qwen2(tied=False, seed=5)
    vector = TaskVector.between(*pair(tmp_path, base, reasoner))
    with torch.inference_mode():
        vector.apply(base, 0.5)
    vector.apply(base, 1)
    assert_same_bits(base, reasoner)


def test_reasoner_tied_and_base_not(tmp_path: Path) -> None:
    base = models.llama(tied=False)
    reasoner = models.llama(tied=True, seed=5)
    vector = TaskVector.between(*pair(tmp_path, base, reasoner))
    model = load_model(tmp_path / "base", device="cpu")
    vector.apply(model, 1)
    assert torch.equal(models.logits(model), models.logits(reasoner))
    vector.apply(model, 0)
    assert_same_bits(model, base)


@pytest.mark.parametrize("longer", ["base", "reasoner"])
def test_padding_rows_of_the_vocabulary_stay(tmp_path: Path, longer: str) -> None:
    sizes = (280, 272) if longer == "base" else (272, 280)
    base, reasoner = (models.qwen2(vocabulary=rows, seed=seed) for seed, rows in enumerate(sizes))
    vector = TaskVector.between(*pair(tmp_path, base, reasoner))
    assert (
        vector.card.facts["vocabulary"] == "the tokenizers agree on 260 tokens; the first 272 rows move, the rest stay"
    )
    model = load_model(tmp_path / "base", device="cpu")
    vector.apply(model, 1)
    for name in (EMBEDDINGS, HEAD):
        assert torch.equal(model.get_parameter(name)[:272], reasoner.get_parameter(name)[:272])
        assert torch.equal(model.get_parameter(name)[272:], base.get_parameter(name)[272:])
    assert torch.equal(models.logits(model)[..., :272], models.logits(reasoner)[..., :272])
    vector.apply(model, 0.5)
    for name in (EMBEDDINGS, HEAD):
        between = torch.lerp(base.get_parameter(name)[:272], reasoner.get_parameter(name)[:272], 0.5)
        assert torch.allclose(model.get_parameter(name)[:272], between, atol=1e-6)
        assert torch.equal(model.get_parameter(name)[272:], base.get_parameter(name)[272:])
    vector.apply(model, 0)
    assert_same_bits(model, base)


def test_rows_that_move_are_not_rounded_to_the_base_s_bits() -> None:
    base, reasoner = models.qwen2(vocabulary=280, dtype=torch.bfloat16), models.qwen2(seed=1)
    vector = TaskVector.between(*(Loaded(model, models.tokenizer()) for model in (base, reasoner)))
    assert vector.card.toward == "longer", "where theta2 leads, the reasoner, in the paper"
    table = vector.at(EMBEDDINGS, 1.0)
    assert torch.equal(table[:272], reasoner.get_parameter(EMBEDDINGS))
    assert torch.equal(table[272:], base.get_parameter(EMBEDDINGS)[272:].float())


def test_rows_that_mean_other_tokens_are_refused(tmp_path: Path) -> None:
    models.save(models.qwen2(), tmp_path / "base")
    models.save(models.qwen2(vocabulary=280), tmp_path / "reasoner", extra=("<|answer|>",))
    with pytest.raises(DirectionMismatch) as error:
        TaskVector.between(tmp_path / "base", tmp_path / "reasoner")
    assert str(error.value) == (
        f"{EMBEDDINGS}: {tmp_path / 'base'} and {tmp_path / 'reasoner'} differ in rows and their tokenizers in 1 "
        "tokens (<|answer|>); resize the base's vocabulary to the reasoner's first"
    )


def test_rows_without_tokenizers_are_refused() -> None:
    with pytest.raises(DirectionMismatch, match=r"differ in rows, which cannot be matched without both tokenizers"):
        TaskVector.between(models.qwen2(), models.qwen2(vocabulary=280))
    tokenizer = models.tokenizer()
    given = TaskVector.between(Loaded(models.qwen2(), tokenizer), Loaded(models.qwen2(vocabulary=280), tokenizer))
    assert given.moves[EMBEDDINGS].rows == 272


def test_other_special_tokens_in_equal_rows_are_a_fact(tmp_path: Path) -> None:
    """The paper's own pair: R1-Distill-Llama renames reserved tokens of Llama-3.1."""
    base, reasoner = pair(tmp_path, models.llama())
    models.tokenizer(["<|user|>"]).save_pretrained(reasoner)
    assert TaskVector.between(base, reasoner).card.facts["tokenizers"] == "1 added tokens differ: <|user|>"


def test_another_vocabulary_of_the_same_size_is_refused(tmp_path: Path) -> None:
    base, reasoner = pair(tmp_path, models.llama())
    file = reasoner / "tokenizer.json"
    made = json.loads(file.read_text())
    vocabulary = made["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(made))
    with pytest.raises(
        DirectionMismatch, match=r"embed_tokens.weight: .* different vocabularies \(2 tokens differ, the first is 'a'\)"
    ):
        TaskVector.between(base, reasoner)


# What does not fit


def test_two_architectures(tmp_path: Path) -> None:
    with pytest.raises(
        DirectionMismatch, match=r"q_proj.bias: not a tensor of .*reasoner; .* are not one architecture"
    ):
        TaskVector.between(*pair(tmp_path, models.qwen2(), models.llama()))
    with pytest.raises(
        DirectionMismatch, match=r"embed_tokens.weight: \[272, 32\] in .*, \[272, 64\] in .*; expected two"
    ):
        TaskVector.between(models.llama(), models.llama(hidden=64))


def test_only_a_vocabulary_may_have_more_rows() -> None:
    """Heads of keys are rows as well, and no other tensor tells how many there are."""
    config = copy.deepcopy(models.llama().config)
    config.num_key_value_heads = 4
    with pytest.raises(DirectionMismatch, match=r"k_proj.weight: \[16, 32\] in .*, \[32, 32\] in .*; expected two"):
        TaskVector.between(models.llama(), LlamaForCausalLM(config))


def test_a_model_it_does_not_fit_is_named_and_not_touched(tmp_path: Path) -> None:
    vector = TaskVector.between(*pair(tmp_path, models.llama()))
    deeper, shallow = models.llama(layers=3), models.llama(layers=1)
    before = models.logits(deeper)
    with pytest.raises(
        DirectionMismatch, match=r"layers.2.*: a tensor of the model that the task vector does not have"
    ):
        vector.apply(deeper, 1)
    assert torch.equal(models.logits(deeper), before)
    with pytest.raises(
        DirectionMismatch, match=r"model.layers.1.*: not a tensor of the model; give the vector's own base"
    ):
        vector.apply(shallow, 1)
    with pytest.raises(DirectionMismatch, match="not a tensor of the model"):
        vector.apply(models.lora(models.llama()), 1)  # pyright: ignore[reportArgumentType]
    with pytest.raises(DirectionMismatch, match=r"embed_tokens.weight: the model's is \[272, 64\], the task vector's \[272, 32\]"):
        vector.apply(models.llama(hidden=64), 1)
    packed = models.llama()
    packed.is_quantized = True  # pyright: ignore[reportAttributeAccessIssue]  as transformers says it
    with pytest.raises(DirectionMismatch, match="its weights are quantized and cannot be moved"):
        vector.apply(packed, 1)


def test_a_fused_model_is_refused(tmp_path: Path) -> None:
    vector = TaskVector.between(*pair(tmp_path, models.llama()))
    model = models.llama()
    model.config.cotvalve_fused = {"alpha": 1.0}
    with pytest.raises(DirectionMismatch, match=r"was fused at alpha 1.0 and has no dial any more"):
        vector.apply(model, 0.5)


def test_truncated_and_missing_and_pickled_weights(tmp_path: Path) -> None:
    base, reasoner = pair(tmp_path, models.llama())
    file = reasoner / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"model.safetensors: truncated or not safetensors"):
        TaskVector.between(base, reasoner)
    file.unlink()
    with pytest.raises(
        DataError, match=r"reasoner: no model.safetensors in it; only safetensors and GGUF weights are read"
    ):
        TaskVector.between(base, reasoner)
    (reasoner / "adapter_config.json").write_text("{}")
    with pytest.raises(DataError, match=r"reasoner: is a direction, not a model"):
        TaskVector.between(base, reasoner)
    (reasoner / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(DataError, match=r"pytorch_model.bin: pickled weights can run code and are not read"):
        TaskVector.between(base, reasoner)


def test_a_checkpoint_that_lacks_a_tensor_names_it(tmp_path: Path) -> None:
    base, reasoner = pair(tmp_path, models.llama())
    state = load_file(reasoner / "model.safetensors")
    state.pop("model.norm.weight")
    save_file(state, reasoner / "model.safetensors")
    with pytest.raises(DataError, match=r"reasoner: no tensor model.norm.weight in its safetensors files"):
        TaskVector.between(base, reasoner)


# The folder


def test_folder_refers_to_the_checkpoints(tmp_path: Path) -> None:
    base, reasoner = pair(tmp_path, models.qwen2(tied=True))
    vector = TaskVector.between(base, reasoner, note="a pair")
    folder = vector.save(tmp_path / "d")
    assert [file.name for file in folder.iterdir()] == ["direction.json"]
    model = load_model(base, device="cpu")
    for again in (load_direction(folder), load_direction(folder, base), load_direction(folder, model)):
        assert isinstance(again, TaskVector)
        assert again.card == vector.card
        again.apply(model, 1)
        assert_same_bits(model, load_model(reasoner, device="cpu"))


def test_a_base_that_was_moved_or_changed(tmp_path: Path) -> None:
    base, reasoner = pair(tmp_path, models.qwen2())
    folder = TaskVector.between(base, reasoner).save(tmp_path / "d")
    elsewhere = base.rename(tmp_path / "elsewhere")
    assert isinstance(load_direction(folder, elsewhere), TaskVector)
    with pytest.raises(DataError, match="base': no such folder"):
        load_direction(folder)
    models.save(models.qwen2(seed=7), elsewhere)
    with pytest.raises(DirectionMismatch, match=r"elsewhere: its model.safetensors is not the one the task vector in"):
        load_direction(folder, elsewhere)


def test_a_reasoner_that_was_changed_is_not_the_vector_s(tmp_path: Path) -> None:
    base, reasoner = pair(tmp_path, models.qwen2())
    folder = TaskVector.between(base, reasoner).save(tmp_path / "d")
    models.save(models.qwen2(seed=7), reasoner)
    for given in (None, base):
        with pytest.raises(DirectionMismatch, match=r"reasoner: its model.safetensors is not the one the task vector in"):
            load_direction(folder, given)


def test_a_model_that_was_changed_in_memory_comes_back_as_it_was(tmp_path: Path) -> None:
    """Its name stood for it: after a move, alpha 0 was the checkpoint under that name and not the model."""
    base, reasoner = pair(tmp_path, models.llama())
    TaskVector.between(base, reasoner).save(tmp_path / "vector")
    model = load_model(base, device="cpu")
    with torch.no_grad():
        model.get_parameter("model.norm.weight").add_(1)
    before = copy.deepcopy(model)
    vector = TaskVector.load(tmp_path / "vector", model)
    vector.apply(model, 1)
    assert_same_bits(model, load_model(reasoner, device="cpu"))
    vector.apply(model, 0)
    assert_same_bits(model, before)


def test_a_vector_between_models_in_memory_has_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="an exact task vector refers to checkpoints on disk; save both"):
        TaskVector.between(models.llama(), models.moved(models.llama())).save(tmp_path / "d")


# DoRA


@pytest.mark.parametrize("config", [{}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}}], ids=["dora", "rslora"])
@pytest.mark.parametrize("make", models.MAKERS.values(), ids=models.MAKERS)
def test_dora_as_its_exact_weight_difference(tmp_path: Path, make: Make, config: dict[str, object]) -> None:
    """At alpha 1 it is PEFT's merged model, at 0 the base bit for bit, on a line between them."""
    models.save(make(), tmp_path / "base")
    models.lora(make(), use_dora=True, **config).save_pretrained(str(tmp_path / "dora"))
    merged = PeftModel.from_pretrained(make(), tmp_path / "dora").merge_and_unload()
    model = make()
    for vector in (from_dora(tmp_path / "dora", model), from_dora(tmp_path / "dora", tmp_path / "base")):
        assert vector.apply(model, 1) == 14
        for name, weight in model.state_dict().items():
            # fp32: PEFT sums and divides in another order.
            torch.testing.assert_close(weight, merged.state_dict()[name], rtol=1e-5, atol=1e-6)
        vector.apply(model, 0.5)
        name = "model.layers.0.mlp.up_proj.weight"
        half = (make().get_parameter(name) + merged.get_parameter(name)) / 2
        torch.testing.assert_close(model.get_parameter(name), half, rtol=1e-5, atol=1e-6)
        vector.apply(model, 0)
        assert_same_bits(model, make())


def test_dora_folder_is_read_with_its_base_and_saved_as_differences(tmp_path: Path) -> None:
    base = models.save(models.llama(), tmp_path / "base")
    models.lora(models.llama(), use_dora=True).save_pretrained(str(tmp_path / "dora"))
    with pytest.raises(DataError, match=r"a DoRA adapter, whose change is not linear in alpha; make its exact weight"):
        load_direction(tmp_path / "dora")
    model = load_model(base, device="cpu")
    vector = load_direction(tmp_path / "dora", model)
    assert isinstance(vector, TaskVector)
    again = load_direction(vector.save(tmp_path / "d"), model)
    assert isinstance(again, TaskVector)
    vector.apply(model, 0.4)
    expected = models.logits(model)
    again.apply(model, 0.4)
    assert torch.equal(models.logits(model), expected)
    models.lora(models.llama(), use_dora=True, seed=5).save_pretrained(str(tmp_path / "other"))
    # A run that goes on knows its direction by this.
    assert vector.sha256() == again.sha256() != from_dora(tmp_path / "other", model).sha256()


def test_saved_differences_that_are_broken_or_another_model_s_are_named(tmp_path: Path) -> None:
    base = models.save(models.llama(), tmp_path / "base")
    models.lora(models.llama(), use_dora=True).save_pretrained(str(tmp_path / "dora"))
    folder = from_dora(tmp_path / "dora", base).save(tmp_path / "d")
    with pytest.raises(DirectionMismatch, match=r"a difference of \[32, 64\] does not fit .*; give its own base"):
        load_direction(folder, models.llama(hidden=64))
    deltas = load_file(folder / "deltas.safetensors")
    deltas["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(deltas, folder / "deltas.safetensors")
    with pytest.raises(DataError, match=r"layers.1.mlp.up_proj.weight: the weight difference holds NaN or infinity"):
        load_direction(folder, base)


def test_dora_on_another_base_names_the_module(tmp_path: Path) -> None:
    models.lora(models.llama(), use_dora=True).save_pretrained(str(tmp_path))
    with pytest.raises(
        DirectionMismatch, match=r"down_proj: the DoRA adapter changes a weight of \[32, 64\], .* \[64, 128\]"
    ):
        from_dora(tmp_path, models.llama(hidden=64))
    models.lora(models.llama()).save_pretrained(str(tmp_path / "lora"))
    with pytest.raises(DataError, match=r"has no magnitude vector; it is not DoRA, load it with Direction.load"):
        from_dora(tmp_path / "lora", models.llama())
