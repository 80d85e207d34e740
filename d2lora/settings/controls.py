"""Define control arms: simpler procedures that D2LoRA(m, n) must beat before its gain can be attributed to the warm-up."""

from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import Field

from d2lora.settings.values import Strict, by_name


class BaseControl(Strict):
    """What all arms have: a name, and the facts below. `label` takes m and n as {m} and {n}."""

    label: ClassVar[str]  # of its rows in tables
    rules_out: ClassVar[str]  # the objection to D2LoRA that it answers
    warms_up: ClassVar[bool] = True  # whether the cell has a warm-up of its own
    needs_task: ClassVar[bool] = True  # at n = 0 it is D2LoRA(m, 0), as there is nothing to control
    takes_pairs: ClassVar[bool] = True  # methods that learn from rejected answers can train it
    takes_texts: ClassVar[bool] = True  # the warm-up's rows may be rendered texts, in which turns are not told apart
    adds_up: ClassVar[bool] = False  # its adapter is the sum of two

    name: str


class NoControl(BaseControl):
    """D2LoRA itself: the warm-up, continued on the task."""

    label: ClassVar[str] = "D2LoRA({m}, {n})"
    rules_out: ClassVar[str] = ""

    name: Literal["none"] = "none"


class LongerControl(BaseControl):
    """LoRA on the n task rows for more epochs, so that it sees as many tokens as warm-up and adaptation together."""

    label: ClassVar[str] = "longer({m}, {n})"
    rules_out: ClassVar[str] = "more steps"
    warms_up: ClassVar[bool] = False

    name: Literal["longer"] = "longer"


class MixedControl(BaseControl):
    """One phase on the general and the task rows together, in one seeded order. SFT only."""

    label: ClassVar[str] = "mixed({m}, {n})"
    rules_out: ClassVar[str] = "two phases"
    warms_up: ClassVar[bool] = False
    takes_pairs: ClassVar[bool] = False  # general rows have no rejected answers

    name: Literal["mixed"] = "mixed"


class MergedControl(BaseControl):
    """The warm-up's adapter, times `weight`, added to an adapter that was trained on the task from scratch."""

    label: ClassVar[str] = "merged({m}, {n})"
    rules_out: ClassVar[str] = "it must be continued"
    adds_up: ClassVar[bool] = True

    name: Literal["merged"] = "merged"
    weight: Annotated[float, Field(gt=0)] = 1.0


class PlaceboControl(BaseControl):
    """D2LoRA after a warm-up in which rows have each other's answers."""

    label: ClassVar[str] = "placebo({m}, {n})"
    rules_out: ClassVar[str] = "any tokens do"
    needs_task: ClassVar[bool] = False
    takes_texts: ClassVar[bool] = False

    name: Literal["placebo"] = "placebo"


# In the order of tables.
AnyControl: TypeAlias = NoControl | LongerControl | MixedControl | MergedControl | PlaceboControl

Control: TypeAlias = Annotated[AnyControl, Field(discriminator="name")]

_BY_NAME: dict[str, type[BaseControl]] = by_name(AnyControl)

CONTROL_NAMES: tuple[str, ...] = tuple(_BY_NAME)

NO_CONTROL: str = NoControl().name


def control_of(name: str) -> type[BaseControl]:
    """Return the class of the control with this name. KeyError if there is none."""
    return _BY_NAME[name]


def in_effect(name: str, m: int | str, n: int | str) -> str:
    """Return the control of a cell: none if it has no general samples, or nothing to control for."""
    return NO_CONTROL if m == 0 or (n == 0 and control_of(name).needs_task) else name
