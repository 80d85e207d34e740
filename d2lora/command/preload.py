"""Import what a stage needs, once, in the process whose forks will do the stages (forks.py). To import this module is to do so."""

import contextlib
import gc
import importlib
import os
import signal
import sys

from d2lora.collection import uncollected

_MODULES = (
    "d2lora.command.job",
    "hydra_plugins.hydra_joblib_launcher._core",
    "torch",
    "d2lora.base",
    "d2lora.train.training",
    "d2lora.evaluate.harness",
)


def _import_all() -> None:
    """Import one module after another, and end this process if the sweep, its parent, has ended meanwhile.

    What can't be imported is left to the workers: the first stage that needs it fails, and says why.
    """
    sweep = os.getppid()
    for module in _MODULES:
        if os.getppid() != sweep:
            sys.exit()
        with contextlib.suppress(Exception):
            importlib.import_module(module)


heeded = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the sweep's to answer
with uncollected():
    _import_all()
gc.freeze()  # a collection in a fork would write to, and so copy, all that it shares
signal.signal(signal.SIGINT, heeded)
