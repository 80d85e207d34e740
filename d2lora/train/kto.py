"""Train by KTO: TRL's trainer on packed pairs, each a desirable and an undesirable example, with the KL of the
effective batch.

The KL is estimated from prompts with the answers to other prompts of the batch (Ethayarajh et al. 2024, section 4.1).
TRL takes the other prompts from the micro-batch, so that its size changes the result, and refuses micro-batches of a
single example.
"""

from typing import Any, cast

import torch
from datasets import Dataset
from trl import KTOConfig, KTOTrainer

from d2lora.data import Example, shuffled
from d2lora.settings.methods import Kto
from d2lora.train.common import Batch
from d2lora.train.reference import ReferencedObjective, ReferencedTrainer


class PackedKTOTrainer(ReferencedTrainer, KTOTrainer):
    """TRL's KTOTrainer on pairs that are tokenized already. As in TRL, all epochs have the same batches, so exchanged
    answers are fixed.
    """

    args: KTOConfig
    kl: torch.Tensor  # of the present effective batch

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.loss_type, self.calculate_KL = "kto", True  # see KtoObjective.arguments

    def before_training(self, tolerance: float) -> None:
        """Put the pairs into the seeded order, exchange their answers, and compute the reference of both."""
        super().before_training(tolerance)
        pairs: list[Example] = self.train_dataset.to_list()
        pairs = [pairs[i] for i in shuffled(len(pairs), f"kto/{self.args.seed}")]
        self.train_dataset = Dataset.from_list(pairs)
        exchanged = exchange_answers(pairs, self.args.per_device_train_batch_size, cast(int, self.args.max_length))
        values = zip(exchanged, self.of_reference(exchanged, [], tolerance), strict=True)
        self.exchanged = {pair["row"]: value for pair, value in zip(pairs, values, strict=True)}

    def before_step(self, examples: list[Example]) -> None:
        """Estimate the KL of the effective batch, without dropout."""
        super().before_step(examples)
        self.model.eval()
        pairs, reference = zip(*(self.exchanged[e["row"]] for e in examples), strict=True)
        policy = self.logps(self.data_collator.passes.parts(pairs))
        self.kl = (policy - torch.tensor(reference, device=policy.device)).mean()

    def _compute_kl_logps(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Return the KL of the effective batch; TRL subtracts ref_KL_logps, which is 0, and clips negative values."""
        return self.kl

    def compared(self, batch: Batch) -> Batch:
        """Return which examples are desirable, and the reference's log-probabilities, under TRL's names."""
        pairs, ref_logps = self.pairs(batch), torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
        return {
            "label": torch.arange(2 * pairs, device=ref_logps.device) < pairs,
            "ref_logps": ref_logps,
            "ref_KL_logps": torch.zeros(1, device=ref_logps.device),
        }


def exchange_answers(pairs: list[Example], batch: int, max_length: int) -> list[Example]:
    """Return each pair's prompt with the answers of the previous pair of its batch; the first gets those of the last.

    A batch of a single pair gets those of the pair before that batch. Answers are cut if prompt and answer exceed
    `max_length` tokens, as in TRL.
    """
    exchanged = []
    for start in range(0, len(pairs), batch):
        own = pairs[start : start + batch]
        before = [own[-1], *own[:-1]] if len(own) > 1 else [pairs[start - 1]]
        for pair, other in zip(own, before, strict=True):
            room = max_length - len(pair["prompt_ids"])
            answers = {kind: other[kind][:room] for kind in ("chosen_ids", "rejected_ids")}
            exchanged.append({"prompt_ids": pair["prompt_ids"], **answers})
    return exchanged


class KtoObjective(ReferencedObjective[Kto]):
    """How KTO trains."""

    trainer = PackedKTOTrainer
    config = KTOConfig

    def arguments(self, max_length: int) -> dict[str, Any]:
        """Return the arguments of KTOConfig. Its loss_type "kto" is set later: with it TRL refuses micro-batches of one."""
        weights = {name: getattr(self.method, name) for name in ("desirable_weight", "undesirable_weight")}
        return super().arguments(max_length) | weights | {"max_length": max_length, "loss_type": "apo_zero_unpaired"}
