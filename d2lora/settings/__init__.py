"""What a user may say: one typed, checked configuration. docs/extending.md says how to add a choice."""

from d2lora.settings.config import Config, Wandb, parse
from d2lora.settings.inits import QUANTIZING, Init
from d2lora.settings.methods import Method
from d2lora.settings.recipe import Epochs, Lora, Rates, Recipe
from d2lora.settings.tasks import Benchmark, Data, Model, Prompt, Task, Turn, Warmup
from d2lora.settings.values import Amount, PathText, Positive, Rate, Seed, Template, Text, Value, amount, fields

__all__ = [
    "QUANTIZING",
    "Amount",
    "Benchmark",
    "Config",
    "Data",
    "Epochs",
    "Init",
    "Lora",
    "Method",
    "Model",
    "PathText",
    "Positive",
    "Prompt",
    "Rate",
    "Rates",
    "Recipe",
    "Seed",
    "Task",
    "Template",
    "Text",
    "Turn",
    "Value",
    "Wandb",
    "Warmup",
    "amount",
    "fields",
    "parse",
]
