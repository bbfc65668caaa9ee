"""What a data set is to the rest of the package, and how its rows are fetched and read.

A set is one module of this folder with one `DataSet` in it: a name, the size of each split, where it comes
from, and `read`, which turns a local folder (or, without one, the published source) into Problems. The same
row-to-Problem function serves both, so both give the same Problems.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cotvalve.errors import DataError
from cotvalve.records import Json, read_jsonl
from cotvalve.types import Problem

ENVIRONMENT = "COTVALVE_DATA"
"""Environment variable that names the local folder when no --data-dir is given."""


@dataclass(frozen=True, slots=True)
class DataSet:
    """One data set."""

    name: str
    sizes: Mapping[str, int]
    """Problems in each split, as published."""
    source: str
    """Where the published copy lives, for people."""
    licence: str
    read: Callable[[str, Path | None], list[Problem]]
    """(split, local folder or None) to problems in published order."""
    explained: Mapping[str, str] = field(default_factory=dict[str, str])
    """Problems whose published solution text does not grade as right, and why; docs/data.md lists them."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row with where it stands, for the messages."""

    where: str
    """'path: row 17'."""
    number: int
    """From 1."""
    values: Json

    def text(self, *names: str) -> str:
        """The first of the fields `names` that the row has, as text; DataError when it has none or it is empty."""
        for name in names:
            value = self._given(name)
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return str(value)
            if value is not None and not isinstance(value, str):
                raise DataError(f"{self.where}: field '{name}' is {type(value).__name__}, expected text")
            if value is not None:
                if not value.strip():
                    raise DataError(f"{self.where}: field '{name}' is empty")
                return value.strip()
        if empty := [name for name in names if name in self.values]:  # null, or a data frame's NaN
            raise DataError(f"{self.where}: field '{empty[0]}' is empty")
        wanted = " or ".join(f"'{name}'" for name in names)
        raise DataError(f"{self.where}: no field {wanted}; it has: {', '.join(self.values) or 'nothing'}")

    def optional(self, name: str) -> str | None:
        """The field as text, or None where it is missing or empty."""
        return self.text(name) if self._given(name) not in (None, "") else None

    def _given(self, name: str) -> Any:
        value = self.values.get(name)
        return None if value != value else value  # NaN is how pandas writes that there is none


def local_rows(path: Path) -> Iterator[Row]:
    """Rows of a JSON lines file, also gzipped (.gz); DataError names the row that cannot be read."""
    return (Row(f"{path}: row {number}", number, values) for number, values in read_jsonl(path))


FOLDER_INSTEAD = f"name a folder that holds it with --data-dir or {ENVIRONMENT} (docs/data.md has its layout)"


def hub_rows(
    repository: str, config: str | None, split: str, revision: str | None, instead: str = FOLDER_INSTEAD
) -> Iterator[Row]:
    """Rows of a data set on the Hugging Face hub, from its cache once downloaded.

    Raises DataError when it cannot be had; `instead` is what to do without the hub.
    """
    import datasets

    try:
        table = datasets.load_dataset(repository, config, split=split, revision=revision)
    except (OSError, ValueError) as error:  # offline, not found, no such config: all are one of these two
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"data set '{repository}' could not be loaded from the hub ({said}); go online once to download it, or {instead}"
        ) from None
    return rows_of(table, f"hub:{repository}")


def rows_of(table: Iterable[Any], where: str) -> Iterator[Row]:
    """Rows of a loaded `datasets.Dataset`, numbered from 1."""
    for number, values in enumerate(table, 1):
        yield Row(f"{where}: row {number}", number, dict(values))
