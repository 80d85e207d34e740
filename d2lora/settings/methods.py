"""Define the methods of phase 2: the settings of each, and the facts that plan, training and report need."""

from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import Field

from d2lora.settings.values import Positive, Strict, by_name


class BaseMethod(Strict):
    """What all methods have: a name, epochs, and the facts below, which depend on no setting.

    The colours are from Okabe and Ito's palette (2008), which people with colour blindness can tell apart; in greyscale
    the markers differ.
    """

    label: ClassVar[str]  # in tables and figures
    colour: ClassVar[str]  # of its curves
    marker: ClassVar[str]  # of its curves' points, in matplotlib's letters
    needs_pairs: ClassVar[bool]  # trains on (chosen, rejected); otherwise on the chosen answer alone
    least_rows: ClassVar[int] = 1  # of a training set
    cost: ClassVar[float]  # time of a training step relative to SFT's on as many samples
    extra_forwards: ClassVar[int] = 0  # of a step: passes without a backward one, beside the reference's
    # The method whose learning rate and epochs it has where a recipe lists none.
    rates_like: ClassVar[str | None] = None

    name: str
    epochs: Positive

    @property
    def base_is_reference(self) -> bool:
        """Tell whether the loss compares the policy with the base itself."""
        return False


class Sft(BaseMethod):
    """Supervised fine-tuning on the chosen answers."""

    label: ClassVar[str] = "SFT"
    colour: ClassVar[str] = "#0072b2"
    marker: ClassVar[str] = "o"
    needs_pairs: ClassVar[bool] = False
    cost: ClassVar[float] = 1.0

    name: Literal["sft"] = "sft"


class Referenced(BaseMethod):
    """What methods with a reference have: `beta` scales the log-ratios of policy and reference."""

    beta: Annotated[float, Field(gt=0)]
    reference: Literal["warm_start", "base"]

    @property
    def base_is_reference(self) -> bool:
        """Tell whether the loss compares the policy with the base itself."""
        return self.reference == "base"


class Dpo(Referenced):
    """Direct preference optimization (Rafailov et al. 2023)."""

    label: ClassVar[str] = "DPO"
    colour: ClassVar[str] = "#d55e00"
    marker: ClassVar[str] = "s"
    needs_pairs: ClassVar[bool] = True
    cost: ClassVar[float] = 2.5  # two answers, and the reference's forward pass without a backward one

    name: Literal["dpo"] = "dpo"


class Orpo(BaseMethod):
    """Odds-ratio preference optimization (Hong et al. 2024): `beta` weighs the odds ratio (the paper's lambda) beside the NLL."""

    label: ClassVar[str] = "ORPO"
    colour: ClassVar[str] = "#009e73"
    marker: ClassVar[str] = "^"
    needs_pairs: ClassVar[bool] = True
    cost: ClassVar[float] = 2.0

    name: Literal["orpo"] = "orpo"
    beta: Annotated[float, Field(gt=0)]
    nll: Literal["prompt_and_chosen", "completion"]


class Simpo(BaseMethod):
    """Simple preference optimization (Meng et al. 2024): without a reference, on log-probabilities averaged over an
    answer's tokens.

    `beta` scales the log-probabilities; `gamma` is the margin by which the chosen answer should then be ahead (equation
    6).
    """

    label: ClassVar[str] = "SimPO"
    colour: ClassVar[str] = "#cc79a7"
    marker: ClassVar[str] = "D"
    needs_pairs: ClassVar[bool] = True
    cost: ClassVar[float] = 2.0
    rates_like: ClassVar[str | None] = "dpo"

    name: Literal["simpo"] = "simpo"
    beta: Annotated[float, Field(gt=0)]
    gamma: Annotated[float, Field(ge=0)]


class Kto(Referenced):
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024): of each pair one desirable and one undesirable example.

    Their losses are weighed by `desirable_weight` and `undesirable_weight` (lambda_D and lambda_U in the paper).
    """

    label: ClassVar[str] = "KTO"
    colour: ClassVar[str] = "#e69f00"
    marker: ClassVar[str] = "P"
    needs_pairs: ClassVar[bool] = True
    least_rows: ClassVar[int] = 2  # a prompt and an answer to another one
    cost: ClassVar[float] = 3.5  # DPO's, and a forward pass for the KL
    extra_forwards: ClassVar[int] = 1  # for the KL
    rates_like: ClassVar[str | None] = "dpo"

    name: Literal["kto"] = "kto"
    desirable_weight: Annotated[float, Field(gt=0)]
    undesirable_weight: Annotated[float, Field(gt=0)]


AnyMethod: TypeAlias = Sft | Dpo | Orpo | Simpo | Kto  # in the order of tables and panels

Method: TypeAlias = Annotated[AnyMethod, Field(discriminator="name")]

_BY_NAME: dict[str, type[BaseMethod]] = by_name(AnyMethod)

METHODS: tuple[type[BaseMethod], ...] = tuple(_BY_NAME.values())

METHOD_NAMES: tuple[str, ...] = tuple(_BY_NAME)


def method_of(name: str) -> type[BaseMethod]:
    """Return the class of the method with this name. KeyError if there is none."""
    return _BY_NAME[name]
