"""Data sets: a name to a list of Problems, from the published source or from a local folder, always the same ones.

    problems = load("gsm8k", split="test", limit=200, seed=1)

`_SETS` lists every set; a new one is one file with one `DataSet` in it and one entry here. `check` grades
every gold answer of a set before any model is graded.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from cotvalve.answers import boxes
from cotvalve.errors import DataError, SettingError, unknown
from cotvalve.grading import grade, why_unreadable
from cotvalve.problems import arithmetic, jsonl, unseen
from cotvalve.problems.aime import AIME24, AIME25
from cotvalve.problems.asdiv import ASDIV
from cotvalve.problems.dataset import ENVIRONMENT, DataSet
from cotvalve.problems.gsm8k import GSM8K
from cotvalve.problems.math500 import MATH500
from cotvalve.problems.prm12k import PRM12K
from cotvalve.types import Problem, Progress, silent

Item = TypeVar("Item")

_log = logging.getLogger(__name__)

ARITHMETIC = DataSet(
    "arithmetic",
    {str(split): size for split, size in arithmetic.SIZES.items()},
    "made by the seeded generator in the package",
    "Apache-2.0",
    lambda split, _folder: arithmetic.load(split),
)

_SETS: dict[str, DataSet] = {each.name: each for each in (GSM8K, MATH500, ASDIV, AIME24, AIME25, PRM12K, ARITHMETIC)}
NAMES: tuple[str, ...] = tuple(_SETS)
HELD_OUT = "heldout"
"""The split of training questions on which things are chosen."""


def describe(name: str) -> DataSet:
    """Sizes, source and licence of the set called `name`."""
    if name not in _SETS:
        raise SettingError(unknown("data set", name, NAMES) + ", or a path to a .jsonl file")
    return _SETS[name]


def table() -> str:
    """Every set on a line of its own: name, splits with their sizes, source, licence."""
    sets = _SETS.values()
    sizes = [", ".join(f"{split} {size:,}" for split, size in each.sizes.items()) for each in sets]
    rows = [(each.name, size, each.source, each.licence) for each, size in zip(sets, sizes, strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def splits(name: str) -> tuple[str, ...]:
    """The splits of the set called `name`; a JSON lines file has one, 'test'."""
    return ("test",) if _is_path(name) else tuple(describe(name).sizes)


def load(
    name: str, *, split: str = "test", data_dir: str | Path | None = None, limit: int | None = None, seed: int = 0
) -> list[Problem]:
    """The problems of one split, in published order.

    `name` is one of NAMES or a path to a .jsonl file (whose only split is itself). `data_dir` is a folder laid
    out as docs/data.md says; without it the environment variable COTVALVE_DATA, else the published source.
    Split 'heldout' is the part of the training questions that nothing is ever trained on (`held_out`).
    `limit` keeps a random subset chosen by `seed`, never the first ones: a problem's place is decided by its id
    alone, so a larger limit keeps all problems of a smaller one, and the order stays that of the set.
    Raises SettingError for an unknown name, split or limit, DataError for what cannot be read.
    """
    if _is_path(name):
        if split not in ("test", HELD_OUT):
            raise SettingError(unknown(f"split of {name}", split, ["test", HELD_OUT]))
        problems = jsonl.problems(Path(name))
    else:
        found = describe(name)
        source = "train" if split == HELD_OUT and "train" in found.sizes else split
        if source not in found.sizes:
            known = [*found.sizes, *([HELD_OUT] if "train" in found.sizes else [])]
            raise SettingError(unknown(f"split of {name}", split, known))
        folder = data_dir or os.environ.get(ENVIRONMENT)
        problems = found.read(source, Path(folder) if folder else None)
        if not folder and len(problems) != found.sizes[source]:
            raise DataError(
                f"data set '{name}' ({found.source}) has {len(problems)} problems in '{source}', expected "
                f"{found.sizes[source]}: its published copy has changed; name a folder with --data-dir"
            )
    _refuse_unusable(problems, name)
    if split == HELD_OUT:
        among, problems = len(problems), [problem for problem in problems if held_out(problem)]
        if not problems:
            raise DataError(f"data set '{name}': none of its {among:,} questions is held out (a fifteenth is, by a hash of the id); give more questions")
    return problems if limit is None else subset(problems, limit, seed, lambda problem: problem.id)


def subset(items: Sequence[Item], limit: int, seed: int, identity: Callable[[Item], str], offset: int = 0) -> list[Item]:
    """`limit` of the items in their order, drawn by seed and identity alone: a larger limit keeps all of a smaller one.

    `offset` passes over that many of the draw, and draws on from its beginning where they run out.
    """
    if limit < 1 or offset < 0:
        raise SettingError(f"limit must be 1 or more (given: {limit}), offset 0 or more (given: {offset})")
    places = sorted(range(len(items)), key=lambda place: _lot(identity(items[place]), seed))
    start = offset % len(items) if items else 0
    return [items[place] for place in sorted((places[start:] + places[:start])[:limit])]


def held_out(problem: Problem) -> bool:
    """True for the fifteenth of all training questions on which alphas, epochs and calibrations are chosen.

    Decided by the id alone, so every run leaves out the same ones: `cotvalve train` and `mix` never see them.
    """
    return _held_out(problem.id)


def _held_out(identity: str) -> bool:
    return hashlib.sha256(f"{HELD_OUT}/{identity}".encode()).digest()[0] < 17  # 17 of 256


def trainable(name: str) -> int:
    """How many training questions of a published set may be learned from; exact where ids count rows, as GSM8K's do."""
    return sum(not _held_out(f"{name}/train/{number}") for number in range(describe(name).sizes["train"]))


def training(
    name: str, *, data_dir: str | Path | None = None, limit: int | None = None, seed: int = 0, offset: int = 0
) -> list[Problem]:
    """The questions of `name` that may be learned from: its train split (or a .jsonl file) less the held-out ones.

    `limit`, `seed` and `offset` as in `subset`. A set with only a test split is refused. A question that a file has on several
    rows is held out by all of them when one is; how many are left out by that is logged as a warning.
    """
    everything = load(name, split="test" if _is_path(name) else "train", data_dir=data_dir)
    problems = [problem for problem in everything if not held_out(problem)]
    if _is_path(name):
        kept = {unseen.key(problem.question) for problem in everything if held_out(problem)}
        among, problems = len(problems), [problem for problem in problems if unseen.key(problem.question) not in kept]
        if among > len(problems):
            _log.warning("%s: %d of %d training questions are held out by another row with the same words: they were left out", name, among - len(problems), among)
    if not problems:
        raise DataError(f"data set '{name}': all its questions are held out (a fifteenth is, by a hash of the id); give more questions")
    return problems if limit is None else subset(problems, limit, seed, lambda problem: problem.id, offset)


def fingerprint(problems: Iterable[Problem]) -> str:
    """Hex sha256 of everything in `problems`, in their order: what a run folder notes of its data."""
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(json.dumps(asdict(problem), sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Check:
    """What `check` found of one split."""

    name: str
    split: str
    problems: int
    expected: int
    """As published."""
    graded: int
    """Texts that were graded: three spellings of each gold answer, and its published solution."""
    wrong: tuple[str, ...]
    """One line for each text that graded as wrong and is not explained."""
    explained: tuple[str, ...]
    """One line for each published solution known to differ from its gold answer."""

    @property
    def passed(self) -> bool:
        """True when every problem is there and grades as right."""
        return self.problems == self.expected and not self.wrong

    def line(self) -> str:
        """The verdict with its counts."""
        counts = f"{self.problems:,} of {self.expected:,} problems, {self.graded:,} texts graded"
        verdict = "passed" if self.passed else "failed"
        return f"{self.name} {self.split}: {verdict}; {counts}, {len(self.wrong)} wrong, {len(self.explained)} explained"


def check(names: Sequence[str] = NAMES, data_dir: str | Path | None = None, progress: Progress = silent) -> list[Check]:
    """Grades every gold answer of every split: boxed, "The answer is ...", "#### ..." and the published solution."""
    return [_check(name, split, data_dir, progress) for name in names for split in splits(name)]


def _check(name: str, split: str, data_dir: str | Path | None, progress: Progress) -> Check:
    problems = load(name, split=split, data_dir=data_dir)
    known: Mapping[str, str] = {} if _is_path(name) else describe(name).explained
    wrong: list[str] = []
    explained: list[str] = []
    graded = 0
    for done, problem in enumerate(problems, 1):
        for form, text in _forms(problem):
            graded += 1
            outcome = grade(problem, text)
            if outcome.correct:
                continue
            if form == "solution" and problem.id in known:
                explained.append(f"{problem.id}: {known[problem.id]}")
            else:
                wrong.append(
                    f"{problem.id}: {form}: read {outcome.predicted!r}, gold {problem.answer!r} ({outcome.reason})"
                )
        progress(f"check {name} {split}", done, len(problems))
    expected = len(problems) if _is_path(name) else describe(name).sizes[split]
    return Check(name, split, len(problems), expected, graded, tuple(wrong), tuple(explained))


def _forms(problem: Problem) -> list[tuple[str, str]]:
    forms = [
        ("box", f"So we get \\boxed{{{problem.answer}}}."),
        ("sentence", f"The answer is {problem.answer}."),
        ("hashes", f"#### {problem.answer}"),
    ]
    if problem.solution:
        closing = "" if boxes(problem.solution) else f"\n#### {problem.answer}"
        forms.append(("solution", problem.solution + closing))
    return forms


def _refuse_unusable(problems: list[Problem], name: str) -> None:
    if not problems:
        raise DataError(f"data set '{name}' has no problems")
    twice = next((each for each, count in Counter(problem.id for problem in problems).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"data set '{name}': the id '{twice}' stands on more than one row")
    for problem in problems:
        reason = why_unreadable(problem.answer, problem.kind)
        if reason:
            raise DataError(
                f"problem {problem.id}: gold answer {problem.answer!r} cannot be read as {problem.kind} ({reason})"
            )


def _is_path(name: str) -> bool:
    return name.endswith((".jsonl", ".jsonl.gz"))


def _lot(identity: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}/{identity}".encode()).digest()
