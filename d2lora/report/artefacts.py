"""A sweep's artefacts: its own table and curves, Table 2, and those of the paper's tables and figures that it holds."""

from dataclasses import dataclass
from pathlib import Path

from d2lora.errors import UserError
from d2lora.records import Records, Score
from d2lora.report import evidence, figures, formats, inits, paper, settings, tables
from d2lora.report.figures import Panel
from d2lora.report.manifest import read_manifest
from d2lora.report.points import Point, points_of
from d2lora.report.tables import Table


@dataclass
class Shown:
    """Tables with their caption and notes, or a figure's panels."""

    name: str
    caption: str
    tables: list[Table]
    panels: list[Panel]
    notes: list[str]


@dataclass
class Sweep:
    """Everything that a report shows of a sweep; `problem` says why it has no tables, if it has none.

    The first of `shown` is the sweep's own table, the others are the paper's.
    """

    name: str
    problem: str
    settings: tuple[list[str], list[list[str]]]
    shown: list[Shown]
    contamination: dict[str, dict[str, Score]]
    inits: list[inits.Row]


def load(output: Path, name: str, records: Records) -> Sweep:
    """A sweep's tables and panels from its manifest and records."""
    manifest = read_manifest(output, name)
    cells = manifest.cells
    try:
        points, problem = points_of(manifest, records), ""
    except UserError as error:
        points, problem = [], str(error)
    columns = cells[0].config.get("report", {}).get("columns") if cells else None
    shown = _shown(name, points, records, columns) if points else []
    contamination = evidence.contamination(cells, records)
    return Sweep(name, problem, settings.settings(cells), shown, contamination, inits.compare(points, records))


def _shown(name: str, points: list[Point], records: Records, columns: str | None) -> list[Shown]:
    own = tables.build(points, columns)
    curves = [panel for t in own for panel in figures.panels(t, "all")]
    found = [Shown("table", f"Sweep {name}", own, curves, evidence.notes(points, records))]
    for artefact in (*paper.TABLES, *paper.FIGURES):
        if chosen := paper.select(artefact, points):
            built = tables.build(chosen, "n")
            panels = figures.of(artefact, built) if artefact in paper.FIGURES else []
            found.append(Shown(artefact.name, artefact.caption, built, panels, evidence.notes(chosen, records)))
    return found


def text(sweep: Sweep) -> str:
    """What the terminal shows of a sweep: its own tables with verdicts, and what speaks against them."""
    if sweep.problem:
        return f"no table: {sweep.problem}"
    own = sweep.shown[0]
    parts = [formats.text(t) for t in own.tables] + [f"note: {line}" for line in own.notes]
    return "\n\n".join(filter(None, [*parts, evidence.contamination_text(sweep.contamination)]))


def write(folder: Path, sweep: Sweep) -> None:
    """Tables as Markdown, LaTeX and CSV, figures as PNG, SVG and PDF."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_settings(folder, sweep)
    if sweep.inits:
        inits.write(folder, sweep.inits)
    for shown in sweep.shown:
        if shown.name.startswith("table"):
            (folder / f"{shown.name}.md").write_text(formats.markdown(shown.caption, shown.tables, shown.notes))
            (folder / f"{shown.name}.tex").write_text(formats.latex(shown.caption, shown.tables, shown.notes))
            (folder / f"{shown.name}.csv").write_text(formats.csv_text(shown.tables))
        figures.draw(shown.panels, folder / ("curves" if shown.name == "table" else shown.name))


def _write_settings(folder: Path, sweep: Sweep) -> None:
    head, lines = sweep.settings
    caption = f"Table 2: the settings that ran in sweep {sweep.name}"
    escaped = [[formats.latex_text(c) for c in row] for row in lines]
    (folder / "table2.md").write_text(f"# {caption}\n\n{formats.markdown_rows(head, lines)}\n")
    (folder / "table2.tex").write_text(formats.latex_rows(caption, head, escaped) + "\n")
    (folder / "table2.csv").write_text(formats.csv_rows(head, lines))
