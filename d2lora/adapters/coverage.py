"""Find which layers of a model an adapter covers, which ones all-linear leaves out and why, and the share of the
weights.
"""

import functools
import re
import sys

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from d2lora.records import Coverage

_NUMBER = re.compile(r"\.\d+(?=\.|$)")
_PLAIN_FORWARDS = (nn.Linear.forward, nn.Conv1d.forward, Conv1D.forward)


def layers(wrapped: nn.Module) -> dict[str, LoraLayer]:
    """Return the model's layers with an adapter, by name."""
    return {name: module for name, module in wrapped.named_modules() if isinstance(module, LoraLayer)}


def kind(name: str) -> str:
    """Return a layer's name without PEFT's part and numbers: "model.layers.*.mlp.gate"."""
    return _NUMBER.sub(".*", name.removeprefix("base_model.model."))


# PEFT refuses these layers of these families: their forward reads the weights, and would pass an adapter by.
_BYPASSED = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}


def not_adapted(model: PreTrainedModel) -> dict[str, str]:
    """Return the linear layers that "all-linear" leaves out, by their full names, and why."""
    linear: dict[str, nn.Module] = {
        name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv1d | Conv1D)
    }
    text, out = model.config.get_text_config(), dict[str, str]()
    if text is not model.config:  # beside a vision tower, say
        inside = [name for name, module in model.named_modules() if module is model.get_decoder() and name]
        head = model.get_output_embeddings()
        others = [name for name, m in linear.items() if m is not head]
        others = [name for name in others if not any(name.startswith(f"{prefix}.") for prefix in inside)]
        out |= dict.fromkeys(others, "no text goes through it")
    if text.model_type in _BYPASSED:
        bypassed = [name for name in linear if name.rsplit(".", 1)[-1] in ("out_proj", "conv1d")]
        out |= dict.fromkeys(bypassed, "its family's kernels read the weights, past an adapter")
    return out | dict.fromkeys(_not_linear(model, linear), "it is no linear map of its input")


@torch.no_grad()
def _not_linear(model: PreTrainedModel, linear: dict[str, nn.Module]) -> list[str]:
    """Return the layers with a forward of their own that an adapter can't be added to, found by trying.

    Some routers choose the experts themselves, and some projections are of groups.
    """
    own = {name: m for name, m in linear.items() if type(m).forward not in _PLAIN_FORWARDS}
    if not own:
        return []
    others: set[str] = set()

    def note(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: object, name: str) -> None:
        weight = module.weight
        assert isinstance(weight, torch.Tensor), "of a linear layer"
        if not isinstance(output, torch.Tensor) or output.shape != (*inputs[0].shape[:-1], weight.shape[0]):
            others.add(name)

    hooks = [m.register_forward_hook(functools.partial(note, name=name)) for name, m in own.items()]
    try:
        model(input_ids=torch.ones(1, 4, dtype=torch.long, device=model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return sorted(others)


def tell(model: PreTrainedModel, left_out: dict[str, str]) -> None:
    """Print one line about layers that all-linear leaves out, once for each process and family."""
    if left_out and model.config.model_type not in _told:
        _told.add(model.config.model_type)
        kinds = {kind(name): why for name, why in left_out.items()}
        examples = "; ".join(f"{kind} ({why})" for kind, why in list(kinds.items())[:3])
        more = f" and {len(kinds) - 3} more kinds" if len(kinds) > 3 else ""
        print(f"{model.config.model_type}: all-linear leaves out {examples}{more}", file=sys.stderr)


_told: set[str] = set()


def of(wrapped: PeftModel) -> Coverage:
    """Return which of the base's weights are adapted. Kinds of layers are their names without numbers.

    Of those that are left out, which come largest first, kinds of less than a thousandth are not listed.
    """
    adapted = {name.removeprefix("base_model.model."): layer for name, layer in layers(wrapped).items()}
    sizes: dict[str, int] = {}
    reached: set[str] = set()
    for name, weight in wrapped.get_base_model().named_parameters(remove_duplicate=True):
        if "lora_" in name or weight.dim() < 2:
            continue
        module, _, part = name.replace(".base_layer", "").rpartition(".")
        layer = adapted.get(module)
        matrix = kind(module if part == "weight" else f"{module}.{part}")
        sizes[matrix] = sizes.get(matrix, 0) + weight.numel()
        if layer is not None and (part == "weight" or part in _parameters_of(layer)):
            reached.add(matrix)
    total = sum(sizes.values())
    left_out = {name: size / total for name, size in sizes.items() if name not in reached and size >= total / 1000}
    return Coverage(
        share=round(sum(sizes[name] for name in reached) / total, 4),
        adapted=sorted(reached),
        left_out={name: round(share, 4) for name, share in sorted(left_out.items(), key=lambda x: -x[1])},
    )


def _parameters_of(layer: object) -> set[str]:
    """Return the parameters of a module of experts that PEFT adapts: it wraps the module once a parameter."""
    names = set()
    while isinstance(layer, ParamWrapper):
        names.add(layer.parameter_name)
        layer = layer.base_layer
    return names
