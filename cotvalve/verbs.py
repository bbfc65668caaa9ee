"""Two short verbs: `extract` (a direction from two checkpoints) and `fuse` (a plain checkpoint at one alpha)."""

from pathlib import Path

from cotvalve.errors import DataError
from cotvalve.records import disk, write_json
from cotvalve.settings import ModelSettings, Settings
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
    seed: int = 0
    """Seed of the sketches of large matrices."""
    out: str = "runs/extract"
    """Folder for the direction."""


def extract(settings: ExtractSettings, progress: Progress = silent) -> Path:
    """Writes the direction and `extraction.json` with the energy kept; returns the folder."""
    from cotvalve.extraction import extract as extracted

    folder = _empty(Path(settings.out))
    modules = [part.strip() for part in settings.modules.split(",") if part.strip()]
    found = extracted(
        settings.base, settings.reasoner, rank=settings.rank, modules=modules or None, toward=settings.toward,
        seed=settings.seed, progress=progress,
    )  # fmt: skip
    with disk(folder):
        return found.save(folder)


class FuseSettings(ModelSettings):
    """Settings of `fuse`."""

    direction: str
    """The direction to put into the weights."""
    alpha: float = 1.0
    """Position of the valve."""
    out: str = "runs/fused"
    """Folder for the checkpoint."""


def fuse(settings: FuseSettings, progress: Progress = silent) -> Path:
    """Writes a plain transformers checkpoint with its tokenizer; returns the folder."""
    folder = _empty(Path(settings.out))
    progress("fuse", 0, 1)
    valve = settings.load_valve(settings.direction)
    with disk(folder):
        valve.fuse(settings.alpha).save_pretrained(folder)
        valve.tokenizer.save_pretrained(folder)
        write_json(folder / "fused.json", {"base": settings.model, "direction": settings.direction, "alpha": settings.alpha})
    progress("fuse", 1, 1)
    return folder


def _empty(folder: Path) -> Path:
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder}: not empty; name another --out")
    return folder
