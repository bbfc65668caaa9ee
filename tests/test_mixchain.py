"""Stage 2, and what a sampling run survives: what is kept and why, its files, kill -9 and a full disk."""

import gzip
import json
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet
import pytest
from transformers import AutoModelForCausalLM

from cotvalve import checkpoints, mixchain, problems
from cotvalve.direction import Card, Direction
from cotvalve.errors import DataError, SettingError
from cotvalve.mixchain import (
    MixSettings,
    Sampling,
    assemble,
    describe,
    is_mixchain,
    load,
    requests_for,
    row,
    save,
    short_chains,
)
from cotvalve.problems import arithmetic
from cotvalve.records import Json, Run, read_json
from cotvalve.types import Chain, Completion, Grade, MixChain, Problem, Request
from tests import models
from tests.test_records import small_disk

Command = Callable[..., tuple[int, str]]
PROBLEMS = [Problem(f"p{i}", f"question {i}?", str(i), solution=f"it is {i}") for i in range(4)]


def sampled(problem: int, text: str, tokens: int, alpha: float = 0.5, **changed: object) -> Json:
    return {
        "problem": f"p{problem}", "alpha": alpha, "sample": 0, "text": text, "tokens": tokens, "finish": "stop",
        "correct": True, **changed,
    }  # fmt: skip


# What is kept


def test_every_chain_has_one_fate_and_is_counted() -> None:
    rows = [
        sampled(0, "long", 30, 0.0),
        sampled(0, "short", 10, 1.0),
        sampled(0, "middle", 20, 0.5),
        sampled(0, "long", 30, 0.5),  # the same text again
        sampled(0, "no", 5, 1.0, correct=False),
        sampled(0, "and so on and", 99, 0.0, correct=False, finish="length"),
        sampled(0, "", 0, 0.0, correct=False, finish="error"),
        sampled(1, "long", 30, 0.0),  # the text of another question is no duplicate
        sampled(1, "no", 8, 1.0, correct=False),
        sampled(2, "a", 9, 0.0),
        sampled(2, "b", 9, 1.0),
        sampled(3, "cut at its answer", 50, 0.5, finish="length"),  # right as far as it goes, but truncated
    ]
    mix, report = assemble(rows, PROBLEMS, MixSettings(fewest=2))
    assert [m.problem.id for m in mix] == ["p0", "p2"]
    assert [(c.text, c.tokens, c.alpha) for c in mix[0].chains] == [("long", 30, 0.0), ("middle", 20, 0.5), ("short", 10, 1.0)]
    assert [c.text for c in mix[1].chains] == ["a", "b"]
    assert (report.questions, report.kept_questions, report.sampled, report.kept) == (4, 2, 12, 5)
    assert (report.wrong, report.truncated, report.failed, report.duplicates, report.few) == (2, 2, 1, 1, 1)
    fates = report.kept + report.wrong + report.truncated + report.failed + report.duplicates + report.few
    assert fates == report.sampled, "no chain is dropped in silence"
    assert report.by_alpha["0"] == {"sampled": 5, "right": 3, "kept": 2, "mean_tokens": 19.5, "right_tokens": 23.0}
    assert report.by_alpha["1"] == {"sampled": 4, "right": 2, "kept": 2, "mean_tokens": 9.5, "right_tokens": 9.5}
    assert list(report.by_alpha) == ["0", "0.5", "1"]


def test_the_same_chain_at_several_alphas_is_that_of_the_smallest() -> None:
    """Rows come by key, and as text "0.5" stands before "0" and "-1" before both: numbers decide, not text."""
    rows = [sampled(0, "same", 30, alpha) for alpha in (0.5, 1.0, 0.0)] + [sampled(0, "other", 10, 1.0)]
    (made,), report = assemble(rows, PROBLEMS, MixSettings())
    assert [(c.text, c.alpha) for c in made.chains] == [("same", 0.0), ("other", 1.0)]
    assert report.duplicates == 2
    assert (report.by_alpha["0"]["kept"], report.by_alpha["0.5"]["kept"]) == (1, 0)
    # All right ones have their length told where they were sampled: a dash for a position that others write alike would say nothing.
    assert [(table["mean_tokens"], table["right_tokens"]) for table in report.by_alpha.values()] == [(30.0, 30.0), (None, 30.0), (10.0, 20.0)]
    (made,), _ = assemble([sampled(0, "same", 30, -1.0), *rows], PROBLEMS, MixSettings())
    assert made.chains[0].alpha == -1.0


def test_a_question_needs_a_chain() -> None:
    with pytest.raises(SettingError, match="fewest has to be 1 or more"):
        MixSettings(fewest=0)


def test_chains_are_longest_first_by_tokens_not_by_text() -> None:
    rows = [sampled(0, "x" * 100, 10), sampled(0, "y", 50), sampled(0, "z" * 50, 20)]
    (made,), _ = assemble(rows, PROBLEMS, MixSettings())
    assert [c.tokens for c in made.chains] == [50, 20, 10]


def test_one_chain_is_enough_where_that_was_asked() -> None:
    mix, report = assemble([sampled(0, "a", 1)], PROBLEMS, MixSettings(fewest=1))
    assert (len(mix), report.few) == (1, 0)


def test_human_solutions_take_part_as_chains_of_their_own() -> None:
    human = {p.id: Chain(p.solution or "", 7, solution=0) for p in PROBLEMS[:2]}
    mix, report = assemble([sampled(0, "long", 30)], PROBLEMS, MixSettings(), human)
    assert [(c.text, c.alpha, c.solution) for c in mix[0].chains] == [("long", 0.5, None), ("it is 0", None, 0)]
    assert report.by_alpha["human"] == {"sampled": 2, "right": 2, "kept": 1, "mean_tokens": 7.0, "right_tokens": 7.0}
    assert list(report.by_alpha)[-1] == "human"


def test_a_solution_that_the_model_writes_itself_is_one_chain() -> None:
    """A dial that was learned from solutions writes them word for word: eq. 4 gave one text two lengths, a token apart, and two betas."""
    human = {p.id: Chain(p.solution or "", 7, solution=0) for p in PROBLEMS[:2]}
    (made,), report = assemble([sampled(0, "long", 30), sampled(0, "it is 0", 8, 1.0), sampled(1, "it is 1", 8)], PROBLEMS, MixSettings(), human)
    assert [(c.text, c.tokens, c.alpha) for c in made.chains] == [("long", 30, 0.5), ("it is 0", 8, 1.0)]
    assert (report.kept, report.few, report.duplicates) == (2, 1, 0)
    assert (report.by_alpha["human"]["right"], report.by_alpha["human"]["kept"]) == (2, 0)


def test_nothing_right_says_what_to_do() -> None:
    mix, report = assemble([sampled(0, "no", 5, correct=False)], PROBLEMS, MixSettings())
    assert (mix, report.kept, report.by_alpha["0.5"]["mean_tokens"]) == ([], 0, None)
    with pytest.raises(SettingError, match=r"sample more of them, or .*lower --fewest"):
        describe(mix)
    assert assemble([], [], MixSettings())[1].sampled == 0
    made = assemble([sampled(0, "a", 10), sampled(0, "b", 30), sampled(1, "c", 2), sampled(1, "d", 4)], PROBLEMS, MixSettings())[0]
    assert describe(made) == {"questions": 2, "chains": 4, "longest": 17, "shortest": 6}


@pytest.mark.parametrize(
    ("finish", "text", "correct"),
    [
        ("stop", "so \\boxed{2}", True),
        ("stop", "so \\boxed{3}", False),
        ("stop", "I do not know", False),
        ("length", "\\boxed{2} and then", True),
        ("length", "2 plus", False),
        ("error", "", False),
    ],
)
def test_a_row_keeps_truncation_apart_from_wrong(finish: str, text: str, correct: bool) -> None:
    done = Completion("p2|0.5|1", 0.5, text, 9, finish, 4, 3, "too long" if finish == "error" else "")  # pyright: ignore[reportArgumentType]
    made = row(PROBLEMS[2], done, 1)
    assert made["correct"] == correct
    assert (made["finish"], made["tokens"], made["reasoning_tokens"], made["prompt_tokens"]) == (finish, 9, 3, 4)
    assert (made["reason"] == "") == correct
    assert made["predicted"] == (None if finish == "error" or "boxed" not in text else text[text.index("{") + 1])
    if finish == "error":
        assert made["reason"] == "too long"
        assert not row(PROBLEMS[2], replace(done, text="\\boxed{2}"), 1)["correct"], "whatever had been written before it failed"


# Requests


def test_requests_are_every_problem_alpha_and_sample_with_seeds_of_their_own() -> None:
    how = Sampling(alphas="0,0.5", samples=2, temperature=0.7, prompt="plain", max_new_tokens=9, top_p=0.9)
    asked = list(requests_for(PROBLEMS, how, models.tokenizer()))
    assert [r.id for r in asked[:5]] == ["p0|0|0", "p0|0|1", "p0|0.5|0", "p0|0.5|1", "p1|0|0"]
    assert len(asked) == len({r.id for r in asked}) == len({r.seed for r in asked}) == 16
    assert {(r.max_new_tokens, r.temperature, r.top_p) for r in asked} == {(9, 0.7, 0.9)}
    assert asked[0].prompt == "<|im_start|>user\nquestion 0?<|im_end|>\n<|im_start|>assistant\n"
    # a row's seed is its own: it does not depend on what else is asked, and the run's seed changes all of them
    alone = list(requests_for(PROBLEMS[2:3], how.but(alphas="0.5"), models.tokenizer()))
    assert alone[1] == next(r for r in asked if r.id == "p2|0.5|1")
    other = list(requests_for(PROBLEMS, how.but(seed=1), models.tokenizer()))
    assert not {r.seed for r in asked} & {r.seed for r in other}
    # Where positions are compared they draw the same numbers: a question's samples differ, its positions do not.
    paired = list(requests_for(PROBLEMS, how, models.tokenizer(), paired=True))
    assert [r.id for r in paired] == [r.id for r in asked]
    assert len({r.seed for r in paired}) == 8
    assert [r.seed for r in paired[:2]] == [r.seed for r in paired[2:4]]


def test_requests_name_the_budget_that_a_prompt_asks_for() -> None:
    ten, twenty = (next(requests_for(PROBLEMS, Sampling(prompt="budget", budget=budget), models.tokenizer())).prompt for budget in (10, 20))
    assert ten != twenty == ten.replace("10", "20")


# Files


def test_parquet_round_trip(tmp_path: Path) -> None:
    mix = [
        MixChain(PROBLEMS[0], (Chain("lang é", 30, 0.0), Chain("kurz", 10, 1.0), Chain("it is 0", 3, None, 0))),
        MixChain(Problem("m", "?", "\\frac{1}{2}", "math"), (Chain("x", 5, 0.25),)),
    ]
    path = save(tmp_path, mix)
    for source in (path, tmp_path, str(tmp_path)):
        again = load(source, models.tokenizer())
        assert [m.chains for m in again] == [m.chains for m in mix]
        assert [(m.problem.id, m.problem.question, m.problem.answer, m.problem.kind) for m in again] == [
            (m.problem.id, m.problem.question, m.problem.answer, m.problem.kind) for m in mix
        ]
    assert is_mixchain(str(tmp_path))


AUTHORS: list[Json] = [
    {"question": "Ann has 2.", "answer": "She has 2.\n#### 2", "solution_0": "two", "solution_1": "it is two", "solution_2": "well, it is two",
     "correct_0": True, "correct_1": True, "correct_2": False},
    {"question": "Bob has 3.", "answer": "3", "solution_0": "three", "solution_1": None, "solution_2": "hm, he has three",
     "correct_0": 1, "correct_1": 0, "correct_2": "True"},
]  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet"])
def test_the_authors_columns_load(tmp_path: Path, kind: str) -> None:
    """question, answer, solution_0..4, correct_k: wrong and missing chains left out, lengths in our own tokens."""
    path = tmp_path / f"mix.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(each) + "\n" for each in AUTHORS))
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(each) + "\n" for each in AUTHORS).encode()))
    elif kind == "json":
        path.write_text(json.dumps(AUTHORS))
    else:
        plain = [{**each, **{k: str(v) for k, v in each.items() if k.startswith("correct")}} for each in AUTHORS]
        plain[1]["correct_1"], plain[0]["correct_2"] = "False", "False"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(plain), path)
    first, second = load(path, models.tokenizer())
    assert [(c.text, c.tokens, c.solution) for c in first.chains] == [("it is two", 9, 1), ("two", 3, 0)]
    assert [(c.text, c.tokens, c.solution) for c in second.chains] == [("hm, he has three", 16, 2), ("three", 5, 0)]
    assert (first.problem.answer, second.problem.answer) == ("2", "3")
    assert is_mixchain(str(path))


@pytest.mark.parametrize(
    ("name", "rows", "says"),
    [
        ("a.jsonl", [AUTHORS[0], {"answer": "1"}], r"a\.jsonl: row 2 has no column 'problem'"),
        ("a.jsonl", [{"question": "x"}], "row 1 has no column 'answer'"),
        ("a.jsonl", [{"question": "x", "answer": "1"}], "row 1 has neither 'chains' nor 'solution_0'"),
        ("a.jsonl", [{"question": "x", "answer": "1", "solution_0": "no", "correct_0": False}], "no right chain"),
        ("a.jsonl", [{"question": "x", "answer": "1", "solution_0": 7}], "row 1: solution_0 is 7, expected text"),
        ("a.jsonl", [{"question": "x", "answer": "1", "chains": [{"text": "t"}]}], "row 1: a chain is .*expected an object with text and tokens"),
        ("a.jsonl", [{"question": "x", "answer": "1", "chains": [{"text": None, "tokens": 3}]}], "row 1: a chain is .*expected an object with text and tokens"),
        ("a.jsonl", [{"question": "x", "answer": "1", "chains": 3}], "row 1: chains is 3, expected a list"),
        ("a.jsonl", [{"question": "x", "answer": "1", "chains": ["t"]}], "row 1: a chain is 't'"),
        ("a.jsonl", [{"question": "x", "answer": "1", "chains": [{"text": "t", "tokens": "many"}]}], "row 1: a chain is"),
        ("a.json", [{"question": "x"}], r"a\.json: expected a list of rows"),
        ("a.txt", [{}], "expected a run folder of `mix`"),
        ("a.parquet", [{}], "not readable as Parquet"),
    ],
)
def test_files_that_are_no_mixchain(tmp_path: Path, name: str, rows: list[Json], says: str) -> None:
    path = tmp_path / name
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    with pytest.raises(DataError, match=says):
        load(path, models.tokenizer())


def test_a_row_called_0_keeps_its_name(tmp_path: Path) -> None:
    """It was called 1, by its row's number, as the next one is by its own."""
    path = tmp_path / "mix.jsonl"
    path.write_text("".join(json.dumps({"id": number, **row}) + "\n" for number, row in enumerate(AUTHORS)))
    assert [mix.problem.id for mix in load(path, models.tokenizer())] == ["0", "1"]


def test_limo_s_sets_have_one_solution_and_the_answer_in_its_box(tmp_path: Path) -> None:
    """MixChain-C-LIMO: columns question and solution."""
    path = tmp_path / "limo.jsonl"
    path.write_text(json.dumps({"question": "What is 6 * 7?", "solution": "First \\boxed{41}? No: \\boxed{42}."}) + "\n")
    (mix,) = load(path, models.tokenizer())
    assert mix.problem.answer == "42"
    assert [chain.solution for chain in mix.chains] == [0]
    assert is_mixchain(str(path)), "a file of it was taken for problems, and refused for having no answer"


def test_mixchain_that_is_not_there() -> None:
    for name in ("runs/nowhere/at/all", "nowhere.parquet", "nowhere.jsonl"):
        with pytest.raises(DataError, match="no such file"):
            load(name, models.tokenizer())


def foreign(path: Path, questions: list[str]) -> Path:
    """A set in the authors' columns, as someone else numbers it."""
    rows = [{"question": q, "answer": "5", "solution_0": "five", "solution_1": "it is five"} for q in questions]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def test_questions_that_must_stay_unseen_are_left_out_of_a_set_from_elsewhere(
    tmp_path: Path, command: Command, caplog: pytest.LogCaptureFixture
) -> None:
    """Their ids are the other set's own, so they are known by their words; `train` never sees one."""
    free = [p.question for p in problems.training("arithmetic")[:4]]
    kept_back = [p.question for p in problems.load("arithmetic", split="heldout")[:2]]
    tests = [p.question for p in problems.load("arithmetic", split="test")[:3]]
    spelled = tests[0].upper().replace(" ", "  ")  # another edition of the same words
    path = foreign(tmp_path / "theirs.jsonl", [free[0], spelled, *kept_back, *tests[1:], *free[1:]])
    with caplog.at_level("WARNING", "cotvalve"):
        mix = load(path, models.tokenizer())
    assert [m.problem.question for m in mix] == free
    (told,) = caplog.messages
    assert "5 of 9 questions are in a test set or held out (arithmetic heldout 2, arithmetic test 3)" in told
    assert "\n" not in told
    models.save(models.llama(), tmp_path / "model")
    out = tmp_path / "out"
    assert command("train", "valve", "--model", str(tmp_path / "model"), "--data", str(path), "--device", "cpu", "--out", str(out))[0] == 0
    assert read_json(out / "train.json")["stages"][0]["examples"] == 4
    with pytest.raises(DataError, match=r"3 of 3 questions are in a test set .* none is left to learn from"):
        load(foreign(path, tests), models.tokenizer())


def test_our_own_mix_is_taken_as_it_is(tmp_path: Path) -> None:
    """Its questions were training questions when it was sampled; the folder says whose it is."""
    question = problems.load("arithmetic", split="test")[0].question
    save(tmp_path, [MixChain(Problem("p", question, "5"), (Chain("five", 3, 0.0),))])
    with pytest.raises(DataError, match="1 of 1 questions"):
        load(tmp_path, models.tokenizer())
    (tmp_path / "run.json").write_text('{"verb": "mix", "settings": {}, "facts": {}}')
    assert len(load(tmp_path, models.tokenizer())) == 1


def test_problems_are_not_taken_for_mixchain(tmp_path: Path) -> None:
    (tmp_path / "qa.jsonl").write_text('{"question": "1?", "answer": "1"}\n')
    assert not is_mixchain(str(tmp_path / "qa.jsonl"))
    assert not is_mixchain("gsm8k")
    (tmp_path / "second.jsonl").write_text(json.dumps({"question": "x", "answer": "1", "solution_1": "y", "solution_2": "z"}) + "\n")
    assert is_mixchain(str(tmp_path / "second.jsonl")), "the authors' sets need not hold the human solution"
    assert not is_mixchain("mine.jsonl.gz"), "problems may be gzipped; it was taken for chains, and refused as such"


def test_human_solutions_are_one_chain_each_in_the_models_words() -> None:
    mix = short_chains(PROBLEMS[:1], models.tokenizer(), thinking=False)
    text = "it is 0\nThe answer is \\boxed{0}."
    assert mix[0].chains == (Chain(text, len(text), solution=0),)
    (thought,) = short_chains(PROBLEMS[:1], models.tokenizer(), thinking=True)
    assert thought.chains[0].text == "<think>\nit is 0\n</think>\n\nThe answer is \\boxed{0}."
    with pytest.raises(DataError, match="p9: has no human-written solution"):
        short_chains([Problem("p9", "?", "1")], models.tokenizer(), thinking=False)


class Slowly:
    """An engine that counts what it has given, and stops after `last`."""

    def __init__(self, last: int = 99) -> None:
        self.given, self.last, self.third = 0, last, threading.Event()

    def facts(self) -> dict[str, str]:
        return {}

    def generate(self, requests: Iterable[Request], _progress: object = None) -> Iterator[Completion]:
        for request in requests:
            if self.given == self.last:
                raise KeyboardInterrupt
            self.given += 1
            if self.given == 3:
                self.third.set()
            yield Completion(request.id, request.alpha, f"It is \\boxed{{{request.id[1]}}}.", 9, "stop")


def asked(count: int) -> tuple[list[Problem], list[Request]]:
    some = [Problem(f"p{i}", "?", str(i)) for i in range(count)]
    return some, [Request(f"{p.id}|1|0", p.question, 1.0, 9) for p in some]


def test_the_engine_goes_on_while_a_chain_is_graded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first grade takes until the third chain has come: in the engine's own thread it would take for ever."""
    engine, found = Slowly(), mixchain.grade

    def late(problem: Problem, text: str, **how: bool) -> Grade:
        assert engine.third.wait(20)
        return found(problem, text, **how)

    monkeypatch.setattr(mixchain, "grade", late)
    with Run(tmp_path / "run", "mix", {}) as run:
        rows = mixchain.sample_rows(run, engine, {"": asked(5)})[""]  # pyright: ignore[reportArgumentType]
    assert [(row["problem"], row["correct"]) for row in rows] == [(f"p{i}", True) for i in range(5)]


def test_what_has_ended_is_kept_where_sampling_is_stopped(tmp_path: Path) -> None:
    with Run(tmp_path / "run", "mix", {}) as run:
        with pytest.raises(KeyboardInterrupt):
            mixchain.sample_rows(run, Slowly(last=3), {"": asked(5)})  # pyright: ignore[reportArgumentType]
        assert sorted(run.rows.keys()) == ["p0|1|0", "p1|1|0", "p2|1|0"]
        engine = Slowly()
        assert len(mixchain.sample_rows(run, engine, {"": asked(5)})[""]) == 5  # pyright: ignore[reportArgumentType]
        assert engine.given == 2


# Runs that are killed, and disks that are full


@pytest.fixture(scope="module")
def direction(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random direction on the embedded instruct model, small enough that it still answers."""
    model = AutoModelForCausalLM.from_pretrained(checkpoints.resolve("tiny"))
    wrapped = models.lora(model, targets=["q_proj", "v_proj"], by=0.09)
    factors = {name.replace(".default", ""): w for name, w in wrapped.named_parameters() if "lora_" in name}
    folder = tmp_path_factory.mktemp("direction")
    return Direction.from_peft(wrapped.peft_config["default"], factors, Card("tiny", "shorter")).save(folder)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight questions of the embedded world that may be trained on, as JSON lines."""
    path = tmp_path_factory.mktemp("data") / "qa.jsonl"
    rows = [{"id": f"q{i}", "question": p.question, "answer": p.answer} for i, p in enumerate(arithmetic.generate(3, 14, "validation"))]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    free = [p.id for p in problems.training(str(path))][:8]  # some ids are held out from training
    path.write_text("".join(json.dumps(each) + "\n" for each in rows if each["id"] in free))
    assert [p.id for p in problems.training(str(path))] == free
    return path


def mixing(direction: Path, questions: Path, out: Path) -> list[str]:
    return [
        "mix", "--model", "tiny", "--direction", str(direction), "--data", str(questions), "--limit", "8",
        "--alphas", "0,0.5,1", "--samples", "2", "--temperature", "1.3", "--max-new-tokens", "70", "--slots", "4", "--device", "cpu", "--seed", "5",
        "--fewest", "1", "--out", str(out),
    ]  # fmt: skip


def sweeping(direction: Path, questions: Path, out: Path) -> list[str]:
    return [
        "sweep", "--model", "tiny", "--direction", f"d={direction}", "--data", str(questions),
        "--alphas", "0,0.5,1", "--baselines", "shortcut", "--max-new-tokens", "70", "--slots", "4", "--device", "cpu", "--out", str(out),
    ]  # fmt: skip


def stored(out: Path) -> dict[str, Json]:
    """All rows of a run folder by key, read beside whoever writes it."""
    path = out / "rows.sqlite"
    if not path.exists():
        return {}
    with closing(sqlite3.connect(path, timeout=5)) as db:
        try:
            return {key: json.loads(value) for key, value in db.execute("SELECT key, value FROM rows")}
        except sqlite3.OperationalError:  # the table is not there yet
            return {}


@pytest.fixture(scope="module")
def whole(direction: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mix that nothing happened to."""
    flags = dict(zip(*[iter(mixing(direction, questions, tmp_path_factory.mktemp("mix") / "whole")[1:])] * 2, strict=True))
    return mixchain.run(MixSettings.read({name.removeprefix("--"): value for name, value in flags.items()}))


def assert_same_run(out: Path, whole: Path) -> None:
    rows = stored(out)
    assert rows == stored(whole)
    assert len(rows) == 48
    for name in ("mixchain.parquet", "mix.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_an_uninterrupted_mix(whole: Path) -> None:
    rows = stored(whole)
    assert len(rows) == 8 * 3 * 2
    report = read_json(whole / "mix.json")
    assert report["sampled"] == 48
    assert report["sampled"] == sum(report[n] for n in ("kept", "wrong", "truncated", "failed", "duplicates", "few"))
    assert report["kept"] > 0
    assert len({r["text"] for r in rows.values()}) > 12, "the samples differ"
    mix = load(whole, models.tokenizer())
    assert sum(len(m.chains) for m in mix) == report["kept"]
    kept = {(m.problem.id, c.text, c.tokens, c.alpha) for m in mix for c in m.chains}
    right = {(r["problem"], r["text"], r["tokens"], r["alpha"]) for r in rows.values() if r["correct"] and r["finish"] == "stop"}
    assert kept <= right
    assert {(i, t) for i, t, _, _ in kept} == {(i, t) for i, t, _, _ in right}
    assert all([c.tokens for c in m.chains] == sorted((c.tokens for c in m.chains), reverse=True) for m in mix)


def test_a_mix_that_is_killed_goes_on_and_no_row_is_lost_doubled_or_changed(
    direction: Path, questions: Path, whole: Path, tmp_path: Path, killed: Callable[..., str], command: Command
) -> None:
    out = tmp_path / "out"
    killed(["-m", "cotvalve", *mixing(direction, questions, out)], lambda: len(stored(out)) >= 10)
    before = stored(out)
    assert 10 <= len(before) < 48
    assert not (out / "mixchain.parquet").exists()
    assert command(*mixing(direction, questions, out))[0] == 0
    assert {key: stored(out)[key] for key in before} == before
    assert_same_run(out, whole)
    again = (out / "rows.sqlite").read_bytes()
    assert command(*mixing(direction, questions, out), "--engine", "generate", "--slots", "2")[0] == 0, "how it is run may change"
    assert_same_run(out, whole)
    assert (out / "rows.sqlite").read_bytes() == again


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    direction: Path, questions: Path, whole: Path, tmp_path: Path, command: Command
) -> None:
    out = tmp_path / "out"
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    with small_disk(180_000):
        code, said = command(*mixing(direction, questions, out))
    assert code == 2
    (line,) = [part for part in said.splitlines() if part.startswith("cotvalve: ")]
    assert "rows.sqlite: the disk is full" in line
    assert "run the same command again" in line
    assert "Traceback" not in said
    before = stored(out)
    assert 3 < len(before) < 48
    assert command(*mixing(direction, questions, out))[0] == 0
    assert {key: stored(out)[key] for key in before} == before
    assert_same_run(out, whole)
    # All rows are there, and only the export does not fit: what it held before stays.
    with small_disk(1000):
        code, said = command(*mixing(direction, questions, out))
    assert code == 2
    assert "the disk is full" in said
    assert_same_run(out, whole)


def test_the_folder_of_another_run_is_refused(direction: Path, questions: Path, whole: Path, command: Command) -> None:
    before = stored(whole)
    for changed, says in (
        (["--seed", "6"], "seed=5, this one has 6"),
        (["--samples", "3"], "samples=2, this one has 3"),
        (["--alphas", "0,0.5"], "alphas="),
        (["--limit", "9"], "limit=8, this one has 9"),
    ):
        code, said = command(*mixing(direction, questions, whole), *changed)
        assert code == 2
        assert says in said
        assert "another --out" in said
    code, said = command(*sweeping(direction, questions, whole))
    assert code == 2
    assert "holds a run of 'mix', not 'sweep'" in said
    assert stored(whole) == before


def test_a_sweep_that_is_killed_goes_on_to_the_same_tables(
    direction: Path, questions: Path, tmp_path: Path, killed: Callable[..., str], command: Command
) -> None:
    """Killed while the direction's chains are sampled, behind the plain model's and the baseline's."""
    assert command(*sweeping(direction, questions, tmp_path / "whole"))[0] == 0
    out = tmp_path / "out"
    killed(["-m", "cotvalve", *sweeping(direction, questions, out)], lambda: len(stored(out)) >= 20)
    before = stored(out)
    assert 20 <= len(before) < 32
    assert command(*sweeping(direction, questions, out))[0] == 0
    assert stored(out) == stored(tmp_path / "whole")
    assert len(stored(out)) == 8 * (1 + 1 + 2)
    assert {key: stored(out)[key] for key in before} == before
    assert (out / "rows.parquet").read_bytes() == (tmp_path / "whole" / "rows.parquet").read_bytes()
    points, expected = (read_json(folder / "points.json") for folder in (out, tmp_path / "whole"))
    assert points == expected
    assert [(p["system"], p["alpha"], p["problems"]) for p in points["points"]] == [
        ("plain model", None, 8), ("prompt: shortcut", None, 8), ("d", 0.0, 8), ("d", 0.5, 8), ("d", 1.0, 8),
    ]  # fmt: skip


def test_a_sweep_on_a_full_disk_goes_on_to_the_same_tables(
    direction: Path, questions: Path, tmp_path: Path, command: Command
) -> None:
    """Full while rows are written, then with all rows there: at its tables, its figures and its report."""
    assert command(*sweeping(direction, questions, tmp_path / "whole"))[0] == 0
    out = tmp_path / "out"

    def full(room: int) -> None:
        with small_disk(room):
            code, said = command(*sweeping(direction, questions, out))
        assert code == 2, said
        (line,) = [part for part in said.splitlines() if part.startswith("cotvalve: ")]
        assert "the disk is full" in line
        assert "run the same command again" in line
        assert "Traceback" not in said

    full(150_000)
    before = stored(out)
    assert 3 < len(before) < 32
    assert not (out / "points.json").exists()
    finished = [(out / "rows.parquet", 1_000), (out / "report.html", 15_000)]
    assert command(*sweeping(direction, questions, out))[0] == 0
    assert {key: stored(out)[key] for key in before} == before
    for path, room in finished:
        kept = path.read_bytes()
        assert len(kept) > room
        full(room)
        assert path.read_bytes() == kept, "what it held before stays"
    assert command(*sweeping(direction, questions, out))[0] == 0
    assert stored(out) == stored(tmp_path / "whole")
    assert len(stored(out)) == 8 * (1 + 1 + 2)
    for name in ("points.json", "rows.parquet"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not [path for path in out.iterdir() if path.name.startswith(".")], "nothing half written is left"


def test_training_on_a_full_disk_goes_on_too(tmp_path: Path, command: Command) -> None:
    """Checkpoints are several files by several libraries; whichever fails says the same line."""
    models.save(models.llama(), tmp_path / "model")
    rows = [{"question": f"{i}+1?", "answer": str(i + 1), "solution": f"{i}+1={i + 1}"} for i in range(6)]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))

    def train(out: str) -> list[str]:
        return [
            "train", "valve", "--model", str(tmp_path / "model"), "--data", str(tmp_path / "qa.jsonl"), "--rank", "2", "--batch", "2",
            "--checkpoint-every", "1", "--prompt", "plain", "--device", "cpu", "--learning-rate", "0.01", "--out", str(tmp_path / out),
        ]  # fmt: skip

    reached: list[bool] = []
    assert command(*train("whole"))[0] == 0
    # Up to 30,000 bytes hold no rows.sqlite; from there on a checkpoint breaks off in a file of another library's.
    for size in (2_000, 30_000, 34_000, 37_000, 40_000):
        with small_disk(size):
            code, said = command(*train("out"))
        stopped = bool(said) and "the disk is full" in said
        reached.append((tmp_path / "out" / "rows.sqlite").exists() and stopped)
        assert code == (2 if stopped else 0), said
        assert "Traceback" not in said
    assert any(reached), "a full disk was met while checkpoints were written"
    assert command(*train("out"))[0] == 0
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

