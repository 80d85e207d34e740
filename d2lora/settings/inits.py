"""Define the initializations of A and B: the settings of each, and the facts that plan, training and report need.

docs/inits.md says what each computes; d2lora/adapters computes it.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeAlias

from pydantic import Field

from d2lora.settings.values import Positive, Strict, by_name


class Extra(NamedTuple):
    """A package that is not always installed, and the extra of pyproject.toml that has it."""

    package: str
    name: str

    @property
    def install(self) -> str:
        """Return the command that installs it."""
        return f"pip install -e '.[{self.name}]'"


class BaseInit(Strict):
    """What all initializations have: a name, and the facts below."""

    prepared: ClassVar[bool] = False  # A and B are computed, from the base's weights or rows, by a stage of its own
    random: ClassVar[bool] = False  # the preparation draws random numbers
    quantizes: ClassVar[bool] = False  # the base is a quantized one, with or without training: it has its own baseline
    allows_dropout: ClassVar[bool] = True
    adds_up: ClassVar[bool] = True  # two of its adapters have a sum that is an adapter
    any_layer: ClassVar[bool] = False  # also starts what PEFT adapts as parameters (experts), not linear layers alone
    variant: ClassVar[bool] = False  # begins as PEFT's default, and what an adapted layer computes is another
    exact_start: ClassVar[bool] = True  # the adapter adds exactly 0 at step 0, not 0 to rounding
    any_engine: ClassVar[bool] = True  # others than the model in memory compute its adapters, too
    extra: ClassVar[Extra | None] = None
    peft: ClassVar[Mapping[str, Any]] = MappingProxyType({})  # arguments of PEFT's LoraConfig

    name: str

    @property
    def looks_at(self) -> Literal["general", "task"] | None:
        """Return which rows a preparation is computed from: the warm-up's ("general"), the cell's own n ("task"), or
        none.
        """
        return None

    @property
    def rank_multiple(self) -> int:
        """Return the number that the rank must be a multiple of."""
        return 1

    def directions(self, r: int) -> int:
        """Return how many directions of a layer a preparation takes at rank r."""
        return r

    def offered(self, in_features: int, out_features: int) -> int:
        """Return how many directions a layer of this size has for a preparation to take."""
        return min(in_features, out_features)


class PreparedInit(BaseInit):
    """An initialization with a preparation that puts a part of the base's weight into A and B."""

    prepared: ClassVar[bool] = True
    allows_dropout: ClassVar[bool] = False  # it would drop parts of the base itself


class FromRowsInit(PreparedInit):
    """A preparation that looks at rows: the first `samples` at most."""

    data: Literal["general", "task"]
    samples: Positive

    @property
    def looks_at(self) -> Literal["general", "task"]:
        """Return whose rows the preparation looks at."""
        return self.data


class PlainInit(BaseInit):
    """PEFT's default: A Kaiming-uniform, B zero."""

    any_layer: ClassVar[bool] = True

    name: Literal["lora"] = "lora"


class GaussianInit(BaseInit):
    """A normal with standard deviation 1 / r, B zero (Hu et al. 2021)."""

    any_layer: ClassVar[bool] = True
    peft: ClassVar[Mapping[str, Any]] = MappingProxyType({"init_lora_weights": "gaussian"})

    name: Literal["gaussian"] = "gaussian"


class OrthogonalInit(BaseInit):
    """A and B random with B A = 0, to the precision of the base's dtype."""

    exact_start: ClassVar[bool] = False
    peft: ClassVar[Mapping[str, Any]] = MappingProxyType({"init_lora_weights": "orthogonal"})

    name: Literal["orthogonal"] = "orthogonal"

    @property
    def rank_multiple(self) -> int:
        """Return 2: A and B share an orthonormal basis, half of it each."""
        return 2


class PissaInit(PreparedInit):
    """The r largest singular values of W (Meng et al. 2024)."""

    name: Literal["pissa"] = "pissa"


class FastPissaInit(PreparedInit):
    """The r largest singular values of W by a randomized SVD of 16 iterations (Meng et al. 2024)."""

    random: ClassVar[bool] = True

    name: Literal["pissa_niter_16"] = "pissa_niter_16"


class OloraInit(PreparedInit):
    """The first r columns and rows of W's QR decomposition (Büyükakyüz 2024)."""

    name: Literal["olora"] = "olora"


class MiloraInit(PreparedInit):
    """The r smallest singular values of W (Wang et al. 2024, arXiv 2406.09044)."""

    name: Literal["milora"] = "milora"


class CordaKpmInit(FromRowsInit):
    """CorDA, knowledge-preserved: the smallest directions of W C, C the inputs' covariance (Yang et al. 2024)."""

    method: ClassVar[Literal["kpm", "ipm"]] = "kpm"  # PEFT's name of it

    name: Literal["corda_kpm"] = "corda_kpm"


class CordaIpmInit(FromRowsInit):
    """CorDA, instruction-previewed: the largest directions of W C, C the inputs' covariance (Yang et al. 2024)."""

    method: ClassVar[Literal["kpm", "ipm"]] = "ipm"  # PEFT's name of it

    name: Literal["corda_ipm"] = "corda_ipm"


class EvaInit(FromRowsInit):
    """A holds the inputs' principal components, B is zero (Paischer et al. 2024); a layer's rank is at most rho * r."""

    allows_dropout: ClassVar[bool] = True  # A and B hold nothing of the base's weight

    name: Literal["eva"] = "eva"
    rho: Annotated[float, Field(ge=1)]

    def directions(self, r: int) -> int:
        """Return the largest rank that a layer may get."""
        return math.ceil(r * self.rho)

    def offered(self, in_features: int, out_features: int) -> int:
        """Return the number of inputs, whose principal components are taken."""
        return in_features


class LoraGaInit(FromRowsInit):
    """Singular vectors of the loss's gradient (Wang et al. 2024, arXiv 2407.05000)."""

    random: ClassVar[bool] = True

    name: Literal["lora_ga"] = "lora_ga"
    direction: Literal["ArBr", "A2rBr", "ArB2r", "random"]  # which singular vectors A and B take
    gamma: Positive  # the larger, the smaller A and B

    def directions(self, r: int) -> int:
        """Return 2r: A and B take different ones."""
        return 2 * r


class LoftqInit(PreparedInit):
    """The r largest singular values of W - Q, Q being W in 4 bits (Li et al. 2023)."""

    quantizes: ClassVar[bool] = True
    adds_up: ClassVar[bool] = False  # each has the part of the base that quantization lost
    any_engine: ClassVar[bool] = False
    extra: ClassVar[Extra | None] = Extra("bitsandbytes", "loftq")

    name: Literal["loftq"] = "loftq"


class MultiLoraInit(BaseInit):
    """MultiLoRA (Wang et al. 2023, arXiv 2311.11501): parallel modules of rank r / modules, with learned scales from zero."""

    name: Literal["multilora"] = "multilora"
    modules: Positive

    @property
    def rank_multiple(self) -> int:
        """Return the number of modules, which have equal ranks."""
        return self.modules


class RsloraInit(BaseInit):
    """Rank-stabilized LoRA (Kalajdzievski 2023, arXiv 2312.03732): s = alpha / sqrt(r).

    Not on experts: PEFT doubles rank and alpha of fused ones, which leaves alpha / r as it is and not alpha / sqrt(r).
    """

    variant: ClassVar[bool] = True
    peft: ClassVar[Mapping[str, Any]] = MappingProxyType({"use_rslora": True})

    name: Literal["rslora"] = "rslora"


class DoraInit(BaseInit):
    """DoRA (Liu et al. 2024, arXiv 2402.09353): a magnitude m, trained from W's, for each output of W + s B A."""

    variant: ClassVar[bool] = True
    adds_up: ClassVar[bool] = False  # a magnitude scales the sum of the base's weight and the adapter's
    any_engine: ClassVar[bool] = False  # vLLM refuses it
    peft: ClassVar[Mapping[str, Any]] = MappingProxyType({"use_dora": True})

    name: Literal["dora"] = "dora"


# In the order in which a wrong name's line lists them.
AnyInit: TypeAlias = (
    PlainInit
    | GaussianInit
    | OrthogonalInit
    | PissaInit
    | FastPissaInit
    | OloraInit
    | MiloraInit
    | CordaKpmInit
    | CordaIpmInit
    | EvaInit
    | LoraGaInit
    | LoftqInit
    | MultiLoraInit
    | RsloraInit
    | DoraInit
)

Init: TypeAlias = Annotated[AnyInit, Field(discriminator="name")]

_BY_NAME: dict[str, type[BaseInit]] = by_name(AnyInit)

INITS: tuple[type[BaseInit], ...] = tuple(_BY_NAME.values())

INIT_NAMES: tuple[str, ...] = tuple(_BY_NAME)

PLAIN: str = PlainInit().name  # what others are compared with
QUANTIZING: frozenset[str] = frozenset(name for name, init in _BY_NAME.items() if init.quantizes)


def init_of(name: str) -> type[BaseInit]:
    """Return the class of the initialization with this name. KeyError if there is none."""
    return _BY_NAME[name]
