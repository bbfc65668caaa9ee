"""The report: its numbers are the points' numbers, it stands alone, and model text cannot act in it."""

import dataclasses
import functools
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.resources import files
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from cotvalve import figures
from cotvalve.errors import DataError
from cotvalve.report import (
    ChainLengths,
    Example,
    ReportData,
    html,
    markdown,
    markdown_paired,
    markdown_table,
    write_figures,
    write_report,
)
from cotvalve.statistics import paired
from cotvalve.types import Completion, Grade, Interval, Point, Problem

# Accuracy and mean tokens by alpha, as measured for plain CoT-Valve on 240 GSM8K questions on one GPU.
MEASURED = {0: (54.6, 296), 0.25: (57.9, 130), 0.5: (55.8, 105), 1: (48.3, 95), 1.5: (44.6, 86), 2: (36.2, 103)}
EVIL = "</pre><script>alert('1')</script><img src=x onerror=alert(2)> \"quoted\" & {{ 7 * 7 }} $x_1$"
VOID = {"meta", "br", "img", "hr", "link", "input"}


def made_point(system="CoT-Valve", alpha=0.0, accuracy=50.0, tokens=100.0, dataset="gsm8k", **more):
    values = {
        "problems": 240,
        "correct": round(2.4 * accuracy),
        "accuracy_ci": Interval(accuracy - 6, accuracy + 6),
        "tokens_mean_ci": Interval(tokens * 0.93, tokens * 1.07),
        "tokens_median": tokens * 0.85,
        "tokens_median_ci": Interval(tokens * 0.8, tokens * 0.9),
        "reasoning_tokens": tokens * 0.25,
        "answer_tokens": tokens * 0.75,
        "truncated": 3,
        "unreadable": 7,
        "acu": 100 * accuracy / (1.5 * tokens) if tokens else 0.0,
    }
    return Point(system, dataset, alpha, accuracy=accuracy, tokens_mean=tokens, **{**values, **more})


def curve_points(system="CoT-Valve", dataset="gsm8k", longer=1.0):
    return [made_point(system, a, acc, longer * t, dataset) for a, (acc, t) in MEASURED.items()]


def some_pair():
    def rows(right):
        return [
            {"problem": i, "alpha": 0, "sample": 0, "tokens": 9 + i, "reasoning_tokens": 0, "finish": "stop"}
            | {"correct": r, "predicted": "1", "reason": "", "subset": ""}
            for i, r in enumerate(right)
        ]

    return paired(rows([1, 1, 0, 1]), rows([0, 1, 1, 0]), dataset="gsm8k", a="CoT-Valve at 1", b="alpha 0", draws=99)


def some_example(text="2 + 2 = 4", question="How many?", system="CoT-Valve"):
    alphas, tokens = (0.0, 0.25, 0.5, 1.0, 2.0), (400, 200, 100, 50, 25)
    completions = tuple(Completion(f"c{a}", a, text, t, "stop") for a, t in zip(alphas, tokens, strict=True))
    return Example(Problem("gsm8k/test/1", question, "4"), completions, (Grade(True, "4"),) * 5, system)


def full_data(**more):
    points = [
        *curve_points(),
        *curve_points("CoT-Valve++", longer=1.3),
        made_point("Prompt (Ding)", None, 50.5, 221.0),
        *curve_points(dataset="math500", longer=2),
    ]
    values = {
        "facts": {"model": "some/model", "seeds": "train 0"},
        "paired": (some_pair(),),
        "lengths": (ChainLengths("GSM8K MixChain-C", "1", 22419, 294.8),),
        "examples": (some_example(),),
        "notes": ("Greedy.",),
    }
    return ReportData("A report", tuple(points), **{**values, **more})


@functools.cache
def full_page():
    return html(full_data())


class Page(HTMLParser):
    """Reads a page strictly: every element is closed in order; collects what the tests ask about."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.texts, self.numbers = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "data":
            self.numbers.append(float(dict(attrs)["value"]))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def of(self, tag):
        return [text for where, text in self.texts if where == tag and text]


def test_every_number_in_the_tables_is_the_points_own():
    data = full_data()
    expected = []
    for dataset in ("gsm8k", "math500"):
        own = [p for p in data.points if p.dataset == dataset]
        expected += [v for p in own for v in (p.accuracy, p.tokens_mean, p.tokens_median, p.acu)]
        for pair in data.paired if dataset == "gsm8k" else ():
            expected += [pair.accuracy_difference, pair.token_ratio]
    assert Page(html(data)).numbers == [*expected, 294.8]


def test_intervals_and_counts_are_shown():
    texts = Page(full_page()).of("small")
    assert "48.6\N{EN DASH}60.6" in texts  # accuracy at alpha 0
    assert "275.3\N{EN DASH}316.7" in texts  # mean tokens at alpha 0
    assert "237\N{EN DASH}266" in texts  # median at alpha 0
    assert "1.2 %" in texts  # truncated, 3 of 240
    assert "2.9 %" in texts  # unreadable, 7 of 240


def test_every_alpha_is_on_the_curve_of_the_page():
    drawn = Page(full_page()).of("text")
    for alpha in MEASURED:
        # Two data sets, two sizes, and two dials on one of them; all dials share the label of a shared point.
        assert drawn.count(f"{alpha:g}") >= 6, alpha
    for system in ("CoT-Valve", "CoT-Valve++", "Prompt (Ding)"):
        assert system in drawn


def test_the_page_stands_alone():
    text = full_page()
    page = Page(text)
    assert text.startswith("<!doctype html>")
    assert not re.search(r"https?:|url\(\s*['\"]?(?!#)|@import", text)
    assert {"script", "link", "img", "iframe", "object", "base"}.isdisjoint(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        if name in ("src", "href", "xlink:href"):
            assert value.startswith("#"), (tag, value)


def test_ids_on_the_page_are_unique_and_all_references_resolve():
    page = Page(full_page())
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = [value for _, name, value in page.attributes if name == "href"]
    used += [f"#{found}" for _, _, value in page.attributes for found in re.findall(r"url\(#([^)]*)\)", value or "")]
    assert used
    assert {reference[1:] for reference in used} <= set(ids)


def test_text_from_outside_cannot_act():
    points = tuple(dataclasses.replace(p, system=EVIL, dataset=EVIL) for p in curve_points())
    pair = dataclasses.replace(some_pair(), dataset=EVIL, a=EVIL, b=EVIL)
    evil = Problem(EVIL, EVIL, EVIL)
    completion = Completion("c", 0.0, EVIL, 9, "stop")
    examples = (Example(evil, (completion,), (Grade(False, EVIL),), EVIL),)
    lengths = (ChainLengths(EVIL, EVIL, 1, 1.0),)
    data = ReportData(EVIL, points, {EVIL: EVIL}, (pair,), lengths, examples, (EVIL,), EVIL)
    page = Page(html(data))
    assert {"script", "img"}.isdisjoint(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    for where in ("pre", "title", "h1", "h2", "dt", "dd", "p"):
        assert any("<script>alert('1')</script>" in text and "$x_1$" in text for text in page.of(where)), where
    assert page.of("pre") == [EVIL]
    assert f"{EVIL[:39]}\N{HORIZONTAL ELLIPSIS}" in page.of("text")


def test_a_systems_name_is_drawn_as_it_is_written():
    name = "$a_1$ <white> #0067a8 & co"
    drawn = Page(html(ReportData("t", tuple(curve_points(name))))).of("text")
    assert drawn.count(name) == 4


def test_the_sentence_about_choosing_is_there_only_when_it_is_a_fact():
    without = ReportData("t", (made_point(),))
    given = dataclasses.replace(without, chosen_on="200 held-out training questions")
    sentence = "Nothing was chosen on the test questions: alpha, epoch and calibration come from 200 held-out"
    for write in (html, markdown):
        assert "was chosen" not in write(without)
        assert sentence in write(given)


def test_chains_side_by_side_with_their_lengths():
    problem = Problem("q", "How many?", "4")
    cases = [
        (Completion("a", 0.0, "long", 400, "stop", reasoning_tokens=300), Grade(True, "4")),
        (Completion("b", 0.5, "mid", 200, "stop"), Grade(False, "5")),
        (Completion("c", 1.0, "cut", 100, "length"), Grade(True, "4")),
        (Completion("d", 1.5, "lost", 50, "stop"), Grade(False, None)),
        (Completion("e", 2.0, "", 0, "error", reason="too long"), Grade(False, None)),
    ]
    example = Example(problem, *zip(*cases, strict=True))
    page = Page(html(ReportData("t", (made_point(),), examples=(example,))))
    assert page.of("h4") == ["alpha 0", "alpha 0.5", "alpha 1", "alpha 1.5", "alpha 2"]
    grades = [text for text in page.of("span") if text[0] in "\u2713\u2717"]
    assert [grade[2:] for grade in grades] == ["right", "wrong", "truncated", "no answer found", "could not be run"]
    widths = [value for tag, name, value in page.attributes if (tag, name) == ("i", "style") and "width" in value]
    assert widths[:4] == ["width: 75.00%", "width: 25.00%", "width: 0.00%", "width: 50.00%"]


def test_how_evenly_each_dial_works_is_on_the_page():
    page = Page(full_page())
    # The ends are alpha 0 and 1, both run; 296 to 95 tokens is 68 % less.
    assert "296 → 95 tokens (\N{MINUS SIGN}68 %)" in page.of("span")
    heights = [value for tag, name, value in page.attributes if (tag, name) == ("i", "style") and "height" in value]
    assert len(heights) == 3 * 10
    assert heights[0] == "height: 100.0%"


def test_every_colour_drawn_is_defined_in_every_scheme():
    css = (files("cotvalve") / "assets" / "report.html.j2").read_text(encoding="utf-8")
    used = set(re.findall(r"var\(--([a-z0-9]+)\)", full_page())) | {f"s{i}" for i in range(len(figures.COLOURS))}
    schemes = re.findall(r":root \{(.*?)\}", css, flags=re.DOTALL)
    assert len(schemes) == 3  # light, dark, paper
    for scheme in schemes:
        assert used - {"colour"} <= set(re.findall(r"--([a-z0-9]+):", scheme))
    light = dict(re.findall(r"--(s\d): (#[0-9a-f]{6})", schemes[0]))
    assert tuple(light.values()) == tuple(colour.lower() for colour in figures.COLOURS)


def test_drawn_colours_become_variables():
    svgs = re.findall(r"<svg viewBox.*?</svg>", full_page(), flags=re.DOTALL)
    assert len(svgs) == 2 * 2 * 2
    assert not [found for svg in svgs for found in re.findall(r"(?:fill|stroke): #[0-9a-fA-F]{6}", svg)]


def test_a_system_keeps_its_colour_on_every_data_set():
    points = [*curve_points("B", "one"), *curve_points("A", "two"), *curve_points("B", "two")]
    colours = figures.palette([*points, made_point("plain", None)])
    assert colours == {"B": figures.COLOURS[0], "A": figures.COLOURS[1], "plain": figures.SOFT}


def test_write_report_writes_the_page_the_tables_and_the_figures(tmp_path):
    page = write_report(full_data(), tmp_path / "out")
    names = sorted(path.name for path in page.parent.iterdir())
    kinds = [
        f"{kind}-{data}.{end}" for kind in ("curve", "dial") for data in ("gsm8k", "math500") for end in ("png", "svg")
    ]
    assert names == sorted([*kinds, "report.html", "report.md"])
    assert page.name == "report.html"
    assert (page.parent / "report.md").read_text(encoding="utf-8") == markdown(full_data())
    for path in page.parent.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_small_subset_has_its_table_and_no_figure(tmp_path):
    whole = [made_point(alpha=a) for a in (0.0, 1.0)]
    small = [made_point(alpha=a, dataset="gsm8k (farm)", problems=24) for a in (0.0, 1.0)]
    large = [made_point(alpha=a, dataset="gsm8k (shop)", problems=100) for a in (0.0, 1.0)]
    page = write_report(ReportData(title="t", points=(*whole, *small, *large)), tmp_path).read_text()
    assert "gsm8k (farm)" in page
    names = {path.name for path in tmp_path.glob("*.svg")}
    assert names == {"curve-gsm8k.svg", "dial-gsm8k.svg", "curve-gsm8k-shop.svg", "dial-gsm8k-shop.svg"}


def test_names_in_any_script_have_a_figure_of_their_own(tmp_path):
    """Only a to z were kept: two Cyrillic files were both "jsonl", and the second drew over the first."""
    names = ("задачи.jsonl", "вопросы.jsonl")
    write_figures([made_point(alpha=None, dataset=name) for name in names], tmp_path)
    assert {path.name for path in tmp_path.glob("*.svg")} == {"curve-задачи-jsonl.svg", "curve-вопросы-jsonl.svg"}


def test_small_files_have_a_figure_each_whatever_they_are_called(tmp_path):
    """A download's "mine (1).jsonl" was taken for a subset and had no figure, and names that differ by a sign drew over each other."""
    names = ("mine.jsonl", "mine+.jsonl", "mine (1).jsonl")
    points = tuple(made_point(alpha=None, dataset=name, problems=30) for name in names)
    page = write_report(ReportData(title="t", points=points), tmp_path).read_text()
    slugs = ("mine-jsonl", "mine-jsonl-2", "mine-1-jsonl")
    assert {path.name for path in tmp_path.glob("*.svg")} == {f"curve-{slug}.svg" for slug in slugs}
    assert all(f'<section id="{slug}">' in page for slug in slugs)
    assert page.count("<h3>Accuracy against tokens</h3>") == 3


def test_svg_files_are_the_same_bytes_every_time_and_carry_no_date(tmp_path):
    points = curve_points()
    first = [path.read_bytes() for path in write_figures(points, tmp_path / "one")]
    assert first == [path.read_bytes() for path in write_figures(points, tmp_path / "two")]
    for svg in (tmp_path / "one").glob("*.svg"):
        root = ElementTree.fromstring(svg.read_bytes())
        assert root.tag.endswith("svg")
        assert not [element for element in root.iter() if element.tag.endswith(("date", "metadata"))]


def test_labels_lie_on_no_marker_and_on_no_other_label():
    figure = figures.curve(curve_points())
    figure.draw_without_rendering()
    axes = figure.axes[0]
    boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    assert len(boxes) == len(MEASURED) + 1
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[index + 1 :])
        for accuracy, tokens in MEASURED.values():
            assert not box.contains(*axes.transData.transform((tokens, accuracy)))


def test_labels_of_near_alphas_do_not_run_into_one_another():
    """The grid of `calibrate` was one black line of digits up to 0.25."""
    near = [made_point(alpha=a, tokens=300 - 100 * a) for a in (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5, 0.75, 1.0, 1.25, 1.5)]
    for size in (figures.WIDE, figures.NARROW):
        figure = figures.dial(near, size)
        labels = figure.axes[0].get_xticklabels()
        assert len(labels) == len(near), "all positions keep their ticks"
        boxes = [label.get_window_extent() for label in labels if label.get_text()]
        assert all(a.x1 < b.x0 for a, b in pairwise(boxes))
        assert {"0", "1", "1.5"} <= {label.get_text() for label in labels}
    tenths = [made_point(alpha=a / 10, tokens=300 - a) for a in (*range(11), 15, 20)]
    assert all(label.get_text() for label in figures.dial(tenths).axes[0].get_xticklabels())


def test_dials_that_share_a_point_share_its_label():
    points = [*curve_points(), *curve_points("CoT-Valve++", longer=1.0)]
    labels = [text.get_text() for text in figures.curve(points).axes[0].texts]
    assert labels.count("0") == 1


@pytest.mark.parametrize(
    "points",
    [
        [made_point("Prompt", None)],
        [made_point(alpha=1.0)],
        [made_point(alpha=a, tokens=t) for a, t in ((-0.5, 90), (0, 120), (1, 800))],
        [made_point(alpha=a, tokens=100) for a in (0, 1)],
        [made_point(alpha=a, tokens=t, accuracy=0, accuracy_ci=Interval(0, 2)) for a, t in ((0, 12345), (3, 98765))],
    ],
    ids=["no dial", "one alpha", "longer and negative", "dead dial", "nothing right"],
)
def test_ends_of_ranges(points, tmp_path):
    page = Page(html(ReportData("ends", tuple(points))))
    for point in points:
        assert point.accuracy in page.numbers
    assert write_figures(points, tmp_path)


def test_what_cannot_be_shown_is_refused():
    with pytest.raises(DataError, match="no points"):
        html(ReportData("empty", ()))
    example = dataclasses.replace(some_example(), grades=(Grade(True, "4"),))
    with pytest.raises(DataError, match="'gsm8k/test/1' has 5 completions and 1 grades"):
        html(full_data(examples=(example,)))
    with pytest.raises(DataError, match="one data set"):
        figures.curve([*curve_points(), *curve_points(dataset="math500")])
    with pytest.raises(DataError, match="mean length of 0 tokens"):
        figures.curve([made_point(tokens=0.0)])


def test_a_point_in_which_everything_failed_is_in_the_table_and_not_in_the_figures(tmp_path):
    failed = made_point("CoT-Valve", 3.0, 0.0, 0.0)
    page = Page(html(ReportData("t", (*curve_points(), failed))))
    assert "3" in page.of("td")
    assert any("1 of the points below cannot be drawn" in text for text in page.of("figcaption"))
    assert Page(html(ReportData("t", (failed,)))).of("figcaption") == []
    assert write_figures([failed], tmp_path) == []


def test_the_markdown_table_holds_the_points():
    points = [made_point("a|b", 0.25, 57.9, 1234.56), made_point("Prompt", None, 50.5, 221, samples=4)]
    lines = markdown_table(points).splitlines()
    assert lines[0].startswith("| system | alpha | accuracy % | mean tokens |")
    assert lines[2].startswith("| a\\|b | 0.25 | 57.9 [51.9\N{EN DASH}63.9] | 1\u202f234.6 [")
    assert lines[3].startswith("| Prompt | \N{EN DASH} | 50.5 [")
    assert lines[3].endswith("| 240 x 4 |")
    cells = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
    assert len(cells) == 1
    assert "| data set |" in markdown_table([*points, made_point(dataset="math500")]).splitlines()[0]


def test_the_markdown_of_paired_tests():
    line = markdown_paired([some_pair()]).splitlines()[2]
    assert line.startswith("| CoT-Valve at 1 against alpha 0 | +25.0 [")
    assert "| 2 : 1 | 1.000 | 0 % [0 % to 0 %] |" in line


def test_importing_the_report_is_light_and_drawing_leaves_pyplot_alone():
    code = """
import sys
import cotvalve.report as report
from cotvalve.types import Interval, Point
heavy = {"matplotlib", "jinja2", "torch", "transformers"} & set(sys.modules)
assert not heavy, heavy
i = Interval(1, 2)
report.html(report.ReportData("t", (Point("s", "d", 0.0, 1, 1, 100, i, 5, i, 5, i, 0, 5, 0, 0, 9),)))
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
