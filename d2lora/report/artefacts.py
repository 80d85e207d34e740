"""List the artefacts of the report: a sweep's own table and curves, comparisons, Table 2, and the paper's tables and figures."""

import functools

from d2lora.report import (
    controls,
    costs,
    differences,
    evidence,
    figures,
    forest,
    halves,
    inits,
    paper,
    table2,
    tables,
    tuning,
)
from d2lora.report.content import Artefact, Content, Sweep
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
INITS_FIXED = Artefact("inits_fixed", inits.FIXED_CAPTION, inits.fixed_content, folded="yes")

# In the order of the page.
ARTEFACTS: tuple[Artefact, ...] = (
    Artefact("differences", "D2LoRA minus LoRA on the same items, with 95 % intervals", _differences),
    *(Artefact(a.name, a.caption, functools.partial(_paper_table, a)) for a in paper.TABLES),
    *(Artefact(a.name, a.caption, functools.partial(_paper_figure, a)) for a in paper.FIGURES),
    OWN,
    Artefact("controls", controls.CAPTION, controls.content),
    Artefact("halves", halves.CAPTION, halves.content, folded="yes"),
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
