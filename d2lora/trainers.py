"""TRL's trainers on ready token ids: on packed batches too, and with losses normalised over the effective batch.

Their losses and optimizers are TRL's. What is ours is which tokens go through the model (packing.py), that neither packing nor the
micro-batch changes a result by more than rounding, and that DPO's reference is computed once and proven.
"""

import contextlib
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy, pad
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from d2lora import packing
from d2lora.data import REFERENCE_BLOCK, sequences
from d2lora.plan import digest
from d2lora.store import cached


@dataclass(frozen=True)
class Packer:
    """The collator of packed training: token ids of a micro-batch -> packing.pack, and what TRL's trainers count by."""

    hidden: int | None
    prompt_loss: bool = False

    def __call__(self, examples: list[dict]) -> dict:
        examples = [s for e in examples for s in sequences(e)]
        packed = packing.pack(examples, self.hidden, self.prompt_loss)
        batch: dict[str, Any] = {"packed": packed, "attention_mask": packed["sequence"] >= 0}
        if "labels" in examples[0]:
            batch["labels"] = pad(packed["target"][None], (1, 0), value=-100)
        for key in ("ref_chosen_logps", "ref_rejected_logps"):
            if key in examples[0]:
                batch[key] = torch.tensor([e[key] for e in examples])
        return batch


class _Finite:
    """Stops at the first loss that is no number. `rows` are the training set's places in the data set."""

    rows: list[int]

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        if not torch.isfinite(loss):
            step, rows = self.state.global_step + 1, ", ".join(map(str, self.rows_in(inputs)))
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {step}, on rows {rows} of the data set: lower the learning rate or look at them"
            )
        return loss

    def rows_in(self, batch: dict) -> list[int]:
        """Which rows of the data set are in a batch: those whose ids are found in it."""
        ids = batch["packed"]["ids"] if "packed" in batch else batch.get("input_ids", batch.get("chosen_input_ids"))
        there = [_words(line) for line in ids.tolist()]
        wanted = (sequences(e)[0] for e in self.train_dataset)  # a row's sequences go together
        ids = (e.get("input_ids") or e["prompt_ids"] + e["chosen_ids"] for e in wanted)
        return [self.rows[i] for i, example in enumerate(ids) if any(_words(example) in line for line in there)]


def _words(ids: list[int]) -> str:
    """Ids as a text in which they can be looked for."""
    return f" {' '.join(map(str, ids))} "


class SFT(_Finite, SFTTrainer):
    """TRL's SFT, on packed batches too."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        forward = model
        if "packed" in inputs:
            forward = lambda packed, **_: packing.log_probs(model, packed)  # noqa: E731
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
        if "packed" in batch:
            return len(batch["packed"]["lengths"]) // 2
        return len(batch["chosen_input_ids"]) if "chosen_input_ids" in batch else len(batch["input_ids"]) // 2

    @staticmethod
    def nll_tokens(batch) -> int:
        return 0


class DPO(_Finite, _WholeBatch, DPOTrainer):
    """TRL's DPO on ready ids. The reference's log-probabilities are computed before training, once for each pair.

    `cache` is the folder of the policy that is the reference; `ahead` are the pairs that fill the last block.
    """

    def __init__(self, *, reference: str, cache: Path, ahead: list[dict], **kwargs: Any) -> None:
        self.reference, self.cache, self.computed = reference, cache, 0
        super().__init__(**kwargs)
        # TRL froze a copy of the adapter as the reference. Nothing is trained yet: the policy itself is what it would be.
        self.model.delete_adapter("ref")
        self.train_dataset = self.with_reference(self.train_dataset, ahead)
        self.precompute_ref_logps = True  # not as an argument: TRL would hash the whole model for a cache of its own

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset

    def with_reference(self, dataset: Dataset, ahead: list[dict]) -> Dataset:
        """The pairs with ref_chosen_logps and ref_rejected_logps, from the cache where it has them."""
        examples = dataset.to_list()
        self.model.eval().to(self.accelerator.device)
        everything, values = examples + ahead, []
        for start in range(0, len(everything), REFERENCE_BLOCK):
            block = everything[start : start + REFERENCE_BLOCK]
            values += cached(self.cache / f"{digest(block)}.json", functools.partial(self.reference_logps, block))
        for example, value in zip(examples[:4], values, strict=False):  # one by one: whole logits take memory
            self.check_reference([example], [value])
        self.model.train()
        for column, part in zip(("chosen", "rejected"), zip(*values[: len(examples)], strict=True), strict=True):
            dataset = dataset.add_column(f"ref_{column}_logps", part)
        return dataset

    def reference_logps(self, examples: list[dict]) -> list[list[float]]:
        """[chosen, rejected] log-probabilities of pairs under the reference; in halves where they do not fit the memory."""
        with contextlib.suppress(torch.OutOfMemoryError):
            return self._reference_logps(examples)
        if len(examples) == 1:
            return self._reference_logps(examples)
        half = len(examples) // 2
        return self.reference_logps(examples[:half]) + self.reference_logps(examples[half:])

    @torch.no_grad()
    def _reference_logps(self, examples: list[dict]) -> list[list[float]]:
        batch = self._prepare_inputs(self.data_collator(examples))
        with self.as_reference(), self.accelerator.autocast():
            if "packed" in batch:
                logps = self.answers(self.model, batch["packed"]).log_probs
            else:
                batch["labels"] = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
                logps = self.model(**batch, fused_lm_head=True).log_probs
        self.computed += len(examples)
        return torch.stack(logps.sum(1).chunk(2), 1).float().tolist()

    def as_reference(self):
        """The model as the reference, before the first step: with its adapter, or the base alone."""
        return self.model.disable_adapter() if self.reference == "base" else contextlib.nullcontext()

    @torch.no_grad()
    def check_reference(self, examples: list[dict], found: list[list[float]]) -> None:
        """RuntimeError unless reference log-probabilities are those of the model it is said to be.

        It is asked in the plain way: padded sequences, whole logits, nothing packed and nothing remembered.
        """
        batch = self._prepare_inputs(DataCollatorForPreference(self._tokenizer.pad_token_id)(examples))
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        with self.as_reference(), self.accelerator.autocast():
            logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        expected = torch.stack(ORPOTrainer.get_batch_logps(logits, labels).chunk(2), 1)
        got = torch.tensor(found, device=expected.device)
        if not torch.allclose(got, expected, rtol=1e-3, atol=2e-3 if self.model.dtype == torch.float32 else 0.5):
            raise RuntimeError(
                f"DPO's reference is not the {self.reference} model: {got[0].tolist()} against {expected[0].tolist()}"
            )

    @staticmethod
    def answers(model, packed: packing.Packed, **_: Any) -> FusedCausalLMOutput:
        """The packed forward with its results as TRL's loss expects them: a row an answer."""
        found = packing.log_probs(model, packed)
        wanted = ("log_probs", "entropy", "mean_logits", "is_top1")
        return FusedCausalLMOutput(**{k: packing.by_answer(found[k], packed) for k in wanted})

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        share = self.share(self.pairs(inputs), self.batch_pairs)
        if packed := inputs.pop("packed", None):
            mask = pad(packing.mask_of(packed), (1, 0))
            # TRL reads its labels' ids from input_ids; the packed forward has its own.
            inputs |= {"input_ids": mask, "completion_mask": mask}
            model = functools.partial(self.answers, model, packed)
        return super().compute_loss(model, inputs) * share


class ORPO(_Finite, _WholeBatch, ORPOTrainer):
    """TRL's ORPO on ready ids, its NLL averaged over the tokens of the effective batch."""

    def __init__(self, *, nll: str, **kwargs: Any) -> None:
        self.nll = nll
        super().__init__(**kwargs)
        add_fused_lm_head(self.model.get_base_model(), outputs=("log_probs", "mean_logits"))

    def tokenize_row(self, feature, model=None) -> dict:
        row, prompt = {}, feature["prompt_ids"]
        for kind in ("chosen", "rejected"):
            answer = feature[f"{kind}_ids"]
            row[f"{kind}_input_ids"] = prompt + answer
            row[f"{kind}_attention_mask"] = [1] * len(row[f"{kind}_input_ids"])
            row[f"{kind}_labels"] = [-100] * len(prompt) + answer
        return row

    def nll_tokens(self, batch) -> int:
        """Predicted tokens that the NLL averages over: the first token of a sequence is predicted by nothing."""
        if "packed" in batch:
            return int(self._in_nll(batch["packed"]).sum())
        if self.nll == "completion":
            return int((batch["chosen_labels"][:, 1:] != -100).sum())
        return int(batch["chosen_attention_mask"][:, 1:].sum())

    def _in_nll(self, packed: packing.Packed) -> torch.Tensor:
        """Which predicted tokens the NLL covers: those of chosen answers, and of prompts if they are predicted."""
        return packed["answer"] < len(packed["lengths"]) // 2

    def concatenated_forward(self, model, batch):
        forward = self._packed_forward if "packed" in batch else self._padded_forward
        *results, nll = forward(model, batch)
        return *results, nll * self.share(self.nll_tokens(batch), self.batch_tokens)

    def _packed_forward(self, model, batch):
        packed = batch["packed"]
        found = packing.log_probs(model, packed)
        logps = packing.by_answer(found.log_probs, packed).sum(1) / packed["lengths"]
        logits = packing.by_answer(found.mean_logits, packed)  # for TRL's log only
        nll = -found.log_probs[0, self._in_nll(packed)].mean()
        return *logps.chunk(2), *logits.chunk(2), nll

    def _padded_forward(self, model, batch):
        *results, logits, rejected_logits, nll = super().concatenated_forward(model, batch)[:5]
        if self.nll == "completion":
            labels = pad(batch["chosen_labels"], (0, logits.shape[1] + 1 - batch["chosen_labels"].shape[1]), value=-100)
            nll = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten().to(logits.device))
        return *results, logits, rejected_logits, nll

    def odds_ratio_loss(self, chosen_logps, rejected_logps):
        losses, *rest = super().odds_ratio_loss(chosen_logps, rejected_logps)
        return losses * self.share(len(losses), self.batch_pairs), *rest


METHODS: dict[str, tuple[type, type]] = {"sft": (SFT, SFTConfig), "dpo": (DPO, DPOConfig), "orpo": (ORPO, ORPOConfig)}
