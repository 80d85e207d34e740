"""Define what the trainers of all methods share: the collator, the check for finite losses, and averages over the
effective batch.

Losses and optimizers are TRL's. We change which tokens go through the model (layouts/packing.py), and make sure that
neither packing nor the micro-batch changes a result by more than rounding.
"""

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

from d2lora.data import Subset, sequences
from d2lora.layouts import packing
from d2lora.settings.methods import BaseMethod

# The classes below are put before one of TRL's trainers; a type checker is to see Trainer's methods behind super().
if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object

Example = dict[
    str, Any
]  # token ids by name: input_ids and labels, or prompt_ids, chosen_ids and rejected_ids; and its row
Batch = dict[str, Any]  # what Packer makes of examples

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


@dataclass
class Packer:
    """The collator: it packs the token ids of a micro-batch (packing.pack), and adds what TRL's trainers count with.

    `hidden` is the model's width. The layout is set once a trainer exists to test it with.
    """

    hidden: int
    layout: packing.Layout
    prompt_loss: bool = False

    def __call__(self, examples: list[Example]) -> Batch:
        texts = [text for e in examples for text in sequences(e)]
        packed = packing.pack(texts, self.layout, self.hidden, self.prompt_loss)
        used = torch.cat([rows["sequence"].flatten() >= 0 for rows in packed["passes"]])
        batch: Batch = {"packed": packed, "attention_mask": used[None]}
        batch["rows"] = [e["row"] for e in examples if "row" in e]
        if "labels" in texts[0]:
            batch["labels"] = pad(packed["target"][None], (1, 0), value=-100)
        for key in ("ref_chosen_logps", "ref_rejected_logps"):
            if key in examples[0]:
                batch[key] = torch.tensor([e[key] for e in examples])
        return batch


class PackedTrainer(_Trainer):
    """A trainer on Packer's batches. It stops at the first loss that is not finite, and names the rows of its batch."""

    data_collator: Packer
    model: PeftModel

    def before_training(self, tolerance: float) -> None:
        """Prepare the first step, in the layout that was tested: log-probabilities are within `tolerance` nats of a
        plain pass.
        """

    def counted(self) -> dict[str, int]:
        """Return counts for the record beside the losses."""
        return {}

    def training_step(
        self, model: torch.nn.Module, inputs: Batch, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        step, rows = self.state.global_step + 1, ", ".join(map(str, inputs["rows"]))
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {step}, on rows {rows} of the data set: lower the learning rate or look at them"
            )
        return loss

    def log_probs(self, model: torch.nn.Module, packed: packing.Packed) -> FusedCausalLMOutput:
        """Return the log-probabilities of a batch's predicted tokens, in the collator's layout."""
        return packing.log_probs(model, packed, self.data_collator.layout)


class WholeBatchTrainer(PackedTrainer):
    """Weights each micro-batch by its share of the effective batch's pairs (and ORPO's NLL by its share of tokens).

    TRL averages over each micro-batch, and Trainer over those averages. That differs if an epoch's last micro-batch is
    smaller, and always for ORPO's NLL, which is averaged over tokens.
    """

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], None]:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.micro_batches = len(batches)
        self.batch_pairs = sum(self.pairs(b) for b in batches)
        self.batch_tokens = sum(self.nll_tokens(b) for b in batches)
        return batches, None

    def share(self, of: int | torch.Tensor, total: int | torch.Tensor) -> float:
        """Return the factor for a micro-batch's mean, so that Trainer's average over micro-batches is the mean over the
        whole batch.
        """
        return float(of) / float(total) * self.micro_batches if self.model.training else 1.0

    @staticmethod
    def pairs(batch: Batch) -> int:
        """Count the pairs of a micro-batch."""
        return len(batch["packed"]["lengths"]) // 2

    def nll_tokens(self, batch: Batch) -> int:
        """Count the tokens of a micro-batch that an NLL beside the preference loss averages over."""
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
