"""Find lm-evaluation-harness's tasks, its own and those in a folder of the user's, and check them before a run."""

import contextlib
import functools
import json
import logging
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from d2lora import keys
from d2lora.data.hub import hub_problem
from d2lora.data.sources import digest, local
from d2lora.errors import UserError
from d2lora.settings import HarnessTask

_CACHES = ("__pycache__", ".ipynb_checkpoints")


@functools.cache
def harness() -> Any:
    """Return lm-evaluation-harness's index of its own tasks: reading its thousands of files can take many seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def load_harness_task(name: str, folder: str | None = None) -> Any:
    """Return the harness's task of this name with its data. The first in `folder`, the user's, then the harness's own.

    UserError if there is no single task of this name, or its data can't be had.
    """
    _require_single(name, folder)
    manager = _manager(name, folder)
    try:
        with quiet():
            return manager.load([name])["tasks"][name]
    except FileNotFoundError as error:
        raise UserError(f"task.lm_eval={name}: its data can't be had: {_first_line(error)}") from None
    except Exception as error:
        problem = hub_problem("task.lm_eval", name, error)
        raise UserError(problem.replace("the Hub's answer was", "can't be loaded:")) from None


def check_lm_eval(
    tasks: Sequence[HarnessTask], folder: str | None = None, objectives: Sequence[tuple[str, str]] = ()
) -> None:
    """Check before training that each task exists, that its data can be had, and that its settings fit it.

    `objectives` are names of benchmarks, these tasks among them, with the metric that a sweeper optimizes.

    UserError if not. Prints which filter counts where a task reads answers in several ways and none was chosen.
    """
    for task in tasks:
        loaded = load_harness_task(task.name, folder)
        _check_metrics(loaded, task.name, [metric for name, metric in objectives if name == task.name])
        config = loaded.config
        _refuse_dates(task.name, loaded)
        filters = [each["name"] for each in config.filter_list or []]
        if task.filter and task.filter not in (filters or ["none"]):
            raise UserError(f"task.lm_eval={task.name}: filter={task.filter}: {', '.join(filters) or 'it has none'}")
        if task.filter is None and len(filters) > 1:
            others = ", ".join(filters[1:])
            print(
                f"task.lm_eval={task.name}: its filter {filters[0]} counts; it also has {others} "
                f"(task.lm_eval=[{{name:{task.name},filter:{filters[1]}}}])",
                file=sys.stderr,
            )
        if task.fewshot and config.num_fewshot == 0:
            raise UserError(f"task.lm_eval={task.name}: fewshot={task.fewshot}: the task is defined without examples")


def _check_metrics(loaded: Any, name: str, wanted: Sequence[str]) -> None:
    """Raise UserError for a metric that a loaded task does not have."""
    known = loaded.aggregation()
    for metric in wanted:
        if metric not in known:
            raise UserError(f"objective={name}/{metric}: {name} has {', '.join(known)}")


def check_names(tasks: Sequence[HarnessTask], folder: str | None = None) -> None:
    """Check that each task exists, and load none. UserError if one does not.

    The harness's own index takes many seconds and imports torch, so it is asked only for a name that is in no file of tasks.
    """
    for task in tasks:
        if not any(_is_written(task.name, path) for path in _task_folders(task.name, folder)):
            _require_single(task.name, folder)


def _task_folders(name: str, folder: str | None) -> Iterator[Path]:
    """Yield the user's folder of tasks and those of the harness, first the ones that are named like the task."""
    with contextlib.suppress(UserError):  # _require_single refuses a folder that is none
        if folder and (own := local(folder)):
            yield own
    package = find_spec("lm_eval")
    roots = package.submodule_search_locations if package else None
    folders = [path for root in roots or [] for path in Path(root, "tasks").glob("*/")]
    yield from sorted(folders, key=lambda path: not name.startswith(path.name))


def _is_written(name: str, folder: Path) -> bool:
    """Tell whether a YAML file below a folder defines a task of this name."""
    defined = re.compile(rf"^\s*(?:- )?task:\s*[\"']?{re.escape(name)}[\"']?\s*(?:#.*)?$", re.MULTILINE)
    return any(defined.search(file.read_text(errors="replace")) for file in sorted(folder.glob("**/*.y*ml")))


def _is_mentioned(name: str, folder: Path) -> bool:
    """Tell whether a file below a folder has this name as a word: groups and tags are in files of any suffix."""
    word = re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])".encode())
    files = (file for file in folder.rglob("*") if file.is_file() and not any(part in _CACHES for part in file.parts))
    return any(word.search(file.read_bytes()) for file in files)


def harness_identity(task: HarnessTask, folder: str | None = None) -> dict[str, Any] | None:
    """Return a task's part of a key, without its name and the harness's version: None for a task of the harness as it is.

    That is the settings that differ, and of a task in the user's `folder` its definition, the files beside it and its
    local data, by their content.
    """
    own = folder is not None and task.name in _own_tasks(folder).all_subtasks
    content = {"content": _content(task.name, folder)} if own and folder else {}
    return (task.changed() | content) or None


def _refuse_dates(name: str, task: Any) -> None:
    """Raise UserError if a template of the task shows a column of dates from JSON.

    The harness's reader makes times of texts like "2021-03-04" where a whole column has this form, and a template shows
    "2021-03-04 00:00:00": the right answer would be scored as wrong.
    """
    if task.config.dataset_path != "json":
        return
    templates = [task.config.doc_to_text, task.config.doc_to_target, task.config.doc_to_choice]
    shown = " ".join(template for template in templates if isinstance(template, str))
    columns = {(column, str(kind)) for part in task.dataset.values() for column, kind in (part.features or {}).items()}
    if times := {column for column, kind in columns if "timestamp" in kind and column in shown}:
        raise UserError(
            f"task.lm_eval={name}: the harness reads {', '.join(sorted(times))} in its JSON data as times and would show "
            '"2021-03-04" as "2021-03-04 00:00:00": save the data as .csv (dataset_path: csv)'
        )


def _require_single(name: str, folder: str | None) -> None:
    """Raise UserError unless a name is a single task: a group has no items of its own.

    A name that is in no file, most likely a typing error, is refused without the index of all tasks.
    """
    if not folder and not any(_is_mentioned(name, path) for path in _task_folders(name, folder)):
        raise UserError(_no_such(name))
    manager = _manager(name, folder)
    if name in manager.all_subtasks:
        return
    if name in manager.all_tasks:
        raise UserError(f"task.lm_eval={name}: a group of tasks: name its tasks one by one")
    own = f"; task.lm_eval_path={folder} has {_own_names(folder)}" if folder else ""
    raise UserError(_no_such(name) + own)


def _no_such(name: str) -> str:
    return f"task.lm_eval={name}: lm-evaluation-harness has no such task: `lm-eval ls tasks` lists them"


def _manager(name: str, folder: str | None) -> Any:
    """Return the index that has a task of this name: of the user's folder, else the harness's own."""
    own = _own_tasks(folder) if folder else None
    return own if own and name in own.all_tasks else harness()


def _own_tasks(folder: str) -> Any:
    """Return the index of the tasks in the user's folder. UserError if there is no such folder."""
    path: Path | None = None
    with contextlib.suppress(UserError):  # it says what data sets may be
        path = local(folder)
    if path is None or not path.is_dir():
        raise UserError(f"task.lm_eval_path={folder}: no such folder here or in the project")
    return _index_of(path)


@functools.cache
def _index_of(path: Path) -> Any:
    from lm_eval.tasks import TaskManager

    with quiet():
        return TaskManager(include_path=path, include_defaults=False)


def _own_names(folder: str) -> str:
    """List the tasks of the user's folder, and the files in it that can't be read as tasks."""
    from lm_eval.tasks._yaml_loader import load_yaml

    broken = []
    for file in sorted((local(folder) or Path(folder)).glob("**/*.yaml")):
        try:
            load_yaml(file, resolve_func=False)
        except Exception as error:
            broken.append(f"{file.name} can't be read ({_first_line(error)})")
    return ", ".join([*_own_tasks(folder).all_subtasks, *broken]) or "none"


def _content(name: str, folder: str) -> str:
    """Return a digest of all that a task of the user's folder reads from this machine; no path of it enters."""
    entry = _own_tasks(folder).task_index[name]
    beside = entry.yaml_path.parent
    code = [file for file in _files(beside) if file.suffix not in (".yaml", ".yml")]
    definition = json.dumps(_by_content(entry.cfg), sort_keys=True, default=str).replace(str(beside), "")
    return keys.digest([definition, *(f"{file.relative_to(beside)} {digest(file)}" for file in code)])


def _by_content(value: Any) -> Any:
    """Replace paths of local files and folders in a task's definition by the digests of what they hold."""
    if isinstance(value, dict):
        return {key: _by_content(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_by_content(inner) for inner in value]
    if not isinstance(value, str) or "/" not in value:
        return value
    with contextlib.suppress(OSError, ValueError):  # a text too long for a file's name, or with null bytes
        path = Path(value)
        if path.exists():
            return [f"{file.name} {digest(file)}" for file in _files(path)]
    return value


def _files(path: Path) -> list[Path]:
    """Return a file, or all files below a folder but caches, in order."""
    if path.is_file():
        return [path]
    return sorted(f for f in path.rglob("*") if f.is_file() and not any(part in _CACHES for part in f.parts))


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the harness's log inside the `with` block: our records have what matters of it."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
