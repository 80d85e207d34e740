"""Report how long-running work gets on: the units that are done, and a training's current values."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TypeAlias

# Called with (units done, units in all): steps of a training, requests of an evaluation, layers of an initialization.
Progress: TypeAlias = Callable[[int, int], None]

# Called with (values by name, samples seen).
Log: TypeAlias = Callable[[dict[str, float], int], None]

_log: ContextVar[Log | None] = ContextVar("log", default=None)


@contextlib.contextmanager
def logged_by(log: Log) -> Iterator[None]:
    """Give the values of a training inside the `with` block to a function, W&B's for example."""
    token = _log.set(log)
    try:
        yield
    finally:
        _log.reset(token)


def log(values: dict[str, float], samples_seen: int) -> None:
    """Log a training's current values, if there is anyone to log them."""
    if function := _log.get():
        function(values, samples_seen)
