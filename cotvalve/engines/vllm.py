# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
"""vLLM behind the engine protocol: thousands of chains at once, every one at its own alpha.

Comes in: a valve whose model lies in a folder (or on the hub) as safetensors. vLLM loads that folder itself; the
direction reaches it as it stands in the valve. With `vllm_dial` in its workers an alpha costs nothing; where this
vLLM is not known to fit, its stock multi-LoRA runs instead, one baked adapter per alpha, and `facts` and the
progress line say so. Chains of one seed are vLLM's, not the other engines': their random numbers differ.

    pip install 'cotvalve[vllm]'; cotvalve sweep --engine vllm ...

Left out on purpose: exact task vectors (they move all weights), 4-bit and GGUF weights.
"""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cotvalve import checkpoints
from cotvalve.direction import Direction
from cotvalve.engines.sampling import Codec, Encoded
from cotvalve.engines.vllm_adapters import RANKS, rank_of, suffixes, write_baked, write_direction
from cotvalve.engines.vllm_support import direction_of, missing, stock_because, unsupported
from cotvalve.errors import CotvalveError, DirectionMismatch, EngineError, SettingError
from cotvalve.types import Completion, Progress, Request, silent

if TYPE_CHECKING:
    from cotvalve.valve import Valve

STOCK_SLOTS = 8
"""Alphas that stock multi-LoRA runs at once; each slot is a copy of the adapter's weights on the GPU."""

DEATHS = 3
"""Deaths in a row without a finished chain, after which it is not started again."""
CPU_CACHE = 2 << 30
"""Bytes for keys and values on a CPU, where vLLM would take nearly all memory; VLLM_CPU_KVCACHE_SPACE overrides it."""


@dataclass(frozen=True)
class Options:
    """How vLLM is run. What is None is worked out."""

    batch: int | None = None
    """Chains at once (vLLM's max_num_seqs); 1,024 on a GPU, 32 on a CPU."""
    dial: bool | None = None
    """False asks for stock multi-LoRA, True for the dial or an error."""
    tensor_parallel: int = 1
    """GPUs that share each layer."""
    eager: bool = False
    """Without torch.compile and CUDA graphs: starts sooner, runs slower."""
    memory: float | None = None
    """Part of the GPU's memory that vLLM takes, of all there is; None: what is free, less a margin (on a CPU, of the
    memory; None: CPU_CACHE bytes for keys and values)."""
    stock_slots: int = STOCK_SLOTS
    more: dict[str, Any] = field(default_factory=dict[str, Any])
    """Further arguments of vLLM's EngineArgs, as they are."""


class Died(EngineError):
    """A running vLLM ended; what it had finished stands, and another one can go on."""


class VllmEngine:
    """Chains from vLLM."""

    name = "vllm"

    def __init__(self, valve: Valve, *, batch: int | None = None, options: Options | None = None) -> None:
        """Starts vLLM, which takes from ten seconds to some minutes."""
        if why := missing() or unsupported(valve):
            raise EngineError(f"engine 'vllm' cannot run {valve.name}: {why}" if not missing() else why)
        self.valve = valve
        self.options = options or Options(batch=batch)
        self._codec = Codec(valve.model, valve.tokenizer)
        self._direction = direction_of(valve)
        self.stock = "it was asked for" if self.options.dial is False else stock_because(valve)
        if self.stock and self.options.dial:
            raise EngineError(f"the dial cannot be put into vLLM: {self.stock}")
        self._server = Server(valve, self._direction, self.options, stock=bool(self.stock))
        self._turned_to = valve.direction
        if self._direction is not None:
            self._server.turn_to(self._direction)

    def facts(self) -> dict[str, str]:
        """See `Engine.facts`; says why, where stock multi-LoRA runs."""
        import vllm

        how = "no direction" if self._direction is None else f"stock multi-LoRA, because {self.stock}" if self.stock else "dial"
        shared = f", {self.options.tensor_parallel} GPUs" if self.options.tensor_parallel > 1 else ""
        return {"engine": f"vllm {vllm.__version__}, {how}, {self._server.batch} chains at once{shared}"}

    def close(self) -> None:
        """Ends vLLM and gives its memory back."""
        self._server.close()

    def generate(self, requests: Iterable[Request], progress: Progress = silent) -> Iterator[Completion]:
        """See `Engine.generate`. If vLLM dies it is started again, with half the batch, for what is unfinished."""
        if self.valve.direction is not self._turned_to:
            # Valve.turn_to said that only numbers changed: so they do here.
            self._direction, self._turned_to = direction_of(self.valve), self.valve.direction
            self._server.turn_to(self._direction)  # pyright: ignore[reportArgumentType]  a valve that was turned has one
        encoded, refused = self._codec.encode(list(requests))
        total, done, tokens, began = len(encoded) + len(refused), len(refused), 0, time.monotonic()
        yield from refused
        if self._direction is None and (turned := next((e for e in encoded if e.request.alpha != 0), None)):
            raise EngineError(f"alpha {turned.request.alpha:g} was asked for but no direction is loaded; name one with --direction")
        progress("sample", done, total, self.facts()["engine"])
        waiting = {str(i): e for i, e in enumerate(encoded)}
        fruitless = 0
        while waiting:
            before = len(waiting)
            try:
                for id, ids in self._server.run(waiting):
                    e = waiting.pop(id)
                    done += 1
                    tokens += 0 if ids is None else len(ids)
                    yield _completion(self._codec, e, ids, self._server.context)
                    progress("sample", done, total, f"{tokens / (time.monotonic() - began):,.0f} tokens/s")
            except Died:
                self._server.close()
                fruitless = fruitless + 1 if len(waiting) == before else 0
                if fruitless == DEATHS:
                    raise
                progress("sample", done, total, "vLLM died: starting it again with half the batch")
                self._restart(max(1, self._server.batch // 2))

    def _restart(self, batch: int) -> None:
        self._server = Server(self.valve, self._direction, self.options, stock=bool(self.stock), batch=batch)
        if self._direction is not None:
            self._server.turn_to(self._direction)


def _completion(codec: Codec, e: Encoded, ids: list[int] | None, context: int) -> Completion:
    if ids is not None:
        return codec.completion(e, ids)
    why = f"the prompt has {len(e.ids)} tokens, vLLM's context {context}"
    return Completion(e.request.id, e.request.alpha, "", 0, "error", len(e.ids), reason=why)


class Server:
    """One running vLLM: its engine core (in a process of its own, as vLLM does it), and the positions it knows."""

    def __init__(self, valve: Valve, direction: Direction | None, options: Options, *, stock: bool, batch: int | None = None) -> None:
        # Told before vLLM is imported, which reads it once. Its own lines would break up the progress.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        self.stock, self.options = stock, options
        self.lora = direction is not None
        cuda = valve.model.device.type == "cuda"
        self.batch = batch or options.batch or (1024 if cuda else 32)
        self._positions: dict[tuple[Path, float], Any] = {}
        self._direction: Direction | None = None
        self._fingerprint = ""
        self._stops = Codec(valve.model, valve.tokenizer).stops
        self._busy = False
        folder = checkpoints.fetch(valve.name, (*checkpoints.CONFIG_FILES, *checkpoints.TOKENIZER_FILES, *checkpoints.WEIGHT_FILES))
        args: dict[str, Any] = {
            "model": str(folder), "skip_tokenizer_init": True, "generation_config": "vllm", "disable_log_stats": True,
            "dtype": str(valve.model.dtype).removeprefix("torch."), "max_num_seqs": self.batch, "max_model_len": -1,
            "tensor_parallel_size": options.tensor_parallel, "enforce_eager": options.eager, "use_tqdm_on_load": False,
            "enable_prefix_caching": True,
        }  # fmt: skip
        if cuda:
            args["gpu_memory_utilization"] = options.memory or _free_share()
            # The default depends on who asks; prompts of a full batch should not wait for many steps.
            args["max_num_batched_tokens"] = max(8192, self.batch)
            if not options.eager:
                # Every request names a position, also alpha 0, so one set of graphs serves all batches.
                args["compilation_config"] = {
                    "cudagraph_capture_sizes": capture_sizes(self.batch), "cudagraph_specialize_lora": not self.lora,
                }  # fmt: skip
        elif options.memory:
            args["gpu_memory_utilization"] = options.memory
        else:
            args["kv_cache_memory_bytes"] = CPU_CACHE
        if direction is not None:
            args |= {
                "enable_lora": True, "max_lora_rank": next(rank for rank in RANKS if rank >= rank_of(direction)),
                "lora_target_modules": suffixes(direction),
            }  # fmt: skip
            if stock:
                args |= {"max_loras": options.stock_slots, "max_cpu_loras": 8 * options.stock_slots}
            else:
                from cotvalve.engines import vllm_dial

                args |= {
                    "max_loras": self.batch, "worker_extension_cls": vllm_dial.EXTENSION,
                    "additional_config": {vllm_dial.OPTION: True},
                }  # fmt: skip
        self._folder = Path(tempfile.mkdtemp(prefix="cotvalve-vllm-"))
        try:
            self._engine: Any = LLMEngine.from_engine_args(EngineArgs(**(args | options.more)))
        except (RuntimeError, ValueError) as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise EngineError(f"vLLM did not start with {folder}: {_line(error)}") from error
        self.context = int(self._engine.model_config.max_model_len)
        """Tokens of a prompt and its chain together."""
        self._end = weakref.finalize(self, _end, self._engine, self._folder)
        threading.Thread(target=_watch, args=(weakref.ref(self._engine.engine_core),), daemon=True).start()

    def close(self) -> None:
        """Ends the engine; it cannot be used any more."""
        self._end()

    def turn_to(self, direction: Direction) -> None:
        """Makes `direction` the one its positions turn; nothing may be running."""
        for name, factor in direction.factors.items():
            if not (factor.A.isfinite().all() and factor.B.isfinite().all()):
                # Its rows would write NaN into pages of the cache that other rows get next, and 0 * NaN is NaN there too.
                raise DirectionMismatch(f"{name}: holds NaN or infinity, which vLLM's cache would carry to other chains; use engine 'transformers'")
        self._direction = direction
        folder = self._folder / f"direction{len(list(self._folder.iterdir()))}"
        self._fingerprint = write_direction(direction, folder)
        self._plain = folder
        if not self.stock:
            try:
                self._engine.collective_rpc("cotvalve_load", args=(str(folder),))
            except (RuntimeError, ValueError) as error:
                raise EngineError(f"vLLM did not take the direction: {_line(error)}") from error

    def position(self, alpha: float) -> Any:
        """The LoRA request of one alpha."""
        alpha += 0.0
        # Those of earlier directions stay, so that no number is given twice: stock multi-LoRA keeps weights by number alone.
        known = self._plain, alpha
        if known not in self._positions:
            from vllm.lora.request import LoRARequest

            from cotvalve.engines import vllm_dial

            number = len(self._positions) + 1
            if not self.stock:
                self._positions[known] = vllm_dial.position(alpha, number, str(self._plain), self._fingerprint)
            else:
                assert self._direction is not None
                folder = self._folder / f"{self._fingerprint}-{number}"
                write_baked(self._direction, folder, self._plain, alpha)
                self._positions[known] = LoRARequest(f"alpha={alpha!r}@{self._fingerprint}", number, str(folder))
        return self._positions[known]

    def run(self, requests: dict[str, Encoded]) -> Iterator[tuple[str, list[int] | None]]:
        """Generated ids by request as they finish; None for a prompt that does not fit `context`.

        Raises EngineError when vLLM dies; what was yielded before stands.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        if self._busy:
            raise EngineError("this vLLM is still at another list of requests; finish it, or close its generator, first")
        waiting = deque(sorted(requests.items(), key=lambda pair: pair[1].request.alpha if self.stock else 0.0))
        running: set[str] = set()
        self._busy = True
        try:
            while waiting or running:
                # Fed as it goes, so that adding requests overlaps with the first steps.
                while waiting and len(running) < 2 * self.batch + 64:
                    id, e = waiting.popleft()
                    if len(e.ids) >= self.context:
                        yield id, None
                        continue
                    self._add(id, e)
                    running.add(id)
                for output in self._engine.step():
                    if output.finished:
                        running.discard(output.request_id)
                        yield output.request_id, list(output.outputs[0].token_ids)
        except (EngineDeadError, torch.OutOfMemoryError, RuntimeError) as error:
            running.clear()
            raise Died(f"vLLM died: {_line(error)}") from error
        finally:
            self._busy = False
            if running:
                self._engine.abort_request(list(running))

    def _add(self, id: str, e: Encoded) -> None:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        request = e.request
        try:
            how = SamplingParams(
                temperature=request.temperature, top_p=request.top_p, max_tokens=min(e.room, self.context - len(e.ids)),
                seed=request.seed if request.temperature > 0 else None, stop_token_ids=self._stops, ignore_eos=True,
                detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY,
            )  # fmt: skip
        except (ValueError, VLLMValidationError) as error:
            raise SettingError(f"vLLM refuses the request: {_line(error)}; use engine 'transformers'") from error
        lora = self.position(request.alpha) if self.lora else None
        self._engine.add_request(id, TokensPrompt(prompt_token_ids=e.ids), how, lora_request=lora)


def capture_sizes(batch: int) -> list[int]:
    """Batch sizes that get a CUDA graph, up to `batch` (vLLM's own list ends at 512 and leaves larger ones without).

    >>> capture_sizes(100)
    [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 96, 100]
    """
    sizes = [1, 2, 4, *range(8, 65, 8), *range(96, 257, 32), *range(320, batch + 1, 64)]
    return [*(size for size in sizes if size < batch), batch]


def _end(engine: Any, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    engine.engine_core.shutdown()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _watch(core_ref: Callable[[], Any]) -> None:
    """Wakes whoever waits for a core that was killed: vLLM notes its death, but leaves the waiting thread waiting."""
    from vllm.v1.engine.exceptions import EngineDeadError

    while (core := core_ref()) is not None:
        resources = getattr(core, "resources", None)
        if resources is None:  # a core in this process
            return
        if resources.engine_dead:
            core.outputs_queue.put_nowait(EngineDeadError())
            return
        del core, resources
        time.sleep(1)


def _free_share() -> float:
    """The part of the GPU's memory that is free, less a margin for what else this process will need."""
    free, total = torch.cuda.mem_get_info()
    return round(max(0.05, min(0.92, free / total - 0.04)), 3)


def _line(error: BaseException) -> str:
    if isinstance(error, CotvalveError):
        return str(error)
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
