"""Train by DPO: TRL's trainer on packed pairs."""

import functools
from typing import Any

import torch
from torch.nn.functional import pad
from trl import DPOConfig, DPOTrainer

from d2lora.layouts import packing
from d2lora.settings.methods import Dpo
from d2lora.train.common import Batch
from d2lora.train.reference import ReferencedObjective, ReferencedTrainer


class PackedDPOTrainer(ReferencedTrainer, DPOTrainer):
    """TRL's DPOTrainer on pairs that are tokenized already."""

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        share, packed = self.share(inputs), inputs.pop("packed")
        mask = pad(packing.mask_of(packed), (1, 0))
        # TRL reads its labels' ids from input_ids; our forward has its own.
        inputs = inputs | {"input_ids": mask, "completion_mask": mask}
        return super().compute_loss(functools.partial(self.answers, model, packed), inputs) * share


class DpoObjective(ReferencedObjective[Dpo]):
    """How DPO trains."""

    trainer = PackedDPOTrainer
    config = DPOConfig

    def arguments(self, max_length: int) -> dict[str, Any]:
        """Return the arguments of DPOConfig."""
        return super().arguments(max_length) | {"max_length": None}
