"""Examples as batches: token ids, labels and one alpha per row, or per token where several examples share a row.

Rows are padded on the right and carry no attention mask (causal attention never looks right, and the fused
kernels need no mask), or packed into one row with restarting positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cotvalve.errors import DataError
from cotvalve.prompts import prompt, render, target
from cotvalve.records import Json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cotvalve.recipes import Stage

IGNORED = -100
"""The label of positions that are not learned."""


def encode(stage: Stage, tokenizer: PreTrainedTokenizerBase, ask: str, max_length: int) -> tuple[list[Json], int]:
    """Examples as token ids: input_ids, labels (prompt positions are -100), alpha; and how many were too long."""
    how = prompt(ask)
    rows: list[Json] = []
    too_long = 0
    for example in stage.examples:
        before = render(tokenizer, example.problem.question, how)
        start = tokenizer(before, add_special_tokens=False)["input_ids"]
        end = tokenizer(target(tokenizer, before, example.chain.text), add_special_tokens=False)["input_ids"]
        if len(start) + len(end) > max_length:
            too_long += 1
            continue
        rows.append({"input_ids": start + end, "labels": [IGNORED] * len(start) + end, "alpha": example.alpha})
    if not rows:
        raise DataError(f"stage '{stage.name}': 0 of {len(stage.examples)} examples fit {max_length} tokens; raise max_length")
    return rows, too_long


def pack(rows: Sequence[Json], length: int) -> list[Json]:
    """Rows of up to `length` tokens, first fit by falling length; positions restart, alpha becomes per token."""
    bins: list[list[Json]] = []
    room: list[int] = []
    for row in sorted(rows, key=lambda r: -len(r["input_ids"])):
        size = len(row["input_ids"])
        at = next((i for i, free in enumerate(room) if free >= size), None)
        if at is None:
            bins.append([row])
            room.append(length - size)
        else:
            bins[at].append(row)
            room[at] -= size
    return [
        {
            "input_ids": [token for row in packed for token in row["input_ids"]],
            "labels": [label for row in packed for label in row["labels"]],
            "alpha": [row["alpha"] for row in packed for _ in row["input_ids"]],
            "position_ids": [i for row in packed for i in range(len(row["input_ids"]))],
        }
        for packed in bins
    ]


def collate(rows: Sequence[Json]) -> dict[str, Tensor]:
    """Pads on the right: input_ids and labels [B, T]; alpha [B], or [B, T] and position_ids for packed rows."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, value: int | float) -> Tensor:
        return torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])

    batch = {"input_ids": padded("input_ids", 0), "labels": padded("labels", IGNORED)}
    if "position_ids" in rows[0]:
        batch["position_ids"] = padded("position_ids", 0)
        batch["alpha"] = padded("alpha", 0.0)
    else:
        batch["alpha"] = torch.tensor([row["alpha"] for row in rows])
    return batch
