"""How a direction is learned, whatever the recipe: the settings, and which linear layers learn."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from peft import LoraConfig
from torch import nn

from cotvalve.errors import SettingError
from cotvalve.settings import Count, NotNegative, Positive, Seed, Settings, Share
from cotvalve.weights import is_bare

if TYPE_CHECKING:
    from cotvalve.valve import Valve

_log = logging.getLogger(__name__)

UNDECIDED = {"checkpoint_every", "gradient_checkpointing", "micro_batch", "compile"}
"""Settings that change no result: a run may go on with others."""


class FitSettings(Settings):
    """How a direction is learned, whatever the recipe."""

    rank: Count = 16
    """LoRA rank."""
    lora_alpha: Positive = 32.0
    """LoRA's own scale: the branch is multiplied by lora_alpha / rank. Not the valve's alpha."""
    rslora: bool = False
    """Scale by lora_alpha / sqrt(rank) instead."""
    dora: bool = False
    """DoRA (paper's Table 10): trained at alpha 1 only, used as an exact weight difference."""
    full: bool = False
    """Full fine-tuning (the LIMO recipe): a checkpoint and its task vector instead of a LoRA."""
    dropout: Share = 0.0
    """LoRA dropout."""
    modules: str = "all"
    """Linear layers that learn: all, attention, mlp, or names with commas (q_proj,o_proj)."""
    learning_rate: Positive = 1e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: Share = 0.03
    """Share of the steps in which the learning rate rises."""
    weight_decay: NotNegative = 0.01
    """AdamW's weight decay."""
    clip: NotNegative = 1.0
    """Largest gradient norm; 0 does not clip."""
    trust: NotNegative = 0.2
    """Reward: how far a token may move from how likely it was when sampled, as PPO bounds it; 0 does not bound it."""
    epochs: Positive = 1.0
    """Passes over the examples, per stage."""
    batch: Count = 64
    """Examples per optimizer step."""
    micro_batch: Count | None = None
    """Most rows in memory at once; by default as many as make 16,384 tokens (4,096 on a CPU). Changes no result."""
    max_length: Count = 4096
    """Examples with more tokens are left out, and counted."""
    packing: bool = False
    """Pack several examples into one row of max_length tokens, each with its own alpha."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, a third more time."""
    compile: Literal["auto", "yes", "no"] = "auto"
    """Compile the layers before training: about a minute, for a third less time a step on a GPU. auto weighs it up."""
    checkpoint_every: Count = 50
    """Optimizer steps between two checkpoints."""
    seed: Seed = 0
    """Seed of initial weights, order and dropout."""

    def model_post_init(self, _context: Any, /) -> None:
        if self.dora and self.full:
            raise ValueError("dora and full exclude each other")

    def lora(self, model: nn.Module) -> LoraConfig:
        """PEFT's configuration for `model`."""
        return LoraConfig(
            r=self.rank, use_rslora=self.rslora, use_dora=self.dora,
            lora_alpha=self.lora_alpha,  # pyright: ignore[reportArgumentType]  PEFT reads fractions as well
            lora_dropout=self.dropout, target_modules=target_modules(model, self.modules), task_type="CAUSAL_LM",
        )  # fmt: skip


def target_modules(model: nn.Module, which: str) -> list[str]:
    """Name suffixes of the linear layers meant by all, attention, mlp or a list with commas.

    The output head is never among them, nor what the model reads without calling it. Raises SettingError when nothing matches, with the names there are.
    """
    linear = [name.removesuffix(".base_layer") for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".lora_" not in name]
    linear = [name for name in linear if not name.endswith("lm_head") and not is_bare(model, name)]
    if which == "all":
        chosen = linear
    elif which in ("attention", "mlp"):
        chosen = [name for name in linear if (("attn" in name) or ("attention" in name)) == (which == "attention")]
    else:
        wanted = {part.strip() for part in which.split(",")}
        chosen = [name for name in linear if name.rpartition(".")[2] in wanted]
        missing = wanted - {name.rpartition(".")[2] for name in chosen}
        if missing:
            raise SettingError(f"modules: no linear layer called {sorted(missing)[0]!r}; there are {_suffixes(linear)}")
    if not chosen:
        raise SettingError(f"modules '{which}' matches 0 layers; there are {_suffixes(linear)}")
    return _suffixes(chosen)


def _suffixes(names: Sequence[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def say_ignored(settings: FitSettings, direction: str, valve: Valve) -> None:
    """Warns of settings of a new LoRA that were given beside a direction to go on from, which has its own."""
    made: Any = valve.peft_model.peft_config["default"]
    of = {"rank": made.r, "lora_alpha": made.lora_alpha, "rslora": made.use_rslora, "dropout": made.lora_dropout, "modules": settings.modules}
    if "modules" in settings.model_fields_set and set(target_modules(valve.model, settings.modules)) != set(_suffixes(list(made.target_modules))):
        of["modules"] = ",".join(_suffixes(list(made.target_modules)))
    for name in sorted(settings.model_fields_set & of.keys()):
        if getattr(settings, name) != of[name]:
            _log.warning("%s %s is not used: training goes on from %s, which has %s", name, getattr(settings, name), direction, of[name])
