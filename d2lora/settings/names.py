"""List the keys of all settings, to tell a mistyped key from one that a file only leaves out."""

import difflib
import functools
import typing
from collections.abc import Iterator

from pydantic import BaseModel

from d2lora.settings.config import Config
from d2lora.settings.methods import METHOD_NAMES
from d2lora.settings.recipe import RATE, WARMUP

_NAMED = ("task.benchmark", "task.validation")  # mappings of names that the user chose


def key_like(key: str) -> str | None:
    """Return the key that a typed one may have been meant to be, None if there is none; the typed one itself if there is such a key."""
    typed, name = _without_name(key)
    if typed in _keys():
        return key
    ends = [key for key in _keys() if key.endswith(f".{typed}")]  # lr alone, or beta
    like = sorted(ends, key=len) or difflib.get_close_matches(typed, _keys(), n=1, cutoff=0.8)
    return like[0].replace("NAME", name) if like else None


def _without_name(key: str) -> tuple[str, str]:
    """Return a key with NAME for a benchmark's own name, and that name: task.benchmark.mine.limit."""
    for group in _NAMED:
        name, _, rest = key.removeprefix(f"{group}.").partition(".")
        if key.startswith(f"{group}.") and rest:
            return f"{group}.NAME.{rest}", name
    return key, "NAME"


@functools.cache
def _keys() -> list[str]:
    phases = (WARMUP, *METHOD_NAMES)
    rates = [f"{key}.{phase}" for key in (RATE, "recipe.epochs") for phase in phases]
    return sorted({*_of(Config, ""), *rates, f"{RATE}_factor"})


def _of(model: type[BaseModel], before: str) -> Iterator[str]:
    """Yield the keys of a class of settings, and of those in it."""
    for name, field in model.model_fields.items():
        key = before + name
        yield key
        inner = f"{key}.NAME." if key in _NAMED else f"{key}."
        for one in _classes(field.annotation):
            yield from _of(one, inner)


def _classes(annotation: object) -> Iterator[type[BaseModel]]:
    """Yield the classes of settings in an annotation: of a union each, of a mapping its values'; those in lists have no keys."""
    if typing.get_origin(annotation) is list:
        return
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _classes(part)
