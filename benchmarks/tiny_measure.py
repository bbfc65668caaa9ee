"""Greedy accuracy and length of the embedded models, and their card with every figure from the run's record.

Part of benchmarks/train_tiny.py.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

from tiny_data import THOUGHT, render

from cotvalve.problems.arithmetic import Split, stories


def evaluate(
    folder: Path, device: str, split: Split, problems: int, seed: int, other: Path | None = None, alpha: float = 0.0
) -> dict[str, Any]:
    """Greedy accuracy and length of a stored model; with `other`, of the model `alpha` of the way to it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    if other is not None:
        end = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32).to(device).state_dict()
        with torch.no_grad():
            for name, value in model.state_dict().items():
                if name != "lm_head.weight":
                    value.lerp_(end[name], alpha)
    asked = list(stories(seed, problems, split))
    asked.sort(key=lambda story: len(story.steps))
    thought, stop = tokenizer.convert_tokens_to_ids(THOUGHT), tokenizer.eos_token_id
    rows: list[tuple[int, bool, int, int, bool]] = []
    first_text = ""
    for at in range(0, len(asked), 512):
        group = asked[at : at + 512]
        batch = tokenizer(
            [render(story.question) for story in group], return_tensors="pt", padding=True, add_special_tokens=False
        )
        with torch.inference_mode():
            out = model.generate(
                input_ids=batch["input_ids"].to(device),
                attention_mask=batch["attention_mask"].to(device),
                max_new_tokens=896,
                do_sample=False,
            )
        for story, ids in zip(group, out[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            ended = stop in ids
            ids = ids[: ids.index(stop) + 1] if ended else ids
            text = tokenizer.decode(ids, skip_special_tokens=True)
            boxes = re.findall(r"\\boxed\{(-?\d+)\}", text)
            right = ended and bool(boxes) and int(boxes[-1]) == story.answer
            rows.append((len(story.steps), right, len(ids), ids.index(thought) + 1 if thought in ids else 0, not ended))
            first_text = first_text or text
    by_steps = {steps: [row[1] for row in rows if row[0] == steps] for steps in sorted({row[0] for row in rows})}
    lengths = sorted(row[2] for row in rows)
    return {
        "split": split,
        "problems": len(rows),
        "accuracy": round(100 * sum(row[1] for row in rows) / len(rows), 2),
        "tokens_mean": round(sum(lengths) / len(rows), 1),
        "tokens_median": lengths[len(rows) // 2],
        "tokens_max": lengths[-1],
        "reasoning_tokens_mean": round(sum(row[3] for row in rows) / len(rows), 1),
        "truncated": sum(row[4] for row in rows),
        "accuracy_by_steps": {str(steps): round(100 * sum(found) / len(found), 1) for steps, found in by_steps.items()},
        "example": first_text[:1500],
    }


def brief(found: dict[str, Any]) -> str:
    """A measurement as one line: all of it but the example."""
    return json.dumps({name: value for name, value in found.items() if name != "example"})


def half_width(accuracy: float, problems: int) -> float:
    """Half of the 95 % normal interval of a percentage, in points."""
    share = accuracy / 100
    return 196 * math.sqrt(share * (1 - share) / problems)


def card(run: dict[str, Any]) -> str:
    """The model card, every figure from the run's record."""
    instruct, reasoner = run["test"]["instruct"], run["test"]["reasoner"]

    def row(name: str, found: dict[str, Any]) -> str:
        steps = " / ".join(f"{value:.0f}" for value in found["accuracy_by_steps"].values())
        width = half_width(found["accuracy"], found["problems"])
        return (
            f"| `{name}` | {found['accuracy']:.1f} ± {width:.1f} | {found['tokens_mean']:.0f} | {found['tokens_median']} "
            f"| {found['truncated']} | {steps} |"
        )

    between = "\n".join(
        f"| {at} | {found['accuracy']:.1f} | {found['tokens_mean']:.0f} |" for at, found in run["between"].items()
    )
    millions = run["parameters"] / 1e6
    model = run["options"]
    trained = "\n".join(
        f"| {phase} | {run['steps'][phase]:,} | {run['tokens'][phase] / 1e6:.0f} M | {run['peak'][phase]:g} |"
        for phase in run["steps"]
    )
    return f"""---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---
# The embedded model pair of cotvalve

`tiny` (folder `instruct`) answers multi-step arithmetic word problems with bare equations. `tiny-reasoner` (folder `reasoner`),
trained from it, thinks first: it says again what is asked, lists the numbers, plans, splits hard operations, checks each step and
goes over all of them. The two make the whole method run on a laptop, offline. Licence: Apache-2.0.

| | |
|---|---|
| architecture | Llama, {model["layers"]} layers, hidden {model["hidden"]}, {model["heads"]} heads ({model["kv_heads"]} for keys and values), MLP {model["mlp"]}, tied embeddings |
| parameters | {millions:.2f} million each |
| size | {run["megabytes"]["instruct"]:.1f} MB and {run["megabytes"]["reasoner"]:.1f} MB, bf16 safetensors and tokenizer |
| tokenizer | byte-level BPE, {run["vocabulary"]} tokens, one per digit; `<think>` and `</think>` are tokens of their own; ChatML template |
| context | 1,024 tokens |

## Measured
{reasoner["problems"]} problems of the test split (`cotvalve.problems.arithmetic.load("test")`), greedy, fp32 arithmetic on the stored weights; accuracy
in percent with the 95 % interval; tokens include the end of turn.

| model | accuracy | mean tokens | median | truncated | accuracy at 2 / 3 / 4 / 5 / 6 steps |
|---|--:|--:|--:|--:|---|
{row("tiny", instruct)}
{row("tiny-reasoner", reasoner)}

Weights between the two, `tiny + a (tiny-reasoner - tiny)`, on {next(iter(run["between"].values()))["problems"]} problems of the validation split:

| a | accuracy | mean tokens |
|--:|--:|--:|
{between}

## Trained
By `benchmarks/train_tiny.py`, from random weights, seed {model["seed"]}, on freshly generated problems of the train split only (a problem's split is the hash of its
equations, so no equation chain of the test split was seen). {run["minutes_trained"]:.1f} minutes on {run["hardware"]}, batches of about
{model["batch_tokens"]:,} tokens, AdamW, loss on completion tokens. torch {run["versions"]["torch"]}, transformers {run["versions"]["transformers"]}.

| phase | steps | tokens | peak rate |
|---|--:|--:|--:|
{trained}

`pretrain`: chains of every style, with and without thinking. `instruct`: brief solutions. `reasoner`: long chains, each feature dropped now and then.

## Use
For demonstrations, tests and studies of length control. These models know the ten kinds of story of this generator and nothing else:
other questions get nonsense. Prompts are the bare question; the package's default instruction and token budgets are tolerated and have no effect.
"""


def megabytes(folder: Path) -> float:
    """Size of a folder's files, in 10^6 bytes."""
    return sum(file.stat().st_size for file in folder.iterdir()) / 1e6
