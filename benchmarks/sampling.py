"""What sampling at mixed alphas costs: one command, every system on the same card, one JSON line per part.

    python benchmarks/sampling.py --model Qwen/Qwen2.5-Coder-0.5B-Instruct --out sampling.jsonl
    python benchmarks/sampling.py --read results/performance-h100-4/engine-05.jsonl      # the table of an earlier run
    python benchmarks/sampling.py --model tiny-reasoner --requests 64 --parts engine_base,engine,generate,generate_base

Parts, each in a process of its own, so that one that fails loses nothing of the others:

    floor            measured copy bandwidth and matrix rate, and the tokens/s that reading the weights and caches allows
    engine           the default engine with the dial, at each number of distinct positions in --distinct
    engine_base      the same engine without any LoRA: what the dial is measured against
    engine_profile   where one decoding step and a whole run of it go; engine_base_profile without LoRA
    generate         transformers' generate with the dial, batch by batch; generate_base without
    dial             vLLM with the dial, at each number in --distinct; base without any LoRA
    stock8           vLLM's own multi-LoRA with 8 baked adapters; stock32 with 32
    profile          where one decoding step of the dial in vLLM goes; profile_base without LoRA
    smoke            greedy chains of the dial in vLLM: mixed against alone, alpha 0 against no direction; no timing

Greedy, every chain exactly --tokens long, or with --natural as long as the model makes it, up to --tokens; questions of
grade-school length. --direction is a folder in
PEFT's format; without it a random rank-8 one is made (its B is not zero; timing does not depend on its values).

What docs/performance.md holds against an aim is the median of the rounds; the best and the lowest stand beside it.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PARTS = (
    "floor", "engine", "engine_base", "engine_profile", "engine_base_profile", "generate", "generate_base",
    "dial", "base", "stock8", "stock32", "profile", "profile_base", "smoke",
)  # fmt: skip
BARE = {"engine": "engine_base", "generate": "generate_base", "dial": "base"}
"""Each system with the dial, and the part that runs it without any LoRA."""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-reasoner", help="folder, hub id or embedded name")
    parser.add_argument("--direction", default="", help="folder in PEFT's format; empty: a random one of --rank")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--requests", default="2048", help="how many; several numbers, one after the other: 256,1024,8192")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--batch", type=int, default=1024, help="chains at once in vLLM")
    parser.add_argument("--slots", type=int, help="chains at once in the default engine; by default as many as fit the memory")
    parser.add_argument("--generate-batch", type=int, default=512)
    parser.add_argument("--distinct", default="8,1,64,512", help="numbers of distinct positions, one after the other")
    parser.add_argument("--natural", action="store_true", help="chains end where the model ends them")
    parser.add_argument("--rounds", type=int, default=2, help="timed rounds")
    parser.add_argument("--parts", default=",".join(PARTS[:-1]))
    parser.add_argument("--check", action="store_true", help="part 'smoke' on the engine of part dial, before it is timed")
    parser.add_argument("--eager", action="store_true", help="vLLM without torch.compile and CUDA graphs")
    parser.add_argument("--vllm", default="{}", help="further EngineArgs of vLLM, as JSON")
    parser.add_argument("--seconds", type=int, default=900, help="limit for one part")
    parser.add_argument("--out", default="sampling.jsonl")
    parser.add_argument("--read", default="", help="a file of an earlier run: its table, and nothing is run")
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Runs the parts one after the other and prints the table."""
    args = arguments()
    if args.read:
        print(table([json.loads(line) for line in Path(args.read).read_text(encoding="utf-8").splitlines() if line.strip()]))
        return
    if args.part:
        for found in run(args.part, args):
            # As it is found: a part that is cut off keeps what it had.
            with open(args.out, "a", encoding="utf-8") as out:
                out.write(json.dumps(found) + "\n")
        return
    parts = args.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        sys.exit(f"unknown part '{unknown[0]}'; known: {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory() as folder:
        more = [] if args.direction else ["--direction", random_direction(args.model, args.rank, Path(folder) / "direction")]
        done: list[dict[str, Any]] = []
        for part in parts:
            began, size = time.monotonic(), Path(args.out).stat().st_size if Path(args.out).exists() else 0
            print(f"== {part}", flush=True)
            command = [sys.executable, __file__, *sys.argv[1:], *more, "--part", part]
            path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
            try:
                code = subprocess.run(command, timeout=args.seconds, check=False, env={**os.environ, "PYTHONPATH": path}).returncode
            except subprocess.TimeoutExpired:
                code = -1
            with open(args.out, "a+", encoding="utf-8") as out:
                out.seek(size)
                lines = [json.loads(line) for line in out if line.strip()]
                if not lines:
                    lines = [{"part": part, "error": f"no result, exit code {code}"}]
                    out.write(json.dumps(lines[0]) + "\n")
            done += lines
            print(f"   {time.monotonic() - began:.0f} s: {json.dumps(lines[-1])[:600]}", flush=True)
    print(table(done))


def table(done: list[dict[str, Any]]) -> str:
    """tokens/s, memory and ratios of what was run, and what the profiles say of a step."""
    rows = [row for part in done for row in part.get("rows", [])]
    rates = {row["name"]: row["rates"] for row in rows}
    floor = next((part["floor_tokens_per_second"] for part in done if part["part"] == "floor" and "error" not in part), None)
    ours = next((max(row["rates"]) for row in rows if row["name"].startswith("engine, ")), None)
    lines = [f"{'tokens/s':34}{'median':>10}{'best':>10}{'lowest':>10}{'of floor':>10}{'of no LoRA: medians':>21}{'best':>8}{'engine is':>11}{'GB used':>9}{'start s':>9}"]
    for row in rows:
        name, *more = row["name"].split(", ")
        found, bare = row["rates"], rates.get(", ".join([BARE.get(name, ""), *(word for word in more if "requests" in word)]))
        lines.append(
            f"{row['name']:34}{median(found):10,.0f}{max(found):10,.0f}{min(found):10,.0f}"
            + (f"{100 * max(found) / floor:9.1f}%" if floor else f"{'':10}")
            + (f"{100 * median(found) / median(bare):20.1f}%{100 * max(found) / max(bare):7.1f}%" if bare else f"{'':29}")
            + (f"{ours / max(found):10.2f}x" if ours else f"{'':11}")
            + f"{row.get('memory_gb', 0):9.1f}{row.get('start_seconds', 0):9.0f}"
        )
    steps = {part["part"]: part for part in done if "step_ms" in part}
    for name, part in steps.items():
        kernels = f"{part['kernels']} kernels that take" if "kernels" in part else "of which the card works"
        lines.append(f"{name}: {part['step_ms']:.2f} ms a step, {kernels} {part['busy_ms']:.2f} ms")
        if whole := part.get("whole"):
            lines.append(f"{name}: {whole['wall_ms']:,.0f} ms for all slots, of which the card works {whole['busy_ms']:,.0f}")
    if {"engine_profile", "engine_base_profile"} <= steps.keys():
        dial, bare = steps["engine_profile"], steps["engine_base_profile"]
        lines.append(f"a step with the dial is at {100 * bare['step_ms'] / dial['step_ms']:.1f}% of one without LoRA")
    lines += [f"{part['part']}: {part['error']}" for part in done if "error" in part]
    return "\n".join(lines)


def run(part: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One part, in this process: one result for each number of alphas."""
    import torch

    found: dict[str, Any] = {"part": part, "model": args.model, "requests": sizes(args)[0], "tokens": args.tokens}
    found["card"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    if part == "floor":
        yield found | floor(args)
        return
    if part == "smoke":
        engine = make("dial", args)
        yield found | {"engine": engine.facts()["engine"]} | smoke(engine, args)
        return
    if part.startswith("profile"):
        yield found | profile(args, dial=part == "profile")
        return
    if part.endswith("profile"):
        yield found | engine_profile(args, part.removesuffix("_profile"))
        return
    began = time.monotonic()
    engine = make(part, args)
    start = time.monotonic() - began
    found["engine"] = engine.facts()["engine"]
    if args.check and part == "dial":
        found["smoke"] = smoke(engine, args)
    bare, stock = part in BARE.values(), part.startswith("stock")
    counts = [1] if bare else [int(part.removeprefix("stock"))] if stock else [int(n) for n in args.distinct.split(",")]
    if part == "generate":
        counts = counts[:1]
    grids = {n: [0.0] if bare else [round(1.5 * i / n, 6) for i in range(1, n + 1)] for n in counts}
    cases = [(size, n) for size in sizes(args) for n in counts]
    for size, n in cases:
        # Compiles and captures what this workload needs, on prompts of its own.
        warm = size if part.startswith("engine") else args.batch
        list(engine.generate(requests_of(engine.valve, grids[n], "warm", warm, min(8, args.tokens))))
    seconds, rates = ({case: list[float]() for case in cases} for _ in range(2))
    # Round by round, and not count by count: what else a machine does would look like the cost of a count.
    for i, (size, n) in ((i, case) for i in range(args.rounds) for case in cases):
        asked = requests_of(engine.valve, grids[n], str(i), size, args.tokens)
        began = time.monotonic()
        made = list(engine.generate(asked))
        seconds[size, n].append(time.monotonic() - began)
        tokens = sum(completion.tokens for completion in made)
        rates[size, n].append(tokens / seconds[size, n][-1])
        assert len(made) == size
        assert args.natural or tokens == size * args.tokens
    for size, n in cases:
        name = part if bare else f"{'stock' if stock else part}, {n} alphas"
        name += f", {size} requests" if len(sizes(args)) > 1 else ""
        row = {
            "name": name, "tokens_per_second": max(rates[size, n]), "rates": rates[size, n], "seconds": seconds[size, n],
            "memory_gb": memory(), "start_seconds": start,
        }  # fmt: skip
        print(f"   {name}: {median(rates[size, n]):,.0f} tokens/s", flush=True)
        yield found | {"requests": size, "rows": [row]}
    if hasattr(engine, "close"):
        engine.close()


def make(part: str, args: argparse.Namespace) -> Any:
    """The engine of a part, made to never stop a chain early."""
    import torch

    from cotvalve import Valve

    device = "cuda" if torch.cuda.is_available() else "cpu"
    ours = part.partition("_")[0]
    valve = Valve.load(args.model, None if part in (*BARE.values(), "profile_base") else args.direction, device=device)
    never = [valve.model.config.vocab_size + 1]
    if ours in ("engine", "generate"):
        from cotvalve.engines import pick

        engine: Any = pick("transformers", valve, args.slots) if ours == "engine" else pick("generate", valve, args.generate_batch)
        engine._codec.stops = engine._codec.stops if args.natural else never
        return engine
    from cotvalve.engines.vllm import Options, VllmEngine

    stock = int(part.removeprefix("stock")) if part.startswith("stock") else 8
    options = Options(batch=args.batch, dial=False if part.startswith("stock") else None, eager=args.eager, stock_slots=stock, more=json.loads(args.vllm))
    engine = VllmEngine(valve, options=options)
    if not args.natural:
        engine._codec.stops = engine._server._stops = never
    return engine


def sizes(args: argparse.Namespace) -> list[int]:
    """The numbers of requests asked for."""
    return [int(size) for size in args.requests.split(",")]


def requests_of(valve: Any, grid: list[float], mark: str, count: int, tokens: int) -> list[Any]:
    """`count` requests over `grid`; `mark` makes their prompts unlike those of another round."""
    from cotvalve.problems import load
    from cotvalve.prompts import prompt, render
    from cotvalve.types import Request

    problems = load("arithmetic", split="train", limit=min(count, 2000))
    named = prompt("boxed")
    return [
        Request(f"{mark}/{i}", render(valve.tokenizer, f"({mark}, {i}) {problems[i % len(problems)].question}", named), grid[i % len(grid)], tokens)
        for i in range(count)
    ]


def memory() -> float:
    """GB in use on the card by all processes, or by this process without one."""
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 1e9
    import psutil

    own = psutil.Process()
    return sum(process.memory_info().rss for process in [own, *own.children(recursive=True)]) / 1e9


def floor(args: argparse.Namespace) -> dict[str, Any]:
    """Tokens/s if a step only read every weight once and every cached key and value once."""
    import torch

    from cotvalve import checkpoints

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype, size = checkpoints.pick_dtype(device), (4 << 30) if device.type == "cuda" else 256 << 20
    config = checkpoints.load_config(args.model)

    def best(work: Any) -> float:
        seconds = []
        for _ in range(5):
            began = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        return min(seconds)

    a = torch.empty(size // 2, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    bandwidth = size / best(partial(b.copy_, a))
    del a, b
    side = 8192 if device.type == "cuda" else 1024
    c = torch.randn(side, side, dtype=dtype, device=device)
    flops = 2 * side**3 / best(lambda: c @ c)
    head = config.hidden_size * config.vocab_size
    weights = checkpoints.billions(config) * 1e9
    # An untied input embedding is looked up, not read.
    weights -= 0 if config.tie_word_embeddings else head
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * dim
    prompt = 150
    step = dtype.itemsize * (weights + args.batch * cached * (prompt + args.tokens / 2)) / bandwidth
    matrix = 2 * args.batch * weights / flops
    return {
        "copy_gb_per_second": bandwidth / 1e9, "matrix_tflops": flops / 1e12, "step_floor_ms": 1e3 * step, "step_matrix_ms": 1e3 * matrix,
        "floor_tokens_per_second": args.batch / max(step, matrix),
    }  # fmt: skip


def smoke(engine: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Greedy chains of one dial: mixed against alone, every alpha moves something, alpha 0 among others against alone."""
    grid = [0.0, 0.25, 0.5, 1.0, 1.5, -0.5, 0.75, 1.25]
    asked = requests_of(engine.valve, grid, "smoke", min(sizes(args)[0], 128), min(args.tokens, 64))
    mixed = {c.id: c.text for c in engine.generate(asked)}
    alone: dict[str, str] = {}
    for alpha in grid:
        alone |= {c.id: c.text for c in engine.generate([r for r in asked if r.alpha == alpha])}
    plain = {c.id: c.text for c in engine.generate([replace(r, alpha=0.0) for r in asked])}
    zeros = [r.id for r in asked if r.alpha == 0]
    return {
        "mixed_equals_alone": f"{sum(mixed[i] == alone[i] for i in mixed)} of {len(mixed)}",
        "moved_by_alpha": f"{sum(mixed[r.id] != plain[r.id] for r in asked if r.alpha != 0)} of {len(asked) - len(zeros)}",
        "zero_among_others_equals_plain": f"{sum(mixed[i] == plain[i] for i in zeros)} of {len(zeros)}",
    }


def profile(args: argparse.Namespace, *, dial: bool) -> dict[str, Any]:
    """Where one decoding step goes. vLLM's core runs in this process, so that both its CPU and its GPU time show."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    engine = make("dial" if dial else "profile_base", args)
    grid = [round(1.5 * i / 8, 6) for i in range(1, 9)] if dial else [0.0]
    list(engine.generate(requests_of(engine.valve, grid, "warm", args.batch, 8)))
    server = engine._server
    core = server._engine
    encoded, _ = engine._codec.encode(requests_of(engine.valve, grid, "profile", args.batch, args.tokens))
    for i, e in enumerate(encoded):
        server._add(str(i), e)
    for _ in range(60):
        core.step()
    steps, began = 20, time.perf_counter()
    for _ in range(steps):
        core.step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    plain = (time.perf_counter() - began) / steps
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with watch(activities=activities) as seen:
        for _ in range(steps):
            core.step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    on_gpu = [event for event in seen.key_averages() if event.device_type.name != "CPU"] if torch.cuda.is_available() else list(seen.key_averages())
    spent = {event.key: (event.self_device_time_total or event.self_cpu_time_total) / steps / 1e3 for event in on_gpu}
    top = sorted(spent.items(), key=lambda pair: -pair[1])[:25]
    seen_cpu = cProfile.Profile()
    seen_cpu.enable()
    for _ in range(steps):
        core.step()
    seen_cpu.disable()
    stats = pstats.Stats(seen_cpu).stats  # pyright: ignore[reportAttributeAccessIssue]
    slow = sorted(stats.items(), key=lambda item: -item[1][3])[:40]
    python = [[f"{Path(where).name}:{line}:{name}", round(1e3 * row[3] / steps, 3), row[0] // steps] for (where, line, name), row in slow]
    return {
        "engine": engine.facts()["engine"], "step_ms": 1e3 * plain, "busy_ms": sum(spent.values()),
        "top_ms": [[name[:110], round(ms, 4)] for name, ms in top], "python_ms": python,
    }  # fmt: skip


def engine_profile(args: argparse.Namespace, part: str) -> dict[str, Any]:
    """Where one decoding step of the default engine goes, every slot filled."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    from cotvalve.engines.batch import Batch

    engine = make(part, args)
    slots = args.slots or engine.slots_that_fit(512)
    grid = [0.0] if part in BARE.values() else [round(1.5 * i / 8, 6) for i in range(1, 9)]
    encoded, _ = engine._codec.encode(requests_of(engine.valve, grid, "profile", slots, args.tokens))
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]

    def spent(seen: Any, steps: float) -> dict[str, Any]:
        events = [event for event in seen.key_averages() if not cuda or event.device_type.name != "CPU"]
        took = {event.key: (event.self_device_time_total if cuda else event.self_cpu_time_total) / steps / 1e3 for event in events}
        top = [[name[:110], round(ms, 4)] for name, ms in sorted(took.items(), key=lambda pair: -pair[1])[:25]]
        return {"busy_ms": sum(took.values()), "kernels": int(sum(event.count for event in events) / steps), "top_ms": top}

    with engine.fitted():
        batch: Batch | None = Batch(engine, encoded, slots, 0.0)

        def burst(count: int) -> float:
            assert batch is not None
            began = time.perf_counter()
            for _ in range(count):
                batch.launch()
                batch.collect()
            return 1e3 * (time.perf_counter() - began) / count / batch.burst

        first = burst(1) * batch.burst
        burst(4)
        plain = burst(6)
        with watch(activities=activities) as seen:
            burst(2)
        step = spent(seen, 2 * batch.burst)
        batch = None  # before the next one takes its caches
        batch = Batch(engine, encoded, slots, 0.0)
        with watch(activities=activities) as seen:
            burst(1)
    first_spent = spent(seen, 1)
    batch = None  # its caches
    asked = requests_of(engine.valve, grid, "whole", slots, args.tokens)
    walls: list[float] = []
    for _ in range(3):
        began = time.perf_counter()
        list(engine.generate(asked))
        walls.append(1e3 * (time.perf_counter() - began))
    with watch(activities=activities) as seen:
        list(engine.generate(asked))
    whole = {"wall_ms": median(walls), **spent(seen, 1)}
    watched = cProfile.Profile()
    watched.runcall(lambda: list(engine.generate(asked)))
    stats = pstats.Stats(watched).stats  # pyright: ignore[reportAttributeAccessIssue]
    slow = sorted(stats.items(), key=lambda item: -item[1][2])[:25]
    whole["python_ms"] = [[f"{Path(where).name}:{line}:{name}", round(1e3 * row[2], 1), row[0]] for (where, line, name), row in slow]
    # The prompts of all slots, and the first burst with the capture of its graph.
    return {
        "engine": engine.name, "slots": slots, "first_burst_ms": first, "step_ms": plain, **step, "first": first_spent, "whole": whole,
    }  # fmt: skip


def random_direction(model: str, rank: int, folder: Path) -> str:
    """A direction with small random factors on all linear layers of `model`'s blocks."""
    import torch

    from cotvalve import checkpoints
    from cotvalve.adapters import Factor
    from cotvalve.card import Card
    from cotvalve.direction import Direction

    generator = torch.Generator().manual_seed(0)
    factors = {
        name: Factor(
            torch.randn(rank, module.in_features, generator=generator) / module.in_features**0.5,
            0.02 * torch.randn(module.out_features, rank, generator=generator),
            float(rank),
        )
        for name, module in checkpoints.skeleton(checkpoints.load_config(model)).named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")
    }
    return str(Direction(factors, Card(model)).save(folder))


if __name__ == "__main__":
    main()
