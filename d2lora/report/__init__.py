"""Make tables, figures and the page of finished work, from manifests and records alone: no logs, no W&B.

`python -m d2lora report [SWEEP ...]` writes them for the named sweeps, or for all, into <output>/report/.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from d2lora.errors import UserError
from d2lora.outputs import Outputs, write_text
from d2lora.records import Records
from d2lora.report import manifest

if TYPE_CHECKING:
    from d2lora.report import sweep_report


def finish(output: Path, sweep: str, draw: bool = True) -> str:
    """Write results.csv and return a sweep's tables as text; with `draw`, write its files and the page too."""
    if draw:
        return write(output, [sweep])
    from d2lora.report import results, sweep_report  # late: planning a grid needs none of it

    records = Records(output)
    file, damaged = results.write_results(output, records)
    return "\n\n".join([sweep_report.text(_load(output, sweep, records)), *damaged, f"report: {file}"])


def write(output: Path, sweeps: Iterable[str]) -> str:
    """Write results.csv, the files of the named sweeps in <output>/report/<sweep>/ and the page of all sweeps.

    Returns the named sweeps' tables as text, and a line for each sweep that is damaged. UserError for a sweep that was never
    started.
    """
    from d2lora.report import page, results, sweep_report

    started = manifest.sweeps(output)
    for name in set(sweeps) - set(started):
        manifest.read_manifest(output, name)
    records = Records(output)
    _, damaged = results.write_results(output, records)
    loaded = {name: _load(output, name, records) for name in started}
    parts = []
    for name in sweeps:
        if loaded[name].shown:  # of a damaged sweep there is nothing to write
            sweep_report.write(output, loaded[name])
        parts.append(f"{name}\n{sweep_report.text(loaded[name])}")
    file = Outputs(output).page
    write_text(file, page.page(list(loaded.values()), records))
    return "\n\n".join([*parts, *damaged, f"report: {file}"])


def _load(output: Path, name: str, records: Records) -> "sweep_report.Loaded":
    """Return a sweep's tables and panels. A damaged sweep has none and says why, so that the others are still reported."""
    from d2lora.report import sweep_report

    try:
        return sweep_report.load(output, name, records)
    except UserError as error:
        return sweep_report.damaged(name, records, str(error))


def everything(output: Path, sweeps: list[str]) -> str:
    """Write the report of the named sweeps, or of all (see `write`). UserError if nothing was run yet."""
    names = sweeps or manifest.sweeps(output)
    if not names:
        raise UserError(f"{output}: nothing was run here yet: python run.py, or make lab")
    return write(output, names)
