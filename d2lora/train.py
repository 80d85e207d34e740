"""One train() for both phases and all methods, on TRL's trainers.

The trainers get token ids (data.py made them) and their losses are normalised over the effective batch, so that the
micro-batch changes a result by rounding only.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.utils import DPODataCollatorWithPadding

from d2lora.config import Recipe
from d2lora.data import sft_examples
from d2lora.model import Base, device

Progress = Callable[[int, int], None]


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
    def nll_tokens(batch) -> int:
        return 0


class DPO(_WholeBatch, DPOTrainer):
    """TRL's DPO on ready ids, with the reference's log-probabilities computed once, before training."""

    def __init__(self, *, reference: str, **kwargs: Any) -> None:
        self.reference = reference
        super().__init__(**kwargs)

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset

    @staticmethod
    def pairs(batch) -> int:
        return len(batch["input_ids"]) // 2

    def _precompute_ref_logps(self, dataset, name, batch_size):
        # TRL froze a copy of the warm start as "ref"; without it, compute_ref_log_probs turns the adapter off: the base.
        if self.reference == "base":
            self.model.delete_adapter("ref")
        batches = torch.utils.data.DataLoader(dataset, batch_size, collate_fn=self.data_collator)
        place = self.accelerator.device
        self.model.eval().to(place)
        logps = [self.compute_ref_log_probs(self.model, {k: v.to(place) for k, v in b.items()}) for b in batches]
        chosen, rejected = (torch.cat(part).float().tolist() for part in zip(*logps, strict=True))
        first = next(iter(batches))
        self.check_reference({k: v.to(place) for k, v in first.items()}, chosen[: self.pairs(first)])
        if self.reference == "warm_start":
            self.model.delete_adapter("ref")
        self.model.train()
        return dataset.add_column("ref_chosen_logps", chosen).add_column("ref_rejected_logps", rejected)

    def check_reference(self, batch, chosen: list[float]) -> None:
        """RuntimeError unless the reference's log-probabilities are those of the model it is said to be."""
        off = self.model.disable_adapter() if self.reference == "base" else None
        with off or torch.no_grad(), torch.no_grad():
            labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
            logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            expected = ORPOTrainer.get_batch_logps(logits.float(), labels)[: len(chosen)]
        got = torch.tensor(chosen, device=expected.device)
        if not torch.allclose(got, expected, rtol=1e-3, atol=2e-3 if logits.dtype == torch.float32 else 0.5):
            raise RuntimeError(
                f"DPO's reference is not the {self.reference} model: {got[:3].tolist()} against {expected[:3].tolist()}"
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs)
        return loss * self.share(self.pairs(inputs), self.batch_pairs)


class ORPO(_WholeBatch, ORPOTrainer):
    """TRL's ORPO on ready ids, its NLL averaged over the tokens of the effective batch."""

    def __init__(self, *, nll: str, **kwargs: Any) -> None:
        self.nll = nll
        super().__init__(**kwargs)

    def tokenize_row(self, feature, model=None) -> dict:
        row, prompt = {}, feature["prompt_ids"]
        for kind in ("chosen", "rejected"):
            answer = feature[f"{kind}_ids"]
            row[f"{kind}_input_ids"] = prompt + answer
            row[f"{kind}_attention_mask"] = [1] * len(row[f"{kind}_input_ids"])
            row[f"{kind}_labels"] = [-100] * len(prompt) + answer
        return row

    @staticmethod
    def pairs(batch) -> int:
        return len(batch["chosen_input_ids"])

    def nll_tokens(self, batch) -> int:
        """Predicted tokens that the NLL averages over: the first token of a sequence is predicted by nothing."""
        if self.nll == "completion":
            return int((batch["chosen_labels"][:, 1:] != -100).sum())
        return int(batch["chosen_attention_mask"][:, 1:].sum())

    def concatenated_forward(self, model, batch):
        chosen, rejected, chosen_logits, rejected_logits, nll, *rest = super().concatenated_forward(model, batch)
        if self.nll == "completion":
            labels = torch.nn.functional.pad(
                batch["chosen_labels"], (0, chosen_logits.shape[1] + 1 - batch["chosen_labels"].shape[1]), value=-100
            )
            nll = torch.nn.functional.cross_entropy(
                chosen_logits.flatten(0, 1), labels[:, 1:].flatten().to(chosen_logits.device)
            )
        nll = nll * self.share(self.nll_tokens(batch), self.batch_tokens)
        return chosen, rejected, chosen_logits, rejected_logits, nll, *rest

    def odds_ratio_loss(self, chosen_logps, rejected_logps):
        losses, *rest = super().odds_ratio_loss(chosen_logps, rejected_logps)
        return losses * self.share(len(losses), self.batch_pairs), *rest


METHODS: dict[str, tuple[type, type]] = {
    "sft": (SFTTrainer, SFTConfig),
    "dpo": (DPO, DPOConfig),
    "orpo": (ORPO, ORPOConfig),
}


class Watch(TrainerCallback):
    """Keeps the log, reports progress, and stops at a loss that is not a number."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.log = progress, []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        entry = {k: float(v) for k, v in (logs or {}).items() if isinstance(v, int | float)}
        if "loss" not in entry:
            return
        bad = next((k for k in ("loss", "grad_norm") if not math.isfinite(entry.get(k, 0.0))), None)
        if bad:
            raise FloatingPointError(
                f"{bad} is {entry[bad]} at step {state.global_step}: lower the learning rate or check the data"
            )
        self.log.append({"step": state.global_step, **entry})

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.progress(state.global_step, state.max_steps)


def train(
    base: Base, wrapped: PeftModel, examples: list[dict], spec: dict, recipe: Recipe, folder: Path, progress: Progress
) -> dict:
    """Train the adapter on the examples as `spec` says; `folder` is for the trainer's files.

    Returns metrics: first and last loss, steps, samples and tokens seen, and the log (one entry every 5 % of the steps).
    """
    method = spec.get("method", {"name": "sft"})
    trainer_class, config_class = METHODS[method["name"]]
    rows = sft_examples(examples) if method["name"] == "sft" else examples
    steps = math.ceil(len(rows) / spec["batch"]) * spec["epochs"]
    args = config_class(
        **_arguments(spec, recipe, folder, max(1, steps // 20)), **_method_arguments(method, spec["max_length"])
    )
    watch = Watch(progress)
    own = {key: method[key] for key in {"dpo": ["reference"], "orpo": ["nll"]}.get(method["name"], [])}
    if method["name"] == "orpo":
        own["data_collator"] = DPODataCollatorWithPadding(pad_token_id=base.tokenizer.pad_token_id)
    trainer = trainer_class(
        model=wrapped,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=base.tokenizer,
        callbacks=[watch],
        **own,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    if "ref" in wrapped.peft_config:
        wrapped.delete_adapter("ref")
    tokens = sum(len(v) for row in rows for k, v in row.items() if k in ("input_ids", "chosen_ids", "rejected_ids"))
    tokens += sum(2 * len(row["prompt_ids"]) for row in rows if "prompt_ids" in row)
    return {
        "first_loss": watch.log[0]["loss"],
        "last_loss": watch.log[-1]["loss"],
        "steps": trainer.state.global_step,
        "samples_seen": len(rows) * spec["epochs"],
        "tokens_seen": tokens * spec["epochs"],
        "log": watch.log,
    }


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
        "save_strategy": "no",
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
        return {"max_length": None, "beta": method["beta"], "precompute_ref_log_probs": True}
    return {"max_length": max_length, "beta": method["beta"]}
