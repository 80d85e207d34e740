"""What of Hydra's launchers matters to a sweep: one table, a line for each. All else is the launcher's own affair."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil
from omegaconf import DictConfig

from d2lora.errors import UserError

SLURM_SECONDS = 20  # between two looks at Slurm's queue


def _nobody() -> None:
    pass


def _no_jobs(_name: str) -> list[str]:
    return []


@dataclass(frozen=True)
class Launcher:
    """How a launcher treats jobs, beyond what Hydra promises."""

    # Each job has a process of its own: one that dies takes no other along, so those that died may be tried again together.
    apart: bool = False
    workers: str = ""  # the setting that says how many jobs run at once; -1 is one for each processor
    dismiss: Callable[[], None] = _nobody  # ends workers that are kept after the last job
    wait: Callable[[], None] = _nobody  # for jobs of this machine that it gave up on as another failed
    queued: Callable[[str], list[str]] = _no_jobs  # a sweep's jobs, by its name, that outlive this process

    def count(self, config: DictConfig) -> int:
        """How many jobs it runs at once, as far as its config says."""
        count = (config.hydra.launcher.get(self.workers) if self.workers else None) or 1
        return count if count > 0 else os.cpu_count() or 1

    def wait_for_siblings(self, name: str) -> None:
        """Wait until none of the sweep's jobs is at work. While the queue does not answer, it is asked again."""
        self.wait()
        while self._busy(name):
            time.sleep(SLURM_SECONDS)

    def _busy(self, name: str) -> bool:
        try:
            return bool(self.queued(name))
        except UserError:
            return True


def launcher_of(config: DictConfig) -> Launcher:
    """What is known of the launcher that a config names, by its class."""
    return _LAUNCHERS.get(config.hydra.launcher.get("_target_", "").rpartition(".")[2], Launcher())


def _dismiss_joblib() -> None:
    """Have joblib's workers end beside the report: they take seconds, and it would keep them for another call."""
    from joblib.externals.loky import get_reusable_executor

    get_reusable_executor(reuse=True).shutdown(wait=False)


def _wait_for_submitit() -> None:
    """Wait for submitit's processes of this machine: it stops waiting for them when one fails."""
    children = psutil.Process().children(recursive=True)
    psutil.wait_procs([p for p in children if "submitit" in " ".join(command_line(p))])


def command_line(process: psutil.Process) -> list[str]:
    """What a process was started with; nothing of one that has ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _slurm_jobs(name: str) -> list[str]:
    """The jobs of this name that Slurm has queued or running. UserError if Slurm does not answer."""
    if not shutil.which("squeue"):
        return []
    command = ["squeue", "--me", "--noheader", "--format=%i", f"--name={name}"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:  # taken for "no jobs" it would have them started twice
        raise UserError(f"Slurm does not say whether jobs of this sweep are left: squeue: {answer.stderr.strip()}")
    return answer.stdout.split()


_LAUNCHERS = {  # by the name of its class; basic and ray need none of this, as any that is not named
    "JoblibLauncher": Launcher(workers="n_jobs", dismiss=_dismiss_joblib),
    "LocalLauncher": Launcher(apart=True, wait=_wait_for_submitit),
    "SlurmLauncher": Launcher(apart=True, wait=_wait_for_submitit, queued=_slurm_jobs),
}
