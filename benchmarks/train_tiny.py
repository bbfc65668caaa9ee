"""Trains the embedded model pair from scratch: `tiny` (brief) and, from it, `tiny-reasoner` (long chains).

    PYTHONPATH=. python benchmarks/train_tiny.py --out runs/tiny --minutes 8     # one GPU
    PYTHONPATH=. python benchmarks/train_tiny.py --out /tmp/smoke --smoke        # a minute, on a CPU

Three phases learn from freshly generated problems of the train split: `pretrain` chains of every style, `instruct`
brief solutions only, `reasoner` (from the instruct model) long chains whose features are sometimes dropped, so that
models between the two write chains of lengths in between. The loss is on completion tokens only. Each phase has a
share of the minutes; the learning rate follows the clock. The same command goes on from the last checkpoint.

Writes OUT/instruct and OUT/reasoner (bf16 safetensors, tokenizer with chat template), OUT/run.json and the card
OUT/README.md, whose figures come from run.json. All figures are measured with the stored bf16 weights; the test
split is used once, at the end. Needs torch, transformers, tokenizers, safetensors and numpy.
"""

import argparse
import json
import math
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

# Read when the tokenizers library starts: the workers are the parallelism here.
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
from tiny_data import REASONER_TEMPLATE, Stream, build_tokenizer, save_tokenizer
from tiny_measure import brief, card, evaluate, megabytes

PHASES = {"pretrain": 0.55, "instruct": 0.1, "reasoner": 0.35}
"""Share of the minutes."""

PEAK = {"pretrain": 2e-3, "instruct": 5e-4, "reasoner": 6e-4}
"""Highest learning rate."""


def new_model(options: argparse.Namespace, tokenizer: Any) -> Any:
    """A Llama of the size the options ask for, in fp32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(options.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=options.hidden,
            intermediate_size=options.mlp,
            num_hidden_layers=options.layers,
            num_attention_heads=options.heads,
            num_key_value_heads=options.kv_heads,
            head_dim=options.hidden // options.heads,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def rate(phase: str, done: float) -> float:
    """The learning rate when a share `done` of the phase's time is over: warm-up, then a cosine to nearly 0."""
    peak = PEAK[phase]
    return (
        peak * done / 0.03
        if done < 0.03
        else peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (done - 0.03) / 0.97)))
    )


def train(options: argparse.Namespace, tokenizer: Any, folder: Path, device: str) -> dict[str, Any]:
    """Runs the phases that are not done; saves each model at the end of its phase; returns the log."""
    import torch

    model = new_model(options, tokenizer).to(device)
    body = torch.compile(model.model, dynamic=True) if options.compile else model.model
    checkpoint = options.out / "checkpoint.pt"
    state: dict[str, Any] = {"phase": 0, "elapsed": 0.0, "steps": {}, "tokens": {}, "next_seed": 0, "log": []}
    saved: dict[str, Any] = {}
    if options.pair and not checkpoint.exists():
        import shutil

        from safetensors.torch import load_file

        shutil.copytree(options.pair / "instruct", options.out / "instruct", dirs_exist_ok=True)
        model.load_state_dict(load_file(options.pair / "reasoner" / "model.safetensors"), strict=False)
        model.tie_weights()
        state["phase"] = 2
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        state = saved["state"]
        model.load_state_dict(saved["model"])
        say(f"goes on in phase {state['phase']} after {state['elapsed']:.0f} s")
    stream = Stream(
        options.workers, options.shard, options.batch_tokens, folder, options.seed * 10**9 + state["next_seed"]
    )

    names = list(PHASES)
    for number, phase in enumerate(names):
        if number < state["phase"]:
            continue
        # Fused AdamW with no decay on norms: they have one dimension.
        optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.05},
                {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
            ],
            lr=0.0, betas=(0.9, 0.98), fused=device == "cuda",
        )  # fmt: skip
        if saved and saved["state"]["elapsed"] > 0:
            optimizer.load_state_dict(saved["optimizer"])
        saved = {}
        budget = options.minutes * 60 * PHASES[phase]
        stream.begin(phase)
        elapsed, steps, seen = state["elapsed"], state["steps"].get(phase, 0), state["tokens"].get(phase, 0)
        # The clock starts with the first shard: workers need seconds to come up.
        batches = stream.shard()
        stream.waited = 0.0
        began, told, kept, told_seen = time.monotonic() - elapsed, time.monotonic(), time.monotonic(), seen
        losses: list[Any] = []
        model.train()
        while elapsed < budget:
            if not batches:
                batches = stream.shard()
            batch = batches.pop()
            for group in optimizer.param_groups:
                group["lr"] = rate(phase, elapsed / budget)
            ids, at, targets = (
                torch.from_numpy(values.astype(np.int64)).to(device, non_blocking=True)
                for values in (batch.ids, batch.at, batch.targets)
            )
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                hidden = body(input_ids=ids, use_cache=False).last_hidden_state
                logits = model.lm_head(hidden.flatten(0, 1)[at])
            loss = torch.nn.functional.cross_entropy(logits.float(), targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
            steps, seen = steps + 1, seen + ids.numel()
            if steps % 20 == 0 and device == "cuda":
                # Without this the host runs far ahead and the clock says nothing about the work done.
                torch.cuda.synchronize()
            now = time.monotonic()
            elapsed = now - began
            if now - told > options.tell:
                row = {
                    "phase": phase, "seconds": round(elapsed, 1), "step": steps,
                    "loss": round(torch.stack(losses).mean().item(), 4),
                    "tokens_per_second": round((seen - told_seen) / (now - told)), "waited": round(stream.waited, 1),
                }  # fmt: skip
                state["log"].append(row)
                say(json.dumps(row))
                told, told_seen, losses = now, seen, []
            state["steps"][phase], state["tokens"][phase] = steps, seen
            if now - kept > options.keep:
                kept = now
                state.update(phase=number, elapsed=elapsed, next_seed=stream.next_seed - options.seed * 10**9)
                keep(checkpoint, {"state": state, "model": model.state_dict(), "optimizer": optimizer.state_dict()})
        if phase != "pretrain":
            # Before the checkpoint: a run killed between the two must find the model or make it again.
            save_model(model, tokenizer, options.out / phase)
        state.update(phase=number + 1, elapsed=0.0, next_seed=stream.next_seed - options.seed * 10**9)
        keep(checkpoint, {"state": state, "model": model.state_dict(), "optimizer": optimizer.state_dict()})
        if phase != "pretrain":
            found = evaluate(options.out / phase, device, "validation", min(200, options.problems), seed=0)
            state["log"].append({"phase": phase, "validation": found})
            say(f"{phase}: {brief(found)}")
    stream.pool.shutdown(cancel_futures=True)
    return state


def keep(path: Path, value: dict[str, Any]) -> None:
    """Writes a checkpoint whole or not at all."""
    import torch

    part = path.with_suffix(".part")
    torch.save(value, part)
    os.replace(part, path)


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """The model in bf16 with its tokenizer and generation settings; `model` itself stays as it is."""
    import copy

    import torch
    from transformers import GenerationConfig

    stored = copy.deepcopy(model).to(torch.bfloat16)
    stored.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=896,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    stored.save_pretrained(folder)
    own = copy.deepcopy(tokenizer)
    if folder.name == "reasoner":
        own.chat_template = REASONER_TEMPLATE
    save_tokenizer(own, folder)


def say(text: str) -> None:
    """One line, at once."""
    print(text, flush=True)


def main() -> None:
    """Reads the options, trains, measures, writes the record and the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of this run; the same folder goes on where it stopped"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="training time of all phases together (default 8)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--mlp", type=int, default=640)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--batch-tokens", type=int, default=32768, help="ids per step, padding included")
    parser.add_argument("--shard", type=int, default=8192, help="examples a worker makes at a time")
    parser.add_argument(
        "--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="processes that make data"
    )
    parser.add_argument("--problems", type=int, default=1000, help="problems of each final measurement")
    parser.add_argument("--tell", type=float, default=15.0, help="seconds between lines of progress")
    parser.add_argument("--keep", type=float, default=60.0, help="seconds between checkpoints")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model (slower start)")
    parser.add_argument("--pair", type=Path, help="a finished pair: only the last phase is run, on from its reasoner")
    parser.add_argument(
        "--smoke", action="store_true", help="a model and a run of seconds, to see that all of it works"
    )
    parser.add_argument("--card", action="store_true", help="only write the card of a finished run again")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    record = options.out / "run.json"
    if options.card:
        (options.out / "README.md").write_text(card(json.loads(record.read_text())))
        return
    if options.smoke:
        options.layers, options.hidden, options.heads, options.kv_heads, options.mlp = 2, 64, 2, 1, 128
        options.minutes, options.workers, options.shard, options.batch_tokens = min(options.minutes, 0.3), 1, 256, 4096
        options.problems, options.tell, options.keep = 8, 3.0, 3.0

    import torch
    import transformers

    torch.backends.cuda.matmul.allow_tf32 = True
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = options.out / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        build_tokenizer(folder, options.vocabulary)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    say(f"tokenizer of {len(tokenizer)} tokens; device {device}")
    state = train(options, tokenizer, folder, device)

    # Nothing was chosen on the test split: its first use is here.
    torch.backends.cuda.matmul.allow_tf32 = False
    instruct, reasoner = options.out / "instruct", options.out / "reasoner"
    test = {path.name: evaluate(path, device, "test", options.problems, 0) for path in (instruct, reasoner)}
    for name, found in test.items():
        say(f"test, {name}: {brief(found)}")
    few = min(200, options.problems)
    between = {
        str(alpha): evaluate(instruct, device, "validation", few, 0, reasoner, alpha)
        for alpha in (0, 0.25, 0.5, 0.75, 1)
    }
    say(json.dumps({alpha: (found["accuracy"], found["tokens_mean"]) for alpha, found in between.items()}))
    from safetensors import safe_open

    with safe_open(reasoner / "model.safetensors", "pt") as stored:
        parameters = sum(math.prod(stored.get_slice(name).get_shape()) for name in stored.keys())  # noqa: SIM118
    run = {
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
        "hardware": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "peak": PEAK,
        "vocabulary": len(tokenizer),
        "parameters": parameters,
        "megabytes": {path.name: megabytes(path) for path in (instruct, reasoner)},
        "minutes_trained": options.minutes,
        "steps": state["steps"],
        "tokens": state["tokens"],
        "test": test,
        "between": between,
        "log": state["log"],
    }
    record.write_text(json.dumps(run, indent=1) + "\n")
    (options.out / "README.md").write_text(card(run))
    (options.out / "checkpoint.pt").unlink()
    say(f"done: {options.out / 'README.md'}")


if __name__ == "__main__":
    sys.exit(main())
