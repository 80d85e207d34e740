"""Spell JSON in one way, and name things by the hash of it."""

import hashlib
import json
from typing import Any, TypeAlias

Identity: TypeAlias = dict[str, Any]  # what tells one data set, model or text template from another, as JSON


def canonical(value: object) -> str:
    """Return a value's JSON in its only spelling. TypeError or ValueError for values that JSON can't carry exactly."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    if json.loads(text) != value:
        raise ValueError(f"JSON does not carry {value!r} exactly")
    return text


def digest(value: object, digits: int = 20) -> str:
    """Return the first hex digits of a JSON value's SHA-256."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:digits]
