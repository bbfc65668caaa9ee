"""Points, paired tests and chains become one HTML page, figures and Markdown tables.

In: a `ReportData`, plain data that any run can fill. Out: a folder with `report.html` (one file with
everything in it: no script, nothing fetched, light and dark, phone and paper), `report.md`, and the figures
of each data set as PNG and SVG. Model text is shown as it came, escaped. Nothing here picks a best alpha:
that would be choosing on the questions that are reported.
"""

import re
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from cotvalve import figures
from cotvalve.errors import DataError
from cotvalve.figures import DASH, MINUS, alpha_label
from cotvalve.records import write_text
from cotvalve.statistics import Paired, spearman, travel
from cotvalve.types import Completion, Grade, Interval, Point, Problem

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class ChainLengths:
    """One row of chain-length statistics, as in the paper's table 9."""

    chains_of: str
    """What was sampled, for example 'GSM8K MixChain-C'."""
    index: str
    """Which of its chains: a solution number, an alpha, or empty."""
    samples: int
    tokens_mean: float


@dataclass(frozen=True, slots=True)
class Example:
    """One question answered at several alphas."""

    problem: Problem
    completions: tuple[Completion, ...]
    grades: tuple[Grade, ...]
    """One for each completion."""
    system: str = ""


@dataclass(frozen=True, slots=True)
class ReportData:
    """All that a report shows."""

    title: str
    points: tuple[Point, ...]
    """All systems, all data sets."""
    facts: dict[str, str] = field(default_factory=dict[str, str])
    """Model, data, hardware, seeds, versions."""
    paired: tuple[Paired, ...] = ()
    lengths: tuple[ChainLengths, ...] = ()
    examples: tuple[Example, ...] = ()
    notes: tuple[str, ...] = ()
    chosen_on: str = ""
    """Where alpha, epoch and calibration were chosen ('200 held-out training questions'). Only when this is
    given does the report say that nothing was chosen on the test set."""


def write_report(data: ReportData, folder: Path) -> Path:
    """Writes report.html, report.md and the figures into `folder`; returns the path of the page."""
    page = folder / "report.html"
    write_text(page, html(data))
    write_text(folder / "report.md", markdown(data))
    write_figures(data.points, folder)
    return page


def write_figures(points: Sequence[Point], folder: Path) -> list[Path]:
    """Writes curve-<data set>.svg and .png, and dial-* where a system has a dial; returns their paths."""
    colours, names = figures.palette(points), slugs(points)
    written: list[Path] = []
    for dataset, own in by_dataset(_drawable(points)).items():
        if not _worth_a_figure(own, names):
            continue
        drawn = {"curve": figures.curve(own, colours=colours)}
        if any(point.alpha is not None for point in own):
            drawn["dial"] = figures.dial(own, colours=colours)
        for kind, figure in drawn.items():
            written += [figures.save(figure, folder / f"{kind}-{names[dataset]}.{end}") for end in ("svg", "png")]
    return written


def html(data: ReportData) -> str:
    """The page."""
    from jinja2 import Environment, StrictUndefined

    if not data.points:
        raise DataError(f"report '{data.title}': no points; run `cotvalve sweep` first")
    for example in data.examples:
        if len(example.completions) != len(example.grades):
            raise DataError(
                f"report '{data.title}': example '{example.problem.id}' has {len(example.completions)} completions "
                f"and {len(example.grades)} grades; give one grade for each"
            )
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        alpha=alpha_label, number=number, signed=signed, p=_p, span=span, change=_change
    )
    template = environment.from_string((files("cotvalve") / "assets" / "report.html.j2").read_text(encoding="utf-8"))
    colours = figures.palette(data.points)
    return template.render(
        data=data,
        chosen=chosen(data),
        colours={name: figures.css_colour(colour) for name, colour in colours.items()},
        sections=[_section(dataset, own, data, colours) for dataset, own in by_dataset(data.points).items()],
        several_samples=any(point.samples > 1 for point in data.points),
    )


def markdown(data: ReportData) -> str:
    """All tables of the report as Markdown."""
    parts = [f"# {data.title}"]
    if data.chosen_on:
        parts.append(chosen(data))
    for dataset, own in by_dataset(data.points).items():
        parts += [f"## {dataset}", markdown_table(own)]
        pairs = [pair for pair in data.paired if pair.dataset == dataset]
        if pairs:
            parts.append(markdown_paired(pairs))
    if data.lengths:
        parts += ["## Chain lengths", markdown_lengths(data.lengths)]
    if data.facts:
        parts += ["## Facts", "\n".join(f"- {name}: {value}" for name, value in data.facts.items())]
    if data.notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in data.notes)]
    return "\n\n".join(parts) + "\n"


def markdown_table(points: Sequence[Point]) -> str:
    """The points as a Markdown table, 95 % intervals in brackets; a data set column where there are several."""
    several = len({point.dataset for point in points}) > 1
    columns: dict[str, Callable[[Point], str]] = {
        "data set": lambda p: p.dataset,
        "system": lambda p: p.system,
        "alpha": lambda p: alpha_label(p.alpha),
        "accuracy %": lambda p: f"{number(p.accuracy)} [{span(p.accuracy_ci)}]",
        "mean tokens": lambda p: f"{number(p.tokens_mean)} [{span(p.tokens_mean_ci)}]",
        "median": lambda p: f"{number(p.tokens_median, 0)} [{span(p.tokens_median_ci, 0)}]",
        "reasoning + answer": lambda p: f"{number(p.reasoning_tokens, 0)} + {number(p.answer_tokens, 0)}",
        "truncated": lambda p: str(p.truncated),
        "unreadable": lambda p: str(p.unreadable),
        "ACU": lambda p: number(p.acu, 2),
        "problems": lambda p: str(p.problems) + (f" x {p.samples}" if p.samples > 1 else ""),
    }
    if not several:
        del columns["data set"]
    return table(columns, points, words=2 if several else 1)


def markdown_paired(pairs: Sequence[Paired]) -> str:
    """Paired tests as a Markdown table."""
    columns: dict[str, Callable[[Paired], str]] = {
        "compared": lambda q: f"{q.a} against {q.b}",
        "accuracy, points": lambda q: (
            f"{signed(q.accuracy_difference)} "
            f"[{signed(q.accuracy_difference_ci.low)} to {signed(q.accuracy_difference_ci.high)}]"
        ),
        "p (bootstrap)": lambda q: _p(q.accuracy_p),
        "only one right": lambda q: DASH if q.only_a is None else f"{q.only_a} : {q.only_b}",
        "p (McNemar)": lambda q: DASH if q.mcnemar_p is None else _p(q.mcnemar_p),
        "tokens": lambda q: (
            f"{_change(q.token_ratio)} [{_change(q.token_ratio_ci.low)} to {_change(q.token_ratio_ci.high)}]"
        ),
        "p (tokens)": lambda q: _p(q.token_p),
        "problems": lambda q: str(q.problems),
    }
    return table(columns, pairs, words=1)


def markdown_lengths(lengths: Sequence[ChainLengths]) -> str:
    """Chain-length statistics as a Markdown table (the shape of the paper's table 9)."""
    columns: dict[str, Callable[[ChainLengths], str]] = {
        "chains": lambda row: row.chains_of,
        "index": lambda row: row.index,
        "samples": lambda row: number(row.samples, 0),
        "mean tokens": lambda row: number(row.tokens_mean),
    }
    return table(columns, lengths, words=2)


def by_dataset(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Points by data set, in order of appearance."""
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(point.dataset, []).append(point)
    return found


def chosen(data: ReportData) -> str:
    """The sentence about what was chosen where."""
    return f"Nothing was chosen on the test questions: alpha, epoch and calibration come from {data.chosen_on}."


def _section(dataset: str, points: list[Point], data: ReportData, colours: dict[str, str]) -> dict[str, Any]:
    """What the template shows of one data set."""
    from markupsafe import Markup

    def drawn(kind: str, draw: figures.Draw) -> dict[str, Markup]:
        title = f"{kind}, {dataset}"
        # Markup is safe here: matplotlib escapes every text it writes, and no model text is drawn.
        return {
            name: Markup(figures.inline(draw(shown, size, colours), title, f"{kind} {dataset} {name}"))
            for name, size in (("wide", figures.WIDE), ("narrow", figures.NARROW))
        }

    shown = _drawable(points)
    pictured = shown if _worth_a_figure(points, slugs(data.points)) else []
    dials = {name: own for name, own in figures.systems(shown).items() if own[-1].alpha is not None}
    evenness = [_dial(name, own) for name, own in dials.items() if len(own) > 1]
    return {
        "name": dataset,
        "slug": slugs(data.points)[dataset],
        "problems": max(point.problems for point in points),
        "samples": max(point.samples for point in points),
        "groups": figures.systems(points),
        "left_out": len(points) - len(shown),
        "curve": drawn("Accuracy against mean tokens", figures.curve) if pictured else {},
        "dial": drawn("Mean tokens against alpha", figures.dial) if pictured and dials else {},
        "dials": evenness,
        "largest_share": max((abs(dial["largest"]) for dial in evenness), default=0) or 1,
        "paired": [pair for pair in data.paired if pair.dataset == dataset],
    }


def _worth_a_figure(points: Sequence[Point], datasets: Container[str]) -> bool:
    """False for a subset of under 100 problems, 'name (subset)': tables show its intervals, a curve would show noise."""
    return any(point.problems >= 100 or point.dataset.rpartition(" (")[0] not in datasets for point in points)


def _drawable(points: Sequence[Point]) -> list[Point]:
    """Without the points that have no length, since every completion failed: they have no place on a log axis."""
    return [point for point in points if point.tokens_mean > 0]


def _dial(system: str, points: list[Point]) -> dict[str, Any]:
    """How far and how evenly one dial works. Its ends are alpha 0 and 1 where both were run, else the grid's."""
    turned = {point.alpha: point for point in points if point.alpha is not None}
    alphas, tokens = list(turned), [point.tokens_mean for point in turned.values()]
    shares = travel(alphas, tokens)
    return {
        "system": system,
        "start": turned.get(0.0, points[0]) if 1.0 in turned else points[0],
        "end": turned[1.0] if 0.0 in turned and 1.0 in turned else points[-1],
        "low": alphas[0],
        "high": alphas[-1],
        "spearman": spearman(alphas, tokens),
        "shares": shares,
        "largest": max(shares, key=abs),
        "largest_at": alphas[0] + (alphas[-1] - alphas[0]) * shares.index(max(shares, key=abs)) / len(shares),
        "tenth": (alphas[-1] - alphas[0]) / len(shares),
    }


def table(columns: dict[str, Callable[[Item], str]], items: Sequence[Item], words: int) -> str:
    """Items as a Markdown table with a column for each function; the first `words` columns are aligned left."""
    rules = [":--" if index < words else "--:" for index in range(len(columns))]
    lines = [list(columns), rules]
    lines += [[cell(item).replace("|", "\\|").replace("\n", " ") for cell in columns.values()] for item in items]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def slugs(points: Sequence[Point]) -> dict[str, str]:
    """What files and links call each data set, which may be a file: letters and digits, and a number where two would be one."""
    found: dict[str, str] = {}
    for dataset in by_dataset(points):
        plain = re.sub(r"[\W_]+", "-", dataset.lower()).strip("-") or "data"
        found[dataset] = next(name for number in count(1) if (name := plain if number == 1 else f"{plain}-{number}") not in found.values())
    return found


def number(value: float, digits: int = 1) -> str:
    """A number as tables show it: thin spaces between thousands, a real minus."""
    return f"{value:,.{digits}f}".replace("-", MINUS).replace(",", "\u202f")


def signed(value: float, digits: int = 1) -> str:
    """A difference: with its sign unless it rounds to 0."""
    return ("+" if round(value, digits) > 0 else "") + number(round(value, digits) + 0.0, digits)


def span(interval: Interval, digits: int = 1) -> str:
    """Both ends of an interval."""
    return f"{number(interval.low, digits)}{DASH}{number(interval.high, digits)}"


def _change(ratio: float) -> str:
    """A ratio as a change in percent: 0.6 is 40 % less."""
    return f"{signed(100 * (ratio - 1), 0)} %"


def _p(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"
