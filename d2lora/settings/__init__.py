"""What a user may say: one typed, checked configuration. docs/extending.md says how to add a choice."""

from d2lora.settings.config import Config, Report, parse
from d2lora.settings.inits import INIT_NAMES, INITS, PLAIN, QUANTIZING, Init, PlainInit, init_of
from d2lora.settings.methods import METHOD_NAMES, METHODS, Method, Orpo, Sft, method_of
from d2lora.settings.names import key_like
from d2lora.settings.recipe import ALL_LINEAR, RATE, Lora, Machine, Recipe, Training
from d2lora.settings.tasks import Benchmark, Data, HarnessTask, Model, Task, Warmup
from d2lora.settings.values import amount, fields

__all__ = [
    "ALL_LINEAR",
    "INITS",
    "INIT_NAMES",
    "METHODS",
    "METHOD_NAMES",
    "PLAIN",
    "QUANTIZING",
    "RATE",
    "Benchmark",
    "Config",
    "Data",
    "HarnessTask",
    "Init",
    "Lora",
    "Machine",
    "Method",
    "Model",
    "Orpo",
    "PlainInit",
    "Recipe",
    "Report",
    "Sft",
    "Task",
    "Training",
    "Warmup",
    "amount",
    "fields",
    "init_of",
    "key_like",
    "method_of",
    "parse",
]
