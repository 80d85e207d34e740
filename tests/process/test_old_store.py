"""A store made by an earlier commit is read as done, and goes on from where it is: tests/old_store/README.md."""

import csv
import itertools
import json
import os
import shlex
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import composing
import pytest

from d2lora.plan import Cell
from d2lora.store import Store

ROOT = Path(__file__).parents[2]
SHIPPED = Path(__file__).parents[1] / "old_store"
MADE_WITH = {"peft": "0.21.2", "trl": "1.16.0"}  # the versions that keys carry
same_packages = pytest.mark.skipif(
    any(version(package) != made_with for package, made_with in MADE_WITH.items()),
    reason=f"keys carry versions, and the store was made with {MADE_WITH}",
)

_RECIPE = "recipe.lora.alpha=32 recipe.lr.warmup=1e-2 recipe.lr.sft=1e-2 recipe.lr.dpo=1e-2 recipe.batch=4 recipe.micro_batch=4"
_LORA = f"{_RECIPE} recipe.lora.r=2 recipe.lora.target_modules=[layers.3.self_attn.v_proj]"  # one layer: small files
_HELD_OUT = "task.benchmark.{0}.limit={1} +task.benchmark.{0}.data.hold_out=40 +task.benchmark.{0}.data.part=held_out"
_MATH = _HELD_OUT.format("lab_math", 8)
_FACTS = "task.benchmark.lab_facts.limit=4"
_ALONE = f"{_MATH} ~task.benchmark.lab_facts"

# What was typed after `python run.py`, with an output folder and wandb.mode=disabled.
AXES = {"method": ["sft", "dpo"], "m": ["0", "8"], "seed": ["0", "1"]}
_GRID = f"sweep=grid n=8 {_LORA} {_MATH} {_FACTS}"
GRID = " ".join([*(f"{key}={','.join(values)}" for key, values in AXES.items()), _GRID])
CELLS = {
    "base": f"n=0 {_LORA} {_MATH} {_FACTS}",
    "warm-up alone": f"n=0 m=8 {_LORA} {_MATH} {_FACTS}",
    "dpo base": f"method=dpo method.reference=base n=8 m=8 {_LORA} {_ALONE}",
    "orpo": f"method=orpo n=8 {_LORA} {_ALONE}",
    "orpo after a warm-up": f"method=orpo n=8 m=8 {_LORA} {_ALONE}",
    "dropout": f"recipe.lora.dropout=0.1 n=8 {_LORA} {_ALONE}",
    "bfloat16": f"model.dtype=bfloat16 n=8 {_LORA} {_MATH} {_FACTS}",
    "pissa": f"init=pissa n=8 m=8 {_LORA} {_ALONE}",
    "eva": f"init=eva init.samples=8 n=8 {_RECIPE} recipe.lora.r=1 recipe.lora.target_modules=[q_proj] {_ALONE}",
    "multilora": f"init=multilora n=8 m=8 {_LORA} recipe.lora.r=4 {_ALONE}",
    "title": f"task=lab_title n=8 {_LORA} {_HELD_OUT.format('lab_title', 4)} {_FACTS}",
}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A copy of the shipped output folder, without its report."""
    return Path(shutil.copytree(SHIPPED, tmp_path / "out", ignore=shutil.ignore_patterns("report", "README.md")))


def python(*arguments: str) -> str:
    """What `python ARGUMENTS` prints, typed in the project's folder."""
    command = [sys.executable, *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ, timeout=300)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def compose(overrides: str, output: Path = SHIPPED) -> Cell:
    """The cell that the current code composes, with the keys that it gives where the store's packages are installed."""
    with mock.patch("d2lora.stages.stage.version", MADE_WITH.__getitem__):
        return composing.cell(*shlex.split(overrides), f"output={output}")


def grid() -> dict[str, str]:
    """The overrides of each cell of the grid, by what it differs in."""
    points = (" ".join(map("=".join, zip(AXES, point, strict=True))) for point in itertools.product(*AXES.values()))
    return {point: f"{point} {_GRID}" for point in points}


def manifest(sweep: str) -> list[dict]:
    """The cells of a shipped manifest."""
    return json.loads((SHIPPED / "manifests" / f"{sweep}.json").read_text())["cells"]


@pytest.mark.parametrize(("sweep", "cells"), [("grid", grid()), ("adhoc", CELLS)])
def test_every_stage_is_done(sweep: str, cells: dict[str, str]) -> None:
    composed = {name: compose(overrides) for name, overrides in cells.items()}
    left = [
        f"{name}: {stage.kind}: {stage.key} ({stage.label})"
        for name, cell in composed.items()
        for stage in cell.chain.stages
        if not Store(SHIPPED).done(stage)
    ]
    assert not left, "\n".join([f"{len(left)} stages would be done again:", *left])
    assert [cell.id for cell in composed.values()] == [entry["id"] for entry in manifest(sweep)]


def test_check_finds_nothing_wrong_and_gc_nothing_to_free(output: Path) -> None:
    assert ", 0 of them to look at" in python("-m", "d2lora.store", "check", "--output", str(output))
    assert "0 entries could be freed" in python("-m", "d2lora.store", "gc", "--output", str(output))


def tables_of_values(file: Path) -> list[str]:
    """The headings and tables of a Markdown report, but for those of pairs."""
    return [x for x in file.read_text().split("\n\n") if x.startswith(("#", "|")) and not x.startswith("| D2LoRA - ")]


def test_the_report_is_the_same(output: Path) -> None:
    """Values are, to the last digit. Verdicts say more since then (equivalence, a pooled effect) and the pairs' table has a column
    more, so lines of these are not compared as they are: each comparison's old numbers come first in its new line."""
    python("-m", "d2lora.report", "--output", str(output))
    files = [str(file.relative_to(SHIPPED)) for file in (SHIPPED / "report").rglob("*.*")]
    assert len(files) == 3
    files.remove("report/results.csv")
    for file in files:
        assert tables_of_values(output / file) == tables_of_values(SHIPPED / file)
    old_lines = (SHIPPED / "report" / "grid" / "table.md").read_text().splitlines()
    new_lines = (output / "report" / "grid" / "table.md").read_text().splitlines()
    for line in old_lines:
        if line.startswith("|"):
            assert any(new.startswith(line) for new in new_lines), line
        if line.startswith("D2LoRA beats LoRA"):
            assert all(any(sentence in new for new in new_lines) for sentence in line.split(". ")), line
    old, new = (list(csv.DictReader((f / "report" / "results.csv").open())) for f in (SHIPPED, output))
    assert [{k: row[k] for k in old[0]} for row in new] == old, "newer columns come after"


@same_packages
def test_the_grid_typed_again_has_nothing_to_do(output: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in (output / "store").rglob("*.*")}
    printed = python("run.py", "-m", *shlex.split(GRID), "wandb.mode=disabled", f"output={output}")
    assert ", 0 to do" in printed.splitlines()[0]
    assert "DPO LoRA          18.75" in printed
    assert {
        file: file.stat().st_mtime_ns for file in (output / "store").rglob("*.*") if ".locks" not in str(file)
    } == before


@same_packages
@pytest.mark.parametrize("name", ["pissa", "multilora", "dpo base"])
def test_training_goes_on_from_an_old_adapter(name: str, output: Path) -> None:
    """An adaptation done again from its old warm-up gives what it gave: PiSSA's and MultiLoRA's from `state/`."""
    from doing import do  # late: it imports torch

    cell = compose(CELLS[name], output)
    again = [cell.chain.adapt, *cell.chain.evaluations]
    store = Store(output)
    for stage in again:
        shutil.rmtree(store.folder(stage))
    do(cell)
    old, new = (json.loads((at.folder(cell.chain.adapt) / "record.json").read_text()) for at in (Store(SHIPPED), store))
    assert new["parent"] == cell.chain.warmup.key
    assert new["metrics"]["first_loss"] == pytest.approx(old["metrics"]["first_loss"], rel=1e-4)
    assert new["metrics"]["last_loss"] == pytest.approx(old["metrics"]["last_loss"], rel=1e-2)
