"""Tell from a model's configuration alone, without its weights, what an adapter reaches of it and how large it is."""

import contextlib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from d2lora import data
from d2lora.adapters import coverage
from d2lora.adapters.start import Start, fresh
from d2lora.layouts import families
from d2lora.outputs import write_json
from d2lora.records import Coverage
from d2lora.settings.inits import PlainInit
from d2lora.settings.recipe import Lora
from d2lora.settings.tasks import Model


def write_facts(model: dict[str, Any], target_modules: str | list[str], coverage_file: str, shape_file: str) -> None:
    """Write what an adapter reaches of a model (its config as a mapping), and its size, into two JSON files.

    A plan has it done in a process of its own, as it imports no torch itself.
    """
    empty = _without_weights(Model.model_validate(model))
    with contextlib.suppress(
        AttributeError
    ):  # a family without attention, say: a plan takes the size from the name then
        write_json(Path(shape_file), _shape(empty))
    write_json(Path(coverage_file), _coverage(empty, target_modules).as_read())


def _without_weights(model: Model) -> PreTrainedModel:
    """Return a model on the device "meta"."""
    path = data.model_files(model)
    remote = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    if model.gguf_package:
        assert path is not None, "a GGUF package has files"
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    else:
        config = AutoConfig.from_pretrained(str(path or model.path), **remote)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(families.settled(config), trust_remote_code=model.trust_remote_code)


def _coverage(empty: PreTrainedModel, target_modules: str | list[str]) -> Coverage:
    with torch.device("meta"):
        return coverage.of(fresh(empty, Start(Lora(r=1, alpha=1, target_modules=target_modules), PlainInit())))


def _shape(empty: PreTrainedModel) -> dict[str, int]:
    """Return what time and memory depend on (command/sizes.Shape): parameters, layers, widths, vocabulary."""
    config = empty.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return {
        "parameters": sum(weight.numel() for weight in empty.parameters()),
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "kv": (getattr(config, "num_key_value_heads", None) or heads) * width,
        "vocabulary": config.vocab_size,
    }
