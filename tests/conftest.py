"""Tests of what a user sees. Everything that trains uses the lab's rows and a tiny random model."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test asks the Hub
os.environ["WANDB_MODE"] = "disabled"  # but where a test asks for it


def pytest_configure(config: pytest.Config) -> None:
    """Whatever the machine has, the tests run on its CPU, but for those of `-m gpu`."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_finish() -> None:
    """What the imports have left is no garbage: without it, the collection that each training ends with takes no time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def cell() -> Callable:
    """cell("n=10", ...) -> the checked cell that the command line would give."""
    import composing  # late: it imports the package

    return composing.cell


@pytest.fixture
def run(tmp_path: Path) -> Callable:
    """run("n=10", ...) -> the finished process of `python run.py`, typed in another folder, output under tmp_path."""

    def start(*arguments: str, module: str | None = None, code: int | None = 0) -> subprocess.CompletedProcess:
        program = ["-m", module] if module else [str(ROOT / "run.py")]
        given = [] if module or "--help" in arguments else [f"output={tmp_path / 'out'}"]
        environment = os.environ | ({"PYTHONPATH": str(ROOT)} if module else {})
        done = subprocess.run(
            [sys.executable, *program, *arguments, *given],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
            timeout=600,
        )
        assert code is None or done.returncode == code, done.stdout + done.stderr
        return done

    return start


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with the lab's tokenizer."""
    from doing import save_tiny  # late: it imports torch

    return save_tiny(tmp_path_factory.mktemp("tiny"))
