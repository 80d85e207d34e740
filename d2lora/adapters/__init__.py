"""LoRA adapters on a base: how they start, are saved, and read again."""
