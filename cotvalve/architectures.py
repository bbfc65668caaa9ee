"""The numbers of a model that decide memory and time: from a config.json here, else from a recipe's `sizes`.

Only configs are read: no weights, no network. Dense Llama-like models are known; others are refused, not guessed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cotvalve.errors import SettingError, unknown
from cotvalve.records import read_json
from cotvalve.settings import ModelSettings

FIELDS = {
    "family": "model_type",
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mlp": "intermediate_size",
    "vocabulary": "vocab_size",
    "tied": "tie_word_embeddings",
}
"""A recipe's names for an architecture's numbers, and config.json's."""

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Architectures whose parameters are counted here: dense, gated feed-forward layers, grouped queries."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """The numbers that decide memory and time."""

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    tied: bool
    source: str
    """Where the numbers are from."""

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """The linear modules of a layer: inputs and outputs."""
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, wide), "k_proj": (self.hidden, narrow), "v_proj": (self.hidden, narrow),
            "o_proj": (wide, self.hidden), "gate_proj": (self.hidden, self.mlp), "up_proj": (self.hidden, self.mlp),
            "down_proj": (self.mlp, self.hidden),
        }  # fmt: skip

    @property
    def parameters(self) -> int:
        """Tied weights once."""
        wide, narrow = self.heads * self.head_dim, self.kv_heads * self.head_dim
        extra = {"qwen2": wide + 2 * narrow, "qwen3": 2 * self.head_dim}.get(self.family, 0)
        layer = sum(inputs * outputs for inputs, outputs in self.linears.values()) + 2 * self.hidden + extra
        return self.layers * layer + self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def multiplied(self) -> int:
        """Parameters that a token is multiplied with: all but the table it is looked up in."""
        return self.parameters - (0 if self.tied else self.vocabulary * self.hidden)

    def lora(self, rank: int, modules: str) -> int:
        """Parameters of a LoRA on `modules` (all, attention, mlp, or names with commas)."""
        sets = {"all": list(self.linears), "attention": list(self.linears)[:4], "mlp": list(self.linears)[4:]}
        chosen = sets.get(modules) or [part.strip() for part in modules.split(",")]
        if wrong := [name for name in chosen if name not in self.linears]:
            raise SettingError(unknown("module", wrong[0], self.linears))
        return self.layers * rank * sum(sum(self.linears[name]) for name in chosen)

    def bytes(self, settings: ModelSettings) -> float:
        """Of the weights as `settings` load them on a GPU."""
        # NF4 with double quantisation takes 4.13 bits; embeddings and output stay in 16.
        if settings.quantize_4bit:
            ends = self.vocabulary * self.hidden * (1 if self.tied else 2)
            return (self.parameters - ends) * 4.13 / 8 + ends * 2
        return self.parameters * (4.0 if settings.dtype == "float32" else 2.0)

    def cache(self) -> int:
        """Bytes of keys and values of one token, in 16 bits."""
        return 2 * self.layers * self.kv_heads * self.head_dim * 2

    def kept(self, checkpointing: bool) -> float:
        """Bytes that one token's forward pass keeps for the backward pass.

        A layer keeps 13 bytes per hidden unit, 4.5 per query and 4 per key unit, 8.5 per feed-forward unit:
        fitted to what autograd saved of tiny models in bf16 with a LoRA on all modules (tests/test_plan.py).
        """
        layer = 13 * self.hidden + (4.5 * self.heads + 4 * self.kv_heads) * self.head_dim + 8.5 * self.mlp
        # Checkpointing keeps each layer's input, and the inside of the one that is being computed again.
        return self.layers * 2 * self.hidden + layer if checkpointing else self.layers * layer


def architecture(name: str, sizes: Mapping[str, Any]) -> Architecture:
    """The numbers of the model called `name`: from its config on this machine, else from a recipe's `sizes`.

    Raises SettingError when neither is there, when they differ (naming the field), and when `sizes` contradicts
    itself.
    """
    path = _config(name)
    given: Mapping[str, Any] | None = sizes.get(name)
    if given is not None:
        for key in given:
            if key not in FIELDS and key != "parameters":
                raise SettingError(f"sizes: models: {name}: {unknown('field', key, [*FIELDS, 'parameters'])}")
        if missing := [key for key in FIELDS if key not in given]:
            raise SettingError(f"sizes: models: {name}: no {missing[0]}; expected {', '.join(FIELDS)}")
    if path is not None:
        found = _read(path)
        for key in FIELDS:
            if given is not None and given[key] != found[key]:
                raise SettingError(f"sizes: models: {name}: {key} is {given[key]}, but {path} says {found[key]}; correct the recipe")
        made = Architecture(**found, source=f"config in {path.parent}")
    elif given is not None:
        made = Architecture(**{key: given[key] for key in FIELDS}, source="the recipe's sizes; no config of it is here")
    else:
        known = ", ".join(sizes)
        where = "no config.json in that folder" if Path(name).is_dir() else "no such folder here, and no config of it in the hub's cache"
        raise SettingError(
            f"the size of model '{name}' is not known: {where}; name a folder that holds its config.json (the weights are not "
            f"needed), or write its numbers under sizes: models: in the recipe{f', which has {known}' if known else ''}"
        )
    if made.family not in FAMILIES:
        raise SettingError(f"model '{name}' is a {made.family}; a plan counts {', '.join(FAMILIES)}")
    said = (given or {}).get("parameters")
    if said is not None and abs(said * 1e9 / made.parameters - 1) > 0.01:
        raise SettingError(f"sizes: models: {name}: parameters is {said}, but its other numbers make {made.parameters / 1e9:.4g} billion")
    return made


def _config(name: str) -> Path | None:
    """The model's config.json, if it is on this machine."""
    from cotvalve.checkpoints import resolve

    path = Path(resolve(name)) / "config.json"
    if path.is_file():
        return path
    if name.count("/") != 1 or name.startswith(("/", ".", "~")):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found) if isinstance(found, str) else None


def _read(path: Path) -> dict[str, Any]:
    config = read_json(path)
    heads = config.get("num_attention_heads")
    config = {"tie_word_embeddings": False, "num_key_value_heads": heads, **config}
    if config.get("head_dim") is None and heads:
        config["head_dim"] = config.get("hidden_size", 0) // heads
    if missing := [name for name in FIELDS.values() if config.get(name) is None]:
        raise SettingError(f"{path}: has no {missing[0]}, so the model's size cannot be counted")
    return {key: config[name] for key, name in FIELDS.items()}
