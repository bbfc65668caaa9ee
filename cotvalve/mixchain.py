"""Stage 2: MixChain data. Sample over a grid of alphas, grade, keep what is right.

Comes in: a valve and problems with gold answers. Goes out: questions with several right chains of different
lengths, in `mixchain.parquet` beside a table of what was dropped and why. Every sampled chain is a row in the
run folder the moment it ends; a killed run goes on with the same chains it would have written.

    cotvalve mix --model BASE --direction D --data gsm8k --out mix
"""

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from cotvalve.chains import check_own as check_own
from cotvalve.chains import is_mixchain as is_mixchain
from cotvalve.chains import judged as judged
from cotvalve.chains import load as load
from cotvalve.engines import own_seed, pick
from cotvalve.errors import SettingError
from cotvalve.grading import grade
from cotvalve.problems import fingerprint, training
from cotvalve.prompts import PROMPTS, chain_from_solution, prompt, render, thinks
from cotvalve.records import Json, Run, write_json, write_parquet, write_text
from cotvalve.settings import Alphas, Count, ModelSettings, NotNegative, Probability, Seed
from cotvalve.types import Chain, Completion, MixChain, Problem, Progress, Request, silent

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cotvalve.engines import Engine


BEHIND = 512
"""Chains that may wait for their grade, which a killed process loses."""
TABLE = "mix.md"
"""What a run folder of `mix` shows of itself."""


class Sampling(ModelSettings):
    """How chains are sampled: shared by `mix` and `sweep`."""

    alphas: Alphas = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Positions of the valve, with commas."""
    samples: int = 1
    """Chains per question and alpha."""
    temperature: NotNegative = 0.0
    """0 is greedy."""
    top_p: Probability = 1.0
    """Nucleus sampling: the probability mass that is kept."""
    max_new_tokens: int = 1024
    """Longest chain; a chain that reaches it is truncated and counted as such."""
    prompt: str = "boxed"
    """How questions are asked: boxed, plain, budget, shortcut, budget-qwq, budget-llama."""
    budget: Count | None = None
    """Token budget for the prompts that ask for one."""
    seed: Seed = 0
    """Seed of everything random in this run."""
    engine: str = "auto"
    """auto, transformers, vllm or generate."""
    gpus: int = 1
    """GPUs: each holds a copy of the model and samples its part. With `engine` vllm they share each layer of a model too large for one."""
    slots: Count | None = None
    """Chains decoded at once; sized from the memory when not given."""

    def model_post_init(self, _context: Any, /) -> None:
        if self.samples < 1 or self.max_new_tokens < 1 or self.gpus < 1:
            raise ValueError("samples, max_new_tokens and gpus have to be 1 or more")
        if self.samples > 1 and self.temperature <= 0:
            raise ValueError("several samples at temperature 0 are all the same; give a temperature, for example 0.7")
        way = prompt(self.prompt)
        if way.budgets and self.budget is None:
            raise ValueError(f"the prompt '{self.prompt}' needs a token budget; give budget, for example 100")
        if self.budget is not None and not way.budgets:
            asking = ", ".join(name for name, way in PROMPTS.items() if way.budgets)
            raise ValueError(f"the prompt '{self.prompt}' names no token budget; leave budget out, or take one of the prompts {asking}")

    def drawn(self) -> str:
        """How a token is drawn, in words.

        >>> Sampling().drawn(), Sampling(temperature=0.6, top_p=0.95).drawn()
        ('greedy', 'temperature 0.6, top_p 0.95')
        """
        return "greedy" if self.temperature == 0 else f"temperature {self.temperature:g}" + f", top_p {self.top_p:g}" * (self.top_p < 1)


class MixSettings(Sampling):
    """Settings of `mix`."""

    direction: str = ""
    """The direction whose positions are sampled; empty samples the plain model at alpha 0."""
    data: str = "gsm8k"
    """A data set: its training questions are answered."""
    limit: Count | None = None
    """A seeded random subset of this many questions."""
    offset: int = 0
    """Questions of that random order to pass over first: with the same seed, other questions for each round of sampling and learning."""
    # The paper's grid (A.3), and the ends.
    alphas: Alphas = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    """Positions of the valve, with commas; the default is the paper's grid and its ends."""
    samples: int = 2
    """Chains per question and alpha."""
    temperature: NotNegative = 0.7
    """0 is greedy."""
    solutions: bool = False
    """Also take the human-written solution as a chain of its question."""
    fewest: int = 2
    """Questions with fewer right chains than this are left out, and counted."""
    out: str = "runs/mix"
    """Run folder; mixchain.parquet is put into it."""

    def model_post_init(self, context: Any, /) -> None:
        super().model_post_init(context)
        if self.offset and self.limit is None:
            raise ValueError("offset passes over questions of a random subset; give its size as limit")
        if self.fewest < 1:
            raise ValueError("fewest has to be 1 or more: a question without a right chain teaches nothing")


def requests_for(
    problems: Sequence[Problem], how: Sampling, tokenizer: "PreTrainedTokenizerBase",
    alphas: Iterable[float] | None = None, *, paired: bool = False,
) -> Iterator[Request]:  # fmt: skip
    """One request per problem, alpha and sample; its id is the row's key, its seed follows from the id.

    `paired` leaves alpha out of the seed: the same random numbers at every position, so that two positions
    differ by the dial and not by luck. For measuring; MixChain wants chains that differ.
    """
    way = prompt(how.prompt)
    for problem in problems:
        text = render(tokenizer, problem.question, way, how.budget)
        for alpha in how.alphas if alphas is None else alphas:
            for sample in range(how.samples):
                key = f"{problem.id}|{alpha:g}|{sample}"
                drawn = f"{problem.id}|{sample}" if paired else key
                yield Request(key, text, alpha, how.max_new_tokens, how.temperature, how.top_p, own_seed(how.seed, drawn))


Asked = tuple[Sequence[Problem], Iterable[Request]]
"""Problems, and requests for them."""


def sample_rows(run: Run, engine: "Engine", asked: Mapping[str, Asked], progress: Progress = silent) -> dict[str, list[Json]]:
    """Samples and grades whatever `run` does not hold yet, all in one go; returns the rows of each prefix.

    `asked` names what belongs together by the prefix of its rows' keys. Prompts and positions that run together keep the
    card filled, where each by itself ends with a few long chains.

    A row: problem, alpha, sample, text, tokens, reasoning_tokens, prompt_tokens, finish, correct, predicted,
    reason, subset.
    """
    have = run.rows.keys()
    todo: list[Request] = []
    of: dict[str, Problem] = {}
    for prefix, (problems, requests) in asked.items():
        by_id = {problem.id: problem for problem in problems}
        for request in requests:
            if (key := prefix + request.id) not in have:
                todo.append(replace(request, id=key))
                of[key] = by_id[request.id.rsplit("|", 2)[0]]
    if todo:
        run.note(engine.facts())
    # Grades are found beside the sampling: comparing formulas takes milliseconds each, in which a card would stand still.
    graded = deque[tuple[str, Future[Json]]]()
    with ThreadPoolExecutor(1) as grader:
        try:
            for number, completion in enumerate(engine.generate(todo, progress)):
                if not number:
                    run.note(engine.facts())  # what is known only once it runs
                sample = int(completion.id.rpartition("|")[2])
                graded.append((completion.id, grader.submit(row, of[completion.id], completion, sample)))
                while graded and (graded[0][1].done() or len(graded) > BEHIND):
                    key, found = graded.popleft()
                    run.rows.add(key, found.result())
        finally:
            for key, found in graded:  # what has ended is kept, also where the sampling was stopped
                run.rows.add(key, found.result())
    return {prefix: run.rows.rows(prefix) for prefix in asked}


def row(problem: Problem, completion: Completion, sample: int) -> Json:
    """One graded completion as it is stored."""
    judged = grade(problem, completion.text, truncated=completion.truncated)
    return {
        "problem": problem.id,
        "alpha": completion.alpha,
        "sample": sample,
        "text": completion.text,
        "tokens": completion.tokens,
        "reasoning_tokens": completion.reasoning_tokens,
        "prompt_tokens": completion.prompt_tokens,
        "finish": completion.finish,
        "correct": judged.correct and completion.finish != "error",
        "predicted": judged.predicted,
        "reason": completion.reason or judged.reason,
        "subset": problem.subset,
    }


@dataclass(frozen=True)
class MixReport:
    """What became of the sampled chains, and how long they are (like the paper's Table 9)."""

    questions: int
    kept_questions: int
    sampled: int
    kept: int
    wrong: int
    truncated: int
    failed: int
    duplicates: int
    few: int
    """Right chains of questions that were left out for having too few."""
    by_alpha: dict[str, Json]
    """Per alpha ('human' for solutions): sampled, right, kept, mean tokens of the kept."""

    def as_json(self) -> Json:
        """Plain data for `mix.json`."""
        return dict(vars(self))

    def markdown(self) -> str:
        """The tables of `mix.md`: what was kept, and lengths as in the paper's Table 9."""
        dropped = f"{self.wrong:,} wrong, {self.truncated:,} truncated, {self.failed:,} failed, {self.duplicates:,} repeated"
        lines = [
            f"{self.kept_questions:,} of {self.questions:,} questions with {self.kept:,} right chains; of {self.sampled:,} sampled chains "
            f"{dropped}; {self.few:,} of questions with too few.", "",
            "| alpha | sampled | right | kept | mean tokens |", "| --: | --: | --: | --: | --: |",
            *(f"| {alpha} | {t['sampled']:,} | {t['right']:,} | {t['kept']:,} | {t['mean_tokens'] or '-'} |" for alpha, t in self.by_alpha.items()),
        ]  # fmt: skip
        return "\n".join(lines) + "\n"


def assemble(rows: Sequence[Json], problems: Sequence[Problem], how: MixSettings, solutions: dict[str, Chain] | None = None) -> tuple[list[MixChain], MixReport]:  # fmt: skip
    """MixChain from graded rows: wrong, truncated, failed and repeated chains dropped and counted.

    The same text at several alphas is one chain, of the smallest of them. `solutions` maps a problem's id to its
    human-written chain, where those take part and the model did not write the same.
    """
    counts: Counter[str] = Counter()
    tables: dict[str, Counter[str]] = defaultdict(Counter)
    chains: dict[str, list[Chain]] = defaultdict(list)
    seen: set[tuple[str, str]] = set()
    # By number: rows come by key, where "0.5" stands before "0".
    for r in sorted(rows, key=lambda r: (r["alpha"], r["sample"])):
        table = tables[f"{r['alpha']:g}"]
        table["sampled"] += 1
        fate = "failed" if r["finish"] == "error" else "truncated" if r["finish"] == "length" else "" if r["correct"] else "wrong"
        if fate:
            counts[fate] += 1
            continue
        table["right"] += 1
        table["right tokens"] += r["tokens"]
        if (r["problem"], r["text"]) in seen:
            counts["duplicates"] += 1
            continue
        seen.add((r["problem"], r["text"]))
        chains[r["problem"]].append(Chain(r["text"], r["tokens"], r["alpha"]))
    for name, chain in (solutions or {}).items():
        tables["human"]["sampled"] += 1
        tables["human"]["right"] += 1
        tables["human"]["right tokens"] += chain.tokens
        if (name, chain.text) not in seen:
            chains[name].append(chain)
    mix: list[MixChain] = []
    for problem in problems:
        found = sorted(chains[problem.id], key=lambda chain: (-chain.tokens, chain.text))
        if len(found) < how.fewest:
            counts["few"] += len(found)
            continue
        mix.append(MixChain(problem, tuple(found)))
        for chain in found:
            table = tables["human" if chain.alpha is None else f"{chain.alpha:g}"]
            table["kept"] += 1
            table["kept tokens"] += chain.tokens
    report = MixReport(
        questions=len(problems), kept_questions=len(mix), sampled=len(rows), kept=sum(len(m.chains) for m in mix),
        wrong=counts["wrong"], truncated=counts["truncated"], failed=counts["failed"],
        duplicates=counts["duplicates"], few=counts["few"],
        by_alpha={
            alpha: {"sampled": t["sampled"], "right": t["right"], "kept": t["kept"],
                    "mean_tokens": round(t["kept tokens"] / t["kept"], 1) if t["kept"] else None,
                    "right_tokens": round(t["right tokens"] / t["right"], 1) if t["right"] else None}
            for alpha, t in sorted(tables.items(), key=lambda item: (item[0] == "human", float(item[0]) if item[0] != "human" else 0.0))
        },
    )  # fmt: skip
    return mix, report


def save(folder: Path, mix: Sequence[MixChain], report: MixReport | None = None) -> Path:
    """Writes `mixchain.parquet` (id, question, answer, kind, chains), `mix.json` and `mix.md`; returns the Parquet's path."""
    path = folder / "mixchain.parquet"
    write_parquet(
        path,
        (
            {
                "id": m.problem.id,
                "question": m.problem.question,
                "answer": m.problem.answer,
                "kind": m.problem.kind,
                "chains": [{"text": c.text, "tokens": c.tokens, "alpha": c.alpha, "solution": c.solution} for c in m.chains],
            }
            for m in mix
        ),
    )
    if report is not None:
        write_json(folder / "mix.json", report.as_json())
        write_text(folder / TABLE, report.markdown())
    return path


def run(settings: MixSettings, progress: Progress = silent) -> Path:
    """Samples what is missing and writes the MixChain set; returns the run folder."""
    problems = training(settings.data, data_dir=settings.data_dir, limit=settings.limit, seed=settings.seed, offset=settings.offset)
    valve = settings.load_valve(settings.direction or None)
    facts = {**valve.facts(), "data": f"{settings.data} train ({len(problems)} questions, {fingerprint(problems)[:12]})"}
    decisive = settings.model_dump(mode="json", exclude={"out", "engine", "gpus", "slots", "data_dir", "device"})
    with Run(Path(settings.out), "mix", decisive, facts) as at:
        alphas = settings.alphas if settings.direction else [0.0]
        work = (len(problems) * len(alphas) * settings.samples - len(at.rows)) * settings.max_new_tokens
        asked = requests_for(problems, settings, valve.tokenizer, alphas)
        engine = pick(settings.engine, valve, settings.slots, work=work, longest=settings.max_new_tokens, gpus=settings.gpus)
        rows = sample_rows(at, engine, {"": (problems, asked)}, progress)[""]
        human = short_chains(problems, valve.tokenizer, thinks(valve.tokenizer)) if settings.solutions else []
        mix, report = assemble(rows, problems, settings, {m.problem.id: m.chains[0] for m in human})
        describe(mix)
        save(at.folder, mix, report)
    return at.folder


def short_chains(problems: Sequence[Problem], tokenizer: "PreTrainedTokenizerBase", thinking: bool) -> list[MixChain]:
    """Human-written solutions as one-chain MixChain: the cold start's data (eq. 2)."""
    texts = [chain_from_solution(problem, thinking) for problem in problems]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [MixChain(problem, (Chain(text, len(own), solution=0),)) for problem, text, own in zip(problems, texts, ids, strict=True)]


def describe(mix: Sequence[MixChain]) -> dict[str, float]:
    """Questions, chains, and mean tokens of the longest and the shortest chain of a question."""
    if not mix:
        raise SettingError("no question has enough right chains; sample more of them, or from a direction that solves some (mix: or lower --fewest)")
    return {
        "questions": len(mix),
        "chains": sum(len(m.chains) for m in mix),
        "longest": mean(m.chains[0].tokens for m in mix),
        "shortest": mean(m.chains[-1].tokens for m in mix),
    }
