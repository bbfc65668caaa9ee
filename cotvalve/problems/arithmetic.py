"""The embedded world: multi-step arithmetic word problems from a seeded generator, and the chains that solve them.

A `Story` is a question built from events (a start, some changes, an end); each event asks for none, one or
two of the 2 to 6 exact steps. `write_chain` turns a story into a reasoning text with a `Style` of seven features
that can be dropped one by one, so that chains of every length between the brief solution and a long one exist.
The embedded models are trained on these chains (benchmarks/train_tiny.py); nothing here needs torch.

Splits are disjoint by construction: the sha256 of a problem's equations decides its split, whatever the seed.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Literal

from cotvalve.errors import SettingError, unknown
from cotvalve.problems.arithmetic_words import FAMILIES, FRACTIONS, NAMES, TIMES, Family
from cotvalve.types import Problem

Split = Literal["train", "validation", "test"]

SIZES: dict[Split, int] = {"train": 4000, "validation": 1000, "test": 1000}
"""Problems that `load` gives for each split."""

LIMIT = 999
"""No quantity of a story grows beyond this; only what a sale brings in may reach `SALE_LIMIT`."""
SALE_LIMIT = 9999

STARTS = ("plain", "groups", "two", "times")
CHANGES = ("gain", "gain", "lose", "lose", "gain_groups", "lose_groups", "grow", "half", "fraction")
ENDS = ("now", "now", "share", "pack", "sell", "sell", "goal")


@dataclass(frozen=True, slots=True)
class Step:
    """One exact operation: `a op b = result`, and the quantity it finds."""

    a: int
    op: Literal["+", "-", "*", "/"]
    b: int
    finds: str

    @property
    def result(self) -> int:
        """The value, an exact whole number."""
        if self.op == "+":
            return self.a + self.b
        if self.op == "-":
            return self.a - self.b
        return self.a * self.b if self.op == "*" else self.a // self.b

    @property
    def asked(self) -> str:
        """'12 + 7'."""
        return f"{self.a} {self.op} {self.b}"

    @property
    def equation(self) -> str:
        """'12 + 7 = 19'."""
        return f"{self.asked} = {self.result}"


@dataclass(frozen=True, slots=True)
class Story:
    """A question with all that a chain may say about it."""

    question: str
    knowns: tuple[str, ...]
    steps: tuple[Step, ...]
    family: str

    @property
    def solution(self) -> str:
        """The brief chain: '12 + 7 = 19. 19 * 2 = 38.'"""
        return " ".join(f"{step.equation}." for step in self.steps)

    @property
    def asked(self) -> str:
        """The last sentence of the question."""
        return self.question[self.question.rstrip("?").rindex(". ") + 2 :]

    @property
    def answer(self) -> int:
        """The last result."""
        return self.steps[-1].result

    @property
    def split(self) -> Split:
        """Decided by the equations alone, so two stories with the same sums are never in different splits."""
        bucket = int.from_bytes(hashlib.sha256(self.solution.encode()).digest()[:8]) % 10
        return "test" if bucket == 0 else "validation" if bucket == 1 else "train"

    def problem(self, id: str) -> Problem:
        """The story as a `Problem`, its family as subset."""
        return Problem(id, self.question, str(self.answer), "number", self.solution, self.family)


def load(split: str) -> list[Problem]:
    """The world's fixed problems of one split: 4,000 of train, 1,000 of validation, 1,000 of test; always the same.

    Raises SettingError for another split.
    """
    if split not in SIZES:
        raise SettingError(unknown("split of arithmetic", split, SIZES))
    return list(_fixed(split))


@lru_cache(maxsize=3)
def _fixed(split: Split) -> tuple[Problem, ...]:
    return tuple(
        story.problem(f"arithmetic/{split}/{number:04d}")
        for number, story in enumerate(stories(0, SIZES[split], split), 1)
    )


def generate(seed: int, count: int, split: Split) -> list[Problem]:
    """`count` problems of a split, all different; the same seed gives the same ones. `load` gives those of seed 0."""
    return [
        story.problem(f"arithmetic/{split}/{seed}-{number:04d}")
        for number, story in enumerate(stories(seed, count, split), 1)
    ]


def stories(seed: int, count: int, split: Split) -> Iterator[Story]:
    """Yields `count` different stories of a split."""
    rng = Random(f"arithmetic/{split}/{seed}")
    seen: set[str] = set()
    while len(seen) < count:
        story = draw(rng)
        if story.split == split and story.question not in seen:
            seen.add(story.question)
            yield story


def draw(rng: Random) -> Story:
    """One story of any split, with 2 to 6 steps, short ones a little more often."""
    wanted = rng.choices((2, 3, 4, 5, 6), (5, 5, 4, 3, 3))[0]
    family = rng.choice(list(FAMILIES))
    while True:
        story = _Telling(FAMILIES[family], rng).tell(wanted)
        if story is not None:
            return Story(*story, family)


class _Dead(Exception):
    """The story cannot go on: a number would be too large, negative or not whole. Caught where stories are drawn."""


class _Telling:
    """A story in the making: what was told, and the quantity the hero has now."""

    def __init__(self, family: Family, rng: Random) -> None:
        self.family, self.rng = family, rng
        (who, he), (other, _) = rng.sample(NAMES, 2)
        unit, units = rng.choice(family.units)
        new, old = family.kinds
        his = "his" if he == "he" else "her"
        self.words = {
            "who": who, "Who": who, "he": he, "He": he.capitalize(), "his": his, "other": other, "Other": other,
            "unit": unit, "units": units, "box": family.box[0], "boxes": family.box[1], "friends": family.friends,
            "new": new, "old": old,
        }  # fmt: skip
        self.told: list[str] = []
        self.knowns: list[str] = []
        self.steps: list[Step] = []
        self.value = 0

    def tell(self, wanted: int) -> tuple[str, tuple[str, ...], tuple[Step, ...]] | None:
        """The question, its knowns and its steps, or None where these draws lead to no story of `wanted` steps."""
        end = self.rng.choice(ENDS)
        last = 0 if end == "now" else 1
        try:
            self._event(self.rng.choice(STARTS))
            before = ""
            while len(self.steps) + last < wanted:
                event = self.rng.choice(CHANGES)
                if event == before:
                    continue
                self._event(event)
                before = event
            self._event(end)
        except _Dead:
            return None
        if len(self.steps) != wanted:
            return None
        return " ".join(self.told), tuple(self.knowns), tuple(self.steps)

    def _event(self, event: str) -> None:
        sentences = self.family.sentences(event)
        if not sentences:
            raise _Dead
        a, b = getattr(self, f"_{event}")()
        words = {**self.words, "a": a, "b": b, "times": TIMES.get(b, ""), "third": FRACTIONS.get(b, "")}
        self.told.append(self.rng.choice(sentences).format_map(words))

    def _step(self, a: int, op: Literal["+", "-", "*", "/"], b: int, finds: str, limit: int = LIMIT) -> int:
        if op == "/" and a % b:
            raise _Dead
        step = Step(a, op, b, finds.format_map(self.words))
        if not 1 < step.result <= limit:
            raise _Dead
        self.steps.append(step)
        return step.result

    def _know(self, text: str) -> None:
        self.knowns.append(text.format_map(self.words))

    def _number(self) -> int:
        return self.rng.randint(*self.rng.choice(((3, 30), (11, 99), (11, 99), (100, 480))))

    def _group(self) -> tuple[int, int]:
        return self.rng.randint(2, 12) if self.rng.random() < 0.7 else self.rng.randint(13, 30), self.rng.randint(3, 60)

    def _less(self) -> int:
        if self.value < 6:
            raise _Dead
        return self.rng.randint(2, self.value - 2)

    # Each event below returns the numbers (a, b) its sentence tells, and moves `value`.

    def _plain(self) -> tuple[int, int]:
        self.value = self._number()
        self._know(f"{self.value} {{units}} at first")
        return self.value, 0

    def _groups(self) -> tuple[int, int]:
        a, b = self._group()
        self._know(f"{a} {{boxes}}, {b} {{units}} for each")
        self.value = self._step(a, "*", b, f"the {{units}} for {a} {{boxes}}")
        return a, b

    def _two(self) -> tuple[int, int]:
        a, b = self._number(), self._number()
        self._know(f"{a} {{units}} and {b} {{units}}")
        self.value = self._step(a, "+", b, "the {units} together")
        return a, b

    def _times(self) -> tuple[int, int]:
        a, b = self._number(), self.rng.randint(2, 6)
        self._know(f"{a} {{units}} of {{other}}, {TIMES[b]} as many of {{who}}")
        self.value = self._step(a, "*", b, "the {units} of {who}")
        return a, b

    def _gain(self) -> tuple[int, int]:
        b = self._number()
        self._know(f"{b} more")
        self.value = self._step(self.value, "+", b, f"the {{units}} after adding {b}")
        return 0, b

    def _lose(self) -> tuple[int, int]:
        b = self._less()
        self._know(f"{b} less")
        self.value = self._step(self.value, "-", b, f"the {{units}} after taking away {b}")
        return 0, b

    def _gain_groups(self) -> tuple[int, int]:
        a, b = self._group()
        self._know(f"{a} more {{boxes}}, {b} for each")
        added = self._step(a, "*", b, f"the {{units}} for {a} more {{boxes}}")
        self.value = self._step(self.value, "+", added, "the {units} after adding these")
        return a, b

    def _lose_groups(self) -> tuple[int, int]:
        a, b = self.rng.randint(2, 12), self.rng.randint(2, 30)
        what = (
            "{boxes}" if self.family.box[1] in ("days",) else "gifts" if self.family.box[1] == "weeks" else "{friends}"
        )
        self._know(f"{a} {what}, {b} less for each")
        taken = self._step(a, "*", b, f"the {{units}} for {a} {what}")
        self.value = self._step(self.value, "-", taken, "the {units} after taking away these")
        return a, b

    def _grow(self) -> tuple[int, int]:
        b = self.rng.randint(2, 6)
        self._know(f"{TIMES[b]} as many")
        self.value = self._step(self.value, "*", b, f"{TIMES[b]} as many {{units}}")
        return 0, b

    def _half(self) -> tuple[int, int]:
        self._know("half is gone")
        self.value = self._step(self.value, "/", 2, "the half of the {units} that is left")
        return 0, 2

    def _fraction(self) -> tuple[int, int]:
        b = self.rng.choice(list(FRACTIONS))
        self._know(f"one {FRACTIONS[b]} is gone")
        gone = self._step(self.value, "/", b, f"one {FRACTIONS[b]} of the {{units}}")
        self.value = self._step(self.value, "-", gone, "the {units} after taking away these")
        return 0, b

    def _now(self) -> tuple[int, int]:
        return 0, 0

    def _divide(self, known: str, finds: str) -> tuple[int, int]:
        fitting = [b for b in range(2, 26) if self.value % b == 0 and self.value > b]
        if not fitting:
            raise _Dead
        b = self.rng.choice(fitting)
        self._know(f"{b} {known}")
        self._step(self.value, "/", b, finds)
        return 0, b

    def _share(self) -> tuple[int, int]:
        return self._divide("{friends}", "the {units} for each of the {friends}")

    def _pack(self) -> tuple[int, int]:
        return self._divide("{units} for each of the {boxes}", "the number of {boxes}")

    def _sell(self) -> tuple[int, int]:
        b = self.rng.randint(2, 40)
        what = "seconds" if self.family.box[1] == "chapters" else "dollars"
        self._know(f"{b} {what} for one {{unit}}")
        self._step(self.value, "*", b, f"the {what}", SALE_LIMIT)
        return 0, b

    def _goal(self) -> tuple[int, int]:
        b = self.value + self._number()
        self._know(f"{b} {{units}} needed")
        self._step(b, "-", self.value, "the {units} still needed")
        return 0, b
