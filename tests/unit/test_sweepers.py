"""Sweepers other than d2lora's own, and what is said of keys that a launcher does not have."""

from pathlib import Path

import made
import pytest
from composing import ROOT
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException, OverrideParseException
from made import grid as made_grid
from omegaconf import OmegaConf

from d2lora.command import grid, sweepers
from d2lora.command.guard import one_line, overrides_last
from d2lora.errors import UserError
from d2lora.report import manifest


def test_a_trial_is_judged_on_the_validation_benchmark_and_does_not_meet_the_test(cell) -> None:
    plain = cell("n=8")
    tried = cell("n=8", "objective=lab_math/accuracy")
    assert tried.config.objectives == [("lab_math_validation", "accuracy")]
    assert tried.chain.trainings == plain.chain.trainings
    (measured,) = sweepers._without_test(tried).chain.stages[-1:]
    assert measured.subject == "lab_math_validation"
    listed = manifest.entry(sweepers._without_test(tried))
    assert list(listed.stages.evaluate) == ["lab_math_validation"], "the sweep's tables show what there is"
    facts = cell("n=8", "objective=lab_facts/acc")  # has no validation benchmark: measured on the test itself
    assert sweepers._without_test(facts).chain == plain.chain


@pytest.mark.parametrize(
    ("sweeper", "objective", "told"),
    [
        ({"_target_": "x.OptunaSweeper"}, [], "name what it optimizes: objective=BENCHMARK/METRIC"),
        ({"_target_": "x.OptunaSweeper", "direction": "minimize"}, ["lab_math/accuracy"], "direction=maximize"),
        ({"_target_": "x.OptunaSweeper", "direction": "maximize"}, ["lab_math/accuracy"], None),
        ({"_target_": "x.NevergradSweeper", "optim": {"maximize": False}}, ["lab_math/accuracy"], "maximize=true"),
        (
            {"_target_": "x.AxSweeper", "ax_config": {"experiment": {"minimize": True}}},
            ["lab_math/accuracy"],
            "minimize=false",
        ),
        ({"_target_": "x.BasicSweeper"}, [], None),
    ],
)
def test_a_sweeper_that_optimizes_needs_an_objective_and_its_direction(sweeper, objective, told) -> None:
    config = OmegaConf.create({"hydra": {"sweeper": sweeper, "runtime": {"choices": {"hydra/sweeper": "optuna"}}}})
    if told is None:
        sweepers._check_objective(config, objective)
        return
    with pytest.raises(UserError, match=told):
        sweepers._check_objective(config, objective)


def test_the_plan_of_an_optimizer_shows_a_cell_of_its_first_values() -> None:
    typed = ["recipe.lr_factor=tag(log,interval(0.3,3))", "++n=4,8", "seed=range(2,9)", "~task.benchmark.lab_facts"]
    cell = grid.one_of(OverridesParser.create(), {"method": "sft,dpo"}, typed)
    assert cell == ("method=sft", "recipe.lr_factor=0.3", "++n=4", "seed=2", "~task.benchmark.lab_facts")


@pytest.mark.parametrize(
    ("hydra", "told"),
    [
        (
            "Could not override 'hydra.launcher.n_jobs'.\nTo append to your config use +hydra.launcher.n_jobs=2\n\tKey 'n_jobs' is not in struct",
            "hydra.launcher.n_jobs: the launcher has no such setting",
        ),
        (
            "Error in call to target 'hydra._internal.core_plugins.basic_launcher.BasicLauncher':\nTypeError(\"BasicLauncher.__init__() got an unexpected keyword argument 'n_jobs'\")",
            "hydra.launcher.n_jobs: BasicLauncher has no such setting",
        ),
        (
            "Could not override 'hydra.sweeper.n_trials'.\nTo append to your config use +hydra.sweeper.n_trials=3",
            "hydra.sweeper.n_trials: the sweeper has no such setting",
        ),
        (
            "Could not override 'benchmark'. No match in the defaults list.\nTo append to your default list use +benchmark=lab_math",
            "benchmark: a task's own are chosen by benchmark@task.benchmark=[lab_math,lab_facts]",
        ),
        ("Could not override 'nn'.\nTo append to your config use +nn=3", "nn: there is no such key"),
    ],
)
def test_no_advice_is_given_that_then_fails(hydra: str, told: str) -> None:
    line = one_line(ConfigCompositionException(hydra))
    assert line.startswith(told)
    assert "+hydra" not in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("methode", "methode: there is no such key (method is meant?)"),
        ("lr", "lr: there is no such key (recipe.lr is meant?)"),
        ("beta", "beta: there is no such key (method.beta is meant?)"),
        ("recipe.lora.rank", "recipe.lora.rank: there is no such key (recipe.lora.r is meant?)"),
        ("recipe.epochs.stf", "recipe.epochs.stf: there is no such key (recipe.epochs.sft is meant?)"),
        ("task.benchmark.mine.limt", "task.benchmark.mine.limt: there is no such key (task.benchmark.mine.limit is meant?)"),
        ("nn", "nn: there is no such key; "),
        ("task.benchmark.mine.limit", "task.benchmark.mine.limit: no file here sets it: +task.benchmark.mine.limit=3 adds it"),
    ],
)  # fmt: skip
def test_a_mistyped_key_is_told_from_one_that_files_leave_out(typed: str, told: str) -> None:
    hydra = f"Could not override '{typed}'.\nTo append to your config use +{typed}=3"
    assert one_line(ConfigCompositionException(hydra)).startswith(told)


@pytest.mark.parametrize("override", ["n=8,", "n", "task.prompt=Question: {country}?"])
def test_an_override_that_can_t_be_read_is_named(override: str) -> None:
    with pytest.raises(OverrideParseException) as refused:
        OverridesParser.create().parse_overrides([override])
    assert one_line(refused.value).startswith(f"{override}: not readable: write key=value")


def test_run_py_registers_what_is_done_around_other_sweepers() -> None:
    config = OmegaConf.load(ROOT / "conf" / "config.yaml")
    assert config.hydra.callbacks.d2lora._target_ == f"{sweepers.__name__}.OtherSweepers"


def test_ctrl_c_in_a_study_shows_the_trials_that_it_has(tmp_path: Path, monkeypatch, capsys) -> None:
    cells = made_grid(f"output={tmp_path}", n=[100], m=[0])
    made.publish(tmp_path, cells)
    monkeypatch.setattr(sweepers, "_begun", cells)
    with pytest.raises(KeyboardInterrupt), sweepers.reported():
        raise KeyboardInterrupt
    assert "lab_math: accuracy in %" in capsys.readouterr().out
    assert (tmp_path / "report" / "mine" / "table.md").exists()


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("n=8 -m m=0,8", "-m n=8 m=0,8"),
        ("-cn table3 n=8 --multirun", "-cn table3 --multirun n=8"),
        (
            "~task.benchmark.lab_facts +task.lm_eval=[a,b] -m ++n=1,2",
            "-m ~task.benchmark.lab_facts +task.lm_eval=[a,b] ++n=1,2",
        ),
        ("+benchmark@task.benchmark=lab_facts --cfg job", "--cfg job +benchmark@task.benchmark=lab_facts"),
        ("--config-dir=/a=b -m n=1,2", "--config-dir=/a=b -m n=1,2"),
    ],
)
def test_overrides_may_stand_before_and_after_options(typed: str, meant: str) -> None:
    assert overrides_last(typed.split()) == meant.split()
