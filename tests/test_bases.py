"""A direction knows its base: the fingerprint, the warning on another base, and run folders whose weights changed."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_checkpoints import _gguf_qwen2

from cotvalve import checkpoints, extraction
from cotvalve.card import CARD, Card
from cotvalve.direction import Direction
from cotvalve.records import read_json
from cotvalve.valve import Valve
from cotvalve.weights import Checkpoint, fingerprint
from tests import models

Command = Callable[..., tuple[int, str]]


# The fingerprint


@pytest.mark.parametrize("tied", [False, True])
def test_one_base_has_one_fingerprint_however_it_is_stored_and_loaded(tmp_path: Path, tied: bool) -> None:
    """Sharded or whole, in fp32 or a 16-bit type, in memory or on disk, under a LoRA or bare."""
    model = models.llama(tied=tied, dtype=torch.bfloat16)
    expected = fingerprint(model)
    assert len(expected) == 64
    whole, shards = models.save(model, tmp_path / "whole"), models.save(model, tmp_path / "shards", shard="20KB")
    assert len(list(shards.glob("*.safetensors"))) > 1
    for folder in (whole, shards):
        assert fingerprint(Checkpoint(folder)) == expected
        for dtype in ("float32", "bfloat16", "float16"):
            assert fingerprint(checkpoints.load_model(folder, dtype=dtype, device="cpu")) == expected, dtype
    wrapped = models.lora(checkpoints.load_model(whole, dtype="float32", device="cpu"))
    assert fingerprint(wrapped) == fingerprint(wrapped.get_base_model()) == expected


def test_another_base_has_another() -> None:
    base = models.llama()
    assert fingerprint(models.moved(base, by=0.01)) != fingerprint(base)
    one = models.llama()
    with torch.no_grad():
        one.model.layers[1].mlp.up_proj.weight.mul_(1.02)  # one matrix among many
    assert fingerprint(one) != fingerprint(base)
    assert fingerprint(models.llama(vocabulary=280)) != fingerprint(base)


def test_a_gguf_base_has_one_and_a_quantized_model_none(tmp_path: Path) -> None:
    made = models.qwen2()
    models.tokenizer().save_pretrained(tmp_path)
    _gguf_qwen2(made, tmp_path / "m.gguf")
    loaded = checkpoints.load_model(tmp_path / "m.gguf", device="cpu")
    assert fingerprint(loaded) == fingerprint(made), "stored in fp32, so nothing was lost"
    made.is_quantized = True
    assert fingerprint(made) == ""


# The card


def test_the_card_carries_it(tmp_path: Path) -> None:
    card = Card("b", "shorter", facts={"base_sha256": "abc", "torch": "2"})
    assert (card.base_sha256, card.facts) == ("abc", {"torch": "2"})
    card.write(tmp_path / CARD, "lora")
    assert read_json(tmp_path / CARD)["base_sha256"] == "abc"
    assert Card.read(tmp_path / CARD, "lora") == card
    told = read_json(tmp_path / CARD)
    del told["base_sha256"]
    (tmp_path / CARD).write_text(json.dumps(told))
    assert Card.read(tmp_path / CARD, "lora").base_sha256 == "", "a card from before it was recorded"


def test_a_sum_over_two_bases_claims_neither() -> None:
    model = models.llama()
    wrapped = models.lora(model)
    state = {name.replace(".default", ""): w for name, w in wrapped.named_parameters() if "lora_" in name}
    here, there = (Direction.from_peft(wrapped.peft_config["default"], state, Card("b", base_sha256=sha)) for sha in "xy")
    assert (2 * here).card.base_sha256 == (here + here).card.base_sha256 == "x"
    assert (here + there).card.base_sha256 == ""


def test_extract_takes_the_base_s(tmp_path: Path) -> None:
    base = models.llama()
    models.save(base, tmp_path / "base")
    models.save(models.moved(base), tmp_path / "reasoner")
    made = extraction.extract(tmp_path / "base", tmp_path / "reasoner", rank=2).direction
    assert made.card.base_sha256 == fingerprint(base)


def test_the_embedded_direction_names_the_embedded_base() -> None:
    assert Direction.load("tiny-valve").card.base_sha256 == fingerprint(checkpoints.load_model("tiny-reasoner", device="cpu"))


# As a user meets it


@pytest.fixture
def questions(tmp_path: Path) -> str:
    rows = [{"question": f"{i}+1?", "answer": str(i + 1), "solution": f"{i}+1={i + 1}"} for i in range(6)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return str(tmp_path / "qa.jsonl")


def train(base: Path, questions: str, out: Path, *more: str) -> list[str]:
    return [
        "train", "valve", "--model", str(base), "--data", questions, "--rank", "2", "--batch", "2", "--prompt", "plain",
        "--device", "cpu", "--learning-rate", "0.01", "--out", str(out), *more,
    ]  # fmt: skip


@pytest.mark.parametrize("how", [(), ("--dora",)], ids=["LoRA", "DoRA"])
def test_training_records_it_and_another_base_is_told_once(
    tmp_path: Path, questions: str, command: Command, caplog: pytest.LogCaptureFixture, how: tuple[str, ...]
) -> None:
    base = models.llama()
    models.save(base, tmp_path / "base")
    models.save(models.moved(base, by=0.01), tmp_path / "sibling")
    code, said = command(*train(tmp_path / "base", questions, tmp_path / "d", *how))
    assert code == 0, said
    assert read_json(tmp_path / "d" / CARD)["base_sha256"] == fingerprint(base)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "cotvalve"):
        Valve.load(tmp_path / "base", tmp_path / "d", device="cpu")
        assert not caplog.messages
        Valve.load(tmp_path / "sibling", tmp_path / "d", device="cpu")
    (told,) = caplog.messages
    assert str(tmp_path / "sibling") in told
    assert str(tmp_path / "base") in told
    assert "made on another base" in told
    assert "\n" not in told


@pytest.mark.parametrize("verb", ["mix", "sweep"])
def test_a_direction_or_base_that_changed_under_its_name_does_not_go_on(
    tmp_path: Path, questions: str, command: Command, verb: str
) -> None:
    """Its finished rows would be of other weights than the ones still to come."""
    base, direction, out = tmp_path / "base", tmp_path / "d", tmp_path / "out"
    models.save(models.llama(), base)
    assert command(*train(base, questions, direction))[0] == 0
    again = [
        verb, "--model", str(base), "--direction", str(direction), "--data", questions, "--prompt", "plain", "--alphas", "0,1",
        "--max-new-tokens", "4", "--device", "cpu", "--out", str(out), *(("--fewest", "1", "--samples", "1") if verb == "mix" else ()),
    ]  # fmt: skip
    code, said = command(*again)
    assert code == 0 or "no question has enough right chains" in said  # rows are there either way
    rows = (out / "rows.sqlite").read_bytes()
    kept = (direction / "adapter_model.safetensors").read_bytes()

    made = Direction.load(direction)
    (2 * made).save(direction)
    code, said = command(*again)
    assert code == 2
    assert "holds a run on another direction of the same name" in said
    assert "name another --out" in said
    assert (out / "rows.sqlite").read_bytes() == rows

    made.save(direction)
    assert (direction / "adapter_model.safetensors").read_bytes() == kept
    models.save(models.llama(seed=9), base)
    code, said = command(*again)
    assert code == 2
    assert "holds a run on another base model of the same name" in said
    assert (out / "rows.sqlite").read_bytes() == rows
    models.save(models.llama(), base)
    code, said = command(*again)
    assert code == 0 or "no question has enough right chains" in said, "back as it was, it goes on"


def test_a_full_fine_tuning_can_be_moved(tmp_path: Path, questions: str, command: Command) -> None:
    """Its card names its own folder as theta2, by no path: the folder may go elsewhere."""
    models.save(models.llama(), tmp_path / "base")
    code, said = command(*train(tmp_path / "base", questions, tmp_path / "runs" / "full", "--full"))
    assert code == 0, said
    card = read_json(tmp_path / "runs" / "full" / CARD)
    assert card["theta2"]["name"] == "."
    assert str(tmp_path / "runs") not in json.dumps(card["theta2"])
    question = "2+1?"
    before = Valve.load(tmp_path / "base", tmp_path / "runs" / "full", device="cpu").generate(question, alpha=[1.0], max_new_tokens=6)
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    moved = Valve.load(tmp_path / "base", tmp_path / "elsewhere" / "full", device="cpu")
    assert moved.generate(question, alpha=[1.0], max_new_tokens=6) == before
    assert torch.equal(
        moved.direction.at("model.norm.weight", 1.0),  # type: ignore[union-attr]
        checkpoints.load_model(tmp_path / "elsewhere" / "full", device="cpu").model.norm.weight,
    )
