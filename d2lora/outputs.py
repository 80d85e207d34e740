"""Define the paths in an output folder, and write files atomically, with locks.

store/<kind>/<key>/   records           checkpoints/<key>/   of trainings that were stopped
manifests/<sweep>     planned grids     reference/<policy>/  log-probabilities of DPO's reference
failed/<key>          why stages failed fingerprints/, proofs/, passes/, models/   caches
report/               tables, figures   progress/<key>, wandb/, hydra/
engine/<token>.log    of engines that failed
"""

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2lora.settings import Config

# The project's folder: relative paths are meant from here, wherever a command is typed.
ROOT = Path(__file__).parent.parent
_LOCKS = ".locks"  # in the store, beside the folders of the kinds


def project_path(typed: str) -> Path:
    """Return the folder that a typed path means: `~` is the home folder, and a relative path starts in the project's folder."""
    return ROOT / Path(typed).expanduser()


@dataclass(frozen=True)
class Outputs:
    """The layout of one output folder."""

    root: Path

    @classmethod
    def of(cls, config: Config) -> "Outputs":
        """Return the output folder of a cell."""
        return cls.at(config.output)

    @classmethod
    def at(cls, folder: str) -> "Outputs":
        """Return the output folder that a typed path means."""
        return cls(project_path(folder))

    @property
    def store(self) -> Path:
        """Return the folder of all records, <kind>/<key>/."""
        return self.root / "store"

    def record(self, kind: str, key: str) -> Path:
        """Return the folder of a stage's record."""
        return self.store / kind / key

    def unfinished(self, kind: str, key: str, token: str = "*") -> Path:
        """Return the hidden folder in which a worker does a stage; `token` tells those of several workers apart, `*` matches any."""
        return self.store / kind / f".{key}-{token}"

    def entries(self) -> list[Path]:
        """Return all entries of the store's folders, in order: records, unfinished ones, and foreign files."""
        kinds = (folder for folder in self.store.glob("*") if folder.name != _LOCKS)
        return sorted(path for kind in kinds for path in (kind.iterdir() if kind.is_dir() else [kind]))

    def lock(self, key: str) -> Path:
        """Return the file that a worker locks while it does a stage."""
        return self.store / _LOCKS / f"{key}.lock"

    @property
    def manifests(self) -> Path:
        """Return the folder of all sweeps' manifests."""
        return self.root / "manifests"

    def manifest(self, sweep: str) -> Path:
        """Return the file of a sweep's manifest."""
        return self.manifests / f"{sweep}.json"

    def damaged_manifest(self, sweep: str) -> Path:
        """Return where a manifest that cannot be read is moved to."""
        return self.manifests / f"{sweep}.json.damaged"

    def failed(self, key: str) -> Path:
        """Return the file that says why a stage failed."""
        return self.root / "failed" / f"{key}.json"

    @property
    def checkpoints(self) -> Path:
        """Return the folder of checkpoints of trainings that were stopped, one folder for each stage."""
        return self.root / "checkpoints"

    @property
    def references(self) -> Path:
        """Return the folder of log-probabilities of DPO's references, one folder for each policy."""
        return self.root / "reference"

    def fingerprint(self, name: str) -> Path:
        """Return the cache file of a fact about data, a model, or both."""
        return self.root / "fingerprints" / f"{name}.json"

    @property
    def proofs(self) -> Path:
        """Return the folder of layouts.proof.Memory, which caches the layouts that were tested."""
        return self.root / "proofs"

    def passes(self, name: str) -> Path:
        """Return the file with how many tokens at once fit into memory, in trainings of a kind."""
        return self.root / "passes" / f"{name}.json"

    @property
    def models(self) -> Path:
        """Return the folder of GGUF weights that were converted to safetensors."""
        return self.root / "models"

    def engine_log(self, token: str) -> Path:
        """Return the log of an engine; `token` is random, as processes of several machines may have one number."""
        return self.root / "engine" / f"{token}.log"

    def progress(self, key: str) -> Path:
        """Return the file in which a worker notes how far a stage is."""
        return self.root / "progress" / key

    @property
    def report(self) -> Path:
        """Return the folder of tables, figures and the page."""
        return self.root / "report"

    @property
    def results(self) -> Path:
        """Return the file of all sweeps' results, one row for each cell, benchmark and metric."""
        return self.report / "results.csv"

    @property
    def page(self) -> Path:
        """Return the page of all sweeps."""
        return self.report / "index.html"

    def artefacts(self, sweep: str) -> Path:
        """Return the folder of a sweep's tables and figures."""
        return self.report / sweep

    @property
    def wandb(self) -> Path:
        """Return the folder of W&B's runs."""
        return self.root / "wandb"

    def logged(self, run_id: str) -> Path:
        """Return the file that has the content with which a run was last logged."""
        return self.wandb / "logged" / f"{run_id}.json"


@contextlib.contextmanager
def lock(file: Path) -> Iterator[None]:
    """Let one process at a time into the `with` block; on a file system without locks all of them, where the rename
    alone decides.
    """
    from filelock import FileLock

    file.parent.mkdir(parents=True, exist_ok=True)
    # No soft lock as a fallback: it would outlive a killed process on another node.
    file_lock = FileLock(file, fallback_to_soft=False)
    try:
        file_lock.acquire()
    except (NotImplementedError, OSError):  # no locks here (or a disk that fails, which the writing will say)
        yield
        return
    try:
        yield
    finally:
        file_lock.release()


def cached(file: Path, make: Callable[[], Any]) -> Any:
    """Return the value in a JSON file; if there is none, or it is damaged, make it and write it, in one process only."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        return json.loads(file.read_text())
    with lock(file.with_suffix(".lock")):
        with contextlib.suppress(FileNotFoundError, ValueError):  # another process was making it
            return json.loads(file.read_text())
        value = make()
        write_json(file, value)
    return value


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    with temporary.open("x") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
