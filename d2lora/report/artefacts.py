"""Collect a sweep's artefacts: its own table and curves, Table 2, and the paper's tables and figures that its cells
cover.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

from d2lora.errors import UserError
from d2lora.outputs import Outputs, write_text
from d2lora.records import Records
from d2lora.report import (
    controls,
    costs,
    differences,
    evidence,
    figures,
    forest,
    formats,
    halves,
    inits,
    paper,
    table2,
    tables,
    tuning,
)
from d2lora.report.content import Artefact, Content, Rows, Sweep
from d2lora.report.manifest import read_manifest
from d2lora.report.tables import Table


def _own(sweep: Sweep) -> Content | None:
    """Return the sweep's own table and curves: all of its cells."""
    if not sweep.points:
        return None
    return _all(sweep.own_tables, sweep, tuning.notes(sweep.tuning) if sweep.tuning else [])


def _fixed(sweep: Sweep) -> Content | None:
    """Return a tuned sweep's table and curves at the recipe's own values; None if these are not among the candidates."""
    if not (sweep.fixed and sweep.tuning):
        return None
    return _all(sweep.fixed_tables, sweep, tuning.fixed_notes(sweep.tuning))


def _all(built: list[Table], sweep: Sweep, on_tuning: list[str]) -> Content:
    """Return tables with their curves; their notes are those on the tuning, and on what limits them."""
    points = [point for table in built for point in table.points]
    curves = [panel for table in built for panel in figures.panels(table, "all")]
    return Content(tables=built, panels=curves, notes=[*on_tuning, *evidence.notes(points, sweep.records)])


def _candidates(sweep: Sweep) -> Content | None:
    return Content(rows=tuning.table(sweep.tuning)) if sweep.tuning else None


def _paper_table(selection: paper.Artefact, sweep: Sweep) -> Content | None:
    points = paper.select(selection, sweep.points)
    if not points:
        return None
    return Content(tables=tables.build(points, "n", sweep.settings), notes=evidence.notes(points, sweep.records))


def _paper_figure(selection: paper.Artefact, sweep: Sweep) -> Content | None:
    points = paper.select(selection, sweep.points)
    if not points:
        return None
    built = tables.build(points, "n", sweep.settings)
    in_tables = {point for table in paper.TABLES for point in paper.select(table, sweep.points)}
    others = [table for table in built if not in_tables.issuperset(table.points)]
    return Content(panels=figures.of(selection, built), notes=evidence.notes(points, sweep.records), verdicts=others)


def _differences(sweep: Sweep) -> Content | None:
    return _differences_in(sweep.own_tables)


def _fixed_differences(sweep: Sweep) -> Content | None:
    return _differences_in(sweep.fixed_tables)


def _differences_in(built: list[Table]) -> Content | None:
    """Return how D2LoRA differs from LoRA in tables; None where no pair is finished. Many arms are rows of a forest."""
    panels = {table.title: differences.panels(table) for table in built}
    if max(map(len, panels.values()), default=0) > figures.TALLEST:
        rows = [differences.forest_panels(table) for table in built if panels[table.title]]
        return Content(draw=functools.partial(forest.draw, rows, "LoRA"))
    every = [panel for own in panels.values() for panel in own]
    return Content(differences=every) if every else None


def _settings(sweep: Sweep) -> Content | None:
    cells = [c for c in sweep.cells if c.stages.evaluate or not sweep.tuning]  # of the others nothing is shown
    return Content(rows=table2.table(cells))


OWN = Artefact("table", "Sweep {sweep}", _own, title="All cells of this sweep", figure="curves", folded="below others")
FIXED = Artefact(
    "table_fixed",
    "Sweep {sweep} at the recipe's own values",
    _fixed,
    title="At the recipe's own values",
    figure="curves_fixed",
)

CONTROLS = Artefact("controls", controls.CAPTION, controls.content)
INITS_FIXED = Artefact("inits_fixed", inits.FIXED_CAPTION, inits.fixed_content, folded="yes")
HALVES = Artefact("halves", halves.CAPTION, halves.content, folded="yes")

# In the order of the page.
ARTEFACTS: tuple[Artefact, ...] = (
    Artefact("differences", "D2LoRA minus LoRA on the same items, with 95 % intervals", _differences),
    *(Artefact(a.name, a.caption, functools.partial(_paper_table, a)) for a in paper.TABLES),
    *(Artefact(a.name, a.caption, functools.partial(_paper_figure, a)) for a in paper.FIGURES),
    OWN,
    CONTROLS,
    HALVES,
    FIXED,
    Artefact(
        "differences_fixed",
        "D2LoRA minus LoRA at the recipe's own values, on the same items, with 95 % intervals",
        _fixed_differences,
    ),
    Artefact("candidates", "Candidates: validation score, mean over seeds", _candidates),
    Artefact("inits", inits.CAPTION, inits.content),
    INITS_FIXED,
    Artefact("costs", "What each arm cost to train", costs.content, folded="yes"),
    Artefact("contamination", "Test items found in a training set", evidence.contamination_content, files=False),
    Artefact(
        "table2",
        "Table 2: the settings that ran in sweep {sweep}",
        _settings,
        title="Table 2: the settings that ran",
        folded="yes",
    ),
)


@dataclass(frozen=True)
class Shown:
    """An artefact with what it shows of a sweep."""

    artefact: Artefact
    content: Content


@dataclass
class Loaded:
    """A sweep with the artefacts that apply to it; `problem` says why it has no tables of scores, if it has none."""

    sweep: Sweep
    problem: str
    shown: list[Shown]

    def content(self, name: str) -> Content | None:
        """Return what an artefact shows of the sweep; None where it does not apply."""
        return next((each.content for each in self.shown if each.artefact.name == name), None)


def load(output: Path, name: str, records: Records) -> Loaded:
    """Return a sweep's tables and panels, from its manifest and records."""
    manifest = read_manifest(output, name)
    try:
        points, fixed = tuning.points(manifest, records)
        problem = "" if points or not manifest.tuning else "nothing is chosen yet"
    except UserError as error:
        points, fixed, problem = [], [], str(error)
    sweep = Sweep(name, manifest.cells, points, records, manifest.tuning, fixed)
    contents = [(artefact, artefact.make(sweep)) for artefact in ARTEFACTS]
    return Loaded(sweep, problem, [Shown(artefact, content) for artefact, content in contents if content is not None])


def damaged(name: str, records: Records, problem: str) -> Loaded:
    """Return a sweep of which nothing can be read."""
    return Loaded(Sweep(name, [], [], records), problem, [])


def text(loaded: Loaded) -> str:
    """Return what the terminal shows of a sweep: its own tables with their verdicts, and notes on what limits them."""
    own = loaded.content(OWN.name)
    if loaded.problem or own is None:
        return f"no table: {loaded.problem}"
    parts = _texts(own)
    if tuned := loaded.sweep.tuning:
        fixed = loaded.content(FIXED.name)
        parts = ["== tuned ==", *parts, *(["== fixed ==", *_texts(fixed)] if fixed else []), tuning.text(tuned)]
    for each in loaded.shown:
        of_fixed = "at the recipe's own values: " if each.artefact is INITS_FIXED else ""
        parts += [f"{of_fixed}{sentence}" for sentence in each.content.sentences]
    shares = evidence.contamination(loaded.sweep.cells, loaded.sweep.records)
    return "\n\n".join(filter(None, [*parts, evidence.contamination_text(shares)]))


def _texts(content: Content) -> list[str]:
    return [formats.text(table) for table in content.tables] + [f"note: {line}" for line in content.notes]


def write(output: Path, loaded: Loaded) -> None:
    """Write tables as Markdown, LaTeX and CSV, and figures as PNG, SVG and PDF."""
    folder = Outputs(output).artefacts(loaded.sweep.name)
    folder.mkdir(parents=True, exist_ok=True)
    for each in loaded.shown:
        if each.artefact.files:
            _write(folder, each.artefact, each.content, loaded.sweep.name)


def _write(folder: Path, artefact: Artefact, content: Content, sweep: str) -> None:
    caption = artefact.caption.format(sweep=sweep)
    texts = {}
    if content.tables:
        texts["md"] = formats.markdown(caption, content.tables, content.notes)
        texts["tex"] = formats.latex(caption, content.tables, content.notes)
        texts["csv"] = formats.csv_text(content.tables)
    if content.rows:
        texts |= _rows_texts(caption, content.rows, [*content.sentences, *content.notes])
    for suffix, written in texts.items():
        write_text(folder / f"{artefact.name}.{suffix}", written)
    stem = folder / (artefact.figure or artefact.name)
    figures.draw(content.panels, stem)
    if content.differences:
        figures.save(stem, functools.partial(figures.stacked, content.differences, differences.draw_panel))
    if content.draw:
        figures.save(stem, content.draw)


def _rows_texts(caption: str, table: Rows, notes: list[str]) -> dict[str, str]:
    """Return the texts of a table's files by their suffixes."""
    listed = "\n".join(f"- {line}" for line in notes)
    parts = [f"# {caption}", formats.markdown_rows(table.head, table.rows), *([listed] if notes else [])]
    escaped = [[formats.latex_text(cell) for cell in row] for row in table.rows]
    with_notes = f"{caption}. {' '.join(notes)}" if notes else caption
    return {
        "md": "\n\n".join(parts) + "\n",
        "tex": formats.latex_rows(with_notes, table.head, escaped) + "\n",
        "csv": formats.csv_rows(table.head, table.rows),
    }
