"""The loss of a batch at its alphas, and the `transformers.Trainer` that steps on it.

The loss is the cross-entropy of the chain's own tokens, averaged over all of them in an optimizer step, whatever
the portions it is computed in. Alphas are set around every forward and backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils.checkpoint import checkpoint
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from cotvalve import tuner
from cotvalve.batches import IGNORED, collate, collate_flat, portions
from cotvalve.batches import places as learned_places
from cotvalve.direction import CARD, Card
from cotvalve.errors import EngineError
from cotvalve.headloss import LOSS_SLICE, HeadLoss, Worth, compiled, loss_and_slope
from cotvalve.lean import Position
from cotvalve.records import Json, disk, whole_files
from cotvalve.types import Progress
from cotvalve.valve import Valve

Found = TypeVar("Found")

HALF_SCALE = 1024.0
"""What a loss is multiplied by on its way back through layers in fp16, and its gradients divided by in fp32: fp16 ends at 6e-8, and a
token's part of a step of 20,000 tokens would be lost below it. Less than those tokens, so that sums over them stay far from 65,504."""


class Learner(nn.Module):
    """The model as the Trainer sees it: token ids and alphas in, loss out."""

    def __init__(self, valve: Valve, position: Position | None = None, trust: float = 0.2) -> None:
        super().__init__()
        self.model, self.position, self.trust = valve.model, position, trust
        config = valve.model.config.get_text_config()  # models that see images too keep it inside of theirs
        scaled = ("logits_scaling", "logit_scale", "final_logit_softcapping", "logits_soft_cap", "lm_head_multiplier", "logits_mup_width_multiplier")
        self.plain_head = not any(getattr(config, name, None) for name in scaled)

    def forward(
        self, input_ids: Tensor, labels: Tensor, divisor: Tensor | float, places: Tensor | None = None,
        position_ids: Tensor | None = None, weights: Tensor | None = None, before: Tensor | None = None, **rows: Any,
    ) -> Tensor:  # fmt: skip
        """Summed cross-entropy of the labelled positions over `divisor`. `rows` tells our attention where rows start.

        `weights` has one number for each of `places`, where examples do not count alike, and `before` the log p that the
        token had. Logits are made for those positions alone and a slice at a time: 150k-word vocabularies would fill
        the memory otherwise.
        """
        worth = None if weights is None else Worth(weights, before, self.trust)
        if not self.plain_head:
            logits, targets = self._logits(input_ids, labels, places, position_ids, **rows)
            return _cross_entropy(logits, targets, worth).sum() / divisor
        states, targets = self._states(input_ids, labels, places, position_ids, **rows)
        head = self.model.get_output_embeddings()
        assert head is not None
        if isinstance(head, nn.Linear) and not head.weight.requires_grad:
            slope = compiled() if self.position is not None and self.position.compiled else loss_and_slope
            loss: Any = HeadLoss.apply(states, targets, head.weight, head.bias, worth, slope)
            return loss / divisor
        total = states.new_zeros((), dtype=torch.float32)
        for start in range(0, len(states), LOSS_SLICE):
            part = slice(start, start + LOSS_SLICE)
            own = None if worth is None else worth[part]
            total = total + checkpoint(lambda s, t, w: _cross_entropy(head(s), t, w).sum(), states[part], targets[part], own, use_reentrant=False)
        return total / divisor

    def likelihoods(self, input_ids: Tensor, labels: Tensor, places: Tensor, position_ids: Tensor | None = None, **rows: Any) -> Tensor:
        """log p of each labelled token [N], in the order of `places`, without a gradient."""
        if not self.plain_head:
            return -_cross_entropy(*self._logits(input_ids, labels, places, position_ids, **rows)).detach()
        # The layers as training runs them: compiled ones would be compiled anew for a pass without gradients.
        states, targets = self._states(input_ids, labels, places, position_ids, **rows)
        head: Any = self.model.get_output_embeddings()
        with torch.no_grad():
            return -torch.cat([_cross_entropy(head(s), t) for s, t in zip(states.split(LOSS_SLICE), targets.split(LOSS_SLICE), strict=True)])

    def _states(
        self, input_ids: Tensor, labels: Tensor, places: Tensor | None, position_ids: Tensor | None, **rows: Any
    ) -> tuple[Tensor, Tensor]:
        """Hidden states before the learned tokens [N, hidden], and those tokens [N]."""
        hidden = self.model.get_decoder()(input_ids=input_ids, position_ids=position_ids, use_cache=False, **rows)[0]
        # Where to look was counted before the batch went to the GPU: a mask would stop and ask it how many there are.
        places = learned_places(labels) if places is None else places
        return hidden.flatten(0, 1).index_select(0, places), labels.flatten()[places + 1]

    def _logits(
        self, input_ids: Tensor, labels: Tensor, places: Tensor | None, position_ids: Tensor | None, **rows: Any
    ) -> tuple[Tensor, Tensor]:
        """The same with the model's own logits [N, vocabulary], where it scales or caps them."""
        logits = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **rows).logits
        places = learned_places(labels) if places is None else places
        return logits.flatten(0, 1).index_select(0, places), labels.flatten()[places + 1]


def _cross_entropy(logits: Tensor, targets: Tensor, worth: Worth | None = None) -> Tensor:
    loss = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    return loss if worth is None else worth.of(loss)


class _Order(LengthGroupedSampler):
    """Rows of like length together, in an order that seed and epoch decide and nothing else; weighted rows shuffled.

    The Trainer's own draws each epoch's order from the global generator: a run that was stopped in its second
    epoch would go on with the order of the first. A step's loss is divided by its tokens: with like lengths together
    a token of a long chain would count for less than one of a short chain, and what a policy gradient adds up over a
    question's chains, whose weights are of either sign, would no longer be the gradient.
    """

    def __init__(self, trainer: ValveTrainer) -> None:
        rows: Any = trainer.train_dataset
        step = trainer.args.train_batch_size
        super().__init__(step, lengths=[len(row["input_ids"]) for row in rows])
        self.trainer, self.steps, self.shuffled = trainer, math.ceil(len(self.lengths) / step), "weight" in rows[0]

    def __iter__(self) -> Iterator[int]:
        epoch = self.trainer.state.global_step // self.steps
        # PyTorch's generator on the CPU reads the low 32 bits of a seed: epochs are told apart in those.
        self.generator = torch.Generator().manual_seed((self.trainer.args.seed + epoch * 0x9E3779B1) % 2**32)
        return iter(torch.randperm(len(self.lengths), generator=self.generator).tolist()) if self.shuffled else super().__iter__()


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of one optimizer step, as the data loader hands them over; batches are made of them when it runs."""

    rows: Sequence[Json]


@dataclass(slots=True)
class AtOnce:
    """How much of an optimizer step is computed at once. The step is the same for any of it."""

    tokens: int
    """Padding counted. Halved where memory does not hold it."""
    rows: int | None = None
    flat: bool = False
    """Rows one behind the other instead of padded ones."""


class ValveTrainer(Trainer):
    """The Trainer with one alpha per row (or token) around every forward and backward pass.

    One batch of the Trainer's is a whole optimizer step; here it is parted by tokens.
    """

    def __init__(
        self, valve: Valve, card: Card, skip: SkipBadSteps, at_once: AtOnce, position: Position, trust: float = 0.2, **kwargs: Any
    ) -> None:
        super().__init__(model=Learner(valve, position, trust), data_collator=_together, callbacks=[skip], **kwargs)
        skip.trainer = self
        # The library prints nothing: losses reach the user through `progress`.
        self.remove_callback(PrinterCallback)
        self.valve, self.card, self.skip, self.at_once, self.position = valve, card, skip, at_once, position
        # The loss is divided by the tokens of the whole step, so the Trainer must not divide again.
        self.model_accepts_loss_kwargs = True

    def _get_train_sampler(self, train_dataset: Any = None) -> _Order:  # noqa: ARG002
        return _Order(self)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:  # noqa: ARG002
        """Loss and gradients of an optimizer step. EngineError when not even one row fits the memory."""
        model.train()
        return self._in_portions(inputs["step"].rows, lambda parts: self._learn(model, parts))

    def _in_portions(self, rows: Sequence[Json], work: Callable[[Sequence[Sequence[Json]]], Found]) -> Found:
        """What `work` makes of the rows in portions, from the first one again with smaller ones where memory ran out."""
        while True:
            parts = portions(rows, self.at_once.tokens, self.at_once.rows, flat=self.at_once.flat)
            try:
                return work(parts)
            except TorchDynamoException as error:
                note = f"the layers could not be compiled ({' '.join(str(error).split()[:30])}): going on without"
                self.position.interpret()
            except torch.OutOfMemoryError as error:
                if max(map(len, parts)) == 1:
                    longest = max(len(row["input_ids"]) for row in rows)
                    raise EngineError(
                        f"one example of {longest} tokens does not fit the memory while training; set "
                        f"gradient_checkpointing, or a max_length under {longest}, or take a larger GPU"
                    ) from error
                largest = max(len(part) * len(part[0]["input_ids"]) for part in parts)
                self.at_once.tokens = max(1, min(self.at_once.tokens, largest) // 2)
                note = f"out of memory: going on with {self.at_once.tokens:,} tokens at once, for the same steps"
            # Outside of the handlers: an error holds on to the frames, and they to their tensors.
            self.valve.model.zero_grad()
            torch.cuda.empty_cache()
            self.skip.progress(self.skip.stage, self.state.global_step, self.state.max_steps, note)

    def remember(self, rows: Sequence[Json], steps: int) -> None:
        """Gives each row `before`: the log p of its learned tokens now, before the first of `steps` steps."""
        assert self.model is not None
        self.model.train()
        self._in_portions(rows, lambda parts: self._likelihoods(parts, steps))

    def _likelihoods(self, parts: Sequence[Sequence[Json]], steps: int) -> None:
        model: Any = self.model
        done, count = 0, sum(map(len, parts))
        for part in parts:
            # A third of a step's work, for all examples at once: without this line nothing would be told for long.
            self.skip.progress(self.skip.stage, 0, steps, f"how likely its chains are before: {done:,} of {count:,}")
            done += len(part)
            batch, alpha = self._batch(part)
            batch.pop("weights", None)
            with self.position.at(alpha), self.compute_loss_context_manager():
                found = model.likelihoods(**batch).float().cpu()
            for row, own in zip(part, found.split([_learned(row) for row in part]), strict=True):
                row["before"] = own.tolist()

    def _batch(self, rows: Sequence[Json]) -> tuple[dict[str, Any], Tensor]:
        """Rows on the GPU, and their alphas."""
        made = collate_flat(rows) if self.at_once.flat else collate(rows)
        batch = {name: _to(value, self.args.device) if isinstance(value, Tensor) else value for name, value in made.items()}
        return batch, batch.pop("alpha")

    def _learn(self, model: nn.Module, parts: Sequence[Sequence[Json]]) -> Tensor:
        total = torch.zeros((), device=self.args.device)
        tokens = sum(_learned(row) for rows in parts for row in rows)
        scale = HALF_SCALE if self.valve.model.dtype == torch.float16 else 1.0
        for rows in parts:
            batch, alpha = self._batch(rows)
            # Around the backward pass too: gradient checkpointing runs the forward again inside it.
            with self.position.at(alpha):
                with self.compute_loss_context_manager():
                    loss = model(**batch, divisor=tokens)
                self.accelerator.backward(loss * scale)
            total += loss.detach()
        if scale != 1:
            torch._foreach_div_([p.grad for p in model.parameters() if p.grad is not None], scale)  # pyright: ignore[reportPrivateUsage]
        return total

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:  # noqa: ARG002
        folder = Path(output_dir or self.args.output_dir or ".")
        with disk(folder):
            save_learned(self.valve, self.card, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:  # noqa: ARG002
        if self.valve.adapted:
            tuner.put(self.valve.peft_model, load_file(Path(resume_from_checkpoint) / "adapter_model.safetensors"))
        else:
            plain = type(self.valve.model).from_pretrained(resume_from_checkpoint, dtype=torch.float32)
            self.valve.model.load_state_dict(plain.state_dict())


def _learned(row: Json) -> int:
    """Tokens that are predicted: nothing predicts the first one of a row."""
    return len(row["labels"]) - row["labels"].count(IGNORED) - (row["labels"][0] != IGNORED)


def _together(rows: Sequence[Json]) -> dict[str, StepRows]:
    return {"step": StepRows(rows)}


def _to(value: Tensor, device: torch.device) -> Tensor:
    # From pinned memory the copy waits for nothing that the GPU still has to do.
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value


def save_learned(valve: Valve, card: Card, folder: Path) -> None:
    """What was learned, in PEFT's format; the whole checkpoint after full fine-tuning."""
    if valve.rows:
        valve.current(card).save(folder)
    elif valve.adapted:
        with whole_files(folder) as part:
            valve.peft_model.save_pretrained(str(part))
        card.write(folder / CARD, "lora")
    else:
        with whole_files(folder) as part:
            valve.model.save_pretrained(part)


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
            state.log_history.append({"step": state.global_step + 1, "skipped": True})  # kept with the checkpoint
            for p in learned:
                p.grad = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any  # noqa: ARG002
    ) -> None:
        # The Trainer leaves out what stands behind the last five steps: of a short run that is all of it.
        control.should_log |= state.global_step >= state.max_steps

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any  # noqa: ARG002
    ) -> None:
        if logs and "loss" in logs:
            note = f"loss {logs['loss']:.3f}" + (f", {len(self.skipped)} steps skipped" if self.skipped else "")
            self.progress(self.stage, state.global_step, state.max_steps, note)
