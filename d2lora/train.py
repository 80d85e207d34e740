"""One train() for both phases and all methods, on TRL's trainers.

The trainers get token ids (data.py made them), packed so that no token is computed twice (packing.py), and their losses are
normalised over the effective batch: neither packing nor the micro-batch changes a result by more than rounding.
"""

import contextlib
import functools
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch.nn.functional import cross_entropy, pad
from transformers import PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.utils import DPODataCollatorWithPadding
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from d2lora import packing, tracking
from d2lora.config import Recipe
from d2lora.data import REFERENCE_BLOCK, Subset, sft_examples
from d2lora.model import Base, device, memory_mb
from d2lora.plan import digest
from d2lora.store import cached, write_json

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Packer:
    """The collator of packed training: token ids of a micro-batch -> packing.pack, and what TRL's trainers count by."""

    hidden: int | None
    prompt_loss: bool = False

    def __call__(self, examples: list[dict]) -> dict:
        packed = packing.pack(examples, self.hidden, self.prompt_loss)
        batch: dict[str, Any] = {"packed": packed, "attention_mask": packed["sequence"] >= 0}
        if "labels" in examples[0]:
            batch["labels"] = pad(packed["target"][None], (1, 0), value=-100)
        for key in ("ref_chosen_logps", "ref_rejected_logps"):
            if key in examples[0]:
                batch[key] = torch.tensor([e[key] for e in examples])
        return batch


class SFT(SFTTrainer):
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


class DPO(_WholeBatch, DPOTrainer):
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
        self.check_reference(examples[:4], values[:4])
        self.model.train()
        for column, part in zip(("chosen", "rejected"), zip(*values[: len(examples)], strict=True), strict=True):
            dataset = dataset.add_column(f"ref_{column}_logps", part)
        return dataset

    @torch.no_grad()
    def reference_logps(self, examples: list[dict]) -> list[list[float]]:
        """[chosen, rejected] log-probabilities of pairs under the reference."""
        self.computed += len(examples)
        batch = self._prepare_inputs(self.data_collator(examples))
        with self.as_reference(), self.accelerator.autocast():
            if "packed" in batch:
                logps = self.answers(self.model, batch["packed"]).log_probs
            else:
                batch["labels"] = batch["input_ids"].masked_fill(batch.pop("completion_mask") == 0, -100)
                logps = self.model(**batch, fused_lm_head=True).log_probs
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


class ORPO(_WholeBatch, ORPOTrainer):
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


class Watch(TrainerCallback):
    """Reports progress, saves a checkpoint now and then, and stops at a loss that is not a number."""

    def __init__(self, progress: Progress, checkpoint_minutes: float, seconds_before: float = 0.0) -> None:
        self.progress, self.every = progress, 60 * checkpoint_minutes
        self.started = time.monotonic() - seconds_before
        self.saved = time.monotonic()

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        values = {k: v for k, v in (logs or {}).items() if k in ("loss", "grad_norm")}
        for name, value in values.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"{name} is {value} at step {state.global_step}: lower the learning rate or check the data"
                )

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.progress(state.global_step, state.max_steps)
        control.should_save = time.monotonic() - self.saved >= self.every and state.global_step < state.max_steps

    def on_save(self, args, state, control, **kwargs) -> None:
        """Marks the checkpoint as whole: a process may die while Trainer writes one."""
        self.saved = time.monotonic()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_json(folder / _WHOLE, {"step": state.global_step, "seconds": round(self.saved - self.started, 3)})


class Mirror(TrainerCallback):
    """Shows W&B every entry of the log, over the samples seen. `rows` are trained on, of a mean of `tokens` tokens."""

    def __init__(self, rows: int, batch: int, tokens: float) -> None:
        self.rows, self.batch, self.tokens = rows, batch, tokens

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.seen, self.clock = self._seen(state.global_step), time.monotonic()

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" not in (logs or {}):
            return
        seen, clock = self._seen(state.global_step), time.monotonic()
        rate = (seen - self.seen) / max(clock - self.clock, 1e-9)
        speed = {"samples_per_second": rate, "tokens_per_second": rate * self.tokens, "memory_mb": memory_mb()}
        tracking.log({k: v for k, v in logs.items() if isinstance(v, int | float)} | speed, seen)
        self.seen, self.clock = seen, clock

    def _seen(self, step: int) -> int:
        """Samples seen after a step; the last batch of an epoch may be smaller."""
        epochs, steps = divmod(step, math.ceil(self.rows / self.batch))
        return epochs * self.rows + steps * self.batch


_WHOLE = "whole.json"


def checkpoint(folder: Path) -> tuple[Path, dict] | None:
    """The latest whole checkpoint of a stage, with its step and the seconds it took to get there."""
    marks = [(json.loads(file.read_text()), file.parent) for file in folder.glob(f"checkpoint-*/{_WHOLE}")]
    if not marks:
        return None
    mark, place = max(marks, key=lambda found: found[0]["step"])
    return place, mark


def train(
    base: Base,
    wrapped: PeftModel,
    drawn: Subset,
    spec: dict,
    recipe: Recipe,
    folder: Path,
    progress: Progress,
    reference: Path | None = None,
) -> dict:
    """Train the adapter on the drawn examples as `spec` says.

    `folder` is for checkpoints, from the last of which it goes on; `reference` remembers what DPO's reference says (one folder a
    policy). Returns metrics: first and last loss, steps, samples and tokens seen, and the log (an entry every 5 % of the steps).
    """
    method = spec.get("method", {"name": "sft"})
    trainer_class, config_class = METHODS[method["name"]]
    rows = sft_examples(drawn.examples) if method["name"] == "sft" else drawn.examples
    tokens = sum(_tokens(row, recipe.packing) for row in rows)
    steps = math.ceil(len(rows) / spec["batch"]) * spec["epochs"]
    often = max(1, steps // 200)  # for W&B; the record keeps fewer
    args = config_class(**_arguments(spec, recipe, folder, often), **_method_arguments(method, spec["max_length"]))
    place, mark = checkpoint(folder) or (None, {})
    trainer = trainer_class(
        model=wrapped,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=base.tokenizer,
        callbacks=[
            Watch(progress, recipe.checkpoint_minutes, mark.get("seconds", 0.0)),
            Mirror(len(rows), spec["batch"], tokens / len(rows)),
        ],
        data_collator=_collator(base, method, recipe),
        **_own_arguments(method, drawn, reference),
    )
    trainer.remove_callback(PrinterCallback)
    with _attention(base, recipe.attention):
        trainer.train(resume_from_checkpoint=str(place) if place else None)
    log = thin([e for e in trainer.state.log_history if "loss" in e], max(1, steps // 20 // often) * often)
    metrics = {
        "first_loss": log[0]["loss"],
        "last_loss": log[-1]["loss"],
        "steps": trainer.state.global_step,
        "samples_seen": len(rows) * spec["epochs"],
        "tokens_seen": tokens * spec["epochs"],
    }
    if method["name"] == "dpo":
        metrics["reference_pairs_computed"] = trainer.computed
    if place:
        metrics["resumed"] = mark
    return metrics | {"micro_batch": recipe.micro_batch, "log": log}


def thin(log: list[dict], every: int) -> list[dict]:
    """A log with an entry after step 1 and then every so many steps, as the trainer would have written it at once.

    Losses and rewards are means over the steps since the entry before; what tells a state is as it was last.
    """
    states = ("step", "epoch", "learning_rate", "grad_norm", "num_tokens")
    kept, window, before = [], [], 0
    for entry in log:
        window.append((entry["step"] - before, entry))
        before = entry["step"]
        if before == 1 or before % every == 0:
            steps = sum(n for n, _ in window)
            kept.append(
                {k: v if k in states else sum(n * e.get(k, v) for n, e in window) / steps for k, v in entry.items()}
            )
            window = []
    return kept


@contextlib.contextmanager
def _attention(base: Base, kind: str) -> Iterator[None]:
    """The base with another implementation of attention, while it trains."""
    before = base.model.config._attn_implementation
    base.model.set_attn_implementation(kind)
    try:
        yield
    finally:
        base.model.set_attn_implementation(before)


def _collator(base: Base, method: dict, recipe: Recipe):
    """The packer, or for padded batches TRL's own collator (None: the trainer has its own)."""
    if recipe.packing == "prefix_shared":
        hidden = None if recipe.attention == "flex_attention" else base.model.config.get_text_config().hidden_size
        return Packer(hidden, method.get("nll") == "prompt_and_chosen")
    return DPODataCollatorWithPadding(base.tokenizer.pad_token_id) if method["name"] == "orpo" else None


def _own_arguments(method: dict, drawn: Subset, reference: Path | None) -> dict:
    """What our trainers take beyond TRL's."""
    if method["name"] == "dpo":
        return {"reference": method["reference"], "cache": reference, "ahead": drawn.ahead}
    return {"nll": method["nll"]} if method["name"] == "orpo" else {}


def _tokens(row: dict, packing: str) -> int:
    """Tokens that one row puts through the model, padding apart."""
    prompt = len(row.get("prompt_ids", ())) * (1 if packing == "prefix_shared" else 2)
    return prompt + sum(len(row[k]) for k in ("input_ids", "chosen_ids", "rejected_ids") if k in row)


def _arguments(spec: dict, recipe: Recipe, folder: Path, logging_steps: int) -> dict:
    """Arguments that all trainers share."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": recipe.micro_batch,
        "gradient_accumulation_steps": spec["batch"] // recipe.micro_batch,
        "num_train_epochs": spec["epochs"],
        "learning_rate": spec["lr"],
        "lr_scheduler_type": spec["schedule"],
        "warmup_steps": spec["lr_warmup_ratio"],
        "weight_decay": spec["weight_decay"],
        "max_grad_norm": spec["max_grad_norm"],
        "optim": "adamw_torch",
        "seed": spec["seed"],
        "bf16": spec["model"]["dtype"] == "bfloat16" and device() == "cuda",
        "use_cpu": device() == "cpu",
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "logging_steps": logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",  # Watch asks for checkpoints by the clock
        "save_total_limit": 2,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
    }


def _method_arguments(method: dict, max_length: int) -> dict:
    """Arguments of one trainer. None of them cuts a sequence: data.subset has left out what does not fit."""
    if method["name"] == "sft":
        return {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
    if method["name"] == "dpo":
        return {"max_length": None, "beta": method["beta"]}
    return {"max_length": max_length, "beta": method["beta"]}
