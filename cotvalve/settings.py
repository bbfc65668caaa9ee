"""What every verb's settings share: frozen, typed, an unknown field is an error that names the nearest one.

One class per verb, next to the verb; one place for each default; the string under a field is its help at
the command line, its comment in a recipe and its entry in the docs. Checks are pure: no network, no
environment, no exit.
"""

import gc
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from cotvalve.errors import SettingError, unknown

if TYPE_CHECKING:
    from cotvalve.valve import Valve


_log = logging.getLogger(__name__)


class Settings(BaseModel):
    """Base of one verb's settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, coerce_numbers_to_str=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SettingError(_one_line(type(self), error)) from None

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """These settings from a mapping (a recipe's section, a flag table); dashes in names are allowed."""
        return cls(**{name.replace("-", "_"): value for name, value in values.items()})

    def but(self, **values: Any) -> Self:
        """A copy with some fields changed, checked again."""
        return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **values})


def _one_line(cls: type[Settings], error: ValidationError) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return unknown("setting", name, cls.model_fields)
    said = first["msg"].removeprefix("Value error, ")
    return f"setting '{name}': {said} (given: {first['input']!r})" if name else said


def _numbers(value: Any) -> Any:
    """'0,0.5,1' or '0 0.5 1' as typed at a shell, or a list: a list of numbers, NaN and infinity refused."""
    if isinstance(value, str):
        value = value.replace(",", " ").split()
    elif isinstance(value, (int, float)):
        value = [value]
    numbers: list[float] = []
    for item in value:
        try:
            number = float(item) + 0.0  # -0 is 0
        except (TypeError, ValueError):
            raise ValueError(f"'{item}' is not a number; write alphas like 0,0.25,0.5,1") from None
        if number != number or number in (float("inf"), float("-inf")):
            raise ValueError(f"'{item}' is not a finite number")
        numbers.append(number)
    if not numbers:
        raise ValueError("no alpha was given; write alphas like 0,0.25,0.5,1")
    # As rows are called: to six digits.
    names = [f"{number:g}" for number in numbers]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise ValueError(f"alpha {twice[0]} is given twice")
    return tuple(numbers)


Alphas = Annotated[tuple[float, ...], BeforeValidator(_numbers)]
"""Positions of the valve: a list, or text with commas."""


Share = Annotated[float, Field(ge=0, lt=1)]
"""From 0 to less than 1."""
Probability = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""What numpy and torch both take."""


class ModelSettings(Settings):
    """The model and how it is loaded: shared by every verb that runs one."""

    model: str = "tiny-reasoner"
    """Hub id, folder, or the embedded tiny or tiny-reasoner."""
    gguf_file: str | None = None
    """Name of the GGUF file inside the model's folder, for GGUF weights."""
    dtype: str = "auto"
    """auto (bf16 on a GPU, fp32 elsewhere), float32, bfloat16 or float16."""
    device: str | None = None
    """cuda, mps or cpu; picked by itself when not given."""
    quantize_4bit: bool = False
    """Load the base model in 4 bits (CUDA, bitsandbytes)."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint."""
    chat_template: str | None = None
    """For a base model, or in place of a model's own: plain, a .jinja file, or a folder or hub id that has one."""
    data_dir: str | None = None
    """Folder with local copies of the data sets; else the environment variable COTVALVE_DATA; else the hub."""

    def load_valve(self, direction: str | None = None) -> "Valve":
        """The model, with `direction` on it when one is given."""
        from cotvalve.valve import Valve

        # Hooks and their layers hold on to one another: what the round or the step before has loaded would fill the memory
        # beside this one until the collector happens to come by.
        gc.collect()
        valve = Valve.load(
            self.model, direction, dtype=self.dtype, device=self.device, gguf_file=self.gguf_file,
            trust_remote_code=self.trust_remote_code, quantize_4bit=self.quantize_4bit, chat_template=self.chat_template,
        )  # fmt: skip
        facts = valve.facts()
        _log.info("%s on %s, %s", self.model, facts["hardware"], facts["dtype"])
        return valve
