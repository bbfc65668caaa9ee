"""The three ways to train, on paper; and every recipe's train steps on a tiny model of its own architecture."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from cotvalve import mixchain, pipeline, plan, recipes, train
from cotvalve.architectures import Architecture, architecture
from cotvalve.errors import DataError, SettingError
from cotvalve.pipeline import VERBS, Recipe
from cotvalve.sweep import SweepSettings, named_directions
from cotvalve.train import TrainSettings
from cotvalve.types import Chain, MixChain, Problem
from cotvalve.valve import Valve
from cotvalve.verbs import ExtractSettings
from tests import models

RECIPES = sorted(path.stem for path in (Path(__file__).parent.parent / "recipes").glob("*.yaml"))
PAPER = [
    "llama-3.1-8b",
    "llama-3.2-1b-instruct",
    "qwen2.5-32b-instruct-limo",
    "qwq-32b-preview",
    "r1-distill-llama-8b",
]


def mix(*lengths: tuple[int, ...], columns: bool = False) -> list[MixChain]:
    """One question for each tuple of chain lengths, which are given longest first."""
    return [
        MixChain(
            Problem(f"q{i}", f"question {i}?", "1"),
            tuple(
                Chain(f"q{i} chain of {tokens}", tokens, solution=len(each) - 1 - rank if columns else None)
                for rank, tokens in enumerate(each)
            ),
        )
        for i, each in enumerate(lengths)
    ]


def lengths(stage: recipes.Stage) -> list[tuple[str, int]]:
    return [(example.problem.id, example.chain.tokens) for example in stage.examples]


# --- eq. 2 -----------------------------------------------------------------------------------------------------------


def test_valve_takes_the_shortest_chain_of_each_question_at_alpha_1() -> None:
    (stage,) = recipes.valve(mix((300, 200, 100), (50,), (80, 70)))
    assert lengths(stage) == [("q0", 100), ("q1", 50), ("q2", 70)]
    assert {example.alpha for example in stage.examples} == {1.0}


def test_valve_on_one_solution_is_the_authors_column_where_there_are_columns_and_else_the_rank() -> None:
    authors = mix((497, 387, 311, 280, 116), (300, 250, 200, 150, 100), columns=True)
    assert lengths(recipes.valve(authors, solution=1)[0]) == [("q0", 280), ("q1", 150)]
    ours = mix((497, 387, 311), (300, 250))
    assert lengths(recipes.valve(ours, solution=1)[0]) == [("q0", 387), ("q1", 250)]
    assert lengths(recipes.valve(ours, solution=2)[0]) == [("q0", 311)]


def test_one_solution_of_so_many_is_progressive_s_stage_and_has_every_question() -> None:
    """Table 6 and 7 on data without columns: by rank alone, solution 4 would be there for one question of three."""
    ours = mix((9, 8, 7, 6, 5, 4, 3), (50, 40), (30, 20, 10))
    stages = recipes.progressive(ours, stages=5)
    assert [recipes.valve(ours, solution=k, stages=5) for k in range(5)] == [[stage] for stage in stages]
    # Ranks 0, 1.5, 3, 4.5, 6 of seven chains, rounded to even; the ends are the longest and the shortest.
    assert [recipes.valve(ours, k, 5)[0].examples[0].chain.tokens for k in range(5)] == [9, 7, 6, 5, 3]
    assert lengths(recipes.valve(ours, 4, 5)[0]) == [("q0", 3), ("q1", 40), ("q2", 10)]
    assert len(recipes.valve(ours, solution=4)[0].examples) == 1
    for solution, count in ((5, 5), (-1, 5), (0, 1)):
        with pytest.raises(SettingError, match=f"solution is {solution} of {count} stages"):
            recipes.valve(ours, solution, count)
    with pytest.raises(SettingError, match="stages spreads ranks, but the data has solutions 2, 1, 0"):
        recipes.valve(mix((3, 2, 1), columns=True), 0, 3)


def test_a_human_chain_among_sampled_ones_is_not_a_column() -> None:
    """`mix --solutions` marks the human chain as solution 0; solution=0 then took two chains of a question."""
    (question,) = mix((300, 200, 100))
    chains = (*question.chains[:2], replace(question.chains[2], solution=0))
    (stage,) = recipes.valve([replace(question, chains=chains)], solution=0)
    assert lengths(stage) == [("q0", 300)]


def test_a_solution_nobody_has_is_refused() -> None:
    with pytest.raises(DataError, match="no question has a solution 5; the data has 2, 1, 0"):
        recipes.valve(mix((3, 2, 1), columns=True), solution=5)
    with pytest.raises(DataError, match="no question has a solution 3; the data has 0, 1, 2"):
        recipes.valve(mix((3, 2, 1)), solution=3)
    with pytest.raises(DataError, match="the data has none"):
        recipes.valve([], solution=0)


# --- eq. 3 and 4 -----------------------------------------------------------------------------------------------------


def test_beta_on_paper() -> None:
    # eq. 4 with m_min 100 and m_max 300: 1 - (m - 100) / 200
    assert [recipes.beta(m, 100, 300) for m in (100, 150, 200, 280, 300)] == [1.0, 0.75, 0.5, pytest.approx(0.1), 0.0]
    assert recipes.beta(100, 100, 100) is None


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=12).map(lambda found: tuple(sorted(found, reverse=True))))
def test_beta_falls_with_length_and_stays_between_0_and_1(found: tuple[int, ...]) -> None:
    question = mix(found)
    if len(set(found)) == 1:
        with pytest.raises(DataError, match=r"eq\. 4 needs chains of different lengths"):
            recipes.plus(question)
        return
    (stage,) = recipes.plus(question)
    alphas = [example.alpha for example in stage.examples]
    assert alphas == sorted(alphas)
    assert all(0 < alpha <= 1 for alpha in alphas)
    assert alphas[-1] == 1.0
    assert len(alphas) + stage.skipped == len(found)
    assert stage.skipped == found.count(found[0])


def test_beta_is_per_question_and_not_per_column_or_data_set() -> None:
    """A public port scaled by the lengths of the whole set: q1's chains would all be near beta 1 here."""
    (stage,) = recipes.plus(mix((300, 200, 100), (30, 25, 20, 10)))
    assert [(e.problem.id, e.chain.tokens, e.alpha) for e in stage.examples] == [
        ("q0", 200, 0.5), ("q0", 100, 1.0), ("q1", 25, 0.25), ("q1", 20, 0.5), ("q1", 10, 1.0),
    ]  # fmt: skip
    # The longest chain of each: beta 0, no gradient.
    assert stage.skipped == 2


def test_questions_with_equal_chains_are_counted_and_skipped_not_guessed() -> None:
    (stage,) = recipes.plus(mix((50, 50, 50), (9,), (40, 40, 20)))
    assert [(e.problem.id, e.alpha) for e in stage.examples] == [("q2", 1.0)]
    assert stage.skipped == 3 + 1 + 2


# --- section 3.3 -----------------------------------------------------------------------------------------------------


def test_a_stage_is_one_column_over_all_questions_long_to_short() -> None:
    """A public port sorted all chains by length and cut equal buckets: its stages held different questions."""
    stages = recipes.progressive(mix((497, 387, 311, 280, 116), (90, 80, 70, 60, 50), columns=True))
    assert [stage.name for stage in stages] == [f"solution-{k}" for k in (4, 3, 2, 1, 0)]
    assert [lengths(stage) for stage in stages] == [
        [("q0", 497), ("q1", 90)],
        [("q0", 387), ("q1", 80)],
        [("q0", 311), ("q1", 70)],
        [("q0", 280), ("q1", 60)],
        [("q0", 116), ("q1", 50)],
    ]
    assert all(example.alpha == 1 for stage in stages for example in stage.examples)


def test_fewer_stages_on_columns_are_the_rows_of_table_7() -> None:
    authors = mix((497, 387, 311, 280, 116), columns=True)
    assert [stage.name for stage in recipes.progressive(authors, stages=4)] == [f"solution-{k}" for k in (4, 3, 2, 1)]
    for wrong in (0, 6):
        with pytest.raises(SettingError, match=f"stages is {wrong}, but the data has 5 solutions"):
            recipes.progressive(authors, stages=wrong)


def test_a_question_without_a_column_is_left_out_of_that_stage_only() -> None:
    first, second = mix((5, 4, 3), (30, 20, 10), columns=True)
    stages = recipes.progressive([first, replace(second, chains=second.chains[::2])])
    assert [lengths(stage) for stage in stages] == [[("q0", 5), ("q1", 30)], [("q0", 4)], [("q0", 3), ("q1", 10)]]


def test_without_columns_ranks_are_spread_evenly_over_the_stages() -> None:
    stages = recipes.progressive(mix((9, 8, 7, 6, 5, 4, 3, 2, 1), (50, 40, 30, 20, 10), (300, 100), (7,)), stages=5)
    by_question = [[stage.examples[i].chain.tokens for stage in stages] for i in range(4)]
    assert by_question[0] == [9, 7, 5, 3, 1]
    assert by_question[1] == [50, 40, 30, 20, 10]
    assert by_question[2][0] == 300
    assert by_question[2][-1] == 100
    assert by_question[3] == [7] * 5
    assert [stage.name for stage in stages][::4] == ["stage-1-of-5", "stage-5-of-5"]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(2, 7))
def test_every_stage_has_every_question_once_and_none_gets_longer(chains: list[int], count: int) -> None:
    stages = recipes.progressive(mix(*(tuple(range(n, 0, -1)) for n in chains)), stages=count)
    assert len(stages) == count
    for stage in stages:
        assert [example.problem.id for example in stage.examples] == [f"q{i}" for i in range(len(chains))]
    for i, n in enumerate(chains):
        tokens = [stage.examples[i].chain.tokens for stage in stages]
        assert tokens == sorted(tokens, reverse=True)
        assert (tokens[0], tokens[-1]) == (n, 1 if n > 1 else n)


def test_one_stage_is_no_compression() -> None:
    with pytest.raises(SettingError, match="stages is 1; progressive compression needs two or more"):
        recipes.progressive(mix((300, 200, 100)), 1)


def test_the_number_of_stages_is_the_largest_number_of_chains() -> None:
    assert len(recipes.progressive(mix((3, 2, 1), (2, 1)))) == 3
    for empty in (mix((3,), (2,)), []):
        with pytest.raises(DataError, match="two chains or more"):
            recipes.progressive(empty)


def test_whatever_is_learned_otherwise_has_another_fingerprint() -> None:
    """A run that goes on with other examples than it began with is told from the same run."""
    one = recipes.Example(Problem("q", "3 + 4?", "7"), Chain("it is 7", 5), 0.5)
    others = [
        replace(one, alpha=1.0), replace(one, weight=-1.0), replace(one, ended=False), replace(one, chain=Chain("7", 2)),
        *(replace(one, problem=replace(one.problem, **field)) for field in ({"id": "r"}, {"question": "4 + 3?"}, {"answer": "8"})),
    ]  # fmt: skip
    stages = [[recipes.Stage(name, examples)] for name, examples in [("a", (one,)), ("b", (one,)), *(("a", (other,)) for other in others)]]
    stages += [[recipes.Stage("a", (one, others[0]))], [recipes.Stage("a", (others[0], one))], [*stages[0], *stages[1]]]
    assert len({recipes.fingerprint(made) for made in stages}) == len(stages)


# --- the recipes in recipes/ -----------------------------------------------------------------------------------------


def test_there_is_one_for_each_model_of_the_paper_and_two_of_ours() -> None:
    assert sorted([*PAPER, "qwen2.5-coder-1.5b", "tiny"]) == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_reads_and_says_what_it_is(name: str) -> None:
    recipe = pipeline.read(name)
    assert recipe.name == name
    assert recipe.about
    assert recipe.steps[-1].verb == "sweep"
    for step in recipe.steps:
        assert step.verb in VERBS
        if isinstance(step.settings, ExtractSettings):
            # `rank` under `common` is that of the LoRA; it must not make a pair's task vector low rank in silence.
            assert step.settings.rank is None


# paper's appendix A.2: rank, lora_alpha, learning rate, batch, weight decay, epochs by step
STATED = {
    ("qwq-32b-preview", "valve"): (2, 8, 1e-5, 64, 0.01, 5),
    ("qwq-32b-preview", "progressive"): (2, 8, 1e-5, 64, 0.01, 1),
    ("qwq-32b-preview", "prm12k"): (2, 8, 1e-5, 64, 0.01, 1),
    ("llama-3.1-8b", "valve"): (32, 64, 4e-5, 64, 0.01, 8),
    ("llama-3.1-8b", "progressive"): (32, 64, 4e-5, 64, 0.01, 2),
    ("llama-3.2-1b-instruct", "valve"): (32, 64, 4e-5, 8, 0.01, 4),
    ("llama-3.2-1b-instruct", "dora"): (32, 64, 4e-5, 8, 0.01, 5),
    ("llama-3.2-1b-instruct", "progressive"): (32, 64, 4e-5, 64, 0.01, 2),
    ("llama-3.2-1b-instruct", "sft"): (32, 64, 1e-5, 64, 0.01, 8),
    ("llama-3.2-1b-instruct", "sft-full"): (None, None, 1e-5, 64, 0.01, 6),
    # Batch and epochs alone are stated for this model; the rest is that of LLaMA-3.1-8B.
    ("r1-distill-llama-8b", "valve"): (32, 64, 4e-5, 128, 0.01, 5),
    ("qwen2.5-coder-1.5b", "plus"): (4, 16, 1e-4, 64, 0.01, 1),
}


@pytest.mark.parametrize(("name", "step"), STATED)
def test_hyper_parameters_are_the_paper_s(name: str, step: str) -> None:
    s = next(found.settings for found in pipeline.read(name).steps if found.name == step)
    assert isinstance(s, TrainSettings)
    rank, lora_alpha = (None, None) if s.full else (s.rank, s.lora_alpha)
    assert (rank, lora_alpha, s.learning_rate, s.batch, s.weight_decay, s.epochs) == STATED[name, step]
    assert (s.full, s.dora) == (step == "sft-full", step == "dora")
    assert s.schedule == "cosine"


# A.2's "maximum number of new tokens", by sweep; K is 1,000 for one model and 1,024 for the other, as the recipes say.
NEW_TOKENS = {
    ("qwq-32b-preview", "sweep"): 4192,
    ("qwq-32b-preview", "aime"): 8192,
    ("llama-3.1-8b", "sweep"): 2048,
    ("llama-3.2-1b-instruct", "sweep-dora"): 2048,
    ("llama-3.2-1b-instruct", "sweep"): 2048,
    ("r1-distill-llama-8b", "sweep"): 30_000,
    ("r1-distill-llama-8b", "aime"): 30_000,
    ("qwen2.5-32b-instruct-limo", "sweep"): 15_360,
}


def test_the_longest_answers_are_the_paper_s() -> None:
    sweeps = {
        (name, step.name): step.settings.max_new_tokens
        for name in PAPER
        for step in pipeline.read(name).steps
        if isinstance(step.settings, SweepSettings)
    }
    assert sweeps == NEW_TOKENS


@pytest.mark.parametrize("name", PAPER)
def test_every_direction_a_recipe_learns_is_swept(name: str) -> None:
    recipe = pipeline.read(name)
    swept = {folder for s in recipe.steps if isinstance(s.settings, SweepSettings) for folder in named_directions(s.settings.direction).values()}
    assert swept == {s.settings.out for s in recipe.steps if isinstance(s.settings, TrainSettings)}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_can_be_planned(name: str) -> None:
    recipe = pipeline.read(name)
    said = plan.describe(recipe)
    assert all(f"\n{step.name} " in said for step in recipe.steps)


def test_limo_is_full_fine_tuning_in_two_stages() -> None:
    steps = {step.name: step.settings for step in pipeline.read("qwen2.5-32b-instruct-limo").steps}
    limo, short, sampled = steps["limo"], steps["short"], steps["mix"]
    assert isinstance(limo, TrainSettings)
    assert isinstance(short, TrainSettings)
    assert isinstance(sampled, mixchain.MixSettings)
    assert (limo.full, limo.batch, limo.learning_rate, limo.epochs, limo.max_length) == (True, 4, 5e-6, 10, 16384)
    assert (short.full, short.batch, short.learning_rate, short.epochs, short.weight_decay) == (True, 32, 5e-6, 5, 0.01)
    assert sampled.alphas == (0.6, 0.8)


# --- each recipe's architecture --------------------------------------------------------------------------------------


def of(recipe: Recipe, name: str) -> Architecture:
    return architecture(name, recipe.sizes.get("models") or {})


def small(shape: Architecture, scaled_rope: bool) -> PreTrainedModel:
    """A tiny random model of the same family, with the same ties, and Llama 3's scaled rotary positions."""
    model = models.MAKERS[shape.family](tied=shape.tied)
    assert (shape.heads > shape.kv_heads) == (model.config.num_attention_heads > model.config.num_key_value_heads)
    if not scaled_rope:
        return model
    config = model.config
    config.rope_parameters = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    scaled = type(model)(config)
    scaled.load_state_dict(model.state_dict())
    return scaled.eval()


def data_for(settings: TrainSettings, folder: Path) -> TrainSettings:
    """The step's kind of data with three questions: a data set, a file, a run of `mix`, or the authors' columns."""
    chains = ["So we add. 4 + 3 = 7. We check: 7 - 3 = 4. ", "We add: 4 + 3 = 7. ", "4 + 3 = 7. ", "7. ", ""]
    texts = [chain + "The answer is \\boxed{7}." for chain in chains]
    questions = [f"Ann has 4 apples and gets 3 from friend {i}. How many?" for i in range(3)]
    folder.mkdir()
    if settings.data == "gsm8k":
        (folder / "gsm8k").mkdir()
        rows = [{"question": question, "answer": "4 + 3 = <<4+3=7>>7.\n#### 7"} for question in questions]
        (folder / "gsm8k" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return settings.but(data_dir=str(folder))
    if settings.data.endswith(".jsonl"):
        rows = [{"question": question, "solution": "4 + 3 = \\boxed{7}", "answer": "7"} for question in questions]
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return settings.but(data=str(folder / "rows.jsonl"))
    if settings.data.startswith("horseee/"):
        columns = {f"solution_{k}": text for k, text in enumerate(reversed(texts))}
        rows = [{"question": q, "answer": "#### 7", **columns, **{f"correct_{k}": True for k in range(1, 5)}} for q in questions]
        (folder / "rows.json").write_text(json.dumps(rows))
        return settings.but(data=str(folder / "rows.json"))
    sampled = [
        MixChain(Problem(f"gsm8k/train/{i}", q, "7"), tuple(Chain(t, len(t) + 1, 1 - 0.2 * k) for k, t in enumerate(texts)))
        for i, q in enumerate(questions)
    ]
    mixchain.save(folder, sampled)
    return settings.but(data=str(folder))


STEPS = [
    (name, step.name)
    for name in RECIPES
    if name != "tiny"  # runs whole, shrunk, in test_pipeline.py: test_the_demo_s_recipe_runs_whole_and_goes_on
    for step in pipeline.read(name).steps
    if step.verb == "train"
]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("name", "step"), STEPS)
def test_every_train_step_learns_on_its_own_architecture(name: str, step: str, tmp_path: Path) -> None:
    recipe = pipeline.read(name)
    settings = next(found.settings for found in recipe.steps if found.name == step)
    assert isinstance(settings, TrainSettings)
    base = small(of(recipe, settings.model), scaled_rope="llama" in name)
    where = str(models.save(base, tmp_path / "base"))
    # Two passes over three questions are two steps a stage: the first warms up from a learning rate of 0.
    settings = data_for(settings, tmp_path / "data").but(
        model=where, out=str(tmp_path / "out"), epochs=2, dtype="float32", device="cpu", max_length=512
    )
    made = train.run(settings)
    report = json.loads((made / "train.json").read_text())
    stages = {"valve": 1, "plus": 1, "progressive": settings.stages}[settings.recipe]
    assert len(report["stages"]) == stages
    assert all(stage["steps"] == 2 and not stage["steps_skipped"] and not stage["too_long"] for stage in report["stages"])
    valve = Valve.load(where, made, dtype="float32", device="cpu")
    # One batch holds different alphas of a LoRA alone.
    assert valve.rows == (not settings.full and not settings.dora)
    assert valve.direction is not None
    assert valve.direction.card.toward == settings.toward

    plain = models.logits(base)
    with valve.at(0) as model:
        assert torch.equal(models.logits(model), plain)
    with valve.at(1) as model:
        assert not torch.equal(models.logits(model), plain)
    closed, opened = valve.generate("Ann has 4 apples. How many?", alpha=[0.0, 1.5], max_new_tokens=6)
    assert (closed.alpha, opened.alpha) == (0.0, 1.5)
    assert 1 <= closed.tokens <= 6
    untouched = Valve.load(where, dtype="float32", device="cpu").generate("Ann has 4 apples. How many?", max_new_tokens=6)
    assert closed.text == untouched[0].text
