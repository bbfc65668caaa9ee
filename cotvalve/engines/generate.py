"""The plain engine: `model.generate` on left-padded batches, one alpha per row.

Runs any architecture transformers can generate with. Rows of a batch wait for the longest one. Where the model's layers
fold rows into one another (shared experts, OPT) a batch has one alpha.
"""

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from cotvalve.engines.sampling import Codec, Encoded, sample, uniforms
from cotvalve.errors import EngineError
from cotvalve.types import Completion, Progress, Request, silent

if TYPE_CHECKING:
    from cotvalve.valve import Valve


class GenerateEngine:
    """`model.generate` behind the engine protocol."""

    name = "generate"

    def __init__(self, valve: "Valve", *, batch: int | None = None) -> None:
        self.valve = valve
        self.batch = batch or (64 if valve.model.device.type == "cuda" else 16)
        self._codec = Codec(valve.model, valve.tokenizer)

    def facts(self) -> dict[str, str]:
        """See `Engine.facts`."""
        return {"engine": self.name}

    def generate(self, requests: Iterable[Request], progress: Progress = silent) -> Iterator[Completion]:
        """See `Engine.generate`."""
        encoded, refused = self._codec.encode(list(requests))
        total, done, tokens, began = len(encoded) + len(refused), len(refused), 0, time.monotonic()
        yield from refused
        if encoded:
            progress("sample", done, total, f"engine {self.name}")
        mixes = self.valve.rows and (len({e.request.alpha for e in encoded}) == 1 or not folds_rows(self.valve))
        # Rows of like length and budget share a batch; with an exact task vector, rows of one alpha.
        encoded.sort(key=lambda e: (0.0 if mixes else e.request.alpha, e.room, len(e.ids)))
        start = 0
        while start < len(encoded):
            batch = encoded[start : start + self.batch]
            if not mixes:
                batch = [e for e in batch if e.request.alpha == batch[0].request.alpha]
            # Prompts are padded to the longest: one with less room may not be written past the context's end.
            while len(batch) > 1 and max(len(e.ids) for e in batch) + max(e.room for e in batch) > self._codec.context:
                batch = batch[: len(batch) // 2]
            start += len(batch)
            for completion in self._run(batch):
                done += 1
                tokens += completion.tokens
                yield completion
            progress("sample", done, total, f"{tokens / (time.monotonic() - began):,.0f} tokens/s")

    def _run(self, batch: list[Encoded]) -> list[Completion]:
        model, width = self.valve.model, max(len(e.ids) for e in batch)
        device = model.device
        ids = torch.tensor([[0] * (width - len(e.ids)) + e.ids for e in batch], device=device)
        mask = torch.tensor([[0] * (width - len(e.ids)) + [1] * len(e.ids) for e in batch], device=device)
        alphas = [e.request.alpha for e in batch]
        pad = self._codec.stops[0]
        how = GenerationConfig(
            max_new_tokens=max(e.room for e in batch), do_sample=False, eos_token_id=self._codec.stops, pad_token_id=pad
        )
        # transformers fills what a generation config leaves open from the checkpoint's own: repetition penalties too.
        own, model.generation_config = model.generation_config, GenerationConfig()
        try:
            # One position is a number: layers that fold rows into one another (experts) can be turned by that alone.
            with torch.inference_mode(), self.valve.at(alphas if len(set(alphas)) > 1 else alphas[0]):
                out = model.generate(  # pyright: ignore[reportCallIssue]  the head classes mix it in
                    input_ids=ids, attention_mask=mask, generation_config=how,
                    logits_processor=LogitsProcessorList([_Draw(batch, width, device)]),
                )  # fmt: skip
        finally:
            model.generation_config = own
        return [self._codec.completion(e, self._cut(row, e.room)) for e, row in zip(batch, out[:, width:].tolist(), strict=True)]

    def _cut(self, ids: list[int], room: int) -> list[int]:
        for i, token in enumerate(ids[:room]):
            if token in self._codec.stops:
                return ids[: i + 1]
        return ids[:room]


def folds_rows(valve: "Valve") -> bool:
    """Whether layers of the model see the rows of a batch as one, so that they cannot have an alpha each: tried on two short rows."""
    if not valve.rows:
        return False
    try:
        with torch.inference_mode(), valve.at([0.0, 1.0]):
            valve.model(input_ids=torch.zeros(2, 2, dtype=torch.long, device=valve.model.device), use_cache=False)
    except EngineError:
        return True
    return False


class _Draw(LogitsProcessor):
    """Leaves only the token that the request's own random number picks, so that greedy search takes it."""

    def __init__(self, batch: list[Encoded], width: int, device: torch.device) -> None:
        self.width = width
        self.temperature = torch.tensor([e.request.temperature for e in batch], device=device)
        self.top_p = torch.tensor([e.request.top_p for e in batch], device=device)
        most = max(e.room for e in batch)
        self.uniform = torch.zeros(len(batch), most, device=device)
        for row, e in enumerate(batch):
            if e.request.temperature > 0:
                self.uniform[row, : e.room] = torch.from_numpy(uniforms(e.request, e.room)).to(device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not bool((self.temperature > 0).any()):
            return scores
        top_p = self.top_p if bool((self.top_p < 1).any()) else None
        token = sample(scores, self.uniform[:, input_ids.shape[1] - self.width], self.temperature, top_p)
        return torch.full_like(scores, float("-inf")).scatter_(1, token[:, None], 0.0)
