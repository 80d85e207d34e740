"""Make the report of one sweep: what its artefacts show, as text and as files."""

import functools
from dataclasses import dataclass
from pathlib import Path

from d2lora.errors import UserError
from d2lora.outputs import Outputs, write_text
from d2lora.records import Records
from d2lora.report import artefacts, differences, evidence, figures, formats, tuning
from d2lora.report.content import Artefact, Content, Rows, Sweep
from d2lora.report.manifest import read_manifest


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
    contents = [(artefact, artefact.make(sweep)) for artefact in artefacts.ARTEFACTS]
    return Loaded(sweep, problem, [Shown(artefact, content) for artefact, content in contents if content is not None])


def damaged(name: str, records: Records, problem: str) -> Loaded:
    """Return a sweep of which nothing can be read."""
    return Loaded(Sweep(name, [], [], records), problem, [])


def text(loaded: Loaded) -> str:
    """Return what the terminal shows of a sweep: its own tables with their verdicts, and notes on what limits them."""
    own = loaded.content(artefacts.OWN.name)
    if loaded.problem or own is None:
        return f"no table: {loaded.problem}"
    parts = _texts(own)
    if tuned := loaded.sweep.tuning:
        fixed = loaded.content(artefacts.FIXED.name)
        parts = ["== tuned ==", *parts, *(["== fixed ==", *_texts(fixed)] if fixed else []), tuning.text(tuned)]
    for each in loaded.shown:
        of_fixed = "at the recipe's own values: " if each.artefact is artefacts.INITS_FIXED else ""
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
