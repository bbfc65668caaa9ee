"""Points become two figures: accuracy against tokens with alpha on the points, and tokens against alpha.

Drawn with matplotlib's object API on Agg, so nothing global changes and no screen is needed. The same
points give the same bytes of SVG. Colours tell systems apart for colour-blind readers too, and each system
has its own marker. For a page, `inline` turns a figure into SVG whose colours are CSS variables.
"""
# matplotlib's stubs leave keyword arguments unknown.
# pyright: reportUnknownMemberType=false, reportUnknownArgumentType=false

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from cotvalve.errors import DataError
from cotvalve.records import disk
from cotvalve.resampling import Floats
from cotvalve.types import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Draw = Callable[[Sequence[Point], "Size", dict[str, str]], "Figure"]

COLOURS = ("#0067A8", "#C2500A", "#00795C", "#9B3F86", "#7A6200", "#A32035")
"""One for each system with a dial, in order of appearance; dark enough for text on white."""
INK, SOFT, GRID = "#1B1F24", "#646C76", "#E3E6EA"
"""Text; axes and systems without a dial; grid lines."""
DIAL_MARKERS = "osD^v<"
OTHER_MARKERS = "XPph8>"
MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"


@dataclass(frozen=True, slots=True)
class Size:
    """Inches and points of a figure; the narrow one is for phones, where it is shown at its own size."""

    width: float
    height: float
    text: float
    label: float


WIDE = Size(8.0, 4.9, 10.0, 8.5)
NARROW = Size(4.0, 4.4, 9.0, 7.5)


def alpha_label(alpha: float | None) -> str:
    """An alpha as it is printed everywhere: no trailing zeros, a real minus sign, a dash for no dial.

    >>> alpha_label(0.25), alpha_label(1.0)
    ('0.25', '1')
    """
    return DASH if alpha is None else f"{alpha:g}".replace("-", MINUS)


def systems(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Points of one data set by system, in order of appearance; a dial's points by alpha."""
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(point.system, []).append(point)
    for name, own in found.items():
        found[name] = sorted(own, key=lambda p: float("-inf") if p.alpha is None else p.alpha)
    return found


def palette(points: Sequence[Point]) -> dict[str, str]:
    """A colour for each system: the same over all data sets; systems without a dial are grey."""
    dials = dict.fromkeys(point.system for point in points if point.alpha is not None)
    colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(dials)}
    return {point.system: colours.get(point.system, SOFT) for point in points}


def curve(points: Sequence[Point], size: Size = WIDE, colours: dict[str, str] | None = None) -> "Figure":
    """Accuracy against mean tokens, alpha on the points, intervals both ways; points of one data set."""
    figure, axes = _blank(points, size)
    colours = colours or palette(points)
    marks: list[_Mark] = []
    names: list[_Mark] = []
    dials = others = 0
    for name, own in systems(points).items():
        colour = colours[name]
        dial = [p for p in own if p.alpha is not None]
        marker = DIAL_MARKERS[dials % 6] if dial else OTHER_MARKERS[others % 6]
        dials, others = dials + bool(dial), others + (not dial)
        _intervals(axes, own, colour)
        axes.plot([p.tokens_mean for p in dial], [p.accuracy for p in dial], color=colour, lw=1.8, zorder=3)
        x, y = [p.tokens_mean for p in own], [p.accuracy for p in own]
        axes.plot(x, y, ls="none", marker=marker, ms=6.5 if dial else 7.5, mfc=colour, mec="white", mew=0.9, zorder=4)
        marks += [_Mark(p.tokens_mean, p.accuracy, alpha_label(p.alpha), colour) for p in dial]
        names.append(_Mark(own[-1].tokens_mean, own[-1].accuracy, name, colour, bold=bool(dial)))
    axes.set_xlabel("mean tokens of a completion (log scale)")
    axes.set_title("accuracy, %", loc="left", fontsize=size.text, color=SOFT)
    # Room round the points, and none beyond what an accuracy can be.
    axes.set_ylim(max(axes.get_ylim()[0], -2), min(axes.get_ylim()[1], 102))
    _token_axis(axes, [p.tokens_mean for p in points], "x")
    _place(figure, axes, marks, names, size)
    return figure


def dial(points: Sequence[Point], size: Size = WIDE, colours: dict[str, str] | None = None) -> "Figure":
    """Mean tokens against alpha with interval bands; points of one data set, at least one with an alpha."""
    turned = [p for p in points if p.alpha is not None]
    figure, axes = _blank(turned, size)
    colours = colours or palette(points)
    names: list[_Mark] = []
    for index, (name, own) in enumerate(systems(turned).items()):
        alphas, colour = [p.alpha for p in own if p.alpha is not None], colours[name]
        band = [p.tokens_mean_ci.low for p in own], [p.tokens_mean_ci.high for p in own]
        axes.fill_between(alphas, *band, color=colour, alpha=0.16, lw=0)
        tokens, marker = [p.tokens_mean for p in own], DIAL_MARKERS[index % 6]
        axes.plot(alphas, tokens, color=colour, lw=1.8, marker=marker, ms=6, mec="white")
        names.append(_Mark(alphas[-1], own[-1].tokens_mean, name, colour, bold=True))
    axes.set_xlabel("alpha")
    ticks = sorted({p.alpha for p in turned if p.alpha is not None})
    axes.set_xticks(ticks, _spaced(ticks, size))
    axes.set_title("mean tokens (log scale)", loc="left", fontsize=size.text, color=SOFT)
    _token_axis(axes, [p.tokens_mean for p in turned], "y")
    _place(figure, axes, [], names, size)
    return figure


def save(figure: "Figure", path: Path) -> Path:
    """Writes the figure as PNG or SVG, by the ending of `path`."""
    kind: Literal["png", "svg"] = "svg" if path.suffix == ".svg" else "png"
    from matplotlib.patheffects import withStroke

    for text in figure.axes[0].texts:
        text.set_path_effects([withStroke(linewidth=2.5, foreground="white")])
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk(path):
        path.write_bytes(_bytes(figure, kind, path.stem))
    return path


def inline(figure: "Figure", title: str, salt: str) -> str:
    """The figure as an `<svg>` element for a page: no name spaces, text as text, colours as CSS variables.

    `salt` keeps the ids of several figures on one page apart.
    """
    text = _bytes(figure, "svg", salt, live_text=True).decode()
    head, body = text[text.index("<svg") :].split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    body = re.sub(r"<(metadata|style)\b.*?</\1>", "", body, flags=re.DOTALL)
    # Text has no bare angle brackets, so this changes tags only, never a system's name.
    body = re.sub(r"<[^>]*>", lambda tag: _for_page(tag.group(0)), body)
    return f'<svg {box.group(0) if box else ""} role="img" aria-label="{escape(title)}">{body}'


def _for_page(tag: str) -> str:
    tag = re.sub(r' id="[^"]*"', "", tag) if tag.startswith("<g") else tag
    tag = re.sub(r"font: [^;\"]*?([0-9.]+px) [^;\"]*", r"font-size: \1", tag.replace("xlink:href", "href"))
    tag = re.sub(r"font-family: [^;\"]*;? ?", "", tag)
    for name, colour in _css().items():
        tag = tag.replace(colour.lower(), f"var(--{name})")
    return re.sub(r"(?<=[: ])(#ffffff|white)\b", "var(--page)", tag)


def _css() -> dict[str, str]:
    """CSS variable names of the page's style sheet by the colours drawn with."""
    return {"ink": INK, "soft": SOFT, "grid": GRID, **{f"s{index}": colour for index, colour in enumerate(COLOURS)}}


def css_colour(colour: str) -> str:
    """The CSS variable a colour of `palette` becomes on the page."""
    return next(f"var(--{name})" for name, known in _css().items() if known == colour)


@dataclass(frozen=True, slots=True)
class _Mark:
    x: float
    y: float
    text: str
    colour: str
    bold: bool = False


def _blank(points: Sequence[Point], size: Size) -> "tuple[Figure, Axes]":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not points:
        raise DataError("a figure of no points: run `cotvalve sweep` first")
    if len({point.dataset for point in points}) > 1:
        raise DataError(f"a figure shows one data set: given {sorted({point.dataset for point in points})}")
    figure = Figure(figsize=(size.width, size.height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(SOFT)
    axes.grid(axis="y", color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=SOFT, labelsize=size.text - 1, length=0, pad=5)
    axes.tick_params(axis="x", length=3)
    axes.xaxis.label.set(color=SOFT, fontsize=size.text)
    axes.margins(0.09, 0.08)
    return figure, axes


def _intervals(axes: "Axes", points: Sequence[Point], colour: str) -> None:
    for p in points:
        for x, y in (
            ([p.tokens_mean] * 2, [p.accuracy_ci.low, p.accuracy_ci.high]),
            ([p.tokens_mean_ci.low, p.tokens_mean_ci.high], [p.accuracy] * 2),
        ):
            axes.plot(x, y, color=colour, lw=1, alpha=0.38, zorder=2)


def _token_axis(axes: "Axes", tokens: Sequence[float], which: Literal["x", "y"]) -> None:
    """Logarithmic with plain round numbers: a saving of a half is the same distance everywhere."""
    from matplotlib.ticker import MaxNLocator

    if min(tokens) <= 0:
        raise DataError("a point has a mean length of 0 tokens: every completion failed; see the rows' reasons")
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    for steps in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10**power for power in range(7) for step in steps if low <= step * 10**power <= high]
        if len(ticks) <= 7:
            break
    if len(ticks) < 3:
        ticks = [tick for tick in MaxNLocator(4, integer=True).tick_values(low, high) if low <= tick <= high]
    axis.set_ticks(ticks, [f"{tick:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}") for tick in ticks])
    axis.minorticks_off()


def _spaced(alphas: Sequence[float], size: Size) -> list[str]:
    """Labels of an axis of alphas; those that would run into others are empty, of 0, 1 and the ends last."""
    # Points for each unit of alpha: axes take nine tenths of a figure, less the margins.
    unit = size.width * 72 * 0.9 / 1.18 / (alphas[-1] - alphas[0] or 1)
    half = {alpha: 0.28 * size.text * len(alpha_label(alpha)) + 1 for alpha in alphas}
    kept: list[float] = []
    for alpha in sorted(alphas, key=lambda alpha: (alpha not in (0, 1, alphas[0], alphas[-1]), alpha)):
        if all(abs(alpha - other) * unit > half[alpha] + half[other] for other in kept):
            kept.append(alpha)
    return [alpha_label(alpha) if alpha in kept else "" for alpha in alphas]


def _place(figure: "Figure", axes: "Axes", marks: Sequence[_Mark], names: Sequence[_Mark], size: Size) -> None:
    """Puts every label at the free spot nearest its point: greedy, by the overlap with what is already there."""
    figure.draw_without_rendering()
    # Labels are placed for this layout; one more run of the engine would move the points away from them.
    figure.set_layout_engine("none")
    pixel = figure.dpi / 72
    frame = np.array(axes.get_window_extent().extents)
    taken = _obstacles(axes, [*marks, *names], pixel)
    # Names first: they are long and few, and the small alpha labels fit round them.
    for mark in (*names, *_merged(axes, marks, pixel)):
        text = axes.annotate(
            mark.text if len(mark.text) <= 40 else f"{mark.text[:39]}\N{HORIZONTAL ELLIPSIS}",
            (mark.x, mark.y),
            (0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=size.text if mark in names else size.label,
            fontweight="bold" if mark.bold else "normal",
            color=mark.colour,
            parse_math=False,
            annotation_clip=False,
            zorder=5,
        )
        box = text.get_window_extent()
        spots: Floats = np.array(
            [
                (
                    right * (box.width / 2 + (away + 4) * pixel),
                    up * (box.height / 2 + (away + (2 if right else 4)) * pixel),
                    away * pixel,
                )
                for away in (3, 8, 14, 22, 32)
                for right, up in ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1))
            ]
        )
        boxes = np.array(box.extents) + spots[:, [0, 1, 0, 1]]
        outside = box.width * box.height - _overlaps(boxes, frame[None])[:, 0]
        cost = 4 * outside + (_overlaps(boxes, taken[:, :4]) * taken[:, 4]).sum(1) + 2 * spots[:, 2]
        best = int(cost.argmin())
        offset = float(spots[best, 0]) / pixel, float(spots[best, 1]) / pixel
        text.set_position(offset)
        if spots[best, 2] > 8 * pixel:
            # Too far from its point to be read as its label without a line to it.
            leader = {"arrowstyle": "-", "color": mark.colour, "lw": 0.7, "shrinkA": 0, "shrinkB": 4}
            axes.annotate(
                "", (mark.x, mark.y), offset, textcoords="offset points", arrowprops=leader, annotation_clip=False
            )
        taken = np.vstack([taken, [*boxes[best], 3.0]])


def _merged(axes: "Axes", marks: Sequence[_Mark], pixel: float) -> list[_Mark]:
    """Systems that share a point (all dials do at alpha 0) share its label."""
    kept: list[tuple[float, float, _Mark]] = []
    for mark in marks:
        x, y = (float(value) for value in axes.transData.transform((mark.x, mark.y)))
        for index, (x0, y0, other) in enumerate(kept):
            if other.text == mark.text and abs(x - x0) + abs(y - y0) < 3 * pixel:
                kept[index] = x0, y0, replace(other, colour=INK)
                break
        else:
            kept.append((x, y, mark))
    return [mark for _, _, mark in kept]


def _obstacles(axes: "Axes", marks: Sequence[_Mark], pixel: float) -> Floats:
    """Boxes in pixels with a weight [N, 5] that labels keep off: markers, and squares along the curves."""
    found: list[tuple[float, float, float, float, float]] = []

    def add(x: float, y: float, half: float, weight: float) -> None:
        found.append((x - half, y - half, x + half, y + half, weight))

    for mark in marks:
        x, y = axes.transData.transform((mark.x, mark.y))
        add(float(x), float(y), 4.5 * pixel, 3)
    for line in axes.lines:
        path = np.asarray(axes.transData.transform(line.get_xydata()))
        # Two-point lines are intervals; a label may cross them.
        for start, end in pairwise(path if len(path) > 2 else path[:0]):
            for part in np.linspace(0, 1, 2 + int(np.hypot(*(end - start)) / (4 * pixel))):
                x, y = start + part * (end - start)
                add(float(x), float(y), 1.5 * pixel, 1.5)
    return np.array(found, dtype=np.float64).reshape(-1, 5)


def _overlaps(boxes: Floats, others: Floats) -> Floats:
    """Areas [A, B] that A boxes share with B others."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:4], others[None, :, 2:4])
    return np.clip(high - low, 0, None).prod(-1)


def _bytes(figure: "Figure", kind: Literal["png", "svg"], salt: str, live_text: bool = False) -> bytes:
    import matplotlib

    into = io.BytesIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none" if live_text else "path"}):
        figure.savefig(into, format=kind, dpi=200, metadata=nothing)
    return into.getvalue()
