"""Make small random models of a base's family, whose errors float32 shows where bfloat16's rounding would hide them."""

import copy

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

_VOCABULARY, _LAYERS, _WIDTH = 512, 4, 128


def model(config: PretrainedConfig, attention: str) -> PreTrainedModel:
    """Return a small random model of the same family in evaluation mode."""
    torch.manual_seed(0)
    copied = AutoModelForCausalLM.from_config(small_config(config), attn_implementation=attention).eval()
    for weight in copied.parameters():
        if weight.dim() > 1:  # usual initial weights are so small that nearly uniform outputs would hide differences
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    return copied.to("cuda" if torch.cuda.is_available() else "cpu")


def random_ids(count: int) -> list[int]:
    """Return random token ids, at least one."""
    return torch.randint(3, _VOCABULARY, (max(count, 1),)).tolist()


def small_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return a copy of a config's text part with few layers (of all kinds), few tokens and narrow feed-forward parts."""
    text = copy.deepcopy(config.get_text_config())
    layers = text.num_hidden_layers
    types = getattr(text, "layer_types", None) or [""]
    covering = next(i for i in range(1, len(types) + 1) if set(types[:i]) == set(types))
    count = min(layers, max(2, covering if len(types) > 1 else _LAYERS))
    for key, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == layers:
            setattr(text, key, value[:count])
        elif "intermediate_size" in key and isinstance(value, int):
            setattr(text, key, min(value, _WIDTH))
        elif key.endswith("_token_id"):
            setattr(text, key, None)
    text.num_hidden_layers, text.vocab_size = count, min(text.vocab_size, _VOCABULARY)
    text.dtype = torch.float32
    return text
