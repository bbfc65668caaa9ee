"""From logits to tokens, and from token ids to a `Completion`: what every engine on this machine shares.

Sampling inverts the distribution function at a number drawn beforehand from the request's own seed, so a
request's chain does not depend on what else is in the batch, and a run that was killed goes on with the
same chains it would have written.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from cotvalve.prompts import THINK, end_think_id, stop_ids
from cotvalve.types import Completion, Request

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


BLOCK = 512
"""Vocabulary entries summed at a time when a token is drawn."""


def uniforms(request: Request, count: int) -> np.ndarray:
    """The request's own random numbers in [0, 1), the first `count`, one per new token: float32 [count]."""
    return np.random.Generator(np.random.Philox(request.seed)).random(count, dtype=np.float32)


def greedy(logits_B_V: Tensor) -> Tensor:
    """Token ids [B]."""
    return logits_B_V.argmax(-1)


def sample(logits_B_V: Tensor, uniform_B: Tensor, temperature_B: Tensor, top_p_B: Tensor | None) -> Tensor:
    """Token ids [B]; rows with temperature 0 are greedy. `top_p_B` None skips the sort that it needs."""
    weights = torch.softmax(logits_B_V.float() / temperature_B.clamp_min(1e-6)[:, None], -1)
    if top_p_B is not None:
        ordered, order = weights.sort(-1, descending=True)
        # A token stays while the mass before it is below top_p; the first one always does, also at top_p 0.
        gone = ordered.cumsum(-1) - ordered >= top_p_B[:, None]
        gone[:, 0] = False
        ordered = ordered.masked_fill(gone, 0.0)
        weights = torch.zeros_like(weights).scatter_(-1, order, ordered)
    return torch.where(temperature_B == 0, logits_B_V.argmax(-1), invert(weights, uniform_B))


def invert(weights_B_V: Tensor, uniform_B: Tensor) -> Tensor:
    """The first index [B] at which the cumulated weights exceed uniform * their sum: never one of weight 0.

    Blocks first, then inside one block: a running sum over 150k entries a row is ten times slower on a GPU.
    """
    rows, size = weights_B_V.shape
    blocks = nn.functional.pad(weights_B_V, (0, -size % BLOCK)).view(rows, -1, BLOCK)
    summed = blocks.sum(-1).cumsum(-1)
    wanted = (uniform_B * summed[:, -1])[:, None]
    # right=True passes over blocks and tokens that end where the draw begins.
    block = torch.searchsorted(summed, wanted, right=True).clamp_max(summed.shape[1] - 1)
    before = torch.where(block > 0, summed.gather(1, (block - 1).clamp_min(0)), 0.0)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK))[:, 0].cumsum(-1)
    # Rounding may leave the draw past the block's last weight; it belongs to the last token that has one.
    last = (inside < inside[:, -1:]).sum(-1, keepdim=True)
    place = torch.minimum(torch.searchsorted(inside, wanted - before, right=True), last)
    return (block * BLOCK + place)[:, 0]


@dataclass(frozen=True)
class Encoded:
    """A request with its prompt ids and the number of new tokens that fit the context."""

    request: Request
    ids: list[int]
    room: int


class Codec:
    """Encodes requests and decodes chains for one model and tokenizer."""

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
        self.tokenizer = tokenizer
        generation = model.generation_config
        # Declared as always there, but a model may be without one.
        self.stops = stop_ids(tokenizer, generation.eos_token_id if generation is not None else None)  # pyright: ignore[reportUnnecessaryComparison]
        self._end_think = end_think_id(tokenizer)
        self.context = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 2**31)

    def encode(self, requests: Sequence[Request]) -> tuple[list[Encoded], list[Completion]]:
        """Requests that can run, and completions that say why the others cannot."""
        if not requests:
            return [], []
        fits: list[Encoded] = []
        refused: list[Completion] = []
        # A sweep asks each question at every alpha, and nothing can be computed before all lengths are known.
        prompts = list(dict.fromkeys(request.prompt for request in requests))
        known = dict(zip(prompts, self._ids(prompts), strict=True))
        for request in requests:
            ids = known[request.prompt]
            room = min(request.max_new_tokens, self.context - len(ids))
            if not ids or room < 1:
                why = "the prompt is empty" if not ids else f"the prompt has {len(ids)} tokens, the context {self.context}"
                refused.append(Completion(request.id, request.alpha, "", 0, "error", len(ids), reason=why))
            else:
                fits.append(Encoded(request, ids, room))
        return fits, refused

    def _ids(self, prompts: list[str]) -> list[list[int]]:
        behind: Any = getattr(self.tokenizer, "backend_tokenizer", None)
        if behind is None or behind.truncation or behind.padding or getattr(self.tokenizer, "split_special_tokens", False):
            return [list(ids) for ids in self.tokenizer(prompts, add_special_tokens=False)["input_ids"]]
        # What the tokenizer calls, on all cores, without masks and offsets: a quarter less time.
        return [encoding.ids for encoding in behind.encode_batch_fast(prompts, add_special_tokens=False)]

    def completion(self, encoded: Encoded, ids: Sequence[int]) -> Completion:
        """The completion made of generated `ids`, the stop id included when there was one."""
        return self.completions([(encoded, ids)])[0]

    def completions(self, ended: Sequence[tuple[Encoded, Sequence[int]]]) -> list[Completion]:
        """Those of several chains: texts of two thousand that end at once take the processor a fifth of a second one by one."""
        stopped = [bool(ids) and ids[-1] in self.stops for _, ids in ended]
        texts = self._texts([list(ids[:-1] if stop else ids) for stop, (_, ids) in zip(stopped, ended, strict=True)])
        return [self._completion(*each, stop, text) for each, stop, text in zip(ended, stopped, texts, strict=True)]

    def _texts(self, chains: list[list[int]]) -> list[str]:
        behind: Any = getattr(self.tokenizer, "backend_tokenizer", None)
        if behind is not None and not getattr(self.tokenizer, "clean_up_tokenization_spaces", False):
            return behind.decode_batch(chains, skip_special_tokens=False)  # what decode() calls, on all cores
        return [str(self.tokenizer.decode(ids, skip_special_tokens=False)) for ids in chains]

    def _completion(self, encoded: Encoded, ids: Sequence[int], stopped: bool, text: str) -> Completion:
        finish: Literal["stop", "length"] = "stop" if stopped else "length"
        request = encoded.request
        if self._end_think is not None and self._end_think in ids:
            reasoning = list(ids).index(self._end_think) + 1
        else:
            opened = text.startswith(THINK) or request.prompt.rstrip().endswith(THINK)
            reasoning = len(ids) if opened else 0
        return Completion(request.id, request.alpha, text, len(ids), finish, len(encoded.ids), reasoning)
