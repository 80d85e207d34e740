"""Start joblib's workers as forks of one process that has imported what stages need.

The imports take 5 s of a processor. Workers that joblib starts in its own way each repeat them, once the plan is checked; forks
share them, and their memory, and they are done while the plan is being checked.
"""

import multiprocessing
import os
import sys
from multiprocessing import forkserver
from pathlib import Path

from d2lora.command.hardware import gpus_here


def import_ahead(workers: int) -> None:
    """Begin to import what joblib's workers need, of which `workers` will run at once, in a process beside this one.

    Nothing is begun for a single worker, which joblib runs in this process, and where forks are not safe: a library that uses a
    GPU while it is imported makes it useless for forks, and macOS forbids most of its own libraries in them.
    """
    if workers < 2 or sys.platform != "linux" or gpus_here() or Path("/dev/kfd").exists():  # kfd: AMD's GPUs
        return
    from joblib.externals.loky.backend.context import set_start_method

    _limit_threads(workers)
    set_start_method("forkserver", force=True)
    multiprocessing.set_forkserver_preload(["d2lora.command.preload"])
    forkserver.ensure_running()


def _limit_threads(workers: int) -> None:
    """Leave each worker its share of the processors, unless the user says how many threads: as joblib does for workers of its own."""
    from joblib import cpu_count
    from joblib.parallel import ParallelBackendBase

    for name in ParallelBackendBase.MAX_NUM_THREADS_VARS:
        os.environ.setdefault(name, str(max(cpu_count() // workers, 1)))
