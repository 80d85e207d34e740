"""DPO: TRL's trainer on packed pairs, with the reference's log-probabilities computed once a policy, kept, and proven."""

import contextlib
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from torch.nn.functional import pad
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from d2lora.data import REFERENCE_BLOCK, Subset, longest
from d2lora.keys import digest
from d2lora.layouts import packing, proof
from d2lora.outputs import cached
from d2lora.settings.methods import Dpo
from d2lora.train.common import Batch, Example, Objective, WholeBatchTrainer

_PROVEN = 3  # of the longest pairs, beside the first


class PackedDPOTrainer(WholeBatchTrainer, DPOTrainer):
    """TRL's DPOTrainer on ready ids. The reference's log-probabilities are computed before training, once for each pair.

    `cache` is the folder of the policy that is the reference; `ahead` are the pairs that fill the last block.
    """

    train_dataset: Dataset

    def __init__(
        self, *, reference: Literal["warm_start", "base"], cache: Path | None, ahead: list[Example], **kwargs: Any
    ) -> None:
        if cache is None:
            raise ValueError("DPO needs a folder for what its reference says")
        self.reference, self.cache, self.ahead, self.computed = reference, cache, ahead, 0
        super().__init__(**kwargs)
        # TRL froze a copy of the adapter as the reference. Nothing is trained yet: the policy itself is what it would be.
        self.model.delete_adapter("ref")
        self.precompute_ref_logps = True  # not as an argument: TRL would hash the whole model for a cache of its own

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def before_training(self, tolerance: float) -> None:
        """Add ref_chosen_logps and ref_rejected_logps to the pairs, from the cache where it has them, and check them."""
        pairs = [{k: v for k, v in pair.items() if k != "row"} for pair in self.train_dataset.to_list()]
        self.model.to(self.accelerator.device)
        everything = pairs + self.ahead
        values: list[list[float]] = []
        for start in range(0, len(everything), REFERENCE_BLOCK):
            block = everything[start : start + REFERENCE_BLOCK]
            values += cached(self.cache / f"{digest(block)}.json", functools.partial(self.reference_logps, block))
        self.check_reference(pairs, values, tolerance)
        for column, part in zip(("chosen", "rejected"), zip(*values[: len(pairs)], strict=True), strict=True):
            self.train_dataset = self.train_dataset.add_column(f"ref_{column}_logps", part)

    def counted(self) -> dict[str, int]:
        """Return how many pairs the reference was asked of; the others were in the cache."""
        return {"reference_pairs_computed": self.computed}

    def reference_logps(self, examples: list[Example]) -> list[list[float]]:
        """Return [chosen, rejected] log-probabilities (nats, summed over an answer) of pairs under the reference.

        Pairs that do not fit the memory at once are asked in halves.
        """
        with contextlib.suppress(torch.OutOfMemoryError):
            return self._reference_logps(examples)
        if len(examples) == 1:
            return self._reference_logps(examples)
        half = len(examples) // 2
        return self.reference_logps(examples[:half]) + self.reference_logps(examples[half:])

    def _reference_logps(self, examples: list[Example]) -> list[list[float]]:
        self.computed += len(examples)
        return self._logps(examples)

    @torch.no_grad()
    def _logps(self, examples: list[Example]) -> list[list[float]]:
        batch: Batch = self._prepare_inputs(self.data_collator(examples))
        packed = batch["packed"]
        with self.as_reference(), self.accelerator.autocast():
            predicted = self.log_probs(self.model, packed)["log_probs"]
        return torch.stack(packing.by_answer(predicted, packed).sum(1).chunk(2), 1).float().tolist()

    def as_reference(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which the model is the reference, before the first step: with its adapter, or the base alone."""
        return self.model.disable_adapter() if self.reference == "base" else contextlib.nullcontext()

    def check_reference(self, pairs: Sequence[Example], values: list[list[float]], tolerance: float) -> None:
        """Raise RuntimeError unless the log-probabilities of the first pair and the longest are those of the reference.

        It is asked in the plain way: each answer in a forward pass of its own, whole logits, nothing remembered.
        """
        for index in sorted({0, *sorted(range(len(pairs)), key=lambda i: -longest(pairs[i]))[:_PROVEN]}):
            with self.as_reference(), self.accelerator.autocast():
                plain = proof.plain(self.model, [pairs[index]])
            for answer, kind in enumerate(("chosen", "rejected")):
                now = sum(value for (_, which, _), value in plain.items() if which == answer)
                was, tokens = values[index][answer], len(pairs[index][f"{kind}_ids"])
                if not abs(was - now) <= 2 * tolerance * math.sqrt(tokens):
                    raise RuntimeError(
                        f"DPO's reference is not the {self.reference} model: the {kind} answer of pair {index + 1} has a log-probability "
                        f"of {was:.4f} in {self.cache}, and the model gives {now:.4f}: remove that folder to have it computed again"
                    )

    def answers(self, model: torch.nn.Module, packed: packing.Packed, **_: Any) -> FusedCausalLMOutput:
        """Return a batch's forward with its results as TRL's loss expects them: a row an answer."""
        predicted = self.log_probs(model, packed)
        wanted = ("log_probs", "entropy", "mean_logits", "is_top1")
        return FusedCausalLMOutput(**{k: packing.by_answer(predicted[k], packed) for k in wanted})

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        share, packed = self.share(self.pairs(inputs), self.batch_pairs), inputs.pop("packed")
        mask = pad(packing.mask_of(packed), (1, 0))
        # TRL reads its labels' ids from input_ids; our forward has its own.
        inputs = {k: v for k, v in inputs.items() if k != "rows"} | {"input_ids": mask, "completion_mask": mask}
        return super().compute_loss(functools.partial(self.answers, model, packed), inputs) * share


class DpoObjective(Objective[Dpo]):
    """How DPO trains."""

    trainer = PackedDPOTrainer
    config = DPOConfig

    def arguments(self, max_length: int) -> dict[str, Any]:
        """Return the arguments of DPOConfig; disable_dropout would set LoRA's own dropout to 0."""
        return {"max_length": None, "router_aux_loss_coef": 0.0, "beta": self.method.beta, "disable_dropout": False}

    def trainer_arguments(self, drawn: Subset, reference: Path | None) -> dict[str, Any]:
        """Return which model is the reference, the folder of what it says, and the pairs that fill its last block."""
        return {"reference": self.method.reference, "cache": reference, "ahead": drawn.ahead}
