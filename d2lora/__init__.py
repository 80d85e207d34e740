"""d2lora: grids of two-phase LoRA training (D2LoRA), from one command to a table."""

__version__ = "0.1.0"
