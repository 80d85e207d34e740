"""Weights & Biases mirrors the records; it is never the source of a number."""
