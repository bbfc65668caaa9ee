# pyright: reportMissingImports=false, reportUntypedBaseClass=false
"""The dial inside vLLM: one shared A and B, one alpha per token, any number of alphas in a batch.

vLLM treats every adapter as different weights: a slot for each and kernels that gather them. All positions of
one dial share their weights, so here every linear layer computes, for all tokens of a batch at once,

    y = W x + (alpha * A x) B^T                  alpha [tokens, 1], fp32, 0 where the row is the base model

which is two thin dense products. A position is a `LoRARequest` whose name says its alpha (`position`): it costs
one entry in a table, never a copy of weights, and has its own part of the prefix cache, which vLLM keys by name.
All of it is static tensors that are written in place before the forward, so compiled code and CUDA graphs stay
valid for any alpha and any direction of the same rank and modules.

`register` is the plugin: it puts `DialManager` where vLLM's worker makes its LoRA manager. Only engines that ask
for it (`OPTION` in `additional_config`) get it; every other vLLM of the process stays as it is. Engines of this
package need no entry point: they name `WorkerExtension`, whose import in a worker registers the plugin there.

Left out on purpose: LoRA on embeddings, on the output layer and on experts (`can_turn` refuses them).
"""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.lora.layers import (
    BaseLayerWithLoRA,
    ColumnParallelLinearWithLoRA,
    MergedColumnParallelLinearWithLoRA,
    MergedQKVParallelLinearWithLoRA,
    QKVParallelLinearWithLoRA,
    ReplicatedLinearWithLoRA,
    RowParallelLinearWithLoRA,
)
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager, WorkerLoRAManager

OPTION = "cotvalve_dial"
"""The key of `additional_config` that asks for the dial."""
EXTENSION = "cotvalve.engines.vllm_dial.WorkerExtension"
HOOKED = "vllm.v1.worker.lora_model_runner_mixin", "LRUCacheWorkerLoRAManager"
"""The module and the name by which vLLM's model runners make their LoRA manager."""

_LINEAR = (
    ColumnParallelLinearWithLoRA,
    MergedColumnParallelLinearWithLoRA,
    MergedQKVParallelLinearWithLoRA,
    QKVParallelLinearWithLoRA,
    ReplicatedLinearWithLoRA,
    RowParallelLinearWithLoRA,
)
_ALPHA = "alpha="


def position(alpha: float, number: int, folder: str, direction: str) -> LoRARequest:
    """The request for one position; `direction` is a fingerprint of the weights in `folder`, `number` any id > 0.

    The name alone keys vLLM's prefix cache, so it holds the alpha to the last bit and the direction.
    """
    return LoRARequest(f"{_ALPHA}{float(alpha) + 0.0!r}@{direction}", number, folder)


def alpha_of(name: str) -> float:
    """The alpha in a request's name; ValueError for a name that `position` did not make."""
    if not name.startswith(_ALPHA):
        raise ValueError(f"LoRA request '{name}': this engine turns one dial; expected a name like 'alpha=0.5@direction'")
    return float(name.removeprefix(_ALPHA).partition("@")[0])


def register() -> None:
    """vLLM's plugin (group `vllm.general_plugins`); may be called any number of times."""
    mixin = importlib.import_module(HOOKED[0])
    if getattr(mixin, HOOKED[1]) is not make_manager:
        setattr(mixin, HOOKED[1], make_manager)


def make_manager(vllm_config: Any, *args: Any, **kwargs: Any) -> WorkerLoRAManager:
    """The LoRA manager of a worker: the dial's where the engine asked for it, else vLLM's own."""
    asked = isinstance(vllm_config.additional_config, dict) and vllm_config.additional_config.get(OPTION)
    return (DialManager if asked else LRUCacheWorkerLoRAManager)(vllm_config, *args, **kwargs)


def unfit() -> str:
    """What this vLLM lacks for the dial, or an empty string: the names and signatures that are relied on."""
    mixin = importlib.import_module(HOOKED[0])
    if not hasattr(mixin, HOOKED[1]):
        return f"{'.'.join(HOOKED)} is not there"
    wanted = {
        WorkerLoRAManager: ("create_lora_manager", "_load_adapter", "add_dummy_lora", "_apply_adapters", "add_adapter"),
        LoRAModelManager: ("_init_punica_wrapper", "_get_punica_wrapper", "set_adapter_mapping", "activate_adapter"),
        BaseLayerWithLoRA: ("set_lora", "reset_lora", "set_mapping"),
        ColumnParallelLinearWithLoRA: ("apply", "set_lora", "create_lora_weights"),
    }
    for owner, names in wanted.items():
        if lacking := [name for name in names if not hasattr(owner, name)]:
            return f"{owner.__name__}.{lacking[0]} is not there"
    if "max_loras" not in inspect.signature(ColumnParallelLinearWithLoRA.create_lora_weights).parameters:
        return "create_lora_weights has other parameters"
    return ""


class Alphas:
    """The alpha of every token of the batch that runs: stands where vLLM's layers look for their kernels."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        self.of_token = torch.zeros(tokens, 1, dtype=torch.float32, device=device)
        """Static: the compiled forward and its CUDA graphs read it, `write` fills it before they run."""
        self._of_number = np.zeros(16, dtype=np.float32)
        self._name_of: dict[int, str] = {}

    @property
    def numbers(self) -> set[int]:
        """The request numbers whose alphas are known."""
        return set(self._name_of)

    def know(self, number: int, name: str, alpha: float) -> None:
        """Takes in one request's alpha; number 0 is the base model."""
        if number >= len(self._of_number):
            self._of_number = np.concatenate([self._of_number, np.zeros(number + 1, dtype=np.float32)])
        self._of_number[number] = alpha
        self._name_of[number] = name

    def knows(self, number: int, name: str) -> bool:
        """True when `number` stands for `name` (vLLM numbers its warm-up requests as it numbers real ones)."""
        return self._name_of.get(number) == name

    def forget(self, number: int) -> bool:
        """Lets `number` be used for another name."""
        return self._name_of.pop(number, None) is not None

    def write(self, numbers: Iterable[int]) -> None:
        """Sets the alphas of the next forward from each token's request number."""
        alphas = torch.from_numpy(self._of_number[np.asarray(numbers, dtype=np.int64)][:, None])
        if self.of_token.device.type == "cpu":
            self.of_token[: len(alphas)] = alphas
        else:
            # A fresh pinned block each time: with asynchronous scheduling the last copy may still be waiting.
            self.of_token[: len(alphas)].copy_(alphas.pin_memory(), non_blocking=True)


class Dialed:
    """The forward of a linear layer with the dial, put before vLLM's own LoRA layer in its class's bases.

    `dial_a` [slices * rank, in] and `dial_b` [out, slices * rank] hold the factors of all slices of a merged
    layer (q, k, v; gate, up), B block-diagonal. vLLM's `lora_a_stacked` and `lora_b_stacked` are views of them,
    so that vLLM's own `set_lora` loads them and cuts them for tensor parallelism.
    """

    dial_a: Tensor
    dial_b: Tensor
    dial_alpha: Tensor
    base_layer: Any

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """W x + bias + (alpha A x) B^T."""
        y: Tensor = self.base_layer.quant_method.apply(self.base_layer, x, bias)
        rows = x.reshape(-1, x.shape[-1])
        alpha = self.dial_alpha[: rows.shape[0]]
        inner = torch.nn.functional.linear(rows, self.dial_a)
        # where() and not only the product: 0 * infinity is NaN, and alpha 0 promises the base model. A and B are finite
        # (`Server.turn_to` refuses others), A x may overflow.
        inner = torch.where(alpha == 0, 0.0, inner * alpha).to(y.dtype)
        return torch.addmm(y.reshape(-1, y.shape[-1]), inner, self.dial_b.t()).view(y.shape)


_DIALED: dict[type, type] = {}


def put_dial(layer: Any, alphas: Alphas) -> None:
    """Turns one of vLLM's LoRA layers into a dialed one, its (still empty) weights into views of dense ones."""
    kind = type(layer)
    if kind not in _LINEAR:
        raise ValueError(f"{kind.__name__}: the dial turns linear layers only")
    stacked_a, stacked_b = layer.lora_a_stacked, layer.lora_b_stacked
    rank = stacked_a[0].shape[2]
    outs = [b.shape[2] for b in stacked_b]
    a = stacked_a[0].new_zeros(len(stacked_a) * rank, stacked_a[0].shape[3])
    b = stacked_b[0].new_zeros(sum(outs), len(stacked_b) * rank)
    layer.dial_a, layer.dial_b, layer.dial_alpha = a, b, alphas.of_token
    layer.lora_a_stacked = tuple(a[i * rank : (i + 1) * rank][None, None] for i in range(len(stacked_a)))
    ends = np.cumsum(outs).tolist()
    layer.lora_b_stacked = tuple(
        b[end - out : end, i * rank : (i + 1) * rank][None, None] for i, (end, out) in enumerate(zip(ends, outs, strict=True))
    )
    layer.__class__ = _DIALED.setdefault(kind, type(f"Dialed{kind.__name__}", (Dialed, kind), {}))


class DialModelManager(LoRAModelManager):
    """vLLM's manager of the LoRA layers of a model, with one slot for weights and the dial's forward."""

    alphas: Alphas

    def _init_punica_wrapper(self, max_num_batched_tokens: int, vllm_config: Any) -> None:  # noqa: ARG002
        # No kernels of vLLM's: their tables are as large as the number of slots, and nothing here gathers.
        self.supports_mm = self.supports_tower_connector_lora = False
        self.punica_wrapper_mapping = {}
        self.alphas = Alphas(self.max_num_batched_tokens, self.device)

    def _get_punica_wrapper(self, module_name: str) -> Any:  # noqa: ARG002
        return self.alphas

    def set_adapter_mapping(self, mapping: Any) -> None:
        """Before every forward: each token's request number."""
        self.alphas.write(mapping.index_mapping)


class DialManager(WorkerLoRAManager):
    """What vLLM's model runner sees: positions come and go as adapters would, the weights stay."""

    _adapter_manager: Any

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        # The scheduler keeps the number of alphas in a batch (max_loras); the layers get one slot.
        self.lora_config = copy.copy(self.lora_config)
        self.lora_config.max_loras = self.lora_config.max_cpu_loras = 1
        self.lora_config.fully_sharded_loras = False
        # Pipeline stages hold some of the layers each; only a model in one piece can be counted.
        self._whole = vllm_config.parallel_config.pipeline_parallel_size == 1
        self._folder = ""
        self._warm_up: set[str] = set()

    def create_lora_manager(self, model: Any, vllm_config: Any = None) -> Any:
        """Wraps the model's linear layers; returns the model."""
        manager = self._adapter_manager = DialModelManager(
            model=model, max_num_seqs=self.max_num_seqs, max_num_batched_tokens=self.max_num_batched_tokens,
            vocab_size=self.vocab_size, lora_config=self.lora_config, device=self.device, vllm_config=vllm_config,
        )  # fmt: skip
        if not manager.modules:
            raise ValueError("0 linear layers of the model are among the direction's modules")
        for layer in manager.modules.values():
            put_dial(layer, manager.alphas)
        return manager.model

    def load(self, folder: str) -> int:
        """Writes the direction in `folder` (PEFT's format, one rank and scale) into the layers, in place.

        Returns the number of layers that got factors; raises ValueError when a module of the direction is not in
        the model. Must not run while a batch does.
        """
        manager = self._adapter_manager
        self._folder = ""
        manager.remove_all_adapters()
        lora = self._load_adapter(LoRARequest("direction", 1, folder))
        manager.add_adapter(lora)
        missing = [name for name in lora.loras if name not in manager.modules]
        found = len(lora.loras) - len(missing)
        if not found or (self._whole and missing):
            raise ValueError(f"{missing[0]}: not a linear layer of the model; {found} of the direction's {len(lora.loras)} layers are")
        # Writes slot 0 of every layer, zeros where the direction has nothing.
        manager.activate_adapter(1)
        manager.remove_all_adapters()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._folder = folder
        return found

    def _apply_adapters(self, adapter_requests: set[Any]) -> None:
        """Before every forward, with the distinct requests of its batch."""
        alphas = self._adapter_manager.alphas
        for request in adapter_requests:
            number, name = request.lora_int_id, request.lora_name
            if alphas.knows(number, name):
                continue
            if name in self._warm_up:
                alphas.know(number, name, 1.0)
                continue
            alpha = alpha_of(name)
            if request.lora_path != self._folder:
                if others := [r for r in adapter_requests if r.lora_path != request.lora_path]:
                    raise ValueError(f"{request.lora_path} and {others[0].lora_path}: two directions in one batch; a dial has one")
                self.load(request.lora_path)
            alphas.know(number, name, alpha)

    def add_adapter(self, adapter_request: Any) -> bool:
        """Takes in one position; True when it is new."""
        new = not self._adapter_manager.alphas.knows(adapter_request.lora_int_id, adapter_request.lora_name)
        self._apply_adapters({adapter_request})
        return new

    def add_dummy_lora(self, lora_request: Any, rank: int) -> bool:  # noqa: ARG002
        """vLLM's warm-up and graph capture: no weights, so that `rank` means nothing."""
        self._warm_up.add(lora_request.lora_name)
        return True

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        """The warm-up's rank, which is not used."""
        return default_rank

    def list_adapters(self) -> set[int]:
        """The numbers of the positions that are known."""
        return self._adapter_manager.alphas.numbers

    def remove_adapter(self, adapter_id: int) -> bool:
        """Forgets a position."""
        return self._adapter_manager.alphas.forget(adapter_id)

    def remove_all_adapters(self) -> None:
        """Forgets all positions, not the direction."""
        for number in self.list_adapters():
            self.remove_adapter(number)
        self._warm_up.clear()

    def pin_adapter(self, adapter_id: int) -> bool:
        """Positions are never pushed out."""
        return adapter_id in self.list_adapters()

    def supports_tower_connector_lora(self) -> bool:
        """The dial turns language models only."""
        return False


class WorkerExtension:
    """Methods of every worker of an engine that names `EXTENSION` as its `worker_extension_cls`."""

    model_runner: Any

    def cotvalve_load(self, folder: str) -> int:
        """See `DialManager.load`; through `collective_rpc`, so that an error reaches the caller and nobody dies."""
        return self.model_runner.lora_manager.load(folder)


# Workers import this module before they make anything, because the engine's configuration names EXTENSION; so the
# plugin is there also where the package's entry points are not visible.
register()
