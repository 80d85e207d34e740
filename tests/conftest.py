"""Set up the tests. Everything that trains uses the lab's rows and a tiny random model."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test uses the Hub
os.environ["WANDB_MODE"] = "disabled"  # tests of W&B set it themselves


def pytest_configure(config: pytest.Config) -> None:
    """Run the tests on the CPU even if there is a GPU, except those of `-m gpu`."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_finish() -> None:
    """Exclude imported objects from garbage collection: each training ends with one, which would take long."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def cell() -> Callable:
    """Return the function cell("n=10", ...) -> the checked cell that the command line would give."""
    import composing  # late: it imports the package

    return composing.cell


@pytest.fixture
def run(tmp_path: Path) -> Callable:
    """Return the function run("n=10", ...) -> the finished process of `python run.py`, with output under tmp_path."""

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


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no figure files, which takes longer than the rest of a report: for tests that look at none."""
    monkeypatch.setattr("d2lora.report.figures.save", lambda stem, make: [])


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a random Llama of two layers with the lab's tokenizer, and return its folder."""
    from doing import save_tiny  # late: it imports torch

    return save_tiny(tmp_path_factory.mktemp("tiny"))
