"""Golden values: what keys and numbers the code gave when they were last looked at. tests/train/test_golden.py compares.

python tests/golden/make.py keys      after a change that was meant to move keys
python tests/golden/make.py numbers   after a change that was meant to move results: raise the stage's VERSION first
"""

import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(FOLDER.parent)]
    os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "CUDA_VISIBLE_DEVICES": ""}

import composing  # noqa: E402
import torch  # noqa: E402
from doing import do, only, save_tiny  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from d2lora import store  # noqa: E402
from d2lora.keys import digest  # noqa: E402
from d2lora.plan import Chain  # noqa: E402
from d2lora.stages import VERSIONS, Stage  # noqa: E402

_PAPER = ["scale=paper", "n=1000"]
_TITLE = ["task=lab_title", "n=200"]
_DROPOUT = ["recipe.lora.dropout=0.1", "n=100", "m=1000"]

# One cell of each kind: what must not move a key by accident.
KEYS: dict[str, list[str]] = {
    "base": ["n=0"],
    "warm-up alone": ["n=0", "m=4000"],
    "sft": ["n=1000"],
    "sft after a warm-up": ["n=1000", "m=4000"],
    "sft on all rows": ["n=all", "m=all"],
    "dpo warm_start": ["method=dpo", "n=1000"],
    "dpo warm_start after a warm-up": ["method=dpo", "n=1000", "m=4000"],
    "dpo base after a warm-up": ["method=dpo", "method.reference=base", "n=1000", "m=4000"],
    "orpo": ["method=orpo", "n=1000", "m=4000"],
    "orpo completion": ["method=orpo", "method.nll=completion", "n=1000"],
    "tuned": ["n=100", "m=100", "tune=[recipe.lr]", "recipe.lr_factor=0.5"],
    "simpo": ["method=simpo", "n=1000", "m=4000"],
    "kto": ["method=kto", "n=1000", "m=4000"],
    "longer": ["control=longer", "n=100", "m=100", "method=dpo"],
    "mixed": ["control=mixed", "n=100", "m=100"],
    "merged": ["control=merged", "control.weight=0.5", "n=100", "m=100"],
    "placebo": ["control=placebo", "n=100", "m=100"],
    "another recipe": ["n=100", "m=100", "recipe.batch=16", "recipe.schedule=linear", "recipe.lr_warmup_ratio=0.1",
                       "recipe.weight_decay=0.01", "recipe.max_grad_norm=0.5", "recipe.max_length=128", "recipe.lr.sft=1e-4"],
    "layers by name": ["n=100", "recipe.lora.r=8", "recipe.lora.alpha=32", "recipe.lora.target_modules=[q_proj,v_proj]"],
    "seeds": ["n=100", "m=100", "seed=1", "data_seed=2", "split_seed=3"],
    "a step alone": ["method=dpo", "n=100", "task.continuation=step"],
    "epochs": ["n=100", "m=100", "method.epochs=5", "warmup.epochs=2"],
    "dropout": _DROPOUT,
    "dropout padded": [*_DROPOUT, "recipe.packing=padded"],
    "dropout by fours": [*_DROPOUT, "recipe.micro_batch=4", "recipe.attention=flex_attention"],
    "title": _TITLE,
    "title after a warm-up": [*_TITLE, "m=4000", "method=sft"],
    "limits": ["n=100", "task.benchmark.lab_math.limit=4", "task.benchmark.lab_facts.limit=8", "task.benchmark.lab_math.max_new_tokens=32"],
    "a task of the harness": ["n=100", "+task.lm_eval=[hellaswag]"],
    "base on a task of the harness": ["n=0", "+task.lm_eval=[hellaswag,piqa]"],
    "held out": ["n=100", "+task.data.hold_out=50"],
    "judged by what is held out": ["n=100", "+task.data.hold_out=50", "+task.benchmark.lab_math.data.hold_out=50",
                                   "+task.benchmark.lab_math.data.part=held_out", "split_seed=1"],
    "where": ["n=10", "m=100", "+warmup.data.where={source:[a,b]}"],
    "bfloat16": ["n=100", "m=100", "model.dtype=bfloat16"],
    "a model's own code": ["n=100", "+model.trust_remote_code=true"],
    "a model of the Hub": ["n=100", "model=smollm2-135m"],
    "paper": [*_PAPER, "m=40000"],
    "paper, all rows": ["scale=paper", "n=all", "m=all", "method=orpo"],
    "paper's title": [*_PAPER, "task=title"],
    "paper's title, tuned": [*_PAPER, "task=title_tuned", "tune=[recipe.lr]"],
    "paper, part of the mix": [*_PAPER, "warmup=mix_math", "m=5000", "method=dpo"],
    "gaussian": ["init=gaussian", "n=100", "m=100"],
    "orthogonal": ["init=orthogonal", "n=100", "m=100", "method=dpo"],
    "pissa": ["init=pissa", "n=100", "m=100"],
    "pissa_niter_16": ["init=pissa_niter_16", "n=100", "seed=1"],
    "olora": ["init=olora", "n=100"],
    "milora": ["init=milora", "n=100"],
    "corda_kpm": ["init=corda_kpm", "n=100"],
    "corda_ipm": ["init=corda_ipm", "n=100", "m=100"],
    "eva": ["init=eva", "n=100"],
    "eva on general rows": ["init=eva", "init.data=general", "n=100"],
    "lora_ga": ["init=lora_ga", "n=100", "m=100", "seed=1"],
    "loftq": ["init=loftq", "n=100"],
    "loftq's base": ["init=loftq", "n=0"],
    "multilora": ["init=multilora", "n=100", "m=100"],
    "rslora": ["init=rslora", "n=100", "m=100"],
    "dora": ["init=dora", "n=100", "m=100"],
}  # fmt: skip

_RATES = [f"recipe.lr.{phase}=3e-3" for phase in ("warmup", "sft", "dpo", "orpo")]
_SMALL = ["recipe.lora.r=4", "recipe.lora.alpha=8", "recipe.batch=4", "recipe.micro_batch=4", *_RATES]
_FACTS = ["~task.benchmark.lab_math", "task.benchmark.lab_facts.limit=8"]
_TINY = [*_SMALL, *_FACTS, "n=20", "method.epochs=2"]
_FROM_DATA = ["init.samples=8"]

# The tiny model, but for those whose name begins with "lab": on a random one no answer is ever right.
NUMBERS: dict[str, list[str]] = {
    "sft": [*_TINY, "m=16"],
    "dpo warm_start": [*_TINY, "method=dpo", "m=16"],
    "dpo base": [*_TINY, "method=dpo", "method.reference=base", "m=16"],
    "orpo prompt_and_chosen": [*_TINY, "method=orpo", "m=16"],
    "orpo completion": [*_TINY, "method=orpo", "method.nll=completion"],
    "simpo": [*_TINY, "method=simpo"],
    "longer": [*_TINY, "control=longer", "m=16"],
    "mixed": [*_TINY, "control=mixed", "m=16"],
    "placebo": [*_TINY, "control=placebo", "m=16"],
    "merged": [*_TINY, "control=merged", "m=16"],
    "kto": [*_TINY, "method=kto", "method.reference=base", "m=16"],
    "gaussian": [*_TINY, "init=gaussian"],
    "orthogonal": [*_TINY, "init=orthogonal"],
    "multilora": [*_TINY, "init=multilora", "m=16"],
    "rslora": [*_TINY, "init=rslora", "m=16"],
    "dora": [*_TINY, "init=dora", "m=16"],
    "pissa": [*_TINY, "init=pissa"],
    "pissa_niter_16": [*_TINY, "init=pissa_niter_16"],
    "olora": [*_TINY, "init=olora"],
    "milora": [*_TINY, "init=milora", "method=dpo"],
    "corda_kpm": [*_TINY, "init=corda_kpm", *_FROM_DATA],
    "corda_ipm": [*_TINY, "init=corda_ipm", *_FROM_DATA],
    "eva": [*_TINY, "init=eva", *_FROM_DATA],
    "lora_ga": [*_TINY, "init=lora_ga", *_FROM_DATA],
    "lab": ["n=0", "task.benchmark.lab_math.limit=32", "task.benchmark.lab_facts.limit=32"],
    "lab title": [*_SMALL, "task=lab_title", "n=20", "task.benchmark.lab_title.limit=32", "task.benchmark.lab_facts.limit=32"],
}  # fmt: skip


# Relative, for losses and likelihoods; ten times that for weights. Instruction sets from SSE to AVX-512 stay within a fifth of it,
# but for CorDA, which inverts a nearly singular matrix, and LoRA-GA, which pairs singular vectors of arbitrary signs.
TOLERANCE = 1e-5
_LOOSE = {"corda_kpm prepare": 10, "corda_kpm adapt": 10, "corda_kpm evaluate": 10}
_LOOSE |= {"lora_ga adapt": 500, "lora_ga evaluate": 500}


def named(chain: Chain) -> dict[str, Stage]:
    """The stages of a cell by names that no label is part of: "adapt", "evaluate", "evaluate 2"."""
    found: dict[str, Stage] = {}
    for stage in chain.stages:
        count = sum(s.kind == stage.kind for s in found.values())
        found[f"{stage.kind} {count + 1}" if count else stage.kind] = stage
    return found


# --- keys ----------------------------------------------------------------------------------------------------------


def pinned(package: str) -> str:
    """The version of constraints.txt: keys carry versions, and another one installed is no change of the code."""
    pins = (line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    return {re.sub("[-_.]+", "-", name).lower(): v for name, v in pins}[package]


def key_of(stage: Stage) -> dict[str, str]:
    """A stage's key and a short digest of each thing it is made of, so that a difference can be named."""
    parent = stage.parent.key if stage.parent else None
    parts = {"VERSIONS": VERSIONS[stage.kind], "parent": parent, **stage.spec.content()}
    return {"key": stage.key} | {name: digest(value, 6) for name, value in parts.items()}


def keys(names: list[str]) -> dict:
    """{cell: {stage: key_of}} as the present code gives them."""
    with mock.patch("d2lora.stages.stage.version", pinned):
        return {
            name: {stage: key_of(s) for stage, s in named(composing.cell(*KEYS[name]).chain).items()} for name in names
        }


# --- numbers -------------------------------------------------------------------------------------------------------


def numbers(name: str, tiny: Path, output: Path) -> dict:
    """{stage: its numbers} of one cell, done now. `versions` are those of the stages that they come from."""
    model = [] if name.startswith("lab") else [f"model.path={tiny}"]
    cell = composing.cell(*model, f"output={output}", *NUMBERS[name])
    wanted = {n: s for n, s in named(cell.chain).items() if s.kind != "contamination" or name == "lab title"}
    done = do(only(cell, *wanted.values()))
    return {n: {"versions": _versions(s)} | _rounded(_measured(done, s)) for n, s in wanted.items()}


def _rounded(value: Any) -> Any:
    """Floats to nine digits: more would only make a diff longer."""
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value


def _versions(stage: Stage) -> dict[str, int]:
    above = _versions(stage.parent) if stage.parent else {}
    return above | {stage.kind: VERSIONS[stage.kind]}


def _measured(done: store.Store, stage: Stage) -> dict:
    record, place = done.record(stage), done.folder(stage)
    metrics = record.metrics
    if stage.kind in ("contamination", "evaluate"):
        found = {name: score.value for name, score in record.scores.items()}
        items = [json.loads(line) for line in (place / "items.jsonl").read_text().splitlines()]
        likelihoods = [x for item in items for x in item.get("loglikelihoods", [])]
        return found | ({"loglikelihoods": sum(likelihoods)} if likelihoods else {})
    counts = {k: v for k, v in metrics.items() if k in ("samples_seen", "tokens_seen", "steps")}
    losses = [entry["loss"] for entry in metrics.get("log", [])]
    some = [losses[i] for i in (0, len(losses) // 2, -1)] if losses else []
    return counts | {f"{w} loss": x for w, x in zip(("first", "middle", "last"), some, strict=False)} | _powers(place)


def _powers(place: Path) -> dict[str, list[float]]:
    """Sums of squares and of fourth powers of what a stage has saved, A and B apart: A alone would hide how B has moved.

    No sign changes them: those of singular vectors differ between processors. Squares alone are the same for all orthonormal vectors.
    """
    found: dict[str, list[float]] = {}
    for file in sorted(place.rglob("*.safetensors")):
        for name, weight in load_file(file).items():
            sums = found.setdefault(f"{file.parent.name} {'AB'['lora_B' in name]}", [0.0, 0.0])
            for i, power in enumerate((2, 4)):
                sums[i] += float(weight.to(torch.float64).pow(power).sum())
    return found


def close(golden: object, found: object, tolerance: float) -> bool:
    """Equal but for rounding: processors differ in the last digits, and training carries that on."""
    if isinstance(golden, list) and isinstance(found, list):  # sums over weights, which move more than losses do
        return all(close(g, f, 10 * tolerance) for g, f in zip(golden, found, strict=True))
    if isinstance(golden, float) and isinstance(found, float | int):
        return abs(golden - found) <= tolerance * abs(golden)
    return golden == found


def moved(cell: str, golden: dict, found: dict) -> Iterator[tuple[str, str]]:
    """(stage, what) of a cell's stages whose numbers are others: ("adapt", "last loss 2.345678, was 2.345123")."""
    for stage in golden | found:
        was, now = golden.get(stage, {}), found.get(stage, {})
        tolerance = TOLERANCE * _LOOSE.get(f"{cell} {stage}", 1)
        parts = [k for k in was | now if k != "versions" and not close(was.get(k), now.get(k), tolerance)]
        if parts:
            yield stage, ", ".join(f"{k} {now.get(k)}, was {was.get(k)}" for k in parts)


def unexplained(cell: str, golden: dict, found: dict) -> list[str]:
    """What has moved although neither the stage's version nor that of one before it was raised."""
    versions = [{stage: value["versions"] for stage, value in values.items()} for values in (golden, found)]
    return [
        f"{cell}: {stage}: {what}"
        for stage, what in moved(cell, golden, found)
        if stage in golden and versions[0].get(stage) == versions[1].get(stage)
    ]


# --- files ---------------------------------------------------------------------------------------------------------


def read(what: str) -> dict:
    """The golden values of `keys` or `numbers`."""
    return json.loads((FOLDER / f"{what}.json").read_text())


def write(what: str, values: dict) -> None:
    """One line a stage, so that a diff shows what has moved."""
    cells = []
    for name, stages in values.items():
        lines = ",\n".join(f"  {json.dumps(stage)}: {json.dumps(value)}" for stage, value in stages.items())
        cells.append(f" {json.dumps(name)}: {{\n{lines}\n }}")
    (FOLDER / f"{what}.json").write_text("{\n" + ",\n".join(cells) + "\n}\n")


def make_keys() -> None:
    """Write keys.json."""
    write("keys", keys(list(KEYS)))


def make_numbers() -> None:
    """Write numbers.json. Refused for numbers that have moved under the same versions: old records would pass for new ones."""
    with tempfile.TemporaryDirectory() as folder:
        tiny = save_tiny(Path(folder) / "tiny")
        found = {name: numbers(name, tiny, Path(folder) / str(i)) for i, name in enumerate(NUMBERS)}
    golden = read("numbers") if (FOLDER / "numbers.json").exists() else {}
    lines = [line for name in golden if name in found for line in unexplained(name, golden[name], found[name])]
    if lines:
        advice = (
            "raise the first of these stages in the stage's VERSION, or find the fault (of a cell with other settings: "
        )
        sys.exit("\n".join([*lines, advice + "delete it from numbers.json)"]))
    write("numbers", found)


def different_packages() -> str:
    """The packages that numbers depend on whose versions are not those of constraints.txt; empty if none."""
    packages = ("torch", "transformers", "trl", "peft", "lm-eval")
    other = [f"{p} {version(p)}, not {pinned(p)}" for p in packages if version(p).split("+")[0] != pinned(p)]
    return f" Installed are {'; '.join(other)}." if other else ""


if __name__ == "__main__":
    makers = {"keys": make_keys, "numbers": make_numbers}
    wanted = sys.argv[1:]
    if not wanted or set(wanted) - set(makers):
        sys.exit(f"usage: python tests/golden/make.py {'|'.join(makers)}")
    for one in wanted:
        makers[one]()
