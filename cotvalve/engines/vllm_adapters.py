"""A direction as folders that vLLM reads: PEFT's format with one rank and one scale, which is all it understands.

`write_direction` makes the one folder of the dial. `write_baked` makes one folder per alpha for vLLM's stock
multi-LoRA, where the alpha is the folder's `lora_alpha` and the factors are shared on disk.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from cotvalve.adapters import CONFIG, FACTORS, PREFIX
from cotvalve.direction import Direction
from cotvalve.records import write_text

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks vLLM allocates; a direction gets the next one up."""


def rank_of(direction: Direction) -> int:
    """The largest rank in the direction."""
    return max(factor.rank for factor in direction.factors.values())


def suffixes(direction: Direction) -> list[str]:
    """The last parts of its modules' names: what vLLM calls target modules."""
    return sorted({name.rpartition(".")[2] for name in direction.factors})


def write_direction(direction: Direction, folder: Path) -> str:
    """Writes `direction` with its scale inside B (in fp32, rounded once by vLLM); returns its fingerprint."""
    state: dict[str, Tensor] = {}
    for name, factor in direction.factors.items():
        # vLLM reads one rank and one lora_alpha for all modules and would pass over PEFT's patterns in silence.
        state[f"{PREFIX}{name}.lora_A.weight"] = factor.A.to(torch.float32, copy=True).contiguous()  # modules may share one A
        state[f"{PREFIX}{name}.lora_B.weight"] = (factor.scale * factor.B.float()).contiguous()
    return _write(folder, state, direction, 1.0)


def write_baked(direction: Direction, folder: Path, plain: Path, alpha: float) -> None:
    """Writes the adapter of one alpha; `plain` is what `write_direction` wrote, whose factors are linked to."""
    if alpha == 0:
        # lora_alpha 0 would leave 0 * B, which is NaN where B is.
        shapes = {name: factor for name, factor in direction.factors.items()}
        state = {f"{PREFIX}{name}.lora_A.weight": torch.zeros(1, f.shape[1]) for name, f in shapes.items()}
        state |= {f"{PREFIX}{name}.lora_B.weight": torch.zeros(f.shape[0], 1) for name, f in shapes.items()}
        _write(folder, state, direction, 0.0)
        return
    folder.mkdir(parents=True)
    os.symlink(plain / FACTORS, folder / FACTORS)
    write_text(folder / CONFIG, _config(direction, rank_of(direction), alpha))


def _write(folder: Path, state: dict[str, Tensor], direction: Direction, alpha: float) -> str:
    folder.mkdir(parents=True)
    # Not checkpoints.write_tensors: a folder for this process needs no fsync.
    data = safetensors.torch.save(state, {"format": "pt"})
    (folder / FACTORS).write_bytes(data)
    rank = next(iter(state.values())).shape[0] if alpha == 0 else rank_of(direction)
    write_text(folder / CONFIG, _config(direction, rank, alpha))
    return hashlib.sha256(data).hexdigest()[:16]


def _config(direction: Direction, rank: int, alpha: float) -> str:
    """vLLM multiplies B by lora_alpha / r."""
    fields = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha * rank, "bias": "none",
        "target_modules": suffixes(direction), "inference_mode": True, "base_model_name_or_path": direction.card.base,
    }  # fmt: skip
    return json.dumps(fields, indent=2) + "\n"
