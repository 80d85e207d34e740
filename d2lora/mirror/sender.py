"""Send W&B runs from threads for which no stage waits, so that a server that is down, slow or refuses does not delay a
cell.

The first error is reported in one line; from then on the process keeps its runs on disk, for `wandb sync`. stages.py and
cells.py decide what the runs show.
"""

import contextlib
import functools
import netrc
import os
import queue
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from d2lora.errors import UserError
from d2lora.keys import digest
from d2lora.outputs import Outputs
from d2lora.settings import Config


@dataclass
class _State:
    runs: "list[Run]" = field(default_factory=list)  # begun and not ended
    offline: bool = False  # something went wrong: runs are kept on disk from there on
    left: bool = False  # runs were left behind, as they did not come to an end
    stuck: bool = False  # that happened again: no more runs
    disabled: bool = False  # `wandb disabled` was said once, which is known when wandb is imported
    warned: bool = False
    addresses: dict[str, str] = field(default_factory=dict)  # of runs that are online, by their ids


_state = _State()
_printing = threading.Lock()
_at_once = threading.BoundedSemaphore(4)  # runs that are begun, filled or uploaded at the same time


def _warn(text: str) -> None:
    """Print the first warning of a process only: later ones mostly repeat it."""
    with _printing:  # several runs' threads meet the same dead server at once
        first, _state.warned = not _state.warned, True
    if first:
        print(f"W&B: {text}", file=sys.stderr, flush=True)


def _fail(error: BaseException) -> None:
    """Keep further runs on disk, and print why."""
    _state.offline = True
    line = next((x.strip() for x in str(error).splitlines() if x.strip()), type(error).__name__)
    _warn(f"{line}: runs are kept on disk from here on")


def disabled(config: Config) -> bool:
    """Tell whether nothing is sent: because W&B is disabled, or because wandb hangs."""
    return _wanted_mode(config) == "disabled" or _state.stuck or _state.disabled


def address(run_id: str) -> str | None:
    """Return the address of a run that this process has online, else None."""
    return _state.addresses.get(run_id)


def folder(outputs: Outputs) -> Path:
    """Return the folder that runs are in: WANDB_DIR's, or the output folder's."""
    return Path(os.environ.get("WANDB_DIR") or outputs.root) / "wandb"


def flush(config: Config) -> None:
    """Wait, at most for a limited time, for runs to be written or uploaded. Every job ends with this."""
    started, patience = time.monotonic(), config.wandb.patience
    slow = TimeoutError(f"the server takes longer than wandb.patience={patience:g} s")
    for limit, then in ((patience, lambda: _fail(slow)), (2 * patience + 5, _give_up)):
        for run in _state.runs:
            run.thread.join(max(0.0, started + limit - time.monotonic()))
        _state.runs = [run for run in _state.runs if run.thread.is_alive()]
        if not _state.runs:
            return
        then()


def hush() -> None:
    """Print no more warnings: the process is being stopped, and so is wandb."""
    _state.warned = True


def is_offline() -> bool:
    """Tell whether an error occurred, so that runs are kept on disk."""
    return _state.offline


def _give_up() -> None:
    """Abandon runs that do not end. Later runs go to disk, which needs no server; if those hang too, nothing more is
    sent.
    """
    global _at_once
    _at_once = threading.BoundedSemaphore(4)
    if _state.left and not _state.stuck:
        print(
            "W&B: also runs on disk do not come to an end: no more are logged; the records have it all", file=sys.stderr
        )
    _state.stuck, _state.left, _state.runs = _state.left, True, []


# --- a trial of a W&B sweep ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """A trial of a W&B sweep, which `wandb agent` started this process for: its run's id, its sweep, its parameters."""

    run: str
    sweep: str
    params: dict[str, Any]


@functools.cache
def trial() -> Trial | None:
    """Return the trial that this process is; None if no agent started it.

    What the agent says of it is taken out of the environment: wandb would give the trial's id to each run of the
    process, whatever its own, so that all stages would write into one.
    """
    sweep, run = os.environ.pop("WANDB_SWEEP_ID", None), os.environ.get("WANDB_RUN_ID")
    file = os.environ.pop("WANDB_SWEEP_PARAM_PATH", None)
    if not sweep or not run:
        return None
    del os.environ["WANDB_RUN_ID"]
    return Trial(run, sweep, _params(file))


def _params(file: str | None) -> dict[str, Any]:
    """Return a trial's parameters from the agent's file; {} if it can't be read: they are on the command line too."""
    if file is None:
        return {}
    import yaml

    with contextlib.suppress(OSError, yaml.YAMLError, AttributeError):
        content = yaml.safe_load(Path(file).read_text())
        return {k: v["value"] for k, v in content.items() if isinstance(v, dict) and "value" in v}
    return {}


# --- a run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class About:
    """What W&B knows of a run from its beginning: arguments of wandb.init. `trial`: of a W&B sweep, if it is one's run."""

    id: str
    job_type: str
    name: str
    tags: list[str]
    config: dict[str, Any]
    trial: Trial | None = None


_LONGEST = 128  # characters of a name; W&B refuses longer ones
_LONGEST_TAG = 64


def fit(name: str) -> str:
    """Return a name that W&B takes for an artifact: ASCII letters, digits and ._- alone, and not too long.

    Where that is another one, a hash of the name keeps it apart from others.
    """
    plain = re.sub(r"[^a-zA-Z0-9_.-]", "-", name)
    return plain if plain == name and len(name) <= _LONGEST - 8 else f"{plain[: _LONGEST - 20]}-{digest(name, 8)}"


class Run:
    """A W&B run. From `begin` on, a thread of its own starts it, does its tasks in order, and ends it."""

    def __init__(self, config: Config, outputs: Outputs, about: About) -> None:
        trial()  # before anything of wandb reads the environment
        self.config, self.outputs, self.about = config, outputs, about
        self.tasks: queue.SimpleQueue[Callable[[Any], object] | int] = queue.SimpleQueue()
        self.before: Run | None = None  # an earlier run of this id that has not ended
        self.thread = threading.Thread(target=self._work, daemon=True)

    def begin(self) -> None:
        """Start the thread, once."""
        if self.thread.ident:
            return
        self.before = next((r for r in _state.runs if r.about.id == self.about.id), None)
        _state.runs.append(self)
        self.thread.start()

    def do(self, task: Callable[[Any], object]) -> None:
        """Let the thread call task(run), unless the whole run was logged before."""
        self.tasks.put(task)

    def end(self, code: int = 0) -> None:
        """Let the thread end the run; a code other than 0 marks it as failed."""
        self.tasks.put(code)

    def _work(self) -> None:
        if self.before:  # an earlier try of the same stage is still ending
            self.before.thread.join()
        with _at_once:
            try:
                _prepare(self.outputs)
                run = self._begin()
                self._tell(run)
                # Of a stage that another output folder has done already nothing is logged twice.
                logged = run.resumed and "seconds" in run.summary.keys()  # noqa: SIM118 (not a dict)
                while not isinstance(task := self.tasks.get(), int):
                    self._try(task, run) if not logged else None
                run.finish(exit_code=task)
            except Exception as error:
                _fail(error)

    def _tell(self, run: Any) -> None:
        """Note the address of a run that is online, and print that of the process's first."""
        if run.offline or not run.url:
            return
        with _printing:
            if not _state.addresses:
                print(f"W&B: {run.url}", flush=True)
            _state.addresses[self.about.id] = run.url

    def _try(self, task: Callable[[Any], object], run: Any) -> None:
        try:
            task(run)
        except Exception as error:
            _fail(error)

    def _begin(self) -> Any:
        mode = "offline" if _state.offline else _mode(self.config)
        earlier = self._folders()
        try:
            return self._init(mode)
        except Exception as error:
            if mode == "offline":
                raise
            _fail(error)
        try:
            run = self._init("offline")
        except Exception:
            _free(self.about.id)
            run = self._init("offline")
        for begun in self._folders() - earlier - {Path(run.dir).parent}:  # synced, it would undo what the run says
            shutil.rmtree(begun, ignore_errors=True)
        return run

    def _folders(self) -> set[Path]:
        return set(folder(self.outputs).glob(f"*run-*-{self.about.id}"))

    def _init(self, mode: str) -> Any:
        import wandb

        wanted, about, environment = self.config.wandb, self.about, os.environ
        parent = folder(self.outputs).parent
        parent.mkdir(parents=True, exist_ok=True)
        settings = _settings(wanted.patience)
        own = (wanted.project, wanted.entity)
        if about.trial:
            settings.sweep_id = about.trial.sweep
            own = (None, None)  # a trial is where its sweep is, which the agent says in the environment
        return wandb.init(
            mode=mode,  # type: ignore[arg-type]
            project=own[0] or environment.get("WANDB_PROJECT", "d2lora"),
            entity=own[1],
            group=(wanted.group or environment.get("WANDB_RUN_GROUP") or self.config.sweep)[:_LONGEST],
            notes=wanted.notes,
            dir=parent,
            resume="allow",
            reinit="create_new",
            settings=settings,
            id=about.trial.run if about.trial else about.id,
            job_type=about.job_type,
            name=about.name[:_LONGEST],
            tags=_tags(about.tags, wanted.tags),
            config=about.config | (about.trial.params if about.trial else {}),
        )


def _tags(of_run: list[str], own: list[str]) -> list[str]:
    """Return a run's tags with the user's own, of the settings and of WANDB_TAGS, each once."""
    added = [tag.strip() for tag in os.environ.get("WANDB_TAGS", "").split(",")]
    return list(dict.fromkeys(tag[:_LONGEST_TAG] for tag in (*of_run, *own, *added) if tag))


def _free(run_id: str) -> None:
    """End a run in wandb's service whose init failed: it would keep the id in use, and be refused offline (wandb#9865)."""
    import wandb

    service = wandb.setup().ensure_service()
    _, run = service.inform_attach(run_id)
    run.deliver_exit(1).wait_or(timeout=10)
    service.inform_finish(run_id)


def _prepare(outputs: Outputs) -> None:
    """Set environment variables that wandb reads when it is imported."""
    # Its staging of artifacts and its cache belong to the runs, not to the home folder.
    os.environ.setdefault("WANDB_DATA_DIR", str(folder(outputs) / "data"))
    os.environ.setdefault("WANDB_CACHE_DIR", str(folder(outputs) / "cache"))
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its end waits half a minute for a server that is silent


def _settings(patience: float) -> Any:
    """Return wandb's settings; no request takes longer than `patience` seconds."""
    import wandb

    return wandb.Settings(
        silent=True,
        console="off",
        init_timeout=patience / 2,
        finish_timeout=patience,
        finish_timeout_raises=True,
        x_graphql_timeout_seconds=patience / 4,
        x_graphql_retry_max=5,
        x_graphql_retry_wait_min_seconds=patience / 60,
        x_graphql_retry_wait_max_seconds=patience / 10,
        x_disable_meta=True,  # it holds paths of this machine; records say what matters of it
        host="",  # a run has both beside that
        program="run.py",
        program_relpath="run.py",
        disable_git=True,
        disable_code=True,
        x_save_requirements=False,
    )


def _wanted_mode(config: Config) -> str:
    """Return the mode that the settings say, or with auto the environment; auto if neither does."""
    if config.wandb.mode != "auto":
        return config.wandb.mode
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on"):
        return "disabled"
    return os.environ.get("WANDB_MODE", "auto")


def _mode(config: Config) -> str:
    """Return the mode of a run: auto means WANDB_MODE, else what `wandb offline` has set, else online with credentials
    and offline without.
    """
    wanted = _wanted_mode(config)
    wanted = _left_mode() if wanted == "auto" else wanted
    if wanted in ("auto", "online") and _credentials():
        return "online"
    if wanted == "online":  # wandb would ask for a key here
        _fail(UserError("wandb.mode=online, but no credentials (wandb login, or WANDB_API_KEY)"))
    _state.disabled = wanted == "disabled"
    return "disabled" if wanted == "disabled" else "offline"


def _left_mode() -> str:
    """Return the mode that `wandb offline` or `wandb disabled` has set, else auto."""
    import wandb

    left = wandb.setup().settings.mode
    return left if left in ("offline", "disabled") else "auto"


def _credentials() -> bool:
    """Tell whether there is a key for the server: in the environment, or in .netrc, where `wandb login` writes it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import wandb

    with contextlib.suppress(OSError, netrc.NetrcParseError):
        host = urlsplit(wandb.setup().settings.base_url).netloc
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    return False
