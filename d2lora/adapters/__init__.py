"""Initialize, save and load LoRA adapters on a base."""
