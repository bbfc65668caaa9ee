"""The difference of two checkpoints, theta2 - theta1, exact, at any alpha in memory (the paper's MixChain-Z).

Every position is computed from the stored endpoints in fp32 and rounded once to the model's dtype, so nothing drifts:
alpha 0 is theta1 and alpha 1 is theta2, bit for bit. All weights move, so one batch has one alpha; `extraction.extract`
with a rank makes a `Direction`, which can mix them. At most one tensor is in flight besides the model; on a GPU that
holds three models both ends stay beside it (`Mover`), and a move is one pass over them.

Also here: a DoRA adapter as its exact weight difference (`from_dora`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from cotvalve import checkpoints, vocabularies
from cotvalve.adapters import load_adapter
from cotvalve.card import CARD, Card
from cotvalve.direction import refuse_fused
from cotvalve.errors import DataError, DirectionMismatch, SettingError
from cotvalve.records import read_json
from cotvalve.types import Toward
from cotvalve.weights import Anatomy, Checkpoint, Loaded, Weights, fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DELTAS = "deltas.safetensors"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Endpoint: TypeAlias = "str | Path | PreTrainedModel | Checkpoint | Loaded"
"""One end of a vector: a hub id, a folder, an embedded name, or a model in memory (`Loaded` adds its tokenizer)."""


@dataclass(frozen=True, slots=True)
class Move:
    """One tensor of the model, and where its two ends are."""

    start: str
    """Its name in the base; another name than its own where the base ties it."""
    end: str
    """Its name at the other end."""
    rows: int | None = None
    """Rows that move; None for all. The padding rows of a longer vocabulary stay the base's."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class TaskVector:
    """theta2 - theta1. Made by `between`, `from_dora` or `load`."""

    card: Card
    start: Weights
    """theta1."""
    end: Weights | Mapping[str, Tensor]
    """theta2; or, for a change that came as one, the fp32 differences by tensor."""
    moves: Mapping[str, Move]
    """By the tensor's name in the model; each tied weight once."""

    def __repr__(self) -> str:
        end = "differences" if isinstance(self.end, Mapping) else self.end.name
        toward = self.card.toward or "not measured"
        return f"TaskVector({len(self.moves)} tensors, {self.start.name} -> {end}, toward {toward})"

    @classmethod
    def between(
        cls, base: Endpoint, reasoner: Endpoint, *, toward: Toward | None = "longer", note: str = ""
    ) -> TaskVector:
        """The vector from `base` (theta1) to `reasoner` (theta2): names, folders, or models in memory.

        Raises DirectionMismatch, naming the tensor, when the two are not of one architecture or vocabulary.
        What was handled (a tied output layer, padding rows) is written into the card's facts.
        """
        start, end = weights(base), weights(reasoner)
        facts: dict[str, str] = {"theta1": start.name, "theta2": end.name}
        moves: dict[str, Move] = {}
        names = [*start.anatomy.shapes, *(name for name in end.anatomy.shapes if name not in start.anatomy.shapes)]
        for name in names:
            ends = [_own_name(side.anatomy, name) for side in (start, end)]
            for side, own in zip((start, end), ends, strict=True):
                if own is None:
                    raise DirectionMismatch(
                        f"{name}: not a tensor of {side.name}; {start.name} and {end.name} are not one architecture"
                    )
            own1, own2 = str(ends[0]), str(ends[1])
            shape1, shape2 = start.anatomy.shapes[own1], end.anatomy.shapes[own2]
            rows = None
            if shape1 != shape2:
                rows = (
                    min(shape1[0], shape2[0]) if name in start.anatomy.vocabulary and shape1[1:] == shape2[1:] else None
                )
                if rows is None:
                    raise DirectionMismatch(
                        f"{name}: {list(shape1)} in {start.name}, {list(shape2)} in {end.name}; "
                        "expected two checkpoints of one architecture"
                    )
            moves[name] = Move(own1, own2, rows)
            if {own1, own2} != {name}:
                facts["untied"] = f"{name} is tied in one checkpoint only; it is moved on its own"
        if not moves:
            raise DirectionMismatch(f"0 tensors are shared by {start.name} and {end.name}")
        cut = next(((name, move.rows) for name, move in moves.items() if move.rows is not None), None)
        facts |= vocabularies.compare(start, end, cut)
        base_name = start.portable if isinstance(start, Checkpoint) else start.name
        return cls(Card(base_name, toward, "extract", note, facts), start, end, moves)

    def delta(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """theta2 - theta1 of one tensor, in fp32 or better; zero in rows that do not move."""
        move = self.moves[name]
        if isinstance(self.end, Mapping):
            return self.end[name].to(device)
        start = exact(self.start.read(move.start).to(device), self.start.name, name)
        end = exact(self.end.read(move.end).to(device), self.end.name, name)
        if move.rows is None:
            return end - start
        delta = torch.zeros_like(start)
        delta[: move.rows] = end[: move.rows] - start[: move.rows]
        return delta

    def at(self, name: str, alpha: float, device: torch.device | str = "cpu") -> Tensor:
        """theta1 + alpha * (theta2 - theta1) of one tensor: theta1 itself at 0, theta2 itself at 1, else fp32.

        Above the middle lerp counts from theta2, the nearer end: the same value, with a smaller error.
        """
        move = self.moves[name]
        start = self.start.read(move.start).to(device)
        if alpha == 0:
            return start
        if alpha == 1 and not isinstance(self.end, Mapping):
            end = self.end.read(move.end).to(device)
            if move.rows is None:
                return end
            # The rows that stay keep the base's own bits, so the two ends are joined in the wider dtype.
            wide = torch.promote_types(start.dtype, end.dtype)
            return torch.cat([end[: move.rows].to(wide), start[move.rows :].to(wide)])
        first = exact(start, self.start.name, name)
        if isinstance(self.end, Mapping) or move.rows is not None:
            return torch.add(first, self.delta(name, device), alpha=alpha)
        last = exact(self.end.read(move.end).to(device), self.end.name, name)
        wide = torch.promote_types(first.dtype, last.dtype)
        return torch.lerp(first.to(wide), last.to(wide), alpha)

    def check_fits(self, model: PreTrainedModel, *, unwrapped: bool = False) -> int:
        """The number of tensors that move on `model`; `unwrapped` where a LoRA on it will be taken off before.

        Raises DirectionMismatch naming the first tensor that is missing, extra or of another shape, and for a
        model that was fused, is quantized or holds a merged adapter.
        """
        refuse_fused(model)
        if getattr(model, "is_quantized", False):
            raise DirectionMismatch(
                f"{model.name_or_path}: its weights are quantized and cannot be moved; load it without quantization"
            )
        anatomy, held = Anatomy.of(model), model.state_dict().keys()
        for name, move in self.moves.items():
            own, expected = _own_name(anatomy, name), self.start.anatomy.shapes[move.start]
            if own is None or (own not in held and not unwrapped):  # a layer with a LoRA on it has its weight under another name
                raise DirectionMismatch(
                    f"{name}: not a tensor of the model; give the vector's own base, {self.card.base}"
                )
            if anatomy.shapes[own] != expected:
                raise DirectionMismatch(
                    f"{name}: the model's is {list(anatomy.shapes[own])}, the task vector's {list(expected)}; "
                    f"give its own base, {self.card.base}"
                )
        extra = [name for name in anatomy.shapes if name not in self.moves]
        if extra and not isinstance(self.end, Mapping):
            raise DirectionMismatch(
                f"{extra[0]}: a tensor of the model that the task vector does not have; "
                f"give its own base, {self.card.base}"
            )
        return len(self.moves)

    def sha256(self) -> str:
        """Hex digest of the change: of theta2's fingerprint, or of the differences themselves."""
        if not isinstance(self.end, Mapping):
            return fingerprint(self.end)
        digest = hashlib.sha256()
        for name, delta in sorted(self.end.items()):
            digest.update(name.encode() + delta.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def apply(self, model: PreTrainedModel, alpha: float) -> int:
        """**Overwrites the weights of `model`** with theta1 + alpha * (theta2 - theta1); returns the tensors written.

        Whatever was in them before does not matter, so any order of alphas gives the same bits. An output
        layer that is tied in the model but not in the vector is untied for good. `Mover` does it many times.
        """
        if not math.isfinite(alpha):
            raise SettingError(f"alpha is {alpha}; expected a finite number")
        from cotvalve.mover import Mover

        mover = Mover(self, model, near=False)
        mover.to(alpha)
        return len(mover.written)

    def save(self, folder: str | Path) -> Path:
        """Writes the folder: names and hashes of the two checkpoints (not copied), or the differences themselves."""
        folder = Path(folder)
        if isinstance(self.end, Mapping):
            checkpoints.write_tensors(folder / DELTAS, self.end)
            ends: dict[str, Any] = {"theta1": _reference(self.start), "deltas": DELTAS}
        elif isinstance(self.start, Checkpoint) and isinstance(self.end, Checkpoint):
            ends = {"theta1": _reference(self.start), "theta2": _reference(self.end, folder)}
        else:
            raise DataError(
                f"{folder}: not written: an exact task vector refers to checkpoints on disk; save both models first"
            )
        self.card.write(folder / CARD, "taskvector", **ends)
        return folder

    @classmethod
    def load(cls, where: str | Path, base: str | Path | PreTrainedModel | None = None) -> TaskVector:
        """The vector of a folder; `base` (a name or a loaded model) stands in for the base it names.

        Raises DirectionMismatch when a checkpoint is not, by its sha256, the one the vector was made from.
        """
        folder = checkpoints.fetch(where, checkpoints.DIRECTION_FILES)
        card, found = Card.read(folder / CARD, "taskvector"), read_json(folder / CARD)
        if base is None or isinstance(base, (str, Path)):
            start = Checkpoint(base or found["theta1"]["name"])
        else:
            start = Checkpoint(base.name_or_path) if base.name_or_path else Loaded(base)
        _verify(start, found["theta1"], folder)
        if base is not None and not isinstance(base, (str, Path)) and fingerprint(start) != fingerprint(base):
            # A model that is not what lies under its name (changed since, or GGUF beside safetensors) is its own alpha 0.
            start = Loaded(base)
        if "deltas" in found:
            return _of_deltas(card, start, checkpoints.read_tensors(folder / found["deltas"]))
        # "." is the folder itself, wherever it was moved (full fine-tuning).
        end = Checkpoint(folder if found["theta2"]["name"] == "." else found["theta2"]["name"])
        _verify(end, found["theta2"], folder)
        return replace(cls.between(start, end), card=card)


def from_dora(folder: str | Path, base: Endpoint) -> TaskVector:
    """The exact weight difference of a DoRA adapter in PEFT's format on `base` (a name or a loaded model).

    DoRA's own scale is not linear (its norm depends on the weights); this vector runs straight from the base at
    alpha 0 to the adapter merged at alpha 1: m (W + s B A) / |W + s B A| - W, the norm over each output row.
    """
    folder = checkpoints.fetch(folder, checkpoints.DIRECTION_FILES)
    adapter, start = load_adapter(folder, dora=True), weights(base)
    deltas: dict[str, Tensor] = {}
    for module, factor in adapter.factors.items():
        name = f"{module}.weight"
        if module not in adapter.magnitudes:
            raise DataError(f"{folder}: {module} has no magnitude vector; it is not DoRA, load it with Direction.load")
        if start.anatomy.shapes.get(name) != factor.shape:
            raise DirectionMismatch(
                f"{module}: the DoRA adapter changes a weight of {list(factor.shape)}, {start.name} has "
                f"{list(start.anatomy.shapes.get(name, ())) or 'no such module'}; give the adapter's own base"
            )
        weight = exact(start.read(name).cpu(), start.name, name)
        changed = weight + factor.delta()
        norm = torch.linalg.vector_norm(changed, dim=1, keepdim=True)
        deltas[name] = adapter.magnitudes[module].to(weight)[:, None] / norm * changed - weight
    card = Card.read(folder / CARD, "lora") if (folder / CARD).exists() else Card(adapter.base or start.name)
    return _of_deltas(
        replace(card, facts={**card.facts, "made from": "a DoRA adapter, as its weight difference"}), start, deltas
    )


def weights(of: Endpoint) -> Checkpoint | Loaded:
    """The tensors behind a name, a folder or a model in memory."""
    if isinstance(of, (Checkpoint, Loaded)):
        return of
    return Checkpoint(of) if isinstance(of, (str, Path)) else Loaded(of)


def _of_deltas(card: Card, start: Weights, deltas: dict[str, Tensor]) -> TaskVector:
    for name, delta in deltas.items():
        if start.anatomy.shapes.get(name) != tuple(delta.shape):
            raise DirectionMismatch(
                f"{name}: a difference of {list(delta.shape)} does not fit {start.name}; give its own base, {card.base}"
            )
        if not delta.isfinite().all():
            raise DataError(f"{name}: the weight difference holds NaN or infinity")
    return TaskVector(card, start, deltas, {name: Move(name, name) for name in deltas})


def _own_name(anatomy: Anatomy, name: str) -> str | None:
    return name if name in anatomy.shapes else anatomy.tied.get(name)


def exact(tensor: Tensor, where: str, name: str) -> Tensor:
    """In fp32 or better; `where` and `name` are for the DirectionMismatch of a tensor that cannot be subtracted."""
    if tensor.dtype not in FLOATS:
        raise DirectionMismatch(
            f"{where}: {name} is stored as {tensor.dtype}, which cannot be subtracted; name an unquantized model"
        )
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def untie(model: PreTrainedModel, name: str) -> None:
    """Gives the output layer `name` weights of its own."""
    output = model.get_output_embeddings()
    if output is None or getattr(output, "weight", None) is not model.get_parameter(name):
        raise DirectionMismatch(
            f"{name}: tied in the model but not in the task vector, and not the output layer; load the model untied"
        )
    with torch.inference_mode(False):  # a tensor made in inference mode could not be written outside of it
        output.weight = nn.Parameter(output.weight.detach().clone(), requires_grad=output.weight.requires_grad)
    model.config.tie_word_embeddings = False


def _reference(side: Weights, folder: Path | None = None) -> dict[str, Any]:
    """Name and hashes of a checkpoint; a card in the checkpoint's own `folder` calls it "."."""
    if not isinstance(side, Checkpoint):
        return {"name": side.name}
    here = folder is not None and side.folder.resolve() == folder.resolve()
    return {"name": "." if here else side.portable, "sha256": side.hashes()}


def _verify(side: Checkpoint | Loaded, reference: Mapping[str, Any], folder: Path) -> None:
    if not isinstance(side, Checkpoint) or "sha256" not in reference:
        return
    for file, digest in side.hashes().items():
        if reference["sha256"].get(file) != digest:
            raise DirectionMismatch(
                f"{side.name}: its {file} is not the one the task vector in {folder} was made from "
                f"({reference['name']}); name that model, or extract again"
            )
