"""PEFT's folder format, read with suspicion: adapter_config.json and adapter_model.safetensors to LoRA factors.

An adapter that holds anything alpha could not scale (a trained bias, whole modules, a variant of LoRA that is not
linear or that changes the base weights) is refused by name; nothing in it is passed over in silence.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cotvalve.checkpoints import read_tensors
from cotvalve.errors import DataError
from cotvalve.records import read_json

CONFIG, FACTORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<part>A|B|magnitude_vector)(\.weight)?")
_LAYER = re.compile(r"(?P<stem>.+)\.(?P<layer>\d+)\.(?P<rest>.+)")

# What an adapter may hold besides A and B, by the field of its config: the dial would leave it on at alpha 0.
_NOT_A_AND_B = {
    "modules_to_save": "whole modules trained beside the LoRA",
    "trainable_token_indices": "trained token embeddings",
    "target_parameters": "LoRA on bare parameters (mixture-of-experts weights)",
    "layer_replication": "replicated layers",
    "lora_bias": "a trained bias in B",
    "megatron_config": "Megatron layers",
    "alora_invocation_tokens": "activated LoRA (on only after some tokens)",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA factors",
    "monteclora_config": "MonteCLoRA factors",
    "velora_config": "VeLoRA factors",
}
_KEEPS_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
"""Initialisations after which the base weights are still the base's; PiSSA, OLoRA and others subtract from them."""


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """The change of one linear module: scale * B @ A."""

    A: Tensor
    """[rank, in]"""
    B: Tensor
    """[out, rank]"""
    lora_alpha: float
    rslora: bool = False

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in] of the weight it changes."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def scale(self) -> float:
        """lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA."""
        return self.lora_alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def delta(self) -> Tensor:
        """The change of the weight, [out, in], in fp32 or better."""
        exact = torch.promote_types(self.B.dtype, torch.float32)
        return self.scale * (self.B.to(exact) @ self.A.to(exact))

    def plain(self) -> Factor:
        """The same change without rsLoRA's square root."""
        return Factor(self.A, self.B, self.scale * self.rank) if self.rslora else self

    def __add__(self, other: Factor) -> Factor:
        """The sum of two changes of one weight: their ranks side by side."""
        rank, A = self.rank + other.rank, _cat([self.A, other.A], 0)
        if self.scale == other.scale:
            return Factor(A, _cat([self.B, other.B], 1), self.scale * rank)
        # One scale must serve both, so each goes into its B, in fp32: a bf16 factor is not rounded again.
        return Factor(A, _cat([self.scale * self.B.float(), other.scale * other.B.float()], 1), rank)


@dataclass(frozen=True, slots=True)
class Adapter:
    """What an adapter's two files say."""

    factors: dict[str, Factor]
    """By the module's name in the base model."""
    magnitudes: dict[str, Tensor]
    """DoRA's vectors [out], by module; empty for LoRA."""
    targets: tuple[str, ...]
    """PEFT's target_modules for exactly these modules."""
    base: str
    """The base model it names, or empty."""


def load_adapter(folder: Path, *, dora: bool = False) -> Adapter:
    """Reads a folder in PEFT's format; `dora` asks for a DoRA adapter, which is otherwise refused.

    Raises DataError, naming the file and the field or module, for anything that is not A and B.
    """
    if not (folder / CONFIG).exists():
        raise DataError(f"{folder}: no {CONFIG} in it; expected a direction's folder ({CONFIG} and {FACTORS})")
    fields = read_json(folder / CONFIG)
    refuse_unscalable(fields, str(folder), dora=dora)
    if not (folder / FACTORS).exists():
        pickled = sorted(path.name for path in folder.glob("adapter_model*") if path.suffix in (".bin", ".pt", ".pth"))
        if pickled:
            raise DataError(
                f"{folder / pickled[0]}: pickled weights can run code and are not read; save the adapter as {FACTORS}"
            )
        raise DataError(f"{folder}: no {FACTORS} in it; the adapter's weights are missing")
    return read_adapter(fields, read_tensors(folder / FACTORS), str(folder / FACTORS))


def read_adapter(fields: Mapping[str, Any], state: Mapping[str, Tensor], where: str) -> Adapter:
    """Factors from PEFT's config fields and its state dict; `where` is named in errors."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        found = _KEY.fullmatch(key.removeprefix(PREFIX))
        if found is None and key.endswith(".base_layer.weight"):
            raise DataError(
                f"{where}: {key} is a whole weight of the base, as PEFT saves it beside a LoRA on the output layer; "
                "where that weight was not trained, save the adapter with save_embedding_layers=False"
            )
        if found is None:
            what = "LoRA on an embedding" if "lora_embedding" in key else "no LoRA factor of a linear module"
            raise DataError(
                f"{where}: {key} is {what}, which alpha cannot scale; train the adapter on linear modules only"
            )
        parts.setdefault(found["module"], {})[found["part"]] = tensor
    if not parts:
        raise DataError(f"{where}: 0 modules with LoRA factors in it")
    rslora, factors, magnitudes = bool(fields.get("use_rslora")), dict[str, Factor](), dict[str, Tensor]()
    for module, found in parts.items():
        for part in ("A", "B"):
            if part not in found:
                raise DataError(f"{where}: {module} has no lora_{part}; the file is not whole")
        for part, tensor in found.items():
            if not torch.isfinite(tensor).all():
                raise DataError(f"{where}: {module}: lora_{part} holds NaN or infinity; its training diverged")
        A, B = found["A"], found["B"]
        rank = _by_pattern(fields.get("rank_pattern"), module, fields["r"])
        if A.ndim != 2 or B.ndim != 2 or (A.shape[0], B.shape[1]) != (rank, rank):
            raise DataError(
                f"{where}: {module}: A {list(A.shape)} and B {list(B.shape)}, but {CONFIG} says rank {rank}"
            )
        factors[module] = Factor(A, B, _by_pattern(fields.get("alpha_pattern"), module, fields["lora_alpha"]), rslora)
        if "magnitude_vector" in found:
            magnitudes[module] = found["magnitude_vector"]
    some_layers = fields.get("layers_to_transform") is not None or fields.get("exclude_modules") or _stops(fields.get("target_modules"), factors)
    targets = tuple(sorted(factors)) if some_layers else endings(factors)
    return Adapter(factors, magnitudes, targets, fields.get("base_model_name_or_path") or "")


def refuse_unscalable(fields: Any, where: str, *, dora: bool = False) -> None:
    """Raises DataError when an adapter's config describes more than W + scale * B A on linear modules."""
    if not isinstance(fields, Mapping) or not fields.get("peft_type"):
        raise DataError(f"{where}: {CONFIG} names no peft_type; it is not an adapter's config")
    kind = getattr(fields["peft_type"], "value", fields["peft_type"])
    if kind != "LORA":
        raise DataError(
            f"{where}: a {kind} adapter; only LoRA and rsLoRA scale with alpha (DoRA as its exact weight difference)"
        )
    if fields.get("use_dora") and not dora:
        raise DataError(
            f"{where}: a DoRA adapter, whose change is not linear in alpha; "
            "make its exact weight difference with cotvalve.taskvector.from_dora(folder, base)"
        )
    for name in ("r", "lora_alpha"):
        if not isinstance(fields.get(name), (int, float)):
            raise DataError(f"{where}: {CONFIG} says {name}={fields.get(name)!r}; expected a number")
    if fields.get("bias", "none") != "none":
        raise DataError(
            f"{where}: bias='{fields['bias']}': biases were trained too, which alpha could not scale; "
            "train with bias='none'"
        )
    for name, what in _NOT_A_AND_B.items():
        if fields.get(name):
            raise DataError(f"{where}: {name}: {what}, which alpha could not scale; train without it")
    if fields.get("init_lora_weights") not in _KEEPS_BASE:
        raise DataError(
            f"{where}: init_lora_weights='{fields['init_lora_weights']}' changes the base weights, so alpha 0 "
            "would not be the base; convert the adapter with PEFT's path_initial_model_for_weight_conversion"
        )
    for name, value in fields.items():
        # PEFT's next variant of LoRA will be a use_... flag as these are.
        if name.startswith("use_") and value and name not in ("use_rslora", "use_dora"):
            raise DataError(f"{where}: {name}: a variant of LoRA this cotvalve does not know; train without it")


def endings(modules: Iterable[str]) -> tuple[str, ...]:
    """PEFT's target_modules for exactly `modules` of a model whose layers they cover: the last parts of their names.

    Other readers of the format want endings and not the whole names that PEFT writes for "all-linear". Whole
    names are kept where endings would say more: modules that differ from layer to layer, or a gap in the layers.

    >>> endings(["m.layers.0.q_proj", "m.layers.1.q_proj", "lm_head"])
    ('lm_head', 'q_proj')
    >>> endings(["m.layers.0.q_proj", "m.layers.1.v_proj"])
    ('m.layers.0.q_proj', 'm.layers.1.v_proj')
    """
    names = sorted(modules)
    layers: dict[tuple[str, str], set[int]] = {}
    for name in names:
        if found := _LAYER.fullmatch(name):
            layers.setdefault((found["stem"], found["rest"]), set()).add(int(found["layer"]))
    covered = set[int]().union(*layers.values())
    if covered != set(range(len(covered))) or any(numbers != covered for numbers in layers.values()):
        return tuple(names)
    return tuple(sorted({name.rpartition(".")[2] for name in names}))


def patterns(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """The commonest of `values` by module, and PEFT's pattern (a regex of the name) for the modules that differ."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {re.escape(name): value for name, value in values.items() if value != common}


def _stops(pattern: Any, modules: Iterable[str]) -> bool:
    """Whether PEFT's regular expression of module names ends with the layers of `modules`, and would reach no further one."""
    if not isinstance(pattern, str) or pattern == "all-linear":
        return False
    layers = [found for name in modules if (found := _LAYER.fullmatch(name))]
    further = max((int(found["layer"]) for found in layers), default=0) + 1
    return any(not re.fullmatch(pattern, f"{found['stem']}.{further}.{found['rest']}") for found in layers)


def _by_pattern(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    # PEFT's rule: the first key that matches the end of the name at a dot.
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def _cat(tensors: list[Tensor], dim: int) -> Tensor:
    dtype = torch.promote_types(tensors[0].dtype, tensors[1].dtype)
    return torch.cat([tensor.to(dtype) for tensor in tensors], dim)
