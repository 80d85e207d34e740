"""How long-running work reports its progress."""

from collections.abc import Callable
from typing import TypeAlias

# Called with (units done, units in all): steps of a training, requests of an evaluation, layers of an initialization.
Progress: TypeAlias = Callable[[int, int], None]
