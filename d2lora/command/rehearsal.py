"""Check, while planning, which rows can be used: render and tokenize them as training will.

The tokenizer runs in a process of its own without torch, because importing torch would take longer than the work.
Results are cached in <output>/fingerprints.
"""

import contextlib
import dataclasses
import functools
import gc
import json
import os
import pickle
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from d2lora import data
from d2lora.collection import uncollected
from d2lora.data.files import Row, listed
from d2lora.data.pairs import EQUAL
from d2lora.data.tokens import BAD, FITS, LONG
from d2lora.errors import UserError
from d2lora.keys import Identity, digest
from d2lora.outputs import cached
from d2lora.settings import Benchmark, Config, Data, Model, Task, Warmup
from d2lora.stages import prepare

Make = Callable[[Any, Row], data.Example]  # tokenizer, row -> example


@dataclass(frozen=True)
class Source:
    """Where a model's tokenizer is loaded from, and everything about it that can change token ids."""

    path: str  # a local folder, or a name on the Hub
    revision: str | None
    trust_remote_code: bool
    thinking: bool
    identity: Identity


@dataclass(frozen=True)
class Draw:
    """Rows in the order in which they will be drawn, and how an example is made of one.

    `key` covers everything that can change the fates of rows, except how many are drawn.
    """

    key: str
    read: Callable[[], list[Row]]
    make: Make
    max_length: int
    preference: bool = False  # pairs of equal answers are left out; their fates are the same

    @functools.cached_property
    def rows(self) -> list[Row]:
        """Return the rows, read once."""
        return self.read()


# Caches of this process: the fates of rows, by a draw's key, and the results that `remember` will write.
_fates: dict[str, list[str]] = {}
_results: dict[Path, dict[str, Any]] = {}


def begin(config: Config, output: Path) -> None:
    """Start the tokenizer's process if `check` will need it: it imports transformers while the rows are read."""
    if "transformers" in sys.modules or (source := _source(config.model, output)) is None:
        return
    with contextlib.suppress(UserError):  # of data that do not exist: the check of the rows says so
        if any(not _known(_file(draw, amount, output)) for draw, amount, _, _ in _draws(config, source)):
            _worker()


def check(config: Config, output: Path) -> None:
    """Check the rows that a cell would draw. UserError for rows that can't be used, and where too few can.

    Nothing is checked if the tokenizer is not on this machine (a model on the Hub that was never used here).
    """
    if source := _source(config.model, output):
        for draw, amount, rows, name in _draws(config, source):
            _enough(draw, amount, source, output, rows, name)


def _draws(config: Config, source: Source) -> Iterator[tuple[Draw, int | str, Data, str]]:
    """Yield a cell's draws, each with how many rows must fit, its data set, and the words for both in an error."""
    task, warmup = config.task, config.warmup
    if config.n != 0:
        yield _task_draw(config, source), config.n, task.data, f"n={config.n}: task={task.name}"
    if config.m != 0:
        yield _general_draw(config, source), config.m, warmup.data, f"m={config.m}: warmup={warmup.name}"
    elif amount := prepare.general_samples(config):
        draw = _general_draw(config, source)
        yield draw, amount, warmup.data, f"init.samples={amount}: warmup={warmup.name}"


def check_items(config: Config, output: Path) -> None:
    """Check a cell's test items. UserError naming those that are too long for the model."""
    source = _source(config.model, output)
    context = _context(source) if source else None
    if source and context:
        for name, benchmark in config.benchmarks.items():
            _items_fit(config, name, benchmark, source, output, context)


def remember() -> None:
    """Write the results to disk; call it once nothing was refused.

    Errors of the disk are ignored here: the run's own writes report them.
    """
    with contextlib.suppress(OSError):
        for file, value in _results.items():
            cached(file, lambda value=value: value)  # type: ignore[misc]
    _results.clear()
    _end()


# --- rows in the order in which they are drawn ---------------------------------------------------------------------


def _task_draw(config: Config, source: Source) -> Draw:
    """Return the draw of the task's rows."""
    task, preference = config.task, config.method.needs_pairs
    rendering = {
        "task": task.model_dump(exclude={"name", "data", "benchmark", "validation", "lm_eval", "lm_eval_path"})
    }
    make = functools.partial(_pair, task=task)
    draw = _draw(config, source, task.data, f"task/{config.data_seed}", rendering, make)
    return dataclasses.replace(draw, preference=preference)


def _general_draw(config: Config, source: Source) -> Draw:
    """Return the draw of the warm-up's rows."""
    rendering = {"warmup": config.warmup.model_dump(exclude={"name", "data", "epochs"})}
    make = functools.partial(_conversation, warmup=config.warmup)
    return _draw(config, source, config.warmup.data, f"warmup/{config.data_seed}", rendering, make)


def _draw(config: Config, source: Source, rows: Data, seed: str, rendering: Identity, make: Make) -> Draw:
    """Return a draw of a data set's rows; `rendering` is what decides how examples are made of them."""
    limit = config.recipe.max_length
    key = _key(source, rows, config.split_seed, rendering | {"seed": seed, "max_length": limit})

    def read() -> list[Row]:
        in_order = data.rows(rows, config.split_seed)
        return [in_order[i] for i in data.shuffled(len(in_order), seed)]

    return Draw(key, read, make, limit)


def _key(source: Source, rows: Data, split_seed: int, rendering: Identity) -> str:
    """Return a hash of everything that can change the fates of rows, the code of `data/` included."""
    spec = {
        "rows": data.identity(rows, split_seed),
        "tokenizer": source.identity,
        "thinking": source.thinking,
        "code": _code(),
    }
    return digest(spec | rendering | {"transformers": version("transformers")})


@functools.cache
def _code() -> list[str]:
    """Return the hashes of the files that read and tokenize rows."""
    return [data.digest(file) for file in sorted((data.ROOT / "d2lora" / "data").glob("*.py"))]


def _pair(tokenizer: Any, row: Row, task: Task) -> data.Example:
    return data.pair_example(tokenizer, task, row)


def _conversation(tokenizer: Any, row: Row, warmup: Warmup) -> data.Example:
    return data.general_example(tokenizer, warmup, row)


def _item(tokenizer: Any, row: Row, benchmark: Benchmark, room: int) -> data.Example:
    return data.item_example(tokenizer, benchmark, row, room)


# --- the fates of rows ---------------------------------------------------------------------------------------------


def _enough(draw: Draw, amount: int | str, source: Source, output: Path, rows: Data, name: str) -> None:
    """Raise UserError unless `amount` rows can be used, or if one of those drawn for them can't be read."""
    file = _file(draw, amount, output)
    if _known(file) or (fates := _until(draw, amount, source)) is None:
        return
    _refuse_bad(draw, fates, f"{name}: data.path={rows.path}")
    counts = Counter(fates)
    fit = counts.pop(FITS, 0)
    misfits = counts.pop(LONG, 0)
    if not fit or (amount != "all" and fit < int(amount)):
        raise UserError(f"{name}: {data.too_few(fit, len(draw.rows), draw.max_length, counts, amount)}")
    _results[file] = {"samples": fit, "misfits": misfits, "left_out": dict(counts)}


def _file(draw: Draw, amount: int | str, output: Path) -> Path:
    """Return the file that remembers that so many rows of a draw can be used."""
    return output / "fingerprints" / f"{digest([draw.key, amount, draw.preference])}.json"


def _until(draw: Draw, amount: int | str, source: Source) -> list[str] | None:
    """Return the fates of rows in order until `amount` fit; None if the tokenizer can't be loaded."""
    fates_so_far = _fates.setdefault(draw.key, [])
    limit = len(draw.rows) if amount == "all" else int(amount)
    while True:
        fates = [_judged(draw, fate) for fate in fates_so_far]
        missing = limit - fates.count(FITS)
        chunk = draw.rows[len(fates_so_far) : len(fates_so_far) + max(missing + missing // 20, 32)]
        if missing <= 0 or not chunk:
            return fates[: _end_of(fates, amount)]
        new = _ask(source, draw.make, chunk, draw.max_length)
        if new is None:
            return None
        fates_so_far += new
        if all(fate.startswith(BAD) for fate in new):  # most likely an error of all rows: no need to read on
            return fates_so_far


def _judged(draw: Draw, fate: str) -> str:
    """Return a row's fate for this draw: only preference methods leave pairs of equal answers out."""
    return fate if fate != _EQUAL else EQUAL if draw.preference else FITS


_EQUAL = f"{FITS}, but {EQUAL}"


def _end_of(fates: list[str], amount: int | str) -> int:
    """Return how many of the fates come before `amount` rows fit."""
    missing = len(fates) if amount == "all" else int(amount)
    for index, fate in enumerate(fates):
        missing -= fate == FITS
        if missing == 0:
            return index + 1
    return len(fates)


def _refuse_bad(draw: Draw, fates: list[str], name: str) -> None:
    """Raise UserError naming the rows that can't be read, rows with one error together."""
    kinds: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for index, fate in enumerate(fates):
        if fate.startswith(BAD):
            text = fate.removeprefix(BAD)
            kinds[text.split(" (")[0]].append((data.number_of(draw.rows[index], index), text))
    if kinds:
        raise UserError(f"{name}: {'; '.join(data.kind_line(errors, len(fates)) for errors in kinds.values())}")


def _items_fit(config: Config, name: str, benchmark: Benchmark, source: Source, output: Path, context: int) -> None:
    """Raise UserError naming the test items that are too long for the model together with their answers."""
    room = data.room_of(benchmark, context)
    rendering = {"benchmark": benchmark.model_dump(exclude={"data"}), "room": room}
    read = lambda: data.rows(benchmark.data, config.split_seed)[: benchmark.limit]  # noqa: E731
    make = functools.partial(_item, benchmark=benchmark, room=room)
    draw = Draw(_key(source, benchmark.data, config.split_seed, rendering), read, make, room)
    file = output / "fingerprints" / f"{draw.key}.json"
    if _known(file) or (fates := _until(draw, "all", source)) is None:
        return
    where = (
        f"task.{'benchmark' if name in config.task.benchmark else 'validation'}.{name}: data.path={benchmark.data.path}"
    )
    _refuse_bad(draw, fates, where)
    long = [data.number_of(draw.rows[i], i) for i, fate in enumerate(fates) if fate == LONG]
    if long and (benchmark.too_long == "refuse" or FITS not in fates):
        others = "; too_long: leave_out in the benchmark's file leaves such items out" if FITS in fates else ""
        raise UserError(
            f"{where}: {listed(sorted(long))} ({len(long)} of {len(fates)} items): longer than the {max(room, 0)} tokens that the "
            f"model leaves (it takes {context}, max_new_tokens={benchmark.max_new_tokens} among them){others}"
        )
    _results[file] = {"items": fates.count(FITS), "left_out": len(fates) - fates.count(FITS)}


def _known(file: Path) -> bool:
    """Tell whether this process or an earlier one has checked these rows without an error."""
    return file in _results or file.is_file()


# --- the tokenizer -------------------------------------------------------------------------------------------------


def _source(model: Model, output: Path) -> Source | None:
    """Return where the model's tokenizer is on this machine or in the Hub's cache; None if it does not exist yet."""
    path = data.model_files(model)
    if path is not None and model.gguf_package:
        path = output / "models" / data.digest(path)[:20]  # where base.py saves the converted weights
    if path is None:
        identity: Identity = {"path": model.path, "revision": model.revision}
    elif path.is_dir():
        files = sorted(f for f in path.iterdir() if f.is_file() and f.suffix != ".safetensors")
        identity = {f.name: data.digest(f) for f in files}
    else:
        return None
    return Source(str(path or model.path), model.revision, model.trust_remote_code, model.thinking, identity)


def _context(source: Source) -> int | None:
    """Return how many tokens the model takes, as lm-evaluation-harness reads it from the config.

    None if the config does not say.
    """
    try:
        return data.context_of(json.loads(_config_file(source).read_text()))
    except (OSError, ValueError):
        return None


def _config_file(source: Source) -> Path:
    """Return the model's config on this machine: in its folder, or in the Hub's cache."""
    file = Path(source.path) / "config.json"
    if not file.is_file():
        cached_file = data.hub().try_to_load_from_cache(source.path, "config.json", revision=source.revision)
        return Path(cached_file) if isinstance(cached_file, str) else file
    return file


def _ask(source: Source, make: Make, rows: list[Row], max_length: int) -> list[str] | None:
    """Return the fates of rows, from this process if it has loaded transformers, else from the worker.

    None without a tokenizer.
    """
    if "transformers" in sys.modules:
        return _answer(source, make, rows, max_length)
    if len(rows) >= _MANY and sys.stderr.isatty():
        print(f"tokenizing {len(rows):,} rows, once ...", file=sys.stderr)
    worker = _worker()
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        pickle.dump((source, make, [dict(row) for row in rows], max_length), worker.stdin)
        worker.stdin.flush()
        return pickle.load(worker.stdout)
    except (EOFError, OSError, pickle.UnpicklingError):
        return None


_MANY = 10_000  # from so many rows on, a line says that tokenizing takes a while
_at_work: list[subprocess.Popen] = []


def _worker() -> subprocess.Popen:
    """Return the process with the tokenizer, started when it is first needed. It ends with this one."""
    if not _at_work:
        path = os.pathsep.join(p for p in (str(data.ROOT), os.environ.get("PYTHONPATH")) if p)
        environment = os.environ | {"PYTHONPATH": path, "TRANSFORMERS_VERBOSITY": "error"}
        command = [sys.executable, "-c", "from d2lora.command.rehearsal import serve; serve()"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        _at_work.append(subprocess.Popen(command, env=environment, **pipes))  # type: ignore[call-overload]
    return _at_work[0]


def _end() -> None:
    """End the worker."""
    while _at_work:
        worker = _at_work.pop()
        worker.communicate()


def serve() -> None:
    """Answer requests of the parent process on stdin until it is closed."""
    sys.modules["torch"] = None  # type: ignore[assignment] # tokenizers don't need it, and importing it takes seconds
    answers, sys.stdout = sys.stdout.buffer, sys.stderr  # so that what libraries print does not get among the answers
    with uncollected():
        from transformers import AutoTokenizer  # noqa: F401  # before the first request, while the parent reads rows
    gc.freeze()  # what was imported is never garbage
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(_answer(*request), answers)
        answers.flush()


def _answer(source: Source, make: Make, rows: list[Row], max_length: int) -> list[str] | None:
    """Return the fates of rows; None if the tokenizer can't be loaded."""
    tokenizer = _tokenizer(source.path, source.revision, source.trust_remote_code, source.thinking)
    if tokenizer is None:
        return None
    return [_fate(functools.partial(make, tokenizer), row, max_length) for row in rows]


def _fate(make: Callable[[Row], data.Example], row: Row, max_length: int) -> str:
    """Return a row's fate: as `data.example_and_fate` has it, or _EQUAL for a pair of equal answers."""
    example, fate = data.example_and_fate(make, row, max_length)
    return (
        _EQUAL if example and "chosen_ids" in example and example["chosen_ids"] == example.get("rejected_ids") else fate
    )


@functools.lru_cache(4)
def _tokenizer(path: str, revision: str | None, trust_remote_code: bool, thinking: bool) -> Any:
    """Load a tokenizer from this machine; None if that fails."""
    from transformers import AutoTokenizer

    options = {"revision": revision, "trust_remote_code": trust_remote_code, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
    except Exception:  # not on this machine, or it needs torch; loading the model will report the error
        return None
    data.set_up(tokenizer, thinking)
    return tokenizer
