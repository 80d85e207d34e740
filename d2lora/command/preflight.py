"""What is checked before anything is loaded or written: that a cell's data sets, model and packages are there and fit it."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec

from d2lora import data, plan
from d2lora.command import rehearsal, summary
from d2lora.errors import UserError
from d2lora.outputs import Outputs
from d2lora.plan import Cell
from d2lora.settings import Config
from d2lora.stages import prepare
from d2lora.stages.rows import coverage_file
from d2lora.store import Store

Passed = set[str]  # checks that passed, by all that they were given: a grid's cells share most of theirs


def check(config: Config, passed: Passed) -> None:
    """UserError unless the cell's rows can be trained on and its test items asked, as far as this machine can tell."""
    check_inputs(config, passed)
    if not _asks_others(config):
        output = Outputs.of(config).root
        items = (config.model, config.benchmarks, config.split_seed, output)
        _once(passed, lambda: rehearsal.check_items(config, output), "items", items)


def check_inputs(config: Config, passed: Passed) -> None:
    """UserError unless the cell's data sets are there, have their columns and enough rows. `passed` spares repeats.

    A dry run checks what lies on this machine, and asks nobody else.
    """
    if _asks_others(config):
        return
    _check_training_rows(config, passed)
    extra = config.init.extra
    if extra and find_spec(extra.package) is None:
        raise UserError(f"init={config.init.name}: needs {extra.package}, which is not installed: {extra.install}")
    for benchmark in config.benchmarks.values():
        _check(passed, data.check_benchmark, benchmark, config.split_seed)
    _check(passed, data.check_lm_eval, _harness_tasks(config))
    _check(passed, data.check_model, config.model)
    output = Outputs.of(config).root
    _once(passed, lambda: rehearsal.check(config, output), "rows", (_drawn(config), output))


def _check_training_rows(config: Config, passed: Passed) -> None:
    """Check the rows of both phases, and those that an initialization looks at."""
    if config.n != 0:
        _check(passed, data.check_task, config.task, config.n, config.split_seed, config.method.needs_pairs)
    if config.m != 0:
        _check(passed, data.check_warmup, config.warmup, config.m, config.split_seed)
    if wanted := prepare.general_samples(config):
        _check(passed, data.check_warmup, config.warmup, wanted, config.split_seed, "init.samples")


def _drawn(config: Config) -> dict[str, object]:
    """What of a config decides which rows are drawn, and whether they can be used."""
    drawn = config.model_dump(include={"model", "task", "warmup", "n", "m", "init", "data_seed", "split_seed"})
    return drawn | {"max_length": config.recipe.max_length, "preference": config.method.needs_pairs}


def _check(passed: Passed, check: Callable[..., None], *given: object) -> None:
    """Do a check, unless it has passed with all of these arguments."""
    _once(passed, lambda: check(*given), check.__name__, given)


def _once(passed: Passed, check: Callable[[], None], name: str, given: object) -> None:
    """Do a check, unless it has passed with what it reads, which is `given`."""
    asked = f"{name} {given!r}"
    if asked not in passed:
        check()
        passed.add(asked)


def _harness_tasks(config: Config) -> list[str]:
    """The harness's tasks that are to be done now: it takes many seconds to import, so it is not asked for others."""
    if config.dry_run or not config.task.lm_eval:
        return []
    store = Store(Outputs.of(config).root)
    left = (s for s in plan.chain(config).evaluations if not store.done(s))
    return [s.spec.lm_eval for s in left if s.spec.lm_eval]


def _asks_others(config: Config) -> bool:
    """Whether the checks would ask the Hub, and the cell is a dry run, which asks nobody."""
    return config.dry_run and not _all_local(config)


def _all_local(config: Config) -> bool:
    """Whether everything a cell reads lies on this machine."""
    sources = prepare.sources(config).values()
    return all(data.local(s.path) for s in sources) and data.model_files(config.model) is not None


def coverage(cells: Iterable[Cell]) -> list[str]:
    """A line for each model that is adapted: how much of it.

    A dry run computes it. A run says what is known, and its records hold the rest.
    """
    lines = {}
    for config in (cell.config for cell in cells if cell.chain.adapter):
        file = coverage_file(config)
        if file in lines or not (config.dry_run or file.exists()):
            continue
        targets = config.recipe.lora.target_modules
        if not file.exists():
            _compute_coverage(config)
        with contextlib.suppress(OSError, ValueError):  # a model whose config is not on this machine
            reached = json.loads(file.read_text())  # coverage.of
            lines[file] = summary.coverage_text(config.model.name, targets, reached["share"], reached["left_out"])
    return list(lines.values())


def _compute_coverage(config: Config) -> None:
    """Write what the cell's adapter reaches, in a process of its own: torch and PEFT take seconds, and a plan needs neither."""
    asked = [config.model.model_dump(), config.recipe.lora.target_modules, str(coverage_file(config))]
    code = "import json, sys; from d2lora.adapters import attach; attach.remember_coverage(*json.load(sys.stdin))"
    subprocess.run([sys.executable, "-c", code], input=json.dumps(asked), text=True, capture_output=True)
