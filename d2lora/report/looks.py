"""The facts of methods and initializations that a report shows: order, label, colour, marker. The only file that has them."""

from d2lora.settings import QUANTIZING

__all__ = ["COLOURS", "MARKS", "METHODS", "PLAIN", "QUANTIZING"]

METHODS = ("sft", "dpo", "orpo")  # in the order of tables
# Okabe and Ito's, told apart by everyone; in grey by lightness and markers.
COLOURS = {"sft": "#0072b2", "dpo": "#d55e00", "orpo": "#009e73"}
MARKS = {"sft": "o", "dpo": "s", "orpo": "^"}
PLAIN = "lora"  # the initialization that others are compared with
