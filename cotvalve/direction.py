"""The learned thing: a direction in weight space as LoRA factors, immutable.

In goes a folder in PEFT's format (or factors in memory); out come the factors, their scale, and what PEFT needs
to put them on a model. A direction says where its chains go (`toward`), never by the sign of alpha. Arithmetic
reads like maths: `2 * d`, `-d`, `d + e`, `d - e`. `lora_alpha` lives only here, at PEFT's border.

Left out on purpose: DoRA (its change of weights is not linear in alpha; `taskvector.from_dora` makes the exact
difference), LoRA on embeddings, trained biases, and every variant of LoRA that changes the base weights.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cotvalve import checkpoints
from cotvalve.adapters import (
    CONFIG,
    FACTORS,
    PREFIX,
    Adapter,
    Factor,
    endings,
    load_adapter,
    patterns,
    read_adapter,
    refuse_unscalable,
)
from cotvalve.card import CARD, FUSED, Card
from cotvalve.errors import DataError, DirectionMismatch, SettingError
from cotvalve.records import read_json, write_text
from cotvalve.weights import is_bare

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

    from cotvalve.taskvector import TaskVector


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Direction:
    """A LoRA direction: factors by module name, and its card.

    >>> from torch import ones
    >>> d = Direction({"up_proj": Factor(A=ones(1, 2), B=ones(3, 1), lora_alpha=2)}, Card("base", "shorter"))
    >>> (2 * d - d / 2).factors["up_proj"].delta().tolist()
    [[3.0, 3.0], [3.0, 3.0], [3.0, 3.0]]
    >>> (-d).card.toward
    'longer'
    """

    factors: Mapping[str, Factor]
    """By the module's name in the base model, for example 'model.layers.0.mlp.up_proj'."""
    card: Card
    targets: tuple[str, ...] = ()
    """PEFT's target_modules: endings such as 'q_proj' where they name these modules and no others, else whole
    names. Worked out from the names when not given."""

    def __post_init__(self) -> None:
        if not self.factors:
            raise DirectionMismatch("a direction needs at least one module with LoRA factors; 0 were given")
        for name, factor in self.factors.items():
            if factor.A.ndim != 2 or factor.B.ndim != 2 or factor.A.shape[0] != factor.B.shape[1]:
                raise DirectionMismatch(
                    f"{name}: A {list(factor.A.shape)} and B {list(factor.B.shape)} do not multiply; "
                    "expected A [rank, in] and B [out, rank]"
                )
        if len({factor.rslora for factor in self.factors.values()}) > 1:
            raise DirectionMismatch("some modules are rsLoRA and some are not; PEFT's format has one flag for all")
        object.__setattr__(self, "factors", MappingProxyType(dict(self.factors)))
        object.__setattr__(self, "targets", tuple(sorted(self.targets or endings(self.factors))))

    def __reduce__(self) -> tuple[Any, ...]:
        return Direction, (dict(self.factors), self.card, self.targets)

    def __repr__(self) -> str:
        ranks = sorted({factor.rank for factor in self.factors.values()})
        rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        return (
            f"Direction({len(self.factors)} modules, rank {rank}, toward {self.card.toward or 'not measured'}, "
            f"base {self.card.base or 'not named'})"
        )

    # Arithmetic

    def __mul__(self, by: float) -> Direction:
        if not isinstance(by, (int, float)):  # pyright: ignore[reportUnnecessaryIsInstance]
            return NotImplemented
        if not math.isfinite(by):
            raise SettingError(f"a direction was multiplied by {by}; expected a finite number")
        # The sign goes into B: a negative lora_alpha is legal for PEFT, but not every reader of its format takes it.
        made = {
            name: replace(factor, B=-factor.B if by < 0 else factor.B, lora_alpha=abs(by) * factor.lora_alpha)
            for name, factor in self.factors.items()
        }
        return Direction(made, self.card.turned(by), self.targets)

    __rmul__ = __mul__

    def __truediv__(self, by: float) -> Direction:
        if by == 0:
            raise SettingError("a direction was divided by 0; expected another number")
        return self * (1 / by)

    def __neg__(self) -> Direction:
        return -1 * self

    def __add__(self, other: Direction) -> Direction:
        """The sum, exact: ranks are put side by side, so its rank is the sum of theirs."""
        if not isinstance(other, Direction):  # pyright: ignore[reportUnnecessaryIsInstance]
            return NotImplemented
        made: dict[str, Factor] = {}
        for name in [*self.factors, *(name for name in other.factors if name not in self.factors)]:
            mine, theirs = self.factors.get(name), other.factors.get(name)
            if mine is not None and theirs is not None:
                if mine.shape != theirs.shape:
                    raise DirectionMismatch(
                        f"{name}: changes a weight of {list(mine.shape)} in one direction, {list(theirs.shape)} in "
                        "the other; add directions of one base"
                    )
                made[name] = mine + theirs
            else:
                only = mine or theirs
                assert only is not None
                made[name] = only.plain()
        toward = self.card.toward if self.card.toward == other.card.toward else None
        base = self.card.base_sha256 if self.card.base_sha256 == other.card.base_sha256 else ""
        card = replace(self.card, toward=toward, base_sha256=base)
        return Direction(made, card, tuple({*self.targets, *other.targets}))

    def __sub__(self, other: Direction) -> Direction:
        return self + -other

    def alike(self, other: Direction) -> bool:
        """True where both change the same modules at the same ranks and scales, so that one can stand in the other's layers."""
        shapes, others = ({name: (f.rank, f.scale, f.shape) for name, f in d.factors.items()} for d in (self, other))
        return shapes == others

    def sha256(self) -> str:
        """Hex digest of the change itself: names, scales and factors. A direction trained again has another."""
        digest = hashlib.sha256()
        for name, factor in sorted(self.factors.items()):
            digest.update(f"{name} {factor.scale!r} {list(factor.A.shape)} {factor.A.dtype} {factor.B.dtype}".encode())
            for side in (factor.A, factor.B):
                digest.update(side.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    # PEFT's border

    def lora_config(self, targets: Iterable[str] | None = None) -> LoraConfig:
        """PEFT's config of this direction, ready to be trained on or loaded into; on its `targets` where none are named."""
        from peft import LoraConfig

        rank, rank_pattern = patterns({name: factor.rank for name, factor in self.factors.items()})
        lora_alpha, alpha_pattern = patterns({name: _whole(factor.lora_alpha) for name, factor in self.factors.items()})
        return LoraConfig(
            r=int(rank),
            lora_alpha=lora_alpha,  # pyright: ignore[reportArgumentType]  PEFT reads fractions as well
            use_rslora=next(iter(self.factors.values())).rslora,
            rank_pattern=rank_pattern,
            alpha_pattern=alpha_pattern,
            target_modules=list(self.targets if targets is None else targets),
            task_type="CAUSAL_LM",
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The factors by PEFT's keys, as `set_peft_model_state_dict` takes them and the folder holds them."""
        state: dict[str, Tensor] = {}
        for name, factor in self.factors.items():
            state[f"{PREFIX}{name}.lora_A.weight"] = factor.A
            state[f"{PREFIX}{name}.lora_B.weight"] = factor.B
        return state

    @classmethod
    def from_peft(cls, config: LoraConfig | Mapping[str, Any], state: Mapping[str, Tensor], card: Card) -> Direction:
        """A direction from PEFT's config and state dict; the factors are copied to the CPU.

        Raises DataError for what alpha could not scale: DoRA, biases, whole modules, unknown kinds.
        """
        fields = config if isinstance(config, Mapping) else config.to_dict()
        refuse_unscalable(fields, "the adapter")
        copied = {key: value.detach().to("cpu", copy=True) for key, value in state.items()}
        return cls._of(read_adapter(fields, copied, "the adapter"), card)

    @classmethod
    def _of(cls, adapter: Adapter, card: Card) -> Direction:
        return cls(adapter.factors, card, adapter.targets)

    # Disk

    @classmethod
    def load(cls, where: str | Path) -> Direction:
        """The direction in a folder, a hub repository or an embedded name ('tiny-valve'), on the CPU.

        Raises DataError for a folder that is not one, is pickled, truncated, or holds more than a LoRA.
        """
        folder = checkpoints.fetch(where, checkpoints.DIRECTION_FILES)
        adapter = load_adapter(folder)
        card = Card.read(folder / CARD, "lora") if (folder / CARD).exists() else Card(base=adapter.base)
        return cls._of(adapter, card)

    def save(self, folder: str | Path) -> Path:
        """Writes PEFT's two files and the card; `PeftModel.from_pretrained` and vLLM read the folder."""
        folder = Path(folder)
        state = self.state_dict()
        for name, tensor in state.items():
            if not tensor.isfinite().all():
                raise DataError(
                    f"{folder}: not written: {name.removeprefix(PREFIX)} holds NaN or infinity; its training diverged"
                )
        fields = {
            **self.lora_config().to_dict(),
            "base_model_name_or_path": self.card.base,
            "inference_mode": True,
            "target_modules": list(self.targets),
        }
        # Copies: modules may share one A, which safetensors does not write.
        checkpoints.write_tensors(folder / FACTORS, {name: tensor.clone() for name, tensor in state.items()})
        write_text(folder / CONFIG, json.dumps(fields, indent=2, sort_keys=True) + "\n")
        self.card.write(folder / CARD, "lora")
        return folder


def load_direction(where: str | Path, base: PreTrainedModel | str | Path | None = None) -> Direction | TaskVector:
    """What a folder holds: a LoRA direction, a task vector, or a DoRA adapter as its exact weight difference.

    `base` is the model it will be put on; a DoRA adapter cannot be read without it.
    """
    folder = checkpoints.fetch(where, checkpoints.DIRECTION_FILES)
    from cotvalve import taskvector

    if _says(folder / CARD, "kind") == "taskvector":
        return taskvector.TaskVector.load(folder, base)
    if base is not None and _says(folder / CONFIG, "use_dora"):
        return taskvector.from_dora(folder, base)
    return Direction.load(folder)


def check_fits(direction: Direction, model: nn.Module) -> int:
    """The number of modules `direction` will change on `model`.

    Raises DirectionMismatch, naming the first module that is missing or of another shape, when no module
    matches, and when the model was fused or holds a merged adapter.
    """
    refuse_fused(model)
    linears = _linears(model)
    missing = [name for name in direction.factors if name not in linears]
    what = f"direction for '{direction.card.base}'" if direction.card.base else "direction"
    if missing and (other := dict(model.named_modules()).get(missing[0])) is not None:
        raise DirectionMismatch(f"{missing[0]}: is a {type(other).__name__} in the model; the dial turns linear modules only")
    if len(missing) == len(direction.factors):
        near = difflib.get_close_matches(missing[0], linears, n=1, cutoff=0)
        hint = f"; the nearest it has is '{near[0]}'" if near else ""
        raise DirectionMismatch(
            f"{missing[0]}: 0 of {len(missing)} modules of the {what} are in the model{hint}; "
            "give the direction's own base"
        )
    if missing:
        raise DirectionMismatch(
            f"{missing[0]}: not in the model; {len(direction.factors) - len(missing)} of {len(direction.factors)} "
            f"modules of the {what} match; give the direction's own base"
        )
    for name, factor in direction.factors.items():
        if is_bare(model, name):
            raise DirectionMismatch(f"{name}: {type(model).__name__} reads its weight without calling it, so the dial could not turn it; leave that module out")
        if linears[name] != factor.shape:
            raise DirectionMismatch(
                f"{name}: the {what} changes a weight of {list(factor.shape)}, the model's is {list(linears[name])}; "
                "give the direction's own base"
            )
    return len(direction.factors)


def refuse_adapted(model: nn.Module) -> None:
    """Raises DirectionMismatch as `refuse_fused` does, and for a model with an adapter on it: two valves would turn one LoRA."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    refuse_fused(model)
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise DirectionMismatch(
            "the model has an adapter on it already (another Valve's?); give that valve the other direction with turn_to, or load the model again"
        )


def refuse_fused(model: nn.Module) -> None:
    """Raises DirectionMismatch for a model that already has a direction inside its weights."""
    config = getattr(model, "config", None)
    if fused := getattr(config, FUSED, None):
        raise DirectionMismatch(
            f"{getattr(config, 'name_or_path', '') or 'this model'}: was fused at alpha {fused.get('alpha')} and "
            "has no dial any more; "
            f"load the base it was made from ({fused.get('base') or 'see its card'})"
        )
    for name, module in model.named_modules():
        if getattr(module, "merged_adapters", None):
            raise DirectionMismatch(
                f"{name}: an adapter is merged into this weight, so alpha could not move it; load the base model again "
                "and give the adapter as the direction"
            )


def _says(path: Path, field: str) -> Any:
    found = read_json(path) if path.exists() else None
    return found.get(field) if isinstance(found, dict) else None


def _linears(model: nn.Module) -> dict[str, tuple[int, int]]:
    """[out, in] of every linear module by its name in the base model, also when PEFT has wrapped it."""
    found: dict[str, tuple[int, int]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".lora_" not in name:
            # in_features and not the weight's shape: 4-bit weights are packed.
            found[name.removeprefix(PREFIX).removesuffix(".base_layer")] = module.out_features, module.in_features
    return found


def _whole(number: float) -> float:
    """8.0 as 8, as PEFT writes it; some readers of the format want an integer."""
    return int(number) if float(number).is_integer() else number
