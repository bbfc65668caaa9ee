"""A model's tensors, read one at a time: from safetensors on disk (memory-mapped) or from a model in memory.

Tensors go by their names in the model's state dict, tied weights by one name only. What a tensor is (a linear
module's weight, an embedding, a norm) comes from the model's own structure, built without memory for weights.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import safetensors
import torch
from torch import Tensor, nn

from cotvalve import checkpoints
from cotvalve.adapters import PREFIX
from cotvalve.errors import DataError, DirectionMismatch
from cotvalve.records import read_json, sha256

if TYPE_CHECKING:
    from safetensors import safe_open
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_BLOB = re.compile(r"[0-9a-f]{64}")
_SAMPLE = 64
"""Values of each tensor that a fingerprint reads."""
_SMALLEST = 2.0**-14
"""fp16's smallest normal number: below it fp16 and bf16 round differently."""
_BARE = {
    "jamba": ("dt_proj",), "mamba": ("dt_proj", "out_proj"), "falcon_mamba": ("dt_proj", "out_proj"),
    "mamba2": ("out_proj",), "falcon_h1": ("out_proj",), "nemotron_h": ("out_proj",),
}  # fmt: skip
"""Linear modules by the model's type whose weight the model reads by itself, in every pass or in a kernel: a LoRA there would do nothing."""


@dataclass(frozen=True, slots=True)
class Anatomy:
    """What the tensors of a model are, by their names in its state dict."""

    shapes: dict[str, tuple[int, ...]]
    """Of every tensor, tied ones under their first name (the input embedding's) only."""
    tied: dict[str, str]
    """Other names of tied tensors, each with the name in `shapes`."""
    linears: tuple[str, ...]
    """Linear modules (module names) that LoRA may change: all but the output layer."""
    vocabulary: tuple[str, ...]
    """Weights with one row per token: the input embedding and the output layer."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> Anatomy:
        """The structure of a model, which may be on the meta device."""
        first: dict[int, str] = {}
        shapes, tied = dict[str, tuple[int, ...]](), dict[str, str]()
        for name, tensor in _base(model):
            if first.setdefault(id(tensor), name) == name:
                shapes[name] = tuple(tensor.shape)
            else:
                tied[name] = first[id(tensor)]
        names = {module: name for name, module in model.named_modules()}
        output = model.get_output_embeddings()
        ends = [module for module in (model.get_input_embeddings(), output) if module is not None]
        linears = tuple(
            name.removesuffix(".base_layer")
            for module, name in names.items()
            # Llama 4's router is a Linear that gives more than W x: no LoRA can be added to that.
            if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
            and module is not output and ".lora_" not in name and not is_bare(model, name)
        )
        return cls(shapes, tied, linears, tuple(f"{names[module]}.weight" for module in ends))


def is_bare(model: nn.Module, name: str) -> bool:
    """Whether the model takes the weight of its linear module `name` without calling that, so that no LoRA could act on it."""
    return name.removesuffix(".base_layer").rpartition(".")[2] in _BARE.get(getattr(getattr(model, "config", None), "model_type", ""), ())


class Weights(Protocol):
    """A model's tensors by name."""

    @property
    def name(self) -> str:
        """For people and cards: a hub id, a folder, or what the model in memory calls itself."""
        ...

    @property
    def anatomy(self) -> Anatomy: ...

    def read(self, name: str) -> Tensor:
        """One tensor as it is stored; the caller must not write into it."""
        ...

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's tokenizer, or None when it has none."""
        ...


class Checkpoint:
    """A model on disk, in safetensors."""

    def __init__(self, name: str | Path) -> None:
        """Opens the folder, hub repository or embedded model `name`; no tensor is read yet.

        Raises DataError for files that are missing, pickled or truncated, and names the first tensor that
        the model has and the files do not.
        """
        self.name = str(name)
        self.folder = checkpoints.fetch(name, checkpoints.WEIGHT_FILES)
        self.files = self._files()
        self._where: dict[str, safe_open] = {}
        for path in self.files:
            with checkpoints.reading(str(path)):
                file = safetensors.safe_open(path, framework="pt")
            self._where |= dict.fromkeys(file.keys(), file)
        config = checkpoints.load_config(self.folder)
        if getattr(config, "quantization_config", None) is not None:
            raise DataError(
                f"{self.name}: its weights are quantized and cannot be subtracted; name the unquantized model"
            )
        self.anatomy = Anatomy.of(checkpoints.skeleton(config))
        # More tensors may be there (rotary tables of old checkpoints, a tied output layer) but none may lack.
        for name in self.anatomy.shapes:
            if name not in self._where:
                raise DataError(f"{self.name}: no tensor {name} in its safetensors files, which the model has; "
                                "load it with load_model and give the model")  # fmt: skip
            stored = tuple(self._where[name].get_slice(name).get_shape())
            if stored != self.anatomy.shapes[name]:
                raise DataError(
                    f"{self.name}: {name} is {list(stored)} on disk, "
                    f"its config.json says {list(self.anatomy.shapes[name])}"
                )

    def _files(self) -> list[Path]:
        if (self.folder / INDEX).exists():
            names = sorted(set(read_json(self.folder / INDEX)["weight_map"].values()))
        else:
            names = [SINGLE]
        for name in names:
            if not (self.folder / name).exists():
                checkpoints.refuse_pickled(self.folder)
                raise DataError(f"{self.folder / name}: no such file, which the model's index names; download it again")
        return [self.folder / name for name in names]

    def read(self, name: str) -> Tensor:
        """One tensor; the file's pages are mapped, not copied."""
        return self._where[name].get_tensor(name)

    @property
    def portable(self) -> str:
        """The name to write down: a folder's whole path, a hub id or an embedded name as it is."""
        return (
            str(Path(self.name).resolve())
            if Path(self.name).is_dir() and self.name not in checkpoints.EMBEDDED
            else self.name
        )

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer beside the weights (downloaded when they came from the hub)."""
        folder = checkpoints.fetch(self.name, checkpoints.TOKENIZER_FILES)
        return checkpoints.load_tokenizer(self.name) if (folder / "tokenizer_config.json").exists() else None

    def hashes(self) -> dict[str, str]:
        """sha256 of each safetensors file. The hub's cache names its files by it, so those are not read again."""
        blobs = {path: path.resolve().name for path in self.files}
        return {path.name: blob if _BLOB.fullmatch(blob) else sha256(path) for path, blob in blobs.items()}


class Loaded:
    """A model in memory. Its tensors are not copied, unless something is going to write over them (`keep`)."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        if getattr(model, "is_quantized", False):
            raise DirectionMismatch(
                f"{model.name_or_path}: its weights are quantized and cannot be moved; load it without quantization"
            )
        self.name = model.name_or_path or type(model).__name__
        self.anatomy = Anatomy.of(model)
        self._tensors: dict[str, Tensor] = {name: tensor.detach() for name, tensor in _base(model)}
        self._tokenizer = tokenizer

    def read(self, name: str) -> Tensor:
        """One tensor, on the model's device."""
        return self._tensors[name]

    def keep(self, written: Iterable[Tensor]) -> None:
        """Copies to the CPU those tensors that writing into `written` would change."""
        places = {tensor.data_ptr() for tensor in written}
        for name, tensor in self._tensors.items():
            if tensor.data_ptr() in places:
                self._tensors[name] = tensor.to("cpu", copy=True)

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer that was given with the model."""
        return self._tokenizer


class Held:
    """Another's tensors by name, on a device for good: what is read at every move is not fetched at every move."""

    def __init__(self, of: Weights, names: Iterable[str], device: torch.device, written: Iterable[Tensor]) -> None:
        """Copies the tensors `names`, but those that are there already and are none of those that will be `written`."""
        self.name, self.anatomy, self._of = of.name, of.anatomy, of
        places = {tensor.data_ptr() for tensor in written}
        read = {name: of.read(name) for name in names}
        self._tensors = {
            name: tensor if tensor.device == device and tensor.data_ptr() not in places else tensor.to(device, copy=True)
            for name, tensor in read.items()
        }

    def read(self, name: str) -> Tensor:
        """One tensor, on the device."""
        return self._tensors[name]

    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The other's."""
        return self._of.tokenizer()


def fingerprint(of: Weights | nn.Module) -> str:
    """Hex sha256 of names, shapes and 64 values of every tensor of a model, at places spread over it.

    Values are rounded to bf16, and those below 2^-14 count as 0: a checkpoint gives the same digest sharded or whole,
    loaded in fp32 or bf16 (fp16 too, when it is stored in 16 bits), with a LoRA on it or without. Training changes
    it; a change of a few rows of a table may not. Empty for a quantized model, whose values are not there to read.
    """
    digest = hashlib.sha256()
    if isinstance(of, nn.Module) and getattr(of, "is_quantized", False):
        return ""
    values: list[Tensor] = []
    for name, tensor in sorted(_named(of), key=lambda pair: pair[0]):
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().reshape(-1)
        # Multiples of the golden ratio: evenly spread, and never one column of a matrix again and again.
        places = [((k * 0x9E3779B97F4A7C15) % 2**64) * flat.numel() >> 64 for k in range(_SAMPLE)]
        values.append(flat[torch.tensor(places, device=flat.device)].float().cpu())
    sample = torch.cat(values).to(torch.bfloat16)
    sample = torch.where(sample.abs() < _SMALLEST, 0.0, sample)
    digest.update(sample.to(torch.bfloat16).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _named(of: Weights | nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors by their names in the base model, each tied weight once."""
    if not isinstance(of, nn.Module):
        yield from ((name, of.read(name)) for name in of.anatomy.shapes)
        return
    seen: set[int] = set()
    for name, tensor in _base(of):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def _base(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A model's own tensors by their names in the base model, also where a LoRA is on it; tied ones under each name."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if ".lora_" not in name:
            yield name.removeprefix(PREFIX).replace(".base_layer.", "."), tensor
