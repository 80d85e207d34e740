"""Train for both phases and all methods: TRL's arguments, checkpoints to resume from, the record's metrics."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PrinterCallback

from d2lora.adapters import attach, lean
from d2lora.adapters.flat import Flat
from d2lora.base import Base, device
from d2lora.data import Subset, longest, sequences
from d2lora.errors import UserError
from d2lora.layouts import choice, families, log_probs, proof
from d2lora.layouts.check import Check
from d2lora.layouts.packing import Layout
from d2lora.progress import Progress
from d2lora.settings.methods import Method
from d2lora.settings.recipe import Machine
from d2lora.train import speed
from d2lora.train.callbacks import Checkpoint, Curves, Watch, checkpoint
from d2lora.train.common import Example, Objective, PackedTrainer, Packer
from d2lora.train.methods import objective
from d2lora.train.passes import Passes, tokens_of

# The stages import this module when they train; it names their type and no more.
if TYPE_CHECKING:
    from d2lora.stages.training import TrainingSpec

_LOGGED = 200  # entries of the log that W&B gets, about ...
_RECORDED = 20  # ... and that are in the record


def train(
    base: Base,
    wrapped: PeftModel,
    drawn: Subset,
    spec: "TrainingSpec",
    machine: Machine,
    folder: Path,
    progress: Progress,
    reference: Path | None = None,
    proofs: Path | None = None,
    epochs: float | None = None,
    passes: Passes | None = None,
) -> dict[str, Any]:
    """Train the adapter on the drawn examples. `spec` has the settings in the stage's key, `machine` the others.

    `folder` is for checkpoints; training resumes from the latest. `reference` caches the log-probabilities of DPO's
    reference (one folder for each policy), `proofs` the layouts that were tested (next to `folder` by default),
    `passes` says how much goes through the model at once (by default as the recipe has it). Returns metrics: first and
    last loss, steps, samples and tokens seen, the layout, and the log (an entry every 5 % of the steps).
    FloatingPointError for a loss or weights that are not finite.
    """
    method = objective(spec.method)
    rows = method.examples(drawn)
    texts = [text for row in rows for text in sequences(row)]
    epochs = spec.epochs if epochs is None else epochs
    log_every, record_every = _intervals(spec.steps(len(rows), epochs))
    start = checkpoint(folder)
    passes = passes or Passes.of(machine.micro_batch, device())
    layouts = choice.candidates(base.model, machine.packing == "prefix_shared", machine.attention, texts)
    memory = proof.Memory(proofs or folder.parent / "proofs", spec.model)
    with attach.in_training(wrapped) as flat:
        trainer = method.trainer(
            model=wrapped,
            args=_trl_config(method, spec, machine, folder, log_every, epochs),
            train_dataset=Dataset.from_list([e | {"row": i + 1} for e, i in zip(rows, drawn.rows, strict=True)]),
            processing_class=base.tokenizer,
            callbacks=[_watch(progress, machine, start)],
            data_collator=_packer(base, layouts[0], passes, method.prompt_loss),
            **method.trainer_arguments(drawn, reference),
        )
        trainer.flat = flat
        trainer.remove_callback(PrinterCallback)
        layout_proof = _set_layout(base, trainer, layouts, texts, spec.batch, memory)
        tokens = sum(tokens_of(row, trainer.data_collator.layout.rows == "packed") for row in rows)
        with _as_in_training(base, trainer, machine, texts, layout_proof.tolerance):
            trainer.before_training(layout_proof.tolerance)
            trainer.add_callback(Curves(len(rows), spec.batch, tokens / len(rows)))
            _run(trainer, wrapped, start)
    counts = {"samples_seen": round(len(rows) * epochs), "tokens_seen": round(tokens * epochs)}
    return _metrics(trainer, start, counts, layout_proof, record_every)


def _intervals(steps: int) -> tuple[int, int]:
    """Return after how many steps each an entry is logged, and one is in the record: a multiple of the former."""
    logged = max(1, steps // _LOGGED)
    return logged, max(1, steps // _RECORDED // logged) * logged


def _watch(progress: Progress, machine: Machine, start: Checkpoint | None) -> Watch:
    """Return the callback that reports progress and saves checkpoints; its clock goes on from the checkpoint's."""
    return Watch(progress, machine.checkpoint_minutes, start.mark.get("seconds", 0.0) if start else 0.0)


def _packer(base: Base, layout: Layout, passes: Passes, prompt_loss: bool) -> Packer:
    """Return the collator, with a layout that has yet to be tested."""
    config = base.model.config
    return Packer(config.get_text_config().hidden_size, layout, passes, prompt_loss, config._attn_implementation)


def _trl_config(
    method: Objective[Any], spec: "TrainingSpec", machine: Machine, folder: Path, logging_steps: int, epochs: float
) -> Any:
    """Return the arguments in TRL's class of the method's, for one device."""
    shared = arguments(spec, machine, folder, logging_steps, epochs)
    config = method.config(**shared, **method.arguments(spec.max_length))
    config._n_gpu = min(config.n_gpu, 1)  # over several GPUs Trainer would spread a batch, and make it larger
    return config


def arguments(
    spec: "TrainingSpec", machine: Machine, folder: Path, logging_steps: int, epochs: float
) -> dict[str, Any]:
    """Return the TrainingArguments that all methods share."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": spec.batch,  # PackedTrainer divides it
        "num_train_epochs": epochs,
        "learning_rate": spec.lr,
        "lr_scheduler_type": spec.schedule,
        "warmup_steps": spec.lr_warmup_ratio,
        "weight_decay": spec.weight_decay,
        "max_grad_norm": spec.max_grad_norm,
        "optim": "adamw_torch_fused",  # one operation a step, where others read a counter for each weight
        "seed": spec.seed,
        "bf16": spec.model["dtype"] == "bfloat16" and device() == "cuda",
        "use_cpu": device() == "cpu",
        "gradient_checkpointing": machine.gradient_checkpointing,
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


def _set_layout(
    base: Base,
    trainer: PackedTrainer,
    layouts: list[Layout],
    texts: list[Example],
    batch: int,
    memory: proof.Memory,
) -> proof.Proof:
    """Set the trainer's layout to the first that is exact for its model on these texts, and return its proof."""
    collator = trainer.data_collator
    wrapped = trainer.model.eval().to(trainer.accelerator.device)
    at_once = collator.passes.texts_at_once(batch, max(map(longest, texts)))
    examples = choice.tested(texts, at_once)
    check = Check(wrapped, base.model, examples, collator.prompt_loss, trainer.accelerator.autocast)
    collator.layout, chosen = choice.choose(base.name, check, layouts, memory)
    return chosen


@contextlib.contextmanager
def _as_in_training(
    base: Base, trainer: PackedTrainer, machine: Machine, texts: list[Example], tolerance: float
) -> Iterator[None]:
    """Run the model inside as it is trained: with our layers where they are exact, the layout's attention, the recipe's
    kernels.
    """
    attention = trainer.data_collator.layout.attention
    with (
        _lean_if_exact(base, trainer, texts, tolerance),
        families.attention(base.model, attention),
        _faster(base, trainer, machine, texts, tolerance),
    ):
        yield


@contextlib.contextmanager
def _lean_if_exact(base: Base, trainer: PackedTrainer, texts: list[Example], tolerance: float) -> Iterator[None]:
    """Train with the layers of `adapters.lean` inside if they give what PEFT's and transformers' own give on a text.

    Otherwise say so and train with the latter.
    """
    middle = sorted(texts, key=longest)[len(texts) // 2 :][:1]
    with torch.no_grad(), trainer.accelerator.autocast():
        ours = log_probs.plain(trainer.model, middle)
        with lean.suspended():
            difference = log_probs.difference(ours, log_probs.plain(trainer.model, middle))
    if difference <= tolerance:
        yield
        return
    print(
        f"{base.name}: trained by PEFT's own layers (in ours a token's log-probability is off by {difference:.2g})",
        file=sys.stderr,
    )
    with lean.suspended():
        yield


@contextlib.contextmanager
def _faster(
    base: Base, trainer: PackedTrainer, machine: Machine, texts: list[Example], tolerance: float
) -> Iterator[None]:
    """Run the layers compiled or with other kernels inside, if the recipe says so and log-probabilities stay the same.

    UserError if they do not.
    """
    settings = speed.names(machine)
    if not settings:
        yield
        return
    before = _log_probs(trainer, texts)
    with speed.faster(base.model, machine):
        difference = log_probs.difference(_log_probs(trainer, texts), before)
        if not difference <= tolerance:
            raise UserError(
                f"{settings}: a token's log-probability is off by {difference:.2g} on {base.name}: leave it out"
            )
        yield


def _log_probs(trainer: PackedTrainer, texts: list[Example]) -> log_probs.Tokens:
    """Return the log-probabilities of the longest and the shortest text, laid out as in training."""
    collator, ordered = trainer.data_collator, sorted(texts, key=longest)
    with trainer.accelerator.autocast():
        return log_probs.in_layout(
            trainer.model, [ordered[-1], ordered[0]], collator.layout, collator.hidden, collator.prompt_loss
        )


def _run(trainer: PackedTrainer, wrapped: PeftModel, start: Checkpoint | None) -> None:
    """Do the steps, from a checkpoint if there is one."""
    wrapped.train()
    with _without_walks(wrapped, trainer.flat):
        trainer.train(resume_from_checkpoint=str(start.folder) if start else None)
    if not all(weight.isfinite().all() for weight in wrapped.parameters() if weight.requires_grad):
        raise FloatingPointError("the last step left weights that are no number: lower the learning rate")


@contextlib.contextmanager
def _without_walks(wrapped: PeftModel, flat: Flat | None) -> Iterator[None]:
    """List the model's parameters once: Trainer walks through all modules for them several times a step."""
    listed = list(wrapped.parameters())
    wrapped.parameters = lambda recurse=True: iter(listed)  # type: ignore[method-assign]
    if flat is not None:
        wrapped.zero_grad = lambda set_to_none=True: flat.forget()  # type: ignore[method-assign]
    try:
        yield
    finally:
        del wrapped.parameters
        vars(wrapped).pop("zero_grad", None)


def _metrics(
    trainer: PackedTrainer,
    start: Checkpoint | None,
    counts: dict[str, int],
    layout_proof: proof.Proof,
    record_every: int,
) -> dict[str, Any]:
    """Return the record's metrics: losses, what was counted, how the training ran, and its thinned log."""
    collator = trainer.data_collator
    log = thin([entry for entry in trainer.state.log_history if "loss" in entry], record_every)
    losses = {"first_loss": log[0]["loss"], "last_loss": log[-1]["loss"], "steps": trainer.state.global_step}
    resumed = {"resumed": start.mark} if start else {}
    layout = {"attention": collator.layout.attention, "layout": asdict(layout_proof)}
    return losses | counts | trainer.counted() | resumed | collator.passes.metrics | layout | {"log": log}


def thin(log: list[dict[str, Any]], every: int) -> list[dict[str, Any]]:
    """Return a log with an entry after step 1 and then every `every` steps, as if the trainer had logged at these steps
    only.

    Losses and rewards are averaged over the steps since the previous entry; other values are those of the last step.
    """
    states = ("step", "epoch", "learning_rate", "grad_norm", "num_tokens")
    thinned: list[dict[str, Any]] = []
    window: list[tuple[int, dict[str, Any]]] = []
    before = 0
    for entry in log:
        window.append((entry["step"] - before, entry))
        before = entry["step"]
        if before == 1 or before % every == 0:
            steps = sum(n for n, _ in window)
            thinned.append(
                {k: v if k in states else sum(n * e.get(k, v) for n, e in window) / steps for k, v in entry.items()}
            )
            window = []
    return thinned


def tokens(method: Method, drawn: Subset) -> int:
    """Return how many tokens one epoch puts through the model, with a pair's prompt once."""
    return sum(tokens_of(row) for row in objective(method).examples(drawn))
