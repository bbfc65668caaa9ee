"""Long chains of published reasoners as MixChain: what recipes/reproduction/zeroshot.yaml makes its reasoner from.

Comes in: a folder with limo_dev500/ and math_train100_x5models/ (HuangZhen02/longCOT-example and
gabrielkibble/CoT-Compression, both Apache-2.0). Goes out: JSON lines with id, question, answer, solution_0. Only
chains whose box grades as right; thinking marks are dropped, since the base has no thinking block. Test and held-out
questions are left out by `cotvalve train`. gpt-oss's chains are left out on purpose: they are brief.

    python benchmarks/long_chains.py CHAINS runs/long-chains.jsonl
"""

import argparse
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path

from cotvalve.answers import boxes
from cotvalve.grading import grade
from cotvalve.problems.jsonl import kind_of
from cotvalve.records import Json, write_text
from cotvalve.types import Problem

WRITERS = ("R1-32B", "R1-1.5B", "Qwen3-4B-Thinking-2507", "Qwen3-30B-A3B-Thinking-2507")
ASKED = re.compile(r"Question: (.*?)(?:<\|im_end\|>\s*<\|im_start\|>assistant|<｜Assistant｜>)\s*(.*)", re.DOTALL)  # noqa: RUF001
MARK = re.compile(r"</?think>\s*|<\|im_end\|>|<｜end▁of▁sentence｜>")  # noqa: RUF001


def limo(folder: Path) -> Iterator[Json]:
    """R1-Distill-Qwen-32B on questions of LIMO's development set, with gold answers."""
    with gzip.open(folder / "limo_dev500" / "deepseek-r1-distill-qwen-32b.jsonl.gz", "rt", encoding="utf-8") as file:
        for row in map(json.loads, file):
            yield {"id": f"limo/{row['id']}", "question": row["question"], "answer": row["gold_answer"], "solution_0": row["solution"]}


def math_train(folder: Path) -> Iterator[Json]:
    """Four reasoners on the same 100 MATH training questions, without gold: the box that most of them give is taken."""
    found: list[list[tuple[str, str]]] = []
    for writer in WRITERS:
        with gzip.open(folder / "math_train100_x5models" / f"{writer}.json.gz", "rt", encoding="utf-8") as file:
            found.append([(match[1], match[2]) for text in json.load(file) if (match := ASKED.search(text))])
    for writer, texts in zip(WRITERS, found, strict=True):
        for number, (question, text) in enumerate(texts):
            others = [boxes(other)[-1] for each in found for asked, other in each if asked == question and boxes(other)]
            gold = max(others, key=others.count) if others else ""
            yield {"id": f"math-train/{writer}/{number}", "question": question, "answer": gold, "solution_0": text}


def main() -> None:
    """Reads, grades and writes; says how many chains were right."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("chains", type=Path, help="the folder of published chains")
    parser.add_argument("out", type=Path, help="the JSON lines file to write")
    given = parser.parse_args()
    rows = [{**row, "solution_0": MARK.sub("", row["solution_0"]).strip()} for row in (*limo(given.chains), *math_train(given.chains))]
    kept = [
        row for row in rows
        if row["answer"] and grade(Problem(row["id"], row["question"], row["answer"], kind_of(row["answer"])), row["solution_0"]).correct
    ]  # fmt: skip
    write_text(given.out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    print(f"{given.out}: {len(kept)} of {len(rows)} chains, {sum(len(row['solution_0']) for row in kept) / len(kept):,.0f} characters in the mean")


if __name__ == "__main__":
    main()
