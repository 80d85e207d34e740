"""Compute the log-probabilities of a reference once for each policy, cache them, and check them."""

import contextlib
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from datasets import Dataset
from torch.nn.functional import pad
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from d2lora.data import REFERENCE_BLOCK, Example, Subset, longest
from d2lora.keys import digest
from d2lora.layouts import families, log_probs, packing
from d2lora.outputs import cached
from d2lora.settings.methods import Referenced
from d2lora.train.common import Batch, Objective, WholeBatchTrainer

_PROVEN = 1  # of the longest pairs, beside the first: each costs two passes of one text, as much host time as a step


class ReferencedTrainer(WholeBatchTrainer):
    """A mixin for TRL's trainers with a reference, whose log-probabilities are computed before training, once for each
    pair.

    `cache` is the folder of the policy that is the reference; `ahead` are the pairs that fill the last block.
    """

    train_dataset: Dataset

    def __init__(self, *, method: Referenced, cache: Path | None, ahead: list[Example], **kwargs: Any) -> None:
        if cache is None:
            raise ValueError(f"{method.label} needs a folder for what its reference says")
        self.method, self.cache, self.ahead, self.computed = method, cache, ahead, 0
        super().__init__(**kwargs)
        # TRL froze a copy of the adapter as the reference. Nothing is trained yet: the policy itself is what it would be.
        self.model.delete_adapter("ref")
        self.precompute_ref_logps = True  # not as an argument: TRL would hash the whole model for a cache of its own

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def before_training(self, tolerance: float) -> None:
        """Add ref_chosen_logps and ref_rejected_logps to the pairs."""
        pairs = [{k: v for k, v in pair.items() if k != "row"} for pair in self.train_dataset.to_list()]
        values = self.of_reference(pairs, self.ahead, tolerance)
        for column, part in zip(("chosen", "rejected"), zip(*values, strict=True), strict=True):
            self.train_dataset = self.train_dataset.add_column(f"ref_{column}_logps", part)

    def counted(self) -> dict[str, int]:
        """Return for how many pairs the reference was computed; the others were in the cache."""
        return {"reference_pairs_computed": self.computed}

    def of_reference(self, pairs: list[Example], ahead: list[Example], tolerance: float) -> list[list[float]]:
        """Return [chosen, rejected] log-probabilities of pairs under the reference, from the cache if it has them,
        checked.

        `ahead` are pairs that fill the last block, whose log-probabilities are computed with it.
        """
        self.model.to(self.accelerator.device)
        everything = pairs + ahead
        values: list[list[float]] = []
        for start in range(0, len(everything), REFERENCE_BLOCK):
            block = everything[start : start + REFERENCE_BLOCK]
            values += cached(self.cache / f"{digest(block)}.json", functools.partial(self.reference_logps, block))
        self.check_reference(pairs, values, tolerance)
        return values[: len(pairs)]

    def reference_logps(self, examples: list[Example]) -> list[list[float]]:
        """Return [chosen, rejected] log-probabilities (nats, summed over an answer) of pairs under the reference, in one
        pass if its tokens are not too many.
        """
        passes = self.data_collator.passes
        with self.as_reference():
            values: list[list[float]] = self.logps([examples] if passes.rows else passes.parts(examples)).tolist()
        self.computed += len(examples)
        return values

    def logps(self, parts: list[list[Example]]) -> torch.Tensor:
        """Return log-probabilities (pairs, 2) of chosen and rejected answers (nats, summed) under the current model, a part
        a pass. If memory runs out, a part is divided.
        """
        return torch.cat(self.data_collator.passes.each(parts, self._logps))

    @torch.no_grad()
    def _logps(self, examples: list[Example]) -> torch.Tensor:
        batch: Batch = self._prepare_inputs(self.data_collator.lay(examples))
        packed = batch["packed"]
        with self.accelerator.autocast():
            predicted = self.log_probs(self.model, packed)["log_probs"]
        return torch.stack(packing.by_answer(predicted, packed).sum(1).chunk(2), 1).float()

    def as_reference(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which the model is the reference, before the first step: with its adapter, or the base alone."""
        return self.model.disable_adapter() if self.method.base_is_reference else contextlib.nullcontext()

    def check_reference(self, pairs: Sequence[Example], values: list[list[float]], tolerance: float) -> None:
        """Raise RuntimeError unless the log-probabilities of the first pair and the longest are those of the
        reference.

        They are compared with plain passes: one answer each, the model's own head, no cache.
        """
        for index in sorted({0, *sorted(range(len(pairs)), key=lambda i: -longest(pairs[i]))[:_PROVEN]}):
            plainly = families.attention(cast(PreTrainedModel, self.model.get_base_model()), self.data_collator.plain)
            with plainly, self.as_reference(), self.accelerator.autocast():
                by_token = log_probs.plain(self.model, [pairs[index]])
            for answer, kind in enumerate(("chosen", "rejected")):
                computed = sum(value for (_, which, _), value in by_token.items() if which == answer)
                stored, tokens = values[index][answer], len(pairs[index][f"{kind}_ids"])
                if not abs(stored - computed) <= 2 * tolerance * math.sqrt(tokens):
                    raise RuntimeError(
                        f"{self.method.label}'s reference is not the {self.method.reference} model: the {kind} answer of pair {index + 1} "
                        f"has a log-probability of {stored:.4f} in {self.cache}, and the model gives {computed:.4f}: remove that folder to have "
                        "it computed again"
                    )

    def compared(self, batch: Batch) -> Batch:
        """Return what TRL's loss compares the policy with, for a batch of Packer's. Each method's trainer has its own."""
        raise NotImplementedError

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return TRL's loss of a part, weighted by the part's share of the effective batch's pairs."""
        packed = inputs["packed"]
        mask = pad(packing.mask_of(packed), (1, 0))
        # TRL reads its labels' ids from input_ids; our forward has its own.
        batch = {"input_ids": mask, "completion_mask": mask, "attention_mask": inputs["attention_mask"]}
        forward: Any = functools.partial(self.answers, model, packed)
        loss: Any = super().compute_loss(forward, batch | self.compared(inputs))
        return loss * self.share(inputs)

    def answers(self, model: torch.nn.Module, packed: packing.Packed, **_: Any) -> FusedCausalLMOutput:
        """Run a batch and return the results as TRL's loss expects them: one row for each answer."""
        predicted = self.log_probs(model, packed)
        wanted = ("log_probs", "entropy", "mean_logits", "is_top1")
        return FusedCausalLMOutput(**{k: packing.by_answer(predicted[k], packed) for k in wanted if k in predicted})


R = TypeVar("R", bound=Referenced)


class ReferencedObjective(Objective[R], Generic[R]):
    """How a method with a reference trains."""

    def arguments(self, max_length: int) -> dict[str, Any]:
        """Return the arguments that TRL's classes share; disable_dropout would set LoRA's own dropout to 0."""
        return {"router_aux_loss_coef": 0.0, "beta": self.method.beta, "disable_dropout": False}

    def trainer_arguments(self, drawn: Subset, reference: Path | None) -> dict[str, Any]:
        """Return the method, the cache of its reference, and the pairs that fill the last block."""
        return {"method": self.method, "cache": reference, "ahead": drawn.ahead}
