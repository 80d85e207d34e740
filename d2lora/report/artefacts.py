"""A sweep's artefacts: its own table and curves, Table 2, and those of the paper's tables and figures that it holds."""

from dataclasses import dataclass
from pathlib import Path

from d2lora.errors import UserError
from d2lora.records import Records, Score, Tuning
from d2lora.report import evidence, figures, formats, inits, paper, settings, tables, tuning
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

    The first of `shown` is the sweep's own table, the others are the paper's; of a tuned sweep (`tuning`) the first is of the
    chosen cells, and one more of those at the recipe's own values.
    """

    name: str
    problem: str
    settings: tuple[list[str], list[list[str]]]
    shown: list[Shown]
    contamination: dict[str, dict[str, Score]]
    inits: list[inits.Row]
    tuning: Tuning | None = None


def load(output: Path, name: str, records: Records) -> Sweep:
    """A sweep's tables and panels from its manifest and records."""
    manifest = read_manifest(output, name)
    cells = [cell for cell in manifest.cells if cell.stages.evaluate]  # a candidate that was not chosen has met no test
    views = tuning.views(manifest)
    try:
        points, problem = [points_of(view.manifest, records, view.folded) for view in views], ""
    except UserError as error:
        points, problem = [[]], str(error)
    if manifest.tuning and not points[0] and not problem:
        problem = "nothing is chosen yet"
    columns = cells[0].config.get("report", {}).get("columns") if cells else None
    contamination = evidence.contamination(manifest.cells, records)
    sweep = Sweep(name, problem, settings.settings(cells), [], contamination, inits.compare(points[0], records))
    if not problem and points[0]:
        sweep.tuning = manifest.tuning
        own = [_table(view, its, records, columns) for view, its in zip(views, points, strict=True) if its]
        if manifest.tuning:
            own[0].notes[:0] = tuning.notes(manifest.tuning)
        sweep.shown = [*own, *_of_paper(points[0], records)]
    return sweep


def _table(view: tuning.View, points: list[Point], records: Records, columns: str | None) -> Shown:
    built = tables.build(points, None if columns in view.folded else columns)
    curves = [panel for t in built for panel in figures.panels(t, "all")]
    return Shown(view.name, view.caption, built, curves, evidence.notes(points, records))


def _of_paper(points: list[Point], records: Records) -> list[Shown]:
    """The paper's tables and figures that points hold."""
    found = []
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
    parts = [part for own in _own(sweep) for part in _texts(own, headed=sweep.tuning is not None)]
    if sweep.tuning:
        parts.append(tuning.text(sweep.tuning))
    return "\n\n".join(filter(None, [*parts, evidence.contamination_text(sweep.contamination)]))


def _own(sweep: Sweep) -> list[Shown]:
    """A sweep's own tables: one, but of a tuned sweep two."""
    return [shown for shown in sweep.shown if shown.name in ("table", tuning.FIXED)]


def _texts(shown: Shown, headed: bool) -> list[str]:
    head = [f"== {shown.caption} =="] * headed
    return [*head, *map(formats.text, shown.tables), *(f"note: {line}" for line in shown.notes)]


_FIGURES = {"table": "curves", tuning.FIXED: "curves_fixed"}  # the files of tables' figures


def write(folder: Path, sweep: Sweep) -> None:
    """Tables as Markdown, LaTeX and CSV, figures as PNG, SVG and PDF."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_settings(folder, sweep)
    if sweep.inits:
        inits.write(folder, sweep.inits)
    if sweep.tuning:
        tuning.write(folder, sweep.tuning)
    for shown in sweep.shown:
        if shown.name.startswith("table"):
            (folder / f"{shown.name}.md").write_text(formats.markdown(shown.caption, shown.tables, shown.notes))
            (folder / f"{shown.name}.tex").write_text(formats.latex(shown.caption, shown.tables, shown.notes))
            (folder / f"{shown.name}.csv").write_text(formats.csv_text(shown.tables))
        figures.draw(shown.panels, folder / _FIGURES.get(shown.name, shown.name))


def _write_settings(folder: Path, sweep: Sweep) -> None:
    head, lines = sweep.settings
    caption = f"Table 2: the settings that ran in sweep {sweep.name}"
    escaped = [[formats.latex_text(c) for c in row] for row in lines]
    (folder / "table2.md").write_text(f"# {caption}\n\n{formats.markdown_rows(head, lines)}\n")
    (folder / "table2.tex").write_text(formats.latex_rows(caption, head, escaped) + "\n")
    (folder / "table2.csv").write_text(formats.csv_rows(head, lines))
