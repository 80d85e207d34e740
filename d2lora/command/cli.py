"""From a composed Hydra config to done stages: single cells, and the workers of a grid."""

import contextlib
import errno
import json
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from d2lora import data, pipeline, plan
from d2lora.command import progress, rehearsal, summary
from d2lora.errors import UserError
from d2lora.plan import Cell
from d2lora.report import manifest
from d2lora.settings import Config, parse
from d2lora.store import Store

# Paths such as outputs/ belong to the project's folder, not to where the command is typed.
OmegaConf.register_new_resolver("project", lambda path: str(data.ROOT / path), replace=True)


def guard(main: Callable[[], object]) -> None:
    """Run main and exit: 0, 1 for work that failed or a disk that fails, 2 for input that is wrong (one line), 130 after Ctrl-C."""
    try:
        code = main()
    except KeyboardInterrupt:
        print("interrupted: what is finished is kept; the same command goes on from there", file=sys.stderr)
        code = 130
    except (UserError, HydraException, OmegaConfBaseException) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        code = 2
    except OSError as error:
        if not (error.filename or error.errno in (errno.ENOSPC, errno.EROFS, errno.EDQUOT)):
            raise
        print(f"error: {error.filename or 'output'}: {error.strerror}; what is finished is kept", file=sys.stderr)
        code = 1
    except (ValueError, TypeError, AttributeError) as error:
        if not _is_from_hydra(error):
            raise
        print(f"error: {one_line(error)}", file=sys.stderr)
        code = 2
    sys.exit(code if isinstance(code, int) else 0)


def _is_from_hydra(error: Exception) -> bool:
    """Whether Hydra raised it over what was typed: some of its refusals (method=0) are plain ValueErrors."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").split(".")[0] in ("hydra", "omegaconf", "antlr4", "yaml")


def one_line(error: Exception) -> str:
    """Hydra's messages in one line; a list of options keeps its commas."""
    lines = [line for line in str(error).splitlines() if line.strip() and "HYDRA_FULL_ERROR" not in line]
    text = lines[0].strip() if lines else type(error).__name__
    options = [line.strip() for line in lines[1:] if line.startswith("\t") and "provider=" not in line]
    if "primary config" in text:
        options = [*sorted(f.stem for f in (data.ROOT / "sweeps").glob("*.yaml")), "config"]
    if "--multirun" in str(error):
        text += ": several values make a grid: add -m (--multirun); for a list write key=[a,b]"
    elif options:
        text = f"{text.split('. ')[0].rstrip('.')}. Available: {', '.join(options)}"
    elif len(lines) > 1 and not isinstance(error, UserError):
        text += " " + " ".join(line.strip() for line in lines[1:2])
    return text


def cell(config: DictConfig, overrides: Iterable[str] = ()) -> Cell:
    """The checked cell of a composed config (without Hydra's own part). UserError for what is not allowed."""
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict), "a config is a mapping"
    values.pop("hydra", None)
    checked = parse({str(k): v for k, v in values.items()})
    return Cell(checked, plan.chain(checked), tuple(overrides))


def check_inputs(config: Config, seen: set[str]) -> None:
    """UserError unless the cell's data sets are there, have their columns and enough rows. `seen` spares repeats.

    A dry run checks what lies on this machine, and asks nobody else.
    """
    if config.dry_run and not _all_local(config):
        return

    def once(name: str, check: Callable[[], None]) -> None:
        if name not in seen:
            check()
            seen.add(name)

    if config.n != 0:
        preference = config.method.needs_pairs
        check = lambda: data.check_task(config.task, config.n, config.split_seed, preference)  # noqa: E731
        once(f"{config.task} {config.n} {preference}", check)
    if config.m != 0:
        once(f"{config.warmup} {config.m}", lambda: data.check_warmup(config.warmup, config.m, config.split_seed))
    if config.init.name == "loftq" and find_spec("bitsandbytes") is None:
        raise UserError("init=loftq: needs bitsandbytes, which is not installed: pip install -e '.[loftq]'")
    if config.init.data == "general" and "warmup.data" in plan.sources(config):
        wanted = config.init.samples or 0
        check = lambda: data.check_warmup(config.warmup, wanted, config.split_seed, "init.samples")  # noqa: E731
        once(f"{config.warmup} init {wanted}", check)
    for benchmark in config.task.benchmark.values():
        once(str(benchmark), lambda b=benchmark: data.check_benchmark(b, config.split_seed))  # type: ignore[misc]
    names = _harness_tasks(config)
    once(f"lm_eval {names}", lambda: data.check_lm_eval(names))
    once(str(config.model), lambda: data.check_model(config.model))
    drawn = config.model_dump(include={"model", "task", "warmup", "n", "m", "init", "data_seed", "split_seed"})
    drawn |= {"max_length": config.recipe.max_length, "preference": config.method.needs_pairs}
    once(str(drawn), lambda: rehearsal.check(config, pipeline.output(config)))


def check(config: Config, seen: set[str]) -> None:
    """UserError unless the cell's rows can be trained on and its test items asked, as far as this machine can tell."""
    check_inputs(config, seen)
    if config.dry_run and not _all_local(config):
        return
    asked = f"{config.model} {config.task.benchmark} {config.split_seed}"
    if asked not in seen:
        rehearsal.check_items(config, pipeline.output(config))
        seen.add(asked)


def _harness_tasks(config: Config) -> list[str]:
    """The harness's tasks that are to be done now: it takes many seconds to import, so it is not asked for others."""
    if config.dry_run or not config.task.lm_eval:
        return []
    store = Store(pipeline.output(config))
    left = (s for s in plan.chain(config).evaluations if s.spec.lm_eval and not store.done(s))
    return [s.spec.lm_eval for s in left]


def coverage(cells: Iterable[Cell]) -> list[str]:
    """A line for each model that is adapted: what of it. A dry run finds it out; a run says what is known, and its records the rest."""
    lines = {}
    for config in (cell.config for cell in cells if cell.chain.adapter):
        file = pipeline.coverage_file(config)
        if file in lines or not (config.dry_run or file.exists()):
            continue
        targets = config.recipe.lora.target_modules
        if not file.exists():
            find_coverage(config)
        with contextlib.suppress(OSError, ValueError):  # a model whose config is not on this machine
            lines[file] = summary.coverage_text(config.model.name, targets, json.loads(file.read_text()))
    return list(lines.values())


def find_coverage(config: Config) -> None:
    """Have it written what the cell's adapter reaches, by a process of its own: torch and PEFT take seconds, and a plan needs neither."""
    asked = [config.model.model_dump(), config.recipe.lora.target_modules, str(pipeline.coverage_file(config))]
    code = "import json, sys; from d2lora import model; model.remember_coverage(*json.load(sys.stdin))"
    subprocess.run([sys.executable, "-c", code], input=json.dumps(asked), text=True, capture_output=True)


def _all_local(config: Config) -> bool:
    """Whether everything a cell reads lies on this machine."""
    sources = plan.sources(config).values()
    return all(data.local(s.path) for s in sources) and data.model_files(config.model) is not None


def job(config: DictConfig) -> int:
    """Hydra's task function: a cell typed by hand (exits with its code), or a worker's share of a grid."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return _share(config)
    try:
        sys.exit(_one_cell(cell(config)))
    except (UserError, OmegaConfBaseException) as error:  # Hydra would print a line of its own before guard's
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)


def _one_cell(this: Cell) -> int:
    output = pipeline.output(this.config)
    store = Store(output)
    check(this.config, set())
    rehearsal.remember()
    if this.config.dry_run:
        print(summary.plan_text([this], store, notes=coverage([this])))
        return 0
    manifest.add_to_manifest(output, this)
    with progress.Bar() as bar:
        lost = pipeline.do(this.config, this, store, bar.stage)
    print(summary.cell_text(this, store))
    print(summary.failures_text(output, lost), end="", file=sys.stderr)
    return 1 if lost else 0


def _share(config: DictConfig) -> int:
    """A launcher's job. Nothing but Ctrl-C may leave it as an exception: some launchers then drop the other jobs."""
    try:
        this = cell(config)
        output = pipeline.output(this.config)
        with progress.Note(output) as note:
            return len(pipeline.do(this.config, this, Store(output), note.stage))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if config.job:  # else the reason would lie in a launcher's log that nobody names
            with contextlib.suppress(OSError):
                pipeline.write_failure(data.ROOT / Path(config.output).expanduser(), config.job[0], "a job", error)
        print(f"error: {one_line(error) if isinstance(error, Exception) else error!r}", file=sys.stderr)
        return 1
