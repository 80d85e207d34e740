"""Attach adapters to the base, save them, and check that the saved adapter is the trained one."""

import contextlib
import copy
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers.modeling_layers import GradientCheckpointingLayer

from d2lora.adapters import loftq, saving
from d2lora.adapters.flat import Flat
from d2lora.adapters.layers import config_of
from d2lora.adapters.lean import lean
from d2lora.adapters.saving import Weights
from d2lora.adapters.start import Start, fresh, taken_up
from d2lora.base import Base, Tested
from d2lora.errors import UserError
from d2lora.keys import digest
from d2lora.layouts import proof
from d2lora.settings.inits import BaseInit, PlainInit


@contextlib.contextmanager
def adapter(base: Base, start: Start[BaseInit], record: Path | None) -> Iterator[PeftModel]:
    """Attach a trainable adapter inside the `with` block: the one in a record's folder, or a fresh one.

    On leaving, the base is restored and checked, even if the start fails.
    """
    torch.manual_seed(start.seed)
    base.tested = None  # a training needs its memory
    try:
        wrapped = taken_up(base.model, start.init, record) if record else fresh(base.model, start)
        # With a name, PEFT asks the Hub at every checkpoint.
        config_of(wrapped).base_model_name_or_path = ""
        with _on(wrapped, quantize=record is not None and start.init.quantizes):
            yield wrapped
    finally:
        base.restore()


def _on(wrapped: PeftModel, quantize: bool) -> contextlib.AbstractContextManager[None]:
    """Quantize the base under the adapter inside the `with` block, if its initialization does; else change nothing."""
    return loftq.quantized(wrapped) if quantize else contextlib.nullcontext()


@contextlib.contextmanager
def in_training(wrapped: PeftModel) -> Iterator[Flat | None]:
    """Make `wrapped.train()` set the adapter alone to training: the base stays in evaluation mode, so that it draws no
    random numbers.

    In some families, routers sample and states are stored differently in training mode. With gradient checkpointing,
    the layers that do it must be in training mode.
    """
    parts = [m for name, m in wrapped.named_modules() if "lora_" in name or isinstance(m, BaseTunerLayer)]
    own = {id(m) for m in parts} | {id(wrapped)}
    recomputing = [m for m in wrapped.modules() if isinstance(m, GradientCheckpointingLayer)]

    def train(mode: bool = True) -> PeftModel:
        if wrapped.training is not mode:
            for module in [wrapped, *parts]:
                module.training = mode
        for module in recomputing:  # each time: Trainer turns it on after its first call
            module.training = mode and module.gradient_checkpointing
        return wrapped

    wrapped.eval()
    assert all(not m.training for m in wrapped.modules() if id(m) not in own), "the base is in evaluation"
    wrapped.train = train  # type: ignore[method-assign]
    try:
        with lean(wrapped) as flat:
            yield flat
    finally:
        del wrapped.train


@contextlib.contextmanager
def trained(base: Base, folder: Path | None, quantize: bool = False) -> Iterator[tuple[torch.nn.Module, bool]]:
    """Yield the base with the adapter in `folder` for inference, and whether it changes the logits of a test input
    (`check_applied`).

    Without a folder, yield the base alone; with `quantize`, the adapter is for the quantized base. A merged copy serves all
    evaluations of an adapter that follow each other.
    """
    if folder is None:
        yield base.model, False
        return
    source = (folder, (folder / SAFETENSORS_WEIGHTS_NAME).stat().st_mtime_ns)
    if base.tested and base.tested.source == source:
        yield base.tested.model, base.tested.changes
        return
    base.tested = None
    try:
        wrapped = PeftModel.from_pretrained(base.model, folder).eval()
        with _on(wrapped, quantize):
            changes = check_applied(base, wrapped)
            if merged := _merged(base, wrapped):
                base.tested = Tested(source, merged, changes)
            yield merged or wrapped, changes
    finally:
        base.restore()


def _merged(base: Base, wrapped: PeftModel) -> torch.nn.Module | None:
    """Return a merged copy, which is a third faster; None if it is not the same model up to rounding.

    bfloat16 would round small updates away, and layers that share a weight would all get each other's adapters.
    """
    if base.model.dtype != torch.float32:
        return None
    ids = _probe(base)
    with torch.inference_mode():
        expected = wrapped(input_ids=ids).logits
    merged = copy.deepcopy(wrapped).merge_and_unload(safe_merge=True)
    with torch.inference_mode():
        difference = proof.logits_difference(merged(input_ids=ids).logits, expected)
    return merged if difference <= proof.EXACT else None


def _probe(base: Base) -> torch.Tensor:
    """Return token ids (1, 40) of a test input."""
    ids = base.tokenizer("The adapter must change these logits, and merged or read again it must not.")["input_ids"]
    return torch.tensor([(ids * 40)[:40]], device=base.model.device)


def check_applied(base: Base, wrapped: PeftModel) -> bool:
    """Tell whether the adapter changes the logits of a test input. RuntimeError if non-zero weights do not even after
    enlarging them.

    After few steps with a small learning rate it may not: its change of a bfloat16 activation is then less than half of
    the last bit.
    """
    if not any(p.any() for name, p in wrapped.named_parameters() if "lora_B" in name):
        return False
    ids = _probe(base)
    with torch.inference_mode():
        with wrapped.disable_adapter():
            without = wrapped(input_ids=ids).logits
        for factor in (1, 10**3, 10**6, 10**9):
            with rescale_adapter_scale(wrapped, factor):
                if not torch.equal(wrapped(input_ids=ids).logits, without):
                    return factor == 1
    raise RuntimeError("the adapter has non-zero weights and is not applied")


@dataclass(frozen=True)
class Saved:
    """A saved adapter: the weights of each layer (A, B of a plain adapter) and the logits of a test input."""

    weights: Weights
    logits: torch.Tensor
    noise: float  # of the logits, with the probe in a padded batch


def save(base: Base, wrapped: PeftModel, record: Path, quantize: bool = False) -> Saved:
    """Save the adapter in PEFT's format: `PeftModel.from_pretrained(base, record / "adapter")` loads it, as `check_saved` tries.

    Its config names the base, so that `AutoPeftModelForCausalLM` finds it; with `quantize`, files beside it say that it belongs on the
    quantized one.
    """
    config = config_of(wrapped)
    config.base_model_name_or_path, config.revision = base.source, base.revision
    saving.save(wrapped, record)
    if quantize:
        loftq.write_quantization(record / "adapter")
    ids = _probe(base)
    padded = torch.cat([ids, ids[:, :8]], 1)
    with torch.inference_mode():
        wrapped.eval()
        logits = wrapped(input_ids=ids).logits
        again = wrapped(input_ids=padded).logits[:, : ids.shape[1]]
    noise = proof.logits_difference(again, logits) if base.model.dtype != torch.float32 else 0.0
    return Saved(saving.plain_weights(wrapped), logits, noise)


def check_round_trip(base: Base, start: Start[BaseInit], model: dict[str, Any], proofs: Path) -> None:
    """Raise UserError if an adapter on these layers is not loaded as it was saved; tested before training, once for
    each model.

    `model` is the base's identity, under which the outcome is cached in the folder `proofs`.
    """
    lora, init = start.lora, start.init if start.init.variant else PlainInit()
    name = f"adapter read again, {digest(lora.model_dump(), 8)}" + (f", {init.name}" if init.variant else "")
    memory = proof.Memory(proofs, model)
    if memory.get(name, 1, 0):
        return
    with tempfile.TemporaryDirectory() as folder:
        with adapter(base, Start(lora, init, start.seed), None) as wrapped:
            saved = save(base, wrapped, Path(folder))
        try:
            check_saved(base, saved, Path(folder))
        except RuntimeError as error:
            raise UserError(
                f"recipe.lora.target_modules={lora.target_modules}: {error}: name layers that PEFT reads again, for example [q_proj,v_proj]"
            ) from error
    memory.put(name, 1, proof.Proof(name, 0, 0.0, proof.EXACT, True))


def check_saved(base: Base, saved: Saved, record: Path, quantize: bool = False) -> None:
    """Raise RuntimeError unless the adapter loaded from the record is the trained one: its weights, and the logits of a
    test input.

    With `quantize`, it was trained on the quantized base.
    """
    try:
        wrapped = PeftModel.from_pretrained(base.model, record / "adapter").eval()
        _check_weights(saved.weights, saving.plain_weights(wrapped))
        with _on(wrapped, quantize), torch.inference_mode():
            difference = proof.logits_difference(wrapped(input_ids=_probe(base)).logits, saved.logits)
        if not difference <= max(proof.EXACT, 4 * saved.noise, 0.05 if base.model.dtype != torch.float32 else 0):
            raise RuntimeError(
                f"the saved adapter is not the trained one: a log-probability of a probe is off by {difference:.2g}"
            )
    finally:
        base.restore()


def _check_weights(saved: Weights, read: Weights) -> None:
    lost = [name for name, weights in saved.items() if not _equal(read.get(name, ()), weights)]
    if lost or read.keys() != saved.keys():
        raise RuntimeError(
            f"the saved adapter is not the trained one: {len(lost)} of {len(saved)} layers differ, for example "
            f"{lost[0].removeprefix('base_model.model.') if lost else '?'}"
        )


def _equal(read: tuple[torch.Tensor, ...], saved: tuple[torch.Tensor, ...]) -> bool:
    return len(read) == len(saved) and all(map(torch.equal, read, saved))
