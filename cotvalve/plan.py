"""What a recipe will cost, before anything is loaded: tokens, steps, memory and GPU-hours by step.

Comes in: a recipe, read and checked. Goes out: text. Architectures come from a config on this machine, else from
the recipe's `sizes`; where both are there and differ, that is an error. Every number that rests on something
unknown (how long chains will be, how many are right, how well the hardware is used) is a range, and the text
ends with the formulas. Left out on purpose: loading weights or tokenizers, the hub, and CPUs.

    cotvalve run --plan qwq-32b-preview
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cotvalve import costs, problems
from cotvalve.architectures import Architecture, architecture
from cotvalve.costs import CARDS, GIB, Range
from cotvalve.errors import SettingError, unknown
from cotvalve.mixchain import MixSettings, Sampling, is_mixchain, load
from cotvalve.pipeline import Recipe, Step
from cotvalve.records import read_json
from cotvalve.rounds import RewardSettings, parts
from cotvalve.sizes import check
from cotvalve.sweep import SweepSettings, baselines_of, named_directions
from cotvalve.train import TrainSettings
from cotvalve.verbs import ExtractSettings, FuseSettings

PROMPT = 120
"""Tokens of a question in its chat template: GSM8K's have 60 to 90, and templates 20 to 50."""

HUMAN = {"gsm8k": 121.8, "prm12k": 223.1, "arithmetic": 37.0}
"""Mean tokens of human-written solutions: paper's Table 9; the embedded world with its own tokenizer."""

ANSWERS = {"arithmetic": (48.0, 350.0)}
"""Mean tokens of the shortest and the longest answers, where no recipe has to say them."""

AUTHORS = {
    "horseee/MixChain-Z-GSM8K": (6863, (116.0, 279.6, 310.7, 386.7, 497.2)),
    "horseee/MixChain-Z-PRM12K": (12000, (172.3, 583.2, 613.7, 739.3, 1003.2)),
}
"""The released sets: questions, and mean tokens of solutions 0 (human) to 4 (paper's Table 9)."""

CHARACTERS = 3.5
"""Characters of a token in solutions of a file of one's own, where no tokenizer is loaded."""

KEPT = Range(0.7, 1.0)
"""Share of questions that keep their chains when wrong ones are dropped: Table 9 has 74 % (PRM12K) and 92 % (GSM8K)."""


NONE = Range.of(0)


@dataclass(frozen=True, slots=True)
class Chains:
    """MixChain that does not exist yet."""

    questions: Range
    per_question: Range
    tokens: Range
    """Mean tokens of a question's shortest and longest chain."""
    solutions: tuple[float, ...] = ()
    """Mean tokens by column, for the authors' sets."""


@dataclass(frozen=True, slots=True)
class Line:
    """One step's row of the table and what it says about memory."""

    step: str
    verb: str
    work: str
    tokens: Range
    steps: Range | None = None
    hours: tuple[Range, ...] = ()
    """On each of CARDS."""
    memory: str = ""
    cards: tuple[int, ...] = ()
    """How many of each of CARDS."""


@dataclass
class _Plan:
    """What is known while going through the steps."""

    recipe: Recipe
    chains: dict[str, Chains] = field(default_factory=dict[str, Chains])
    """By the folder that will hold them."""
    models: dict[str, Architecture] = field(default_factory=dict[str, Architecture])
    made: dict[str, str] = field(default_factory=dict[str, str])
    """Folders that will hold a checkpoint, and the model it has the size of."""

    expected: dict[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])
    """Lengths of answers that were counted with, by data set (and step, where the recipe has its own)."""

    def data(self, name: str) -> Mapping[str, Any]:
        return (self.recipe.sizes.get("data") or {}).get(name) or {}

    def answers(self, step: str, name: str, limit: int) -> tuple[float, float]:
        """Mean tokens of the shortest and longest answers to expect, cut at the token budget."""
        own = (self.recipe.sizes.get("steps") or {}).get(step) or {}
        low, high = own.get("answers") or self.data(name).get("answers") or ANSWERS.get(name) or (_human(self, name) or PROMPT, limit)
        self.expected[f"{name} in {step}" if own else name] = (low, high)
        return min(low, limit), min(high, limit)

    def model(self, name: str) -> Architecture:
        name = self.made.get(name, name)
        if name not in self.models:
            try:
                self.models[name] = architecture(name, self.recipe.sizes.get("models") or {})
            except SettingError as error:
                raise SettingError(f"{self.recipe.name}: {error}") from None
        return self.models[name]


def describe(recipe: Recipe) -> str:
    """The plan of `recipe` as text; loads no model and needs no network.

    Raises SettingError when a model's size is nowhere to be found, or a config here contradicts the recipe.
    """
    _check(recipe)
    plan = _Plan(recipe)
    lines = [_line(plan, part) for step in recipe.steps for part in _parts(step)]
    head = [f"{recipe.name}: {recipe.about}", f"Runs in {recipe.out}, one folder per step.", "", *(
        f"{name}: {model.family}, {model.parameters / 1e9:.3g} billion parameters ({model.source})" for name, model in plan.models.items()
    )]  # fmt: skip
    table = [["step", "verb", "tokens", "optimizer steps", *(f"GPU-hours, {card.name}" for card in CARDS), "work"]]
    for line in lines:
        hours = [_hours(hours, count) for hours, count in zip(line.hours, line.cards, strict=True)] or ["-"] * len(CARDS)
        table.append([line.step, line.verb, str(line.tokens) if line.tokens.high else "-", str(line.steps) if line.steps else "-", *hours, line.work])  # fmt: skip
    steps = sum((line.steps for line in lines if line.steps), NONE)
    totals = [sum((line.hours[i] for line in lines if line.hours), NONE) for i in range(len(CARDS))]
    tokens = sum((line.tokens for line in lines), NONE)
    fits = [all(line.cards[i] for line in lines if line.cards) for i in range(len(CARDS))]
    table.append(["total", "", str(tokens), str(steps), *(_hours(*each) for each in zip(totals, fits, strict=True)), ""])
    memory = [f"{line.step}: {line.memory}; {_needs(line.cards)}" for line in lines if line.memory]
    return "\n".join([*head, "", *_aligned(table), "", "Memory (GiB)", *memory, "", *_how(plan)])


def _check(recipe: Recipe) -> None:
    try:
        check(recipe.sizes, [step.name for step in recipe.steps])
    except SettingError as error:
        raise SettingError(f"{recipe.name}: sizes: {error}") from None


def _parts(step: Step) -> list[Step]:
    """A step by itself; of `reward` what each round samples and learns."""
    if not isinstance(step.settings, RewardSettings):
        return [step]
    return [Step(f"{step.name} {number}", verb, part) for number, pair in enumerate(parts(step.settings), 1) for verb, part in zip(("mix", "train"), pair, strict=True)]


def _line(plan: _Plan, step: Step) -> Line:
    settings = step.settings
    if isinstance(settings, TrainSettings):
        return _train(plan, step, settings)
    if isinstance(settings, MixSettings):
        return _mix(plan, step, settings)
    if isinstance(settings, SweepSettings):
        return _sweep(plan, step, settings)
    if isinstance(settings, ExtractSettings):
        exact = f"rank {settings.rank}" if settings.rank else "exact"
        size = 2 * plan.model(settings.base).parameters / GIB
        return Line(step.name, step.verb, f"{exact}; reads two checkpoints of {size:.1f} GiB; minutes", NONE)
    if isinstance(settings, FuseSettings):
        plan.made[settings.out] = settings.model
        size = 2 * plan.model(settings.model).parameters / GIB
        return Line(step.name, step.verb, f"reads and writes a checkpoint of {size:.1f} GiB; minutes", NONE)
    return Line(step.name, step.verb, "not counted", NONE)


def _train(plan: _Plan, step: Step, settings: TrainSettings) -> Line:
    model = plan.model(settings.model)
    if settings.full:
        plan.made[settings.out] = settings.model
    chains = _learned(plan, settings)
    questions = chains.questions if settings.limit is None else chains.questions.capped(settings.limit)
    length, count, stages = chains.tokens, questions, 1
    if settings.recipe == "plus":
        # The longest chain of a question has beta 0 and is skipped.
        count = questions * (chains.per_question + -1)
    elif settings.recipe == "reward":
        # Wrong chains are learned from too, and chains worth as much as the others of their question are not.
        count = questions * chains.per_question
    elif settings.recipe == "progressive":
        stages = settings.stages or len(chains.solutions) or math.ceil(chains.per_question.high)
        if chains.solutions:
            used = chains.solutions[::-1][:stages]
            length = Range.of(sum(used) / len(used))
    elif chains.solutions:
        length = Range.of(chains.solutions[settings.solution or 0])
    elif chains.per_question.high > 1 and settings.solution is None:
        length = Range(length.low, (length.low + length.high) / 2)
    length = length.capped(settings.max_length)
    examples = count * stages * settings.epochs
    tokens = examples * (length + PROMPT)
    optimizer = Range(*(math.ceil(math.ceil(n / settings.batch) * settings.epochs) * stages for n in (count.low, count.high)))
    memory = costs.training_memory(model, settings, length + PROMPT)
    cards = tuple(memory.cards(card) for card in CARDS)
    hours = tuple(costs.training_hours(model, settings, tokens, length + PROMPT, card) for card in CARDS)
    whole = Range(round(count.low), round(count.high))
    work = f"{settings.recipe}: {whole} examples x {_some(settings.epochs, 'epoch')}" + (f" x {stages} stages" if stages > 1 else "")
    return Line(step.name, step.verb, work, tokens, optimizer, hours, str(memory), cards)


def _learned(plan: _Plan, settings: TrainSettings) -> Chains:
    """The chains a train step will read."""
    if (Path(settings.data) / "mix.json").is_file():
        return _sampled(Path(settings.data))
    if settings.data in plan.chains:
        return plan.chains[settings.data]
    if settings.data in AUTHORS:
        questions, solutions = AUTHORS[settings.data]
        return Chains(Range.of(questions), Range.of(len(solutions)), Range(min(solutions), max(solutions)), solutions)
    if Path(settings.data).is_file() and is_mixchain(settings.data):
        return _stored(settings.data)
    human = _human(plan, settings.data)
    tokens = Range.of(human) if human else Range(PROMPT, settings.max_length)
    return Chains(Range.of(_trainable(plan, settings.data)), Range.of(plan.data(settings.data).get("chains", 1)), tokens)


def _sampled(folder: Path) -> Chains:
    """MixChain that is there already."""
    report = read_json(folder / "mix.json")
    questions = max(1, report["kept_questions"])
    lengths = [table["mean_tokens"] for table in report["by_alpha"].values() if table["mean_tokens"]] or [PROMPT]
    return Chains(Range.of(questions), Range.of(report["kept"] / questions), Range(min(lengths), max(lengths)))


def _stored(path: str) -> Chains:
    """MixChain in a file, whose lengths are told by its characters."""
    counted: Any = lambda text, **_: {"input_ids": range(math.ceil(len(text) / CHARACTERS))}  # noqa: E731  a tokenizer to `load`
    mix = [[chain.tokens for chain in each.chains] for each in load(path, counted) if each.chains]
    low, high = (sum(map(end, mix)) / len(mix) for end in (min, max))
    return Chains(Range.of(len(mix)), Range.of(sum(map(len, mix)) / len(mix)), Range(low, high))


def _mix(plan: _Plan, step: Step, settings: MixSettings) -> Line:
    questions = min(_trainable(plan, settings.data), settings.limit or math.inf)
    positions = len(settings.alphas) if settings.direction else 1
    sampled = positions * settings.samples
    low, high = plan.answers(step.name, settings.data, settings.max_new_tokens)
    human = _human(plan, settings.data) if settings.solutions else None
    extra = 1 if settings.solutions else 0
    kept = Range(min(max(settings.fewest, KEPT.low * sampled + extra), sampled + extra), sampled + extra)
    plan.chains[settings.out] = Chains(KEPT * questions, kept, Range(min(low, human or low), high))
    work = f"{questions:,} questions x {_some(positions, 'position')} x {_some(settings.samples, 'sample')}"
    return _sampling(plan, step, settings, questions * sampled, Range(low, high), f"{work}; {Range(low, high)} tokens each")


def _sweep(plan: _Plan, step: Step, settings: SweepSettings) -> Line:
    directions = named_directions(settings.direction)
    dialled = len([alpha for alpha in settings.alphas if alpha != 0]) * len(directions)
    others = len(baselines_of(settings))
    count, tokens, said = 0.0, NONE, list[str]()
    for name in (part.strip() for part in settings.data.split(",") if part.strip()):
        size = min(_size(plan, name, settings.split), settings.limit or math.inf)
        low, high = plan.answers(step.name, name, settings.max_new_tokens)
        here = size * settings.samples * (dialled + others + 1)
        count, tokens = count + here, tokens + Range(low, high) * here
        said.append(f"{size:,} of {name}")
    work = f"{' + '.join(said)} x ({_some(dialled, 'position')} of {_some(len(directions), 'direction')}, {_some(others, 'baseline')}, 1 plain) x {_some(settings.samples, 'sample')}"
    return _sampling(plan, step, settings, count, tokens / count if count else tokens, work)


def _sampling(plan: _Plan, step: Step, settings: Sampling, count: float, length: Range, work: str) -> Line:
    model = plan.model(settings.model)
    memory = [costs.sampling_memory(model, settings, PROMPT, count, card) for card in CARDS]
    hours = tuple(costs.sampling_hours(model, PROMPT, count, length, at, card) for at, card in zip(memory, CARDS, strict=True))
    chain = memory[0].chain / GIB
    said = f"weights {Range.of(memory[0].weights / GIB)}, {Range.of(chain)} for each chain of up to {settings.max_new_tokens:,} tokens; " + ", ".join(
        f"{_some(at.slots, 'slot')} in {at.cards} x {card.name}" for at, card in zip(memory, CARDS, strict=True)
    )
    return Line(step.name, step.verb, work, length * count, None, hours, said, tuple(at.cards for at in memory))


def _trainable(plan: _Plan, name: str) -> int:
    """Questions that may be learned from: less the held-out ones."""
    if Path(name).is_file():
        return len(problems.training(name))
    known = name in problems.NAMES and "train" in problems.describe(name).sizes
    return problems.trainable(name) if known else _size(plan, name, "train")


def _size(plan: _Plan, name: str, split: str) -> int:
    """Problems in one part of a data set; a file's are counted when it is here."""
    if name in problems.NAMES:
        sizes = problems.describe(name).sizes
        if split == problems.HELD_OUT and "train" in sizes:
            return sizes["train"] - problems.trainable(name)
        if split not in sizes:
            raise SettingError(f"{plan.recipe.name}: {unknown(f'split of {name}', split, sizes)}")
        return sizes[split]
    if Path(name).is_file():
        return len(problems.load(name, split=split))
    if "questions" in plan.data(name):
        return int(plan.data(name)["questions"])
    raise SettingError(
        f"{plan.recipe.name}: the size of data '{name}' is not known: no such file is here, and the recipe's sizes: data: "
        f"has no {name}: {{questions: ...}}"
    )


def _human(plan: _Plan, name: str) -> float | None:
    """Mean tokens of the human-written solutions."""
    known = plan.data(name).get("human") or HUMAN.get(name)
    if known is None and name.endswith((".jsonl", ".jsonl.gz")) and Path(name).is_file():
        texts = [problem.solution for problem in problems.load(name) if problem.solution]
        return sum(map(len, texts)) / len(texts) / CHARACTERS if texts else None
    return known


def _needs(cards: tuple[int, ...]) -> str:
    told = [f"{count} x {card.name}" for count, card in zip(cards, CARDS, strict=True) if count]
    small = [card.name for count, card in zip(cards, CARDS, strict=True) if not count]
    few = f"its activations alone fill {' and '.join(small)} (gradient_checkpointing helps, or a shorter max_length)" if small else ""
    return "; ".join(part for part in (f"needs {' or '.join(told)}" if told else "", few) if part)


def _hours(hours: Range, cards: int) -> str:
    if not cards:
        return "does not fit"
    return "< 0.01" if hours.high < 0.01 else f"< 0.01 to {Range.of(hours.high)}" if hours.low < 0.01 else str(hours)


def _some(count: float, noun: str) -> str:
    return f"{count:g} {noun}{'' if count == 1 else 's'}"


def _aligned(table: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]) - 1)]
    return ["  ".join([*(cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=True)), row[-1]]).rstrip() for row in table]


def _how(plan: _Plan) -> list[str]:
    expected = "; ".join(f"{name} {Range(low, high)}" for name, (low, high) in plan.expected.items())
    return [
        "How this is counted",
        f"- Lengths: human chains and the authors' sets from the paper's Table 9 (a file's own: {CHARACTERS} characters a token), a prompt "
        f"{PROMPT} tokens, answers as the recipe expects them, else up to the token limit ({expected or 'nothing is sampled'}); "
        "positions between the ends are not told apart.",
        f"- Of the questions sampled by mix, {KEPT.low:.0%} to {KEPT.high:.0%} are taken to keep enough right chains.",
        *costs.how(),
        "- Data loading, model loading and grading are left out. A step that needs several GPUs has to be sharded: accelerate "
        "(FSDP) in training, 4-bit weights or another engine in sampling; hours are GPU-hours, all GPUs together.",
    ]

