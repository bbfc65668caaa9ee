"""One dial for how long a language model thinks: theta + alpha * delta (CoT-Valve, arXiv 2502.09601).

    from cotvalve import Valve
    valve = Valve.load("tiny-reasoner", "tiny-valve")
    for c in valve.generate("Tom has 3 apples ...", alpha=[0.0, 0.5, 1.0]):
        print(c.alpha, c.tokens, c.text)

Importing the package is light; torch comes in with the first name that needs it.
"""

from typing import TYPE_CHECKING, Any

from cotvalve.errors import CotvalveError, DataError, DirectionMismatch, EngineError, SettingError

if TYPE_CHECKING:
    from cotvalve.direction import Direction
    from cotvalve.taskvector import TaskVector
    from cotvalve.valve import Valve

__version__ = "0.1.0"
__all__ = [
    "CotvalveError", "DataError", "Direction", "DirectionMismatch", "EngineError", "SettingError", "TaskVector", "Valve",
]  # fmt: skip

_LAZY = {"Valve": "cotvalve.valve", "Direction": "cotvalve.direction", "TaskVector": "cotvalve.taskvector"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'cotvalve' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
