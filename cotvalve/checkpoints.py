"""Models and tokenizers, loaded safely: names to folders, weights only from safetensors or GGUF.

Pickled weights are refused, remote code is off unless asked for, and a checkpoint that lacks a tensor is an
error (transformers would fill it with random numbers and warn). Every failure is one line that names the file.
A few names are reserved for the models that come inside the package: tiny, tiny-reasoner, tiny-valve.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from cotvalve.errors import DataError, EngineError, SettingError
from cotvalve.records import disk, read_json, share

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

EMBEDDED = {"tiny": "instruct", "tiny-reasoner": "reasoner", "tiny-valve": "valve"}
"""Reserved names, and their folders in assets/tiny."""

DIRECTION_FILES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "direction.json",
    "deltas.safetensors",
    "calibration.json",
)
CONFIG_FILES = ("config.json", "generation_config.json")
WEIGHT_FILES = ("config.json", "model*.safetensors", "model.safetensors.index.json")
TOKENIZER_FILES = (
    "config.json",
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "additional_chat_templates/*",
)
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_BF16_SINCE = 8
"""CUDA compute capability from which bf16 is done by the hardware (Ampere); older cards emulate it slowly."""


def resolve(name: str | Path) -> str:
    """The folder of an embedded name; any other name as it is. A folder of one's own is named './tiny'."""
    if str(name) not in EMBEDDED:
        return str(name)
    import cotvalve

    folder = Path(cotvalve.__path__[0]) / "assets" / "tiny" / EMBEDDED[str(name)]
    if not folder.is_dir():
        raise DataError(
            f"'{name}': the embedded model is not in this installation ({folder} is missing); install cotvalve again"
        )
    return str(folder)


def fetch(name: str | Path, files: Sequence[str]) -> Path:
    """The folder behind a name; a hub repository's `files` (glob patterns) are downloaded, or found in its cache.

    Everything is loaded from this folder, so a file that was not asked for (a pickle, code) never arrives.
    """
    where = resolve(name)
    folder = Path(where)
    if folder.is_dir():
        return folder
    if "/" not in where or where.count("/") > 1 or where.startswith(("/", ".", "~")) or "\\" in where:
        known = "" if "/" in where else f"; the embedded ones are {', '.join(EMBEDDED)}"
        raise DataError(f"'{where}': no such folder; expected a folder or a hub id like owner/name{known}")
    import huggingface_hub

    with reading(where, "not a folder here, and cannot be fetched from the hub; check the name and the network"):
        return Path(huggingface_hub.snapshot_download(where, allow_patterns=list(files)))


def load_config(name: str | Path, *, gguf_file: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's config, without its weights."""
    from transformers import AutoConfig

    folder, gguf = _model(name, gguf_file, CONFIG_FILES, trust_remote_code)
    with reading(str(name)):
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **gguf)


def load_tokenizer(
    name: str | Path, *, gguf_file: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, ready for batches that generate: padded on the left, with a padding token."""
    from transformers import AutoTokenizer

    folder, gguf = _model(name, gguf_file, TOKENIZER_FILES, trust_remote_code)
    if not gguf and not any(any(folder.glob(files)) for files in _VOCABULARIES):
        # transformers would make an empty tokenizer for some architectures.
        raise DataError(f"{name}: no tokenizer in it; expected {' or '.join(_VOCABULARIES)} beside config.json")
    with reading(str(name), "its tokenizer cannot be read"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **gguf)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise DataError(f"{name}: its tokenizer has neither a padding nor an end token, so chains cannot end")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    name: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
    quantize_4bit: bool = False,
) -> PreTrainedModel:
    """The model, in eval mode, on `device` (picked when None).

    dtype "auto" is bf16 on a GPU that has it and fp32 elsewhere. `quantize_4bit` needs CUDA and bitsandbytes.
    Raises DataError for a model that is missing, pickled, truncated or incomplete, EngineError when the
    device cannot hold it.
    """
    from transformers import AutoModelForCausalLM

    folder, gguf = _model(name, gguf_file, (*CONFIG_FILES, *WEIGHT_FILES), trust_remote_code)
    target = pick_device(device)
    how: dict[str, Any] = {"dtype": pick_dtype(target) if dtype == "auto" else _dtype(dtype)}
    if gguf:
        # Without this the weights are dense but the model calls itself quantized: it can be neither trained nor saved.
        how["quantization_config"] = _gguf_config()(dequantize=True)
    else:
        refuse_pickled(folder)
        if quantize_4bit:
            how |= {"quantization_config": _nf4(target), "device_map": {"": target}}
    with reading(str(name)), _quiet():
        model, told = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]  a pair, as asked
            folder, use_safetensors=True, trust_remote_code=trust_remote_code, output_loading_info=True, **gguf, **how
        )
        if missing := sorted(told["missing_keys"]):
            raise DataError(f"{name}: {len(missing)} tensors are missing, the first is {missing[0]}; download it again")
        if extra := sorted(told["unexpected_keys"]):
            _log.warning(
                "%s: %d tensors are not the model's and were not read, the first is %s", name, len(extra), extra[0]
            )
        # A hub id is kept as the name; the cache's folder would mean nothing to another machine.
        model.name_or_path = model.config.name_or_path = resolve(name)
        return (model if quantize_4bit else model.to(target)).eval()


def pick_device(name: str | torch.device | None = None) -> torch.device:
    """The device called `name`; CUDA, else Apple's MPS, else the CPU where none is named. SettingError for one that is not here."""
    if name is not None:
        try:
            device = torch.device(name)
        except RuntimeError:
            raise SettingError(f"device '{name}' is unknown; expected cuda, cuda:N, mps or cpu") from None
        here = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
        if (device.index or 0) >= here.get(device.type, 1):
            raise SettingError(f"device '{name}' is not here; leave device out, or name one that is")
        return device
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(device: str | torch.device) -> torch.dtype:
    """bf16 on a CUDA card that does it in hardware, fp32 elsewhere (where greedy tokens do not depend on the batch)."""
    if torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device)[0] >= _BF16_SINCE:
        return torch.bfloat16
    return torch.float32


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The model of `config` without memory for its weights (meta device)."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def billions(model: PretrainedConfig | nn.Module | str | Path) -> float:
    """Parameters in units of 10^9 (for ACU, eq. 5), no weights loaded; tied weights count once, LoRA not at all."""
    if isinstance(model, (str, Path)):
        model = load_config(model)
    if not isinstance(model, nn.Module):
        model = skeleton(model)
    elif getattr(model, "is_loaded_in_4bit", False):
        # Packed weights have half as many elements as parameters.
        model = skeleton(model.config)  # pyright: ignore[reportArgumentType]
    return sum(weight.numel() for name, weight in model.named_parameters() if ".lora_" not in name) / 1e9


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU; DataError when it is truncated or something else."""
    with reading(str(path)):
        return safetensors.torch.load_file(path)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with disk(path), os.fdopen(handle, "wb") as file:
            share(handle)
            file.write(
                safetensors.torch.save(
                    {name: tensor.contiguous() for name, tensor in tensors.items()}, {"format": "pt"}
                )
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def refuse_pickled(folder: Path) -> None:
    """Raises DataError for a model's folder without safetensors."""
    if any(folder.glob("model*.safetensors")):
        return
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled:
        raise DataError(
            f"{folder / pickled[0]}: pickled weights can run code and are not read; convert the model to safetensors"
        )
    _refuse_direction(folder, folder)
    raise DataError(f"{folder}: no model.safetensors in it; only safetensors and GGUF weights are read")


def _refuse_direction(folder: Path, name: str | Path) -> None:
    if (folder / "adapter_config.json").is_file() or (folder / "direction.json").is_file():
        raise DataError(f"{name}: is a direction, not a model; name its base as the model and this as the direction")


def _model(name: str | Path, gguf_file: str | None, files: Sequence[str], code: bool) -> tuple[Path, dict[str, str]]:
    """The folder of a model and, where its weights are GGUF, what from_pretrained must be told of it."""
    if str(name).endswith(".gguf") and gguf_file is None:
        name, gguf_file = Path(name).parent, Path(name).name
    folder = fetch(name, (*files, *([gguf_file] if gguf_file else []), *(["*.py"] if code else [])))
    if gguf_file is not None:
        if not (folder / gguf_file).is_file():
            raise DataError(f"{folder / gguf_file}: no such GGUF file")
        return folder, {"gguf_file": gguf_file}
    if not (folder / "config.json").is_file():
        _refuse_direction(folder, name)
        raise DataError(
            f"{name}: no config.json in it; expected a model's folder (config.json, model.safetensors, tokenizer) "
            "or a GGUF file"
        )
    if not isinstance(read_json(folder / "config.json"), dict):
        raise DataError(f"{folder / 'config.json'}: not a model's config; expected a JSON object")
    return folder, {}


@contextmanager
def reading(where: str, failed: str = "cannot be read as a model") -> Generator[None]:
    """Turns what the libraries raise about a model's files into one line about `where`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise EngineError(
            f"{where}: does not fit into the device's memory; load it in 4 bits, or use a larger device"
        ) from error
    except safetensors.SafetensorError as error:
        raise DataError(
            f"{where}: truncated or not safetensors ({_first_line(error)}); download or write it again"
        ) from error
    except ImportError as error:
        raise EngineError(f"{where}: needs a package that is not installed: {_first_line(error)}") from error
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise DataError(
                f"{where}: needs code of its own, which is not run unless trust_remote_code is set; "
                "set it only if you trust its author"
            ) from error
        raise DataError(f"{where}: {failed}: {_first_line(error)}") from error
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise DataError(f"{where}: its weights do not fit its config.json: {_first_line(error)}") from error


@contextmanager
def _quiet() -> Generator[None]:
    """Without transformers' table of missing and extra tensors: they become one line here."""
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_error)
    try:
        yield
    finally:
        logger.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _first_line(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"no {error} in it"
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise SettingError(f"dtype '{dtype}' is unknown; expected auto, float32, bfloat16 or float16")
    return found


def _gguf_config() -> Any:
    try:
        from transformers import GgufConfig  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError:
        from transformers.utils.quantization_config import GgufConfig
    return GgufConfig


def _nf4(device: torch.device) -> Any:
    import importlib.util

    if device.type != "cuda":
        raise EngineError(f"4-bit loading needs a CUDA GPU; the device is {device}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise EngineError("4-bit loading needs bitsandbytes, which is not installed: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    # NF4 with double quantisation is QLoRA's setting; it computes in the dtype LoRA is trained in.
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=pick_dtype(device),
    )
