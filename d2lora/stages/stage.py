"""Define a stage: a unit of work with a key. Each kind's file says what its key covers and what it does."""

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import ClassVar, Generic, TypeVar

from d2lora.keys import Identity, digest


class Spec(ABC):
    """Everything that can change a stage's result, except its parent, and nothing else: no path, device or name.

    `VERSION` must be raised when the kind's code changes what it computes; tests/train/test_golden.py fails if it is
    not.
    """

    KIND: ClassVar[str]
    VERSION: ClassVar[int]

    @abstractmethod
    def content(self) -> Identity:
        """Return the spec as JSON. It is a part of the key, so its names and values must never change by accident."""

    def cost(self, samples: int) -> float:
        """Return the relative length of the work, in samples that are trained on."""
        return samples


S = TypeVar("S", bound=Spec, covariant=True)
_UNKNOWN_SAMPLES = 10**6  # of a data set that is not on this machine yet: taken to be longer than any other


@dataclass(frozen=True)
class Stage(Generic[S]):
    """A unit of work. `subject`, `label` and `samples` are for display and planning, and no part of the key.

    `subject` names what is evaluated or checked (a benchmark; "training set / benchmark"). `samples` are rows x epochs,
    None while the size of the data set is unknown.
    """

    spec: S
    parent: "Stage[Spec] | None" = None
    label: str = field(default="", compare=False)
    samples: int | None = field(default=0, compare=False)
    subject: str = field(default="", compare=False)
    # More that it waits for; its spec has their keys.
    others: "tuple[Stage[Spec], ...]" = field(default=(), compare=False)

    @property
    def kind(self) -> str:
        """Return the name of its kind."""
        return self.spec.KIND

    @property
    def parents(self) -> "tuple[Stage[Spec], ...]":
        """Return the stages that must be done before."""
        return ((self.parent,) if self.parent else ()) + self.others

    @functools.cached_property
    def key(self) -> str:
        """Return 20 hex digits of the SHA-256 over kind, version, spec and the parent's key."""
        parent = self.parent.key if self.parent else None
        content = {"stage": self.kind, "version": self.spec.VERSION, "spec": self.spec.content(), "parent": parent}
        return digest(content)

    @property
    def cost(self) -> float:
        """Return the relative length, in samples that are trained on."""
        return self.spec.cost(_UNKNOWN_SAMPLES if self.samples is None else self.samples)

    def __hash__(self) -> int:
        return hash(self.key)


def versions(*packages: str) -> Identity:
    """Return the versions of packages whose releases can change results (TRL's ORPO loss, lm-eval's tasks)."""
    return {package: version(package) for package in packages}
