"""Initialize as CorDA (Yang et al. 2024, arXiv 2406.05223): from directions of W C, C being the covariance of a layer's
inputs.
"""

from peft import PeftModel
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda

from d2lora.adapters.layers import ADAPTER
from d2lora.adapters.passes import Sequence, cleaned_up, of_base_layers, one_row
from d2lora.adapters.start import Start
from d2lora.adapters.weights import take_out
from d2lora.progress import Progress
from d2lora.settings.inits import CordaIpmInit, CordaKpmInit


def corda(
    wrapped: PeftModel, start: Start[CordaKpmInit | CordaIpmInit], rows: list[Sequence], progress: Progress
) -> None:
    """Start from the largest directions (instruction-previewed) or the smallest (knowledge-preserved) on the rows."""
    settings = CordaConfig(corda_method=start.init.method)
    config = of_base_layers(wrapped, start.lora, init_lora_weights="corda", corda_config=settings)

    def run() -> None:
        for index, row in enumerate(rows):
            wrapped(input_ids=one_row(wrapped, row["input_ids"]))
            progress(index + 1, len(rows))

    with cleaned_up(wrapped), wrapped.disable_adapter():
        preprocess_corda(wrapped, config, run)
        take_out(wrapped, lambda layer: layer.corda_init(ADAPTER, "corda"), lambda done, total: None)
