"""Tiny random models of real architectures, made in milliseconds, for every test that needs weights.

All weights come from a generator of their own: the same call gives the same model, and no test's random
state is touched. Weights are larger than a real initialisation's so that a small change shows in the logits.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

M = TypeVar("M", bound=PreTrainedModel)

VOCABULARY = 272
"""Rows of the embedding: 256 bytes, 4 special tokens, and padding rows as real models have."""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def llama(
    *,
    tied: bool = False,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 32,
    vocabulary: int = VOCABULARY,
    dtype: torch.dtype = torch.float32,
) -> LlamaForCausalLM:
    """A Llama: grouped-query attention (4 heads, 2 of keys), no biases."""
    model = LlamaForCausalLM(LlamaConfig(attention_bias=False, **_shape(tied, layers, hidden, vocabulary)))
    return _filled(model, seed).to(dtype)


def qwen2(
    *,
    tied: bool = False,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 32,
    vocabulary: int = VOCABULARY,
    dtype: torch.dtype = torch.float32,
) -> Qwen2ForCausalLM:
    """A Qwen2: as `llama`, with biases on q, k and v."""
    model = Qwen2ForCausalLM(Qwen2Config(use_sliding_window=False, **_shape(tied, layers, hidden, vocabulary)))
    return _filled(model, seed).to(dtype)


MAKERS = {"llama": llama, "qwen2": qwen2}


def moved(model: M, *, seed: int = 1, by: float = 0.05) -> M:
    """A copy of `model` with every weight moved at random: the reasoner of a pair."""
    copy = type(model)(model.config).to(model.dtype)
    copy.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in copy.parameters():
            weight.add_((by * torch.randn(weight.shape, generator=generator)).to(weight.dtype))
    return copy.eval()


def lora(
    model: PreTrainedModel,
    *,
    rank: int = 4,
    lora_alpha: float = 8,
    targets: Sequence[str] | str = PROJECTIONS,
    seed: int = 2,
    by: float = 0.2,
    **config: object,
) -> PeftModel:
    """PEFT's LoRA on `model` (which it wraps in place) with random factors; `config` are more fields of LoraConfig."""
    adapter = LoraConfig(
        r=rank,
        lora_alpha=lora_alpha,  # pyright: ignore[reportArgumentType]  PEFT takes fractions too
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
        **config,  # pyright: ignore[reportArgumentType]
    )
    wrapped = get_peft_model(model, adapter)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in wrapped.named_parameters():
            if "lora_A" in name or "lora_B" in name or "lora_embedding" in name:
                weight.copy_(by * torch.randn(weight.shape, generator=generator))
            elif "lora_magnitude" in name:
                weight.mul_(1 + by * torch.randn(weight.shape, generator=generator))
    return wrapped.eval()  # pyright: ignore[reportReturnType]


def tokenizer(extra: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """One token a byte, the special tokens of SPECIAL and `extra`, a ChatML template: any text, no vocabulary file."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({character: number for number, character in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    core.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    core.add_special_tokens([AddedToken(token, special=True) for token in (*SPECIAL, *extra)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|endoftext|>", eos_token="<|im_end|>", padding_side="left"
    )
    made.chat_template = TEMPLATE
    return made


def save(model: PreTrainedModel, folder: Path, *, extra: Sequence[str] = (), shard: str = "50GB") -> Path:
    """Writes `model` and its tokenizer as a checkpoint folder; `shard` as in '20KB' splits it over files."""
    model.save_pretrained(folder, max_shard_size=shard)
    tokenizer(extra).save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: torch.nn.Module, *, seed: int = 3, rows: int = 2, tokens: int = 7) -> torch.Tensor:
    """Logits [rows, tokens, vocabulary] on random ids: what two models must agree on."""
    ids = torch.randint(0, 256, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    return model(input_ids=ids).logits


def _shape(tied: bool, layers: int, hidden: int, vocabulary: int) -> dict[str, object]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "pad_token_id": 256,
        "bos_token_id": None,
        "eos_token_id": 258,
    }


def _filled(model: M, seed: int) -> M:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.1 * noise if "norm" in name else 0.2 * noise)
    return model.eval()


def gradients_of_steps(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """What each optimizer step of a training from now on is about to use, by parameter in float64, as the steps come."""
    from cotvalve.learner import SkipBadSteps  # the Trainer's import is long, and most tests train nothing

    seen: list[dict[str, Tensor]] = []

    def look(callback: SkipBadSteps, *_: object, **__: object) -> None:
        assert callback.trainer is not None
        assert callback.trainer.model is not None
        seen.append({name: p.grad.to(torch.float64, copy=True) for name, p in callback.trainer.model.named_parameters() if p.grad is not None})

    monkeypatch.setattr(SkipBadSteps, "on_pre_optimizer_step", look)
    return seen
