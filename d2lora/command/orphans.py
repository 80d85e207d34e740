"""End a launcher's worker when the sweep that started it has ended."""

import contextlib
import os
import signal
import threading
import time

import psutil

_SECONDS = 1.0  # between two looks


def end_with_sweep(sweep: int) -> None:
    """Kill this process within about a second of the end of the sweep that started it, which is given by its process id.

    A sweep that was killed can't end its workers itself. What is published by then stays; a training goes on from its checkpoint.
    """
    threading.Thread(target=_watch, args=(sweep,), daemon=True).start()


def _watch(sweep: int) -> None:
    """Wait until the sweep has ended. It is not the parent where workers are forks of another process."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(sweep)
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)  # its work can't be told to stop: it may be inside a library
