"""Initialize as LoftQ (Li et al. 2023, arXiv 2310.08659): quantize the base to 4 bits, and start the adapter from the
error.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

from d2lora.adapters.coverage import layers
from d2lora.adapters.layers import ADAPTER, base_weight, matrices, turned
from d2lora.adapters.passes import Sequence
from d2lora.adapters.start import Start
from d2lora.progress import Progress
from d2lora.settings.inits import BaseInit

# What transformers' BitsAndBytesConfig takes to load the base as `nf4` quantizes it.
QUANTIZATION = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False}
_CARD = """\
---
library_name: peft
---

This adapter belongs on its base in 4 bits (NF4, no double quantization), as `quantization_config.json` says. On the base itself it gives
wrong answers, without an error.

    import json
    from peft import AutoPeftModelForCausalLM
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(**json.load(open("quantization_config.json")))
    model = AutoPeftModelForCausalLM.from_pretrained(".", quantization_config=quantization)
"""


def write_quantization(folder: Path) -> None:
    """Write into a saved adapter's folder that it belongs on the quantized base: for programs, and for those who read it.

    PEFT's config has no field for it: one that it does not know makes each load warn, and `loftq_config` makes PEFT initialize again.
    """
    (folder / "quantization_config.json").write_text(json.dumps(QUANTIZATION, indent=2))
    (folder / "README.md").write_text(_CARD)


@torch.no_grad()
def loftq(wrapped: PeftModel, start: Start[BaseInit], rows: list[Sequence], progress: Progress) -> None:
    """Start A and B from one iteration: s B A is the best approximation of rank r to W - Q, Q being W in NF4.

    One iteration, so that Q is what loading the base in 4 bits gives. PEFT's own needs a GPU and leaves out the scale
    s.
    """
    adapted = layers(wrapped)
    for index, layer in enumerate(adapted.values()):
        W, r = turned(base_weight(layer).data, layer), layer.r[ADAPTER]
        U, S, Vh = torch.linalg.svd(W.float() - nf4(W).float(), full_matrices=False)
        root = (S[:r] / layer.scaling[ADAPTER]).sqrt()
        A, B = matrices(layer)
        A.data, B.data = root[:, None] * Vh[:r], U[:, :r] * root
        progress(index + 1, len(adapted))


def nf4(weight: torch.Tensor) -> torch.Tensor:
    """Return the weight after 4-bit quantization: NF4 in blocks of 64, as bitsandbytes loads models."""
    import bitsandbytes.functional as bnb  # late: an extra, and only LoftQ's

    row = weight.reshape(1, -1)  # bitsandbytes mixes up the blocks on a CPU where several rows share one
    codes, state = bnb.quantize_4bit(row, blocksize=64, compress_statistics=False, quant_type="nf4")
    return bnb.dequantize_4bit(codes, state).to(weight.dtype).view_as(weight)


@contextlib.contextmanager
def quantized(wrapped: nn.Module) -> Iterator[None]:
    """Hold the base's weights under the adapter in NF4 inside the `with` block, and restore them bit for bit."""
    adapted = layers(wrapped).values()
    originals = [base_weight(layer).data for layer in adapted]
    try:
        for layer, original in zip(adapted, originals, strict=True):
            W = turned(original, layer)  # as a 4-bit load turns Conv1D's weights
            base_weight(layer).data = turned(nf4(W), layer)
        yield
    finally:
        for layer, original in zip(adapted, originals, strict=True):
            base_weight(layer).data = original
