"""Stage 3: fit(examples, each with its alpha). CoT-Valve, CoT-Valve++ and CoT-Valve+P are stages of it.

Comes in: a base model, stages of examples (recipes.py). Goes out: a direction's folder in PEFT's format. The
loss is the cross-entropy of the chain's own tokens, prompt excluded, averaged over all of them in a step;
each row of a batch goes through theta + alpha * delta with its own alpha (eq. 2 and 3). Training runs on
`transformers.Trainer`: gradient accumulation, checkpoints, and a killed run that goes on to the same weights.

Rows are padded on the right and carry no attention mask (causal attention never looks right, and the fused
kernels need no mask), or packed into one row with restarting positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft import LoraConfig, set_peft_model_state_dict
from peft.helpers import disable_input_dtype_casting
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from cotvalve.direction import CARD, Card
from cotvalve.errors import DataError, SettingError
from cotvalve.problems import fingerprint, training
from cotvalve.prompts import prompt, render, target, thinks
from cotvalve.records import Json, Run, disk, read_json, write_json
from cotvalve.settings import ModelSettings, Settings
from cotvalve.taskvector import TaskVector
from cotvalve.types import Progress, Toward, silent
from cotvalve.valve import Valve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cotvalve.recipes import Stage

IGNORED = -100
LOSS_SLICE = 2048
"""Completion tokens whose logits exist at a time: 2,048 x 152k x 4 bytes = 1.2 GB."""

TOKENS_AT_ONCE = 16384
"""Tokens of one forward pass on a GPU when micro_batch is not given."""


class FitSettings(Settings):
    """How a direction is learned, whatever the recipe."""

    rank: int = 16
    """LoRA rank."""
    lora_alpha: float = 32.0
    """LoRA's own scale: the branch is multiplied by lora_alpha / rank. Not the valve's alpha."""
    rslora: bool = False
    """Scale by lora_alpha / sqrt(rank) instead."""
    dora: bool = False
    """DoRA (paper's Table 10): trained at alpha 1 only, used as an exact weight difference."""
    full: bool = False
    """Full fine-tuning (the LIMO recipe): a checkpoint and its task vector instead of a LoRA."""
    dropout: float = 0.0
    """LoRA dropout."""
    modules: str = "all"
    """Linear layers that learn: all, attention, mlp, or names with commas (q_proj,o_proj)."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup: float = 0.03
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    clip: float = 1.0
    """Largest gradient norm; 0 does not clip."""
    epochs: float = 1.0
    """Passes over the examples, per stage."""
    batch: int = 64
    """Examples per optimizer step."""
    micro_batch: int | None = None
    """Rows in memory at once; by default sized from the longest example."""
    max_length: int = 4096
    """Examples with more tokens are left out, and counted."""
    packing: bool = False
    """Pack several examples into one row of max_length tokens, each with its own alpha."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, a third more time."""
    checkpoint_every: int = 50
    """Optimizer steps between two checkpoints."""
    seed: int = 0
    """Seed of initial weights, order and dropout."""

    def model_post_init(self, context: Any, /) -> None:
        if self.dora and self.full:
            raise ValueError("dora and full exclude each other")
        if self.rank < 1 or self.batch < 1 or self.epochs <= 0:
            raise ValueError("rank, batch and epochs have to be positive")

    def lora(self, model: nn.Module) -> LoraConfig:
        """PEFT's configuration for `model`."""
        return LoraConfig(
            r=self.rank, lora_alpha=self.lora_alpha, use_rslora=self.rslora, use_dora=self.dora,  # type: ignore[arg-type]
            lora_dropout=self.dropout, target_modules=target_modules(model, self.modules), task_type="CAUSAL_LM",
        )  # fmt: skip


def target_modules(model: nn.Module, which: str) -> list[str]:
    """Name suffixes of the linear layers meant by all, attention, mlp or a list with commas.

    The output head is never among them. Raises SettingError when nothing matches, with the names there are.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    linear = [name for name in linear if not name.endswith("lm_head")]
    if which == "all":
        chosen = linear
    elif which in ("attention", "mlp"):
        chosen = [name for name in linear if (("attn" in name) or ("attention" in name)) == (which == "attention")]
    else:
        wanted = {part.strip() for part in which.split(",")}
        chosen = [name for name in linear if name.rpartition(".")[2] in wanted]
        missing = wanted - {name.rpartition(".")[2] for name in chosen}
        if missing:
            raise SettingError(f"modules: no linear layer called {sorted(missing)[0]!r}; there are {_suffixes(linear)}")
    if not chosen:
        raise SettingError(f"modules '{which}' matches 0 layers; there are {_suffixes(linear)}")
    return _suffixes(chosen)


def _suffixes(names: Sequence[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def encode(stage: Stage, tokenizer: PreTrainedTokenizerBase, ask: str, max_length: int) -> tuple[list[Json], int]:
    """Examples as token ids: input_ids, labels (prompt positions are -100), alpha; and how many were too long."""
    how = prompt(ask)
    rows: list[Json] = []
    too_long = 0
    for example in stage.examples:
        before = render(tokenizer, example.problem.question, how)
        start = tokenizer(before, add_special_tokens=False)["input_ids"]
        end = tokenizer(target(tokenizer, before, example.chain.text), add_special_tokens=False)["input_ids"]
        if len(start) + len(end) > max_length:
            too_long += 1
            continue
        rows.append({"input_ids": start + end, "labels": [IGNORED] * len(start) + end, "alpha": example.alpha})
    if not rows:
        raise DataError(f"stage '{stage.name}': 0 of {len(stage.examples)} examples fit {max_length} tokens; raise max_length")
    return rows, too_long


def pack(rows: Sequence[Json], length: int) -> list[Json]:
    """Rows of up to `length` tokens, first fit by falling length; positions restart, alpha becomes per token."""
    bins: list[list[Json]] = []
    room: list[int] = []
    for row in sorted(rows, key=lambda r: -len(r["input_ids"])):
        size = len(row["input_ids"])
        at = next((i for i, free in enumerate(room) if free >= size), None)
        if at is None:
            bins.append([row])
            room.append(length - size)
        else:
            bins[at].append(row)
            room[at] -= size
    return [
        {
            "input_ids": [token for row in packed for token in row["input_ids"]],
            "labels": [label for row in packed for label in row["labels"]],
            "alpha": [row["alpha"] for row in packed for _ in row["input_ids"]],
            "position_ids": [i for row in packed for i in range(len(row["input_ids"]))],
        }
        for packed in bins
    ]


def collate(rows: Sequence[Json]) -> dict[str, Tensor]:
    """Pads on the right: input_ids and labels [B, T]; alpha [B], or [B, T] and position_ids for packed rows."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, value: int | float) -> Tensor:
        return torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])

    batch = {"input_ids": padded("input_ids", 0), "labels": padded("labels", IGNORED)}
    if "position_ids" in rows[0]:
        batch["position_ids"] = padded("position_ids", 0)
        batch["alpha"] = padded("alpha", 0.0)
    else:
        batch["alpha"] = torch.tensor([row["alpha"] for row in rows])
    return batch


class Learner(nn.Module):
    """The model as the Trainer sees it: token ids and alphas in, loss out."""

    def __init__(self, valve: Valve) -> None:
        super().__init__()
        self.model = valve.model
        config = valve.model.config
        scaled = ("logits_scaling", "logit_scale", "final_logit_softcapping")
        self.plain_head = not any(getattr(config, name, None) for name in scaled)

    def forward(
        self, input_ids: Tensor, labels: Tensor, divisor: Tensor | float, position_ids: Tensor | None = None
    ) -> Tensor:
        """Summed cross-entropy of the labelled positions over `divisor`.

        Logits are made for those positions alone and a slice at a time: 150k-word vocabularies would fill
        the memory otherwise.
        """
        if not self.plain_head:
            logits = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits[:, :-1]
            return _cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()) / divisor
        hidden = self.model.get_decoder()(input_ids=input_ids, position_ids=position_ids, use_cache=False)[0]
        learned = labels[:, 1:] != IGNORED
        states, targets = hidden[:, :-1][learned], labels[:, 1:][learned]
        head = self.model.get_output_embeddings()
        total = states.new_zeros((), dtype=torch.float32)
        for part, wanted in zip(states.split(LOSS_SLICE), targets.split(LOSS_SLICE), strict=True):
            total = total + checkpoint(lambda s, t: _cross_entropy(head(s), t), part, wanted, use_reentrant=False)
        return total / divisor


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")


class _Order(LengthGroupedSampler):
    """Rows of like length together, in an order that seed and epoch decide and nothing else.

    The Trainer's own draws each epoch's order from the global generator: a run that was stopped in its second
    epoch would go on with the order of the first.
    """

    def __init__(self, trainer: ValveTrainer) -> None:
        step = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps
        super().__init__(step, lengths=[len(row["input_ids"]) for row in trainer.train_dataset])
        self.trainer, self.steps = trainer, math.ceil(len(self.lengths) / step)

    def __iter__(self) -> Iterator[int]:
        epoch = self.trainer.state.global_step // self.steps
        self.generator = torch.Generator().manual_seed(self.trainer.args.seed + (epoch << 32))
        return super().__iter__()


class ValveTrainer(Trainer):
    """The Trainer with one alpha per row (or token) around every forward and backward pass."""

    def __init__(self, valve: Valve, card: Card, skip: _SkipBadSteps, **kwargs: Any) -> None:
        super().__init__(model=Learner(valve), data_collator=collate, callbacks=[skip], **kwargs)
        skip.trainer = self
        self.valve, self.card = valve, card
        # compute_loss divides by the tokens of the whole step, so the Trainer must not divide again.
        self.model_accepts_loss_kwargs = True

    def _get_train_sampler(self, train_dataset: Any = None) -> _Order:
        return _Order(self)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        alpha = inputs.pop("alpha")
        if self.valve.dial is None:
            return super().training_step(model, inputs, num_items_in_batch)
        # Around the backward pass too: gradient checkpointing runs the forward again inside it.
        with self.valve.at(alpha.to(self.args.device)):
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        divisor = num_items_in_batch if num_items_in_batch is not None else (inputs["labels"][:, 1:] != IGNORED).sum()
        return model(**inputs, divisor=divisor)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir or ".")
        with disk(folder):
            save_learned(self.valve, self.card, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.valve.adapted:
            set_peft_model_state_dict(self.valve.peft_model, load_file(Path(resume_from_checkpoint) / "adapter_model.safetensors"))
        else:
            plain = type(self.valve.model).from_pretrained(resume_from_checkpoint, dtype=torch.float32)
            self.valve.model.load_state_dict(plain.state_dict())


def save_learned(valve: Valve, card: Card, folder: Path) -> None:
    """What was learned, in PEFT's format; the whole checkpoint after full fine-tuning."""
    if valve.rows:
        valve.current(card).save(folder)
    elif valve.adapted:
        valve.peft_model.save_pretrained(folder)
        card.write(folder / CARD, "lora")
    else:
        valve.model.save_pretrained(folder)


class _SkipBadSteps(TrainerCallback):
    """Skips and counts a step whose gradient is not finite; reports the others."""

    def __init__(self, stage: str, progress: Progress) -> None:
        self.trainer: ValveTrainer | None = None
        self.stage, self.progress = stage, progress
        self.skipped: list[int] = []

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self.trainer is not None
        learned = [p for p in self.trainer.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in learned])  # type: ignore[misc]
        if not math.isfinite(float(norm)):
            self.skipped.append(state.global_step + 1)
            for p in learned:
                p.grad = None

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            note = f"loss {logs['loss']:.3f}" + (f", {len(self.skipped)} steps skipped" if self.skipped else "")
            self.progress(self.stage, state.global_step, state.max_steps, note)


def fit(
    valve: Valve,
    stages: Sequence[Stage],
    settings: FitSettings,
    folder: Path,
    card: Card,
    *,
    ask: str = "boxed",
    progress: Progress = silent,
) -> Json:
    """Trains `valve` in place, stage after stage on the same weights; returns what happened per stage.

    `valve` has a fresh or loaded LoRA, or none for full fine-tuning. Each stage restarts optimizer and
    learning rate (the paper does not say; PAPER 3.3 only says "at each iteration"). Checkpoints live under
    `folder`; the same call on the same folder goes on from the last one, and finished stages are not run again.
    """
    if any(example.alpha != 1 for stage in stages for example in stage.examples) and not valve.rows:
        raise SettingError("chains at other alphas than 1 need a LoRA direction (not full fine-tuning or DoRA); use the recipe valve or progressive")
    device = valve.model.device
    dtype = valve.model.dtype
    learned = [p for name, p in valve.model.named_parameters() if settings.full or ".lora_" in name]
    for parameter in valve.model.parameters():
        parameter.requires_grad_(False)
    for parameter in learned:
        # Adam's small updates are lost in bf16: what is learned is kept in fp32.
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    if settings.gradient_checkpointing:
        valve.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    report: Json = {"stages": []}
    for number, stage in enumerate(stages):
        report["stages"].append(_fit_stage(valve, stage, number, settings, folder, card, ask, progress, dtype, device))
    if settings.gradient_checkpointing:
        valve.model.gradient_checkpointing_disable()
    valve.model.eval()
    for parameter in learned:
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(False)
    return report


def _fit_stage(
    valve: Valve, stage: Stage, number: int, settings: FitSettings, folder: Path, card: Card, ask: str,
    progress: Progress, dtype: torch.dtype, device: torch.device,
) -> Json:  # fmt: skip
    home = folder / f"stage-{number}"
    rows, too_long = encode(stage, valve.tokenizer, ask, settings.max_length)
    count = len(rows)
    tokens = sum(len(row["input_ids"]) for row in rows)
    learned = sum(label != IGNORED for row in rows for label in row["labels"])
    batch = settings.batch
    if settings.packing:
        rows = pack(rows, settings.max_length)
        batch = max(1, round(settings.batch * len(rows) / count))
    longest = max(len(row["input_ids"]) for row in rows)
    micro = min(batch, settings.micro_batch or max(1, (TOKENS_AT_ONCE if device.type == "cuda" else TOKENS_AT_ONCE // 4) // longest))
    micro = next(size for size in range(micro, 0, -1) if batch % size == 0)
    skip = _SkipBadSteps(stage.name, progress)
    autocast = dtype == torch.bfloat16 and device.type == "cuda"
    # Autocast makes bf16 of the adapters' fp32 weights; PEFT's own cast of the input to fp32 would only be undone.
    casting = disable_input_dtype_casting(valve.peft_model) if valve.adapted and autocast else nullcontext()
    trainer = ValveTrainer(
        valve, card, skip, train_dataset=rows,
        args=TrainingArguments(
            output_dir=str(home), per_device_train_batch_size=micro, gradient_accumulation_steps=batch // micro,
            num_train_epochs=settings.epochs, learning_rate=settings.learning_rate,
            lr_scheduler_type=settings.schedule, warmup_steps=settings.warmup, weight_decay=settings.weight_decay,
            max_grad_norm=settings.clip, bf16=autocast,
            use_cpu=device.type == "cpu", seed=settings.seed, data_seed=settings.seed,
            save_strategy="steps", save_steps=settings.checkpoint_every, save_total_limit=1,
            logging_steps=5, report_to=[], disable_tqdm=True,
            remove_unused_columns=False, dataloader_pin_memory=device.type == "cuda",
        ),
    )  # fmt: skip
    progress(stage.name, 0, max(1, math.ceil(count / settings.batch * settings.epochs)), f"{count} examples, {tokens:,} tokens")
    last = _last_checkpoint(home)
    with disk(home), casting:
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        # A last checkpoint marks the stage as done: run again, the Trainer finds no step left in it.
        if last is None or int(last.name.rpartition("-")[2]) < trainer.state.global_step:
            trainer._save_checkpoint(trainer.model, None)
    losses = [{"step": log["step"], "loss": log["loss"]} for log in trainer.state.log_history if "loss" in log]
    write_json(home / "loss.json", losses)
    return {
        "stage": stage.name, "examples": count, "skipped_chains": stage.skipped, "too_long": too_long,
        "tokens": tokens, "learned_tokens": learned, "steps": trainer.state.global_step,
        "steps_skipped": skip.skipped, "last_loss": losses[-1]["loss"] if losses else None,
    }  # fmt: skip


def _last_checkpoint(home: Path) -> Path | None:
    """The newest checkpoint that was written whole: the Trainer writes trainer_state.json last, in one go or in part."""

    def whole(path: Path) -> bool:
        try:
            return bool(read_json(path / "trainer_state.json"))
        except DataError:
            return False

    return max(filter(whole, home.glob("checkpoint-*")), key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class TrainSettings(ModelSettings, FitSettings):
    """Settings of `train`."""

    recipe: Literal["valve", "plus", "progressive"] = "valve"
    """valve (eq. 2), plus (CoT-Valve++, eq. 3 and 4) or progressive (CoT-Valve+P)."""
    data: str = "gsm8k"
    """A data set with human-written solutions (cold start, recipe valve), or MixChain: a run folder of `mix`, a file, or a hub id."""
    limit: int | None = None
    """A seeded random subset of this many questions."""
    direction: str = ""
    """A LoRA direction to go on from; empty starts a new one."""
    prompt: str = "boxed"
    """How questions are asked in training; the same as in sampling."""
    thinking: Literal["auto", "yes", "no"] = "auto"
    """Whether human-written solutions are put into a thinking block; auto asks the chat template."""
    stages: int | None = None
    """Progressive: number of stages; by default the largest number of chains of a question."""
    solution: int | None = None
    """Valve: train on this solution instead of the shortest chain (the authors' column, else the rank from the longest, 0)."""
    toward: Toward = "shorter"
    """Where chains go as alpha grows."""
    out: str = "runs/train"
    """Run folder; the direction is put into it."""


def run(settings: TrainSettings, progress: Progress = silent) -> Path:
    """Trains a direction and writes it into the run folder, which is returned."""
    from cotvalve import mixchain, recipes

    valve = settings.load_valve(settings.direction or None)
    if settings.direction and not valve.rows:
        raise SettingError(f"direction '{settings.direction}' is no LoRA; training goes on from LoRA directions only")
    if not settings.direction and not settings.full:
        torch.manual_seed(settings.seed)
        valve = Valve.fresh(valve.model, valve.tokenizer, settings.lora(valve.model))
    if not mixchain.is_mixchain(settings.data):
        if settings.recipe != "valve":
            raise SettingError(f"recipe '{settings.recipe}' needs several chains per question; give the run folder of `cotvalve mix` as --data")
        problems = training(settings.data, data_dir=settings.data_dir, limit=settings.limit, seed=settings.seed)
        thinking = thinks(valve.tokenizer) if settings.thinking == "auto" else settings.thinking == "yes"
        mix = mixchain.short_chains(problems, valve.tokenizer, thinking)
    else:
        mix = mixchain.load(settings.data, valve.tokenizer)[: settings.limit]
        problems = [m.problem for m in mix]
    if settings.recipe == "progressive":
        stages = recipes.progressive(mix, settings.stages)
    elif settings.recipe == "valve":
        stages = recipes.valve(mix, settings.solution)
    else:
        stages = recipes.plus(mix)
    facts = {**valve.facts(), "data": f"{settings.data} ({len(problems)} questions, {fingerprint(problems)[:12]})"}
    decisive = settings.model_dump(mode="json", exclude={"out", "data_dir", "device", "checkpoint_every"})
    folder = Path(settings.out)
    with Run(folder, "train", decisive, facts) as at:
        card = Card(base=settings.model, toward=settings.toward, method=settings.recipe, note=f"{settings.recipe} on {settings.data}",
                    facts={key: str(value) for key, value in at.facts.items()})  # fmt: skip
        report = fit(valve, stages, settings, folder, card, ask=settings.prompt, progress=progress)
        with disk(folder):
            save_learned(valve, card, folder)
            if settings.full:
                valve.tokenizer.save_pretrained(folder)
                replace(TaskVector.between(settings.model, folder), card=card).save(folder)
        write_json(folder / "train.json", report)
    return folder
