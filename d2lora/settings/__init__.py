"""What a user may say: one typed, checked configuration. docs/extending.md says how to add a choice."""

from d2lora.settings.config import Config, Report, Wandb, parse
from d2lora.settings.inits import INIT_NAMES, INITS, PLAIN, QUANTIZING, Init, PlainInit, init_of
from d2lora.settings.methods import METHOD_NAMES, METHODS, Dpo, Method, Orpo, Sft, method_of
from d2lora.settings.recipe import RATE, Epochs, Lora, Machine, Rates, Recipe, Training
from d2lora.settings.tasks import Benchmark, Data, HarnessTask, Model, Prompt, Task, Turn, Warmup
from d2lora.settings.values import Amount, PathText, Positive, Rate, Seed, Template, Text, Value, amount, fields

__all__ = [
    "INITS",
    "INIT_NAMES",
    "METHODS",
    "METHOD_NAMES",
    "PLAIN",
    "QUANTIZING",
    "RATE",
    "Amount",
    "Benchmark",
    "Config",
    "Data",
    "Dpo",
    "Epochs",
    "HarnessTask",
    "Init",
    "Lora",
    "Machine",
    "Method",
    "Model",
    "Orpo",
    "PathText",
    "PlainInit",
    "Positive",
    "Prompt",
    "Rate",
    "Rates",
    "Recipe",
    "Report",
    "Seed",
    "Sft",
    "Task",
    "Template",
    "Text",
    "Training",
    "Turn",
    "Value",
    "Wandb",
    "Warmup",
    "amount",
    "fields",
    "init_of",
    "method_of",
    "parse",
]
