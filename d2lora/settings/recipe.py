"""How both phases are trained, and on what part of the machine."""

from typing import Annotated, Literal

from pydantic import Field, StrictBool, model_validator

from d2lora.settings.values import Positive, Rate, Strict, Text


class Lora(Strict):
    r: Positive
    alpha: Positive
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Text | list[Text] = "all-linear"


class Rates(Strict):
    warmup: Rate
    sft: Rate
    dpo: Rate
    orpo: Rate


class Epochs(Strict):
    warmup: Positive
    sft: Positive
    dpo: Positive
    orpo: Positive


class Recipe(Strict):
    """How both phases are trained, and on what part of the machine."""

    name: Text
    lora: Lora
    lr: Rates
    epochs: Epochs  # what the method and warmup groups take theirs from
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    lr_warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    batch: Positive
    max_length: Positive
    # From here on nothing changes a result beyond rounding, so nothing of it is part of a key (with dropout, the first three are).
    micro_batch: Positive
    packing: Literal["prefix_shared", "padded"] = "prefix_shared"
    attention: Literal["sdpa", "flex_attention"] = "sdpa"  # eager would add a packed batch's mask, not apply it
    eval_batch: Positive = 16
    gradient_checkpointing: StrictBool = False
    threads: Positive | None = None
    checkpoint_minutes: Annotated[float, Field(ge=0)] = 5.0

    @model_validator(mode="after")
    def _micro_batch_divides_batch(self) -> "Recipe":
        if self.batch % self.micro_batch:
            raise ValueError(f"batch={self.batch} must be a multiple of micro_batch={self.micro_batch}")
        return self
