"""Train by DPO: TRL's trainer on packed pairs."""

from typing import Any

from trl import DPOConfig, DPOTrainer

from d2lora.settings.methods import Dpo
from d2lora.train.common import Batch
from d2lora.train.reference import ReferencedObjective, ReferencedTrainer


class PackedDPOTrainer(ReferencedTrainer, DPOTrainer):
    """TRL's DPOTrainer on pairs that are tokenized already."""

    def compared(self, batch: Batch) -> Batch:
        """Return the reference's log-probabilities, under TRL's names."""
        return {name: batch[name] for name in ("ref_chosen_logps", "ref_rejected_logps")}


class DpoObjective(ReferencedObjective[Dpo]):
    """How DPO trains."""

    trainer = PackedDPOTrainer
    config = DPOConfig

    def arguments(self, max_length: int) -> dict[str, Any]:
        """Return the arguments of DPOConfig."""
        return super().arguments(max_length) | {"max_length": None}
