"""What of the rows can be used, found out while planning: rendered and tokenized as training will, once.

The tokenizer works in a process of its own, which has no torch: a plan needs none, and importing it would take longer than the
work. What was found is remembered in <output>/fingerprints.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pickle
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from d2lora import data
from d2lora.data.files import Row, listed
from d2lora.data.pairs import EQUAL
from d2lora.data.tokens import BAD, FITS, LONG
from d2lora.errors import UserError
from d2lora.keys import digest
from d2lora.outputs import cached
from d2lora.settings import Benchmark, Config, Data, Model, Task, Warmup
from d2lora.stages import prepare

Make = Callable[[Any, Row], dict]  # tokenizer, row -> example


@dataclass(frozen=True)
class Source:
    """Where a model's tokenizer is loaded from, and what of it can change token ids."""

    place: str
    revision: str | None
    trust_remote_code: bool
    thinking: bool
    identity: dict


@dataclass(frozen=True)
class Draw:
    """Rows in the order in which they will be drawn, and what makes an example of one. `key` names all that matters, but for
    how many are drawn."""

    key: str
    read: Callable[[], list[Row]]
    make: Make
    max_length: int
    preference: bool = False  # pairs of equal answers are left out; their fates are the same

    @functools.cached_property
    def rows(self) -> list[Row]:
        return self.read()


# Of this process: fates of rows by a draw's key, as far as they were asked for, and what is to be remembered.
_fates: dict[str, list[str]] = {}
_found: dict[Path, dict] = {}


def check(config: Config, output: Path) -> None:
    """UserError for rows that a cell would draw and can't use, and for too few that it can.

    Where the tokenizer is not at hand (a model on the Hub that was never used here), nothing is known yet.
    """
    source = _source(config.model, output)
    if source is None:
        return
    if config.n != 0:
        draw = _task_draw(config, source)
        _enough(draw, config.n, source, output, config.task.data, f"n={config.n}: task={config.task.name}")
    if config.m != 0:
        draw = _general_draw(config, source)
        _enough(draw, config.m, source, output, config.warmup.data, f"m={config.m}: warmup={config.warmup.name}")
    if config.m == 0 and (wanted := prepare.general_samples(config)):
        draw = _general_draw(config, source)
        _enough(draw, wanted, source, output, config.warmup.data, f"init.samples={wanted}: warmup={config.warmup.name}")


def check_items(config: Config, output: Path) -> None:
    """UserError naming test items that the model can't take."""
    source = _source(config.model, output)
    context = _context(source) if source else None
    if source and context:
        for name, benchmark in config.benchmarks.items():
            _items_fit(config, name, benchmark, source, output, context)


def remember() -> None:
    """Keep on disk what was found; for when nothing was refused. A disk that fails is for what must be written to say."""
    with contextlib.suppress(OSError):
        for file, value in _found.items():
            cached(file, lambda value=value: value)  # type: ignore[misc]
    _found.clear()
    _end()


# --- what is drawn -------------------------------------------------------------------------------------------------


def _task_draw(config: Config, source: Source) -> Draw:
    task, preference = config.task, config.method.needs_pairs
    what = {"task": task.model_dump(exclude={"name", "data", "benchmark", "validation", "lm_eval"})}
    make = functools.partial(_pair, task=task)
    draw = _draw(config, source, task.data, f"task/{config.data_seed}", what, make)
    return dataclasses.replace(draw, preference=preference)


def _general_draw(config: Config, source: Source) -> Draw:
    what = {"warmup": config.warmup.model_dump(exclude={"name", "data", "epochs"})}
    make = functools.partial(_conversation, warmup=config.warmup)
    return _draw(config, source, config.warmup.data, f"warmup/{config.data_seed}", what, make)


def _draw(config: Config, source: Source, rows: Data, seed: str, what: dict, make: Make) -> Draw:
    limit = config.recipe.max_length
    key = _key(source, rows, config.split_seed, what | {"seed": seed, "max_length": limit})

    def read() -> list[Row]:
        found = data.rows(rows, config.split_seed)
        return [found[i] for i in data.shuffled(len(found), seed)]

    return Draw(key, read, make, limit)


def _key(source: Source, rows: Data, split_seed: int, what: dict) -> str:
    """A digest of everything that can change the fates of rows, the code included."""
    spec = {
        "rows": data.identity(rows, split_seed),
        "tokenizer": source.identity,
        "thinking": source.thinking,
        "code": _code(),
    }
    return digest(spec | what | {"transformers": version("transformers")})


@functools.cache
def _code() -> list[str]:
    return [data.digest(file) for file in sorted((data.ROOT / "d2lora" / "data").glob("*.py"))]


def _pair(tokenizer: Any, row: Row, task: Task) -> dict:
    return data.pair_example(tokenizer, task, row)


def _conversation(tokenizer: Any, row: Row, warmup: Warmup) -> dict:
    return data.general_example(tokenizer, warmup, row)


def _item(tokenizer: Any, row: Row, benchmark: Benchmark, room: int) -> dict:
    """The ids of what is asked; of a choice, with its longest option. Empty where it is short enough anyway."""
    prompt = data.fill(benchmark.prompt, row)
    asked = data.rendered_prompt(tokenizer, prompt) if benchmark.chat else prompt
    if benchmark.choices:
        for option in data.choices(benchmark, row) if benchmark.chat else ():
            data.refuse_tokens(tokenizer, option, "a choice")
        asked += " " + max(data.choices(benchmark, row), key=len)
    if len(asked.encode()) < room:  # no token is shorter than a byte
        return {"input_ids": []}
    return {"input_ids": data.encode(tokenizer, asked)}


# --- what becomes of it --------------------------------------------------------------------------------------------


def _enough(draw: Draw, wanted: int | str, source: Source, output: Path, rows: Data, name: str) -> None:
    """UserError unless `wanted` rows can be used and none on the way to them is broken."""
    file = output / "fingerprints" / f"{digest([draw.key, wanted, draw.preference])}.json"
    if _known(file) or (fates := _until(draw, wanted, source)) is None:
        return
    _refuse_bad(draw, fates, f"{name}: data.path={rows.path}")
    counts = Counter(fates)
    fit = counts.pop(FITS, 0)
    misfits = counts.pop(LONG, 0)
    if not fit or (wanted != "all" and fit < int(wanted)):
        raise UserError(f"{name}: {data.too_few(fit, len(draw.rows), draw.max_length, counts, wanted)}")
    _found[file] = {"samples": fit, "misfits": misfits, "left_out": dict(counts)}


def _until(draw: Draw, wanted: int | str, source: Source) -> list[str] | None:
    """The fates of rows in order until enough fit; None where the tokenizer can't be loaded."""
    known = _fates.setdefault(draw.key, [])
    missing = len(draw.rows) if wanted == "all" else int(wanted)
    while True:
        fates = [_judged(draw, fate) for fate in known]
        left = missing - fates.count(FITS)
        chunk = draw.rows[len(known) : len(known) + max(left + left // 20, 32)]
        if left <= 0 or not chunk:
            return fates[: _end_of(fates, wanted)]
        new = _ask(source, draw.make, chunk, draw.max_length)
        if new is None:
            return None
        known += new
        if all(fate.startswith(BAD) for fate in new):  # so will the others be
            return known


def _judged(draw: Draw, fate: str) -> str:
    return fate if fate != _EQUAL else EQUAL if draw.preference else FITS


_EQUAL = f"{FITS}, but {EQUAL}"


def _end_of(fates: list[str], wanted: int | str) -> int:
    """How many of the fates are looked at until `wanted` fit."""
    left = len(fates) if wanted == "all" else int(wanted)
    for index, fate in enumerate(fates):
        left -= fate == FITS
        if left == 0:
            return index + 1
    return len(fates)


def _refuse_bad(draw: Draw, fates: list[str], name: str) -> None:
    kinds: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for index, fate in enumerate(fates):
        if fate.startswith(BAD):
            text = fate.removeprefix(BAD)
            kinds[text.split(" (")[0]].append((data.number_of(draw.rows[index], index), text))
    if kinds:
        raise UserError(f"{name}: {'; '.join(data.kind_line(found, len(fates)) for found in kinds.values())}")


def _items_fit(config: Config, name: str, benchmark: Benchmark, source: Source, output: Path, context: int) -> None:
    """UserError naming the test items that the model can't take with their answers."""
    room = context - (benchmark.max_new_tokens if benchmark.scoring.generates else 0)
    what = {"benchmark": benchmark.model_dump(exclude={"data"}), "room": room}
    read = lambda: data.rows(benchmark.data, config.split_seed)[: benchmark.limit]  # noqa: E731
    make = functools.partial(_item, benchmark=benchmark, room=room)
    draw = Draw(_key(source, benchmark.data, config.split_seed, what), read, make, room)
    file = output / "fingerprints" / f"{draw.key}.json"
    if _known(file) or (fates := _until(draw, "all", source)) is None:
        return
    where = (
        f"task.{'benchmark' if name in config.task.benchmark else 'validation'}.{name}: data.path={benchmark.data.path}"
    )
    _refuse_bad(draw, fates, where)
    if long := [data.number_of(draw.rows[i], i) for i, fate in enumerate(fates) if fate == LONG]:
        raise UserError(
            f"{where}: {listed(sorted(long))} ({len(long)} of {len(fates)} items): longer than the {max(room, 0)} tokens that the "
            f"model leaves (it takes {context}, max_new_tokens={benchmark.max_new_tokens} among them)"
        )
    _found[file] = {"items": len(fates)}


def _known(file: Path) -> bool:
    """Whether this process or an earlier one found nothing to refuse."""
    return file in _found or file.is_file()


# --- the tokenizer -------------------------------------------------------------------------------------------------


def _source(model: Model, output: Path) -> Source | None:
    """Where the model's tokenizer lies on this machine, if it does."""
    place = data.model_files(model)
    if place is not None and model.gguf_package:
        place = output / "models" / data.digest(place)[:20]  # as model.base leaves it
    if place is None:
        identity: dict = {"path": model.path, "revision": model.revision}
    elif place.is_dir():
        files = sorted(f for f in place.iterdir() if f.is_file() and f.suffix != ".safetensors")
        identity = {f.name: data.digest(f) for f in files}
    else:
        return None
    return Source(str(place or model.path), model.revision, model.trust_remote_code, model.thinking, identity)


def _context(source: Source) -> int | None:
    """How many tokens the model takes, as lm-evaluation-harness reads it from the config."""
    try:
        config = json.loads(_config_file(source).read_text())
    except (OSError, ValueError):
        return None
    for place in (config, config.get("text_config") or {}):
        for name in ("n_positions", "max_position_embeddings", "n_ctx"):
            if isinstance(place.get(name), int):
                return place[name]
    return None


def _config_file(source: Source) -> Path:
    """The model's config on this machine: in its folder, or in the Hub's cache."""
    file = Path(source.place) / "config.json"
    if not file.is_file():
        cached_file = data.hub().try_to_load_from_cache(source.place, "config.json", revision=source.revision)
        return Path(cached_file) if isinstance(cached_file, str) else file
    return file


def _ask(source: Source, make: Make, rows: list[Row], max_length: int) -> list[str] | None:
    """The fates of rows; None where the tokenizer can't be loaded."""
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


_MANY = 10_000  # rows that take long enough to be told of
_at_work: list[subprocess.Popen] = []


def _worker() -> subprocess.Popen:
    """The process with the tokenizer; it ends with this one."""
    if not _at_work:
        path = os.pathsep.join(p for p in (str(data.ROOT), os.environ.get("PYTHONPATH")) if p)
        environment = os.environ | {"PYTHONPATH": path, "TRANSFORMERS_VERBOSITY": "error"}
        command = [sys.executable, "-c", "from d2lora.command.rehearsal import serve; serve()"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        _at_work.append(subprocess.Popen(command, env=environment, **pipes))  # type: ignore[call-overload]
    return _at_work[0]


def _end() -> None:
    while _at_work:
        worker = _at_work.pop()
        worker.communicate()


def serve() -> None:
    """Answer questions on stdin until it closes."""
    sys.modules["torch"] = None  # type: ignore[assignment] # tokenizers need none of it, and it takes seconds
    answers, sys.stdout = sys.stdout.buffer, sys.stderr  # what a library prints is no answer
    while True:
        try:
            asked = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(_answer(*asked), answers)
        answers.flush()


def _answer(source: Source, make: Make, rows: list[Row], max_length: int) -> list[str] | None:
    tokenizer = _tokenizer(source.place, source.revision, source.trust_remote_code, source.thinking)
    if tokenizer is None:
        return None
    return [_fate(functools.partial(make, tokenizer), row, max_length) for row in rows]


def _fate(make: Callable[[Row], dict], row: Row, max_length: int) -> str:
    example, fate = data.made(make, row, max_length)
    return (
        _EQUAL if example and "chosen_ids" in example and example["chosen_ids"] == example.get("rejected_ids") else fate
    )


@functools.lru_cache(4)
def _tokenizer(place: str, revision: str | None, trust_remote_code: bool, thinking: bool) -> Any:
    from transformers import AutoTokenizer

    given = {"revision": revision, "trust_remote_code": trust_remote_code, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **given)
    except Exception:  # not at hand, or one that needs torch: loading the model says what is wrong with it
        return None
    data.set_up(tokenizer, thinking)
    return tokenizer
