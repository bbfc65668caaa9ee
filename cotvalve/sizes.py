"""A recipe's `sizes`: what a plan takes for known where the models and the data are not at hand.

    sizes:
      models: {owner/name: {family: qwen2, layers: 28, ...}}
      data: {gsm8k: {answers: [100, 300]}}
      steps: {mix: {answers: [80, 250]}}

The fields of models are those of architectures.py.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from cotvalve.errors import SettingError, unknown

SIZES = {"data": ("questions", "chains", "human", "answers"), "steps": ("answers",)}
"""Fields beside `models`: problems, chains of each, mean tokens of the human chains, and of the shortest and longest
answers to expect; a step can have answers of its own."""

_OTHER = {"family": str, "tied": bool}
"""Fields that are no number."""


def check(sizes: Mapping[str, Any], steps: Iterable[str]) -> None:
    """Refuses a misspelt field, which would otherwise count for nothing, and what is no number."""
    for section, named in sizes.items():
        if section not in ("models", *SIZES):
            raise SettingError(unknown("field", section, ("models", *SIZES)))
        for name, values in _names(section, named).items():
            if section == "steps" and name not in (known := list(steps)):
                raise SettingError(f"steps: {unknown('step', name, known)}")
            for key, value in _names(f"{section}: {name}", values).items():
                if section in SIZES and key not in SIZES[section]:
                    raise SettingError(f"{section}: {name}: {unknown('field', key, SIZES[section])}")
                _check_value(f"{section}: {name}: {key}", key, value)


def _names(where: str, found: Any) -> Mapping[str, Any]:
    if not isinstance(found or {}, Mapping):
        raise SettingError(f"{where} is {found!r}, expected names with values")
    return found or {}


def _check_value(where: str, key: str, value: Any) -> None:
    if key == "answers":
        if not (isinstance(value, list) and len(value) == 2 and all(map(_positive, value))):  # pyright: ignore[reportUnknownArgumentType]
            raise SettingError(f"{where} is {value!r}, expected two numbers: mean tokens of the shortest and of the longest answers")
    elif not (isinstance(value, _OTHER[key]) if key in _OTHER else _positive(value)):
        raise SettingError(f"{where} is {value!r}, expected {'a name' if key == 'family' else 'true or false' if key == 'tied' else 'a number above 0'}")


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
