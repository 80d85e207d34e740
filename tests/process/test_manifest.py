"""What a sweep's name once had is kept, whatever is typed under it next."""

import csv
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import made
import pytest
from made import grid

from d2lora import report
from d2lora.errors import UserError
from d2lora.report import manifest
from d2lora.store import Store, garbage


def sizes(output: Path) -> list[str]:
    with (output / "report" / "results.csv").open() as lines:
        return sorted({row["n"] for row in csv.DictReader(lines)})


def test_another_grid_of_the_same_name_loses_no_result_and_no_adapter(tmp_path: Path) -> None:
    first, second = grid(n=[100], m=[0]), grid(n=[200], m=[0])
    lost = grid(n=[500], m=[0])
    made.publish(tmp_path, first)
    made.publish(tmp_path, lost, missing=lambda stage: stage.kind == "evaluate")
    made.publish(tmp_path, second)
    text = report.finish(tmp_path, "mine")
    assert "n=200" in text
    assert "n=100" not in text, "the table is that of the grid as it was typed last"
    assert sizes(tmp_path) == ["100", "200"], "and results.csv has all that is finished"
    assert list(garbage(tmp_path)) == []


def test_a_cell_that_comes_back_is_in_the_table_again(tmp_path: Path) -> None:
    first, second = grid(n=[100], m=[0]), grid(n=[200], m=[0])
    made.publish(tmp_path, first)
    made.publish(tmp_path, second)
    manifest.write_manifest(tmp_path, [*first, *second])
    found = manifest.read_manifest(tmp_path, "mine")
    assert (len(found.cells), found.earlier) == (len(first) + len(second), [])


def test_a_single_cell_joins_the_grid(tmp_path: Path) -> None:
    (cell,) = grid(n=[200], m=[0])
    manifest.write_manifest(tmp_path, grid(n=[100], m=[0]))
    manifest.add_to_manifest(tmp_path, cell)
    assert [e.config["n"] for e in manifest.read_manifest(tmp_path, "mine").cells] == [100, 200]
    assert not Store(tmp_path).outputs.store.exists()


def test_cells_that_start_at_once_all_join(tmp_path: Path) -> None:
    cells = grid(n=[100, 200, 300, 400], m=[0])
    with ThreadPoolExecutor(len(cells)) as pool:
        list(pool.map(lambda cell: manifest.add_to_manifest(tmp_path, cell), cells))
    found = manifest.read_manifest(tmp_path, "mine").cells
    assert sorted(e.config["n"] for e in found) == [100, 200, 300, 400]


def test_a_cell_that_starts_beside_a_sweep_joins_it(tmp_path: Path) -> None:
    (cell,), *sweeps = grid(n=[1], m=[0]), *(grid(n=[n], m=[0]) for n in (100, 200, 300))
    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(manifest.write_manifest, tmp_path, cells) for cells in sweeps]
        done.append(pool.submit(manifest.add_to_manifest, tmp_path, cell))
    assert [job.result() for job in done] == [None] * 4
    found = manifest.read_manifest(tmp_path, "mine")
    assert sorted(e.config["n"] for e in found.cells + found.earlier) == [1, 100, 200, 300]


@pytest.mark.parametrize("harm", [lambda text: text[:-20], lambda text: "[]"])
@pytest.mark.parametrize("alone", [True, False])
def test_a_damaged_manifest_is_put_aside_and_begun_anew(tmp_path: Path, capsys, alone: bool, harm: Callable) -> None:
    (cell,) = cells = grid(n=[100], m=[0])
    made.publish(tmp_path, grid(n=[200], m=[0]))
    file = tmp_path / "manifests" / "mine.json"
    harmed = harm(file.read_text())
    file.write_text(harmed)
    with pytest.raises(UserError, match="start the sweep again"):
        manifest.read_manifest(tmp_path, "mine")
    manifest.add_to_manifest(tmp_path, cell) if alone else manifest.write_manifest(tmp_path, cells)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{file}: damaged" in line
    assert [e.config["n"] for e in manifest.read_manifest(tmp_path, "mine").cells] == [100]
    aside = file.with_name("mine.json.damaged")
    assert aside.read_text() == harmed
    with pytest.raises(UserError, match=r"mine\.json\.damaged"):  # n=200 is finished work that only it names
        list(garbage(tmp_path))
    aside.unlink()
    assert list(garbage(tmp_path)) != []


def test_gc_frees_nothing_while_a_damaged_manifest_is_there(tmp_path: Path) -> None:
    made.publish(tmp_path, grid(n=[200], m=[0]))
    (tmp_path / "manifests" / "mine.json").rename(tmp_path / "manifests" / "mine.json.damaged")
    command = [sys.executable, "-m", "d2lora.store", "gc", "--yes", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "remove it" in done.stderr
    assert list((tmp_path / "store").glob("adapt/*/record.json"))
