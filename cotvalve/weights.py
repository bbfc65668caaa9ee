"""A model's tensors, read one at a time: from safetensors on disk (memory-mapped) or from a model in memory.

Tensors go by their names in the model's state dict, tied weights by one name only. What a tensor is (a linear
module's weight, an embedding, a norm) comes from the model's own structure, built without memory for weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import safetensors
from torch import Tensor, nn

from cotvalve import checkpoints
from cotvalve.errors import DataError, DirectionMismatch
from cotvalve.records import read_json, sha256

if TYPE_CHECKING:
    from safetensors import safe_open
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_BLOB = re.compile(r"[0-9a-f]{64}")


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
        for name, tensor in model.state_dict(keep_vars=True).items():
            if first.setdefault(id(tensor), name) == name:
                shapes[name] = tuple(tensor.shape)
            else:
                tied[name] = first[id(tensor)]
        names = {module: name for name, module in model.named_modules()}
        output = model.get_output_embeddings()
        ends = [module for module in (model.get_input_embeddings(), output) if module is not None]
        linears = tuple(
            name for module, name in names.items() if isinstance(module, nn.Linear) and module is not output
        )
        return cls(shapes, tied, linears, tuple(f"{names[module]}.weight" for module in ends))


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
        self._tensors: dict[str, Tensor] = {name: tensor.detach() for name, tensor in model.state_dict().items()}
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
