"""Stage 3: fit(examples, each with its alpha). CoT-Valve, CoT-Valve++ and CoT-Valve+P are stages of it.

Comes in: a base model, stages of examples (recipes.py). Goes out: a direction's folder in PEFT's format. The
loss is the cross-entropy of the chain's own tokens, prompt excluded, averaged over all of them in a step (times the
example's weight, where examples have one); each row of a batch goes through theta + alpha * delta with its own alpha
(eq. 2 and 3). Training runs on `transformers.Trainer`: gradient accumulation, checkpoints, and a killed run that goes
on to the same weights. Batches are made in batches.py, the loss and the Trainer are in learner.py.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft.helpers import disable_input_dtype_casting
from transformers import TrainingArguments

from cotvalve import mixchain, recipes
from cotvalve.batches import IGNORED, encode, pack
from cotvalve.direction import Card
from cotvalve.errors import DataError, SettingError
from cotvalve.fitting import UNDECIDED, FitSettings, say_ignored
from cotvalve.lean import Position, can_lie_flat, lean, tells_rows_apart
from cotvalve.learner import AtOnce, SkipBadSteps, ValveTrainer, save_learned
from cotvalve.problems import subset, training
from cotvalve.prompts import prompt, thinks
from cotvalve.recipes import Stage
from cotvalve.records import Json, Run, disk, read_json, write_json
from cotvalve.settings import Count, ModelSettings
from cotvalve.taskvector import TaskVector
from cotvalve.types import Problem, Progress, Toward, silent
from cotvalve.valve import Valve

_log = logging.getLogger(__name__)

TOKENS_AT_ONCE = 16384
"""Tokens of one forward pass on a GPU, padding counted; a quarter of that elsewhere."""
WORTH_COMPILING = 3e16
"""Floating-point operations, two minutes of an H100, above which a minute of compiling comes back."""


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
    if settings.packing and not tells_rows_apart(valve.model):
        raise SettingError(f"packing needs attention in every layer; {type(valve.model).__name__} has layers that would read the row before: leave it out")
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
    if device.type == "cuda":
        # Portions of ever new sizes break fixed blocks of memory apart until the card is full and has to be emptied.
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")  # pyright: ignore
    report: Json = {"stages": []}
    flat = can_lie_flat(valve.model)
    work = 4 * valve.billions() * 1e9 * settings.epochs * sum(e.chain.tokens for stage in stages for e in stage.examples)
    compiled = settings.compile == "yes" or (settings.compile == "auto" and device.type == "cuda" and work > WORTH_COMPILING)
    with lean(valve, compiled=compiled, flat=flat) as position, ExitStack() as stack:
        # Where each layer is ours, the model runs in its own 16 bits. Autocast does the same for PEFT's layers, whose
        # own cast of the input to fp32 would only be undone.
        autocast = dtype == torch.bfloat16 and device.type == "cuda" and (settings.full or position.others > 0)
        if autocast and valve.adapted:
            stack.enter_context(disable_input_dtype_casting(valve.peft_model))
        how = How(device, flat, autocast, position)
        for number, stage in enumerate(stages):
            report["stages"].append(_fit_stage(valve, stage, number, settings, folder, card, ask, progress, how))
    if settings.gradient_checkpointing:
        valve.model.gradient_checkpointing_disable()
    valve.model.eval()
    for parameter in learned:
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(False)
    return report


@dataclass(frozen=True, slots=True)
class How:
    """What the model and the device allow."""

    device: torch.device
    flat: bool
    autocast: bool
    position: Position


def _fit_stage(
    valve: Valve, stage: Stage, number: int, settings: FitSettings, folder: Path, card: Card, ask: str,
    progress: Progress, how: How,
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
    steps = math.ceil(math.ceil(len(rows) / batch) * settings.epochs)
    skip = SkipBadSteps(stage.name, progress)
    at_once = AtOnce(TOKENS_AT_ONCE if how.device.type == "cuda" else TOKENS_AT_ONCE // 4, settings.micro_batch, how.flat)
    arguments = TrainingArguments(
        output_dir=str(home), per_device_train_batch_size=batch,
        num_train_epochs=settings.epochs, learning_rate=settings.learning_rate,
        # The Trainer's "constant" has no warm-up, whatever is set.
        lr_scheduler_type="constant_with_warmup" if settings.schedule == "constant" else settings.schedule, weight_decay=settings.weight_decay,
        # The first of them has a learning rate of 0: one that is all there is would learn nothing.
        warmup_steps=min(math.ceil(settings.warmup * steps), steps - 1), max_grad_norm=settings.clip, bf16=how.autocast,
        use_cpu=how.device.type == "cpu", seed=settings.seed, data_seed=settings.seed,
        save_strategy="steps", save_steps=settings.checkpoint_every, save_total_limit=1,
        logging_steps=5, logging_first_step=True, report_to=[], disable_tqdm=True,
        remove_unused_columns=False, dataloader_pin_memory=False,
    )  # fmt: skip
    # DataParallel, the Trainer's choice on a host with several GPUs, would part the rows from their alphas.
    arguments._n_gpu = 1  # pyright: ignore[reportPrivateUsage]
    trainer = ValveTrainer(valve, card, skip, at_once, how.position, settings.trust, train_dataset=rows, args=arguments)
    progress(stage.name, 0, max(1, math.ceil(count / settings.batch * settings.epochs)), f"{count} examples, {tokens:,} tokens")
    last = _last_checkpoint(home)
    if settings.trust and "weight" in rows[0]:
        trainer.remember(rows, steps)  # with the weights that the stage begins with, also where it goes on from a checkpoint
    with disk(home):
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        # A last checkpoint marks the stage as done: run again, the Trainer finds no step left in it.
        if last is None or int(last.name.rpartition("-")[2]) < trainer.state.global_step:
            assert trainer.model is not None
            trainer._save_checkpoint(trainer.model, None)  # pyright: ignore[reportPrivateUsage]  the Trainer has no public one
    losses = [{"step": log["step"], "loss": log["loss"]} for log in trainer.state.log_history if "loss" in log]
    write_json(home / "loss.json", losses)
    return {
        "stage": stage.name, "examples": count, "skipped_chains": stage.skipped, "too_long": too_long,
        "tokens": tokens, "learned_tokens": learned, "steps": trainer.state.global_step,
        "steps_skipped": [log["step"] for log in trainer.state.log_history if "skipped" in log], "last_loss": losses[-1]["loss"] if losses else None,
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

    recipe: Literal["valve", "plus", "progressive", "reward"] = "valve"
    """valve (eq. 2), plus (CoT-Valve++, eq. 3 and 4), progressive (CoT-Valve+P) or reward (policy gradient on chains of `mix`)."""
    data: str = "gsm8k"
    """A data set with human-written solutions (cold start, recipe valve), or MixChain: a run folder of `mix`, a file, or a hub id."""
    limit: Count | None = None
    """A seeded random subset of this many questions."""
    direction: str = ""
    """A LoRA direction to go on from; empty starts a new one."""
    prompt: str = "boxed"
    """How questions are asked in training; the same as in sampling."""
    thinking: Literal["auto", "yes", "no"] = "auto"
    """Whether human-written solutions are put into a thinking block; auto asks the chat template."""
    stages: int | None = None
    """Progressive: number of stages; by default the largest number of chains of a question. Valve: solution is one of so many."""
    solution: int | None = None
    """Valve: train on this solution instead of the shortest chain (the authors' column, else the rank from the longest, 0)."""
    brevity: float = 0.5
    """Reward: what the longest right chain of a question earns less than the shortest, which earns 1; a wrong one earns 0."""
    truncated: bool = False
    """Reward: unlearn truncated chains too, most of which repeat themselves; without it they only count as wrong."""
    toward: Toward = "shorter"
    """Where chains go as alpha grows."""
    out: str = "runs/train"
    """Run folder; the direction is put into it."""

    def model_post_init(self, context: Any, /) -> None:
        super().model_post_init(context)
        if not 0 <= self.brevity <= 1:
            raise ValueError("brevity has to be between 0 and 1: more would make a right long chain worth less than a wrong one")
        if self.direction and (self.full or self.dora):
            raise ValueError("full and dora start from the model itself; leave direction out")
        if self.recipe == "reward" and self.dropout:
            raise ValueError("reward learns without dropout, since its chains were sampled without")
        if prompt(self.prompt).budgets:
            raise ValueError(f"the prompt '{self.prompt}' asks for a token budget, and training has none to name; learn with boxed or plain")


_READ_BY = {"stages": ("valve", "progressive"), "solution": ("valve",), "brevity": ("reward",), "truncated": ("reward",), "trust": ("reward",)}
"""Settings that not every recipe reads."""


def _say_unread(settings: TrainSettings) -> None:
    """Warns of what was given and is another recipe's. No error: in a recipe file it may stand for all steps."""
    for name, recipes_of in _READ_BY.items():
        value = getattr(settings, name)
        if settings.recipe not in recipes_of and value != TrainSettings.model_fields[name].default:
            _log.warning("%s %s is not used: it is a setting of %s, not of %s", name, value, " and ".join(recipes_of), settings.recipe)
    if settings.recipe == "valve" and settings.stages is not None and settings.solution is None:
        _log.warning("stages %d is not used: valve takes it with solution, the number of one of them", settings.stages)


def run(settings: TrainSettings, progress: Progress = silent) -> Path:
    """Trains a direction and writes it into the run folder, which is returned."""
    _say_unread(settings)
    valve = settings.load_valve(settings.direction or None)
    if settings.direction and not valve.rows:
        raise SettingError(f"direction '{settings.direction}' is no LoRA; training goes on from LoRA directions only")
    if settings.direction:
        say_ignored(settings, settings.direction, valve)
    elif not settings.full:
        torch.manual_seed(settings.seed)
        valve = Valve.fresh(valve.model, valve.tokenizer, settings.lora(valve.model))
    problems, stages = _stages(settings, valve)
    facts = {**valve.facts(), "data": f"{settings.data} ({len(problems)} questions, {recipes.fingerprint(stages)[:12]})"}
    decisive = settings.model_dump(mode="json", exclude={"out", "data_dir", "device"} | UNDECIDED)
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


def _stages(settings: TrainSettings, valve: Valve) -> tuple[list[Problem], list[Stage]]:
    """What is learned, and the questions it is about."""
    if settings.recipe == "reward":
        sampled, made = mixchain.judged(settings.data, settings.data_dir)
        mixchain.check_own(settings.data, made, settings.prompt, settings.chat_template, settings.direction, valve.facts())
        if settings.limit is not None:
            sampled = subset(sampled, settings.limit, settings.seed, lambda pair: pair[0].id)
        return [problem for problem, _ in sampled], recipes.reward(sampled, settings.brevity, settings.truncated)
    if not mixchain.is_mixchain(settings.data):
        if settings.recipe != "valve":
            raise SettingError(f"recipe '{settings.recipe}' needs several chains per question; give the run folder of `cotvalve mix` as --data")
        problems = training(settings.data, data_dir=settings.data_dir, limit=settings.limit, seed=settings.seed)
        thinking = thinks(valve.tokenizer) if settings.thinking == "auto" else settings.thinking == "yes"
        mix = mixchain.short_chains(problems, valve.tokenizer, thinking)
    else:
        mix = mixchain.load(settings.data, valve.tokenizer)
        if settings.limit is not None:
            mix = subset(mix, settings.limit, settings.seed, lambda m: m.problem.id)
        problems = [m.problem for m in mix]
    if settings.recipe == "progressive":
        return problems, recipes.progressive(mix, settings.stages)
    if settings.recipe == "valve":
        return problems, recipes.valve(mix, settings.solution, settings.stages)
    return problems, recipes.plus(mix)
