"""Choose the objective that trains a method."""

from typing import Any

from d2lora.settings.methods import BaseMethod, Dpo, Kto, Orpo, Sft, Simpo
from d2lora.train.common import Objective
from d2lora.train.dpo import DpoObjective
from d2lora.train.kto import KtoObjective
from d2lora.train.orpo import OrpoObjective
from d2lora.train.sft import SftObjective
from d2lora.train.simpo import SimpoObjective

OBJECTIVES: dict[type[BaseMethod], type[Objective[Any]]] = {
    Sft: SftObjective,
    Dpo: DpoObjective,
    Orpo: OrpoObjective,
    Simpo: SimpoObjective,
    Kto: KtoObjective,
}


def objective(method: BaseMethod) -> Objective[Any]:
    """Return how a method is trained, with its settings."""
    return OBJECTIVES[type(method)](method)
