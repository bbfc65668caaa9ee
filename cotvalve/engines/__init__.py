"""Engines: requests in, completions out, one protocol.

    transformers   own decoding loop on a transformers model: slots that refill, one alpha per row, CUDA graphs
    generate       plain `model.generate`, batch by batch: any architecture, slower; the reference in tests

A new engine is one file with a class that has `generate`, and one line in `pick`.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

from cotvalve.errors import SettingError, unknown
from cotvalve.types import Completion, Progress, Request, silent

if TYPE_CHECKING:
    from cotvalve.valve import Valve

NAMES = ("auto", "transformers", "generate")


class Engine(Protocol):
    """Samples chains."""

    name: str

    def generate(self, requests: Iterable[Request], progress: Progress = silent) -> Iterator[Completion]:
        """Yields one completion per request as it finishes, in any order.

        A request that cannot be run (longer than the model's context) is a completion with finish 'error'
        and a reason. Rows of different alpha share batches where the valve can do that.
        """
        ...


def pick(name: str, valve: "Valve", batch: int | None = None) -> Engine:
    """The engine called `name` on `valve`; 'auto' takes the fastest one that supports the model.

    `batch` is the number of rows decoded at once; None sizes it from the memory.
    """
    from cotvalve.engines.generate import GenerateEngine
    from cotvalve.engines.transformers import TransformersEngine, unsupported

    if name not in NAMES:
        raise SettingError(unknown("engine", name, NAMES))
    if name == "generate" or (name == "auto" and unsupported(valve.model)):
        return GenerateEngine(valve, batch=batch)
    return TransformersEngine(valve, batch=batch)
