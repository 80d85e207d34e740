"""Train by KTO: TRL's trainer on packed pairs, each a desirable and an undesirable example, with the KL of the
effective batch.

The KL is estimated from prompts with the answers to other prompts of the batch (Ethayarajh et al. 2024, section 4.1).
TRL takes the other prompts from the micro-batch, so that its size changes the result, and refuses micro-batches of a
single example.
"""

import functools
from typing import Any, cast

import torch
from datasets import Dataset
from torch.nn.functional import pad
from trl import KTOConfig, KTOTrainer

from d2lora.data import Example, shuffled
from d2lora.layouts import packing
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

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        packed, pairs, share = inputs["packed"], self.pairs(inputs), self.share(inputs)
        mask = pad(packing.mask_of(packed), (1, 0))
        batch = {
            # TRL reads its labels' ids from input_ids; our forward has its own.
            **{"input_ids": mask, "completion_mask": mask, "attention_mask": inputs["attention_mask"]},
            "label": torch.arange(2 * pairs, device=mask.device) < pairs,
            "ref_logps": torch.cat([inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]]),
            "ref_KL_logps": torch.zeros(1, device=mask.device),
        }
        return super().compute_loss(functools.partial(self.answers, model, packed), batch) * share


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
