"""Examples as batches: token ids, labels and one alpha per row, or per token where several examples share a row.

Rows are padded on the right and carry no attention mask (causal attention never looks right, and the fused
kernels need no mask), or stand one behind the other with restarting positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cotvalve.errors import DataError
from cotvalve.prompts import prompt, render, target
from cotvalve.records import Json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cotvalve.recipes import Stage

IGNORED = -100
"""The label of positions that are not learned."""
COARSE = 1024
"""The longest row of a flat batch is given to the attention kernel as a multiple of this: it bounds, and may be larger."""


def encode(stage: Stage, tokenizer: PreTrainedTokenizerBase, ask: str, max_length: int) -> tuple[list[Json], int]:
    """Examples as token ids: input_ids, labels (prompt positions are -100), alpha, weight; and how many were too long.

    Rows have no weight where every example of the stage counts once.
    """
    how = prompt(ask)
    rows: list[Json] = []
    too_long = 0
    weighted = any(example.weight != 1 for example in stage.examples)
    # A question is rendered once for all of its chains, and texts go to the tokenizer together, which takes all cores for
    # them: a GPU stands still meanwhile.
    asked = {question: render(tokenizer, question, how) for question in dict.fromkeys(example.problem.question for example in stage.examples)}
    starts = dict(zip(asked, _ids(tokenizer, [*asked.values()]), strict=True))
    ends = _ids(tokenizer, [target(tokenizer, asked[example.problem.question], example.chain.text, example.ended) for example in stage.examples])
    for example, end in zip(stage.examples, ends, strict=True):
        start = starts[example.problem.question]
        if len(start) + len(end) > max_length:
            too_long += 1
            continue
        rows.append({"input_ids": start + end, "labels": [IGNORED] * len(start) + end, "alpha": example.alpha})
        if weighted:
            rows[-1]["weight"] = example.weight
    if not rows:
        raise DataError(f"stage '{stage.name}': 0 of {len(stage.examples)} examples fit {max_length} tokens; raise max_length")
    return rows, too_long


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []  # pyright: ignore[reportReturnType]


def pack(rows: Sequence[Json], length: int) -> list[Json]:
    """Rows of up to `length` tokens, first fit by falling length; positions restart, alpha (and weight) become per token."""
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
            **({"weight": [row["weight"] for row in packed for _ in row["input_ids"]]} if "weight" in packed[0] else {}),
        }
        for packed in bins
    ]


def portions(rows: Sequence[Json], tokens: int, most: int | None = None, *, flat: bool = False) -> list[list[Json]]:
    """The rows of an optimizer step in portions of `tokens` at once, padding counted (there is none when `flat`).

    Longest rows first, as few portions as that allows, and no smaller last one: a GPU is slow at a few rows.
    `most` bounds the rows of a portion. A row longer than `tokens` is a portion of its own.
    """
    longest_first = sorted(rows, key=lambda row: -len(row["input_ids"]))

    def cut(room: int) -> list[list[Json]]:
        parts: list[list[Json]] = []
        free = 0
        for row in longest_first:
            size = len(row["input_ids"])
            taken = len(parts[-1][0]["input_ids"]) if parts and not flat else size
            if parts and taken <= free and (most is None or len(parts[-1]) < most):
                parts[-1].append(row)
                free -= taken
            else:
                parts.append([row])
                free = room - size
        return parts

    fewest = len(cut(tokens))
    # The least room that needs no more portions makes them even.
    low, high = 1, tokens
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(cut(middle)) <= fewest else (middle + 1, high)
    return cut(low)


def collate(rows: Sequence[Json]) -> dict[str, Tensor]:
    """Pads on the right: input_ids and labels [B, T]; alpha [B], or [B, T] and position_ids for packed rows.

    `places` says which of the B * T positions, counted through, predict a token that is learned; `weights` and `before` have
    a number for each of them where rows have weights and know their log p.
    """
    width = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, value: int | float) -> Tensor:
        return torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])

    batch = {"input_ids": padded("input_ids", 0), "labels": padded("labels", IGNORED)}
    batch["places"] = places(batch["labels"])
    if "position_ids" in rows[0]:
        batch["position_ids"] = padded("position_ids", 0)
        batch["alpha"] = padded("alpha", 0.0)
    else:
        batch["alpha"] = torch.tensor([row["alpha"] for row in rows])
    if "weight" in rows[0]:
        batch["weights"] = torch.stack([_each(row["weight"], width) for row in rows]).flatten()[batch["places"]]
    return batch | _before(rows)


def collate_flat(rows: Sequence[Json]) -> dict[str, Any]:
    """Rows one behind the other: input_ids, labels, alpha and position_ids [1, N] without padding.

    `starts` [rows + 1] says where they begin, and where the last one ends; `longest` bounds their lengths.
    """
    starts: list[int] = []
    begin = 0
    for row in rows:
        starts += [begin + i for i, position in enumerate(row["position_ids"]) if position == 0] if "position_ids" in row else [begin]
        begin += len(row["input_ids"])
    starts.append(begin)
    lengths = [end - start for start, end in pairwise(starts)]
    labels = torch.tensor([list(chain.from_iterable(row["labels"] for row in rows))])
    labels[0, starts[:-1]] = IGNORED  # no token stands before the first one of a row
    first = torch.tensor(starts[:-1])
    alphas = [_each(row["alpha"], len(row["input_ids"])) for row in rows]
    learned = places(labels)
    weights = [_each(row["weight"], len(row["input_ids"])) for row in rows if "weight" in row]
    return {
        "input_ids": torch.tensor([list(chain.from_iterable(row["input_ids"] for row in rows))]),
        "labels": labels,
        "places": learned,
        **({"weights": torch.cat(weights)[learned]} if weights else {}),
        **_before(rows),
        "position_ids": (torch.arange(begin) - first.repeat_interleave(torch.tensor(lengths)))[None],
        "alpha": torch.cat(alphas)[None],
        "starts": torch.tensor(starts, dtype=torch.int32),
        # In coarse steps: every other value would be compiled anew.
        "longest": -(-max(lengths) // COARSE) * COARSE,
    }


def _before(rows: Sequence[Json]) -> dict[str, Tensor]:
    return {"before": torch.tensor([p for row in rows for p in row["before"]])} if "before" in rows[0] else {}


def _each(value: float | Sequence[float], tokens: int) -> Tensor:
    """One number for each of `tokens` positions, of a row's own or of one for each token."""
    given = torch.tensor(value, dtype=torch.float32)
    return given.expand(tokens) if given.ndim == 0 else nn.functional.pad(given, (0, tokens - len(given)))


def places(labels: Tensor) -> Tensor:
    """Positions of `labels` [B, T], counted through, whose next token in the row is learned."""
    following = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return (following != IGNORED).flatten().nonzero()[:, 0]
