"""Define what the trainers of all methods share: the collator, the check for finite losses, and averages over the
effective batch.

Losses and optimizers are TRL's. We change which tokens go through the model (layouts/packing.py), and make sure that
neither packing nor the micro-batch changes a result by more than rounding.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, cast

import torch
from peft import PeftModel
from torch.nn.functional import pad
from transformers import PreTrainedModel, Trainer, TrainingArguments
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from d2lora.adapters.flat import Flat
from d2lora.data import Example, Subset, sequences
from d2lora.layouts import packing
from d2lora.settings.methods import BaseMethod
from d2lora.train.optimizer import FlatAdamW, clip
from d2lora.train.passes import Passes

# The classes below are put before one of TRL's trainers; a type checker is to see Trainer's methods behind super().
if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object

Batch = dict[str, Any]  # what Packer makes of examples, or Rows

M = TypeVar("M", bound=BaseMethod)


@dataclass(frozen=True)
class Objective(ABC, Generic[M]):
    """How a method trains: TRL's classes with our changes, and the arguments that only this method has."""

    method: M

    trainer: ClassVar[type["PackedTrainer"]]
    config: ClassVar[type[TrainingArguments]]

    @property
    def prompt_loss(self) -> bool:
        """Tell whether tokens of the prompt are predicted too."""
        return False

    def examples(self, drawn: Subset) -> list[Example]:
        """Return the examples of a training set, one a row."""
        return drawn.examples

    @abstractmethod
    def arguments(self, max_length: int) -> dict[str, Any]:
        """Return arguments of `config`. TRL must not cut sequences: data.subset has left out those that do not fit."""

    def trainer_arguments(self, drawn: Subset, reference: Path | None) -> dict[str, Any]:
        """Return what `trainer` takes beyond what TRL's takes."""
        return {}


@dataclass(frozen=True)
class Rows:
    """The examples of an effective batch. Trainer and accelerate would walk through a list of them, number by number."""

    examples: list[Example]


@dataclass
class Packer:
    """Packs the token ids of the examples of a pass (packing.pack), and adds what TRL's trainers count with.

    `hidden` is the model's width, `plain` its attention in plain passes. The layout is set once a trainer exists to test it
    with. As the collator it only hands
    an effective batch on: what goes through the model at once is decided in the step (`passes`).
    """

    hidden: int
    layout: packing.Layout
    passes: Passes
    prompt_loss: bool = False
    plain: str = "sdpa"

    def __call__(self, examples: list[Example]) -> Batch:
        return {"rows": Rows(examples)}

    def lay(self, examples: list[Example]) -> Batch:
        """Return the batch of one pass."""
        texts = [text for e in examples for text in sequences(e)]
        packed = packing.pack(texts, self.layout, self.hidden, self.prompt_loss)
        used = torch.cat([rows["sequence"].flatten() >= 0 for rows in packed["passes"]])
        batch: Batch = {"packed": packed, "attention_mask": used[None]}
        if "labels" in texts[0]:
            batch["labels"] = pad(packed["target"][None], (1, 0), value=-100)
        for key in ("ref_chosen_logps", "ref_rejected_logps"):
            if key in examples[0]:
                batch[key] = torch.tensor([e[key] for e in examples])
        return batch


class PackedTrainer(_Trainer):
    """A trainer on Packer's batches. It stops at the first loss that is not finite, and names the rows of its batch.

    A step's effective batch goes through the model in parts, whose gradients add up. If memory ends in a part, that part
    is divided, and nothing that was done is lost.
    """

    data_collator: Packer
    model: PeftModel
    flat: Flat | None = None  # the trained weights, where they lie in one tensor

    def before_training(self, tolerance: float) -> None:
        """Prepare the first step, in the layout that was tested: log-probabilities are within `tolerance` nats of a
        plain pass.
        """

    def before_step(self, examples: list[Example]) -> None:
        """Prepare a step on the examples of an effective batch."""

    def counted(self) -> dict[str, int]:
        """Return counts for the record beside the losses."""
        return {}

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], int | None]:
        batches = list(itertools.islice(epoch_iterator, num_batches))
        return batches, self.loss_tokens([e for batch in batches for e in batch["rows"].examples])

    def loss_tokens(self, examples: list[Example]) -> int | None:
        """Count the tokens that the loss of these examples averages over; None if it averages over pairs."""
        return None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        usual = super().create_optimizer(model)
        self.optimizer = usual if self.flat is None else FlatAdamW.instead_of(usual, self.flat)
        return cast(torch.optim.Optimizer, self.optimizer)

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor:
        optimizer = getattr(self.optimizer, "optimizer", None)  # in accelerate's
        if isinstance(optimizer, FlatAdamW) and optimizer.flat is not None and optimizer.flat.gather():
            return clip(optimizer.flat, self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    def training_step(
        self, model: torch.nn.Module, inputs: Batch, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        examples, passes = inputs["rows"].examples, self.data_collator.passes
        self.before_step(examples)
        reached = _Reached(self)
        parts: list[list[Example]] = []

        def part_loss(part: list[Example]) -> torch.Tensor:
            reached.mark()
            loss = super(PackedTrainer, self).training_step(model, self.data_collator.lay(part), num_items_in_batch)
            parts.append(part)
            return loss

        losses = passes.each(passes.parts(examples), part_loss, reached.undo)
        loss = torch.stack(losses).sum()
        reached.average(list(map(len, parts)))
        if not torch.isfinite(loss):
            of_parts = zip(parts, losses, strict=True)
            bad = next((part for part, value in of_parts if not torch.isfinite(value)), examples)
            rows = ", ".join(str(e["row"]) for e in bad if "row" in e)
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}, on rows {rows} of the data set: lower the "
                "learning rate or look at them"
            )
        return loss

    def log_probs(self, model: torch.nn.Module, packed: packing.Packed) -> FusedCausalLMOutput:
        """Return the log-probabilities of a batch's predicted tokens, in the collator's layout."""
        return packing.log_probs(model, packed, self.data_collator.layout)


class _Reached:
    """What the parts of a step have reached: gradients, and TRL's values to log. A part that fails is undone."""

    def __init__(self, trainer: PackedTrainer) -> None:
        self.trainer = trainer
        trained = (weight for weight in trainer.model.parameters() if weight.requires_grad)
        self.weights = list(trained) if trainer.flat is None else trainer.flat.parameters
        stores = ("_metrics", "_stored_metrics")  # SFT's, DPO's and KTO's; ORPO's and CPO's
        metrics = [getattr(trainer, name) for name in stores if hasattr(trainer, name)]
        self.logs: list[dict[str, list[Any]]] = [store["train"] for store in metrics]
        self.before = self._counts()

    def _counts(self) -> list[dict[str, int]]:
        return [{name: len(values) for name, values in log.items()} for log in self.logs]

    def mark(self) -> None:
        """Note what is reached."""
        self.gradients = [None if w.grad is None else w.grad.clone() for w in self.weights]
        self.logged, self.tokens = self._counts(), getattr(self.trainer, "_total_train_tokens", None)

    def undo(self) -> None:
        """Go back to what was noted."""
        for weight, gradient in zip(self.weights, self.gradients, strict=True):
            weight.grad = gradient
        for log, counts in zip(self.logs, self.logged, strict=True):
            for name, values in log.items():
                del values[counts.get(name, 0) :]
        if self.tokens is not None:
            vars(self.trainer)["_total_train_tokens"] = self.tokens

    def average(self, sizes: list[int]) -> None:
        """Make one value to log of those of the parts, which have so many examples: TRL would weight all alike."""
        for log, counts in zip(self.logs, self.before, strict=True):
            for name, values in log.items():
                new = values[counts.get(name, 0) :]
                if len(new) == len(sizes) > 1:
                    values[-len(new) :] = [sum(n * v for n, v in zip(sizes, new, strict=True)) / sum(sizes)]


class WholeBatchTrainer(PackedTrainer):
    """Weights each part of an effective batch by its share of the pairs (and ORPO's NLL by its share of tokens).

    TRL averages over each micro-batch, and Trainer over those averages. That differs if they differ in size, and always
    for ORPO's NLL, which is averaged over tokens.
    """

    def before_step(self, examples: list[Example]) -> None:
        """Count what the losses are averaged over."""
        super().before_step(examples)
        self.batch_pairs, self.batch_tokens = len(examples), self.nll_tokens(examples)

    def share(self, batch: Batch) -> float:
        """Return a part's share of the effective batch's pairs: the factor for the part's mean."""
        return self.pairs(batch) / self.batch_pairs

    @staticmethod
    def pairs(batch: Batch) -> int:
        """Count the pairs of a part."""
        return len(batch["packed"]["lengths"]) // 2

    def nll_tokens(self, examples: list[Example]) -> int:
        """Count the tokens that an NLL beside the preference loss averages over."""
        return 0


class MeanLogpsTrainer(WholeBatchTrainer):
    """A mixin for TRL's trainers that compare answers' mean log-probabilities without a reference: ORPO's, CPO's."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        add_fused_lm_head(cast(PreTrainedModel, self.model.get_base_model()), outputs=("log_probs", "mean_logits"))

    def tokenize_row(self, feature: Example, model: torch.nn.Module | None = None) -> Example:
        """Return the row as it is: its ids are ready."""
        return feature

    def means(self, predicted: FusedCausalLMOutput, packed: packing.Packed) -> tuple[torch.Tensor, ...]:
        """Return mean log-probabilities of chosen and rejected answers, each (P,), and their logits, for TRL's log only."""
        logps = packing.by_answer(predicted["log_probs"], packed).sum(1) / packed["lengths"]
        logits = packing.by_answer(predicted["mean_logits"], packed)
        return *logps.chunk(2), *logits.chunk(2)
