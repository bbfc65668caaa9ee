# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
"""What vLLM can run: asked before it is started, answered in words for the line that the user reads."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from cotvalve.card import Card
from cotvalve.direction import Direction
from cotvalve.engines.vllm_adapters import RANKS, rank_of, suffixes

if TYPE_CHECKING:
    from cotvalve.valve import Valve

TESTED = ((0, 23), (0, 32))
"""The oldest and the newest vLLM the dial was run with (0.23 on a GPU, 0.32 on a CPU)."""


def missing() -> str:
    """Why vLLM cannot be imported here, or an empty string."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed; pip install 'cotvalve[vllm]', or use engine 'transformers'"
    return ""


def unsupported(valve: Valve) -> str:
    """Why this engine cannot run `valve`, or an empty string."""
    if valve.direction is not None and not isinstance(valve.direction, Direction):
        return "an exact task vector moves all weights of the model; extract it with a rank"
    if valve.adapted and not valve.rows:
        return "a DoRA adapter has no dial"
    if getattr(valve.model.config, "quantization_config", None) is not None:
        return "its weights are quantized"
    if valve.adapted and rank_of(direction_of(valve)) > RANKS[-1]:  # pyright: ignore[reportArgumentType]
        return f"the direction's rank is above vLLM's {RANKS[-1]}"
    return ""


def stock_because(valve: Valve) -> str:
    """Why the dial cannot be put into this vLLM and stock multi-LoRA has to do, or an empty string."""
    import vllm
    from vllm.platforms import current_platform

    version = tuple(int(part) for part in vllm.__version__.split(".")[:2] if part.isdigit())
    if not TESTED[0] <= version <= TESTED[1]:
        low, high = (".".join(map(str, end)) for end in TESTED)
        return f"vLLM {vllm.__version__} is not among those the dial was tested with, {low} to {high}"
    if not (current_platform.is_cuda() or current_platform.is_cpu()):
        return f"the dial was not tested on {current_platform.device_name}"
    direction = direction_of(valve)
    if direction is not None and (names := {"lm_head", "embed_tokens"} & set(suffixes(direction))):
        return f"the direction changes {sorted(names)[0]}"
    from cotvalve.engines import vllm_dial

    return vllm_dial.unfit()


def direction_of(valve: Valve) -> Direction | None:
    """The direction as it stands in the model, also after training."""
    return valve.current(valve.direction.card if valve.direction else Card("")) if valve.adapted else None  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess]
