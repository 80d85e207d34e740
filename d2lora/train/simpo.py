"""Train by SimPO: TRL's trainer on packed pairs."""

from typing import Any

import torch
from trl.experimental.cpo import CPOConfig, CPOTrainer

from d2lora.settings.methods import Simpo
from d2lora.train.common import Batch, MeanLogpsTrainer, Objective


class PackedSimPOTrainer(MeanLogpsTrainer, CPOTrainer):
    """TRL's CPOTrainer, which has SimPO's loss, on pairs that are tokenized already."""

    def concatenated_forward(self, model: torch.nn.Module, batch: Batch) -> Any:
        """Return mean log-probabilities of chosen and rejected answers, their mean logits, and 0 for CPO's NLL, which
        SimPO lacks.
        """
        packed = batch["packed"]
        predicted = self.log_probs(model, packed)
        return *self.means(predicted, packed), torch.zeros((), device=self.accelerator.device)

    def cpo_loss(self, policy_chosen_logps: torch.FloatTensor, policy_rejected_logps: torch.FloatTensor) -> Any:
        """Return TRL's losses of pairs, weighted by the part's share of pairs, and the rewards that TRL logs."""
        losses, *rewards = super().cpo_loss(policy_chosen_logps, policy_rejected_logps)
        return losses * len(losses) / self.batch_pairs, *rewards


class SimpoObjective(Objective[Simpo]):
    """How SimPO trains."""

    trainer = PackedSimPOTrainer
    config = CPOConfig

    def arguments(self, max_length: int) -> dict[str, Any]:
        """Return the arguments of CPOConfig; disable_dropout would set LoRA's own dropout to 0."""
        own = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": self.method.beta, "simpo_gamma": self.method.gamma}
        return own | {"max_length": max_length, "disable_dropout": False}
