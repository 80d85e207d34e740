"""ORPO: TRL's trainer on packed pairs, its NLL averaged over the tokens of the effective batch."""

from typing import Any, cast

import torch
from transformers import PreTrainedModel
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer.utils import add_fused_lm_head

from d2lora.layouts import packing
from d2lora.settings.methods import Orpo
from d2lora.train.common import Batch, Example, Objective, WholeBatchTrainer


class PackedORPOTrainer(WholeBatchTrainer, ORPOTrainer):
    """TRL's ORPOTrainer on ready ids, its NLL averaged over the tokens of the effective batch."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        add_fused_lm_head(cast(PreTrainedModel, self.model.get_base_model()), outputs=("log_probs", "mean_logits"))

    def tokenize_row(self, feature: Example, model: torch.nn.Module | None = None) -> Example:
        """Return the row as it is: its ids are ready."""
        return feature

    def nll_tokens(self, batch: Batch) -> int:
        """Count the predicted tokens that the NLL averages over: the first token of a sequence is predicted by nothing."""
        return int(self._in_nll(batch["packed"]).sum())

    def _in_nll(self, packed: packing.Packed) -> torch.Tensor:
        """Which predicted tokens the NLL covers: those of chosen answers, and of prompts if they are predicted."""
        return packed["answer"] < len(packed["lengths"]) // 2

    def concatenated_forward(self, model: torch.nn.Module, batch: Batch) -> Any:
        """Return mean log-probabilities of chosen and rejected answers, their mean logits, and the weighed NLL."""
        packed = batch["packed"]
        predicted = self.log_probs(model, packed)
        logps = packing.by_answer(predicted["log_probs"], packed).sum(1) / packed["lengths"]
        logits = packing.by_answer(predicted["mean_logits"], packed)  # for TRL's log only
        nll = -predicted["log_probs"][0, self._in_nll(packed)].mean()
        weighed = nll * self.share(self.nll_tokens(batch), self.batch_tokens)
        return *logps.chunk(2), *logits.chunk(2), weighed

    def odds_ratio_loss(self, chosen_logps: torch.FloatTensor, rejected_logps: torch.FloatTensor) -> Any:
        """Return TRL's losses of pairs, weighed by the micro-batch's share of pairs, and what TRL logs beside them."""
        losses, *rest = super().odds_ratio_loss(chosen_logps, rejected_logps)
        return losses * self.share(len(losses), self.batch_pairs), *rest


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
