"""Alpha <-> expected tokens: what lets a user say "about 120 tokens", "40 % shorter" or "at most one point lost".

A calibration is measured once per model and direction on held-out training questions (calibrate.py) and lies
beside the direction as `calibration.json`. The curve is monotone (isotonic, pool-adjacent-violators) in the log
of mean tokens and linear in it between measured alphas. Nothing is ever extrapolated: what the measured
positions do not reach is a SettingError that says what they reach. Numpy only.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cotvalve.errors import DataError, SettingError
from cotvalve.records import read_json, write_json
from cotvalve.types import Interval, Toward

FILE = "calibration.json"
FORMAT, VERSION = "cotvalve-calibration", 1
_SAMPLED = 2**20
"""Bytes hashed at either end of a weight file; training changes all of it."""


@dataclass(frozen=True, slots=True)
class Position:
    """One measured alpha."""

    alpha: float
    tokens: float
    """Mean over the questions, truncated chains with the tokens they have."""
    tokens_ci: Interval
    accuracy: float
    """In percent."""
    accuracy_ci: Interval
    difference: float
    """Accuracy minus that of alpha 0 on the same questions, in percentage points."""
    difference_ci: Interval
    """Paired bootstrap; where none or a handful of questions was lost, reaching down to what so few cannot exclude."""
    truncated: float
    """Percent of chains cut by the token budget."""
    looping: float
    """Percent of chains that repeat themselves, cut or not."""
    degenerate: float
    """Percent of chains that are cut or loop."""
    fitted: float | None
    """Tokens on the monotone curve; None where chains degenerate and the curve does not go."""


@dataclass(frozen=True, slots=True)
class Error:
    """How far the curve is off on questions it has not seen: relative errors of mean tokens, 0.05 is 5 %."""

    questions: float
    """Curve from one half of the questions against the other half's means: the mean over alphas and splits."""
    worst: float
    """The same for the worst alpha."""
    between: float | None
    """The same at alphas that were left out of the curve as well; None with fewer than three alphas."""
    single: Interval
    """The middle 80 % of single chains, as multiples of the curve: one question is not the average question."""


@dataclass(frozen=True, slots=True)
class Saving:
    """A position that `at_most_loss` found."""

    alpha: float
    tokens: float
    shorter: float
    """1 - tokens / tokens at alpha 0; negative when no measured position is shorter."""
    difference: float
    """Measured accuracy minus that of alpha 0, in percentage points."""
    difference_ci: Interval


@dataclass(frozen=True, slots=True)
class Calibration:
    """The measured dial of one direction on one model."""

    positions: tuple[Position, ...]
    """By ascending alpha; alpha 0 is among them."""
    tolerance: float
    """Points of accuracy that the safe range may lose, by the paired interval's lower end."""
    degenerate: float
    """Percentage points of cut or looping chains that a usable alpha may have more than alpha 0."""
    error: Error
    questions: int
    chosen_on: str
    """The questions it was measured on, in words, for reports."""
    fingerprint: str = ""
    """Of the direction's weights: a direction trained again needs a new calibration."""
    facts: dict[str, str] = field(default_factory=dict[str, str])
    """Model, decoding, data hash, hardware, versions."""

    # From alpha to tokens and back

    @property
    def span(self) -> Interval:
        """The alphas the curve covers."""
        alphas, _ = self._knots()
        return Interval(alphas[0], alphas[-1])

    @property
    def reach(self) -> Interval:
        """The mean tokens the curve covers."""
        _, logs = self._knots()
        return Interval(math.exp(min(logs)), math.exp(max(logs)))

    @property
    def toward(self) -> Toward:
        """Where chains go as alpha grows, by the curve."""
        _, logs = self._knots()
        return "longer" if logs[-1] > logs[0] else "shorter"

    def tokens(self, alpha: float) -> float:
        """Expected tokens at `alpha`: the mean over questions like those it was measured on."""
        alphas, logs = self._knots()
        if not alphas[0] <= alpha <= alphas[-1]:
            raise SettingError(
                f"alpha {alpha:g} is outside the calibrated {alphas[0]:g} to {alphas[-1]:g}: its length was not measured; "
                "take an alpha inside, or calibrate over more alphas"
            )
        return math.exp(float(np.interp(alpha, alphas, logs)))

    def alpha(self, *, tokens: float | None = None, shorter: float | None = None) -> float:
        """The position nearest to 0 with so many expected tokens, or a saving against alpha 0.

        `shorter` 0.4 is 40 % fewer tokens than at alpha 0; a negative value is longer. Raises SettingError with
        the reachable range for what was not measured.
        """
        if (tokens is None) == (shorter is None):
            raise SettingError("give one of tokens and shorter")
        tokens, shorter = _one("tokens", tokens), _one("shorter", shorter)
        asked = f"shorter={shorter:g}" if shorter is not None else f"tokens={tokens:g}"
        start = self.tokens(0.0)
        wanted = tokens if tokens is not None else start * (1 - (shorter or 0.0))
        reach, low, high = self.reach, 1 - self.reach.high / start, 1 - self.reach.low / start
        # A value that was shown rounded (in a message, on the page) is still the end it stands for.
        slack = 0.5 if tokens is not None else 0.0005 * start
        if not (math.isfinite(wanted) and reach.low - slack <= wanted <= reach.high + slack):
            span = self.span
            raise SettingError(
                f"{asked} is out of reach: this dial was measured from {reach.low:.0f} to {reach.high:.0f} tokens "
                f"(shorter {low:.3f} to {high:.3f}) over alpha {span.low:g} to {span.high:g}, {start:.0f} tokens at alpha 0; "
                "ask inside that range, or calibrate over more alphas"
            )
        alphas, logs = self._knots()
        target = min(max(math.log(max(wanted, reach.low)), min(logs)), max(logs))
        return min(_crossings(alphas, logs, target), key=abs)

    # What is safe

    @property
    def safe(self) -> Interval:
        """The alphas around 0 at which no measured position loses more than `tolerance` or degenerates."""
        within = self._within(self.tolerance)
        return Interval(within[0].alpha, within[-1].alpha)

    def is_safe(self, alpha: float) -> bool:
        """True when `alpha` lies in the safe range."""
        return self.safe.low <= alpha <= self.safe.high

    def at_most_loss(self, points: float) -> Saving:
        """The shortest measured position that loses at most `points` percentage points of accuracy.

        Judged by the lower end of the paired 95 % interval, there and at every position between it and 0; with
        few questions that interval is wide, and the answer is alpha 0.
        """
        if not points >= 0:
            raise SettingError(f"at most {points:g} points lost: expected 0 or more")
        found = min(self._within(points), key=lambda p: (p.fitted or math.inf, abs(p.alpha)))
        tokens = self.tokens(found.alpha)
        return Saving(found.alpha, tokens, 1 - tokens / self.tokens(0.0), found.difference, found.difference_ci)

    def _within(self, points: float) -> list[Position]:
        return around_zero(self.positions, lambda p: p.fitted is not None and p.difference_ci.low >= -points)

    def _knots(self) -> tuple[list[float], list[float]]:
        knots = [(p.alpha, math.log(p.fitted)) for p in self.positions if p.fitted is not None]
        return [alpha for alpha, _ in knots], [log for _, log in knots]

    # Disk

    def save(self, path: str | Path) -> Path:
        """Writes `calibration.json` into a folder (or to a .json path), whole or not at all."""
        path = Path(path) if str(path).endswith(".json") else Path(path) / FILE
        write_json(path, {"format": FORMAT, "version": VERSION, **asdict(self)})
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Reads a `calibration.json`, or the one in a folder; DataError for anything else."""
        path = Path(path) if str(path).endswith(".json") else Path(path) / FILE
        found = read_json(path)
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise DataError(f'{path}: not a calibration (expected "format": "{FORMAT}"); run `cotvalve calibrate`')
        if found.get("version") != VERSION:
            raise DataError(
                f"{path}: format version {found.get('version')}, this cotvalve reads {VERSION}; update cotvalve, or calibrate again"
            )
        try:
            made = cls(
                tuple(Position(**_intervals(p)) for p in found["positions"]),
                float(found["tolerance"]), float(found["degenerate"]), Error(**_intervals(found["error"])),
                int(found["questions"]), str(found["chosen_on"]), str(found["fingerprint"]), dict(found["facts"]),
            )  # fmt: skip
            whole = _is_whole(made.positions)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}: not a whole calibration ({type(error).__name__}: {error}); run `cotvalve calibrate` again"
            ) from None
        if not whole:
            raise DataError(
                f"{path}: its positions do not make a curve through alpha 0; run `cotvalve calibrate` again"
            )
        return made

    @classmethod
    def beside(cls, folder: str | Path) -> "Calibration | None":
        """The calibration in a direction's folder, or None where there is none.

        Raises DataError when it was measured on other weights than those that lie beside it.
        """
        folder = Path(folder)
        if not (folder / FILE).exists():
            return None
        made = cls.load(folder)
        if made.fingerprint and made.fingerprint != fingerprint(folder):
            raise DataError(
                f"{folder / FILE}: was measured on another direction than the one beside it (trained again since?); "
                "delete it, then run `cotvalve calibrate`"
            )
        return made


def fit(tokens: Sequence[float]) -> list[float]:
    """Mean tokens by ascending alpha on the monotone curve: falling or rising, whichever is nearer in log tokens.

    >>> [round(t) for t in fit([400, 100, 90, 110])]
    [400, 100, 99, 99]
    """
    logs = np.log(np.asarray(tokens, dtype=np.float64))
    rising, falling = pool(logs), [-value for value in pool(-logs)]
    misses = [float(np.square(np.asarray(fitted) - logs).sum()) for fitted in (falling, rising)]
    return [math.exp(value) for value in (falling if misses[0] <= misses[1] else rising)]


def pool(values: Iterable[float]) -> list[float]:
    """Pool-adjacent-violators: the nondecreasing sequence nearest to `values` in squares.

    >>> pool([1, 3, 2, 4])
    [1.0, 2.5, 2.5, 4.0]
    """
    blocks: list[tuple[float, int]] = []
    for value in values:
        mean, size = float(value), 1
        while blocks and blocks[-1][0] >= mean:
            before, count = blocks.pop()
            mean, size = (before * count + mean * size) / (count + size), count + size
        blocks.append((mean, size))
    return [mean for mean, size in blocks for _ in range(size)]


def around_zero(positions: Sequence[Position], good: Callable[[Position], bool]) -> list[Position]:
    """The unbroken stretch of positions around alpha 0 for which `good` holds; alpha 0 always belongs to it."""
    zero = next(i for i, p in enumerate(positions) if p.alpha == 0)
    first = last = zero
    while first > 0 and good(positions[first - 1]):
        first -= 1
    while last + 1 < len(positions) and good(positions[last + 1]):
        last += 1
    return list(positions[first : last + 1])


def fingerprint(folder: Path) -> str:
    """A digest that changes with a direction's weights: size, ends and scales, not every gigabyte."""
    digest = hashlib.sha256()
    for name in ("adapter_model.safetensors", "deltas.safetensors"):
        path = folder / name
        if path.exists():
            size = path.stat().st_size
            with path.open("rb") as file:
                digest.update(f"{name} {size} ".encode() + file.read(_SAMPLED))
                file.seek(max(0, size - _SAMPLED))
                digest.update(file.read())
    config = read_json(folder / "adapter_config.json") if (folder / "adapter_config.json").exists() else {}
    digest.update(
        repr([config.get(key) for key in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")]).encode()
    )
    return digest.hexdigest()


def _one(name: str, value: float | None) -> float | None:
    """The value as a number; SettingError for a list, which alpha takes and a length does not."""
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        raise SettingError(f"{name} is {value!r}; expected one number") from None


def _crossings(alphas: Sequence[float], logs: Sequence[float], target: float) -> list[float]:
    """Every alpha, of a flat stretch the measured ones (0 is always among them), at which the curve is at `target`."""
    found = [alpha for alpha, log in zip(alphas, logs, strict=True) if math.isclose(log, target, abs_tol=1e-12)]
    for (a, b), (x, y) in zip(pairwise(alphas), pairwise(logs), strict=True):
        if min(x, y) < target < max(x, y):
            found.append(a + (b - a) * (target - x) / (y - x))
    return found


def _intervals(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: Interval(float(value["low"]), float(value["high"])) if isinstance(value, dict) else value
        for key, value in values.items()
    }


def _is_whole(positions: Sequence[Position]) -> bool:
    alphas = [p.alpha for p in positions]
    fitted = [p.fitted for p in positions if p.fitted is not None]
    return (
        alphas == sorted(set(alphas))
        and any(p.alpha == 0 and p.fitted is not None for p in positions)
        and all(value > 0 for value in fitted)
        and fitted in (sorted(fitted), sorted(fitted, reverse=True))
    )
