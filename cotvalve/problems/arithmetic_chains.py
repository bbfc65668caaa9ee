"""Chains for the embedded world: the same steps told at any length, never with a wrong equation.

A long chain says again what is asked, lists what is known, plans, works each step in a sentence, splits hard operations
into easy ones, checks each step by its inverse and goes over everything at the end. Each feature, and each step's share
of the last three, can be dropped alone; with all of them dropped the brief solution is left. Splitting is what
makes length worth something: a small model does not know 47 * 23 by heart, but it does know 40 * 20.
"""

from dataclasses import astuple, dataclass
from random import Random

from cotvalve.problems.arithmetic import Step, Story


@dataclass(frozen=True, slots=True)
class Style:
    """How probable each feature of a chain is, from 0 (never) to 1 (always)."""

    restate: float = 0.0
    """Say again what is asked."""
    knowns: float = 0.0
    """List the numbers that are given."""
    plan: float = 0.0
    """Say what will be found, in which order."""
    sentences: float = 0.0
    """Say what a step finds; drawn for each step."""
    work: float = 0.0
    """Split a hard operation into easy ones; drawn for each step."""
    check: float = 0.0
    """Undo a step by its inverse; drawn for each step."""
    recheck: float = 0.0
    """Go over all steps once more at the end."""


BRIEF = Style()
LONG = Style(1, 1, 1, 1, 1, 1, 1)
FEATURES = len(astuple(LONG))


def evenly(probability: float) -> Style:
    """Every feature with the same probability."""
    return Style(*[probability] * FEATURES)


def write_chain(story: Story, style: Style, rng: Random) -> str:
    """The story's reasoning in a style, without the closing answer line. `rng` draws the features."""
    lines: list[str] = []
    if rng.random() < style.restate:
        lines.append(f"The question: {story.asked}")
    if rng.random() < style.knowns:
        lines.append(f"We know: {'; '.join(story.knowns)}.")
    if rng.random() < style.plan:
        lines.append(f"Plan: {', then '.join(step.finds for step in story.steps)}.")
    joins = False
    for number, step in enumerate(story.steps, 1):
        text = _told(
            step, number, rng.random() < style.sentences, rng.random() < style.work, rng.random() < style.check
        )
        plain = text == f"{step.equation}."
        # Bare equations share a line, so that with every feature dropped the brief solution is left.
        if plain and joins:
            lines[-1] += f" {text}"
        else:
            lines.append(text)
        joins = plain
    if rng.random() < style.recheck:
        lines.append(f"Check it all: {', '.join(step.equation for step in story.steps)}. All right.")
    return "\n".join(lines)


def _told(step: Step, number: int, sentence: bool, work: bool, check: bool) -> str:
    parts: list[str] = []
    if sentence:
        parts.append(f"Step {number}: find {step.finds}.")
    worked = split_up(step) if work else []
    if worked:
        parts.append(f"For {step.asked}: {', '.join(worked)}, so {step.equation}.")
    else:
        parts.append(f"{step.equation}.")
    if check:
        parts.append(f"Check: {inverse(step).equation}.")
    return " ".join(parts)


def inverse(step: Step) -> Step:
    """The operation that leads back from the result."""
    if step.op == "+":
        return Step(step.result, "-", step.b, step.finds)
    if step.op == "-":
        return Step(step.result, "+", step.b, step.finds)
    if step.op == "*":
        return Step(step.result, "/", step.b, step.finds)
    return Step(step.result, "*", step.b, step.finds)


def split_up(step: Step) -> list[str]:
    """The easy equations that make up a hard operation; empty for an operation that is easy as it is."""
    if step.op == "+":
        return _add(step.a, step.b)
    if step.op == "-":
        return _subtract(step.a, step.b)
    return _multiply(step.a, step.b) if step.op == "*" else _divide(step.a, step.b)


def _places(number: int) -> list[int]:
    """347 -> [300, 40, 7]: the parts that are not zero."""
    digits = str(number)
    return [int(digit) * 10 ** (len(digits) - 1 - at) for at, digit in enumerate(digits) if digit != "0"]


def _carries(a: int, b: int) -> bool:
    """Whether adding the two carries in some place."""
    return any(int(left) + int(right) > 9 for left, right in zip(f"{a:04d}", f"{b:04d}", strict=True))


def _add(a: int, b: int) -> list[str]:
    parts = _places(b)
    if len(parts) < 2 or not _carries(a, b):
        return []
    lines: list[str] = []
    for part in parts:
        lines.append(f"{a} + {part} = {a + part}")
        a += part
    return lines


def _subtract(a: int, b: int) -> list[str]:
    parts = _places(b)
    if len(parts) < 2 or not _carries(a - b, b):
        return []
    lines: list[str] = []
    for part in parts:
        lines.append(f"{a} - {part} = {a - part}")
        a -= part
    return lines


def _multiply(a: int, b: int) -> list[str]:
    products = [(left, right) for left in _places(a) for right in _places(b)]
    if len(products) < 2 or a * b <= 60:
        return []
    lines = [f"{left} * {right} = {left * right}" for left, right in products]
    total = products[0][0] * products[0][1]
    for left, right in products[1:]:
        lines.append(f"{total} + {left * right} = {total + left * right}")
        total += left * right
    return lines


def _divide(a: int, b: int) -> list[str]:
    quotient = _places(a // b)
    if len(quotient) < 2:
        return []
    lines: list[str] = []
    for part in quotient:
        lines.append(f"{b} * {part} = {b * part}")
        if part != quotient[-1]:
            lines.append(f"{a} - {b * part} = {a - b * part}")
            a -= b * part
    total = quotient[0]
    for part in quotient[1:]:
        lines.append(f"{total} + {part} = {total + part}")
        total += part
    return lines
