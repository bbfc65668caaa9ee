"""The forward pass of training, in as few passes over memory as it needs; sampling never comes here.

Inside `lean(valve)` three things are done otherwise, and undone on leaving:

- PEFT's LoRA layers compute W x + alpha * s * B A x as two products into one buffer: no copy of x in another number
  format, no separate tensor for the branch, and only x and A x kept for the backward pass.
- Decoder layers are compiled, one graph for all of them, where that is asked for.
- Rows of a batch lie one behind the other, without padding, where the attention kernel for that exists (`flat`).

The numbers are PEFT's, up to the order of sums. What PEFT's layer can do beyond a plain LoRA (dropout, DoRA,
quantized weights) stays PEFT's: such layers are left as they are, and turned by the dial.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch._dynamo import config as dynamo  # pyright: ignore[reportPrivateUsage]
from torch._dynamo import maybe_mark_dynamic
from torch.nn.attention import varlen
from transformers import AttentionInterface, PreTrainedModel

from cotvalve.errors import EngineError
from cotvalve.valve import ADAPTER, Valve

FLAT = "cotvalve_flat"
"""Our attention among transformers' implementations: rows one behind the other, told apart by where they start."""
MASKED = {"full_attention", "sliding_attention", "chunked_attention"}
"""Kinds of layers, as configs name them, that see what a mask lets them see."""


class Position:
    """The alphas that are learned at: one per row or token, in the shape [B | 1, T | 1, 1]."""

    def __init__(self, valve: Valve) -> None:
        self.valve = valve
        self.compiled = False
        """Whether the layers are compiled for a GPU, and the loss may be too."""
        self.others = 0
        """LoRA layers that stay PEFT's, and are turned by the dial."""
        self.alpha = torch.zeros(1, 1, 1, device=valve.model.device)
        self.closed = self.alpha == 0
        self.one: Tensor | None = None
        """The alpha of all rows, once a layer asked for it that folds rows into one another."""

    def shaped(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """alpha, and where it is 0, in the shape that multiplies `x`; EngineError where several cannot be told apart."""
        if x.ndim == 3:
            return self.alpha, self.closed
        if x.ndim > 3 and len(x) == len(self.alpha) and self.alpha.shape[1] == 1:  # heads apart, or a latent
            shape = (len(x),) + (1,) * (x.ndim - 1)
            return self.alpha.reshape(shape), self.closed.reshape(shape)
        one = self.one = self.alpha.unique() if self.one is None else self.one
        if one.numel() > 1:
            raise EngineError(
                f"a layer got shape {tuple(x.shape)}: chains at several alphas cannot be told apart in {type(self.valve.model).__name__}; "
                "train the recipe valve or progressive, which have one alpha"
            )
        one = one.reshape((1,) * x.ndim)
        return one, one == 0

    def interpret(self) -> None:
        """Leaves compiled layers for the layers as they are written."""
        self.compiled = False
        for block in blocks(self.valve.model):
            block._compiled_call_impl = None  # pyright: ignore[reportPrivateUsage]  nn.Module.compile has no way back

    @contextmanager
    def at(self, alpha: Tensor) -> Generator[None]:
        """Learns at one alpha per row [B] or token [B, T] while inside, the backward pass included."""
        before = self.alpha, self.closed
        self.alpha = alpha.float()[:, None, None] if alpha.ndim == 1 else alpha.float()[..., None]
        # where() and not only the product: 0 * NaN is NaN, and alpha 0 promises the base model
        self.closed, self.one = self.alpha == 0, None
        for one in (self.alpha, self.closed):
            for dimension in (0, 1):
                maybe_mark_dynamic(one, dimension)
        try:
            with self.valve.at(found if len(found := alpha.unique()) == 1 else alpha) if self.others else nullcontext():
                yield
        finally:
            self.alpha, self.closed = before
            self.one = None


class Product(torch.autograd.Function):
    """W x + s B (alpha * A x) and its gradients to x, A and B; W and its bias are not learned.

    The branch is added where the tensors are narrow. A layer that widens reads [x, A x] with [W, B] in one product; one
    that narrows adds the branch to the finished product in place; going back it is the other way round. PyTorch's own
    rules would write and add a branch of full width in both directions.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, alpha: Tensor, closed: Tensor, s: float
    ) -> Tensor:
        """x [B, T, in], A [r, in], B [out, r], alpha and closed [B | 1, T | 1, 1]; x of other dimensions has one alpha."""
        down, up = a.to(x.dtype), (b * s).to(x.dtype)
        if x.is_cuda and len(a) % 8:  # 16-bit products want rows of 16 bytes
            down, up = nn.functional.pad(down, (0, 0, 0, -len(a) % 8)), nn.functional.pad(up, (0, -len(a) % 8))
        turned = nn.functional.linear(x, down).mul_(alpha).masked_fill_(closed, 0)
        if weight.shape[0] > weight.shape[1]:
            out = nn.functional.linear(torch.cat([x, turned], -1), torch.cat([weight, up], 1), bias)
        else:
            out = nn.functional.linear(x, weight, bias)
            out.view(-1, out.shape[-1]).addmm_(turned.view(-1, len(down)), up.t())
        ctx.save_for_backward(x, weight, down, up, turned, alpha, closed)
        ctx.s, ctx.rank, ctx.learned = s, len(a), a.dtype
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, turned, alpha, closed = ctx.saved_tensors
        rows = grads[0].reshape(-1, len(weight))
        back = (rows @ up).view(turned.shape).mul_(alpha).masked_fill_(closed, 0).view(-1, len(down))
        to_x = None
        if ctx.needs_input_grad[0]:
            if weight.shape[0] < weight.shape[1]:
                to_x = torch.cat([rows, back], 1) @ torch.cat([weight, down])
            else:
                to_x = (rows @ weight).addmm_(back, down)
            to_x = to_x.view(x.shape)
        to_a = back.t() @ x.reshape(-1, x.shape[-1])
        to_b = rows.t() @ turned.view(-1, len(down))
        to_a, to_b = to_a[: ctx.rank].to(ctx.learned), to_b[:, : ctx.rank].to(ctx.learned) * ctx.s
        return to_x, None, None, to_a, to_b, None, None, None


class LeanLinear(LoraLinear):
    """PEFT's layer with another forward pass. Made by `lean` out of a layer that exists, never by itself."""

    position: Position

    def forward(self, x: Tensor, *_args: Any, **_named: Any) -> Tensor:
        base: Any = self.base_layer
        a, b = (side[ADAPTER].get_parameter("weight") for side in (self.lora_A, self.lora_B))
        alpha, closed = self.position.shaped(x)
        s: float = self.scaling[ADAPTER]
        # Also where the layers are compiled: faster on an H100 than leaving the sums to the compiler (docs/performance.md).
        return Product.apply(x, base.weight, base.bias, a, b, alpha, closed, s)  # pyright: ignore[reportReturnType]


def plain(layer: nn.Module) -> bool:
    """True for a LoRA layer whose forward pass is no more than W x + s B A x."""
    return (
        type(layer) is LoraLinear
        and type(layer.base_layer) is nn.Linear
        and not layer.base_layer.weight.requires_grad
        and isinstance(layer.lora_dropout[ADAPTER], nn.Identity)
        and not layer.lora_variant
        and not layer.lora_bias[ADAPTER]
        and not layer.merged
        and list(layer.active_adapters) == [ADAPTER]
    )


@contextmanager
def lean(valve: Valve, *, compiled: bool = False, flat: bool = False) -> Generator[Position]:
    """Training's own forward pass while inside, at the position that is given back."""
    dial, model = valve.dial, valve.model
    every: list[Any] = list(dial.layers.values()) if dial is not None else []
    position = Position(valve)
    with ExitStack() as stack:
        for layer in filter(plain, every):
            _replace(layer, position, stack)
        position.others = len(every) - sum(isinstance(layer, LeanLinear) for layer in every)
        if flat:
            stack.callback(model.set_attn_implementation, _attention(model))
            model.set_attn_implementation(FLAT)
        if compiled:
            # Else a new number of rows, found in an attribute of a module, would be compiled anew; and each fixed number (a
            # scale, an epsilon) would be one more input of every call.
            stack.enter_context(dynamo.patch(force_nn_module_property_static_shapes=False, specialize_float=True))
            # The first layer's input has no gradient, unlike the others': it would be compiled apart.
            hook = model.get_input_embeddings().register_forward_hook(lambda _module, _args, out: out.requires_grad_())
            stack.callback(hook.remove)
            for block in blocks(model):
                block.compile(dynamic=True)
            position.compiled = model.device.type == "cuda"
            stack.callback(position.interpret)
        yield position


def _replace(layer: Any, position: Position, stack: ExitStack) -> None:
    own = vars(layer).pop("forward", None)
    layer.__class__, layer.position = LeanLinear, position

    def restore() -> None:
        layer.__class__ = LoraLinear
        del layer.position
        if own is not None:
            layer.forward = own

    stack.callback(restore)


def blocks(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers."""
    return list(model.get_decoder().layers)  # pyright: ignore[reportArgumentType]


def _attention(model: PreTrainedModel) -> str:
    config: Any = model.config.get_text_config()
    return config._attn_implementation


def tells_rows_apart(model: PreTrainedModel) -> bool:
    """Whether rows one behind the other can be told apart: by masks, as in attention. A convolution, linear attention or Mamba
    carries a state from token to token, and would from one row into the next."""
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or [])
    return not model._is_stateful and kinds <= MASKED  # pyright: ignore[reportPrivateUsage]


def can_lie_flat(model: PreTrainedModel) -> bool:
    """Whether this model's attention can be given rows one behind the other: 16 bits on a GPU, plain causal attention."""
    config: Any = model.config.get_text_config()
    other = ("attn_logit_softcapping", "final_logit_softcapping", "attention_chunk_size", "attention_sink")
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    return (
        model.device.type == "cuda"
        and model.dtype in (torch.bfloat16, torch.float16)
        and _attention(model) == "sdpa"
        and model._supports_attention_backend  # pyright: ignore[reportPrivateUsage]
        and window is None
        and tells_rows_apart(model)
        and not any(getattr(config, name, None) for name in other)
        and not getattr(config, "attention_dropout", 0.0)
        and torch.cuda.get_device_capability(model.device) >= (8, 0)
    )


def flat_attention(
    _module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None, *,
    scaling: float | None = None, starts: Tensor, longest: int, **_named: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention within each row of a flat batch.

    query [1, H, N, D], key and value [1, G, N, D]; `starts` [rows + 1] where rows begin, and N at the end; `longest`
    the tokens of the longest row or more. Gives [1, N, H, D].
    """
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    return varlen_attention(q, k, v, starts, longest, scaling)[None], None


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, scaling: float | None) -> Tensor:
    """The kernel behind `flat_attention`: q [N, H, D], k and v [N, G, D]."""
    more = {"enable_gqa": True} if _TELLS_GROUPS else {}
    return varlen.varlen_attn(q, k, v, starts, starts, longest, longest, scale=scaling, window_size=(-1, 0), **more)  # pyright: ignore


_TELLS_GROUPS = "enable_gqa" in varlen.varlen_attn.__annotations__
"""torch 2.11's takes fewer heads of keys without being told."""

AttentionInterface.register(FLAT, flat_attention)
