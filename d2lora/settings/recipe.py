"""Define how both phases are trained, in two types: settings that are in a stage's key (Training), and those that are
not (Machine).
"""

import math
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, StrictBool, model_validator

from d2lora.settings.methods import METHOD_NAMES, method_of
from d2lora.settings.values import PathText, Positive, Rate, Strict, Text, as_given

ALL_LINEAR = "all-linear"  # PEFT's name for all linear layers but the head
WARMUP = "warmup"  # phase 1, beside phase 2's methods
RATE = "recipe.lr"  # as an axis: the learning rate of a cell's own method, whichever it is
LAYOUT = ("packing", "micro_batch", "attention")  # the settings of Machine by which a batch is laid out
_FACTOR = "lr_factor"

# Tokens of a pass with recipe.micro_batch=auto. On a GPU enough that launching kernels costs little beside their work; on
# a CPU, which gains nothing from more, few: activations are most of a small model's memory.
PASS_TOKENS = {"cuda": 8192, "cpu": 1024}

_T = TypeVar("_T")


def _by_phase(values: dict[str, _T]) -> dict[str, _T]:
    """Return a value for the warm-up and for each method, in that order.

    A method without one takes that of its `rates_like`.
    """
    phases = (WARMUP, *METHOD_NAMES)
    unknown = [phase for phase in values if phase not in phases]
    if unknown:
        raise ValueError(f"there is no {', '.join(unknown)}: {', '.join(phases)}")
    like = {name: method_of(name).rates_like for name in METHOD_NAMES}
    all_values = {name: values[other] for name, other in like.items() if other in values} | values
    missing = [phase for phase in phases if phase not in all_values and not like.get(phase)]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}")
    return {phase: all_values[phase] for phase in phases}


Rates = Annotated[dict[str, Rate], AfterValidator(_by_phase)]

Epochs = Annotated[dict[str, Positive], AfterValidator(_by_phase)]


class Lora(Strict):
    r: Positive
    alpha: Positive
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Text | list[Text] = ALL_LINEAR


class Training(Strict):
    """The settings of a recipe that change a training's result."""

    name: Text  # for people: in no key
    lora: Lora
    lr: Rates  # for each phase; a stage's key has that of its own phase only
    epochs: Epochs  # for each phase; the groups method and warmup refer to them
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    lr_warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    batch: Positive
    max_length: Positive

    def rate(self, phase: str) -> float:
        """Return the learning rate of a phase: "warmup" or a method's name."""
        return self.lr[phase]


def _times(rate: Any, factor: float, phase: str) -> Any:
    """Return a method's rate times a factor, without the last digits that rounding leaves; the warm-up's as it is."""
    if phase == WARMUP or factor == 1 or not isinstance(rate, float):
        return rate
    return float(f"{rate * factor:.12g}")


class Machine(Strict):
    """The settings of a recipe that change results by rounding only, and so are in no key (but see Recipe.layout)."""

    micro_batch: Positive | Literal["auto"]
    packing: Literal["prefix_shared", "padded"] = "prefix_shared"
    attention: Literal["auto", "sdpa", "flex_attention", "by_text"] = "sdpa"  # eager would add a mask, not apply it
    eval_batch: Positive = 16
    engine: Literal["memory", "vllm"] = "memory"  # what answers in evaluations (docs/engines.md)
    engine_python: PathText = ".engine/bin/python"
    gradient_checkpointing: StrictBool = False
    compile: Literal[False, "layers"] = False
    kernels: StrictBool = False
    threads: Positive | None = None
    checkpoint_minutes: Annotated[float, Field(ge=0)] = 5.0


# In this order, because pydantic lists the fields of the last base class first: a recipe is shown with Training's first.
class Recipe(Machine, Training):
    """A recipe as users write it: the settings of Training and of Machine side by side.

    `lr_factor` is no setting of its own but a way to type rates: recipe.lr_factor=0.5,1,2 are three rates of each method. What is
    kept, and in keys, is the rate that results.
    """

    @model_validator(mode="before")
    @classmethod
    def _rates_times_their_factor(cls, values: Any) -> Any:
        if not isinstance(values, dict) or _FACTOR not in values:
            return values
        factor = values[_FACTOR]
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < math.inf:
            raise ValueError(f"{_FACTOR}={as_given(factor)}: a number above 0")
        rest = {key: value for key, value in values.items() if key != _FACTOR}
        rates = rest.get("lr")
        if not isinstance(rates, dict):
            return rest
        return rest | {"lr": {phase: _times(rate, factor, phase) for phase, rate in rates.items()}}

    @model_validator(mode="before")
    @classmethod
    def _no_choice_with_dropout(cls, values: Any) -> Any:
        """Replace `auto` where there is dropout: which units are dropped must not depend on a machine's memory."""
        lora, batch = (values.get(name) if isinstance(values, dict) else None for name in ("lora", "batch"))
        dropout = lora.get("dropout") if isinstance(lora, dict) else getattr(lora, "dropout", 0)
        if not dropout or not isinstance(batch, int) or batch < 1:
            return values
        fixed = {"micro_batch": next(size for size in (4, 2, 1) if batch % size == 0), "attention": "sdpa"}
        return values | {name: value for name, value in fixed.items() if values.get(name) == "auto"}

    @model_validator(mode="after")
    def _micro_batch_divides_batch(self) -> "Recipe":
        if self.micro_batch != "auto" and self.batch % self.micro_batch:
            raise ValueError(f"batch={self.batch} must be a multiple of micro_batch={self.micro_batch}")
        return self

    @property
    def layout(self) -> dict[str, Any]:
        """Return how a batch is laid out, as far as it is in a training's key.

        With dropout it decides which units are dropped; without, it changes nothing beyond rounding and is in no key.
        """
        return self.model_dump(include=set(LAYOUT)) if self.lora.dropout else {}
