"""Say how fast hardware is that nothing was measured on: a GPU of the table, or this machine's processor.

The shares of a data sheet's rates that are reached were measured on an H200 (docs/training.md): 14 % of its FLOP/s in training, and
0.1 s for a token of 64 answers of an 8 B model, which is 3 ms a layer: launching kernels takes the time, not reading weights. That build
launched three times as many kernels a pair (docs/performance.md), and none since was measured on a GPU: these forecasts are rather too long.
A processor's rates are those of the lab's stages, two workers of one thread on two cores, and of SmolLM2-135M.
"""

import functools
import os
import shutil
import subprocess
from dataclasses import dataclass

from d2lora.command.sizes import Shape
from d2lora.settings import Config
from d2lora.settings.gpus import Gpu, gpu_in

_MFU = 0.14
_LAYER = 3e-3  # seconds of a GPU for a layer's part of one generated token
_SVD = 1e12  # FLOP/s of a GPU's decompositions: these do not run on tensor cores
_LOAD = 1e9  # bytes/s of weights from a disk
_IMPORTS = 5.5  # seconds until a process has its libraries, of a processor that does nothing else

_THREAD = 80e9  # FLOP/s of a processor's thread: DPO of SmolLM2-135M with AVX-512, 2.6 s a pair (docs/training.md)
_THREAD_LAYER = (
    6e-3  # seconds of a thread for a layer's part of a pass and its step beyond its tokens: the lab's trainings
)
_THREAD_WIDTH = (
    6e-8  # and for each token, layer and unit of width beyond its FLOP: what is between the products of matrices
)
_THREAD_TOKEN = 1e-3  # and for a layer's part of one generated token
_PROCESS = 0.7 * 2**30  # bytes of a process with its libraries


@dataclass(frozen=True)
class Device:
    """What work runs on: FLOP/s that training reaches, seconds of a layer in a step, of a token, layer and unit of width
    beyond FLOP, and of a layer in a generated token; memory."""

    label: str  # how its rate is said
    flops: float
    bandwidth: float
    step: float
    width: float
    token: float
    svd: float
    process: float  # bytes beside the model's
    memory: float | None  # bytes; None where nothing says what is too much
    gpu: Gpu | None = None

    def start(self, weights: float) -> float:
        """Return the seconds until a process has its libraries and a base of so many bytes."""
        return _IMPORTS + weights / _LOAD

    def decode(self, shape: Shape, weights: float) -> float:
        """Return the seconds of one token of a batch's answers: the weights are read, and each layer is launched."""
        return max(weights / self.bandwidth, shape.layers * self.token)


def device(config: Config, name: str | None) -> Device:
    """Return the GPU of this name, or one of the same family as the table has; a processor's threads without a name."""
    if name is None:
        threads = config.recipe.threads or os.cpu_count() or 1
        label = f"a processor's {_THREAD / 1e9:.0f} GFLOP/s a thread"
        return Device(
            label,
            _THREAD * threads,
            1e10,
            _THREAD_LAYER,
            _THREAD_WIDTH,
            _THREAD_TOKEN,
            _THREAD * threads,
            _PROCESS,
            None,
        )
    known = gpu_in(name)
    gpu = known or gpu_in("a100")
    assert gpu is not None, "in the table"
    whose = f"{gpu.label}'s" if known else f"an {gpu.label}'s (for {name})"
    label = f"{whose} {gpu.flops / 1e12:.0f} TFLOP/s at {100 * _MFU:.0f} % MFU, as an earlier build"
    return Device(
        label, gpu.flops * _MFU, gpu.bandwidth, 0.0, 0.0, _LAYER, _SVD, 2**30, gpu.memory if known else None, gpu
    )


def gpu_here() -> str | None:
    """Return the name of this machine's first GPU as its driver says it; None if there is none."""
    return next(iter(gpus_here()), None)


@functools.cache
def gpus_here() -> tuple[str, ...]:
    """Return the names of this machine's GPUs as their driver says them."""
    if shutil.which("nvidia-smi") is None or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return ()
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in lines)
