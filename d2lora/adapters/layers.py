"""What an adapted layer computes. The base's weights W never change.

An initialization that puts part of W into the adapter (PiSSA, OLoRA, MiLoRA, CorDA, LoRA-GA) trains A and B on the residual
W - s B0 A0, which is W with an adapter of [B - B0, B0] and [A; A - A0]: see `Residual`.
"""

import math
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import nn
from torch.nn.functional import linear

from d2lora.adapters.coverage import layers

ADAPTER = "default"  # PEFT's name of the one adapter on a model

Matrices = tuple[torch.Tensor, torch.Tensor]  # A (r, in) and B (out, r)


def config_of(wrapped: PeftModel) -> LoraConfig:
    """Return the adapter's config, the one that PEFT saves."""
    config = wrapped.peft_config[ADAPTER]
    assert isinstance(config, LoraConfig), "no adapter of another kind is put on a base"
    return config


def matrices(layer: LoraLayer, adapter: str = ADAPTER) -> Matrices:
    """Return the parameters A (r, in) and B (out, r) of a layer's adapter."""
    A, B = (part[adapter].weight for part in (layer.lora_A, layer.lora_B))
    assert isinstance(A, nn.Parameter), "PEFT's A is a linear layer"
    assert isinstance(B, nn.Parameter), "PEFT's B is a linear layer"
    return A, B


def base_weight(layer: LoraLayer) -> nn.Parameter:
    """Return the parameter W of the base's layer under an adapter."""
    weight = layer.get_base_layer().weight
    assert isinstance(weight, nn.Parameter), "a linear layer"
    return weight


def turned(weight: torch.Tensor, layer: LoraLayer) -> torch.Tensor:
    """Transpose a weight between a layer's own orientation and (out, in): Conv1D stores (in, out)."""
    return weight.T if getattr(layer, "fan_in_fan_out", False) else weight


def magnitudes(layer: LoraLayer) -> tuple[torch.Tensor, ...]:
    """Return DoRA's m (out) of a layer's adapter; nothing where the adapter has none."""
    vectors = layer.lora_magnitude_vector
    return tuple(vectors[ADAPTER].parameters()) if ADAPTER in vectors else ()


def start_magnitudes(wrapped: PeftModel) -> None:
    """Start DoRA's m as the norms of W's rows in float32, as a pass computes them, so that step 0 is the base.

    On a bfloat16 base PEFT starts it before A and B are float32, so it rounds the norms to bfloat16.
    """
    for layer in layers(wrapped).values():
        layer.lora_variant[ADAPTER].init(layer, ADAPTER)


def plain_matrices(layer: LoraLayer) -> Matrices:
    """Return A and B of the plain adapter with the layer's output, W x + s B A x."""
    variant = layer.lora_variant.get(ADAPTER)
    return variant.folded(layer, ADAPTER) if isinstance(variant, Residual | MultiLora) else matrices(layer)


def _scaled(added: torch.Tensor, layer: LoraLayer, adapter: str) -> torch.Tensor:
    """Return s times an adapter's output. With s = 1 (alpha = r, the default) it is returned as it is, which saves two
    passes over it.
    """
    scale = layer.scaling[adapter]
    return added if scale == 1 else added * scale


class Plain(LoraVariant):
    """LoRA as in PEFT, W x + s B A x, but without a product with s = 1."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        """Do nothing: PEFT calls this where an initialization may change the rank."""

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """Return W x + s B A x; `result` is W x."""
        A, B, dropout = (part[active_adapter] for part in (module.lora_A, module.lora_B, module.lora_dropout))
        return result + _scaled(B(A(dropout(x))), module, active_adapter)


class Residual(LoraVariant):
    """LoRA on the residual weights W - s B0 A0, with W left as it is.

    Its output is W x + s (B A - B0 A0) x, computed as s ((B - B0) A + B0 (A - A0)) x: exactly 0 at the start, and what
    training changes is not the difference of two large numbers, which bfloat16 would lose. The gradients of A and B are
    those of s B A x.
    """

    def __init__(self, A: torch.Tensor, B: torch.Tensor) -> None:
        self.A, self.B = A, B  # A0 (r, in), B0 (out, r)

    def folded(self, module: LoraLayer, adapter: str) -> Matrices:
        """Return (2r, in) and (out, 2r) of the plain adapter with the same output."""
        A, B = matrices(module, adapter)
        return torch.cat([A, A - self.A]), torch.cat([B - self.B, self.B], 1)

    def forward(  # type: ignore[override]  # PEFT's is static, and calls it on an instance
        self, module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """Return W x + s (B A - B0 A0) x; `result` is W x."""
        down, up = self.folded(module, active_adapter)
        return result + _scaled(linear(linear(x, down), up), module, active_adapter)


class MultiLora(LoraVariant):
    """MultiLoRA (Wang et al. 2023, arXiv 2311.11501, section 4): parallel modules, A and B Kaiming-uniform, scales from zero.

    W x + s sum_i diag(c_i) B_i A_i x for i = 1 .. modules, each of rank r / modules so that the number of parameters is that of
    LoRA of rank r, but for the learned scales c_i (out). The modules are blocks of PEFT's A (r, in) and B (out, r).
    """

    @staticmethod
    def start(layer: LoraLayer, modules: int) -> None:
        """Turn a layer's fresh adapter into one of `modules` parallel modules."""
        _, B = matrices(layer)
        with torch.no_grad():
            for block in B.chunk(modules, 1):
                nn.init.kaiming_uniform_(block, a=math.sqrt(5))  # as PEFT has started A
        scales = nn.ParameterDict({ADAPTER: nn.Parameter(torch.zeros(modules, len(B), device=B.device, dtype=B.dtype))})
        if not hasattr(layer, "lora_scale"):
            layer.adapter_layer_names = (*layer.adapter_layer_names, "lora_scale")
        layer.lora_scale = scales  # type: ignore[attr-defined]
        layer.lora_variant[ADAPTER] = MultiLora()

    @staticmethod
    def folded(module: LoraLayer, adapter: str) -> Matrices:
        """Return (r, in) and (out, r) of the plain adapter with the same output."""
        A, B = matrices(module, adapter)
        scale: torch.Tensor = module.lora_scale[adapter]  # type: ignore[attr-defined]
        return A, B * scale.T.repeat_interleave(B.shape[1] // len(scale), 1)

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """Return W x plus what the modules add; `result` is W x."""
        down, up = MultiLora.folded(module, active_adapter)
        x = module.lora_dropout[active_adapter](x)
        return result + _scaled(linear(linear(x, down), up), module, active_adapter)


OWN = (Plain, Residual, MultiLora)
