"""Two short verbs: `extract` (a direction from two checkpoints) and `fuse` (a plain checkpoint at one alpha)."""

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from cotvalve.errors import DataError
from cotvalve.records import disk, write_json
from cotvalve.settings import Finite, ModelSettings, Seed, Settings
from cotvalve.types import Progress, Toward, silent


class ExtractSettings(Settings):
    """Settings of `extract`."""

    base: str
    """The checkpoint at alpha 0: a hub id, a folder or an embedded name."""
    reasoner: str
    """The checkpoint at alpha 1."""
    rank: int | None = None
    """LoRA rank; without it the task vector is exact (full rank, one alpha per batch)."""
    modules: str = ""
    """Endings of the linear layers to take, with commas; all by default."""
    toward: Toward = "longer"
    """Where chains go as alpha grows."""
    seed: Seed = 0
    """Seed of the sketches of large matrices."""
    out: str = "runs/extract"
    """Folder for the direction."""


def extract(settings: ExtractSettings, progress: Progress = silent) -> Path:
    """Writes the direction and `extraction.json` with the energy kept; returns the folder."""
    from cotvalve.extraction import extract as extracted

    modules = [part.strip() for part in settings.modules.split(",") if part.strip()]
    found = extracted(
        settings.base, settings.reasoner, rank=settings.rank, modules=modules or None, toward=settings.toward,
        seed=settings.seed, progress=progress,
    )  # fmt: skip
    with _whole(Path(settings.out)) as part:
        found.save(part)
    return Path(settings.out)


class FuseSettings(ModelSettings):
    """Settings of `fuse`."""

    direction: str
    """The direction to put into the weights."""
    alpha: Finite = 1.0
    """Position of the valve."""
    out: str = "runs/fused"
    """Folder for the checkpoint."""


def fuse(settings: FuseSettings, progress: Progress = silent) -> Path:
    """Writes a plain transformers checkpoint with its tokenizer; returns the folder."""
    with _whole(Path(settings.out)) as part:
        progress("fuse", 0, 1)
        valve = settings.load_valve(settings.direction)
        valve.fuse(settings.alpha).save_pretrained(part)
        valve.tokenizer.save_pretrained(part)
        write_json(part / "fused.json", {"base": settings.model, "direction": settings.direction, "alpha": settings.alpha})
        progress("fuse", 1, 1)
    return Path(settings.out)


@contextmanager
def _whole(folder: Path) -> Generator[Path]:
    """A folder to write into that becomes `folder` at the end: a killed command leaves nothing half done there."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: a file, not a folder; name another --out")
    there = folder.is_dir()
    part = folder / ".part" if there else folder.with_name(f".{folder.name}.part")
    if there and any(path != part for path in folder.iterdir()):
        raise DataError(f"{folder}: not empty; name another --out")
    shutil.rmtree(part, ignore_errors=True)
    with disk(folder):
        part.mkdir(parents=True)
        yield part
        if not there:
            os.replace(part, folder)
            return
        # An empty folder that is there stays the one it is: it may be a link, a disk that is mounted, or where one stands.
        for path in sorted(part.iterdir()):
            os.replace(path, folder / path.name)
        part.rmdir()
