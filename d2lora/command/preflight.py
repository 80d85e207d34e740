"""Check before anything is loaded or written that a cell's data sets, model and packages exist and fit together."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from d2lora import data, plan
from d2lora.command import rehearsal, summary
from d2lora.errors import UserError
from d2lora.evaluate.vllm import installed
from d2lora.outputs import Outputs
from d2lora.plan import Cell
from d2lora.records import Coverage
from d2lora.settings import ALL_LINEAR, Config, HarnessTask
from d2lora.stages import prepare
from d2lora.stages.base_facts import coverage_file, shape_file
from d2lora.store import Store

Passed = set[str]  # the checks that passed, as name and arguments: most are the same in all cells of a grid


def check(config: Config, passed: Passed) -> None:
    """Check that the cell's rows can be trained on and its test items evaluated. UserError if not.

    `passed` saves repeating checks.
    """
    check_inputs(config, passed)
    if not _asks_others(config):
        output = Outputs.of(config).root
        items = (config.model, config.benchmarks, config.split_seed, output)
        _once(passed, lambda: rehearsal.check_items(config, output), "items", items)


def check_inputs(config: Config, passed: Passed) -> None:
    """Check that the cell's data sets exist, have their columns and enough rows. UserError if not.

    `passed` saves repeating checks. A dry run checks only what is on this machine, and does not use the network.
    """
    if config.dry_run and config.task.lm_eval:
        _check(passed, data.check_names, config.task.harness_tasks, config.task.lm_eval_path)
    if _asks_others(config):
        return
    output = Outputs.of(config).root
    _check(passed, check_output, config.output, config.dry_run)
    drawn = (_drawn(config), output)
    _once(passed, lambda: rehearsal.begin(config, output), "tokenizer", drawn)
    _check_training_rows(config, passed)
    extra = config.init.extra
    if extra and find_spec(extra.package) is None:
        raise UserError(f"init={config.init.name}: needs {extra.package}, which is not installed: {extra.install}")
    _check(passed, installed.check, config.recipe)
    for benchmark in config.benchmarks.values():
        _check(passed, data.check_benchmark, benchmark, config.split_seed)
    if tasks := _harness_tasks(config):
        _check(passed, data.check_lm_eval, tasks, config.task.lm_eval_path, config.objectives)
    _check(passed, data.check_model, config.model)
    _once(passed, lambda: rehearsal.check(config, output), "rows", drawn)


def check_output(typed: str, only_read: bool) -> None:
    """Raise UserError for an output folder that cannot be, or that cannot be written. Nothing is written."""
    folder = Outputs.at(typed).root
    nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise UserError(f"output={typed}: {nearest} is not a folder")
    if not only_read and not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"output={typed}: {nearest} cannot be written: name a folder that can")


def _check_training_rows(config: Config, passed: Passed) -> None:
    """Check the rows of both phases, and those that an initialization is computed from."""
    if config.n != 0:
        _check(passed, data.check_task, config.task, config.n, config.split_seed, config.method.needs_pairs)
    if config.m != 0:
        _check(passed, data.check_warmup, config.warmup, config.m, config.split_seed)
    if amount := prepare.general_samples(config):
        _check(passed, data.check_warmup, config.warmup, amount, config.split_seed, "init.samples")


def _drawn(config: Config) -> dict[str, object]:
    """Return the settings that decide which rows are drawn, and whether they can be used."""
    drawn = config.model_dump(include={"model", "task", "warmup", "n", "m", "init", "data_seed", "split_seed"})
    return drawn | {"max_length": config.recipe.max_length, "preference": config.method.needs_pairs}


def _check(passed: Passed, check: Callable[..., None], *arguments: object) -> None:
    """Run a check unless it has passed with these arguments."""
    _once(passed, lambda: check(*arguments), check.__name__, arguments)


def _once(passed: Passed, check: Callable[[], None], name: str, arguments: object) -> None:
    """Run a check unless it has passed with these arguments."""
    name_and_arguments = f"{name} {arguments!r}"
    if name_and_arguments not in passed:
        check()
        passed.add(name_and_arguments)


def _harness_tasks(config: Config) -> list[HarnessTask]:
    """Return the harness's tasks that still have to be evaluated.

    Importing the harness takes many seconds, so others are not checked; of a dry run only names are.
    """
    if config.dry_run or not config.task.lm_eval:
        return []
    store = Store(Outputs.of(config).root)
    missing = {s.spec.lm_eval for s in plan.chain(config).evaluations if not store.done(s)}
    return [task for task in config.task.harness_tasks if task.name in missing]


def _asks_others(config: Config) -> bool:
    """Tell whether the cell is a dry run whose checks would have to use the network."""
    return config.dry_run and not _all_local(config)


def _all_local(config: Config) -> bool:
    """Tell whether everything that a cell reads is on this machine."""
    sources = prepare.sources(config).values()
    return all(data.local(s.path) for s in sources) and data.model_files(config.model) is not None


def coverage(cells: Iterable[Cell]) -> list[str]:
    """Return a line for each model that gets an adapter: which share of its parameters the adapted layers have.

    A dry run computes it, and so does a run with layers that the user has named. Another run reports what is cached, since its
    records will have it. UserError for layers that the model does not have.
    """
    lines: dict[Path, str] = {}
    seen: set[Path] = set()
    for config in (cell.config for cell in cells if cell.chain.adapter):
        file = coverage_file(config)
        targets = config.recipe.lora.target_modules
        if file in seen or not (config.dry_run or targets != ALL_LINEAR or file.exists()):
            continue
        seen.add(file)
        if not file.exists():
            _compute_coverage(config)
        with contextlib.suppress(OSError, ValueError):  # a model whose config is not on this machine
            covered = Coverage.model_validate_json(file.read_text())
            lines[file] = summary.coverage_text(config.model.name, targets, covered)
    return list(lines.values())


def repeats(cells: Iterable[Cell]) -> list[str]:
    """Return a line for each task, and each benchmark, with rows that say what an earlier row says."""
    lines: dict[str, str] = {}
    for config in (cell.config for cell in cells if not _asks_others(cell.config)):
        for name, what, arguments in _read(config):
            if (key := f"{name} {arguments!r}") not in lines:
                lines[key] = _repeats_line(name, what, *data.repeats(*arguments))
    return [line for line in lines.values() if line]


def _read(config: Config) -> Iterator[tuple[str, str, tuple[data.Data, list[str], int, int | None]]]:
    """Yield what a cell trains on and is tested on: a name, what its rows are, and what `data.repeats` takes."""
    seed = config.split_seed
    if config.n != 0:
        yield f"task={config.task.name}", "rows", (config.task.data, data.columns(config.task), seed, None)
    for name, benchmark in config.benchmarks.items():
        yield name, "items", (benchmark.data, data.item_columns(benchmark), seed, benchmark.limit)


def _repeats_line(name: str, what: str, repeated: int, total: int) -> str:
    return f"  {name}: {repeated:,} of {total:,} {what} repeat an earlier one, and each is counted" if repeated else ""


def _compute_coverage(config: Config) -> None:
    """Compute the layers that the cell's adapter covers, in another process: planning must not import torch and PEFT."""
    files = [str(coverage_file(config)), str(shape_file(config))]
    arguments = [config.model.model_dump(), config.recipe.lora.target_modules, *files]
    code = "import json, sys; from d2lora.adapters import empty; empty.write_facts(*json.load(sys.stdin))"
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}  # a config that is not here would be tried for again and again
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input=json.dumps(arguments), text=True, capture_output=True, env=offline)
    _, refused, why = done.stderr.rpartition(f"{UserError.__module__}.{UserError.__name__}: ")
    # What else may fail, a config that is not here for example, is said when it is needed.
    if refused and config.recipe.lora.target_modules != ALL_LINEAR:
        raise UserError(why.strip())
