"""Initialize from the base's weights: PiSSA, OLoRA, MiLoRA."""

from collections.abc import Callable

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer

from d2lora.adapters.coverage import layers
from d2lora.adapters.layers import ADAPTER, Residual, base_weight, matrices, turned
from d2lora.adapters.passes import Sequence
from d2lora.adapters.start import Start
from d2lora.progress import Progress
from d2lora.settings.inits import BaseInit

LayerInit = Callable[[LoraLayer], None]


@torch.no_grad()
def take_out(wrapped: PeftModel, init: LayerInit, progress: Progress) -> None:
    """Initialize A and B of each layer with a function that also changes the layer's weight, and restore the weight.

    RuntimeError if A or B is zero or not finite afterwards.
    """
    adapted = layers(wrapped)
    for index, (name, layer) in enumerate(adapted.items()):
        weight = base_weight(layer)
        original, weight.data = weight.data, weight.data.clone()
        try:
            init(layer)
        finally:
            weight.data = original
        A, B = matrices(layer)
        A.data, B.data = A.data.float().contiguous(), B.data.float().contiguous()
        if not (A.isfinite().all() and B.isfinite().all() and A.any() and B.any()):
            raise RuntimeError(f"the initialization left A or B of {name} zero or not finite")
        layer.lora_variant[ADAPTER] = Residual(A.detach().clone(), B.detach().clone())
        progress(index + 1, len(adapted))


def pissa(wrapped: PeftModel, start: Start[BaseInit], rows: list[Sequence], progress: Progress) -> None:
    """Start as PiSSA (Meng et al. 2024, arXiv 2404.02948), by an exact or a randomized SVD: PEFT has a name for each."""
    take_out(wrapped, lambda layer: layer.pissa_init(ADAPTER, start.init.name), progress)


def olora(wrapped: PeftModel, start: Start[BaseInit], rows: list[Sequence], progress: Progress) -> None:
    """Start as OLoRA (Büyükakyüz 2024, arXiv 2406.01775)."""
    take_out(wrapped, _olora, progress)


def _olora(layer: LoraLayer) -> None:
    """Start a layer as PEFT does, but also for Conv1D, whose weight (in, out) PEFT would take for (out, in)."""
    weight = base_weight(layer)
    weight.data = turned(weight.data, layer)
    layer.olora_init(ADAPTER)


def milora(wrapped: PeftModel, start: Start[BaseInit], rows: list[Sequence], progress: Progress) -> None:
    """Start as MiLoRA (Wang et al. 2024, arXiv 2406.09044, section 3): from the r smallest singular values of W."""
    take_out(wrapped, _milora, progress)


def _milora(layer: LoraLayer) -> None:
    """Start a layer as PEFT's own methods of LoraLayer do: take s B A out of the base layer's weight."""
    weight = base_weight(layer)
    r, scaling = layer.r[ADAPTER], layer.scaling[ADAPTER]
    A, B = matrices(layer)
    W = turned(weight.data.float(), layer)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = (S[-r:] / scaling).sqrt()
    A.data, B.data = root[:, None] * Vh[-r:], U[:, -r:] * root
    minor = scaling * B.data @ A.data
    weight.data = turned((W - minor).to(weight.dtype), layer)
