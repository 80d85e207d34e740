"""Train by ORPO: TRL's trainer on packed pairs, with the NLL averaged over the tokens of the effective batch."""

from typing import Any

import torch
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from d2lora.data import Example
from d2lora.settings.methods import Orpo
from d2lora.train.common import Batch, MeanLogpsTrainer, Objective


class PackedORPOTrainer(MeanLogpsTrainer, ORPOTrainer):
    """TRL's ORPOTrainer on pairs that are tokenized already, with the NLL averaged over the tokens of the effective
    batch.
    """

    def nll_tokens(self, examples: list[Example]) -> int:
        """Count the predicted tokens that the NLL averages over: the first token of a prompt is not predicted."""
        prompts = sum(len(e["prompt_ids"]) - 1 for e in examples) if self.data_collator.prompt_loss else 0
        return prompts + sum(len(e["chosen_ids"]) for e in examples)

    def concatenated_forward(self, model: torch.nn.Module, batch: Batch) -> Any:
        """Return mean log-probabilities of chosen and rejected answers, their mean logits, and the part's share of the
        NLL: of chosen answers, and of prompts if they are predicted.
        """
        packed = batch["packed"]
        predicted = self.log_probs(model, packed)
        in_nll = packed["answer"] < len(packed["lengths"]) // 2
        nll = -predicted["log_probs"][0].masked_fill(~in_nll, 0).sum() / self.batch_tokens
        return *self.means(predicted, packed), nll

    def odds_ratio_loss(self, chosen_logps: torch.FloatTensor, rejected_logps: torch.FloatTensor) -> Any:
        """Return TRL's losses of pairs, weighted by the part's share of pairs, and the values that TRL logs."""
        losses, *rest = super().odds_ratio_loss(chosen_logps, rejected_logps)
        return losses * len(losses) / self.batch_pairs, *rest


class OrpoObjective(Objective[Orpo]):
    """How ORPO trains."""

    trainer = PackedORPOTrainer
    config = ORPOConfig

    @property
    def prompt_loss(self) -> bool:
        """Tell whether the NLL covers the prompt, as TRL's does."""
        return self.method.nll == "prompt_and_chosen"

    def arguments(self, max_length: int) -> dict[str, Any]:
        """Return the arguments of ORPOConfig; disable_dropout would set LoRA's own dropout to 0."""
        return {"max_length": max_length, "beta": self.method.beta, "disable_dropout": False}
