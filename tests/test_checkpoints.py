"""Loading models: what is read, what is refused, and the one line that says so."""

import json
from pathlib import Path

import gguf
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from benchmarks import dequantize
from cotvalve import checkpoints
from cotvalve.checkpoints import billions, load_config, load_model, load_tokenizer, pick_device, pick_dtype
from cotvalve.errors import DataError, EngineError, SettingError
from cotvalve.weights import Checkpoint, fingerprint
from tests import models


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return models.save(models.qwen2(), tmp_path / "model")


@pytest.mark.parametrize(("name", "says"), [("gpu", "device 'gpu' is unknown; expected cuda"), ("cuda:99", "device 'cuda:99' is not here"), ("mps:7", "is not here")])
def test_a_device_that_is_not_here_is_told_in_one_line(folder: Path, name: str, says: str) -> None:
    with pytest.raises(SettingError, match=says):
        load_model(folder, device=name)


# What is read


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("make", models.MAKERS.values(), ids=models.MAKERS)
def test_a_folder_is_read(tmp_path: Path, make: object, tied: bool) -> None:
    made: PreTrainedModel = make(tied=tied)  # pyright: ignore[reportCallIssue]
    model = load_model(models.save(made, tmp_path, shard="20KB"), device="cpu")
    assert torch.equal(models.logits(model), models.logits(made))
    assert (model.dtype, model.training, model.name_or_path) == (torch.float32, False, str(tmp_path))
    assert load_config(tmp_path).vocab_size == models.VOCABULARY


def test_dtype_is_the_one_that_was_asked_for(folder: Path) -> None:
    assert load_model(folder, dtype=torch.bfloat16, device="cpu").dtype == torch.bfloat16
    assert load_model(folder, dtype="float16", device="cpu").dtype == torch.float16
    for dtype in ("int8", "float31", "nn"):
        with pytest.raises(
            SettingError, match=f"dtype '{dtype}' is unknown; expected auto, float32, bfloat16 or float16"
        ):
            load_model(folder, dtype=dtype)


def test_device_and_dtype_are_picked() -> None:
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert pick_device().type == expected
    assert pick_dtype("cpu") == pick_dtype(torch.device("mps")) == torch.float32


def test_tokenizer_is_ready_to_generate(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"padding_side": "right"}))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id is not None
    assert tokenizer.decode(tokenizer("Größe 1,234\n").input_ids) == "Größe 1,234\n"


def test_billions_needs_no_weights(tmp_path: Path) -> None:
    for tied in (False, True):
        model = models.qwen2(tied=tied)
        expected = sum(weight.numel() for weight in model.parameters()) / 1e9
        assert billions(model) == billions(model.config) == expected
        assert billions(models.lora(model)) == expected
    models.qwen2().config.save_pretrained(tmp_path)
    assert billions(tmp_path) == billions(models.qwen2())


def test_billions_of_a_real_config() -> None:
    """Qwen2.5-1.5B: the card says 1.54B parameters; built on the meta device, in no memory."""
    config = models.qwen2().config
    config.update(
        {
            "vocab_size": 151936,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "layer_types": ["full_attention"] * 28,
        }
    )
    assert billions(config) == pytest.approx(1.5437, abs=1e-4)


def test_embedded_names_are_folders_in_the_package() -> None:
    for name in checkpoints.EMBEDDED:
        root = Path(checkpoints.__file__).parent / "assets" / "tiny" / checkpoints.EMBEDDED[name]
        if root.is_dir():
            assert checkpoints.resolve(name) == str(root)
        else:
            with pytest.raises(DataError, match=f"'{name}': the embedded model is not in this installation"):
                checkpoints.resolve(name)
    assert checkpoints.resolve("./tiny") == "./tiny"


def _gguf_qwen2(model: PreTrainedModel, path: Path, *, coarse: bool = False) -> None:
    """Writes `model` with byte tokens as llama.cpp would: a GGUF of architecture qwen2, in fp32 or (`coarse`) its tables in 4 and 8 bits."""
    config, writer = model.config, gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    vocabulary = sorted(models.tokenizer().get_vocab().items(), key=lambda pair: pair[1])
    tokens = [token for token, _ in vocabulary] + [
        "th",
        "he",
        *(f"<|{row}|>" for row in range(len(vocabulary) + 2, config.vocab_size)),
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3] * (len(tokens) - 256))
    writer.add_token_merges(["t h", "h e"])
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "model.layers": "blk",
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    }  # fmt: skip
    for name, tensor in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if coarse and tensor.dim() > 1:
            kind = gguf.GGMLQuantizationType.Q4_0 if name.startswith("token_embd") else gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_is_a_plain_model(tmp_path: Path) -> None:
    """Without GgufConfig(dequantize=True) transformers 5 calls it quantized: not trainable, not savable."""
    made = models.qwen2()
    _gguf_qwen2(made, tmp_path / "m.gguf")
    for model in (
        load_model(tmp_path, gguf_file="m.gguf", device="cpu"),
        load_model(tmp_path / "m.gguf", device="cpu"),
    ):
        assert torch.equal(models.logits(model), models.logits(made))
        assert not getattr(model, "is_quantized", False)
        model.save_pretrained(tmp_path / "out")
        assert torch.equal(models.logits(load_model(tmp_path / "out", device="cpu")), models.logits(made))
    assert load_tokenizer(tmp_path / "m.gguf").padding_side == "left"
    assert billions(tmp_path / "m.gguf") == billions(made)
    with pytest.raises(DataError, match=r"n.gguf: no such GGUF file"):
        load_model(tmp_path, gguf_file="n.gguf")


def test_the_reproductions_base_is_the_gguf_with_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """llama.cpp stores a tied table twice, in 4 and in 8 bits: the finer one is kept, everything else is what transformers reads."""
    _gguf_qwen2(models.qwen2(), tmp_path / "m.gguf", coarse=True)
    read = {name: tensor.bfloat16() for name, tensor in load_model(tmp_path / "m.gguf", device="cpu").state_dict().items()}
    assert dequantize.main([str(tmp_path / "m.gguf"), str(tmp_path / "owner" / "base")]) == 0
    model = load_model(tmp_path / "owner" / "base", device="cpu", dtype="bfloat16")
    assert capsys.readouterr().out.strip().endswith(fingerprint(model))
    finer = read.pop("lm_head.weight")
    assert not torch.equal(read.pop("model.embed_tokens.weight"), finer)
    made = model.state_dict()
    assert model.config.tie_word_embeddings
    assert torch.equal(made.pop("model.embed_tokens.weight"), finer)
    assert torch.equal(made.pop("lm_head.weight"), finer)
    assert made.keys() == read.keys()
    assert all(torch.equal(made[name], read[name]) for name in made)
    assert load_tokenizer(tmp_path / "owner" / "base").padding_side == "left"


def test_what_is_no_such_gguf_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("no weights")
    for architecture in ("llama", "qwen2"):
        writer = gguf.GGUFWriter(tmp_path / f"{architecture}.gguf", architecture)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
    told = {"none": "no GGUF file", "text": "no GGUF file", "llama": "architecture llama; only qwen2", "qwen2": "has one table already"}
    for name, why in told.items():
        with pytest.raises(SystemExit, match=rf"^dequantize: .*{name}\.gguf: {why}"):
            dequantize.main([str(tmp_path / f"{name}.gguf"), str(tmp_path / "out")])


# What is refused, in one line


def refused(where: str | Path) -> str:
    with pytest.raises(DataError) as error:
        load_model(where, device="cpu")
    line = str(error.value)
    assert "\n" not in line
    return line


def test_no_such_model(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = "no such folder; expected a folder or a hub id like owner/name"
    assert refused("qwen") == f"'qwen': {expected}; the embedded ones are tiny, tiny-reasoner, tiny-valve"
    assert refused("./a/b") == f"'./a/b': {expected}"
    assert refused("/no/such/folder") == f"'/no/such/folder': {expected}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    line = refused("owner/no-such-model")
    assert line.startswith("owner/no-such-model: not a folder here, and cannot be fetched from the hub; check the name")


def test_folders_that_are_not_models(tmp_path: Path) -> None:
    assert refused(tmp_path) == (
        f"{tmp_path}: no config.json in it; expected a model's folder (config.json, model.safetensors, tokenizer) "
        "or a GGUF file"
    )
    (tmp_path / "adapter_config.json").write_text("{}")
    assert refused(tmp_path) == (
        f"{tmp_path}: is a direction, not a model; name its base as the model and this as the direction"
    )


def test_pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert refused(folder) == f"{folder}: no model.safetensors in it; only safetensors and GGUF weights are read"
    torch.save(models.qwen2().state_dict(), folder / "pytorch_model.bin")
    assert refused(folder) == (
        f"{folder / 'pytorch_model.bin'}: pickled weights can run code and are not read; "
        "convert the model to safetensors"
    )


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights(folder: Path, keep: float) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * keep)])
    assert refused(folder).startswith(f"{folder}: truncated or not safetensors (")


def test_a_missing_tensor_is_not_filled_with_random_numbers(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state.pop("model.layers.1.mlp.up_proj.weight")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    assert refused(folder) == (
        f"{folder}: 1 tensors are missing, the first is model.layers.1.mlp.up_proj.weight; download it again"
    )


def test_extra_tensors_are_one_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = load_file(folder / "model.safetensors")
    save_file({**state, "mtp.weight": torch.zeros(2)}, folder / "model.safetensors", {"format": "pt"})
    load_model(folder, device="cpu")
    assert caplog.messages == [f"{folder}: 1 tensors are not the model's and were not read, the first is mtp.weight"]


def test_a_missing_shard(tmp_path: Path) -> None:
    folder = models.save(models.llama(), tmp_path, shard="20KB")
    shard = next(folder.glob("*-00002-of-*"))
    shard.unlink()
    assert shard.name in refused(folder)
    with pytest.raises(
        DataError, match=f"{shard.name}: no such file, which the model's index names; download it again"
    ):
        Checkpoint(folder)


def test_weights_that_are_not_the_config_s(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    assert refused(folder).startswith(f"{folder}: its weights do not fit its config.json: ")
    with pytest.raises(DataError, match=r"gate_proj.weight is \[64, 32\] on disk, its config.json says \[48, 32\]"):
        Checkpoint(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model_type": "no-such-architecture"}', "{}"])
def test_broken_config(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    line = refused(folder)
    assert line.startswith((f"{folder}: cannot be read as a model: ", f"{folder / 'config.json'}: not "))


def test_broken_or_missing_tokenizer(folder: Path) -> None:
    """transformers makes an empty Qwen2 tokenizer when there is no file."""
    file = folder / "tokenizer.json"
    whole = file.read_text()
    for text in ("", whole[: len(whole) // 2], "{}"):
        file.write_text(text)
        with pytest.raises(DataError, match="its tokenizer cannot be read: "):
            load_tokenizer(folder)
    file.unlink()
    with pytest.raises(
        DataError, match=r"no tokenizer in it; expected tokenizer.json or tokenizer.model or vocab.json"
    ):
        load_tokenizer(folder)


def test_remote_code_stays_off(folder: Path) -> None:
    """The model's own code would write a file; it is not run, and nobody is asked."""
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": auto}))
    (folder / "code.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\nclass C: pass\nclass M: pass\n")
    assert refused(folder) == (
        f"{folder}: needs code of its own, which is not run unless trust_remote_code is set; "
        "set it only if you trust its author"
    )
    assert not (folder / "ran").exists()


def test_4bit_needs_a_gpu(folder: Path) -> None:
    with pytest.raises(EngineError, match="4-bit loading needs a CUDA GPU; the device is cpu"):
        load_model(folder, device="cpu", quantize_4bit=True)


def test_a_quantized_checkpoint_cannot_be_subtracted(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(
        DataError, match="its weights are quantized and cannot be subtracted; name the unquantized model"
    ):
        Checkpoint(folder)


def test_a_tensor_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    checkpoints.write_tensors(file, {"a": torch.arange(6).reshape(2, 3).T})
    before = file.read_bytes()
    assert torch.equal(checkpoints.read_tensors(file)["a"], torch.arange(6).reshape(2, 3).T)
    with pytest.raises(AttributeError):
        checkpoints.write_tensors(file, {"a": "no tensor"})  # pyright: ignore[reportArgumentType]
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
