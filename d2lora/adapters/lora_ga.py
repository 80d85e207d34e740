"""LoRA-GA (Wang et al. 2024, arXiv 2407.05000): singular vectors of the loss's gradient at the base."""

import warnings

from peft import LoraConfig, LoraGAConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.loraga import preprocess_loraga
from torch.nn.functional import normalize

from d2lora.adapters.coverage import layers
from d2lora.adapters.layers import ADAPTER, matrices
from d2lora.adapters.passes import Sequence, cleaned_up, of_base_layers, one_row
from d2lora.adapters.start import Start
from d2lora.adapters.weights import take_out
from d2lora.progress import Progress
from d2lora.settings.inits import LoraGaInit


def lora_ga(wrapped: PeftModel, start: Start[LoraGaInit], rows: list[Sequence], progress: Progress) -> None:
    """Start from the gradient of SFT's loss, averaged over the rows. RuntimeError for a layer that has none."""
    settings = LoraGAConfig(direction=start.init.direction, scale="stable", stable_gamma=start.init.gamma)
    config = of_base_layers(wrapped, start.lora, init_lora_weights="lora_ga", lora_ga_config=settings)
    with cleaned_up(wrapped):
        _add_gradients(wrapped, config, rows, progress)
        for name, layer in layers(wrapped).items():
            if not hasattr(layer.get_base_layer(), "_peft_loraga_grad"):  # PEFT would start it as plain LoRA
                raise RuntimeError(f"LoRA-GA has no gradient of {name}")
        take_out(wrapped, lambda layer: _init(layer, settings), lambda done, total: None)


def _add_gradients(wrapped: PeftModel, config: LoraConfig, rows: list[Sequence], progress: Progress) -> None:
    """Have PEFT leave the gradient on each base layer."""

    def step() -> None:
        for index, row in enumerate(rows):
            ids, labels = one_row(wrapped, row["input_ids"]), one_row(wrapped, row["labels"])
            wrapped(input_ids=ids, labels=labels).loss.backward()
            progress(index + 1, len(rows))

    with wrapped.disable_adapter(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook")  # the first layer's inputs need no gradient
        preprocess_loraga(wrapped, config, step)


def _init(layer: LoraLayer, config: LoraGAConfig) -> None:
    """Start a layer from the gradient that PEFT has stored on it.

    PEFT scales B by the gradient's singular values and does not scale A, so B's start depends on the scale of the loss.
    The paper (theorem 3.2) and its authors' code use orthonormal directions, both times out^(1/4) / gamma^(1/2), and so
    does this.
    """
    layer.lora_ga_init(ADAPTER, config)
    A, B = matrices(layer)
    factor = len(B) ** 0.25 / config.stable_gamma**0.5
    A.data, B.data = normalize(A.data.float(), dim=1) * factor, normalize(B.data.float(), dim=0) * factor
