"""Run the tests of this folder without torch, which takes longer to import than most of them to run."""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest


class NoTorch:
    """Refuses imports of torch. transformers and others look for it with find_spec first, and are told that it is not
    installed.
    """

    def __init__(self) -> None:
        self.find = importlib.util.find_spec

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError("a test of tests/unit imports torch: it belongs in tests/train", name="torch")
        return None

    def installed(self, name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name.split(".")[0] == "torch" else self.find(name, package)


def pytest_configure(config: pytest.Config) -> None:
    """Hide torch if only this folder is run. With others it may be loaded already, and they need it."""
    here = Path(__file__).parent
    paths = [Path(argument.split("::")[0]).resolve() for argument in config.args]
    if all(path.is_relative_to(here) for path in paths):
        guard = NoTorch()
        sys.meta_path.insert(0, guard)
        importlib.util.find_spec = guard.installed
