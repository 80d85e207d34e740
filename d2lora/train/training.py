"""One train() for both phases and all methods: what the trainers (trainers.py) are told, and what happens around them:
progress, checkpoints and going on from them, W&B's curves, the record's log."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PrinterCallback, TrainerCallback

from d2lora.adapters import attach
from d2lora.base import Base, device, memory_mb
from d2lora.data import Subset, sequences, sft_examples
from d2lora.layouts import families, proof
from d2lora.layouts.packing import Layout
from d2lora.mirror import runs
from d2lora.outputs import sync, write_json
from d2lora.settings import Recipe
from d2lora.train.trainers import METHODS, Packer

Progress = Callable[[int, int], None]


class Watch(TrainerCallback):
    """Reports progress, saves a checkpoint now and then (whole on the disk before it is marked so)."""

    def __init__(self, progress: Progress, checkpoint_minutes: float, seconds_before: float = 0.0) -> None:
        self.progress, self.every = progress, 60 * checkpoint_minutes
        self.started = time.monotonic() - seconds_before
        self.saved = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.progress(state.global_step, state.max_steps)
        control.should_save = time.monotonic() - self.saved >= self.every and state.global_step < state.max_steps

    def on_save(self, args, state, control, **kwargs) -> None:
        """Marks the checkpoint as whole: a process may die while Trainer writes one, or the machine before it is on the disk."""
        self.saved = time.monotonic()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for file in folder.iterdir():
            sync(file)
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
        runs.log({k: v for k, v in logs.items() if isinstance(v, int | float)} | speed, seen)
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
    proofs: Path | None = None,
) -> dict:
    """Train the adapter on the drawn examples as `spec` says.

    `folder` is for checkpoints, from the last of which it goes on; `reference` remembers what DPO's reference says (one folder a
    policy), `proofs` which layouts were shown to be exact (next to `folder`, if not said). Returns metrics: first and last loss,
    steps, samples and tokens seen, the layout, and the log (an entry every 5 % of the steps).
    """
    method = spec.get("method", {"name": "sft"})
    trainer_class, config_class = METHODS[method["name"]]
    rows = sft_examples(drawn.examples) if method["name"] == "sft" else drawn.examples
    steps = math.ceil(len(rows) / spec["batch"]) * spec["epochs"]
    often = max(1, steps // 200)  # for W&B; the record keeps fewer
    args = config_class(**_arguments(spec, recipe, folder, often), **_method_arguments(method, spec["max_length"]))
    args._n_gpu = min(args.n_gpu, 1)  # over several GPUs Trainer would spread a batch, and make it larger
    place, mark = checkpoint(folder) or (None, {})
    layouts = proof.candidates(base.model, recipe.packing == "prefix_shared", base.attention(recipe.attention))
    collator = Packer(
        base.model.config.get_text_config().hidden_size, layouts[0], method.get("nll") == "prompt_and_chosen"
    )
    with attach.in_training(wrapped):
        trainer = trainer_class(
            model=wrapped,
            args=args,
            train_dataset=Dataset.from_list([e | {"row": i + 1} for e, i in zip(rows, drawn.rows, strict=True)]),
            processing_class=base.tokenizer,
            callbacks=[Watch(progress, recipe.checkpoint_minutes, mark.get("seconds", 0.0))],
            data_collator=collator,
            **_own_arguments(method, drawn, reference),
        )
        trainer.remove_callback(PrinterCallback)
        memory = proof.Memory(proofs or folder.parent / "proofs", spec["model"])
        shown = _prove(base, trainer, layouts, rows, recipe.micro_batch, memory)
        with families.attention(base.model, collator.layout.attention):
            if method["name"] == "dpo":
                trainer.tolerance = shown.tolerance
                trainer.add_reference()
            tokens = sum(_tokens(row, collator.layout.rows) for row in rows)
            trainer.add_callback(Mirror(len(rows), spec["batch"], tokens / len(rows)))
            wrapped.train()
            with _listed_once(wrapped):
                trainer.train(resume_from_checkpoint=str(place) if place else None)
    if not all(weight.isfinite().all() for weight in wrapped.parameters() if weight.requires_grad):
        raise FloatingPointError("the last step left weights that are no number: lower the learning rate")
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
    return metrics | {"micro_batch": recipe.micro_batch, "layout": asdict(shown), "log": log}


def _prove(
    base: Base, trainer: Any, layouts: list[Layout], rows: list[dict], at_once: int, memory: proof.Memory
) -> proof.Proof:
    """Give the trainer's batches the first of the layouts that is exact for its model on these rows; what was shown of it."""
    collator, autocast = trainer.data_collator, trainer.accelerator.autocast
    wrapped = trainer.model.eval().to(trainer.accelerator.device)
    texts = [text for row in rows for text in sequences(row)]
    how = (texts, collator.prompt_loss, at_once, memory, autocast)
    collator.layout, shown = proof.choose(base.name, wrapped, base.model, layouts, *how)
    return shown


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
def _listed_once(wrapped: PeftModel) -> Iterator[None]:
    """The model's parameters listed once: Trainer walks through all modules for them several times a step."""
    listed = list(wrapped.parameters())
    wrapped.parameters = lambda recurse=True: iter(listed)
    try:
        yield
    finally:
        del wrapped.parameters


def _own_arguments(method: dict, drawn: Subset, reference: Path | None) -> dict:
    """What our trainers take beyond TRL's."""
    if method["name"] == "dpo":
        return {"reference": method["reference"], "cache": reference, "ahead": drawn.ahead}
    return {"nll": method["nll"]} if method["name"] == "orpo" else {}


def _tokens(row: dict, layout: str) -> int:
    """Tokens that one row puts through the model, padding apart."""
    if "turns" in row:
        return sum(_tokens(sequence, layout) for sequence in row["turns"])
    prompt = len(row.get("prompt_ids", ())) * (1 if layout == "packed" else 2)
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
        return {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}, "router_aux_loss_coef": 0.0}
    # disable_dropout would set LoRA's own to 0, and leave the base's so; the base's is off already (families.py).
    kept = {"beta": method["beta"], "disable_dropout": False}
    if method["name"] == "dpo":
        return {"max_length": None, "router_aux_loss_coef": 0.0, **kept}
    return {"max_length": max_length, **kept}
