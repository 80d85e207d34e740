"""A stage: a unit of work with a key. What each kind covers and does stands in the kind's own file."""

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, ClassVar, Generic, TypeVar

from d2lora.keys import digest

Identity = dict[str, Any]  # what tells one data set, model or text template from another, as JSON


class Spec(ABC):
    """What can change a stage's result, and its parent's key apart, nothing else: no path, device or name.

    `VERSION` is raised by hand when the kind's code changes what it computes: tests/test_golden.py fails where results move and
    it does not.
    """

    KIND: ClassVar[str]
    VERSION: ClassVar[int]

    @abstractmethod
    def content(self) -> Identity:
        """Return the spec as JSON: a part of the key, so its names and values never change by accident."""

    def cost(self, samples: int) -> float:
        """Return the relative length of the work, a sample that is trained on as 1."""
        return samples


S = TypeVar("S", bound=Spec, covariant=True)
_UNKNOWN_SAMPLES = 10**6  # a data set that is not read yet: longer than what is known


@dataclass(frozen=True)
class Stage(Generic[S]):
    """A unit of work. `subject`, `label` and `samples` are for people and no part of the key.

    `subject` is the name of what is evaluated or checked (a benchmark; "training set / benchmark"), `samples` are rows x epochs to
    be seen, None where the data set's size isn't known yet.
    """

    spec: S
    parent: "Stage[Spec] | None" = None
    label: str = field(default="", compare=False)
    samples: int | None = field(default=0, compare=False)
    subject: str = field(default="", compare=False)
    others: "tuple[Stage[Spec], ...]" = field(
        default=(), compare=False
    )  # more that it waits for; its spec has their keys

    @property
    def kind(self) -> str:
        return self.spec.KIND

    @property
    def parents(self) -> "tuple[Stage[Spec], ...]":
        """Return the stages that must be done before."""
        return ((self.parent,) if self.parent else ()) + self.others

    @functools.cached_property
    def key(self) -> str:
        """20 hex digits of SHA-256 over kind, version, spec and the parent's key."""
        parent = self.parent.key if self.parent else None
        content = {"stage": self.kind, "version": self.spec.VERSION, "spec": self.spec.content(), "parent": parent}
        return digest(content)

    @property
    def cost(self) -> float:
        """Relative length, a sample that is trained on as 1."""
        return self.spec.cost(_UNKNOWN_SAMPLES if self.samples is None else self.samples)

    def __hash__(self) -> int:
        return hash(self.key)


def versions(*packages: str) -> Identity:
    """Return the versions of packages whose releases have changed results (TRL's ORPO loss, lm-eval's tasks)."""
    return {package: version(package) for package in packages}
