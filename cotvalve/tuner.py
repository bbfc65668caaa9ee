"""PEFT's layers on a model and their factors, by the names that the model's own modules have.

PEFT converts what it is given for some architectures, as adapters made for transformers 4 need it: a LoRA on the linear
`gate_proj` of a shared expert would land on the stacked weights of all experts, or nowhere. A direction names the
modules of the model in memory, so nothing is converted here.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import transformers_weight_conversion as conversion
from torch import Tensor
from transformers import PreTrainedModel

from cotvalve.errors import DirectionMismatch
from cotvalve.inlets import ADAPTER


def wrap(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """PEFT's model around `model`, with LoRA layers as `config` says."""
    with _as_named():
        # The adapters keep the base's dtype for sampling; train.py casts them to fp32.
        return get_peft_model(model, config, adapter_name=ADAPTER, autocast_adapter_dtype=False)  # pyright: ignore[reportReturnType]


def put(wrapped: PeftModel, state: Mapping[str, Tensor]) -> None:
    """Copies factors by PEFT's keys into the layers of `wrapped`; DirectionMismatch for one that has no layer there."""
    with _as_named():
        lost = set_peft_model_state_dict(wrapped, dict(state), adapter_name=ADAPTER).unexpected_keys
    if lost:
        raise DirectionMismatch(f"{lost[0]}: PEFT made no layer for it in {type(wrapped.get_base_model()).__name__}; leave that module out")


@contextmanager
def _as_named() -> Generator[None]:
    before = conversion.convert_peft_config_for_transformers, conversion.convert_peft_adapter_state_dict_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *_args, **_named: None
    conversion.convert_peft_adapter_state_dict_for_transformers = _unchanged
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers, conversion.convert_peft_adapter_state_dict_for_transformers = before


def _unchanged(*_args: Any, adapter_state_dict: Mapping[str, Tensor], **_named: Any) -> Mapping[str, Tensor]:
    return adapter_state_dict
