"""TRL's trainers on ready token ids, in layouts of ours, and with losses normalised over the effective batch.

Their losses and optimizers are TRL's. What is ours is which tokens go through the model (packing.py), that neither packing nor the
micro-batch changes a result by more than rounding, and that DPO's reference is computed once and proven.
"""

import contextlib
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from d2lora.data import REFERENCE_BLOCK, longest, sequences
from d2lora.layouts import packing, proof
from d2lora.outputs import cached
from d2lora.plan import digest


@dataclass
class Packer:
    """The collator: token ids of a micro-batch -> packing.pack, and what TRL's trainers count by.

    `hidden` is the width of the model. The layout is chosen once a trainer is there to prove it with.
    """

    hidden: int
    layout: packing.Layout
    prompt_loss: bool = False

    def __call__(self, examples: list[dict]) -> dict:
        texts = [text for e in examples for text in sequences(e)]
        packed = packing.pack(texts, self.layout, self.hidden, self.prompt_loss)
        used = torch.cat([rows["sequence"].flatten() >= 0 for rows in packed["passes"]])
        batch: dict[str, Any] = {"packed": packed, "attention_mask": used[None]}
        batch["rows"] = [e["row"] for e in examples if "row" in e]
        if "labels" in texts[0]:
            batch["labels"] = pad(packed["target"][None], (1, 0), value=-100)
        for key in ("ref_chosen_logps", "ref_rejected_logps"):
            if key in examples[0]:
                batch[key] = torch.tensor([e[key] for e in examples])
        return batch


class _Finite:
    """Stops at the first loss that is no number, and names its rows of the data set."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        step, rows = self.state.global_step + 1, ", ".join(map(str, inputs["rows"]))  # type: ignore[attr-defined]
        loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {step}, on rows {rows} of the data set: lower the learning rate or look at them"
            )
        return loss

    def log_probs(self, model, packed: packing.Packed) -> FusedCausalLMOutput:
        """What the model says of a batch's predicted tokens, in the layout of its collator."""
        return packing.log_probs(model, packed, self.data_collator.layout)  # type: ignore[attr-defined]


class SFT(_Finite, SFTTrainer):
    """TRL's SFT on batches of ours."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        forward = lambda packed, **_: self.log_probs(model, packed)  # noqa: E731
        return super().compute_loss(forward, inputs, return_outputs, num_items_in_batch)


class _WholeBatch:
    """Weighs each micro-batch by its share of the effective batch's pairs (and ORPO's NLL by its share of tokens).

    TRL averages per micro-batch and Trainer averages those: not the same when an epoch's last micro-batch is smaller,
    and for ORPO's token-averaged NLL never the same.
    """

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        self.micro_batches = len(batches)
        self.batch_pairs = sum(self.pairs(b) for b in batches)
        self.batch_tokens = sum(self.nll_tokens(b) for b in batches)
        return batches, None

    def share(self, of: int | torch.Tensor, total: int | torch.Tensor) -> float:
        """What to multiply a micro-batch's mean with, so that Trainer's division by the micro-batches gives the mean over all."""
        return float(of) / float(total) * self.micro_batches if self.model.training else 1.0

    @staticmethod
    def pairs(batch) -> int:
        return len(batch["packed"]["lengths"]) // 2

    @staticmethod
    def nll_tokens(batch) -> int:
        return 0


class DPO(_Finite, _WholeBatch, DPOTrainer):
    """TRL's DPO on ready ids. The reference's log-probabilities are computed before training, once for each pair.

    `cache` is the folder of the policy that is the reference; `ahead` are the pairs that fill the last block. `tolerance` is how far
    a token's log-probability may be from that of a plain pass (proof.Proof).
    """

    tolerance = proof.EXACT

    def __init__(self, *, reference: str, cache: Path, ahead: list[dict], **kwargs: Any) -> None:
        self.reference, self.cache, self.ahead, self.computed = reference, cache, ahead, 0
        super().__init__(**kwargs)
        # TRL froze a copy of the adapter as the reference. Nothing is trained yet: the policy itself is what it would be.
        self.model.delete_adapter("ref")
        self.precompute_ref_logps = True  # not as an argument: TRL would hash the whole model for a cache of its own

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset

    def add_reference(self) -> None:
        """Add ref_chosen_logps and ref_rejected_logps to the pairs, from the cache where it has them."""
        pairs = [{k: v for k, v in pair.items() if k != "row"} for pair in self.train_dataset.to_list()]
        self.model.to(self.accelerator.device)
        everything, values = pairs + self.ahead, []
        for start in range(0, len(everything), REFERENCE_BLOCK):
            block = everything[start : start + REFERENCE_BLOCK]
            values += cached(self.cache / f"{digest(block)}.json", functools.partial(self.reference_logps, block))
        self.check_reference(pairs, values)
        for column, part in zip(("chosen", "rejected"), zip(*values[: len(pairs)], strict=True), strict=True):
            self.train_dataset = self.train_dataset.add_column(f"ref_{column}_logps", part)

    def reference_logps(self, examples: list[dict]) -> list[list[float]]:
        """[chosen, rejected] log-probabilities of pairs under the reference; in halves where they do not fit the memory."""
        with contextlib.suppress(torch.OutOfMemoryError):
            return self._reference_logps(examples)
        if len(examples) == 1:
            return self._reference_logps(examples)
        half = len(examples) // 2
        return self.reference_logps(examples[:half]) + self.reference_logps(examples[half:])

    def _reference_logps(self, examples: list[dict]) -> list[list[float]]:
        self.computed += len(examples)
        return self._logps(examples)

    @torch.no_grad()
    def _logps(self, examples: list[dict]) -> list[list[float]]:
        packed = self._prepare_inputs(self.data_collator(examples))["packed"]
        with self.as_reference(), self.accelerator.autocast():
            found = self.log_probs(self.model, packed).log_probs
        return torch.stack(packing.by_answer(found, packed).sum(1).chunk(2), 1).float().tolist()

    def as_reference(self):
        """The model as the reference, before the first step: with its adapter, or the base alone."""
        return self.model.disable_adapter() if self.reference == "base" else contextlib.nullcontext()

    def check_reference(self, pairs: list[dict], values: list[list[float]]) -> None:
        """RuntimeError unless the log-probabilities of the first pair and the longest are those of the reference.

        It is asked in the plain way: each answer in a forward pass of its own, whole logits, nothing remembered.
        """
        some = sorted({0, *sorted(range(len(pairs)), key=lambda i: -longest(pairs[i]))[:3]})
        for index in some:
            with self.as_reference(), self.accelerator.autocast():
                plain = proof.plain(self.model, [pairs[index]])
            for answer, kind in enumerate(("chosen", "rejected")):
                now = sum(value for (_, which, _), value in plain.items() if which == answer)
                was, tokens = values[index][answer], len(pairs[index][f"{kind}_ids"])
                if not abs(was - now) <= 2 * self.tolerance * math.sqrt(tokens):
                    raise RuntimeError(
                        f"DPO's reference is not the {self.reference} model: the {kind} answer of pair {index + 1} has a log-probability "
                        f"of {was:.4f} in {self.cache}, and the model gives {now:.4f}: remove that folder to have it computed again"
                    )

    def answers(self, model, packed: packing.Packed, **_: Any) -> FusedCausalLMOutput:
        """A batch's forward with its results as TRL's loss expects them: a row an answer."""
        found = self.log_probs(model, packed)
        wanted = ("log_probs", "entropy", "mean_logits", "is_top1")
        return FusedCausalLMOutput(**{k: packing.by_answer(found[k], packed) for k in wanted})

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        share, packed = self.share(self.pairs(inputs), self.batch_pairs), inputs.pop("packed")
        mask = pad(packing.mask_of(packed), (1, 0))
        # TRL reads its labels' ids from input_ids; our forward has its own.
        inputs = {k: v for k, v in inputs.items() if k != "rows"} | {"input_ids": mask, "completion_mask": mask}
        return super().compute_loss(functools.partial(self.answers, model, packed), inputs) * share


class ORPO(_Finite, _WholeBatch, ORPOTrainer):
    """TRL's ORPO on ready ids, its NLL averaged over the tokens of the effective batch."""

    def __init__(self, *, nll: str, **kwargs: Any) -> None:
        self.nll = nll
        super().__init__(**kwargs)
        add_fused_lm_head(self.model.get_base_model(), outputs=("log_probs", "mean_logits"))

    def tokenize_row(self, feature, model=None) -> dict:
        return feature

    def nll_tokens(self, batch) -> int:
        """Predicted tokens that the NLL averages over: the first token of a sequence is predicted by nothing."""
        return int(self._in_nll(batch["packed"]).sum())

    def _in_nll(self, packed: packing.Packed) -> torch.Tensor:
        """Which predicted tokens the NLL covers: those of chosen answers, and of prompts if they are predicted."""
        return packed["answer"] < len(packed["lengths"]) // 2

    def concatenated_forward(self, model, batch):
        packed = batch["packed"]
        found = self.log_probs(model, packed)
        logps = packing.by_answer(found.log_probs, packed).sum(1) / packed["lengths"]
        logits = packing.by_answer(found.mean_logits, packed)  # for TRL's log only
        nll = -found.log_probs[0, self._in_nll(packed)].mean()
        weighed = nll * self.share(self.nll_tokens(batch), self.batch_tokens)
        return *logps.chunk(2), *logits.chunk(2), weighed

    def odds_ratio_loss(self, chosen_logps, rejected_logps):
        losses, *rest = super().odds_ratio_loss(chosen_logps, rejected_logps)
        return losses * self.share(len(losses), self.batch_pairs), *rest


METHODS: dict[str, tuple[type, type]] = {"sft": (SFT, SFTConfig), "dpo": (DPO, DPOConfig), "orpo": (ORPO, ORPOConfig)}
