"""The default engine: own decoding loop on a transformers model, on CPU and GPU.

A fixed number of slots holds one chain each; a slot is refilled as soon as its chain ends, so short chains
never wait for long ones. Every row has its own alpha and its own position in a static key-value cache.
On CUDA the decoding step is a graph, captured once per number of rows and replayed: alphas live in a tensor the
graph reads, so a new alpha costs nothing. Texts are decoded and handed over while the card computes the next steps.

Left out on purpose: sliding-window, linear and soft-capped attention (`unsupported` says so and the plain
engine takes over), beam search, speculative decoding.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from cotvalve.engines import gated, kernels, thin
from cotvalve.engines.attend import faster_attention
from cotvalve.engines.batch import Batch, Ended
from cotvalve.engines.branch import faster_branches
from cotvalve.engines.draw import faster_draws
from cotvalve.engines.layers import current, faster_layers, joins_of
from cotvalve.engines.norms import fused_norms
from cotvalve.engines.replaced import Replacement, replaced
from cotvalve.engines.rotation import fused_rotation
from cotvalve.engines.sampling import Codec, Encoded
from cotvalve.engines.slots import ATTENTION
from cotvalve.errors import EngineError
from cotvalve.taskvector import TaskVector
from cotvalve.types import Completion, Progress, Request, silent

if TYPE_CHECKING:
    from cotvalve.valve import Valve


MOST_SLOTS = 2048
"""Chains at once on a GPU, where the memory holds so many: the more there are, the less each one waits for weights."""
def unsupported(model: PreTrainedModel) -> str:
    """Why this engine cannot run `model`, or an empty string."""
    config = model.config
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention cannot be replaced"
    if config.get_text_config() is not config:
        return "its language model is a part of a larger one"
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return "it has layers other than full attention"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return "it has sliding-window attention"
    if getattr(config, "attn_logit_softcapping", None):
        return "it caps attention logits"
    return ""


class TransformersEngine:
    """Slots on a transformers model."""

    name = "transformers"

    def __init__(self, valve: Valve, *, batch: int | None = None, graphs: bool | None = None) -> None:
        """`batch` slots (None: from memory); `graphs` None means CUDA graphs on CUDA."""
        if why := unsupported(valve.model):
            raise EngineError(f"engine 'transformers' cannot run {type(valve.model).__name__}: {why}; use engine 'generate'")
        self.valve, self.batch = valve, batch
        cuda = valve.model.device.type == "cuda"
        self.graphs = cuda if graphs is None else graphs and cuda
        self._codec = Codec(valve.model, valve.tokenizer)
        self._faster: list[Replacement] | None = None
        self.last: torch.cuda.CUDAGraph | None = None
        """The graph captured last: the next one takes over its memory."""
        self._kernels: list[str] = []
        """What our kernels compute, once that is known."""

    def facts(self) -> dict[str, str]:
        """See `Engine.facts`; once chains are sampled, what our kernels compute is told too."""
        return {"engine": self.name} | ({"kernels": ", ".join(self._kernels)} if self._kernels else {})

    def generate(self, requests: Iterable[Request], progress: Progress = silent) -> Iterator[Completion]:
        """See `Engine.generate`. Out of memory halves the slots and goes on with what is unfinished."""
        encoded, refused = self._codec.encode(list(requests))
        yield from refused
        total, done, tokens, began = len(encoded) + len(refused), len(refused), 0, time.monotonic()
        ended: list[Ended] = []

        def texts() -> Iterator[Completion]:
            nonlocal done, tokens
            found = self._codec.completions(ended)
            ended.clear()
            for completion in found:
                done += 1
                tokens += completion.tokens
                yield completion

        if encoded:
            progress("sample", done, total, f"engine {self.name}")
        groups: dict[float, list[Encoded]] = {}
        for e in encoded:
            groups.setdefault(0.0 if self.valve.rows else e.request.alpha, []).append(e)
        for alpha in sorted(groups):
            # The lowest alphas first: they write the longest chains, and chains of one length share their steps best
            # (without a kernel for it, attention reads as far as the longest row; and the last chains run alone).
            waiting = sorted(groups[alpha], key=lambda e: (e.request.alpha, -(len(e.ids) + e.room)))
            longest, slots = max(len(e.ids) + e.room for e in waiting), 0
            while waiting:
                batch: Batch | None = None
                try:
                    # Weights of an exact task vector are moved once here, not at every token.
                    with self.fitted(), nullcontext() if self.valve.rows else self.valve.at(alpha):
                        slots = slots or min(self.batch or self.slots_that_fit(longest), len(waiting))
                        batch = Batch(self, waiting, slots, alpha)
                        while batch.busy or ended:
                            batch.launch()
                            yield from texts()
                            ended = batch.collect()
                            progress("sample", done, total, f"{tokens / (time.monotonic() - began):,.0f} tokens/s")
                    waiting = []
                except torch.OutOfMemoryError:
                    waiting = batch.unfinished() if batch else waiting
                # Outside of the handler: an error holds on to the frames, and they to their tensors.
                yield from texts()
                if waiting:
                    if slots == 1:
                        raise EngineError("out of memory with a single chain at a time; lower max_new_tokens")
                    slots = max(1, slots // 2)
                    batch = self.last = None
                    torch.cuda.empty_cache()
                    progress("sample", done, total, f"out of memory: going on with {slots} slots")

    @contextmanager
    def fitted(self) -> Generator[None]:
        """The model as this engine wants it: attention on slots, and on a GPU most of what lies between the products in our kernels."""
        model = self.valve.model
        before = model.config._attn_implementation  # pyright: ignore[reportPrivateUsage]
        model.set_attn_implementation(ATTENTION)
        try:
            if self._faster is None or not current(self._faster):
                with kernels.on(model.device):
                    self._faster = self._find_faster()
            with replaced(self._faster):
                yield
        finally:
            model.set_attn_implementation(before or "sdpa")

    def _find_faster(self) -> list[Replacement]:
        """What this model's parts are replaced by: all prove themselves against the model's own first, once."""
        model, dial = self.valve.model, self.valve.dial
        found: list[Replacement] = list(fused_norms(model)) if model.device.type == "cuda" else []
        self._kernels = []
        if not kernels.available(model):
            return found

        def faster(what: str, more: Callable[[], Iterable[Replacement]]) -> list[Replacement]:
            """The parts that `more` finds, measured beside what was found before."""
            with replaced(found):
                new = list(more())
            found.extend(new)
            self._kernels += [what] if new else []
            return new

        try:
            if dial is not None and thin.proves(dial.inlets):
                found.append((dial, "kernel", thin.thin))
                self._kernels.append("A x")
            faster("gated layers", lambda: gated.gated_layers(model, dial))
            faster("rotation", lambda: fused_rotation(model))
            faster("attention", lambda: faster_attention(model))
            whole = faster("whole layers", lambda: faster_layers(model, dial, joining=not isinstance(self.valve.direction, TaskVector)))
            self._kernels += joins_of(whole)
            if dial is not None:
                faster("branches", lambda: faster_branches(dial, alone=not whole))
            faster("draws", lambda: faster_draws(model))
        except kernels.failures() as error:  # no compiler that knows this card, or no memory to try them in
            warnings.warn(f"our kernels are left out, PyTorch's are slower: {type(error).__name__}: {error}", stacklevel=2)
        return found

    def slots_that_fit(self, longest: int) -> int:
        """Slots whose caches fit the free memory, for chains of `longest` tokens with their prompt."""
        model = self.valve.model
        if model.device.type != "cuda":
            return 64
        config = model.config
        heads = config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        width = config.num_hidden_layers * 2 * (getattr(config, "num_key_value_heads", None) or heads) * dim
        chain = width * longest * model.dtype.itemsize
        # logits and their sampling copies take about 16 bytes a row and vocabulary entry
        chain += config.vocab_size * 16

        def found() -> int:
            free, _ = torch.cuda.mem_get_info(model.device)
            idle = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
            return int((free + idle) * 0.7 / chain)

        if (slots := found()) < MOST_SLOTS:
            # What an earlier engine held may wait for the collector, which takes a quarter of a second: only where it matters.
            gc.collect()
            torch.cuda.empty_cache()
            slots = found()
        return max(1, min(MOST_SLOTS, slots))
