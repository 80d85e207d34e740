"""The methods of phase 2."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from d2lora.settings.values import Positive, Strict


class Method(Strict):
    name: Literal["sft", "dpo", "orpo"]
    epochs: Positive
    beta: Annotated[float, Field(gt=0)] | None = None
    reference: Literal["warm_start", "base"] | None = None
    nll: Literal["prompt_and_chosen", "completion"] | None = None

    @model_validator(mode="after")
    def _settings_of_the_method(self) -> "Method":
        wanted = {"sft": set(), "dpo": {"beta", "reference"}, "orpo": {"beta", "nll"}}[self.name]
        given = {key for key in ("beta", "reference", "nll") if getattr(self, key) is not None}
        if wanted != given:
            raise ValueError(f"{self.name} takes {', '.join(sorted(wanted)) or 'none'} of beta, reference, nll")
        return self

    @property
    def cost(self) -> float:
        return {"sft": 1.0, "dpo": 2.5, "orpo": 2.0}[self.name]

    @property
    def needs_pairs(self) -> bool:
        return self.name != "sft"
