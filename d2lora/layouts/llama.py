"""Compute the passes of decoding with few operations, where a model's code is Llama's, instruction for instruction.

In transformers a pass of a small model is mostly Python, and attention of one token a call for each text and head. Here
layers that read the same input are one product, attention of one token is two batched products, and the last layer
computes no more of a prompt than its last token.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu
from transformers import PreTrainedModel

from d2lora.layouts import by_rows, prepacked, recognize
from d2lora.layouts.cache import Layer
from d2lora.layouts.rotary import Angles

Norm = Callable[[torch.Tensor], torch.Tensor]


def suits(model: PreTrainedModel) -> bool:
    """Tell whether a model is Llama's, its layers are plain ones, and nothing hangs on its own code being called."""
    if not recognize.is_model(model) or model.config._attn_implementation != "sdpa":
        return False
    linear = [part for name, part in model.named_modules() if name.endswith("_proj") or name == "lm_head"]
    embedding = model.get_input_embeddings()
    plain = all(type(part) is nn.Linear for part in linear) and type(embedding) is nn.Embedding
    replaced = any("forward" in vars(part) for part in model.modules())
    return plain and not replaced and not recognize.hooked(model) and not embedding.max_norm


class Decoder:
    """The layers of a model, ready to compute passes as `decoding.Usual` does."""

    whole = True

    def __init__(self, model: PreTrainedModel) -> None:
        inner: Any = model.model
        self.embed, self.rotary = inner.embed_tokens, inner.rotary_emb
        self.layers = [_Layer(layer) for layer in inner.layers[: model.config.num_hidden_layers]]
        self.norm, self.head = _norm(inner.norm), prepacked.product([model.lm_head])

    def __call__(
        self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, layers: Sequence[Layer]
    ) -> torch.Tensor:
        """Compute a pass, as `decoding.Usual` defines it."""
        x = self.embed(ids)
        angles = Angles.of(*self.rotary(x, positions))
        of_all, of_last = _masks(mask)
        for layer, cached in zip(self.layers, layers, strict=True):
            q, keys, values = layer.before_attention(x, angles, cached)
            if of_all is None or layer is self.layers[-1]:
                x = x[:, -1:]
                attended = by_rows.attend(q[:, -1], keys, values, of_last, layer.scaling)[:, None]
            else:
                attended = _attend(q, keys, values, of_all, layer.scaling)
            x = layer.after_attention(x, attended)
        return self.head(self.norm(x[:, -1]))


class _Layer:
    """A decoder layer of Llama's."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.width, self.scaling = attention.head_dim, attention.scaling
        self.norms = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        self.qkv = prepacked.product([attention.q_proj, attention.k_proj, attention.v_proj])
        self.gate_up, self.down = prepacked.product([mlp.gate_proj, mlp.up_proj]), prepacked.product([mlp.down_proj])
        self.o = prepacked.product([attention.o_proj])
        # heads of queries, of keys, of values
        self.heads = [one.out_features // self.width for one in (attention.q_proj, attention.k_proj, attention.v_proj)]

    def before_attention(
        self, x: torch.Tensor, angles: Angles, cached: Layer
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries (texts, tokens, heads, head) of x (texts, tokens, width), and all keys and values so far."""
        states = self.qkv(self.norms[0](x)).view(*x.shape[:2], -1, self.width)
        angles.rotate_(states[:, :, : -self.heads[2]].transpose(1, 2))
        q, k, v = states.split_with_sizes(self.heads, 2)
        return q, *cached.update(k.transpose(1, 2), v.transpose(1, 2))

    def after_attention(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Return the layer's output (texts, tokens, width)."""
        x = x + self.o(attended)
        gate, up = self.gate_up(self.norms[1](x)).chunk(2, -1)
        return x.add_(self.down(silu(gate).mul_(up)))


def _norm(module: Any) -> Norm:
    return lambda x: rms_norm(x, (x.shape[-1],), module.weight, module.variance_epsilon)


def _masks(mask: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return what of the tokens so far each token of a prompt sees, and what its last does, to be added to its scores.

    `mask` is (texts, tokens) for prompts; behind them it is as `decoding.Batch` has it, (texts, 1, 1, tokens).
    """
    if mask.dim() > 2:
        return None, mask
    causal = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).tril()
    own = torch.eye(mask.shape[1], dtype=torch.bool)  # padding sees itself: a softmax of nothing would be NaN
    unseen = torch.zeros(mask.shape).masked_fill_(~mask, float("-inf"))
    return causal & (mask[:, None, None] | own), unseen[:, None, None]


def _attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Return attention's output (texts, tokens, heads x head) for queries (texts, tokens, heads, head)."""
    shared = q.shape[2] != keys.shape[1]
    output = scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, attn_mask=mask, scale=scaling, enable_gqa=shared
    )
    return output.transpose(1, 2).flatten(2)
