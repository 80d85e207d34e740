"""What an artefact is made from (a Sweep) and what it consists of (its Content), whatever its shape."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from d2lora.records import ManifestCell, Records, Tuning
from d2lora.report import differences as paired
from d2lora.report import tables as scores
from d2lora.report.figures import Panel
from d2lora.report.points import Point
from d2lora.report.tables import Table
from d2lora.settings import Report


@dataclass
class Sweep:
    """A sweep's cells as planned, and what is finished of them; no points where no table can be made of them.

    Of a tuned sweep `points` are of the chosen cells, `fixed` of those at the recipe's own values of the tuned settings.
    """

    name: str
    cells: list[ManifestCell]
    points: list[Point]
    records: Records
    tuning: Tuning | None = None
    fixed: list[Point] = field(default_factory=list)

    @property
    def columns(self) -> str | None:
        """Return the setting that the user wants as columns of the sweep's own table; None lets the report choose."""
        columns = self.settings.columns
        return None if self.tuning and columns in self.tuning.keys else columns  # each arm has one value of it

    @cached_property
    def own_tables(self) -> list[Table]:
        """Return the tables of all its cells, whose comparisons are made once for all artefacts."""
        return scores.build(self.points, self.columns, self.settings)

    @cached_property
    def fixed_tables(self) -> list[Table]:
        """Return the tables of a tuned sweep's cells at the recipe's own values; none of others."""
        return scores.build(self.fixed, self.columns, self.settings)

    @cached_property
    def settings(self) -> Report:
        """Return what the user wants of its tables; older manifests say nothing, or less."""
        return Report.model_validate(self.cells[0].config.get("report", {}) if self.cells else {})


@dataclass
class Rows:
    """A table of texts. `points` are those that its rows are of, one each, by which the page's filters narrow it."""

    head: list[str]
    rows: list[list[str]]
    points: list[Point] = field(default_factory=list)  # empty: no filter narrows it


@dataclass
class Content:
    """What an artefact shows of a sweep, in any of these shapes; each is written to files and shown on the page.

    `tables` have a score a point, with comparisons; `rows` are any other table. `panels` are curves, `differences` those of pairs;
    `draw` draws any other figure, given matplotlib's pyplot. The page shows panels with what is at the pointer, and figures that `draw` draws as pictures.
    `sentences` sum up what `rows` say: the page has them above, and the terminal has them too.
    """

    tables: list[Table] = field(default_factory=list)
    rows: Rows | None = None
    panels: list[Panel] = field(default_factory=list)
    differences: list[paired.Panel] = field(default_factory=list)
    draw: Callable[[Any], Any] | None = None
    sentences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    verdicts: list[Table] = field(default_factory=list)  # of a figure: tables whose verdict is told nowhere else


@dataclass(frozen=True)
class Group:
    """The rows of a table that are on one benchmark, each with its point; `sentence` sums them up, empty without any."""

    benchmark: str
    rows: list[tuple[Point, list[str]]]
    sentence: str


def of_groups(head: list[str], groups: list[Group]) -> Content | None:
    """Return a table of the groups' rows, with their sentences; None where there are no rows."""
    shown = [row for group in groups for row in group.rows]
    if not shown:
        return None
    rows = Rows(head, [texts for _, texts in shown], [point for point, _ in shown])
    return Content(rows=rows, sentences=[f"{group.benchmark}: {group.sentence}" for group in groups if group.sentence])


@dataclass(frozen=True)
class Artefact:
    """A table or figure of the report: when it applies, what it consists of, what it is called, where it stands.

    `make` returns None for a sweep that it does not apply to. `caption` may name the {sweep}.
    """

    name: str  # of its files: <name>.md, .tex and .csv of a table, .png, .svg and .pdf of a figure
    caption: str
    make: Callable[[Sweep], Content | None]
    title: str = ""  # on the page, where it is not the caption
    figure: str = ""  # the name of its figure's files, where it is another
    files: bool = True  # whether it has files, or is on the page only
    folded: Literal["no", "below others", "yes"] = (
        "no"  # on the page; the sweep's heading names what is "below others" alone
    )
