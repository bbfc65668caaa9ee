"""How fast ++ training is on one GPU: tokens a second, peak memory, and the share of the card's own matrix rate.

    python benchmarks/training.py --model Qwen/Qwen2.5-Coder-1.5B --out training.jsonl
    python benchmarks/training.py --random --parts matrix plain nodial trl profile

`--random` takes random weights in the shape of Qwen2.5-1.5B: nothing is downloaded. Each part runs in a process of its
own and adds one JSON line to --out as it ends. Parts:

    matrix      the card's measured bf16 matrix rate, which the others are compared with
    plain       ++ training as `cotvalve train` runs it
    eager       the same, not compiled;  rows: with padded rows;  rows-eager: both
    nodial      the same without a dial: what the alpha of each row costs
    peft        PEFT's layers under autocast, padded rows: how training ran without lean.py
    checkpoint  plain with gradient checkpointing
    sums        LoRA's products added by PyTorch's own rules, for the compiler to join
    trl         plain LoRA by TRL's SFTTrainer with packing, in the fastest of the settings named in TRL
    exact       gradients of one batch against PEFT in fp32, a row at a time
    reference   loss curves: plain against PEFT in fp32, a row at a time
    profile     where a step's time goes: kernels, their number, the share in which the GPU waits

MFU counts 4 floating-point operations per parameter and token (forward 2, backward 2: the weights themselves have no
gradient), over the measured rate. Tokens are real ones, padding is none. Warm-up and compilation are timed apart.
"""

from __future__ import annotations

import argparse
import inspect
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PARTS = ("matrix", "plain", "eager", "rows", "rows-eager", "nodial", "peft", "checkpoint", "sums", "trl", "exact", "reference", "profile")
USUAL = ("matrix", "plain", "nodial", "peft", "trl", "exact", "reference", "profile")
WARM = 8
"""Steps that are not timed: compilation, and memory that grows."""
TRL = (
    {"packing_strategy": "bfd", "gradient_checkpointing": True, "per_device_train_batch_size": 8},
    {"packing_strategy": "wrapped", "gradient_checkpointing": True, "per_device_train_batch_size": 32},
    {"packing_strategy": "wrapped", "gradient_checkpointing": False, "per_device_train_batch_size": 8},
)
"""TRL's own packing, as it comes; packing without borders between examples, which needs no mask; without recomputation."""
SHAPE = {
    "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
    "num_key_value_heads": 2, "max_position_embeddings": 32768, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True, "use_sliding_window": False,
}  # fmt: skip


def load(options: argparse.Namespace, dtype: str = "bfloat16") -> Any:
    """The model on the device, in `dtype`."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    if not options.random:
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, dtype)).to(device)
    shape = SHAPE | ({"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "vocab_size": 5000} if options.small else {})
    torch.set_default_dtype(getattr(torch, dtype))
    with torch.device(device):
        model = Qwen2ForCausalLM(Qwen2Config(**shape))
    torch.set_default_dtype(torch.float32)
    return model


def synthetic(count: int, vocabulary: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of about 150 prompt and 60 to 400 learned tokens, as MixChain's are, at alphas between 0 and 1."""
    draw = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for _ in range(count):
        prompt, chain = max(20, int(draw.gauss(150, 30))), draw.randint(60, 400)
        ids = [draw.randrange(vocabulary) for _ in range(prompt + chain)]
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "alpha": draw.random()})
    return rows


def mixchain(path: str, model: str) -> list[dict[str, Any]]:
    """The rows of `cotvalve train plus` on a file of MixChain."""
    from transformers import AutoTokenizer

    from cotvalve import mixchain, recipes
    from cotvalve.batches import encode

    tokenizer = AutoTokenizer.from_pretrained(model)
    (stage,) = recipes.plus(mixchain.load(path, tokenizer))
    return encode(stage, tokenizer, "boxed", 4096)[0]


def data(options: argparse.Namespace, steps: int, vocabulary: int) -> list[dict[str, Any]]:
    """Enough rows for `steps` steps."""
    count = options.batch * steps
    if not options.mix:
        return synthetic(count, vocabulary)
    found = mixchain(options.mix, options.model)
    return (found * -(-count // len(found)))[:count]


def matrix(_options: argparse.Namespace) -> dict[str, Any]:
    """bf16 products on random numbers: a large square one, and the widest of the model's layers."""
    import torch

    def rate(m: int, k: int, n: int) -> float:
        a, b = (torch.randn(*size, device="cuda", dtype=torch.bfloat16) for size in ((m, k), (k, n)))
        for _ in range(5):
            a @ b
        times: list[float] = []
        for _ in range(5):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(10):
                a @ b
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 10)
        return round(2 * m * k * n / sorted(times)[2] / 1e9, 1)

    big = torch.empty(2**30, dtype=torch.int8, device="cuda")
    other = torch.empty_like(big)
    other.copy_(big)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(10):
        other.copy_(big)
    end.record()
    torch.cuda.synchronize()
    shapes = {"up": (16384, 1536, 8960), "down": (16384, 8960, 1536), "head": (2048, 1536, 151936), "square 1536": (16384, 1536, 1536)}
    return {
        "tflops": rate(8192, 8192, 8192), "copy_gb_s": round(20 * 2**30 / begin.elapsed_time(end) / 1e6),
        "card": torch.cuda.get_device_name(), "torch": torch.__version__, **{f"tflops {k}": rate(*v) for k, v in shapes.items()},
    }  # fmt: skip


class Watch:
    """Tokens, seconds and losses of the timed steps; on a GPU the clock is read when it has nothing left to do."""

    def __init__(self, steps: int, profile: int = 0) -> None:
        self.steps, self.profile = steps, profile
        self.done = self.tokens = self.learned = 0
        self.began = self.first = self.seconds = 0.0
        self.losses: list[Any] = []
        self.made: Any = None

    def now(self) -> float:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def before(self) -> None:
        """Call before each step."""
        import torch

        if self.done == 0:
            self.began = self.now()
        if self.done == 1:
            self.first = self.now() - self.began
        if self.done == WARM:
            self.tokens = self.learned = 0
            self.warm = self.now()
        if self.done == WARM + self.steps:
            self.seconds = self.now() - self.warm
            self.counted = self.tokens, self.learned
            if self.profile:
                self.made = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
                self.made.__enter__()
                self.made.began = self.now()
        self.done += 1

        if self.made is not None and self.done == WARM + self.steps + self.profile + 1:
            self.made.seconds = self.now() - self.made.began
            self.made.__exit__(None, None, None)

    def found(self, parameters: int, rate: float) -> dict[str, Any]:
        import torch

        tokens, learned = self.counted
        a_second = tokens / self.seconds
        return {
            "tokens_s": round(a_second), "step_s": round(self.seconds / self.steps, 4), "tokens_step": tokens // self.steps,
            "learned_share": round(learned / tokens, 3), "first_step_s": round(self.first, 1),
            "mfu": round(4 * parameters * a_second / rate / 1e12, 4) if rate else None,
            "peak_gb": round(torch.cuda.max_memory_allocated() / 2**30, 1) if torch.cuda.is_available() else None,
            "reserved_gb": round(torch.cuda.max_memory_reserved() / 2**30, 1) if torch.cuda.is_available() else None,
            "last_loss": round(float(self.losses[-1]), 4),
        }  # fmt: skip


def train(options: argparse.Namespace, part: str, *, profile: int = 0, dtype: str = "bfloat16", rows: Any = None, **how: Any) -> Watch:
    """`cotvalve.train.fit` with a clock in it, changed as `part` asks."""
    import torch

    from cotvalve import lean as module
    from cotvalve import learner
    from cotvalve import train as training
    from cotvalve.direction import Card
    from cotvalve.fitting import FitSettings
    from cotvalve.recipes import Stage
    from cotvalve.train import fit
    from cotvalve.valve import Valve

    model = load(options, dtype)
    # One step more than is looked at: the clock stops before it, and before the last checkpoint is written.
    rows = rows or data(options, WARM + options.steps + profile + 1, model.config.vocab_size)
    watch = Watch(options.steps, profile)

    class Timed(learner.ValveTrainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            watch.before()
            loss = super().training_step(model, inputs, num_items_in_batch)
            watch.losses.append(loss)
            watch.tokens += sum(len(row["input_ids"]) for row in inputs["step"].rows)
            watch.learned += sum(label != -100 for row in inputs["step"].rows for label in row["labels"])
            return loss

    # The same product, without the lines that turn the dial.
    turn = ".mul_(alpha).masked_fill_(closed, 0)"
    source = inspect.getsource(module.Product)
    assert source.count(turn) == 2
    scope = vars(module).copy()
    exec("from __future__ import annotations\n" + source.replace(turn, ""), scope)

    def by_sums(self: Any, x: Any) -> Any:
        a, b = (side["default"].weight for side in (self.lora_A, self.lora_B))
        thin = torch.where(self.position.closed, 0.0, torch.nn.functional.linear(x, a.to(x.dtype)) * self.position.alpha)
        return self.base_layer(x) + torch.nn.functional.linear(thin.to(x.dtype), (b * self.scaling["default"]).to(x.dtype))

    changed: dict[str, Any] = {"ValveTrainer": Timed, "encode": lambda *_: (rows, 0), "TOKENS_AT_ONCE": options.tokens}
    if part in ("rows", "rows-eager", "peft"):
        changed["can_lie_flat"] = lambda _model: False
    if part == "peft":
        module.plain = lambda _layer: False
    if part == "sums":
        module.LeanLinear.forward = by_sums
    if part == "nodial":
        module.Product = scope["Product"]
    for name, value in changed.items():
        setattr(training, name, value)
    settings = FitSettings(
        rank=options.rank, lora_alpha=2 * options.rank, batch=options.batch, checkpoint_every=10**6,
        compile="no" if part in ("eager", "rows-eager", "peft") or options.eager else "yes",
        gradient_checkpointing=part == "checkpoint", **how,
    )  # fmt: skip
    torch.manual_seed(0)
    valve = Valve.fresh(model, None, settings.lora(model))  # pyright: ignore[reportArgumentType]
    with tempfile.TemporaryDirectory() as folder:
        fit(valve, [Stage("plus", ())], settings, Path(folder), Card("base", "shorter", "plus"),
            progress=lambda *said: print(*said, file=sys.stderr, flush=True))  # fmt: skip
    watch.parameters = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    return watch


def speed(options: argparse.Namespace, part: str) -> dict[str, Any]:
    watch = train(options, part)
    return watch.found(watch.parameters, options.rate)


def profiled(options: argparse.Namespace, steps: int = 3) -> dict[str, Any]:
    """Kernels of `steps` steps by the time they take, and the share of the time in which none runs."""
    import torch

    watch = train(options, "plain", profile=steps)
    kernels = [e for e in watch.made.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(e.device_time for e in kernels) / 1e6
    by_name: dict[str, list[float]] = {}
    for e in kernels:
        by_name.setdefault(e.name, []).append(e.device_time)
    table = sorted(by_name.items(), key=lambda item: -sum(item[1]))
    for name, times in table[:40]:
        print(f"{sum(times) / 1e3 / steps:9.2f} ms {len(times) / steps:7.0f} x {sum(times) / len(times):8.1f} us  {name[:130]}", file=sys.stderr)
    products = sum(sum(times) for name, times in table if any(word in name for word in ("gemm", "nvjet", "cutlass", "splitK"))) / 1e6
    return {
        **watch.found(watch.parameters, options.rate), "profiled_step_s": round(watch.made.seconds / steps, 4),
        "kernels_step": len(kernels) // steps, "idle_share": round(1 - busy / watch.made.seconds, 3),
        "matrix_share": round(products / busy, 3),
        "top": [[name[:90], round(sum(times) / 1e3 / steps, 2), round(len(times) / steps)] for name, times in table[:40]],
    }  # fmt: skip


def exact(options: argparse.Namespace) -> dict[str, Any]:
    """Relative error of the gradients of one batch of 12 rows: ||g - g*|| / ||g*||, g* by PEFT in fp32, a row at a time."""
    import torch
    from peft.helpers import disable_input_dtype_casting

    from cotvalve.batches import collate, collate_flat
    from cotvalve.fitting import FitSettings
    from cotvalve.lean import can_lie_flat, lean
    from cotvalve.learner import Learner
    from cotvalve.valve import Valve

    rows = data(options, 1, SHAPE["vocab_size"] if not options.small else 5000)[:12]
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def valve(dtype: str) -> Valve:
        model = load(options, dtype)
        torch.manual_seed(0)
        made = Valve.fresh(model, None, FitSettings(rank=options.rank).lora(model))  # pyright: ignore[reportArgumentType]
        for name, parameter in made.model.named_parameters():
            parameter.requires_grad_("lora_" in name)
            if "lora_" in name:
                values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                parameter.data = (0.02 * values).to(device)
        return made

    def gradients(made: Valve, portions: list[list[Any]], collated: Any, at: Callable[[Any], Any]) -> tuple[float, list[Any]]:
        made.model.zero_grad()
        total = 0.0
        for portion in portions:
            batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in collated(portion).items()}
            with at(batch.pop("alpha")):
                loss = Learner(made)(**batch, divisor=1000)
                loss.backward()
            total += float(loss)
        return total, [p.grad.double().cpu() for p in made.model.parameters() if p.grad is not None]

    one_by_one = [[row] for row in rows]
    made = valve("float32")
    true_loss, truth = gradients(made, one_by_one, collate, made.at)
    size = sum(float(g.square().sum()) for g in truth) ** 0.5

    def against(loss: float, found: list[Any]) -> list[float]:
        off = sum(float((g - t).square().sum()) for g, t in zip(found, truth, strict=True)) ** 0.5
        return [float(f"{off / size:.3g}"), float(f"{abs(loss - true_loss) / true_loss:.3g}")]

    report: dict[str, Any] = {}
    with lean(made) as position:
        report["fp32 lean, padded"] = against(*gradients(made, [rows], collate, position.at))
    del made
    made = valve("bfloat16")
    with torch.autocast(device, dtype=torch.bfloat16), disable_input_dtype_casting(made.peft_model):
        report["bf16 PEFT, a row at a time"] = against(*gradients(made, one_by_one, collate, made.at))
    flat = can_lie_flat(made.model)
    for compiled in (False, True)[: 2 - options.eager]:
        for lying in ((flat,) if compiled else (False, True)[: 1 + flat]):
            with lean(made, compiled=compiled, flat=lying) as position:
                name = f"bf16 lean{', compiled' * compiled}, {'flat' if lying else 'padded'}"
                report[name] = against(*gradients(made, [rows], collate_flat if lying else collate, position.at))
    return report


def reference(options: argparse.Namespace) -> dict[str, Any]:
    """Losses of 24 steps of 16 rows: plain, and PEFT in fp32 with each row by itself; and in bf16, for the noise."""
    options.batch, options.steps = 16, 16
    rows = data(options, WARM + 17, SHAPE["vocab_size"] if not options.small else 5000)
    how = {"rows": rows, "learning_rate": 1e-3}
    curves = {
        "plain": train(options, "plain", **how),
        "fp32": train(options, "peft", dtype="float32", micro_batch=1, **how),
        "bf16": train(options, "peft", micro_batch=1, **how),
    }
    losses = {name: [round(float(loss), 5) for loss in watch.losses] for name, watch in curves.items()}

    def off(a: str, b: str) -> float:
        return max(abs(x - y) / y for x, y in zip(losses[a], losses[b], strict=True))

    return {
        "plain_off_fp32": off("plain", "fp32"), "bf16_off_fp32": off("bf16", "fp32"),
        "fell": [losses["fp32"][0], losses["fp32"][-1]], "losses": losses,
    }  # fmt: skip


def trl(_options: argparse.Namespace) -> dict[str, Any]:
    """SFTTrainer on the same rows at alpha 1, packed; the fastest of TRL's settings."""
    found: dict[str, Any] = {}
    for number, how in enumerate(TRL):
        name = " ".join(f"{k}={v}" for k, v in how.items())
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--trl", str(number)], capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        found[name] = json.loads(lines[-1]) if lines else {"failed": done.stderr.strip()[-600:]}
        print(name, found[name], file=sys.stderr, flush=True)
    best = max((one for one in found.values() if "tokens_s" in one), key=lambda one: one["tokens_s"], default={})
    return {**best, "settings": found}


def trl_once(options: argparse.Namespace, how: dict[str, Any]) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    model = load(options)
    rows = data(options, 2 * (WARM + options.steps), model.config.vocab_size)
    watch = Watch(options.steps)

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            watch.before()

        def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == WARM + options.steps:
                watch.seconds, watch.counted = watch.now() - watch.warm, (watch.tokens, max(1, watch.learned))
                control.should_training_stop = True

    class Counted(SFTTrainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            watch.tokens += inputs["input_ids"].numel()
            watch.learned += int((inputs["labels"] != -100).sum())
            loss = super().training_step(model, inputs, num_items_in_batch)
            watch.losses.append(loss)
            return loss

    from tokenizers import Tokenizer, models

    core = Tokenizer(models.WordLevel({"<unk>": 0, "<pad>": 1, "<end>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", eos_token="<end>")
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder, packing=True, max_length=1024, bf16=torch.cuda.is_available(), learning_rate=1e-4, logging_steps=5, report_to=[], save_strategy="no",
            disable_tqdm=True, use_cpu=not torch.cuda.is_available(), max_steps=WARM + options.steps + 1, gradient_accumulation_steps=1, **how,
        )  # fmt: skip
        trainer = Counted(
            model=model, args=arguments, processing_class=tokenizer, callbacks=[Clock()],
            train_dataset=Dataset.from_list([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]),
            peft_config=LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", task_type="CAUSAL_LM"),
        )  # fmt: skip
        trainer.train()
    parameters = sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    return {**watch.found(parameters, options.rate), "torch": torch.__version__}


def main() -> None:
    """Runs the parts one after the other, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", default="", help="a checkpoint folder or hub id")
    what.add_argument("--random", action="store_true", help="random weights in the shape of Qwen2.5-1.5B")
    parser.add_argument("--small", action="store_true", help="with --random: 3 layers of 96, to try the program itself")
    parser.add_argument("--mix", default="", help="a file of MixChain; by default rows of random tokens of the same lengths")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=USUAL)
    parser.add_argument("--out", type=Path, default=Path("training.jsonl"), help="one JSON line per part is added")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=64, help="rows per optimizer step")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens computed at once")
    parser.add_argument("--steps", type=int, default=20, help=f"timed steps, behind {WARM} that are not")
    parser.add_argument("--rate", type=float, default=0.0, help="TFLOP/s to compare with; by default the part matrix measures it")
    parser.add_argument("--eager", action="store_true", help="do not compile, in any part")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--trl", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trl is not None:
        print(json.dumps(trl_once(options, TRL[options.trl])))
        return
    if options.part:
        others = {"matrix": matrix, "trl": trl, "exact": exact, "reference": reference, "profile": profiled}
        found = others[options.part](options) if options.part in others else speed(options, options.part)
        print(json.dumps(found))
        return
    for part in options.parts:
        began = time.time()
        command = [sys.executable, __file__, *sys.argv[1:], "--part", part, *(["--rate", str(options.rate)] if options.rate else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        found = json.loads(lines[-1]) if lines else {"failed": done.returncode}
        options.rate = found.get("tflops", options.rate)
        row = {"part": part, "at": time.strftime("%H:%M:%S"), "wall_s": round(time.time() - began, 1), **found}
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps({k: v for k, v in row.items() if k not in ("top", "losses")}), flush=True)


if __name__ == "__main__":
    main()
