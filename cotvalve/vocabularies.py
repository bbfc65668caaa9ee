"""Two tokenizers side by side: whether the same row of two embeddings means the same token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cotvalve.errors import DirectionMismatch
from cotvalve.weights import Weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def compare(start: Weights, end: Weights, cut: tuple[str, int] | None) -> dict[str, str]:
    """Facts about the vocabularies of two models; DirectionMismatch when a row would mean two different tokens.

    `cut` is the first tensor with more rows in one of them, and how many rows both have; None where all have as many.
    """
    first, last = start.tokenizer(), end.tokenizer()
    name = cut[0] if cut else start.anatomy.vocabulary[0]
    if first is None or last is None:
        if cut:
            raise DirectionMismatch(
                f"{name}: {start.name} and {end.name} differ in rows, which cannot be matched without both tokenizers; "
                "put each tokenizer beside its model"
            )
        return {"tokenizers": "not compared"}
    mine, theirs = first.get_vocab(), last.get_vocab()
    added = {*_added(first), *_added(last)}
    differing = sorted(token for token in {*mine, *theirs} if mine.get(token) != theirs.get(token))
    if ordinary := [token for token in differing if token not in added]:
        raise DirectionMismatch(
            f"{name}: {start.name} and {end.name} have different vocabularies ({len(ordinary)} tokens differ, the "
            f"first is {ordinary[0]!r}); their rows cannot be subtracted"
        )
    if cut is None:
        return {"tokenizers": f"{len(differing)} added tokens differ: {', '.join(differing[:8])}"} if differing else {}
    if differing or max(mine.values()) >= cut[1]:
        raise DirectionMismatch(
            f"{name}: {start.name} and {end.name} differ in rows and their tokenizers in {len(differing)} tokens "
            f"({', '.join(differing[:3])}); resize the base's vocabulary to the reasoner's first"
        )
    return {"vocabulary": f"the tokenizers agree on {len(mine)} tokens; the first {cut[1]} rows move, the rest stay"}


def _added(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    return {token.content for token in tokenizer.added_tokens_decoder.values()}
