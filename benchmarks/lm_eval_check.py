r"""The answers of a sweep graded a second time, by lm-evaluation-harness itself: accuracies side by side, each difference explained.

    python -m venv runs/lm-eval-venv
    runs/lm-eval-venv/bin/pip install "lm-eval[math]==0.4.13" safetensors pooch
    runs/lm-eval-venv/bin/python benchmarks/lm_eval_check.py results/reproduction/0/main-gsm8k --alphas 0.5 1 > lm-eval.md

In an environment of its own, since lm-eval pins other packages than cotvalve does (no torch is needed). Takes run folders of
`cotvalve sweep`; data sets gsm8k and math500, other rows are passed over and counted. Ends with 1 when a difference is left unexplained.

Nothing of lm-eval is written again here: its evaluator runs its own task files (`VIEWS`) on documents that carry the stored
completion, with a model that gives this completion back. Stop strings, filters, regular expressions and metrics are its own.
What differs from an lm-eval run is the prompt: the sweep asked for the answer in \boxed{}, which its GSM8K tasks do not ask for and do
not read. Hence two kinds of views: its GSM8K filters as they are, and its graders that read boxes (aime24's last_boxed_only_string
and is_equiv, which are those of hendrycks_math; minerva_math's math_verify). Thinking is cut off at '</think>', lm-eval's think_end_token.
A gold answer that is a number is given to minerva_math as the solution `$\boxed{gold}$`.

Verdicts are kept (`--verdicts`), so that the next run is quick: math_verify takes a tenth of a second for each text.
"""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cotvalve import problems, records  # noqa: E402
from cotvalve.answers import boxes, find, visible  # noqa: E402
from cotvalve.baselines import PLAIN  # noqa: E402
from cotvalve.errors import CotvalveError  # noqa: E402
from cotvalve.grading import TRUNCATED, grade  # noqa: E402
from cotvalve.mathanswers import NO_BASE  # noqa: E402
from cotvalve.types import Grade, Problem  # noqa: E402
from cotvalve.values import Unreadable, number, same_number  # noqa: E402

AIM = 0.5
"""Points that an accuracy may differ by."""
CHUNK = 200


@dataclass(frozen=True, slots=True)
class View:
    """One verdict of lm-eval on a text."""

    name: str
    task: str
    """Its file under lm_eval/tasks, without '.yaml'."""
    verdict: str
    """The filter or, where the task has none, the metric."""
    reads: str
    """How it finds and compares the answer."""
    sets: tuple[str, ...]


BOTH = ("gsm8k", "math500")
VIEWS = (
    View("strict-match", "gsm8k/gsm8k", "strict-match", "the first number behind '#### '; equal as a string", ("gsm8k",)),
    View("flexible-extract", "gsm8k/gsm8k", "flexible-extract", "the last number of the text, box or not; equal as a string", ("gsm8k",)),
    View("cot strict-match", "gsm8k/gsm8k-cot-zeroshot", "strict-match", "the first 'The answer is N.'; equal as a string", ("gsm8k",)),
    View("boxed", "aime/aime24", "exact_match", "the last box, without one the whole text (or from its first to its last $); is_equiv: equal as strings after hendrycks_math's rewriting", BOTH),
    View("math_verify", "minerva_math/minerva_math500", "math_verify", "what math-verify finds in the whole text, the last box first; equal by algebra", BOTH),
    View("minerva exact_match", "minerva_math/minerva_math500", "exact_match", "behind 'Final Answer: The final answer is'; equal by sympy", BOTH),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Seen:
    """One text on which cotvalve and one view of lm-eval differ."""

    text: str
    gold: Problem
    ours: Grade
    """If this is right, lm-eval says wrong; if wrong, lm-eval says right."""
    read: str
    """What lm-eval read as the answer; '[invalid]' or empty when nothing."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A class of differences: what happens, and why who is right."""

    what: str
    verdict: str


KINDS = {
    "mark": Kind("the text has not the mark that this filter looks for", "cotvalve: the prompt asked for a box, not for this mark"),
    "behind": Kind("a number stands behind the answer ('... \\boxed{2} cows to produce 25 liters')", "cotvalve: the last number is not what the sentence gives as its answer"),
    "no box": Kind("no box in the text; lm-eval then compares the text itself", "cotvalve: 'The answer is 5.' and '... = 7 pieces' give the answer"),
    "first": Kind("'The answer is' stands there more than once; the filter takes the first", "cotvalve: 'The answer is 15-12 = 3. The answer is 3.' answers 3, not 15"),
    "earlier": Kind("'The answer is' stands there with another number, and the text goes on to a box", "cotvalve: the box, which the prompt asked for, is the last word"),
    "computed": Kind("'The answer is 7/20 * 100 = 35%.'; the filter takes the number that the computation begins with", "cotvalve: the answer is what it ends with"),
    "spelling": Kind("the same number in another spelling (42.00 and 42, 50% and 50, 6th and 6)", "cotvalve: lm-eval compares strings"),
    "expression": Kind("the same expression in another spelling", "cotvalve: lm-eval compares strings"),
    "words": Kind("words beside the number in the box", "cotvalve: units are no part of a GSM8K answer"),
    "silent": Kind("words and no number in the box ('\\boxed{\\text{We can't determine it}}'); the last number before it happens to be the gold answer", "cotvalve: no answer is given"),
    "cut": Kind("the token budget cut the text; the last number before the cut happens to be the gold answer", "cotvalve: no answer had been given (its rule for truncated texts)"),
    "chance": Kind("the answer given is another; the last number of the sentence behind it happens to be the gold answer", "cotvalve: the answer given is wrong"),
    "part": Kind("the answer given is another; a part of it is the gold answer (20 in 1/20, 2 in 2:20)", "cotvalve: the answer given is wrong"),
    "hour": Kind("the answer is a full hour, 2:00 pm, and the gold answer its number", "cotvalve: it is the hour that was asked for"),
    "base": Kind("the base of a numeral is left out (4210 for 4210_5)", "cotvalve: as hendrycks_math, which compares strings; math-verify drops the base"),
    "choice": Kind("the choice stands there without a box ('The answer is (C).')", "cotvalve: it is the answer; math-verify reads the formulas around it"),
    "unboxed": Kind("no box in the text; math-verify takes a formula that stands elsewhere", "cotvalve: the last sentence gives the answer (but for math500's prealgebra/65, where it names the gold number by chance)"),
    "percent": Kind("a percent sign in the box, for a question that asks how many percent", "cotvalve: 20% is 20 of them; math-verify makes it 1/5"),
    "several": Kind("several boxes; math-verify makes a set of them", "cotvalve: the last box counts, as for hendrycks_math"),
    "remark": Kind("no box; the answer stands in a formula or a sentence, and the text ends with a remark that has another number", "lm-eval"),
    "heading": Kind("no box; the sentence below 'Final Answer' has two numbers, and cotvalve takes the first", "lm-eval"),
    "thousands": Kind("the thousands of a number stand apart ('\\boxed{9 500}')", "cotvalve: it is one number; math-verify multiplies"),
    "repeated": Kind("one value several times in one box ('\\boxed{1, 1, 1}'); math-verify makes a set of it", "open: the question has one value, and the answer names it for each case"),
    "unit": Kind("text in the box ('\\boxed{5 \\text{ and } 1}'); hendrycks_math drops it with all behind it, as a unit", "cotvalve: two values where one is right"),
    "sum": Kind("a sum stands in the box ('\\boxed{240 + 56} = 296'); math-verify adds it up", "open: the number was to be in the box, and stands behind it"),
    "apart": Kind("two numbers in one box ('\\boxed{86 42}'); math-verify adds them up as if they were a mixed number", "cotvalve: the sum that was asked for is not given"),
    "inequality": Kind("an inequality for an interval (x > 5 for (5, \\infty))", "cotvalve: it is the same set"),
    "other": Kind("unexplained", "to be looked at"),
}  # fmt: skip


def explain(view: str, seen: Seen) -> str:
    """The class of a difference, a key of KINDS."""
    boxed = boxes(_visible(seen.text))
    if not seen.ours.correct:
        return _only_theirs(view, seen)
    if view == "minerva exact_match":
        return "other" if "Final Answer: The final answer is" in seen.text else "mark"
    if view in ("strict-match", "cot strict-match") and seen.read in ("", "[invalid]"):
        return "mark"
    if view == "boxed" and not boxed:
        return "no box"
    if view == "cot strict-match" and seen.text.count("The answer is ") > 1:
        return "first"
    if view == "cot strict-match" and boxed and not _same(seen.gold.answer, seen.read):
        return "earlier"
    if view == "cot strict-match" and re.search(r"The answer is [^=\n]*=", seen.text):
        return "computed"
    if view == "boxed":
        return "spelling" if seen.gold.kind == "number" else "expression"
    if view == "math_verify" and not boxed and re.fullmatch(r"\\text\{\([A-Z]\)\}|\([A-Z]\)", seen.gold.answer):
        return "choice"
    if view == "math_verify" and re.fullmatch(r"\S{0,2}\d{1,3}( \d{3})+", seen.ours.predicted or ""):
        return "thousands"
    if view == "math_verify" and not boxed:
        return "unboxed"
    if view == "math_verify" and "%" in (seen.ours.predicted or "") and "%" not in seen.gold.answer:
        return "percent"
    if view == "math_verify" and len(boxed) > 1:
        return "several"
    if view == "math_verify" and re.search(r"\^\{?\\(?:mathrm|text)\{(?:st|nd|rd|th)\}", seen.ours.predicted or ""):
        return "spelling"
    if view == "math_verify" and re.search(r"[<>]|\\[lg]eq?\b", seen.ours.predicted or "") and seen.gold.answer[0] in "([":
        return "inequality"
    if view == "math_verify" and re.fullmatch(r"\d+ [a-z]+", seen.ours.predicted or ""):
        return "words"
    if _same(seen.gold.answer, seen.read):
        return "spelling"
    if view == "flexible-extract" and _behind(seen):
        return "behind"
    return "hour" if re.match(r"\d{1,2}:00\b", seen.ours.predicted or "") else "other"


def _only_theirs(view: str, seen: Seen) -> str:
    if seen.ours.reason == TRUNCATED:
        return "cut"
    if seen.ours.reason == NO_BASE:
        return "base"
    if view == "boxed" and re.search(r"\\text\{ ", seen.ours.predicted or ""):
        return "unit"
    given, read = seen.ours.predicted, seen.read.split(";")[0].strip(".$ ")
    if given and given.count(",") and {part.strip() for part in given.split(",")} == {seen.gold.answer}:
        return "repeated"
    if view == "math_verify" and (parts := re.fullmatch(r"\d+( \d+| ?\+ ?\d+)", given or "")):
        return "sum" if "+" in parts[1] else "apart"
    if given is None or not _same(seen.gold.answer, read):
        return "other"
    text = _visible(seen.text)
    boxed = boxes(text)
    if boxed and not re.search(r"\d", given) and re.search(r"(?<![\\A-Za-z])[A-Za-z]{2,}", given):
        return "silent"
    whole, last = re.escape(read), text.strip().rpartition("\n")[2]
    if re.search(rf"(?<!\d){whole}(?!\d)", given) or re.search(rf"(?<![\d:]){whole}:\d\d", last):
        return "part"
    if not boxed and "Final Answer" in seen.text:
        return "heading"
    if _behind(seen):
        return "chance"
    # Anything else without a box may be chance as well: a remark stands behind what the text came to.
    return "remark" if view == "math_verify" and not boxed and re.search(rf"=\s*\\?\$?{whole}(?!\d)", text) else "other"


def _visible(text: str) -> str:
    try:
        return visible(text)
    except Unreadable:
        return ""


def _same(gold: str, read: str) -> bool:
    try:
        return same_number(number(gold), number(read.rstrip(".,")))
    except Unreadable:
        return False


def _behind(seen: Seen) -> bool:
    """True when the last thing lm-eval read stands behind the answer that the text gives."""
    text = _visible(seen.text)
    found = find(text, seen.gold.kind)
    given = [each.start() for each in re.finditer(rf"(?<!\d){re.escape(found.text)}(?!\d)", text)] if found else []
    return bool(given) and text.rfind(seen.read) > given[-1]


def document(task: str, problem: Problem, text: str) -> dict[str, str]:
    """The problem as a row of the task's own data set, and the completion with it."""
    if task.startswith("gsm8k/"):
        return {
            "question": problem.question,
            "answer": f"{problem.solution}\n#### {problem.answer}",
            "completion": text,
        }
    if task.startswith("aime/"):
        return {"Problem": problem.question, "Answer": problem.answer, "completion": text}
    solution = problem.solution if problem.kind == "math" else f"$\\boxed{{{problem.answer}}}$"
    return {"problem": problem.question, "solution": solution or "", "completion": text}


def quiet() -> None:
    """Readies a worker: no network, no warnings, no progress bars, and no complaints of git, which lm-eval asks for a commit."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.disable(logging.WARNING)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)


def judge(task: str, documents: list[dict[str, str]]) -> list[dict[str, Any]]:
    """What lm-eval's own task says of each document: {filter or metric: [right, what the filter read]}."""
    import datasets
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.utils import postprocess_generated_text
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    class Replay(LM):
        """A model that says what was said."""

        def loglikelihood(self, requests: Any) -> Any:
            raise NotImplementedError

        def loglikelihood_rolling(self, requests: Any) -> Any:
            raise NotImplementedError

        def generate_until(self, requests: Any) -> list[str]:
            return [
                postprocess_generated_text(each.doc["completion"], each.args[1]["until"], "</think>")
                for each in requests
            ]

    datasets.disable_progress_bars()
    config = load_yaml(Path(str(lm_eval.__file__)).parent / "tasks" / f"{task}.yaml", resolve_func=True)
    data = {config["test_split"]: datasets.Dataset.from_list(documents)}
    config.update(
        custom_dataset=lambda **_: data, num_fewshot=0, training_split=None, fewshot_split=None, fewshot_config=None
    )
    result = lm_eval.simple_evaluate(
        model=Replay(),
        tasks=[ConfigurableTask(config=config)],
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )
    verdicts: list[dict[str, Any]] = [{} for _ in documents]
    (samples,) = result["samples"].values()
    for sample in samples:
        filtered = sample["filter"] != "none"
        for metric in sample["metrics"]:
            read = sample["filtered_resps"][0] if filtered else ""
            verdicts[sample["doc_id"]][sample["filter"] if filtered else metric] = [bool(sample[metric]), read]
    return verdicts


def understood(text: str) -> str:
    """What math-verify reads in a text."""
    from math_verify import parse

    return "; ".join(map(str, parse(text)))


class Judge:
    """lm-eval's verdicts by task and text, each asked for once and kept on disk."""

    def __init__(self, path: Path, workers: int) -> None:
        self.store = records.RowStore(path)
        self.workers = workers
        versions = "/".join(importlib.metadata.version(name) for name in ("lm_eval", "math_verify", "sympy"))
        self.prefix = f"{versions}/"

    def _key(self, task: str, problem: Problem, text: str) -> str:
        digest = hashlib.sha256(json.dumps([problem.id, problem.answer, text]).encode()).hexdigest()
        return f"{self.prefix}{task}/{digest}"

    def verdicts(self, task: str, asked: Sequence[tuple[Problem, str]]) -> list[dict[str, Any]]:
        """The verdicts of `task` on each (problem, text)."""
        keys = [self._key(task, *each) for each in asked]
        known = self.store.keys()
        todo = {key: each for key, each in zip(keys, asked, strict=True) if key not in known}
        names = list(todo)
        chunks = [names[at : at + CHUNK] for at in range(0, len(names), CHUNK)]
        with ProcessPoolExecutor(self.workers, mp_context=get_context("spawn"), initializer=quiet) as pool:
            running = {
                pool.submit(judge, task, [document(task, *todo[name]) for name in chunk]): chunk for chunk in chunks
            }
            for done, future in enumerate(as_completed(running), 1):
                for name, verdict in zip(running[future], future.result(), strict=True):
                    self.store.add(name, {"key": name, **verdict})
                print(f"{task}: {done} of {len(chunks)} parts", file=sys.stderr, flush=True)
        found = {row["key"]: row for row in self.store.rows(f"{self.prefix}{task}/")}
        return [found[key] for key in keys]


def read(folders: Iterable[Path], data_dir: str | None, alphas: Sequence[float] = ()) -> tuple[list[records.Json], list[Problem], int]:
    """The rows of the folders, the problem of each, and how many rows of other data sets were passed over.

    With `alphas`, of the plain model and those positions alone."""
    rows: list[records.Json] = []
    golds: dict[str, Problem] = {}
    left = 0
    for folder in folders:
        for row in records.read_parquet(folder / "rows.parquet"):
            if row["dataset"] not in BOTH:
                left += 1
                continue
            if alphas and row["system"] != PLAIN and row["alpha"] not in alphas:
                continue
            rows.append({**row, "folder": folder.name})
    for name in BOTH:
        splits = {row["problem"].split("/")[1] if name == "gsm8k" else "test" for row in rows if row["dataset"] == name}
        for split in sorted(splits):
            golds |= {problem.id: problem for problem in problems.load(name, split=split, data_dir=data_dir)}
    return rows, [golds[row["problem"]] for row in rows], left


def points(value: float) -> str:
    """A difference with its sign."""
    return "0.0" if abs(value) < 0.05 else f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")


def cell(text: str, limit: int = 140) -> str:
    """The end of a text for a table."""
    text = " ".join(text.split())
    return (f"... {text[-limit:]}" if len(text) > limit else text).replace("|", "\\|").replace("`", "'")


@dataclass(slots=True)
class Tally:
    """Rows of one line: how many, right by cotvalve, right by lm-eval."""

    rows: int = 0
    ours: int = 0
    theirs: int = 0

    def add(self, ours: bool, theirs: bool) -> None:
        """Counts one row."""
        self.rows, self.ours, self.theirs = self.rows + 1, self.ours + ours, self.theirs + theirs

    @property
    def difference(self) -> float:
        """lm-eval less cotvalve, in points."""
        return 100 * (self.theirs - self.ours) / self.rows


def main() -> int:
    """Prints the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="run folders of `cotvalve sweep`")
    parser.add_argument("--data-dir", help="folder with local copies of the data sets")
    parser.add_argument(
        "--verdicts", type=Path, default=ROOT / "runs" / "lm-eval.sqlite", help="file that keeps lm-eval's verdicts"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that grade")
    parser.add_argument("--alphas", type=float, nargs="+", default=(), help="only the plain model and these positions")
    asked = parser.parse_args()
    rows, golds, left = read(asked.folders, asked.data_dir, asked.alphas)
    if not rows:
        raise SystemExit(f"no rows of {' or '.join(BOTH)} in {', '.join(map(str, asked.folders))}")
    grades = [
        grade(gold, row["text"], truncated=row["finish"] == "length") for row, gold in zip(rows, golds, strict=True)
    ]
    judged = Judge(asked.verdicts, asked.workers)
    theirs: dict[str, dict[int, tuple[bool, str]]] = {}
    for view in VIEWS:
        at = [place for place, row in enumerate(rows) if row["dataset"] in view.sets]
        if at:
            found = judged.verdicts(view.task, [(golds[place], rows[place]["text"]) for place in at])
            theirs[view.name] = {place: tuple(verdict[view.verdict]) for place, verdict in zip(at, found, strict=True)}
    changed = sum(row["correct"] != ours.correct for row, ours in zip(rows, grades, strict=True))
    print(
        f"lm-eval {importlib.metadata.version('lm_eval')}, {len(rows):,} rows, {left} rows of other data sets passed over."
    )
    print(f"Grades stored in the rows that today's grader would change: {changed}.\n")
    accuracies(rows, grades, theirs)
    return differences(rows, golds, grades, theirs)


Theirs = dict[str, dict[int, tuple[bool, str]]]


def accuracies(rows: Sequence[records.Json], grades: Sequence[Grade], theirs: Theirs) -> None:
    """Prints one table for each folder and data set: lines are systems at an alpha."""
    tables: dict[tuple[str, str], dict[tuple[str, float | None], dict[str, Tally]]] = defaultdict(dict)
    for place, row in enumerate(rows):
        lines = tables[row["folder"], row["dataset"]]
        line = lines.setdefault((row["system"], row["alpha"]), defaultdict(Tally))
        for name, verdicts in theirs.items():
            if place in verdicts:
                line[name].add(grades[place].correct, verdicts[place][0])
    for (folder, dataset), lines in tables.items():
        names = [view.name for view in VIEWS if dataset in view.sets]
        print(f"## {folder}: {dataset}\n")
        print("Accuracy in percent; in brackets lm-eval less cotvalve, in points.\n")
        print("| system | alpha | rows | cotvalve | " + " | ".join(f"lm-eval {name}" for name in names) + " |")
        print("| :-- | " + " | ".join(["--:"] * (3 + len(names))) + " |")
        systems = list(dict.fromkeys(system for system, _ in lines))
        for (system, alpha), line in sorted(
            lines.items(), key=lambda item: (systems.index(item[0][0]), item[0][1] or 0.0)
        ):
            one = line[names[0]]
            cells = [f"{100 * line[name].theirs / one.rows:.1f} ({points(line[name].difference)})" for name in names]
            print(
                f"| {system} | {'-' if alpha is None else f'{alpha:g}'} | {one.rows} | {100 * one.ours / one.rows:.1f} | "
                + " | ".join(cells)
                + " |"
            )
        print()
        print(
            f"| lm-eval | how it finds and compares | rows | cotvalve % | lm-eval % | points | largest in a line | lines beyond {AIM:g} points |"
        )
        print("| :-- | :-- | --: | --: | --: | --: | --: | --: |")
        for view in VIEWS:
            if dataset not in view.sets:
                continue
            every = [line[view.name] for line in lines.values()]
            whole = Tally(*(sum(getattr(tally, part) for tally in every) for part in ("rows", "ours", "theirs")))
            largest = max((tally.difference for tally in every), key=abs)
            beyond = sum(abs(tally.difference) > AIM for tally in every)
            print(
                f"| {view.name} (`{view.task}.yaml`) | {cell(view.reads, 999)} | {whole.rows:,} | {100 * whole.ours / whole.rows:.2f} "
                f"| {100 * whole.theirs / whole.rows:.2f} | {points(whole.difference)} | {points(largest)} | {beyond} of {len(every)} |"
            )
        print()


def differences(rows: Sequence[records.Json], golds: Sequence[Problem], grades: Sequence[Grade], theirs: Theirs) -> int:
    """Prints the differing rows by class; 1 when one is left unexplained."""
    print("## The differing rows\n")
    unexplained = 0
    for name, verdicts in theirs.items():
        classes: dict[tuple[str, bool], list[Seen]] = defaultdict(list)
        for place, (right, said) in verdicts.items():
            if right != grades[place].correct:
                text = rows[place]["text"]
                seen = Seen(text, golds[place], grades[place], understood(text) if name == "math_verify" else said)
                classes[explain(name, seen), grades[place].correct].append(seen)
        count = sum(map(len, classes.values()))
        print(f"### {name}: {count:,} of {len(verdicts):,} rows differ\n")
        if count:
            print("| rows | texts | right only by | what happens | who is right | one of them |")
            print("| --: | --: | :-- | :-- | :-- | :-- |")
        for (kind, ours), members in sorted(classes.items(), key=lambda item: -len(item[1])):
            unexplained += len(members) * (kind == "other")
            for one in members if kind == "other" else members[:1]:
                example = (
                    f"gold {one.gold.answer}; cotvalve read {one.ours.predicted}; lm-eval read {one.read or 'not told'}"
                )
                print(
                    f"| {len(members):,} | {len({(each.gold.id, each.text) for each in members}):,} | {'cotvalve' if ours else 'lm-eval'} "
                    f"| {cell(KINDS[kind].what, 999)} | {KINDS[kind].verdict} | {one.gold.id}: {cell(example, 300)}; text: `{cell(one.text)}` |"
                )
        print()
    print(f"Rows left unexplained: {unexplained}.")
    return 1 if unexplained else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CotvalveError as error:
        sys.exit(str(error))
