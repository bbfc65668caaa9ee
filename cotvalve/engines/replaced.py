"""Parts of a model that are computed by other means while an engine runs."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from typing import Any

Replacement = tuple[object, str, Callable[..., Any]]
"""What holds it (a layer, the dial, or the Python module that a layer calls), its name there, and what takes its place."""
_NOTHING = object()


@contextmanager
def replaced(found: Iterable[Replacement]) -> Generator[None]:
    """All of `found` in place while inside."""
    before: list[tuple[object, str, Any]] = []
    try:
        for owner, name, other in found:
            before.append((owner, name, vars(owner).get(name, _NOTHING)))
            setattr(owner, name, other)
        yield
    finally:
        for owner, name, own in reversed(before):
            # A layer's forward is its class's: nothing of its own is there to be put back.
            delattr(owner, name) if own is _NOTHING else setattr(owner, name, own)
