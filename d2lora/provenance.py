"""Collect what a record says of how it was made: packages, git, hardware, peak memory."""

import contextlib
import functools
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from d2lora.outputs import ROOT

_PROC = Path("/proc/self")
_CODE = ("run.py", "d2lora", "hydra_plugins")  # the code that makes records; the configuration is in their specs
_PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "tokenizers", "lm-eval", "d2lora")


def provenance() -> dict[str, Any]:
    """Return packages, Python, git and hardware of this process."""
    return _software() | _hardware()


@functools.cache
def _software() -> dict[str, Any]:
    """Return the versions of packages and Python, and the commit."""
    return {"packages": _versions(), "python": platform.python_version(), "git": _git()}


def _torch() -> ModuleType | None:
    """Return torch if this process has imported it: a check of the data does not need it."""
    return sys.modules.get("torch")


def _hardware() -> dict[str, Any]:
    """Return machine, processor and GPU, and the number of threads."""
    hardware: dict[str, Any] = {"machine": platform.machine(), "cpu": _cpu()}
    if torch := _torch():
        hardware |= {"cores": torch.get_num_threads(), "simd": torch.backends.cpu.get_cpu_capability()}
        if torch.cuda.is_available():
            hardware["gpu"] = torch.cuda.get_device_name()
    return {"hardware": hardware, "threads": hardware.get("cores", 1)}


@functools.cache
def _cpu() -> str:
    """Return the processor's name, as far as the system tells."""
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open() as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _versions() -> dict[str, str]:
    """Return the versions of installed packages."""
    installed = {}
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            installed[package] = version(package)
    return installed


def _git() -> dict[str, Any] | None:
    """Return the project's commit and whether its code differs from it; None outside a checkout."""
    try:
        commit = _git_says("rev-parse", "HEAD")
        status = _git_says("status", "--porcelain", "-uno", "--", *_CODE)
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "dirty": bool(status)}


def _git_says(*arguments: str) -> str:
    """Return the output of a git command in the project's folder."""
    process = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return process.stdout.strip()


def reset_peak_memory() -> None:
    """Reset the process's peak memory.

    Peak resident memory can be reset on Linux only; elsewhere it stays that since the start.
    """
    if (torch := _torch()) and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        (_PROC / "clear_refs").write_text("5")


def peak_memory_mb() -> float:
    """Return the peak GPU memory in MiB; without a GPU the peak resident memory of the whole process."""
    import resource

    if (torch := _torch()) and torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    with contextlib.suppress(OSError):
        if match := re.search(r"^VmHWM:\s*(\d+) kB", (_PROC / "status").read_text(), re.MULTILINE):
            return round(int(match[1]) / 2**10, 1)
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes on macOS, KiB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)
