"""A direction from two checkpoints: the exact task vector, or rank-r LoRA factors of it with the energy they keep.

    delta W ~ B A,  B = U sqrt(S),  A = sqrt(S) V^T      (the r largest singular values of each linear module)

Energy is the share of the squared Frobenius norm: of each module's delta what the factors keep, and of the whole
vector what LoRA cannot carry (embeddings, output layer, norms, biases). Left out on purpose: a rank chosen by
itself; look at the report and choose.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cotvalve.adapters import Factor, endings
from cotvalve.checkpoints import pick_device
from cotvalve.direction import Direction
from cotvalve.errors import DataError, SettingError, unknown
from cotvalve.records import write_json
from cotvalve.taskvector import Endpoint, TaskVector
from cotvalve.types import Progress, Toward, silent
from cotvalve.weights import fingerprint

if TYPE_CHECKING:
    from cotvalve.weights import Anatomy

LEFT_OUT = ("embeddings", "output layer", "norms", "biases", "other")
_EXACT_UP_TO = 1024
"""Smaller side of a matrix up to which all singular values are computed: seconds on a CPU. Beyond, that takes minutes
a matrix and a 32B model has 448 of them. 1536 x 8960 at rank 64 on one core: 0.3 s against 7.7 s, and 99.4 % of the
best energy where singular values fall as slowly as i^-1/4 (93 % on white noise)."""
_BLOCK_ROWS = 4096
_EXTRA_COLUMNS = 32
_POWER_ITERATIONS = 4
"""Deltas of fine-tuning have slowly falling spectra, where a sketch alone loses energy; four passes recover it."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What the factors keep of one module."""

    module: str
    rank: int
    norm: float
    """Frobenius norm of the module's delta."""
    energy: float
    """Kept share of its square, 0 to 1; 1 for a module that did not change."""


@dataclass(frozen=True, slots=True)
class Extraction:
    """A direction with what was kept and what was left out."""

    direction: Direction | TaskVector
    rank: int | None
    """None for the exact task vector."""
    kept: tuple[Kept, ...]
    """By module; empty for the exact task vector, which keeps everything."""
    left_out: Mapping[str, float]
    """Share of the whole vector's squared norm in what LoRA does not carry, by kind (LEFT_OUT)."""
    energy: float
    """Share of the whole vector's squared norm that the direction holds."""

    def __str__(self) -> str:
        if self.rank is None:
            return f"{self.direction}: exact, all energy kept"
        lowest = min(self.kept, key=lambda kept: kept.energy)
        out = ", ".join(f"{kind} {share:.1%}" for kind, share in self.left_out.items() if share)
        return (
            f"{self.direction}: {self.energy:.1%} of the whole change kept; within the modules {self.within:.1%} "
            f"(least in {lowest.module}: {lowest.energy:.1%}); not carried by LoRA: {out or 'nothing'}"
        )

    @property
    def within(self) -> float:
        """Kept share of the squared norm of the modules' own deltas, together."""
        squares = [(kept.norm**2, kept.energy) for kept in self.kept]
        total = sum(square for square, _ in squares)
        return sum(square * energy for square, energy in squares) / total if total else 1.0

    def save(self, folder: str | Path) -> Path:
        """Writes the direction's folder, with this report in `extraction.json`."""
        folder = self.direction.save(folder)
        write_json(folder / "extraction.json", {
            "rank": self.rank, "energy": self.energy, "energy_within_modules": self.within,
            "left_out": dict(self.left_out), "modules": [asdict(kept) for kept in self.kept],
        })  # fmt: skip
        return folder


def extract(
    base: Endpoint,
    reasoner: Endpoint,
    *,
    rank: int | None = None,
    modules: Sequence[str] | None = None,
    toward: Toward | None = "longer",
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Extraction:
    """theta2 - theta1 of two checkpoints (names, folders or models in memory).

    `rank` None gives the exact `TaskVector`; a number gives a `Direction` of that rank (less where a matrix is
    smaller). `modules` are endings of linear modules' names, all of them when None. `toward` is where chains go as
    alpha grows: "longer" when the second is the reasoner, as in the paper. The work is done in fp32 on
    `device` (CUDA if there is one, else the CPU), one matrix at a time; `seed` decides the sketches of large matrices.
    Raises DirectionMismatch for two checkpoints that cannot be subtracted, DataError for two equal ones.
    """
    if rank is not None and rank < 1:
        raise SettingError(f"rank is {rank}; expected 1 or more, or none for the exact task vector")
    vector = TaskVector.between(base, reasoner, toward=toward)
    equal = f"{vector.start.name} and {getattr(vector.end, 'name', '')} are equal: there is no direction between them"
    if rank is None:
        if modules is not None:
            raise SettingError("modules were chosen without a rank; an exact task vector moves all weights")
        if not any(bool(vector.delta(name, "cpu").any()) for name in vector.moves):  # ends at the first that moves
            raise DataError(equal)
        return Extraction(vector, None, (), {}, 1.0)
    anatomy = vector.start.anatomy
    chosen = _choose(anatomy, modules)
    where = _device() if device is None else pick_device(device)
    factors, kept = dict[str, Factor](), list[Kept]()
    left_out: dict[str, float] = dict.fromkeys(LEFT_OUT, 0.0)
    total = held = 0.0
    for done, name in enumerate(vector.moves):
        progress("extract", done, len(vector.moves), name)
        delta = vector.delta(name, where)
        square = _square(delta)
        if not math.isfinite(square):
            raise DataError(f"{name}: {vector.start.name} or {getattr(vector.end, 'name', '')} holds NaN or infinity there; take another checkpoint")
        total += square
        module = name.removesuffix(".weight")
        if module not in chosen:
            left_out[_kind(name, anatomy)] += square
            continue
        A, B, values = low_rank(delta, rank, seed=seed ^ zlib.crc32(module.encode()))
        factors[module] = Factor(A.cpu(), B.cpu(), A.shape[0])
        energy = min(1.0, _square(values) / square) if square else 1.0
        held += energy * square
        kept.append(Kept(module, A.shape[0], square**0.5, energy))
    progress("extract", len(vector.moves), len(vector.moves))
    if not total:
        raise DataError(equal)
    report = {"rank": str(rank), "energy": f"{held / total:.6f}", "energy left out": ", ".join(
        f"{kind} {square / total:.6f}" for kind, square in left_out.items() if square
    )}  # fmt: skip
    card = replace(vector.card, facts={**vector.card.facts, **report}, base_sha256=fingerprint(vector.start))
    # Endings would reach modules that were not chosen when the user names whole modules of some layers only.
    named = endings(factors)
    direction = Direction(factors, card, named if _reach(named, anatomy) == set(factors) else tuple(factors))
    return Extraction(
        direction, rank, tuple(kept), {kind: square / total for kind, square in left_out.items()}, held / total
    )


def low_rank(delta: Tensor, rank: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A [r, in], B [out, r] and the r singular values kept of `delta` [out, in], balanced: |A| = |B|.

    Exact (LAPACK) up to 1024 on the smaller side; beyond, a seeded randomised subspace iteration (Halko et al. 2011,
    algorithm 4.4). The factors it gives are an orthogonal projection of delta, so the energy computed from its
    values is what is really kept.
    """
    rank = min(rank, *delta.shape)
    columns = rank + _EXTRA_COLUMNS
    if min(delta.shape) <= max(_EXACT_UP_TO, columns):
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
    else:
        # The generator lives on the CPU so that a seed gives the same sketch on every device.
        sketch = torch.randn(delta.shape[1], columns, generator=torch.Generator().manual_seed(seed)).to(delta)
        basis = torch.linalg.qr(delta @ sketch).Q
        for _ in range(_POWER_ITERATIONS):
            basis = torch.linalg.qr(delta @ torch.linalg.qr(delta.T @ basis).Q).Q
        inner, values, right = torch.linalg.svd(basis.T @ delta, full_matrices=False)
        left = basis @ inner
    root = values[:rank].sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root, values[:rank]


def _device() -> torch.device:
    # Not MPS: torch has no QR or SVD there.
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _square(tensor: Tensor) -> float:
    """The squared Frobenius norm; blocks of rows, so that an embedding is not copied whole."""
    blocks = tensor.reshape(len(tensor) if tensor.ndim else 1, -1).split(_BLOCK_ROWS)
    return sum(float(block.square().sum(1).double().sum()) for block in blocks)


def _choose(anatomy: Anatomy, modules: Sequence[str] | None) -> set[str]:
    """The linear modules that get factors."""
    if not anatomy.linears:
        raise DataError(
            "the model has 0 linear modules, so there is nothing a LoRA could carry; use the exact task vector"
        )
    if modules is None:
        return set(anatomy.linears)
    for ending in modules:
        if not _reach([ending], anatomy):
            raise SettingError(unknown("module", ending, {name.rpartition(".")[2] for name in anatomy.linears}))
    return _reach(modules, anatomy)


def _reach(names: Sequence[str], anatomy: Anatomy) -> set[str]:
    """Linear modules whose names are, or end at a dot with, one of `names`."""
    return {module for module in anatomy.linears if any(f".{module}".endswith(f".{name}") for name in names)}


def _kind(name: str, anatomy: Anatomy) -> str:
    if name == anatomy.vocabulary[0]:
        return "embeddings"
    if name in anatomy.vocabulary:
        return "output layer"
    if name.endswith(".bias"):
        return "biases"
    return "norms" if len(anatomy.shapes.get(name, ())) == 1 else "other"
