"""One grid on every launcher: what fails stays local, the rest finishes, and the records are the same."""

import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from d2lora.command import launchers
from d2lora.command.job import share
from d2lora.command.launch import launch_batch, launch_once
from d2lora.plan import Job
from d2lora.store import Store

ROOT = Path(__file__).parents[2]
SHORT = ["method.epochs=1", "task.benchmark.lab_math.limit=4", "task.benchmark.lab_facts.limit=4"]
# In every worker: the stage of n = 5 is killed by the system, that of n = 6 calls sys.exit, that of n = 7 raises.
HARM = """
    import importlib.util, os, signal, sys

    def harm(module):
        plain = module.train

        def train(base, wrapped, drawn, *rest, **more):
            n = len(drawn.examples)
            if n == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            if n == 6:
                sys.exit(3)
            if n == 7:
                raise ValueError("seven")
            return plain(base, wrapped, drawn, *rest, **more)

        module.train = train

    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name != "d2lora.train.training":
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            load = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (load(module), harm(module))
            return spec

    sys.meta_path.insert(0, Finder())
"""
LAUNCHERS = {
    "basic": ("", [], "4,6,7"),  # n = 5 would kill the sweep itself
    "joblib": ("hydra_plugins.hydra_joblib_launcher", ["hydra.launcher.n_jobs=2"], "4,5,6,7"),
    "submitit_local": ("submitit", ["hydra.launcher.timeout_min=5"], "4,5,6,7"),
    "ray": ("ray", ["+hydra.launcher.ray.init.num_cpus=2", "+hydra.launcher.ray.remote.max_retries=0"], "4,5,6,7"),
}  # fmt: skip


@pytest.mark.parametrize(
    "launcher",
    [
        "basic",
        pytest.param("joblib", marks=pytest.mark.slow),
        pytest.param("submitit_local", marks=pytest.mark.slow),
        pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.slow]),
    ],
)
def test_what_fails_stays_local_and_the_rest_finishes(launcher: str, tiny: Path, tmp_path: Path) -> None:
    module, more, sizes = LAUNCHERS[launcher]
    if module and not importlib.util.find_spec(module.split(".")[0] if "hydra" not in module else module):
        pytest.skip(f"{module} is not installed")
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(HARM))
    command = [
        sys.executable,
        str(ROOT / "run.py"),
        "-m",
        "method=sft",
        f"n={sizes}",
        f"model.path={tiny}",
        f"output={tmp_path / 'out'}",
    ]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(
        [*command, f"hydra/launcher={launcher}", *more, *SHORT], capture_output=True, text=True, env=environment, timeout=540, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    told = done.stderr
    assert "failed: sft D2LoRA(0, 6) on lab-math: SystemExit: 3 (traceback in" in told
    assert "failed: sft D2LoRA(0, 7) on lab-math: ValueError: seven (traceback in" in told
    assert ("failed: sft D2LoRA(0, 5) on lab-math: RuntimeError: its worker died without an error" in told) == (
        "5" in sizes
    ), told
    records = [json.loads(f.read_text()) for f in (tmp_path / "out" / "store").glob("*/*/record.json")]
    assert sorted(r["stage"] for r in records if r["stage"] != "contamination") == ["adapt", "evaluate", "evaluate"]
    assert_as_alone(records, tiny, tmp_path)


def assert_as_alone(records: list[dict], tiny: Path, tmp_path: Path) -> None:
    """The adapter and the items are those of the cell run by hand."""
    command = [
        sys.executable,
        str(ROOT / "run.py"),
        "method=sft",
        "n=4",
        f"model.path={tiny}",
        f"output={tmp_path / 'alone'}",
    ]
    subprocess.run([*command, *SHORT], capture_output=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for record in records:
        alone = json.loads((tmp_path / "alone" / "store" / record["stage"] / record["key"] / "record.json").read_text())
        assert {k: v for k, v in alone["files"].items() if "config" not in k} == {
            k: v for k, v in record["files"].items() if "config" not in k
        }


def test_slurm_jobs_that_are_still_queued_are_not_started_twice(tmp_path: Path, tiny: Path) -> None:
    if not importlib.util.find_spec("submitit"):
        pytest.skip("submitit is not installed")
    squeue = tmp_path / "squeue"
    squeue.write_text('#!/bin/sh\ncase "$*" in *--name=d2lora-mine*) echo 41; echo 42;; esac\n')
    squeue.chmod(0o755)
    command = [
        sys.executable,
        str(ROOT / "run.py"),
        "-m",
        "n=4",
        "sweep=mine",
        f"model.path={tiny}",
        f"output={tmp_path / 'out'}",
    ]
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        [*command, "hydra/launcher=submitit_slurm"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 2
    assert "sweep=mine: 2 of its Slurm jobs are still queued or running (41, 42)" in done.stderr
    assert not (tmp_path / "out").exists()
    squeue.write_text("#!/bin/sh\necho 'slurm_load_jobs error: no controller' >&2; exit 1\n")
    done = subprocess.run(
        [*command, "hydra/launcher=submitit_slurm"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 2
    assert (
        "Slurm does not say whether jobs of this sweep are queued or running: squeue: slurm_load_jobs error"
        in done.stderr
    )


class Launches:
    """Plays a launcher. A job is killed as often as `deaths` says of its n, and takes along whom it works beside."""

    def __init__(self, store: Store, beside: int, deaths: dict[int, int]) -> None:
        self.store, self.beside, self.deaths, self.waves = store, beside, deaths, []

    def __call__(self, jobs: list[Job]) -> str | None:
        self.waves.append([job.cell.config.n for job in jobs])
        stopped = None
        for start in range(0, len(jobs), self.beside):
            group = jobs[start : start + self.beside]
            killers = [n for job in group if self.deaths.get(n := job.cell.config.n, 0)]
            for job in group:
                place = self.store.folder(job.stages[0])
                if killers:
                    place.with_name(f".{place.name}-{len(self.waves)}").mkdir(parents=True)
                else:
                    place.mkdir(parents=True)
                    (place / "record.json").write_text("{}")
            for n in killers:
                self.deaths[n] -= 1
                stopped = "killed"
            if stopped and self.beside > 1:
                break
        return stopped


@pytest.mark.parametrize(
    ("together", "beside", "waves"),
    [(False, 2, [[4, 5, 6, 7], [6, 7], [4], [5], [6], [7]]), (True, 1, [[4, 5, 6, 7], [5, 6]])],
)
def test_what_died_is_tried_once_more(cell, tmp_path: Path, together: bool, beside: int, waves: list) -> None:
    cells = [cell(f"n={n}", "m=0", f"output={tmp_path / 'out'}", "task.benchmark={}") for n in (4, 5, 6, 7)]
    jobs, store = [Job(c, (c.chain.adapt,)) for c in cells], Store(tmp_path / "out")
    launch = Launches(store, beside, deaths={5: 9, 6: 1})
    for job in jobs:  # what an earlier sweep left begun is not begun by this one
        place = store.folder(job.stages[0])
        place.with_name(f".{place.name}-old").mkdir(parents=True)
    launch_batch(launch, jobs, store, together)
    assert launch.waves == waves
    assert [store.done(job.stages[0]) for job in jobs] == [True, False, True, True]
    assert [f.stem for f in (tmp_path / "out" / "failed").iterdir()] == [jobs[1].stages[0].key]


def test_a_launcher_that_never_began_kills_nobody(cell, tmp_path: Path, capsys) -> None:
    cells = [cell(f"n={n}", "m=0", f"output={tmp_path / 'out'}") for n in (4, 5)]
    jobs, store = [Job(c, (c.chain.adapt,)) for c in cells], Store(tmp_path / "out")
    place = store.folder(jobs[0].stages[0])
    place.with_name(f".{place.name}-old").mkdir(parents=True)
    launch_batch(lambda wave: "no such partition", jobs, store, apart=True)
    assert "the launcher stopped: no such partition" in capsys.readouterr().err
    assert not (tmp_path / "out" / "failed").exists()


def test_what_a_launcher_needs_is_known_by_its_class() -> None:
    def known(target: str, **settings: int) -> tuple[bool, int]:
        config = OmegaConf.create({"hydra": {"launcher": {"_target_": target, **settings}}})
        return launchers.launcher_of(config).apart, launchers.launcher_of(config).count(config)

    submitit = "hydra_plugins.hydra_submitit_launcher.submitit_launcher"
    assert known("hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher", n_jobs=3) == (False, 3)
    assert known("JoblibLauncher", n_jobs=-1) == (False, os.cpu_count())
    assert known(f"{submitit}.LocalLauncher") == known(f"{submitit}.SlurmLauncher") == (True, 1)
    assert known("hydra._internal.core_plugins.basic_launcher.BasicLauncher") == (False, 1)


def test_a_sibling_that_ends_while_it_is_looked_at_is_no_error(monkeypatch) -> None:
    class Zombie:
        def cmdline(self):
            raise psutil.ZombieProcess(1)

    assert launchers.command_line(Zombie()) == []


def test_a_job_that_can_t_begin_says_so_where_the_summary_looks(cell, tmp_path: Path) -> None:
    """Its plan is not the sweep's: code or data changed while it was queued."""
    cell()  # clears Hydra's state
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", overrides=["n=4", "job=[abc]", f"output={tmp_path / 'out'}"])
    assert share(config) == 1
    told = json.loads((tmp_path / "out" / "failed" / "abc.json").read_text())["error"]
    assert "job=abc: not a stage of this cell" in told


def test_a_stopped_launcher_is_not_followed_while_slurm_still_has_its_jobs(tmp_path: Path, monkeypatch) -> None:
    left = tmp_path / "left"
    left.write_text("2")
    squeue = tmp_path / "squeue"  # one job fewer each time it is asked
    squeue.write_text(f'#!/bin/sh\nn=$(cat {left}); [ "$n" = 0 ] || {{ echo $n; echo $((n - 1)) > {left}; }}\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(launchers, "SLURM_SECONDS", 0)

    class Broken:
        def launch(self, overrides, initial_job_idx):
            raise RuntimeError("a job timed out")

    config = OmegaConf.create({"hydra": {"launcher": {"_target_": "SlurmLauncher"}, "job": {"name": "d2lora-mine"}}})
    assert launch_once(Broken(), config, []) == "RuntimeError: a job timed out"
    assert left.read_text().strip() == "0"


def test_keys_that_look_like_numbers_reach_their_job_as_text() -> None:
    keys, given = ["12345678901234567890", "12e34567890123456789"], []

    class Launcher:
        def launch(self, overrides, initial_job_idx):
            given.extend(overrides)

    stages = [SimpleNamespace(key=key) for key in keys]
    job = SimpleNamespace(cell=SimpleNamespace(overrides=("n=4",)), stages=stages)
    assert launch_once(Launcher(), OmegaConf.create({}), [job]) is None
    assert OverridesParser.create().parse_override(given[0][-1]).value() == keys


HELPERS = """
import sys, time
from joblib import Parallel, delayed
from types import SimpleNamespace
from d2lora.command.launchers import launcher_of
from omegaconf import OmegaConf
launcher = SimpleNamespace(joblib={"n_jobs": 2, "backend": "loky"})
facts = launcher_of(OmegaConf.create({"hydra": {"launcher": {"_target_": "JoblibLauncher"}}}))
if "forks" in sys.argv:
    facts.ahead(2)
facts.begin(launcher)
Parallel(**launcher.joblib)(delayed(time.sleep)(0) for _ in range(2))
print("ready", flush=True)  # whether or not the second worker has begun
Parallel(**launcher.joblib)(delayed(time.sleep)(600) for _ in range(1))  # one works, the other waits for a job
"""


@pytest.mark.parametrize(
    ("end", "start", "named"),
    [(signal.SIGTERM, "own", "loky"), (signal.SIGKILL, "own", "loky"), (signal.SIGKILL, "forks", "forkserver")],
)
def test_joblib_s_workers_end_with_the_process_that_started_them(end: signal.Signals, start: str, named: str) -> None:
    command = [sys.executable, "-c", HELPERS, start]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as sweep:
        assert sweep.stdout.readline() == "ready\n"
        workers = psutil.Process(sweep.pid).children(recursive=True)
        assert sum(named in " ".join(p.cmdline()) for p in workers) >= 2
        sweep.send_signal(end)
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, -signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_no_worker_outlives_its_sweep(tiny: Path, tmp_path: Path, end: signal.Signals, code: int) -> None:
    command = [
        sys.executable,
        str(ROOT / "run.py"),
        "-m",
        "method=sft",
        "n=400,401",
        "method.epochs=50",
        f"model.path={tiny}",
    ]
    command += [f"output={tmp_path / 'out'}", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "wandb.mode=offline"]
    # Whoever runs the tests in the background has its children ignore Ctrl-C: this one must not.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    sweep = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=heed)
    try:
        deadline = time.monotonic() + 240
        while len(list((tmp_path / "out" / "wandb").glob("*run-*/*.wandb"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
        workers = psutil.Process(sweep.pid).children(recursive=True)
        assert sum(p.name() == "wandb-core" for p in workers) == 2, "one a worker"
        os.kill(sweep.pid, end)
        assert sweep.wait(timeout=60) == code
    finally:
        sweep.kill()
        sweep.wait()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    assert not list((tmp_path / "out" / "store" / "adapt").glob("[!.]*/record.json"))
