"""The valve: theta + alpha * delta on a loaded model; behind it `inlets` makes A x and `mover` moves whole weights.

With a LoRA direction every linear layer computes, for each row (or token) of the batch with its own alpha,

    W x + alpha * s * B A x        s = lora_alpha / r, or lora_alpha / sqrt(r) for rsLoRA     (paper eq. 3)

so one batch can hold every position of the dial, in generation and in training. With an exact task vector
(theta2 - theta1, full rank) the weights themselves are moved, one alpha at a time.

Outside `at` the valve is closed: the model is the base model bit for bit. Nothing is ever merged in place;
`fuse` makes a new plain model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cotvalve import checkpoints, templates, tuner
from cotvalve.card import BASE_SHA256, DIRECTION_SHA256, Card
from cotvalve.direction import Direction, check_fits, load_direction, refuse_adapted
from cotvalve.errors import DirectionMismatch, EngineError, SettingError
from cotvalve.inlets import ADAPTER, Inlets, Parts, positions, weight
from cotvalve.mover import Mover
from cotvalve.taskvector import TaskVector
from cotvalve.types import Completion
from cotvalve.weights import fingerprint

if TYPE_CHECKING:
    from cotvalve.calibration import Calibration


class Dial:
    """One alpha per row or token on every LoRA layer of a model."""

    def __init__(self, model: nn.Module) -> None:
        """Puts a forward hook behind B of every LoRA layer; raises DirectionMismatch when there is none."""
        self.layers = {
            name: module for name, module in model.named_modules() if isinstance(module, LoraLayer) and ADAPTER in module.lora_B
        }
        if not self.layers:
            raise DirectionMismatch("the model has no LoRA layer to turn: 0 modules matched; load a direction first")
        for name, module in self.layers.items():
            if module.use_dora.get(ADAPTER):
                raise DirectionMismatch(
                    f"{name}: DoRA does not scale with alpha (its norm depends on the weights); "
                    "load the adapter as an exact weight difference instead"
                )
            module.lora_A[ADAPTER].register_forward_hook(self._learn)
            module.lora_B[ADAPTER].register_forward_hook(self._turn)
            if type(module) is LoraLinear:
                module.forward = partial(self._forward, module, module.forward)
        self.inlets = Inlets(self.layers)
        self.kernel: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None  # an engine's alpha * A x of x, A and alpha
        self.alpha: Tensor | None = None  # [B, 1, 1], [B, T, 1] or [1, 1, 1] inside `at`
        self._closed: Tensor | None = None

    def _forward(self, layer: LoraLinear, general: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """W x + B (alpha * s * A x) without gradients; `general` is PEFT's forward, which the hooks turn: seven wide passes."""
        if args or kwargs or (parts := self.parts(layer, x)) is None:
            return general(x, *args, **kwargs)
        y, thin, b, scale = parts
        return y if thin is None or b is None else y.view(-1, y.shape[-1]).addmm_(thin, b.t(), alpha=scale).view(y.shape)

    def parts(self, layer: nn.Module, x: Tensor) -> Parts | None:
        """See `Inlets.parts`; without the branch where the valve is closed."""
        return self.inlets.parts(layer, x, None if self.alpha is None else self._turned, self.shaped)

    def _turned(self, x: Tensor, a: Tensor) -> Tensor:
        """alpha * A x: bf16 times the fp32 alpha in one pass."""
        assert self._closed is not None
        alpha = self.shaped(x)
        if self.kernel is not None:
            return self.kernel(x, a, alpha)
        thin = (x @ a.t()).mul_(alpha)
        # A and B are finite here, but where A x may overflow 0 * inf would be NaN.
        return thin if self.inlets.tame and thin.dtype != torch.float16 else thin.masked_fill_(self._closed.reshape(alpha.shape), 0)

    def _learn(self, _module: nn.Module, _args: tuple[Any, ...], out: Tensor) -> Tensor:
        # With gradients alpha multiplies A x: r numbers where B A x has thousands, and nothing large is kept for going back.
        if self.alpha is None or not torch.is_grad_enabled():
            return out
        return (out * self.shaped(out)).to(out.dtype)

    def _turn(self, _module: nn.Module, _args: tuple[Any, ...], out: Tensor) -> Tensor:
        if self.alpha is None or self._closed is None:
            return torch.zeros_like(out)
        alpha = self.shaped(out)
        # alpha stays fp32 (bf16 has 3 digits); where() too, because 0 * NaN is NaN and alpha 0 promises the base model.
        turned = out if torch.is_grad_enabled() else out * alpha
        closed = self._closed.reshape(alpha.shape)
        # A learned alpha has its slope at 0 too.
        return torch.where(closed & ~turned.isfinite() if alpha.requires_grad else closed, 0.0, turned)

    def shaped(self, out: Tensor) -> Tensor:
        """alpha in the shape that multiplies `out`; EngineError where rows or tokens cannot be told apart."""
        assert self.alpha is not None
        if self.alpha.numel() == 1:
            return self.alpha.reshape((1,) * out.ndim)
        rows, tokens, _ = self.alpha.shape
        if out.ndim > 3 and out.shape[0] == rows and tokens == 1:  # heads apart, or a latent
            return self.alpha.reshape(rows, *(1,) * (out.ndim - 1))
        if out.ndim != 3 or out.shape[0] != rows or tokens not in (1, out.shape[1]):
            raise EngineError(
                f"the dial is set for {rows} rows{f' of {tokens} tokens' if tokens > 1 else ''} but a layer got shape "
                f"{tuple(out.shape)}: rows cannot be told apart there; use one alpha for the whole batch (engine generate), or one for each beam"
            )
        return self.alpha

    @contextmanager
    def at(self, alpha: float | Tensor) -> Generator[None]:
        """Sets the positions while inside: a number, one per row [B], or one per token [B, T]."""
        before = self.alpha, self._closed
        device = weight(self.inlets.sides[0]).device
        value = torch.as_tensor(alpha, dtype=torch.float32, device=device)
        self.alpha = value.reshape(1, 1, 1) if value.ndim == 0 else value[:, None, None] if value.ndim == 1 else value[..., None]
        self._closed = self.alpha == 0
        if not (self.alpha.is_cuda and torch.cuda.is_current_stream_capturing()):
            self.inlets.look()
        try:
            yield
        finally:
            self.alpha, self._closed = before


class Valve:
    """A model, its tokenizer and one direction, with the dial between them."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        direction: Direction | TaskVector | None = None,
    ) -> None:
        """Takes `model` over: LoRA layers are put into it (they do nothing while the valve is closed).

        Raises DirectionMismatch, naming the module, when the direction does not fit.
        """
        self.tokenizer = tokenizer
        self.direction: Direction | TaskVector | None = None
        self.calibration: Calibration | None = None
        self.dial: Dial | None = None
        self._peft: PeftModel | None = None
        self._moved = 0.0
        self._mover: Mover | None = None
        self.model = model
        self.name = model.name_or_path or type(model).__name__
        """The model as the user named it: for tables and cards."""
        self.source: dict[str, Any] | None = None  # what `load` was given, for copies in other processes
        self.base_sha256 = fingerprint(model)  # empty for a quantized base
        if direction is not None:
            self._put(direction)

    def _put(self, direction: Direction | TaskVector) -> None:
        refuse_adapted(self.model)
        if isinstance(direction, Direction):
            check_fits(direction, self.model)
            # By whole names: endings would reach other layers too where the direction is on the first few only.
            self._wrap(direction.lora_config(direction.factors))
            tuner.put(self.peft_model, direction.state_dict())
        else:
            direction.check_fits(self.model)
        self.direction = direction
        direction.card.compare(self.name, self.base_sha256)

    @classmethod
    def load(
        cls,
        model: str | Path,
        direction: str | Path | None = None,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        gguf_file: str | None = None,
        trust_remote_code: bool = False,
        quantize_4bit: bool = False,
        chat_template: str | None = None,
    ) -> Valve:
        """A valve from a model and a direction: hub ids, folders, or the embedded `tiny*` names.

        dtype "auto" is bf16 on a GPU and fp32 elsewhere. Without a direction the valve has no dial and only
        alpha 0 works. `chat_template` is for base models (templates.put). Raises DataError for a model that is
        missing or broken, DirectionMismatch for a direction that does not fit it.
        """
        where = checkpoints.pick_device(device)
        how: dict[str, Any] = {"gguf_file": gguf_file, "trust_remote_code": trust_remote_code, "quantize_4bit": quantize_4bit}
        loaded = checkpoints.load_model(model, dtype=dtype, device=where, **how)
        tokenizer = checkpoints.load_tokenizer(model, gguf_file=gguf_file, trust_remote_code=trust_remote_code)
        if chat_template:
            templates.put(tokenizer, chat_template)
        found = None if direction is None else load_direction(direction, loaded)
        valve = cls(loaded.eval(), tokenizer, found)
        valve.name, valve.source = str(model), {**how, "model": model, "dtype": loaded.dtype, "chat_template": chat_template}
        if direction is not None:
            from cotvalve.calibration import Calibration

            valve.calibration = Calibration.beside(checkpoints.fetch(direction, checkpoints.DIRECTION_FILES))
        return valve

    @classmethod
    def fresh(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: LoraConfig) -> Valve:
        """A valve with a new LoRA that is still zero, to be trained."""
        refuse_adapted(model)
        valve = cls(model, tokenizer)
        valve._wrap(config)
        return valve

    def _wrap(self, config: LoraConfig) -> None:
        self._peft = tuner.wrap(self.model, config)
        # DoRA can be trained (at alpha 1, where nothing is scaled) but has no dial.
        self.dial = None if config.use_dora else Dial(self.model)

    def billions(self) -> float:
        """Parameters of the base model in units of 10^9, for ACU (eq. 5)."""
        return checkpoints.billions(self.model)

    def facts(self) -> dict[str, str]:
        """Model, size, hardware and number format: what a table has to say about where it comes from."""
        device = self.model.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()} threads"
        known = {BASE_SHA256: self.base_sha256, DIRECTION_SHA256: self.direction.sha256() if self.direction else ""}
        return {
            "model": f"{self.name} ({self.billions():.3g} billion parameters)",
            **{key: digest for key, digest in known.items() if digest},
            "hardware": name,
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

    @property
    def peft_model(self) -> PeftModel:
        """The PEFT model around `model`; SettingError when there is no LoRA."""
        if self._peft is None:
            raise SettingError("this valve has no LoRA direction; give one to Valve.load, or start one with Valve.fresh")
        return self._peft

    @property
    def rows(self) -> bool:
        """True when one batch can hold different alphas."""
        return self.dial is not None

    @property
    def adapted(self) -> bool:
        """True when a LoRA (or DoRA) is in the model."""
        return self._peft is not None

    def turn_to(self, direction: Direction | TaskVector) -> bool:
        """Puts another direction in the place of this one, on the same model; nothing is loaded again.

        True where only numbers changed, so that an engine made before can go on; False where layers were exchanged
        and engines have to be made anew. Raises DirectionMismatch, as loading does, when it does not fit.
        """
        before = self.direction
        if isinstance(direction, Direction):
            check_fits(direction, self.model)
        else:
            direction.check_fits(self.model, unwrapped=True)
        if isinstance(before, Direction) and isinstance(direction, Direction) and before.alike(direction):
            direction.card.compare(self.name, self.base_sha256)
            tuner.put(self.peft_model, direction.state_dict())
            self.direction, self.calibration = direction, None
            return True
        self._move(0.0)
        if self._peft is not None:
            self._peft.base_model.unload()  # pyright: ignore[reportCallIssue]
        self.direction = self.calibration = self.dial = self._peft = self._mover = None
        self._put(direction)
        return False

    def current(self, card: Card) -> Direction:
        """The LoRA as it stands (after training) as an immutable direction."""
        state = get_peft_model_state_dict(self.peft_model, adapter_name=ADAPTER)
        return Direction.from_peft(self.peft_model.peft_config[ADAPTER].to_dict(), state, card)

    @contextmanager
    def at(self, alpha: float | Sequence[float] | Tensor) -> Generator[PreTrainedModel]:
        """The transformers model at one position, or at one per row [B] or token [B, T]; restored on leaving.

        Nested use and exceptions restore bit for bit. Without a direction only alpha 0 is a position. Rows are those that the model
        sees: beams and returned sequences are n of them for each prompt (`alpha.repeat_interleave(n)`). With gradient checkpointing
        the backward pass belongs inside too, as it runs the layers again. `fuse` makes a model that can be saved; this one has a LoRA in it.
        """
        alpha = positions(alpha)
        if self.adapted and self.dial is None:
            raise DirectionMismatch("a DoRA adapter in training has no dial; save it and load the folder: it becomes an exact weight difference")
        if self.dial is not None:
            if any(getattr(layer, "merged", False) for layer in self.dial.layers.values()):
                raise DirectionMismatch("the adapter was merged into the base weights; the dial cannot turn it any more")
            with self.dial.at(alpha):
                yield self.model
            return
        found = alpha.float().unique()
        if found.numel() != 1:
            raise EngineError("an exact task vector moves all weights: one alpha per batch; extract it with a rank to mix alphas")
        position, before = float(found), self._moved
        try:
            self._move(position)
            yield self.model
        finally:
            self._move(before)

    def _move(self, alpha: float) -> None:
        if alpha == self._moved:
            return
        if not isinstance(self.direction, TaskVector):
            raise SettingError(f"alpha {alpha:g} was asked for but no direction is loaded; name one with --direction")
        self._mover, self._moved = self._mover or Mover(self.direction, self.model), math.nan  # nowhere, should this be interrupted
        self._mover.to(alpha)
        self._moved = alpha

    def fuse(self, alpha: float) -> PreTrainedModel:
        """A new plain model at `alpha`, on the CPU; it has no dial and refuses directions. This one is not changed."""
        from cotvalve.fusing import fuse

        return fuse(self, alpha)

    def generate(
        self, question: str | Sequence[str], alpha: float | Sequence[float] | None = None, *,
        tokens: float | None = None, shorter: float | None = None, max_new_tokens: int = 2048,
        temperature: float = 0.0, top_p: float = 1.0, seed: int = 0, prompt: str = "boxed", budget: int | None = None,
    ) -> list[Completion]:  # fmt: skip
        """Answers at every alpha, all in one batch; questions outermost, alphas innermost.

        A calibrated valve also takes `tokens` (an expected chain length) or `shorter` (a saving between 0
        and 1) instead of alpha. temperature 0 is greedy. `budget` is the number that the prompts called budget name.
        """
        from cotvalve.engines import ask

        if (alpha is not None) + (tokens is not None) + (shorter is not None) > 1:
            raise SettingError("give one of alpha, tokens and shorter")
        if tokens is not None or shorter is not None:
            if self.calibration is None:
                raise SettingError("this direction has no calibration.json; run `cotvalve calibrate`, or give alpha")
            alpha = self.calibration.alpha(tokens=tokens, shorter=shorter)
        return ask(
            self, [question] if isinstance(question, str) else question, alpha, prompt=prompt, budget=budget,
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed,
        )  # fmt: skip
