"""The loss of a batch at its alphas, and the `transformers.Trainer` that steps on it.

The loss is the cross-entropy of the chain's own tokens, averaged over all of them in an optimizer step, whatever
the portions it is computed in. Alphas are set around every forward and backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from cotvalve.batches import IGNORED, collate
from cotvalve.direction import CARD, Card
from cotvalve.records import disk
from cotvalve.types import Progress
from cotvalve.valve import Valve

LOSS_SLICE = 2048
"""Completion tokens whose logits exist at a time: 2,048 x 152k x 4 bytes = 1.2 GB."""


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
        assert head is not None
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
        rows: Any = trainer.train_dataset
        step = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps
        super().__init__(step, lengths=[len(row["input_ids"]) for row in rows])
        self.trainer, self.steps = trainer, math.ceil(len(self.lengths) / step)

    def __iter__(self) -> Iterator[int]:
        epoch = self.trainer.state.global_step // self.steps
        self.generator = torch.Generator().manual_seed(self.trainer.args.seed + (epoch << 32))
        return super().__iter__()


class ValveTrainer(Trainer):
    """The Trainer with one alpha per row (or token) around every forward and backward pass."""

    def __init__(self, valve: Valve, card: Card, skip: SkipBadSteps, **kwargs: Any) -> None:
        super().__init__(model=Learner(valve), data_collator=collate, callbacks=[skip], **kwargs)
        skip.trainer = self
        # The library prints nothing: losses reach the user through `progress`.
        self.remove_callback(PrinterCallback)
        self.valve, self.card = valve, card
        # compute_loss divides by the tokens of the whole step, so the Trainer must not divide again.
        self.model_accepts_loss_kwargs = True

    def _get_train_sampler(self, train_dataset: Any = None) -> _Order:  # noqa: ARG002
        return _Order(self)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        alpha = inputs.pop("alpha")
        if self.valve.dial is None:
            return super().training_step(model, inputs, num_items_in_batch)
        # Around the backward pass too: gradient checkpointing runs the forward again inside it.
        with self.valve.at(alpha.to(self.args.device)):
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None,  # noqa: ARG002
    ) -> Any:  # fmt: skip
        divisor = num_items_in_batch if num_items_in_batch is not None else (inputs["labels"][:, 1:] != IGNORED).sum()
        return model(**inputs, divisor=divisor)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:  # noqa: ARG002
        folder = Path(output_dir or self.args.output_dir or ".")
        with disk(folder):
            save_learned(self.valve, self.card, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:  # noqa: ARG002
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
        valve.peft_model.save_pretrained(str(folder))
        card.write(folder / CARD, "lora")
    else:
        valve.model.save_pretrained(folder)


class SkipBadSteps(TrainerCallback):
    """Skips and counts a step whose gradient is not finite; reports the others."""

    def __init__(self, stage: str, progress: Progress) -> None:
        self.trainer: ValveTrainer | None = None
        self.stage, self.progress = stage, progress
        self.skipped: list[int] = []

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any  # noqa: ARG002
    ) -> None:
        assert self.trainer is not None
        assert self.trainer.model is not None
        learned = [p for p in self.trainer.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in learned if p.grad is not None])
        if not math.isfinite(float(norm)):
            self.skipped.append(state.global_step + 1)
            for p in learned:
                p.grad = None

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any  # noqa: ARG002
    ) -> None:
        if logs and "loss" in logs:
            note = f"loss {logs['loss']:.3f}" + (f", {len(self.skipped)} steps skipped" if self.skipped else "")
            self.progress(self.stage, state.global_step, state.max_steps, note)
