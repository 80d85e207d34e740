"""Other sweepers than d2lora's own, as they are typed: what they run is planned, listed, reported and counted."""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

SMALL = ["task.benchmark.lab_math.limit=4", "task.validation.lab_math_validation.limit=4", "~task.benchmark.lab_facts"]
CALLBACK = """
from hydra.experimental.callback import Callback

class Told(Callback):
    def on_job_end(self, config, job_return, **more):
        print("callback: job ended with", job_return.return_value)

    def on_run_end(self, config, job_return, **more):
        print("callback: run ended")

    def on_multirun_end(self, config, **more):
        print("callback: sweep ended")
"""


def manifest(output: Path, sweep: str = "adhoc") -> list[dict]:
    return json.loads((output / "manifests" / f"{sweep}.json").read_text())["cells"]


def test_optuna_tunes_a_rate_on_validation_and_its_cells_are_a_sweep(run: Callable, tmp_path: Path) -> None:
    try:
        importlib.util.find_spec("hydra_plugins.hydra_optuna_sweeper.config").loader  # noqa: B018
    except (ImportError, AttributeError):
        pytest.skip("hydra-optuna-sweeper is not installed (make .venv/ready-dev)")
    grid = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.direction=maximize", "objective=lab_math/accuracy", "n=8"]
    grid += ["recipe.lr_factor=tag(log,interval(0.3,3))", "hydra.sweeper.n_trials=2", *SMALL]
    planned = run(*grid, "dry_run=true").stdout
    assert "one cell of those that hydra/sweeper=optuna will choose" in planned
    assert not (tmp_path / "out" / "store").exists()
    done = run(*grid)
    cells = manifest(tmp_path / "out")
    assert len(cells) == 2
    scores = []
    for cell in cells:
        assert list(cell["stages"]["evaluate"]) == ["lab_math_validation"], "the test is not met"
        (key,) = cell["stages"]["evaluate"].values()
        record = json.loads((tmp_path / "out/store/evaluate" / key / "record.json").read_text())
        scores.append(record["metrics"]["accuracy"]["value"])
    assert f"best_value: {max(scores)}" in done.stdout
    assert re.search(r"lab_math_validation: accuracy in %", done.stdout)
    assert "FutureWarning" not in done.stderr
    assert "0 entries" in run("gc", "--output", str(tmp_path / "out"), module="d2lora").stdout, "gc keeps them"


def test_the_basic_sweeper_s_failures_are_listed_and_callbacks_are_called(
    run: Callable, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "callbacks").mkdir()
    (tmp_path / "callbacks" / "told.py").write_text(CALLBACK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "callbacks"))
    given = ["+hydra.callbacks.mine._target_=told.Told", "recipe.eval_batch=4", *SMALL]
    # An adapter that hardly moves is refused as one that is not applied.
    failing = ["recipe.max_grad_norm=1e-30", "recipe.lr.sft=1"]
    done = run("-m", "hydra/sweeper=basic", "n=0,4", *failing, *given, code=1)
    assert len(manifest(tmp_path / "out")) == 2
    assert re.search(r"SFT LoRA +\d+\.\d+ ± \d+\.\d+ +missing", done.stdout)
    assert "failed: lab_math of sft D2LoRA(0, 4) on lab-math: RuntimeError" in done.stderr
    assert "callback: sweep ended" in done.stdout
    single = run("n=0", *given).stdout
    assert "callback: job ended with 0\ncallback: run ended" in single
    assert "callback: job ended with 2" in run("n=-1", *given, code=2).stdout


def test_what_can_t_be_composed_ends_a_study_before_its_first_trial(run: Callable) -> None:
    # Stands in for a sweeper that is not installed: the plan comes before it is looked for.
    optimizer = ["hydra.sweeper._target_=hydra_plugins.x.OptunaSweeper", "objective=lab_math/accuracy"]
    done = run("-m", "hydra/sweeper=basic", *optimizer, "method=nosuch,sft", "dry_run=true", code=2)
    assert done.stderr.startswith("error: method=nosuch: one of dpo, kto, orpo, sft, simpo")
    assert len(done.stderr.splitlines()) == 1
