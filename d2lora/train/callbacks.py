"""Define callbacks for a training: progress, checkpoints, W&B's curves."""

import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from d2lora.base import memory_mb
from d2lora.outputs import sync, write_json
from d2lora.progress import Progress, log

_WHOLE = "whole.json"


class Checkpoint(NamedTuple):
    """A complete checkpoint on disk, with its step and the seconds that were trained up to it (in its file `mark`)."""

    folder: Path
    mark: dict[str, float]


def checkpoint(folder: Path) -> Checkpoint | None:
    """Return the latest complete checkpoint of a stage; None if there is none."""
    marks = [Checkpoint(file.parent, json.loads(file.read_text())) for file in folder.glob(f"checkpoint-*/{_WHOLE}")]
    return max(marks, key=lambda complete: complete.mark["step"], default=None)


class Watch(TrainerCallback):
    """Reports progress, and saves a checkpoint at intervals, which is marked complete only when it is on disk."""

    def __init__(self, progress: Progress, checkpoint_minutes: float, seconds_before: float = 0.0) -> None:
        self.progress, self.every = progress, 60 * checkpoint_minutes
        self.started = time.monotonic() - seconds_before
        self.saved = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.progress(state.global_step, state.max_steps)
        control.should_save = time.monotonic() - self.saved >= self.every and state.global_step < state.max_steps

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Mark the checkpoint as complete: the process may die while Trainer writes it, or the machine before it is on
        disk.
        """
        self.saved = time.monotonic()
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        for file in folder.iterdir():
            sync(file)
        write_json(folder / _WHOLE, {"step": state.global_step, "seconds": round(self.saved - self.started, 3)})


class Curves(TrainerCallback):
    """Logs every entry of Trainer's log (for W&B), over the samples seen. The training has `rows` rows of `tokens` tokens
    on average.
    """

    def __init__(self, rows: int, batch: int, tokens: float) -> None:
        self.rows, self.batch, self.tokens = rows, batch, tokens

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.samples, self.clock = self._samples(state.global_step), time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        samples, clock = self._samples(state.global_step), time.monotonic()
        rate = (samples - self.samples) / max(clock - self.clock, 1e-9)
        speed = {"samples_per_second": rate, "tokens_per_second": rate * self.tokens, "memory_mb": memory_mb()}
        log({k: v for k, v in logs.items() if isinstance(v, int | float)} | speed, samples)
        self.samples, self.clock = samples, clock

    def _samples(self, step: int) -> int:
        """Count the samples seen after a step; the last batch of an epoch may be smaller."""
        epochs, steps = divmod(step, math.ceil(self.rows / self.batch))
        return epochs * self.rows + steps * self.batch
