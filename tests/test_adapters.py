"""PEFT's folder, read with suspicion: everything alpha could not scale is refused by name, in one line."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cotvalve import Valve
from cotvalve.adapters import Factor
from cotvalve.direction import Card, Direction, load_direction
from cotvalve.errors import DataError
from tests import models

CARD = Card("base", "shorter", "valve")


def direction() -> Direction:
    wrapped = models.lora(models.qwen2())
    state = {name.replace(".default", ""): weight for name, weight in wrapped.named_parameters() if "lora_" in name}
    return Direction.from_peft(wrapped.peft_config["default"], state, CARD)


def refused(tmp_path: Path, says: str, **fields: object) -> None:
    folder = direction().save(tmp_path / "d")
    config = json.loads((folder / "adapter_config.json").read_text()) | fields
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError) as error:
        Direction.load(folder)
    assert str(error.value) == f"{folder}: {says}"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"use_dora": True},
            "a DoRA adapter, whose change is not linear in alpha; make its exact weight difference with "
            "cotvalve.taskvector.from_dora(folder, base)",
        ),
        (
            {"bias": "lora_only"},
            "bias='lora_only': biases were trained too, which alpha could not scale; train with bias='none'",
        ),
        (
            {"modules_to_save": ["lm_head"]},
            "modules_to_save: whole modules trained beside the LoRA, which alpha could not scale; train without it",
        ),
        (
            {"peft_type": "IA3"},
            "a IA3 adapter; only LoRA and rsLoRA scale with alpha (DoRA as its exact weight difference)",
        ),
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights='pissa' changes the base weights, so alpha 0 would not be the base; convert the adapter "
            "with PEFT's path_initial_model_for_weight_conversion",
        ),
        ({"use_qalora": True}, "use_qalora: a variant of LoRA this cotvalve does not know; train without it"),
        ({"r": None}, "adapter_config.json says r=None; expected a number"),
        ({"peft_type": None}, "adapter_config.json names no peft_type; it is not an adapter's config"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_config_that_alpha_cannot_scale(tmp_path: Path, fields: dict[str, object], says: str) -> None:
    refused(tmp_path, says, **fields)


def rewritten(tmp_path: Path, edit: dict[str, torch.Tensor | None]) -> Path:
    """A direction's folder with some tensors replaced, or removed by None."""
    folder = direction().save(tmp_path / "d")
    state = {**load_file(folder / "adapter_model.safetensors"), **edit}
    save_file(
        {name: tensor for name, tensor in state.items() if tensor is not None}, folder / "adapter_model.safetensors"
    )
    return folder


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (
            {Q.format("A"): torch.full((4, 32), math.nan)},
            "model.layers.0.self_attn.q_proj: lora_A holds NaN or infinity; its training diverged",
        ),
        ({Q.format("B"): None}, "model.layers.0.self_attn.q_proj has no lora_B; the file is not whole"),
        (
            {Q.format("A"): torch.zeros(3, 32), Q.format("B"): torch.zeros(32, 3)},
            "model.layers.0.self_attn.q_proj: A [3, 32] and B [32, 3], but adapter_config.json says rank 4",
        ),
        (
            {"base_model.model.lm_head.weight": torch.zeros(4, 4)},
            "base_model.model.lm_head.weight is no LoRA factor of a linear module, which alpha cannot scale; "
            "train the adapter on linear modules only",
        ),
        (
            {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 4)},
            "base_model.model.model.embed_tokens.lora_embedding_A is LoRA on an embedding, which alpha cannot scale; "
            "train the adapter on linear modules only",
        ),
    ],
    ids=["nan", "half", "rank", "extra", "embedding"],
)
def test_tensors_that_are_not_a_and_b(tmp_path: Path, edit: dict[str, torch.Tensor | None], says: str) -> None:
    folder = rewritten(tmp_path, edit)
    with pytest.raises(DataError) as error:
        Direction.load(folder)
    assert str(error.value) == f"{folder / 'adapter_model.safetensors'}: {says}"


def test_a_lora_on_the_output_layer_is_read_without_the_copy_of_its_table(tmp_path: Path) -> None:
    wrapped = models.lora(models.llama(), targets=["q_proj", "lm_head"])
    wrapped.save_pretrained(str(tmp_path / "with"))
    with pytest.raises(DataError, match=r"lm_head\.base_layer\.weight is a whole weight of the base.*save_embedding_layers=False"):
        Direction.load(tmp_path / "with")
    wrapped.save_pretrained(str(tmp_path / "without"), save_embedding_layers=False)
    with Valve(models.llama(), models.tokenizer(), Direction.load(tmp_path / "without")).at(1.0) as model:
        torch.testing.assert_close(models.logits(model), models.logits(wrapped), rtol=0, atol=2e-5)


def test_truncated_file(tmp_path: Path) -> None:
    folder = direction().save(tmp_path)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(
        DataError, match=r"adapter_model.safetensors: truncated or not safetensors .*; download or write it again"
    ):
        Direction.load(folder)


def test_pickled_adapter(tmp_path: Path) -> None:
    folder = direction().save(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80")
    with pytest.raises(DataError, match=r"adapter_model.bin: pickled weights can run code and are not read"):
        Direction.load(folder)


def test_folder_without_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no adapter_config.json in it; expected a direction's folder"):
        load_direction(tmp_path, models.qwen2())
    with pytest.raises(DataError, match=r"no adapter_config.json in it; expected a direction's folder"):
        Direction.load(tmp_path)
    with pytest.raises(DataError, match="no such folder; expected a folder or a hub id like owner/name"):
        Direction.load(tmp_path / "nothing")


def test_card_of_a_newer_version_or_another_kind(tmp_path: Path) -> None:
    folder = direction().save(tmp_path)
    card = json.loads((folder / "direction.json").read_text())
    (folder / "direction.json").write_text(json.dumps(card | {"version": 2}))
    with pytest.raises(DataError, match="format version 2, this cotvalve reads 1; update cotvalve"):
        Direction.load(folder)
    (folder / "direction.json").write_text(json.dumps(card | {"toward": "up"}))
    with pytest.raises(DataError, match="toward is 'up', expected"):
        Direction.load(folder)
    (folder / "direction.json").write_text(json.dumps({"format": "cotvalve-direction", "version": 1, "kind": "lora"}))
    with pytest.raises(DataError, match="no 'base' in it"):
        Direction.load(folder)


def test_a_diverged_direction_is_not_written(tmp_path: Path) -> None:
    d = direction()
    name, factor = next(iter(d.factors.items()))
    broken = Direction({name: Factor(factor.A, factor.B * math.nan, factor.lora_alpha)}, CARD)
    with pytest.raises(DataError, match=rf"not written: {name}.lora_B.weight holds NaN or infinity"):
        broken.save(tmp_path / "d")
    assert not (tmp_path / "d").exists()
