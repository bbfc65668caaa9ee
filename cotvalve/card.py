"""The card of a direction: which base it belongs to, where it leads and what made it (`direction.json`).

A direction fits every model of the same shapes and means something on its own base only, so the card holds a
fingerprint of that base (`weights.fingerprint`) beside its name.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from cotvalve.errors import DataError
from cotvalve.records import read_json, write_json
from cotvalve.types import Toward

_log = logging.getLogger(__name__)

CARD = "direction.json"
FORMAT, VERSION = "cotvalve-direction", 1
BASE_SHA256, DIRECTION_SHA256 = "base_sha256", "direction_sha256"
"""Facts about a loaded model and its direction; the first is a field of the card as well."""
FUSED = "cotvalve_fused"
"""The field of a model's config that says it was made by fusing a direction in."""

Method = Literal["valve", "plus", "progressive", "reward", "extract", "adapter"]
"""What made a direction; 'adapter' is a PEFT adapter made elsewhere."""


@dataclass(frozen=True, slots=True)
class Card:
    """What a direction is: written to `direction.json` beside the factors."""

    base: str
    """The model it is put on: a hub id, a folder or an embedded name; empty when the adapter does not say."""
    toward: Toward | None = None
    """Where chains go as alpha grows; None when nobody measured it."""
    method: Method = "adapter"
    note: str = ""
    """One line for people."""
    facts: Mapping[str, str] = field(default_factory=dict[str, str])
    """Seeds, data hashes, versions: whatever the maker wants to keep."""
    base_sha256: str = ""
    """Fingerprint of the base it was made from; empty when it was not taken. A fact of that name is moved here."""

    def __post_init__(self) -> None:
        if BASE_SHA256 in self.facts:
            object.__setattr__(self, BASE_SHA256, self.base_sha256 or self.facts[BASE_SHA256])
            object.__setattr__(self, "facts", {key: fact for key, fact in self.facts.items() if key != BASE_SHA256})

    @classmethod
    def read(cls, path: Path, kind: str) -> Card:
        """The card in `path`, which must describe a direction of this kind ('lora' or 'taskvector')."""
        found = read_json(path)
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise DataError(f'{path}: not a direction\'s card (expected "format": "{FORMAT}")')
        if found.get("version") != VERSION:
            raise DataError(
                f"{path}: format version {found.get('version')}, this cotvalve reads {VERSION}; update cotvalve"
            )
        if found.get("kind") != kind:
            raise DataError(f"{path}: kind '{found.get('kind')}', expected '{kind}'")
        if found.get("toward") not in ("shorter", "longer", None):
            raise DataError(f'{path}: toward is {found["toward"]!r}, expected "shorter", "longer" or null')
        if lacking := [name for name in ("base", "toward", "method") if name not in found]:
            raise DataError(f"{path}: no '{lacking[0]}' in it; it is not whole")
        named = {name: str(found.get(name) or "") for name in ("note", BASE_SHA256)}
        return cls(found["base"], found["toward"], found["method"], facts=found.get("facts", {}), **named)

    def write(self, path: Path, kind: str, **more: Any) -> None:
        """Writes this card to `path`; `more` are fields of the kind."""
        card = {
            "format": FORMAT, "version": VERSION, "kind": kind, "base": self.base, BASE_SHA256: self.base_sha256,
            "toward": self.toward, "method": self.method, "note": self.note, "facts": dict(self.facts),
        }  # fmt: skip
        write_json(path, {**card, **more})

    def compare(self, name: str, base_sha256: str) -> None:
        """Warns when the model called `name` is not the base this was made on, so far as both fingerprints are known.

        It is not refused: a fine-tuned sibling of the base is a fair try.
        """
        if self.base_sha256 and base_sha256 and self.base_sha256 != base_sha256:
            _log.warning(
                "the direction was made on another base than %s (%s; sha256 %s, this one's is %s): its lengths and accuracy have "
                "to be measured anew here", name, self.base or "not named", self.base_sha256[:12], base_sha256[:12],
            )  # fmt: skip

    def turned(self, by: float) -> Card:
        """The card of `by` times the direction: a negative factor turns `toward` round."""
        other: Toward | None = {"shorter": "longer", "longer": "shorter"}.get(self.toward or "")  # pyright: ignore[reportAssignmentType]
        return replace(self, toward=self.toward if by > 0 else other if by < 0 else None)
