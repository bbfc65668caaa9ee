"""The nouns that travel between modules: frozen data, no behaviour beyond derived facts.

A `Problem` becomes a `Request` at some alpha; an engine turns it into a `Completion`; grading turns that
into a `Grade`. Right completions of one problem make a `MixChain`; all completions at one alpha on one
data set make a `Point`. Lengths are always counted on generated token ids, never on text.
"""

from dataclasses import dataclass, field
from typing import Literal, Protocol

AnswerKind = Literal["number", "math", "ratio", "time", "list", "word"]
"""How a gold answer is compared: an exact rational; a LaTeX expression; numbers joined by ':'; a clock time
or duration; several values in any order; a word."""

Finish = Literal["stop", "length", "error"]
"""Why a completion ended: the model ended its turn; the token budget ran out (truncated); it could not be run."""

Toward = Literal["shorter", "longer"]
"""Where chains go as alpha grows. The paper trains both ways; nothing in the package implies a sign."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One question with its gold answer."""

    id: str
    """Unique inside its data set and stable over versions, for example 'gsm8k/test/17'."""
    question: str
    answer: str
    """The gold answer as published, without its chain."""
    kind: AnswerKind = "number"
    solution: str | None = None
    """The human-written chain, without the closing answer line; None where the set has none."""
    subset: str = ""
    """A part of the data set that is also reported on its own ('numeric' in ASDiv), or empty."""


@dataclass(frozen=True, slots=True)
class Request:
    """One chain to sample."""

    id: str
    prompt: str
    """The whole prompt as text, chat template applied; the engine adds no special tokens."""
    alpha: float
    max_new_tokens: int
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    seed: int = 0
    """Seeds this request alone: the same request gives the same chain whatever else is in the batch (up to
    the floating-point noise of the batch's shape, which fp32 does not show)."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled chain."""

    id: str
    alpha: float
    text: str
    """Decoded without special tokens, thinking marks kept."""
    tokens: int
    """All generated ids, the end-of-turn id included."""
    finish: Finish
    prompt_tokens: int = 0
    reasoning_tokens: int = 0
    """Generated ids up to and including the end-of-thinking mark; 0 for a model that has no thinking block."""
    reason: str = ""
    """Why `finish` is 'error'; empty otherwise."""

    @property
    def answer_tokens(self) -> int:
        """Generated ids after the thinking block."""
        return self.tokens - self.reasoning_tokens

    @property
    def truncated(self) -> bool:
        """True when the token budget ran out before the model ended its turn."""
        return self.finish == "length"


@dataclass(frozen=True, slots=True)
class Grade:
    """What grading made of one completion."""

    correct: bool
    predicted: str | None
    """The answer that was read out of the text; None when none was found."""
    reason: str = ""
    """Why it is wrong or unreadable; empty when right."""


@dataclass(frozen=True, slots=True)
class Chain:
    """A reasoning text with its answer, as it is trained on."""

    text: str
    tokens: int
    """Length in the model's own token ids."""
    alpha: float | None = None
    """The position it was sampled at; None for a human-written chain."""
    solution: int | None = None
    """Its column in a set of the paper's authors (solution_0 the human one, 4 the longest); None elsewhere."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A sampled chain, right or not."""

    chain: Chain
    right: bool
    """Never of a truncated one."""
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class MixChain:
    """A question with several right chains of different lengths (the paper's MixChain)."""

    problem: Problem
    chains: tuple[Chain, ...]
    """Longest first."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A 95 % confidence interval."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Point:
    """One system at one alpha on one data set."""

    system: str
    dataset: str
    alpha: float | None
    """None for a system that has no dial (a prompt baseline)."""
    problems: int
    """The denominator; never shrunk."""
    correct: int
    accuracy: float
    """In percent."""
    accuracy_ci: Interval
    tokens_mean: float
    tokens_mean_ci: Interval
    tokens_median: float
    tokens_median_ci: Interval
    reasoning_tokens: float
    """Mean."""
    answer_tokens: float
    """Mean."""
    truncated: int
    """Completions cut by the token budget, counted as wrong and shown apart."""
    unreadable: int
    """Completions in which no answer was found, counted as wrong and shown apart."""
    acu: float
    """100 * accuracy in percent / (billions of parameters * mean tokens): paper eq. 5."""
    samples: int = 1
    """Completions per problem; the interval clusters them by problem."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """Points of one or several systems, with what made them."""

    points: tuple[Point, ...]
    facts: dict[str, str] = field(default_factory=dict[str, str])
    """Model, hardware, seeds, versions: printed under every table."""


class Progress(Protocol):
    """Told about long work as it goes on; the command line draws it, a library user may ignore it."""

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        """`done` of `total` units of `task`; `note` is a short extra such as a loss or a rate."""


def silent(task: str, done: int, total: int, note: str = "") -> None:
    """The progress that shows nothing: the default of every library function."""


def within(where: str, progress: Progress) -> Progress:
    """The same progress, with the place in a longer work before each task."""

    def told(task: str, done: int, total: int, note: str = "") -> None:
        progress(f"{where}: {task}", done, total, note)

    return told
