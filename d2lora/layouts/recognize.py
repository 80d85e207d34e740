"""Recognize parts of a model whose code is Llama's, instruction for instruction."""

import inspect
import sys
from types import FunctionType
from typing import Any

from torch import nn
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama as llama


def _same_code(function: Any, known: Any) -> bool:
    """Tell whether a function's instructions, names and constants are those of one of transformers' own."""
    function, known = inspect.unwrap(function) if callable(function) else function, inspect.unwrap(known)
    if not getattr(known, "__module__", "").startswith("transformers.models."):  # something has replaced it
        return False
    code, other = (getattr(f, "__code__", None) for f in (function, known))
    if code is None or other is None:
        return False
    parts = ("co_code", "co_names", "co_varnames")
    return all(getattr(code, part) == getattr(other, part) for part in parts) and _constants(code) == _constants(other)


def _constants(code: Any) -> list[Any]:
    """Return a function's constants without its docstring."""
    return [constant for constant in code.co_consts if not (isinstance(constant, str) and " " in constant)]


def is_norm(module: nn.Module) -> bool:
    """Tell whether a module is Llama's RMSNorm."""
    return _same_code(type(module).forward, llama.LlamaRMSNorm.forward)


def is_mlp(module: nn.Module) -> bool:
    """Tell whether a module is Llama's gated MLP."""
    return _same_code(type(module).forward, llama.LlamaMLP.forward) and isinstance(
        module.act_fn, nn.SiLU | SiLUActivation
    )


def is_attention(module: nn.Module) -> bool:
    """Tell whether attention is Llama's; Mistral's and Qwen2's name a window too, which is in the mask already."""
    from transformers.models.mistral import modeling_mistral as mistral
    from transformers.models.qwen2 import modeling_qwen2 as qwen2

    known = (llama.LlamaAttention, mistral.MistralAttention, qwen2.Qwen2Attention)
    alike = any(_same_code(type(module).forward, one.forward) for one in known)
    return alike and rotates(sys.modules.get(type(module).__module__))


def is_decoder_layer(module: Any) -> bool:
    """Tell whether a module and all its parts are Llama's."""
    return (
        _same_code(type(module).forward, llama.LlamaDecoderLayer.forward)
        and is_norm(module.input_layernorm)
        and is_norm(module.post_attention_layernorm)
        and is_attention(module.self_attn)
        and is_mlp(module.mlp)
    )


def rotates(module: Any) -> bool:
    """Tell whether a module of Python defines Llama's rotary embedding."""
    function, rotate_half = (getattr(module, name, None) for name in ("apply_rotary_pos_emb", "rotate_half"))
    known = isinstance(function, FunctionType) and _same_code(function, llama.apply_rotary_pos_emb)
    return known and _same_code(rotate_half, llama.rotate_half)


def is_model(model: nn.Module) -> bool:
    """Tell whether a causal language model and all its parts are Llama's; Mistral's and Qwen2's differ in windows alone."""
    from transformers.models.mistral import modeling_mistral as mistral
    from transformers.models.qwen2 import modeling_qwen2 as qwen2

    known = (llama.LlamaModel, mistral.MistralModel, qwen2.Qwen2Model)
    inner: Any = getattr(model, "model", None)
    return (
        _same_code(type(model).forward, llama.LlamaForCausalLM.forward)
        and any(_same_code(type(inner).forward, one.forward) for one in known)
        and all(is_decoder_layer(layer) for layer in inner.layers)
        and is_norm(inner.norm)
    )


def hooked(module: nn.Module) -> bool:
    """Tell whether a part of a module has a hook, which only its own forward calls."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(vars(part)[kind] for part in module.modules() if part is not module for kind in kinds)
