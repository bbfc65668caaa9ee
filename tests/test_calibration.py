"""Calibration: the curve, what it refuses, its file, and the whole verb on a small random model."""

import gzip
import json
import math
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import models
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cotvalve import Valve, sweep
from cotvalve.calibrate import CalibrateSettings, _origin, measure, run
from cotvalve.calibration import Calibration, fingerprint, fit, pool
from cotvalve.checkpoints import DIRECTION_FILES, fetch
from cotvalve.direction import Card, Direction
from cotvalve.errors import DataError, SettingError
from cotvalve.records import RowStore, read_parquet, write_parquet
from cotvalve.repetition import loops
from cotvalve.sweep import SweepSettings

NAN = float("nan")


def rows(
    tokens: dict[float, float], *, questions: int = 200, right: dict[float, float] | None = None,
    cut: dict[float, float] | None = None, looping: dict[float, float] | None = None, seed: int = 0,
) -> list[dict[str, object]]:  # fmt: skip
    """Graded rows whose lengths scatter around `tokens` by the question, as real ones do; shares are of questions."""
    random = np.random.default_rng(seed)
    scale = np.exp(random.normal(0, 0.3, questions))
    scale /= scale.mean()
    made: list[dict[str, object]] = []
    for alpha, mean in tokens.items():
        for i in range(questions):
            share = (i + 0.5) / questions
            truncated = share < (cut or {}).get(alpha, 0.0)
            made.append(
                {
                    "problem": f"q{i}", "alpha": alpha, "sample": 0, "tokens": round(mean * scale[i]), "reasoning_tokens": 0,
                    "finish": "length" if truncated else "stop", "correct": share < (right or {}).get(alpha, 0.9),
                    "predicted": "1", "reason": "", "subset": "", "prompt_tokens": 9,
                    "text": "again and again and " * 40 if share < (looping or {}).get(alpha, 0.0) else f"The answer is {i}.",
                }
            )  # fmt: skip
    return made


SHORTER = {0.0: 300.0, 0.1: 210.0, 0.25: 130.0, 0.5: 105.0, 1.0: 95.0}
LONGER = {-0.5: 80.0, 0.0: 100.0, 0.5: 180.0, 1.0: 400.0}


@pytest.fixture(scope="module")
def shorter() -> Calibration:
    return measure(rows(SHORTER, right={0.0: 0.9, 0.1: 0.9, 0.25: 0.885, 0.5: 0.8, 1.0: 0.5}))


@pytest.fixture(scope="module")
def longer() -> Calibration:
    return measure(rows(LONGER))


# The curve


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=12))
def test_pool_is_the_nearest_nondecreasing_sequence(values: list[float]) -> None:
    fitted = np.array(pool(values))
    assert len(fitted) == len(values)
    assert (np.diff(fitted) >= -1e-9).all()
    assert fitted.sum() == pytest.approx(sum(values), abs=1e-6)
    # Optimality: no convex combination with another monotone sequence comes nearer.
    miss = np.square(fitted - values).sum()
    for other in (np.sort(values), np.full(len(values), np.mean(values))):
        assert miss <= np.square(0.9 * fitted + 0.1 * other - values).sum() + 1e-6


def test_fit_keeps_monotone_lengths_and_pools_what_turns_back() -> None:
    assert pool([1.0005, 1.0]) == pytest.approx([1.00025] * 2), "however little it is"
    assert fit([400, 200, 100]) == pytest.approx([400, 200, 100])
    assert fit([100, 200, 400]) == pytest.approx([100, 200, 400])
    assert fit([400, 90, 110]) == pytest.approx([400, math.sqrt(90 * 110), math.sqrt(90 * 110)])


@pytest.mark.parametrize("name", ["shorter", "longer"])
def test_alpha_and_tokens_are_inverse(name: str, request: pytest.FixtureRequest) -> None:
    made: Calibration = request.getfixturevalue(name)
    assert made.toward == name
    for tokens in np.linspace(made.reach.low, made.reach.high, 23):
        alpha = made.alpha(tokens=float(tokens))
        assert made.span.low <= alpha <= made.span.high
        assert made.tokens(alpha) == pytest.approx(tokens, rel=1e-9)
    start = made.tokens(0.0)
    assert made.alpha(shorter=0.0) == 0.0
    assert made.tokens(made.alpha(shorter=0.1)) == pytest.approx(0.9 * start)


def test_a_direction_toward_longer_lengthens(longer: Calibration) -> None:
    assert longer.alpha(tokens=400 * longer.tokens(1.0) / 400) == 1.0
    assert longer.tokens(longer.alpha(shorter=-1.0)) == pytest.approx(2 * longer.tokens(0.0))
    assert longer.alpha(shorter=0.1) < 0


def test_between_measured_alphas_the_log_is_linear(shorter: Calibration) -> None:
    assert shorter.tokens(0.75) == pytest.approx(math.sqrt(shorter.tokens(0.5) * shorter.tokens(1.0)))


def test_of_equal_lengths_the_position_nearest_to_the_base_is_taken() -> None:
    made = measure(rows({0.0: 300, 0.5: 100, 1.0: 100, 1.5: 100}))
    assert made.alpha(tokens=made.reach.low) == 0.5
    flat = measure(rows({-1.0: 100, 0.0: 100, 1.0: 100}))
    assert flat.alpha(tokens=100) == 0.0


@pytest.mark.parametrize(
    "asked", [{"tokens": 20}, {"tokens": 5000}, {"tokens": NAN}, {"shorter": 0.95}, {"shorter": -3.0}, {"tokens": -5}]
)
def test_out_of_reach_says_what_is_in_reach(shorter: Calibration, asked: dict[str, float]) -> None:
    with pytest.raises(SettingError, match=r"from 95 to 30\d tokens \(shorter .* over alpha 0 to 1"):
        shorter.alpha(**asked)


def test_nothing_is_extrapolated(shorter: Calibration) -> None:
    for alpha in (-0.01, 1.01, NAN):
        with pytest.raises(SettingError, match="calibrated 0 to 1"):
            shorter.tokens(alpha)
    with pytest.raises(SettingError, match="one of tokens and shorter"):
        shorter.alpha()
    with pytest.raises(SettingError, match="one of tokens and shorter"):
        shorter.alpha(tokens=100, shorter=0.3)


def test_the_ends_can_be_asked_for_as_they_are_shown(shorter: Calibration) -> None:
    for end in (shorter.reach.low, shorter.reach.high):
        shorter.alpha(tokens=round(end))
        shorter.alpha(shorter=round(1 - end / shorter.tokens(0.0), 3))


def test_a_saving_of_everything_is_the_end_that_it_stands_for() -> None:
    """Rounded as it is shown, 2 of 8,000 tokens is a saving of 1: the logarithm of no tokens was a ValueError."""
    made = measure(rows({0.0: 8000, 1.0: 2}))
    assert made.alpha(shorter=round(1 - made.reach.low / made.tokens(0.0), 3)) == 1.0


# What is safe


def test_the_safe_range_ends_before_the_first_position_that_may_lose_too_much(shorter: Calibration) -> None:
    assert (shorter.safe.low, shorter.safe.high) == (0.0, 0.25)
    assert shorter.is_safe(0.2)
    assert not shorter.is_safe(0.3)
    # 0.5 loses 10 points; a later position that happens to do well does not bring it back.
    lucky = measure(rows(SHORTER, right={0.5: 0.8, 1.0: 0.9}))
    assert lucky.safe.high == 0.25


def test_a_question_lost_leaves_more_room_for_losses_than_none() -> None:
    """Exact one-sided bounds (Clopper and Pearson) of 0, 1, 2 and 6 of 100; resamples of one loss give 3 points."""
    lows = [measure(rows({0.0: 300.0, 1.0: 100.0}, questions=100, right={0.0: 1.0, 1.0: 1 - k / 100})).positions[-1].difference_ci.low for k in (0, 1, 2, 6)]
    assert lows[:3] == pytest.approx([-3.622, -5.446, -7.038], abs=0.001)
    assert lows[3] < -11


def test_of_several_samples_each_counts_for_its_part_of_a_question() -> None:
    """Three of 100 questions lose one of four samples, which is no whole question: room for 1 loss of 100, not for 3."""
    four = [{**row, "sample": sample} for row in rows({0.0: 300.0, 1.0: 100.0}, questions=100, right={0.0: 1.0, 1.0: 1.0}) for sample in range(4)]
    made = measure([{**row, "correct": (row["alpha"], row["sample"]) != (1.0, 0) or row["problem"] not in ("q1", "q2", "q3")} for row in four])
    assert made.positions[-1].difference == pytest.approx(-0.75)
    assert made.positions[-1].difference_ci.low == pytest.approx(-5.446, abs=0.001)
    # Of every question half is lost: resamples are all the same, and as much room is left as where none is, 3.62 points.
    half = measure([{**row, "correct": row["alpha"] == 0 or row["sample"] < 2} for row in four]).positions[-1]
    assert (half.difference_ci.low, half.difference_ci.high) == pytest.approx((-53.62, -46.38), abs=0.01)


def test_at_most_loss_takes_the_shortest_that_is_sure(shorter: Calibration) -> None:
    assert shorter.at_most_loss(5).alpha == 0.25
    found = shorter.at_most_loss(20)
    assert found.alpha == 0.5
    assert found.shorter == pytest.approx(1 - found.tokens / shorter.tokens(0.0))
    assert found.difference == pytest.approx(-10)
    assert found.difference_ci.low < -10 < found.difference_ci.high
    nothing = shorter.at_most_loss(0)
    assert (nothing.alpha, nothing.shorter) == (0.0, 0.0)
    for points in (-1, NAN):
        with pytest.raises(SettingError, match="0 or more"):
            shorter.at_most_loss(points)
    flat = measure(rows({-1.0: 100, -0.5: 100, 0.0: 300, 0.5: 300}))
    assert flat.at_most_loss(5).alpha == -0.5, "of equal lengths the nearest to the base"


def test_few_questions_prove_nothing() -> None:
    """Twenty questions that were all answered as at alpha 0 once made everything safe: their bootstrap has no width."""
    made = measure(rows(SHORTER, questions=20), tolerance=5.0)
    assert made.safe.high == 0.0
    assert made.positions[-1].difference_ci.low == pytest.approx(-100 * (1 - 0.025 ** (1 / 20)))
    assert measure(rows(SHORTER, questions=20), tolerance=17.0).safe.high == 1.0


def test_degenerate_positions_leave_the_curve() -> None:
    lengths = {0.0: 300.0, 0.5: 100.0, 1.0: 90.0, 1.5: 150.0, 2.0: 80.0}
    for why in ({"cut": {1.5: 0.3}}, {"looping": {1.5: 0.3}}):
        made = measure(rows(lengths, **why))
        assert made.span.high == 1.0
        assert made.safe.high == 1.0
        # 2.0 is clean, but it lies beyond what degenerates.
        assert [p.fitted is None for p in made.positions] == [False, False, False, True, True]
        with pytest.raises(SettingError, match="out of reach"):
            made.alpha(tokens=80)
    told = measure(rows(lengths, cut={1.5: 0.3})).positions[3]
    assert (told.truncated, told.looping, told.degenerate) == (30.0, 0.0, 30.0)


def test_a_base_model_that_is_cut_itself_is_the_measure() -> None:
    made = measure(rows(SHORTER, cut={alpha: 0.1 for alpha in SHORTER}))
    assert made.span.high == 1.0
    assert made.positions[0].truncated == 10.0
    assert (made.positions[0].difference_ci.low, made.positions[0].difference_ci.high) == (0.0, 0.0), "from itself it differs by nothing"


def test_the_error_is_of_questions_the_curve_has_not_seen() -> None:
    few, many = measure(rows(SHORTER, questions=20)).error, measure(rows(SHORTER, questions=800)).error
    assert 0 < many.questions < few.questions < 0.5
    assert many.questions < many.worst
    # Left out, 0.1, 0.25 and 0.5 are read off a line between the logarithms of their neighbours: 2, 25 and 12 % off.
    assert many.between == pytest.approx(0.128, abs=0.015)
    # A tenth and nine of a lognormal of 0.3.
    assert (many.single.low, many.single.high) == pytest.approx((math.exp(-0.384), math.exp(0.384)), rel=0.04)
    # A chain that could not be run is no short one.
    failed = [{**row, "finish": "error", "tokens": 0} if i % 5 == 0 else row for i, row in enumerate(rows(SHORTER, questions=100))]
    assert measure(failed).error.single.low > 0.5


def test_measuring_needs_alpha_0_and_questions() -> None:
    with pytest.raises(DataError, match="alpha 0"):
        measure(rows({0.5: 100, 1.0: 90}))
    with pytest.raises(DataError, match="1 question"):
        measure(rows(SHORTER, questions=1))
    errors = [{**row, "finish": "error", "tokens": 0} for row in rows(SHORTER, questions=4)]
    with pytest.raises(DataError, match="no chain could be run"):
        measure(errors)
    # Halves in which none could be run at some position say nothing; where that is so of all, there is no error to tell.
    four, two = (
        [{**row, "finish": "error", "tokens": 0} if (row["alpha"], row["problem"]) in ((0.5, "q0"), (0.5, last)) else row for row in rows(SHORTER, questions=count)]
        for count, last in ((4, "q1"), (2, "q0"))
    )
    assert 0 < measure(four).error.questions < 1
    with pytest.raises(DataError, match="too few chains could be run"):
        measure(two)


# Loops


@pytest.mark.parametrize(
    ("text", "looping"),
    [
        ("", False),
        ("So 12 + 7 = 19. She has 19 apples. The answer is \\boxed{19}.", False),
        ("Wait, let me check that again.\n" * 30, True),
        ("She has 3. " + "Then 3 * 4 = 12, so 12 / 4 = 3. " * 20 + "The answer is 3.", True),
        ("0." + "3" * 500, True),
        ("!" * 400, True),
        ("2 + " * 20 + "2 = 42", False),
        ("| a | b |\n|-----|-----|\n" + "".join(f"| {i} | {i * i} |\n" for i in range(60)), False),
        ("\n".join(f"Step {i}: add {i}, now it is {i * (i + 1) // 2}." for i in range(80)), False),
        ("因此答案是" * 40, True),
        ("\\quad" * 80, True),
    ],
)
def test_loops(text: str, looping: bool) -> None:
    assert loops(text) is looping


@pytest.mark.parametrize("period", [*range(1, 20), 40, 250])
def test_a_loop_begins_at_four_copies_and_sixty_words(period: int) -> None:
    """To the word, whatever the period: most texts are let go before any period is tried."""
    enough = max(4 * period, 60)
    before, after = (" ".join(f"{side}{i}" for i in range(30)) for side in "xy")
    for words, looping in ((enough, True), (enough - 1, False)):
        copies = " ".join(f"w{i % period}" for i in range(words))
        assert loops(f"{before} {copies} {after}") is looping


# The file


def test_round_trip(tmp_path: Path, shorter: Calibration) -> None:
    made = replace(shorter, chosen_on="held-out questions", facts={"model": "m"})
    assert Calibration.load(made.save(tmp_path)) == made
    assert Calibration.load(tmp_path) == made
    assert json.loads((tmp_path / "calibration.json").read_text())["version"] == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "other"}, "not a calibration"),
        ({"version": 2}, "format version 2"),
        ({"positions": []}, "curve through alpha 0"),
        ({"error": {}}, "not a whole calibration"),
        ({"questions": "many"}, "not a whole calibration"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, shorter: Calibration, change: dict[str, object], said: str) -> None:
    path = shorter.save(tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(DataError, match=said):
        Calibration.load(path)


@pytest.mark.parametrize(
    ("number", "change"),
    [(3, {"alpha": 1.0}), (3, {"alpha": -1.0}), (0, {"fitted": None}), (4, {"fitted": 0.0}), (4, {"fitted": -5.0}), (3, {"fitted": 400.0})], ids=str,
)  # fmt: skip
def test_positions_that_make_no_curve_are_refused(tmp_path: Path, shorter: Calibration, number: int, change: dict[str, float | None]) -> None:
    path = shorter.save(tmp_path)
    whole = json.loads(path.read_text())
    whole["positions"][number] |= change
    path.write_text(json.dumps(whole))
    with pytest.raises(DataError, match="do not make a curve"):
        Calibration.load(path)


def test_a_fingerprint_is_of_both_ends_of_the_weights_and_of_their_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cotvalve.calibration._SAMPLED", 4)
    found = [fingerprint(tmp_path)]
    for weights, config in ((b"headtail", {"r": 4}), (b"HEADtail", {"r": 4}), (b"headTAIL", {"r": 4}), (b"head..tail", {"r": 4}), (b"headtail", {"r": 4, "lora_alpha": 9})):
        (tmp_path / "adapter_model.safetensors").write_bytes(weights)
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(len(found))}))
        found.append(fingerprint(tmp_path))
    assert len(set(found)) == 6
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 9, "inference_mode": True}))
    assert fingerprint(tmp_path) == found[-1], "what PEFT notes besides says nothing of the weights"


def test_a_direction_trained_again_does_not_keep_its_calibration(tmp_path: Path, shorter: Calibration) -> None:
    folder = direction(tmp_path / "d", seed=1)
    assert Calibration.beside(folder) is None
    replace(shorter, fingerprint=fingerprint(folder)).save(folder)
    assert Calibration.beside(folder) is not None
    direction(folder, seed=2)
    with pytest.raises(DataError, match="another direction"):
        Calibration.beside(folder)


# The verb


def direction(folder: Path, seed: int = 1, by: float = 0.05) -> Path:
    """A random direction for tests' small Llama."""
    wrapped = models.lora(models.llama(), seed=seed, by=by)
    state = {k: v for k, v in wrapped.state_dict().items() if ".lora_" in k}
    config = wrapped.peft_config["default"]
    return Direction.from_peft(
        config, {k.replace(".default.", "."): v for k, v in state.items()}, Card("base", "shorter")
    ).save(folder)


@pytest.fixture
def settings(tmp_path: Path) -> CalibrateSettings:
    base = models.save(models.llama(), tmp_path / "base")
    return CalibrateSettings(
        model=str(base), direction=str(direction(tmp_path / "d")), data="arithmetic", limit=6, alphas=(0.5, 1.0),
        max_new_tokens=24, prompt="plain", device="cpu", degenerate=100.0, out=str(tmp_path / "run"),
    )  # fmt: skip


def test_calibrate_writes_beside_the_direction_and_goes_on(settings: CalibrateSettings, tmp_path: Path) -> None:
    said = run(settings).read_text()
    made = Calibration.beside(tmp_path / "d")
    assert made is not None
    assert [p.alpha for p in made.positions] == [0.0, 0.5, 1.0]
    assert made.questions == 6
    assert "held-out training questions of arithmetic" in made.chosen_on
    assert made.chosen_on in said
    assert f"{made.error.questions:.1%}" in said
    assert "sweep" not in json.loads((tmp_path / "run" / "run.json").read_text())["settings"], "as in folders from before there was such a setting"
    # Again, with another tolerance: the rows are there, none is sampled, none changes.
    sampled: list[str] = []
    before = (tmp_path / "run" / "rows.sqlite").read_bytes()
    run(settings.but(tolerance=50.0), lambda task, *_: sampled.append(task))
    assert not sampled
    assert (tmp_path / "run" / "rows.sqlite").read_bytes() == before
    again = Calibration.beside(tmp_path / "d")
    assert again is not None
    assert again.tolerance == 50.0
    # Other weights under the same name do not mix with these rows.
    direction(tmp_path / "d", seed=7)
    (tmp_path / "d" / "calibration.json").unlink()
    with pytest.raises(DataError, match="fingerprint"):
        run(settings)


def test_positions_are_measured_with_the_same_random_numbers(settings: CalibrateSettings, tmp_path: Path) -> None:
    """Of a direction that is zero every position has the plain model's chains, also where they are drawn."""
    run(settings.but(direction=str(direction(tmp_path / "zero", by=0.0)), temperature=1.0))
    with closing(RowStore(tmp_path / "run" / "rows.sqlite")) as store:
        texts = {alpha: [row["text"] for row in store.rows() if row["alpha"] == alpha] for alpha in (0.0, 0.5, 1.0)}
    assert len(set(texts[0.0])) > 1
    assert texts[0.0] == texts[0.5] == texts[1.0]


def test_a_sweep_of_the_held_out_questions_makes_the_same_calibration(settings: CalibrateSettings, tmp_path: Path) -> None:
    """No model is loaded for it: its folder is gone."""
    shared = settings.model_dump(include={"model", "data", "limit", "max_new_tokens", "prompt", "device"})
    other = direction(tmp_path / "other", seed=5)
    held = SweepSettings(**shared, direction=f"another={other},mine={settings.direction}", split="heldout", alphas=(0, 0.5, 1), out=str(tmp_path / "held"))
    sweep.run(held)
    sweep.run(held.but(split="test", out=str(tmp_path / "test")))
    run(settings)
    sampled = Calibration.beside(tmp_path / "d")
    assert sampled is not None
    (tmp_path / "d" / "calibration.json").unlink()
    shutil.rmtree(tmp_path / "base")
    taken = CalibrateSettings(sweep=str(tmp_path / "held"), direction=settings.direction, data="arithmetic", degenerate=100.0, out=str(tmp_path / "taken"))
    run(taken)
    told = json.loads((tmp_path / "taken" / "run.json").read_text())["settings"]
    assert (told["model"], told["alphas"], told["prompt"], told["limit"]) == (settings.model, [0, 0.5, 1], "plain", 6)
    made = Calibration.beside(tmp_path / "d")
    assert made is not None
    assert (made.positions, made.questions, made.chosen_on) == (sampled.positions, sampled.questions, sampled.chosen_on)
    assert made.facts["decoding"].startswith("greedy, up to 24")
    with pytest.raises(DataError, match="not a sweep of held-out questions"):
        run(taken.but(sweep=str(tmp_path / "test")))
    with pytest.raises(DataError, match="its directions are another, mine, with other weights"):
        run(taken.but(direction=str(direction(tmp_path / "third", seed=6))))
    with pytest.raises(DataError, match="has no gsm8k; its data is arithmetic"):
        run(taken.but(data="gsm8k"))
    kept = read_parquet(tmp_path / "held" / "rows.parquet")
    write_parquet(tmp_path / "held" / "rows.parquet", [{key: value for key, value in row.items() if key != "text"} for row in kept])
    with pytest.raises(DataError, match="published without their texts"):
        run(taken)


def test_a_calibrated_valve_takes_tokens_and_savings(settings: CalibrateSettings, tmp_path: Path) -> None:
    run(settings)
    valve = Valve.load(settings.model, settings.direction, device="cpu")
    assert valve.calibration is not None
    known = replace(measure(rows(SHORTER)), fingerprint=fingerprint(tmp_path / "d"))
    known.save(tmp_path / "d")
    valve = Valve.load(settings.model, settings.direction, device="cpu")
    for asked in ({"tokens": 120.0}, {"shorter": 0.4}):
        (completion,) = valve.generate("How many?", max_new_tokens=4, **asked)
        assert completion.alpha == pytest.approx(known.alpha(**asked))
    with pytest.raises(SettingError, match="out of reach"):
        valve.generate("How many?", tokens=3.0)
    # As alpha takes a list someone tries one here; it was a TypeError about a format string.
    with pytest.raises(SettingError, match=r"tokens is \[80, 120\]; expected one number"):
        valve.generate("How many?", tokens=[80, 120])  # pyright: ignore[reportArgumentType]
    with pytest.raises(SettingError, match="shorter is 'half'; expected one number"):
        valve.generate("How many?", shorter="half")  # pyright: ignore[reportArgumentType]


def test_only_held_out_questions_are_asked(settings: CalibrateSettings) -> None:
    from cotvalve.problems import held_out, load

    run(settings)
    text = {p.id: p for p in load("arithmetic", split="train")}
    with closing(RowStore(Path(settings.out) / "rows.sqlite")) as store:
        asked = {row["problem"] for row in store.rows()}
    assert len(asked) == 6
    assert all(held_out(text[name]) for name in asked)


def test_a_direction_that_is_not_ours_to_write_to_gets_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub's cache, or the package: the calibration stays in the run folder."""
    home = shutil.copytree(fetch("tiny-valve", DIRECTION_FILES), tmp_path / "cache")
    (home / "calibration.json").unlink(missing_ok=True)
    monkeypatch.setattr("cotvalve.calibrate.fetch", lambda *_: home)
    said = run(CalibrateSettings(direction="tiny-valve", data="arithmetic", limit=2, alphas=(0.0, 1.0), max_new_tokens=4, degenerate=100.0, device="cpu", out=str(tmp_path / "run")))
    assert (tmp_path / "run" / "calibration.json").exists()
    assert not (home / "calibration.json").exists()
    assert "copy it into the direction's folder" in said.read_text()


def test_whether_a_direction_has_seen_the_questions_is_told_by_what_it_was_trained_on(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    (tmp_path / "chains.jsonl").write_text('{"question": "1 + 1?", "answer": "2", "chains": []}\n')
    elsewhere = "which a direction made elsewhere may have seen"

    def trained(name: str, data: str, before: str = "") -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps({"verb": "train", "settings": {"data": data, "direction": before}}))
        return _origin(tmp_path / name, "gsm8k")

    assert elsewhere not in trained("named", "gsm8k")
    assert elsewhere not in trained("file", str(tmp_path / "mine.jsonl"))
    with gzip.open(tmp_path / "packed.jsonl.gz", "wb") as file:
        file.write((tmp_path / "mine.jsonl").read_bytes())
    assert elsewhere not in trained("packed", str(tmp_path / "packed.jsonl.gz"))
    assert elsewhere not in trained("mixed", str(tmp_path / "named"))
    assert elsewhere not in trained("on", "gsm8k", str(tmp_path / "named"))
    assert elsewhere in trained("chains", str(tmp_path / "chains.jsonl"))
    assert elsewhere in trained("hub", "owner/mixchain")
    assert elsewhere in trained("on-hub", "gsm8k", str(tmp_path / "hub"))
    assert elsewhere in _origin(tmp_path / "nowhere", "gsm8k")


def test_calibrating_without_a_direction_or_on_a_test_set_is_refused(settings: CalibrateSettings) -> None:
    with pytest.raises(SettingError, match="--direction"):
        run(settings.but(direction=""))
    with pytest.raises(SettingError, match="heldout"):
        run(settings.but(data="math500"))
    with pytest.raises(SettingError, match="tolerance"):
        settings.but(tolerance=-1.0)


def test_a_single_question_is_told_before_anything_is_loaded(settings: CalibrateSettings, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="1 question: a calibration needs 2 or more"):
        settings.but(limit=1)
    shutil.rmtree(tmp_path / "base")
    (tmp_path / "one.jsonl").write_text("".join(json.dumps({"question": f"{n} + 1?", "answer": str(n + 1)}) + "\n" for n in range(6)))  # one/5 is held out
    with pytest.raises(DataError, match="1 question: a calibration needs 2 or more"):
        run(settings.but(data=str(tmp_path / "one.jsonl")))
