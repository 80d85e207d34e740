"""Stage -> work: does one stage with what its parent left, and says in its record where the numbers came from."""

import contextlib
import functools
import gc
import json
import platform
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from d2lora import data, flips, plan
from d2lora.data import overlap
from d2lora.errors import UserError
from d2lora.mirror import runs
from d2lora.plan import Chain, Stage
from d2lora.settings import Config
from d2lora.store import Store, cached, write_json

Progress = Callable[[int, int], None]
_PROC = Path("/proc/self")
_CODE = ("run.py", "d2lora", "hydra_plugins")  # what makes records; configs are in their specs
_PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "tokenizers", "lm-eval", "d2lora")


def output(config: Config) -> Path:
    """The output folder: as given if absolute, else in the project's folder, wherever the command was typed."""
    return data.ROOT / Path(config.output).expanduser()


def run(config: Config, chain: Chain, stage: Stage, store: Store, progress: Progress) -> dict:
    """The record of one stage of the cell; does it if nobody has. Its parent must be done."""

    def work(folder: Path) -> dict:
        mirror.enter_context(runs.stage(config, chain, stage, store))
        started, clock = datetime.now(UTC), time.monotonic()
        _reset_peak_memory()
        base = _base(config) if stage.name != "contamination" else None
        loaded = time.monotonic()
        result = _WORK[stage.name](config, chain, stage, store, base, folder, progress)
        return {
            "key": stage.key,
            "stage": stage.name,
            "label": stage.label,
            "version": plan.VERSIONS[stage.name],
            "spec": stage.spec,
            "parent": stage.parent.key if stage.parent else None,
            **result,
            "files": {str(f.relative_to(folder)): data.digest(f) for f in sorted(folder.rglob("*")) if f.is_file()},
            "provenance": _provenance() | _hardware() | {"started": started.isoformat(timespec="seconds")},
            "seconds": round(time.monotonic() - loaded, 3),
            "load_seconds": round(loaded - clock, 3),
            "peak_memory_mb": _peak_memory_mb(),
        }

    with contextlib.ExitStack() as mirror:  # left once the record is published: that is what is mirrored
        record = store.ensure(stage, work)
    shutil.rmtree(_checkpoints(config, stage), ignore_errors=True)
    return record


def _base(config: Config):
    """The base, loaded once a process, with the process's threads as the recipe has them."""
    with _uncollected():
        import torch  # late: torch and its friends take many seconds to import, and a check of the data needs none of them

        from d2lora.base import load_base

        if config.recipe.threads:
            torch.set_num_threads(config.recipe.threads)
        found = load_base(config.model, output(config) / "models")
    if commit := getattr(found.model.config, "_commit_hash", None):
        _same_commit(config, commit)
    return found


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection inside: what imports make is kept, and each collection would pass over all of it, in vain."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def coverage_file(config: Config) -> Path:
    """Where it is remembered what an adapter reaches of the cell's base (coverage.of)."""
    asked = {"model": data.model_identity(config.model), "target_modules": config.recipe.lora.target_modules}
    return output(config) / "fingerprints" / f"coverage-{plan.digest(asked)}.json"


def _same_commit(config: Config, commit: str) -> None:
    """UserError if a model of the Hub is not the commit that records here were made with: its `main` may have moved."""
    identity = data.model_identity(config.model)
    file = output(config) / "fingerprints" / f"{plan.digest(identity)}.json"
    known = cached(file, lambda: identity | {"commit": commit})
    if known["commit"] != commit:
        raise UserError(
            f"model.path={config.model.path}: revision {config.model.revision} is {commit} now, and records in {output(config)} were "
            f"made with {known['commit']}: give that as model.revision, or another output"
        )


def _rows(config: Config, source: data.Data) -> list[dict]:
    """A data set's rows. UserError if they are not what this name and revision held when records here were made.

    A local file enters the keys by its content. The Hub's `main` may move: then the records would mix two data sets.
    """
    found, identity = data.rows(source, config.split_seed), data.identity(source, config.split_seed)
    if "content" not in identity:
        name = plan.digest(identity)
        here = {"rows": len(found), "sha256": data.fingerprint(found)}
        known = cached(output(config) / "fingerprints" / f"{name}.json", lambda: identity | here)
        if known["sha256"] != here["sha256"]:
            raise UserError(
                f"data.path={source.path}: revision {source.revision} has {here['rows']:,} rows that are not the {known['rows']:,} "
                f"that records in {output(config)} were made from: pin data.revision to a commit, or give another output"
            )
    return found


def _contamination(config, chain, stage, store, base, folder, progress) -> dict:
    pair = plan.pairs(config)[chain.contamination.index(stage)]
    tests, rows = (_rows(config, source) for source in (pair.benchmark.data, pair.rows))
    templates = {"prompt": pair.benchmark.prompt, "gold": pair.benchmark.gold, "trained": pair.templates}
    items = overlap.overlap(tests, pair.question, pair.answer, rows, list(pair.columns), progress, **templates)
    _write_items(folder, items)
    return {"pair": pair.name, "metrics": overlap.shares(items, len(tests)), "data": {"rows": len(rows)}}


def _write_items(folder: Path, items: list[dict]) -> None:
    with (folder / "items.jsonl").open("w") as file:
        file.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in items)


def _prepare(config, chain, stage, store, base, folder, progress) -> dict:
    from d2lora.adapters import attach, coverage, inits

    draw = {"general": _general_rows, "task": _task_rows}.get(config.init.data)
    drawn = draw(config, stage, base, stage.spec["samples"]) if draw else data.Subset([], [], [])
    attach.check_round_trip(base, stage.spec, _proofs(config))
    with attach.adapter(base, stage.spec, None) as wrapped:
        reached = cached(coverage_file(config), functools.partial(coverage.of, wrapped))
        sequences = [s for e in data.sft_examples(drawn.examples) for s in data.sequences(e)]
        inits.prepare(wrapped, stage.spec, sequences, progress)
        saved = attach.save(base, wrapped, folder)
    # LoftQ's too was prepared on the base itself; what is trained from it starts on the quantized one.
    attach.check_saved(base, saved, folder, "lora")
    return {"metrics": {"samples_seen": len(drawn.rows)}, "data": drawn.counts(), "coverage": reached}


def _general_rows(config, stage, base, amount: int | str) -> data.Subset:
    make = functools.partial(data.general_example, base.tokenizer, config.warmup)
    rows = _rows(config, config.warmup.data)
    return data.subset(rows, make, amount, stage.spec["max_length"], f"warmup/{config.data_seed}")


def _task_rows(config, stage, base, amount: int | str) -> data.Subset:
    preference = stage.name == "adapt" and config.method.needs_pairs  # a preparation is the same for all methods
    make = functools.partial(data.pair_example, base.tokenizer, config.task, preference=preference)
    rows = _rows(config, config.task.data)
    at_most = stage.name == "prepare" and config.n == "all"  # which may be fewer rows than init.samples
    return data.subset(rows, make, amount, stage.spec["max_length"], f"task/{config.data_seed}", at_most)


def _warm_up(config, chain, stage, store, base, folder, progress) -> dict:
    return _train(config, stage, store, base, folder, progress, _general_rows(config, stage, base, config.m))


def _adapt(config, chain, stage, store, base, folder, progress) -> dict:
    return _train(config, stage, store, base, folder, progress, _task_rows(config, stage, base, config.n))


def _train(config, stage, store, base, folder, progress, drawn: data.Subset) -> dict:
    from d2lora.adapters import attach, coverage
    from d2lora.train import training

    parent = store.place(stage.parent) if stage.parent else None
    checkpoints, reference, proofs = _checkpoints(config, stage), _reference(config, stage), _proofs(config)

    if parent is None:
        attach.check_round_trip(base, stage.spec, proofs)

    def attempt(micro_batch: int) -> tuple[dict, dict]:
        recipe = config.recipe.model_copy(update={"micro_batch": micro_batch})
        with attach.adapter(base, stage.spec, parent) as wrapped:
            reached = cached(coverage_file(config), functools.partial(coverage.of, wrapped))
            metrics = training.train(base, wrapped, drawn, stage.spec, recipe, checkpoints, progress, reference, proofs)
            saved = attach.save(base, wrapped, folder)
        attach.check_saved(base, saved, folder, stage.spec["init"]["name"])
        return metrics, reached

    def smaller(micro_batch: int) -> int:
        return max(d for d in range(1, micro_batch // 2 + 1) if stage.spec["batch"] % d == 0)

    metrics, reached = _in_memory(attempt, smaller, "recipe.micro_batch", config.recipe.micro_batch)
    return {"metrics": metrics, "data": drawn.counts(), "coverage": reached}


def _in_memory(attempt: Callable[[int], Any], smaller: Callable[[int], int], key: str, size: int) -> Any:
    """attempt(size), again with a smaller size as often as memory runs out. UserError with advice when 1 is too much."""
    import torch

    while True:
        try:
            return attempt(size)
        except torch.OutOfMemoryError:
            if size == 1:
                raise UserError(
                    f"{key}=1: out of memory: try recipe.gradient_checkpointing=true, a smaller recipe.max_length or a larger GPU"
                ) from None
        size = smaller(size)  # outside of except: the error's frames hold the memory
        torch.cuda.empty_cache()
        print(f"out of memory: again with {key}={size}", file=sys.stderr)


def _proofs(config: Config) -> Path:
    """Where it is remembered what was shown to be exact (proof.Memory)."""
    return output(config) / "proofs"


def _checkpoints(config: Config, stage: Stage) -> Path:
    """Where a training that was killed finds what it had."""
    return output(config) / "checkpoints" / stage.key


def _reference(config: Config, stage: Stage) -> Path:
    """Where the log-probabilities of DPO's reference are remembered: one folder a policy, for all cells that start from it."""
    method, init = stage.spec.get("method", {}), stage.spec["init"]
    starts_as_base = stage.parent is None or (stage.parent.name == "prepare" and init["name"] != "loftq")
    if not starts_as_base and method.get("reference") != "base":
        policy = stage.parent.key
    else:
        started = {"model": stage.spec["model"], "version": plan.VERSIONS["adapt"]}
        if method.get("reference") != "base" and init["name"] == "orthogonal":  # B A is 0 only to rounding
            started |= {k: stage.spec[k] for k in ("init", "lora", "seed")}
        policy = plan.digest(started)
    return output(config) / "reference" / policy


def _evaluate(config, chain, stage, store, base, folder, progress) -> dict:
    from d2lora.adapters import attach
    from d2lora.evaluate import harness

    name = plan.benchmarks(config)[chain.evaluations.index(stage)]
    parent = store.place(stage.parent) / "adapter" if stage.parent else None
    init = stage.parent.spec["init"]["name"] if stage.parent else "lora"
    with attach.trained(base, parent, init) as (tested, changes):
        metrics, items, batch = _scored(config, name, base, tested, config.recipe.eval_batch, progress)
    _write_items(folder, items)
    result = {"benchmark": name, "metrics": metrics, "eval_batch": batch}
    counted = harness.counts(items)
    return result | ({"counts": counted} if counted else {}) | ({"adapter_changes_logits": changes} if parent else {})


def _scored(config, name: str, base, tested, batch: int, progress: Progress, limit: int | None = None) -> tuple:
    """A benchmark's metrics, its items (the first `limit`), and the batch that memory and the model had them done in."""
    from d2lora.evaluate import harness
    from d2lora.layouts import proof

    benchmark = config.task.benchmark.get(name)
    template = base.tokenizer.chat_template is not None
    task = harness.task_of(name, benchmark, _rows(config, benchmark.data), template) if benchmark else name
    chat = benchmark.chat and template if benchmark else False
    proofs = proof.Memory(_proofs(config), data.model_identity(config.model))

    def attempt(size: int) -> tuple:
        return harness.evaluate(base, tested, task, chat, size, progress, proofs, limit)

    return _in_memory(attempt, lambda size: size // 2, "recipe.eval_batch", batch)


def _flips(config, chain, stage, store, base, folder, progress) -> dict:
    name, runs = plan.benchmarks(config)[chain.flips.index(stage)], []
    for number, batch in enumerate(stage.spec["batches"]):
        half = lambda done, total, before=number: progress(before * total + done, 2 * total)  # noqa: E731
        runs.append(_scored(config, name, base, base.model, batch, half, stage.spec["items"]))
    (metrics, some, alone), (_, others, together) = runs
    found, differing = flips.compare(some, others, list(metrics))
    _write_items(folder, differing)
    return {"benchmark": name, "base": config.model.name, "batches": [alone, together], "metrics": found}


_WORK = {
    "contamination": _contamination,
    "flips": _flips,
    "prepare": _prepare,
    "warmup": _warm_up,
    "adapt": _adapt,
    "evaluate": _evaluate,
}


# --- a worker's share ----------------------------------------------------------------------------------------------


def do(config: Config, cell: plan.Cell, store: Store, watch: Callable[[Stage], Progress]) -> list[Stage]:
    """Do the cell's stages that `config.job` names (all without it), in order. Returns those that failed or were blocked.

    A failure is written to <output>/failed and blocks what depends on it, nothing else.
    """
    wanted = set(config.job) if config.job is not None else None
    unknown = (wanted or set()) - {s.key for s in cell.chain.stages}
    if unknown:
        raise UserError(
            f"job={','.join(sorted(unknown))}: not a stage of this cell: the code or the data changed since the sweep was planned; start it again"
        )
    lost: list[Stage] = []
    for stage in cell.chain.stages:
        if wanted is not None and stage.key not in wanted:
            continue
        if stage.parent and not store.done(stage.parent):
            lost.append(stage)
            continue
        try:
            run(config, cell.chain, stage, store, watch(stage))
            failure(config, stage).unlink(missing_ok=True)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a launcher must see neither: sys.exit in a stage ends this stage only
            report_failure(config, stage, error)
            lost.append(stage)
    runs.cell(cell, store)
    runs.flush(config)
    return lost


def failure(config: Config, stage: Stage) -> Path:
    """Where a stage's failure is written."""
    return output(config) / "failed" / f"{stage.key}.json"


def report_failure(config: Config, stage: Stage, error: BaseException) -> None:
    """Leave <output>/failed/<key>.json: what failed, why, and the traceback."""
    write_failure(output(config), stage.key, stage.label, error)


def write_failure(folder: Path, key: str, label: str, error: BaseException) -> None:
    """Leave <folder>/failed/<key>.json."""
    line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    text = "".join(traceback.format_exception(error))
    write_json(folder / "failed" / f"{key}.json", {"key": key, "label": label, "error": kind + line, "traceback": text})


# --- provenance ----------------------------------------------------------------------------------------------------


@functools.cache
def _provenance() -> dict:
    return {"packages": _versions(), "python": platform.python_version(), "git": _git()}


def _torch():
    """torch, if this process has imported it: a check of the data does not need it."""
    return sys.modules.get("torch")


def _hardware() -> dict:
    hardware: dict = {"machine": platform.machine(), "cpu": _cpu()}
    if torch := _torch():
        hardware |= {"cores": torch.get_num_threads(), "simd": torch.backends.cpu.get_cpu_capability()}
        if torch.cuda.is_available():
            hardware["gpu"] = torch.cuda.get_device_name()
    return {"hardware": hardware, "threads": hardware.get("cores", 1)}


@functools.cache
def _cpu() -> str:
    """The processor's name, as far as the system tells."""
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open() as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _versions() -> dict:
    from importlib.metadata import PackageNotFoundError

    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _git() -> dict | None:
    """The project's commit and whether its code differs from it; None outside a checkout."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=data.ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        status = subprocess.run(
            ["git", "status", "--porcelain", "-uno", "--", *_CODE],
            cwd=data.ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "dirty": bool(status.strip())}


def _reset_peak_memory() -> None:
    """Let the process's peak memory start anew. Of resident memory only Linux can; elsewhere it is that of the process so far."""
    if (torch := _torch()) and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        (_PROC / "clear_refs").write_text("5")


def _peak_memory_mb() -> float:
    """Peak GPU memory of the stage; without a GPU, its peak resident memory, what the process had before included."""
    import resource

    if (torch := _torch()) and torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    with contextlib.suppress(OSError):
        if found := re.search(r"^VmHWM:\s*(\d+) kB", (_PROC / "status").read_text(), re.MULTILINE):
            return round(int(found[1]) / 2**10, 1)
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes on macOS, KiB elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20, 1)
