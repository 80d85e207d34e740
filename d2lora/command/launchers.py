"""List what Hydra's launchers do differently and a sweep must know: one table, a line for each launcher."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
from hydra.plugins.launcher import Launcher as HydraLauncher
from omegaconf import DictConfig

from d2lora.command.forks import import_ahead
from d2lora.command.hardware import gpus_here
from d2lora.command.orphans import end_with_sweep
from d2lora.errors import UserError

SLURM_SECONDS = 20  # between two queries of Slurm's queue


def _nothing() -> None:
    """Do nothing."""


def _nothing_ahead(_workers: int) -> None:
    """Start nothing for workers before the first job."""


def _as_it_is(_launcher: HydraLauncher) -> None:
    """Leave a launcher as Hydra made it."""


def _no_jobs(_name: str) -> list[str]:
    """Return no jobs."""
    return []


@dataclass(frozen=True)
class Launcher:
    """How a launcher treats jobs, beyond what Hydra's interface promises."""

    # Each job has a process of its own. If one dies the others go on, so all that died may be tried again together.
    apart: bool = False
    gpu_each: bool = False  # each job has a GPU of its own, if the launcher's settings ask for one
    workers: str = ""  # the setting that says how many jobs run at once; -1 is one for each processor
    ahead: Callable[[int], None] = _nothing_ahead  # called with `count` while the plan is still being checked
    begin: Callable[[HydraLauncher], None] = _as_it_is  # called before the first job
    dismiss: Callable[[], None] = _nothing  # ends workers that would stay after the last job
    wait: Callable[[], None] = (
        _nothing  # for jobs on this machine that the launcher stopped waiting for when another failed
    )
    queued: Callable[[str], list[str]] = _no_jobs  # the jobs of a sweep, by its name, that go on without this process

    def count(self, config: DictConfig) -> int:
        """Return how many jobs run at once, as the launcher's config says."""
        count = (config.hydra.launcher.get(self.workers) if self.workers else None) or 1
        return count if count > 0 else os.cpu_count() or 1

    def engines(self, wanted: int | None) -> int:
        """Return in how many jobs engines are started: as many as are `wanted`, or as there are GPUs for jobs of their own."""
        return wanted or (len(gpus_here()) if self.gpu_each else 0) or 1

    def wait_for_siblings(self, name: str) -> None:
        """Wait until none of the sweep's jobs is running. A queue that does not answer is queried again."""
        self.wait()
        while self._busy(name):
            time.sleep(SLURM_SECONDS)

    def _busy(self, name: str) -> bool:
        """Tell whether jobs of the sweep are queued or running; if the queue does not answer, they may be."""
        try:
            return bool(self.queued(name))
        except UserError:
            return True


def launcher_of(config: DictConfig) -> Launcher:
    """Return what is known of the launcher that a config names, by its class."""
    return _LAUNCHERS.get(config.hydra.launcher.get("_target_", "").rpartition(".")[2], Launcher())


def _end_joblib_with_sweep(launcher: HydraLauncher) -> None:
    """Have joblib's workers end with this process: they would finish their job, and wait five minutes for another."""
    settings = launcher.joblib  # type: ignore[attr-defined]  # what it gives to joblib.Parallel
    settings |= {"initializer": end_with_sweep, "initargs": (os.getpid(),)}


def _dismiss_joblib() -> None:
    """End joblib's workers while the report is written: joblib would keep them, and ending takes seconds."""
    from joblib.externals.loky import get_reusable_executor

    get_reusable_executor(reuse=True).shutdown(wait=False)


def _wait_for_submitit() -> None:
    """Wait for submitit's processes on this machine: submitit stops waiting for them when one fails."""
    children = psutil.Process().children(recursive=True)
    psutil.wait_procs([p for p in children if "submitit" in " ".join(command_line(p))])


def command_line(process: psutil.Process) -> list[str]:
    """Return a process's command line; [] if it has ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _slurm_jobs(name: str) -> list[str]:
    """Return the ids of the jobs with this name that Slurm has queued or running. UserError if Slurm does not answer."""
    if not shutil.which("squeue"):
        return []
    command = ["squeue", "--me", "--noheader", "--format=%i", f"--name={name}"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:  # if this counted as "no jobs", they would be started twice
        raise UserError(
            f"Slurm does not say whether jobs of this sweep are queued or running: squeue: {answer.stderr.strip()}"
        )
    return answer.stdout.split()


_LAUNCHERS = {  # by the name of the class; basic and any other launcher need nothing of this
    "JoblibLauncher": Launcher(
        workers="n_jobs", ahead=import_ahead, begin=_end_joblib_with_sweep, dismiss=_dismiss_joblib
    ),
    "LocalLauncher": Launcher(apart=True, wait=_wait_for_submitit),
    "RayLauncher": Launcher(gpu_each=True),
    "SlurmLauncher": Launcher(apart=True, wait=_wait_for_submitit, queued=_slurm_jobs),
}
