"""The reproduction's tables against hand-made rows, and its recipes before a GPU sees them.

The recipes run whole, shrunk to the embedded model, when COTVALVE_DRY_RUN is set: ten minutes on two cores.
"""

import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from benchmarks import means, several, side_by_side
from cotvalve import Direction, pipeline, plan, problems
from cotvalve.baselines import PLAIN
from cotvalve.errors import DataError, SettingError
from cotvalve.figures import DASH, MINUS
from cotvalve.mixchain import MixSettings
from cotvalve.records import Json, read_parquet, write_json, write_parquet
from cotvalve.rounds import RewardSettings
from cotvalve.sweep import SweepSettings, named_directions
from cotvalve.train import TrainSettings
from cotvalve.verbs import ExtractSettings

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes" / "reproduction").glob("*.yaml"))
PROMPT = "prompt: budget 20"
WHOLE = ("briefer", "longer", "brief-math", "briefer-math", "means", "math-means", "many", "reward-search", "reward", "reward-math", "reward-more", "reward-loops", "reward-whole", "reward-steps", "reward-keener", "reward-math-steps")
"""Recipes that choose on all held-out questions, and not on 300."""


def loaded() -> ModuleType:
    """benchmarks/reproduction.py, which is no package."""
    spec = importlib.util.spec_from_file_location("reproduction", ROOT / "benchmarks" / "reproduction.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["reproduction"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


reproduction = loaded()


def rows(alpha: float | None, right: str, tokens: list[int], text: str = "") -> list[Json]:
    """One row for each sign of `right`: + right, - wrong, # cut."""
    return [
        {"problem": f"q{i}", "alpha": alpha, "sample": 0, "text": text, "tokens": count, "reasoning_tokens": 0,
         "prompt_tokens": 9, "finish": "length" if sign == "#" else "stop", "correct": sign == "+", "predicted": "7",
         "reason": "", "subset": ""}
        for i, (sign, count) in enumerate(zip(right, tokens, strict=True))
    ]  # fmt: skip


def sweep(folder: Path, systems: dict[str, list[Json]], split: str = "test", data: str = "gsm8k", model: str = "m") -> None:
    """A finished sweep's folder."""
    folder.mkdir(parents=True)
    write_json(folder / "run.json", {"verb": "sweep", "settings": {"split": split, "data": data, "model": model}, "facts": {"billions": "2.0"}})  # fmt: skip
    write_parquet(folder / "rows.parquet", ({"dataset": data, "system": name, **row} for name, found in systems.items() for row in found))


def seeds(home: Path) -> list[Path]:
    """Two seeds of a table: ten held-out questions and four of the test set."""
    for name, half in (("0", ("+++-", [50] * 4)), ("1", ("+-+-", [100] * 4))):
        held = rows(0.0, "+++++-----", [200] * 10)
        sweep(home / name / "main-heldout", {
            PLAIN: held,
            PROMPT: rows(None, "++++------", [180] * 10),
            "prompt: shortcut": rows(None, "++++------", [190] * 10),
            "A": [*held, *rows(0.25, "++++++----", [150] * 10), *rows(0.5, "+++++-----", [100] * 10), *rows(1.0, "++--------", [40] * 10)],
        }, split="heldout")  # fmt: skip
        plain = rows(0.0, "++--", [100, 200, 300, 400])
        loop = "Wait, let me check again. " * 20
        sweep(home / name / "main-gsm8k", {
            PLAIN: plain,
            PROMPT: rows(None, "+---", [240] * 4),
            "prompt: shortcut": rows(None, "+---", [230] * 4),
            "A": [*plain, *rows(0.25, "++++", [125] * 4), *rows(0.5, *half), *rows(1.0, "---#", [25] * 4, loop)],
        })  # fmt: skip
    return [home / "0", home / "1"]


def cells(document: str, *starts: str) -> list[str]:
    """The one row of a Markdown table whose first cells are `starts`."""
    plain = document.replace(DASH, "-").replace(MINUS, "-")
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in plain.splitlines() if line.startswith("|")]
    (only,) = [row for row in found if tuple(row[: len(starts)]) == starts]
    return only


# --- tables on paper -------------------------------------------------------------------------------------------------


def test_positions_are_chosen_on_held_out_questions(tmp_path: Path) -> None:
    """On the test questions .25 would be the best with all four right; held-out questions say .5 costs nothing."""
    found = reproduction.read(seeds(tmp_path))
    held = found["main", "gsm8k", True]
    assert reproduction.choose(held, "A", 1.0) == {"no loss (within 1)": 0.5, "most accurate": 0.25, "shortest": 1.0}
    # 20 % at alpha 1 are 30 points below the plain model's 50.
    assert reproduction.choose(held, "A", 30.0)["no loss (within 30)"] == 1.0
    assert reproduction.choose(held, "A", 29.9)["no loss (within 29.9)"] == 0.5


def test_the_main_table_on_paper(tmp_path: Path) -> None:
    document = reproduction.document(seeds(tmp_path), [], PLAIN, 1.0, 199)
    assert "## main: gsm8k, 4 questions, 2 seeds" in document
    assert "Positions were chosen on 10 held-out training questions of gsm8k" in document
    # 2 of 4 right; 1,000 tokens over 4; ACU 100 * 50 / (2 * 250)
    plain = cells(document, PLAIN)
    assert plain[3].startswith("50.0 [")
    assert plain[4].startswith("250.0 [")
    assert plain[5:7] == ["10.00", "-"]
    # 3 + 2 of 8 right; (50 + 100) / 2 tokens; 62.5 - 50 points; 250 / 75; ACU 100 * 62.5 / (2 * 75)
    half = cells(document, "A", "no loss (within 1)")
    assert half[2] == "0.5"
    assert half[3].startswith("62.5 [")
    assert half[4].startswith("75.0 [")
    assert half[5] == "41.67"
    assert half[6].startswith("+12.5 [")
    assert half[7].startswith("3.33 [")
    assert half[8] == "75.0, 50.0"
    assert cells(document, "A", "as trained, shortest")[2:5] == ["1", "0.0 [0.0-49.0]", "25.0 [25.0-25.0]"]  # none of four questions: Wilson's, also with two seeds
    # Table 8: of the prompts the one that was shortest on the held-out questions, though the other is here.
    eight = document.partition("Table 8")[2].partition("The dial")[0]
    assert cells(eight, PROMPT, "shortest prompt")[4] == "240.0 [240.0-240.0]"
    assert cells(eight, "A", "shortest")[7].startswith("10.00 [")


def test_against_another_system_it_is_that_one_as_trained(tmp_path: Path) -> None:
    document = reproduction.document(seeds(tmp_path), ["main"], "A", 1.0, 199)
    # A at alpha 1 has none right and 25 tokens.
    assert cells(document, PLAIN)[6].startswith("+50.0 [")
    assert cells(document, PLAIN)[7].startswith("0.10 [")
    assert cells(document, "A", "as trained, shortest")[6] == "-"


def test_positions_that_nothing_chose_are_shown_and_marked_on_request(tmp_path: Path) -> None:
    """0.25 is the most accurate one on held-out questions, as trained is 1; the dial has no 0.7."""
    document = reproduction.document(seeds(tmp_path), ["main"], PLAIN, 2.0, 199, at=[0.0, 0.25, 0.7]).partition("Table 8")[0]
    assert cells(document, "A", "not chosen")[2] == "0"
    assert cells(document, "A", "most accurate")[2] == "0.25"
    assert "not run on these" not in document


def test_a_chosen_position_that_was_not_run_is_told(tmp_path: Path) -> None:
    """The main table was without it and without a word, under the sentence that positions were chosen."""
    sweep(tmp_path / "0" / "main-heldout", {PLAIN: (held := rows(0.0, "++--", [200] * 4)), "A": [*held, *rows(0.5, "++--", [100] * 4), *rows(1.0, "---+", [50] * 4)]}, split="heldout")
    sweep(tmp_path / "0" / "main-gsm8k", {PLAIN: (plain := rows(0.0, "++--", [200] * 4)), "A": [*plain, *rows(1.0, "---+", [50] * 4)]})
    document = reproduction.document([tmp_path / "0"], [], PLAIN, 1.0, 99)
    assert "Chosen on the held-out questions, but not run on these: A: no loss (within 1) at 0.5; A: most accurate at 0.5." in document
    assert cells(document, "A", "as trained, shortest")


def test_a_system_of_another_table_is_a_further_seed_where_it_is_said_to_be(tmp_path: Path) -> None:
    """In the folder of seed 0, `main` was measured as `other` too: A is B, C is nothing of it, and its plain model counts once more."""
    folders = seeds(tmp_path)
    plain = rows(0.0, "+++-", [100, 200, 300, 400])
    sweep(folders[0] / "other-gsm8k", {PLAIN: plain, "B": [*plain, *rows(0.5, "----", [60] * 4)], "C": [*plain, *rows(0.5, "++++", [60] * 4)]})
    also = dict([reproduction.pair_of_places("main:A = other:B")])
    document = reproduction.document(folders, ["main"], PLAIN, 1.0, 199, also=also)
    assert cells(document, "plain model")[-1] == "50.0, 75.0, 50.0"
    assert cells(document, "A", "no loss (within 1)")[-1] == "75.0, 0.0, 50.0"
    assert ("3 seeds" in document, "| C" in document) == (True, False)
    with pytest.raises(SettingError, match=r"unknown dial 'other:D': .* other:B, other:C"):
        reproduction.document(folders, [], PLAIN, 1.0, 9, also=dict([reproduction.pair_of_places("main:A=other:D")]))
    for told in ("main:A", "main=other:B", "main:A=other"):
        with pytest.raises(SettingError, match="give TABLE:SYSTEM=TABLE:SYSTEM"):
            reproduction.pair_of_places(told)


def test_the_dial_on_paper(tmp_path: Path) -> None:
    document = reproduction.document(seeds(tmp_path), [], PLAIN, 1.0, 199).partition("The dial:")[2]
    assert cells(document, "A", "0")[3].startswith("250.0 [")
    assert cells(document, "A", "0.25")[2:4] == ["100.0 [51.0-100.0]", "125.0 [125.0-125.0]"]
    # One of four is cut, and all four go round in circles.
    assert cells(document, "A", "1")[4:] == ["25.0", "100.0"]
    # Logarithms of 250, 125, 75, 25 fall by ln 2, ln 5/3, ln 3 of ln 10 in a quarter, a quarter and a half of the dial:
    # .301, .222, .477, so a tenth has 12, 12, (6 + 4.4), 8.9, 8.9, then 9.5 each.
    travel = cells(document, "A", "0 to 1, 4 positions")
    assert travel[2:] == ["-1.00", "yes (2 of 2 seeds)", "12, 12, 10, 9, 9, 10, 10, 10, 10, 10", "12"]


def test_one_seed_has_the_intervals_of_statistics(tmp_path: Path) -> None:
    document = reproduction.document(seeds(tmp_path)[:1], [], PLAIN, 1.0, 199)
    # Wilson for 4 of 4, and 0 of 4.
    assert cells(document, "A", "most accurate")[3] == "100.0 [51.0-100.0]"
    assert cells(document, "A", "as trained, shortest")[3] == "0.0 [0.0-49.0]"
    assert "4 questions, 1 seed\n" in document


def test_seeds_are_drawn_like_questions() -> None:
    """All right in one seed and all wrong in the other: 0, 50 or 100 % in a quarter, a half and a quarter of the draws."""
    a = {"0": rows(1.0, "++++", [10] * 4), "1": rows(1.0, "----", [30] * 4)}
    b = {"0": rows(None, "++++", [20] * 4), "1": rows(None, "----", [60] * 4)}
    accuracy, tokens = reproduction.drawn([a, b], 4000)
    values, counts = np.unique(accuracy[0], return_counts=True)
    assert values.tolist() == [0, 50, 100]
    # Four standard errors of a share of a half in 4,000 draws are .032.
    assert np.allclose(counts / 4000, [0.25, 0.5, 0.25], atol=0.032)
    assert set(tokens[0].tolist()) == {10, 20, 30}
    # What a seed does to both sides cancels.
    assert np.array_equal(accuracy[0], accuracy[1])
    assert np.allclose(tokens[0] / tokens[1], 0.5)


def test_seeds_that_agree_leave_the_bootstrap_over_questions() -> None:
    one = rows(1.0, "++-+", [10, 20, 30, 40])
    several = reproduction.drawn([{"0": one, "1": one}], 500)
    alone = reproduction.drawn([{"0": one}], 500)
    assert all(np.allclose(x, y) for x, y in zip(several, alone, strict=True))


def test_accuracy_at_equal_length_on_paper() -> None:
    """The curve has 50 % at 400 tokens and 100 % at 100, so 75 % at 200, half way in the logarithm; at alpha 2 it turns back."""
    b = {0.0: {"0": rows(0.0, "++--", [400] * 4)}, 1.0: {"0": rows(1.0, "++++", [100] * 4)}, 2.0: {"0": rows(2.0, "----", [200] * 4)}}
    # 50 % at 200 tokens are 25 points below it; 50 tokens it does not have. Alpha 0 does not count.
    a = {0.0: b[0.0], 0.5: {"0": rows(0.5, "++--", [200] * 4)}, 1.0: {"0": rows(1.0, "++++", [50] * 4)}}
    gap = reproduction.equal_length(a, b, 99)
    assert gap.points == pytest.approx(-25)
    assert (gap.compared, gap.positions) == (1, 2)
    # Questions 3 and 4 alone decide: from none of them drawn (0) to no other (-50).
    assert (gap.within.low, gap.within.high) == pytest.approx((-50, 0), abs=12.6)
    # Where b goes on past alpha 1, its positions there are part of the curve: 40 % at 50 tokens.
    further = {**b, 2.0: {"0": rows(2.0, "+---", [25] * 4)}}
    assert reproduction.equal_length(a, further, 99).compared == 2
    assert reproduction.equal_length(a, further, 99).points == pytest.approx((-25 + 100 - 62.5) / 2)
    short = {0.5: {"0": rows(0.5, "++++", [20] * 4)}}
    assert str(reproduction.equal_length(short, b, 9)) == DASH


def test_equal_length_is_told_of_the_seeds_that_both_dials_have() -> None:
    """Its interval was over these alone, and its estimate over all seeds of the longer dial."""
    b = {alpha: {"0": rows(alpha, right, [tokens] * 4), "1": rows(alpha, "----", [tokens] * 4)} for alpha, right, tokens in ((0.0, "++++", 400), (0.5, "++--", 200), (1.0, "+---", 100))}
    gap = reproduction.equal_length({0.0: {"0": rows(0.0, "++++", [400] * 4)}, 1.0: {"0": rows(1.0, "+++-", [200] * 4)}}, b, 99)
    assert gap.points == pytest.approx(25)
    assert gap.within.low <= 25 <= gap.within.high
    with pytest.raises(DataError, match="no common seed"):
        reproduction.equal_length({1.0: {"9": rows(1.0, "+++-", [200] * 4)}}, b, 99)


def test_a_gap_that_no_draw_changes_stays_open() -> None:
    """All four questions right on both dials, or on one alone: 60 points of room (0 of 4, one-sided 2.5 %), where resamples show none."""
    b = {alpha: {"0": rows(alpha, "++++", [tokens] * 4)} for alpha, tokens in ((0.0, 400), (1.0, 100))}
    for right, low, high in (("++++", -60.24, 60.24), ("----", -100, -39.76)):
        gap = reproduction.equal_length({1.0: {"0": rows(1.0, right, [200] * 4)}}, b, 99)
        assert (gap.within.low, gap.within.high) == pytest.approx((low, high), abs=0.01)
        assert gap.within.low <= gap.points <= gap.within.high


def test_lengths_that_nearly_meet_are_compared_and_positions_below_0_are_no_part_of_the_curve() -> None:
    b = {-1.0: {"0": rows(-1.0, "----", [800] * 4)}, 0.0: {"0": rows(0.0, "++--", [400] * 4)}, 1.0: {"0": rows(1.0, "++++", [100] * 4)}}
    for tokens, compared in ((99, 1), (97, 0), (407, 1), (409, 0), (600, 0)):
        assert reproduction.equal_length({1.0: {"0": rows(1.0, "++--", [tokens] * 4)}}, b, 9).compared == compared


def test_intervals_of_a_comparison_are_of_seeds_too() -> None:
    """Both questions right in one seed and wrong in the other: between 0 and +100 points, though no question differs from another."""
    here = reproduction.Measured(billions=1.0)
    here.systems = {
        PLAIN: {None: {"0": rows(None, "--", [100, 100]), "1": rows(None, "--", [100, 100])}},
        "A": {1.0: {"0": rows(1.0, "++", [50, 50]), "1": rows(1.0, "--", [20, 20])}},
    }
    pair = reproduction.line("", "A", 1.0, here, "d", 999, PLAIN).pair
    assert (pair.accuracy_difference, pair.accuracy_difference_ci.low, pair.accuracy_difference_ci.high) == (50, 0, 100)
    assert (pair.token_ratio_ci.low, pair.token_ratio_ci.high) == pytest.approx((0.2, 0.5))
    here.systems["B"] = {1.0: {seed: rows(1.0, "--", [90, 100]) for seed in "01"}}
    same = reproduction.line("", "B", 1.0, here, "d", 99, PLAIN).pair
    assert (same.accuracy_difference_ci.low, same.accuracy_difference_ci.high) == pytest.approx((-84.19, 84.19), abs=0.01), "none of two questions, as with one seed"
    # Where the plain model was not run with every seed there is nothing to pair.
    del here.systems[PLAIN][None]["1"]
    assert reproduction.line("", "A", 1.0, here, "d", 99, PLAIN).pair is None


def test_draws_are_of_the_seeds_that_all_sides_have_and_errors_have_no_length() -> None:
    failed = [*rows(1.0, "++", [30, 30]), {**rows(1.0, "---", [0, 0, 0])[2], "finish": "error"}]
    both = {"0": rows(None, "+++", [60] * 3), "1": rows(None, "---", [90] * 3)}
    accuracy, tokens = reproduction.drawn([both, {"0": failed}], 199)
    assert set(accuracy[0].tolist()) == {100}
    assert np.nanmax(tokens[1]) == np.nanmin(tokens[1]) == 30


def test_a_dial_that_stands_still_does_not_fall_and_what_is_cut_is_degenerate(tmp_path: Path) -> None:
    plain = rows(0.0, "++--", [100] * 4)
    systems = {
        PLAIN: plain,
        "A": [*rows(-1.0, "++--", [50] * 4), *plain, *rows(0.5, "++-#", [80] * 4), *rows(1.0, "++--", [80] * 4)],
        "B": [*plain, *rows(0.5, "++--", [90] * 4), *rows(1.0, "++--", [80] * 4)],
    }
    sweep(tmp_path / "0" / "main-gsm8k", systems)
    for folder in ("1", "2"):  # without the middle
        sweep(tmp_path / folder / "main-gsm8k", {name: [row for row in own if row["alpha"] != 0.5] for name, own in systems.items()})
    told = reproduction.document([tmp_path / "0"], [], PLAIN, 1.0, 99).partition("The dial:")[2]
    assert cells(told, "A", "0.5")[4:] == ["25.0", "25.0"]
    assert cells(told, "A", "0 to 1, 3 positions")[3] == "no (0 of 1 seeds)"
    assert cells(told, "B", "0 to 1, 3 positions")[3] == "yes (1 of 1 seeds)"
    several = reproduction.document([tmp_path / name for name in "012"], [], "B", 1.0, 99).partition("The dial:")[2]
    assert cells(several, "B", "0 to 1, 3 positions")[3] == "yes (1 of 1 seeds)", "of the seeds that were run at all of them"
    assert "points above B at equal length" in several


def test_figures_show_every_system_with_all_seeds_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders, seen = seeds(tmp_path), list[Any]()
    monkeypatch.setattr(reproduction.figures, "curve", lambda points, keep=reproduction.figures.curve: seen.extend(points) or keep(points))
    made = reproduction.draw(folders, [], 99, tmp_path / "figures")
    assert [path.name for path in made] == ["main-gsm8k-curve.png", "main-gsm8k-dial.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in made)
    assert {point.system for point in seen} == set(reproduction.read(folders)["main", "gsm8k", False].systems)
    # Both seeds' rows are behind each point.
    assert all((point.problems, point.samples) == (4, 2) for point in seen)
    (middle,) = [point.tokens_mean for point in seen if (point.system, point.alpha) == ("A", 0.5)]
    assert middle == 75  # 50 in one seed, 100 in the other
    assert reproduction.draw(folders, ["table7"], 99, tmp_path / "none") == []


def test_dials_of_several_tables_are_drawn_together_beside_one_plain_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders, seen = seeds(tmp_path), list[Any]()
    plain = rows(0.0, "+---", [400] * 4)
    sweep(tmp_path / "0" / "other-gsm8k", {PLAIN: plain, "B": [*plain, *rows(1.0, "++++", [10] * 4)]})
    sweep(tmp_path / "0" / "other-math500", {PLAIN: plain}, data="math500")
    monkeypatch.setattr(reproduction.figures, "curve", lambda points, keep=reproduction.figures.curve: seen.extend(points) or keep(points))
    made = reproduction.together(folders, ["mine=main:A", "yours=other:B"], 99, tmp_path)
    assert [path.name for path in made] == ["together-gsm8k-curve.png"]
    assert [(point.system, point.alpha) for point in seen] == [(PLAIN, None), ("mine", 0.25), ("mine", 0.5), ("mine", 1), ("yours", 1)]
    assert [point.tokens_mean for point in seen] == [250, 125, 75, 25, 10]
    for wrong in ("A", "mine=main:B", "mine=mian:A"):
        with pytest.raises(SettingError, match="a curve is LABEL=TABLE:SYSTEM"):
            reproduction.together(folders, [wrong], 99, tmp_path)


def test_a_set_without_the_system_that_all_are_compared_with_is_passed_over(tmp_path: Path) -> None:
    folders = seeds(tmp_path)
    for folder in folders:
        sweep(folder / "main-math500", {PLAIN: rows(0.0, "+-", [9, 9])}, data="math500")
    assert "## main: math500" in reproduction.document(folders, [], PLAIN, 1.0, 99)
    told = reproduction.document(folders, [], "A", 1.0, 99)
    assert "## main: gsm8k" in told
    assert "## main: math500" not in told


def test_what_is_refused(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="no finished sweep"):
        reproduction.document([tmp_path / "none"], [], PLAIN, 1.0, 9)
    folders = seeds(tmp_path)
    with pytest.raises(SettingError, match="unknown table 'mian': did you mean 'main'"):
        reproduction.document(folders, ["mian"], PLAIN, 1.0, 9)
    with pytest.raises(SettingError, match="unknown system 'B'"):
        reproduction.document(folders, [], "B", 1.0, 9)
    sweep(tmp_path / "0" / "main-other", {PLAIN: rows(0.0, "+", [9])}, split="heldout", data="prm12k")
    with pytest.raises(DataError, match="held-out questions of gsm8k, prm12k"):
        reproduction.document(folders, [], PLAIN, 1.0, 9)
    sweep(tmp_path / "1" / "main-reasoner", {PLAIN: rows(0.0, "++--", [9] * 4)}, model="another")
    with pytest.raises(DataError, match="measures another, but its table has m"):
        reproduction.document(folders, [], PLAIN, 1.0, 9)
    write_json(tmp_path / "half" / "main-gsm8k" / "run.json", {"verb": "sweep"})
    with pytest.raises(DataError, match="no finished sweep"):
        reproduction.document([tmp_path / "half"], [], PLAIN, 1.0, 9)


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_measures_what_it_learns_and_chooses_on_the_same_held_out_questions(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a plan looks at data that is there
    recipe = pipeline.read(str(path), seed=7)
    assert recipe.name == f"reproduction-{path.stem}"
    described = plan.describe(recipe)
    assert all(f"\n{step.name} " in described for step in recipe.steps)
    learned = {s.out for step in recipe.steps if isinstance(s := step.settings, (TrainSettings, ExtractSettings, RewardSettings))}
    swept: dict[tuple[str, bool], set[str]] = {}
    for step in recipe.steps:
        s = step.settings
        if isinstance(s, (TrainSettings, MixSettings, RewardSettings)):
            assert s.seed == 7 or (path.stem in ("reward-search", "reward-steps") and s.seed in (1, 2, 3, 4))
        elif isinstance(s, SweepSettings):
            held = s.split == "heldout"
            assert (step.name.endswith("-heldout"), s.seed if held else 0, s.temperature) == (held, 0, 0)
            assert s.limit == (300 if held and path.stem not in WHOLE else None)
            directions = named_directions(s.direction)
            assert "\n" not in s.direction
            swept.setdefault((step.name.partition("-")[0], held), set()).update(directions.values())
    tables = {table for table, _ in swept}
    # What is measured on test questions has its positions from held-out ones.
    assert all(swept[table, True] == swept.get((table, False), swept[table, True] if path.stem == "reward-search" else None) for table in tables)
    used = set().union(*swept.values()) | {s.direction for step in recipe.steps if isinstance(s := step.settings, (TrainSettings, MixSettings, RewardSettings))}
    assert learned <= used


def test_the_mean_of_directions_moves_weights_half_of_each_way(tmp_path: Path) -> None:
    one = Direction.load(ROOT / "cotvalve" / "assets" / "tiny" / "valve")
    parts = [str((one * by).save(tmp_path / str(by))) for by in (1, 2, -6)]
    mean = Direction.load(means.mean(parts, str(tmp_path / "mean")))
    assert mean.factors.keys() == one.factors.keys()
    for name, factor in one.factors.items():
        assert torch.allclose(mean.factors[name].delta(), -factor.delta(), atol=1e-6)


def test_what_was_measured_on_held_out_questions_only_has_a_table_that_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "0"
    plain = rows(0.0, "+-++", [200] * 4)
    sweep(folder / "ra-2-heldout", {PLAIN: plain, "round 2": [*plain, *rows(1.0, "++++", [100] * 4)]}, split="heldout")
    sweep(folder / "ra-4-heldout", {PLAIN: plain, "round 4": [*plain, *rows(1.0, "+++-", [50] * 4)]}, split="heldout")
    found = reproduction.document([folder], [], PLAIN, 1.0, 99)
    assert found.startswith("## ra: 4 held-out training questions of gsm8k, of no test set")
    assert "| round 2 |  | 1 | 100.0 [" in found
    assert "| +25.0 [" in found
    assert "| round 4 |  | 1 | 75.0 [" in found
    assert "| 4.00 [" in found
    assert found.count("| plain model |") == 1


def test_held_out_questions_alone_are_compared_with_another_system_too(tmp_path: Path) -> None:
    plain = rows(0.0, "+-++", [200] * 4)
    one = [*plain, *rows(0.5, "++++", [150] * 4), *rows(1.0, "++++", [100] * 4)]
    sweep(tmp_path / "0" / "ra-heldout", {PLAIN: plain, "one": one, "two": [*plain, *rows(1.0, "+---", [100] * 4)]}, split="heldout")
    found = reproduction.document([tmp_path / "0"], [], "one", 1.0, 99)
    assert cells(found, "two", "", "1")[6].startswith("-75.0 [")
    assert cells(found.partition("equal length, mean")[2], "two")[1].startswith("-75.0 [")
    with pytest.raises(SettingError, match="unknown system 'three'"):
        reproduction.document([tmp_path / "0"], [], "three", 1.0, 9)
    sweep(tmp_path / "0" / "ra-gsm8k", {PLAIN: plain, "one": one})
    asked = reproduction.document([tmp_path / "0"], [], "one", 1.0, 99, held_out=True)
    assert asked == found
    assert reproduction.document([tmp_path / "0"], [], "one", 1.0, 99) != found


def test_a_part_of_a_test_set_has_tables_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "0"
    marked = [{**row, "subset": "numeric" * (row["problem"] in ("q0", "q1"))} for row in rows(0.0, "+-++", [200] * 4)]
    sweep(folder / "main-gsm8k", {PLAIN: marked, "A": [{**row, "alpha": 1.0} for row in marked]})
    assert "4 questions" in reproduction.document([folder], [], PLAIN, 1.0, 99)
    sweep(folder / "main-heldout", {PLAIN: (held := rows(0.0, "+-+", [200] * 3)), "A": [{**row, "alpha": 1.0} for row in held]}, split="heldout")
    part = reproduction.document([folder], [], PLAIN, 1.0, 99, "numeric")
    assert "2 questions" in part
    assert "chosen on 3 held-out" in part, "which are of no test set, and have no such part"
    assert "| 50.0 [" in part


def test_published_rows_give_the_same_tables_without_their_texts(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "0"
    looping = "again and again and again " * 60
    systems = {PLAIN: rows(0.0, "++--", [200] * 4, looping), "A": [*rows(0.0, "++--", [200] * 4, looping), *rows(0.5, "+++#", [90] * 4), *rows(1.0, "+--#", [40] * 4, looping)]}
    sweep(folder / "main-gsm8k", systems)
    write_json(folder / "mix" / "run.json", {"verb": "mix"})
    for part, told in (("mix", "mix.json"), ("direction", "train.json")):
        for name in ("run.json", told, "rows.sqlite"):
            write_json(folder / "short" / "round-1" / part / name, {"verb": part})
    for told in ("extraction.json", "adapter_config.json"):
        write_json(folder / "low-16" / told, {"rank": 16})
    before = reproduction.document([folder], [], PLAIN, 1.0, 99)
    assert "| 1 | 25.0" in before
    assert "| 25.0 | 100.0 |" in before  # one is cut, all four repeat themselves
    for texts in ([], ["0/main-gsm8k"]):
        home = tmp_path / f"kept-{len(texts)}"
        reproduction.publish([folder], home, texts)
        assert reproduction.document([home / "0"], [], PLAIN, 1.0, 99) == before
        assert ("text" in read_parquet(home / "0" / "main-gsm8k" / "rows.parquet")[0]) == bool(texts)
        assert not (home / "0" / "mix").exists()  # it had not ended
        assert [path.name for path in (home / "0" / "low-16").iterdir()] == ["extraction.json"]
        rounds = sorted(str(path.relative_to(home / "0" / "short" / "round-1")) for path in (home / "0" / "short").rglob("*.*"))
        assert rounds == ["direction/run.json", "direction/train.json", "mix/mix.json", "mix/run.json"]


def test_several_dials_are_told_together_question_by_question(tmp_path: Path) -> None:
    plain = rows(0.0, "++--", [200, 300, 200, 300])
    sweep(tmp_path / "a", {PLAIN: plain, PROMPT: rows(None, "----", [9] * 4), "A": [*rows(0.0, "++--", [200] * 4), *rows(0.5, "++--", [100] * 4), *rows(1.0, "+-#-", [50] * 4)]})
    sweep(tmp_path / "b", {PLAIN: plain, "A": rows(1.0, "++--", [100] * 4), "B": rows(1.0, "++++", [150] * 4)})
    other = [{**row, "problem": f"p{row['problem']}", "correct": True} for row in rows(1.0, "##", [80] * 2)]  # given before the cut
    sweep(tmp_path / "c", {PLAIN: [{**row, "alpha": 0.0} for row in other], "A": other}, data="math500")
    [all_three] = several.compared([tmp_path / "a", tmp_path / "b"], [], [1.0])
    assert (all_three.where, all_three.position) == ("gsm8k", "1")
    assert all_three.ours_P_3.mean(axis=0) == pytest.approx([(1 + 2 + 4) / 12, 100.0, 1 / 12])
    assert all_three.theirs_P_3.mean(axis=0) == pytest.approx([0.5, 250.0, 0.0])
    changed = several.changes(all_three, 499)
    assert [changed[name][0] for name in several.MEASURES] == pytest.approx([100 / 12, 2.5, 100 / 12])
    for estimate, within in changed.values():
        assert within.low < estimate < within.high
    # Questions count alike, and not the sweeps: six of them, two of which are another set's.
    found = several.compared([tmp_path / name for name in "abc"], [], [])
    assert [(line.where, line.position, len(line.ours_P_3)) for line in found] == [("gsm8k", "1", 4), ("math500", "1", 2), ("together", "1", 6)]
    assert found[-1].ours_P_3[:, 0].mean() == pytest.approx(7 / 3 / 6)
    assert found[-1].theirs_P_3[:, 2].mean() == pytest.approx(2 / 6)
    assert [line.position for line in several.compared([tmp_path / "a", tmp_path / "b"], [], [])] == ["1"], "a mean over dials that have the position"
    [against] = several.compared([tmp_path / "b"], [tmp_path / "a"], [], "q1")
    assert against.ours_P_3.tolist() == [[1.0, 125.0, 0.0]]
    assert against.theirs_P_3.tolist() == [[0.0, 50.0, 0.0]]
    half, whole, all_of_them = several.compared([tmp_path / "a"], [], [])
    assert [line.position for line in (half, whole, all_of_them)] == ["0.5", "1", "all of them"]
    assert all_of_them.ours_P_3.tolist() == ((half.ours_P_3 + whole.ours_P_3) / 2).tolist()
    assert "| gsm8k, 4 | 1 | 75.0, 25.0 | +50.0 [" in several.tables([tmp_path / "b"], [tmp_path / "a"], [], 99)


def test_several_holds_dials_and_sets_apart_where_sweeps_differ(tmp_path: Path) -> None:
    """Of sweeps with unlike positions, questions, samples or parts of a set it made one mean, of whatever rows a question had."""
    plain = rows(0.0, "++--", [100] * 4)
    sweep(tmp_path / "few", {PLAIN: plain[:2], "A": [*rows(-1.0, "--", [200] * 2), *rows(0.5, "++", [60] * 2), *rows(1.0, "++", [50] * 2)]})
    more = [{**row, "sample": sample} for sample in (1, 2) for row in rows(1.0, "++++", [20] * 4)]
    sweep(tmp_path / "all", {PLAIN: plain, "B": [*rows(-1.0, "----", [200] * 4), *rows(1.0, "----", [20] * 4), *more]})
    both = [tmp_path / "few", tmp_path / "all"]
    [line] = several.compared(both, [], [])
    assert (line.position, len(line.ours_P_3), line.asked) == ("1", 2, 4)
    assert line.ours_P_3.tolist() == [[pytest.approx((1 + 2 / 3) / 2), 35.0, 0.0]] * 2, "dials weigh alike, and not their samples"
    assert line.theirs_P_3.tolist() == [[1.0, 100.0, 0.0]] * 2
    assert "| gsm8k, 2 of 4 | 1 |" in several.tables(both, [], [], 99)
    [line] = several.compared(both, [], [-1.0])
    assert line.ours_P_3[:, 0].tolist() == [0.0, 0.0]
    held = [{**row, "problem": f"h{row['problem']}"} for row in plain]
    sweep(tmp_path / "held", {PLAIN: held, "A": [{**row, "alpha": 1.0} for row in held]}, split="heldout")
    found = several.compared([tmp_path / "all", tmp_path / "held"], [], [1.0])
    assert [(line.where, len(line.ours_P_3)) for line in found] == [("gsm8k", 4), ("gsm8k heldout", 4), ("together", 8)]
    # Nothing differs, and of four questions that does not say that nothing would.
    _, ends = several.changes(found[1], 99)["right"]
    assert ends.low < -50 < 50 < ends.high


def test_several_says_what_it_needs(tmp_path: Path) -> None:
    sweep(tmp_path / "a", {PLAIN: rows(0.0, "+-", [9] * 2), "A": rows(1.0, "+-", [9] * 2)})
    sweep(tmp_path / "half", {PLAIN: rows(0.0, "+-", [9] * 2), "A": rows(0.5, "+-", [9] * 2)})
    sweep(tmp_path / "none", {PLAIN: rows(0.0, "+-", [9] * 2)})
    apart = [{**row, "problem": f"p{row['problem']}"} for row in rows(1.0, "+-", [9] * 2)]
    sweep(tmp_path / "apart", {PLAIN: [{**row, "alpha": 0.0} for row in apart], "A": apart})
    sweep(tmp_path / "held", {PLAIN: rows(0.0, "+-", [9] * 2), "A": rows(1.0, "+-", [9] * 2)}, split="heldout")
    sweep(tmp_path / "b", {PLAIN: rows(0.0, "+-", [9] * 2), "A": [{**row, "finish": "error"} for row in rows(1.0, "+-", [9] * 2)]})
    for told, steps, alphas, prefix in (("no rows.parquet", ["nothing"], [], ""), ("not every dial has alpha 0.5; all have 1", ["a"], [0.5], ""), ("begins with 'x'", ["a"], [], "x"), ("q0 could not be run", ["b"], [], ""),
                                         ("no position above 0 in common; they have none", ["a", "half"], [], ""), ("no sweep has a dial", ["none"], [], ""), ("named twice", ["a", "a"], [], ""),
                                         ("no question of gsm8k was answered by all", ["a", "apart"], [], "")):  # fmt: skip
        with pytest.raises(DataError, match=told):
            several.compared([tmp_path / step for step in steps], [], alphas, prefix)
    with pytest.raises(DataError, match="only one side has a sweep of gsm8k heldout"):
        several.compared([tmp_path / "a", tmp_path / "held"], [tmp_path / "a"], [])


def test_steps_of_one_name_are_the_same_in_every_recipe() -> None:
    """They share a folder: a step that another recipe has run is passed over only when its settings are the same."""
    known: dict[str, Json] = {}
    for path in RECIPES:
        for step in pipeline.read(str(path), out="runs/x").steps:
            settings = step.settings.model_dump(mode="json")
            assert known.setdefault(step.name, settings) == settings, f"{path.name}: {step.name}"
    assert {"valve", "mix"} <= set(known)


def shrunk(path: Path, folder: Path) -> str:
    """The recipe on the embedded model: six questions to learn from and two to answer, three positions of each grid."""
    recipe: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe["common"] |= {"model": "tiny-reasoner", "prompt": "plain", "device": "cpu", "slots": 64, "batch": 8}
    texts = ((p, f"{p.solution}\n" * 3 + f"The answer is \\boxed{{{p.answer}}}.") for p in problems.load("arithmetic", split="train", limit=8))
    long = "\n".join(json.dumps({"question": p.question, "answer": p.answer, "solution_0": text}) for p, text in texts)
    (folder / "long.jsonl").write_text(long, encoding="utf-8")
    for step in recipe["steps"].values():
        data = str(step.get("data", ""))
        if data.endswith(".jsonl"):
            step["data"] = str(folder / "long.jsonl")
        elif data and not data.startswith("$"):
            step["data"] = "arithmetic"
        if "direction" in step:
            step["direction"] = re.sub("(runs/means|directions)/[^,]+", "tiny-valve", step["direction"])
        if step["verb"] == "sweep":
            alphas = step["alphas"]
            step |= {"alphas": sorted({alphas[0], alphas[len(alphas) // 2], alphas[-1]}), "limit": 2, "max_new_tokens": 60}
        elif step["verb"] != "extract":
            step["limit"] = 6
        if step["verb"] in ("mix", "reward"):
            step["max_new_tokens"] = 400
        if step["verb"] == "reward":
            step["samples"] = 4
    (folder / path.name).write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return str(folder / path.name)


@pytest.mark.skipif(not os.environ.get("COTVALVE_DRY_RUN"), reason="ten minutes; set COTVALVE_DRY_RUN=1")
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_whole_when_shrunk(path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """All recipes in one folder, as on the GPU: steps that two of them have are made once."""
    home = tmp_path_factory.getbasetemp() / "reproduction"
    home.mkdir(exist_ok=True)
    recipe = pipeline.read(shrunk(path, home), out=str(home / "seed"), seed=1)
    assert list(dict(pipeline.run(recipe))) == [step.name for step in recipe.steps]
    tables = sorted({step.name.partition("-")[0] for step in recipe.steps if step.verb == "sweep"})
    document = reproduction.document([home / "seed"], tables, PLAIN, 1.0, 99)
    if path.stem == "reward-search":
        assert all(f"## {table}: 2 held-out training questions of arithmetic, of no test set" in document for table in tables)
        return
    assert all(f"## {table}: arithmetic" in document for table in tables)
    assert "most accurate" in document


# --- several GPUs ----------------------------------------------------------------------------------------------------


def test_steps_run_side_by_side_and_one_that_fails_holds_up_only_what_needs_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two processes (on a CPU), two recipes that share a step; what is made is what `cotvalve run` passes over."""
    common = {"model": "tiny-reasoner", "prompt": "plain", "device": "cpu", "slots": 8, "batch": 8, "data": "arithmetic", "limit": 4}
    train = {"verb": "train", "recipe": "valve"}
    sweep = {"verb": "sweep", "direction": "A=$valve", "alphas": [0, 1], "max_new_tokens": 20}
    steps = {
        "one": {"valve": train, "first-arithmetic": sweep},
        "two": {"valve": train, "lost": {**train, "data": str(tmp_path / "nothing.jsonl")}, "lost-sweep": {**sweep, "direction": "A=$lost"}, "second-arithmetic": {**sweep, "alphas": [0.5]}},
    }
    paths = [str(tmp_path / f"{name}.yaml") for name in steps]
    for path, (name, some) in zip(paths, steps.items(), strict=True):
        Path(path).write_text(yaml.safe_dump({"name": name, "common": common, "steps": some}, sort_keys=False), encoding="utf-8")
    line = [*paths, "--out", str(tmp_path / "out"), "--gpus", "2", "--seeds", "3"]
    assert side_by_side.main(line) == 1
    said = capfd.readouterr()
    assert said.out.count("begins") == 4  # valve once, two sweeps, and the one that fails
    assert "nothing.jsonl" in said.err
    assert "lost-sweep: what it needs is not made" in said.err
    made = json.loads((tmp_path / "out" / "3" / "steps.json").read_text(encoding="utf-8"))
    assert {name for name, step in made.items() if step["made"]} == {"valve", "first-arithmetic", "second-arithmetic"}
    assert read_parquet(tmp_path / "out" / "3" / "first-arithmetic" / "rows.parquet")
    before = (tmp_path / "out" / "3" / "valve" / "train.json").stat().st_mtime_ns
    (tmp_path / "nothing.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": "2", "solution": "1 + 1 = 2"}) + "\n", encoding="utf-8")
    assert side_by_side.main(line) == 0
    assert capfd.readouterr().out.count("begins") == 2
    assert (tmp_path / "out" / "3" / "valve" / "train.json").stat().st_mtime_ns == before
    assert all(path.exists() for _, path in pipeline.run(pipeline.read(paths[1], str(tmp_path / "out" / "3"), seed=3)))

    # The direction is gone, and a sweep of it: it is made anew, and the other sweeps are told to be of another one.
    for name in ("valve", "first-arithmetic"):
        shutil.rmtree(tmp_path / "out" / "3" / name)
    for begins in (2, 0):
        assert side_by_side.main(line) == 1
        said = capfd.readouterr()
        assert said.out.count("begins") == begins
        assert said.err.count("not made") == 1
        assert "second-arithmetic: was made from another 'valve', which was made anew" in said.err
    shutil.rmtree(tmp_path / "out" / "3" / "second-arithmetic")
    assert side_by_side.main(line) == 0
