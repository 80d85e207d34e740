"""End a launcher's worker when the sweep that started it has ended."""

import os
import signal
import threading
import time

_SECONDS = 1.0  # between two looks


def end_with_parent(parent: int) -> None:
    """Kill this process within about a second of the end of its parent, which is given by its process id.

    A parent that was killed can't end its workers itself. What is published by then stays; a training goes on from its checkpoint.
    """
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    """Wait until the process has another parent, as orphans get one; it may have it from the start."""
    while os.getppid() == parent:
        time.sleep(_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)  # its work can't be told to stop: it may be inside a library
