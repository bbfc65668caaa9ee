"""Fusing: a new plain model at one position of the dial. It answers like the valve there, and has no dial any more.

The weights are W + alpha * s * B A, computed in fp32 and rounded once; the valve's own model is not changed.
"""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedModel

from cotvalve.card import FUSED
from cotvalve.errors import EngineError, SettingError
from cotvalve.valve import ADAPTER, Valve


def fuse(valve: Valve, alpha: float) -> PreTrainedModel:
    """The model of `valve` at `alpha`, on the CPU; its config says that it was fused.

    Raises EngineError for a quantized model, SettingError for an alpha that is no finite number.
    """
    try:
        alpha = float(alpha)  # of numpy or torch it could not be written into a config
    except (TypeError, ValueError):
        raise SettingError(f"alpha is {alpha!r}; expected one number") from None
    if not torch.tensor(alpha, dtype=torch.float32).isfinite():  # 1e39 is infinite there
        raise SettingError(f"alpha {alpha} is not a finite number")
    if getattr(valve.model.config, "quantization_config", None) is not None:
        raise EngineError("a quantized model cannot be fused; load the base without quantization")
    with valve.at(0.0 if valve.dial else alpha):
        state = {
            name.replace(".base_layer.", "."): tensor.detach().to("cpu", copy=True)
            for name, tensor in valve.model.state_dict().items()
            if ".lora_" not in name
        }
    config = copy.deepcopy(valve.model.config)  # as it is after the move, which may have untied the output layer
    setattr(config, FUSED, {"alpha": alpha, "base": valve.name})
    for name, layer in (valve.dial.layers if valve.dial else {}).items():
        weight = state[f"{name}.weight"]
        b, a = (side[ADAPTER].get_parameter("weight").detach().float().cpu() for side in (layer.lora_B, layer.lora_A))
        delta = alpha * layer.scaling[ADAPTER] * (b @ a)
        if alpha != 0:
            state[f"{name}.weight"] = (weight.float() + delta).to(weight.dtype)
    head = valve.model.get_output_embeddings()
    if alpha and valve.dial and any(layer is head for layer in valve.dial.layers.values()):
        config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False  # the output's table is another than the input's now
    with torch.device("meta"):
        plain = type(valve.model)(config)
    plain.load_state_dict(state, strict=False, assign=True)
    plain.tie_weights()
    _rebuild_buffers(plain, valve.model)
    plain.generation_config = copy.deepcopy(valve.model.generation_config)
    return plain.eval()


def _rebuild_buffers(plain: PreTrainedModel, source: PreTrainedModel) -> None:
    """Non-persistent buffers (rotary frequencies) are not in a state dict: copied from the loaded model."""
    buffers = {name.replace(".base_layer.", "."): buffer for name, buffer in source.named_buffers()}
    for name, buffer in list(plain.named_buffers()):
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            plain.get_submodule(owner).register_buffer(leaf, buffers[name].detach().cpu().clone(), persistent=False)
