"""Choose the function that prepares an adapter for its initialization."""

from collections.abc import Callable
from typing import Any

from peft import PeftModel

from d2lora.adapters import weights
from d2lora.adapters.corda import corda
from d2lora.adapters.coverage import layers
from d2lora.adapters.eva import eva
from d2lora.adapters.layers import base_weight, turned
from d2lora.adapters.loftq import loftq
from d2lora.adapters.lora_ga import lora_ga
from d2lora.adapters.passes import Sequence
from d2lora.adapters.start import Start
from d2lora.errors import UserError
from d2lora.progress import Progress
from d2lora.settings import inits
from d2lora.settings.inits import BaseInit

# Each gives a fresh adapter its A and B, and has layers compute on the residual where these hold a part of W.
PREPARATIONS: dict[type[BaseInit], Callable[[PeftModel, Start[Any], list[Sequence], Progress], None]] = {
    inits.PissaInit: weights.pissa,
    inits.FastPissaInit: weights.pissa,
    inits.OloraInit: weights.olora,
    inits.MiloraInit: weights.milora,
    inits.CordaKpmInit: corda,
    inits.CordaIpmInit: corda,
    inits.EvaInit: eva,
    inits.LoraGaInit: lora_ga,
    inits.LoftqInit: loftq,
}


def prepare(wrapped: PeftModel, start: Start[BaseInit], rows: list[Sequence], progress: Progress) -> None:
    """Start a fresh adapter as its initialization says, from `rows` if it uses data.

    UserError if rank or rows do not allow it. RuntimeError if PEFT has left a layer as plain LoRA.
    """
    _check_rank(wrapped, start)
    PREPARATIONS[type(start.init)](wrapped, start, rows, progress)


def _check_rank(wrapped: PeftModel, start: Start[BaseInit]) -> None:
    """Raise UserError unless every layer has as many directions as the initialization takes."""
    init, r = start.init, start.lora.r
    wanted = init.directions(r)
    for name, layer in layers(wrapped).items():
        outputs, inputs = turned(base_weight(layer), layer).shape
        offered = init.offered(inputs, outputs)
        if wanted > offered:
            raise UserError(
                f"recipe.lora.r={r}: init={init.name} takes {wanted} directions and {name.removeprefix('base_model.model.')} has {offered}"
            )
