"""Train by SFT: TRL's trainer on packed rows, with the loss on the chosen answer, or on every assistant turn of a
conversation.
"""

from typing import Any

import torch
from trl import SFTConfig, SFTTrainer

from d2lora.data import Example, Subset, sequences, sft_examples
from d2lora.settings.methods import Sft
from d2lora.train.common import Batch, Objective, PackedTrainer


class PackedSFTTrainer(PackedTrainer, SFTTrainer):
    """TRL's SFTTrainer on batches of Packer."""

    def loss_tokens(self, examples: list[Example]) -> int:
        """Count the predicted tokens; the first token of a sequence is never predicted."""
        return sum(label != -100 for e in examples for text in sequences(e) for label in text["labels"][1:])

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        forward = lambda packed, **_: self.log_probs(model, packed)  # noqa: E731
        return super().compute_loss(forward, inputs, return_outputs, num_items_in_batch)


class SftObjective(Objective[Sft]):
    """How SFT trains."""

    trainer = PackedSFTTrainer
    config = SFTConfig

    def examples(self, drawn: Subset) -> list[Example]:
        """Return {input_ids, labels} of pairs' chosen answers; of conversations, as they are."""
        return sft_examples(drawn.examples)

    def arguments(self, max_length: int) -> dict[str, Any]:
        """Return the arguments of SFTConfig: nothing is tokenized or cut, and no router's loss is added."""
        return {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}, "router_aux_loss_coef": 0.0}
