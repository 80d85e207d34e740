"""How methods look in tables and figures, and what is special of initializations, by name; the facts are the settings classes'."""

from d2lora.settings import METHOD_NAMES, PLAIN, QUANTIZING, method_of

__all__ = ["COLOURS", "MARKS", "METHODS", "PLAIN", "QUANTIZING"]

METHODS = METHOD_NAMES  # in the order of tables
COLOURS = {name: method_of(name).colour for name in METHODS}
MARKS = {name: method_of(name).marker for name in METHODS}
