"""Write tables as text, Markdown, LaTeX (booktabs) and CSV."""

import dataclasses
import textwrap
from collections.abc import Iterator

from d2lora.report import axes, paper
from d2lora.report.axes import LABELS
from d2lora.report.compare import Comparison, Outcomes, draws_of, seeds_text
from d2lora.report.points import Point
from d2lora.report.rows import Row, csv_of_rows, lines_text
from d2lora.report.tables import Line, Table, column_name
from d2lora.report.worth import LESS, MORE
from d2lora.scoring import unit_of
from d2lora.scoring.kinds import BITS

MARK = "* differs from LoRA beyond chance (Holm over the table, alpha 5 %)"
COMPARISON_HEAD = ["difference", "95 % interval", "p", "p (Holm)"]  # over comparison_texts
PAIR_HEAD = ["D2LoRA - LoRA", *COMPARISON_HEAD, "detectable", "test", "seeds", "D2LoRA is"]
TABLE_COLUMNS = [
    *("benchmark", "metric", *LABELS, "method", "arm", "m", "n", "samples", "seeds", "items", "value", "low", "high"),
    *("paper", "to_paper", "difference", "difference_low", "difference_high", "p", "p_holm", "detectable", "test"),
    *("beyond_chance", "evaluations", "decision", "equivalence_low", "equivalence_high"),
    *("both_right", "lora_only_right", "d2lora_only_right", "neither_right"),
]


def _mark(table: Table, point: Point) -> str:
    return "*" if point in table.pairs and table.pairs[point].beyond_chance else ""


def _seeds_missing(point: Point) -> str:
    return f" ({len(point.scores)} of {len(point.runs)} seeds)" if len(point.scores) < len(point.runs) else ""


def chosen(point: Point) -> str:
    """Return the settings that were chosen for a point: lr=0.0005."""
    return ", ".join(axes.text(key, value) for key, value in point.tuned.items())


def p_text(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "<0.001"


# --- text ----------------------------------------------------------------------------------------------------------


def text(table: Table) -> str:
    """Return a table for the terminal; ± is half of the 95 % interval."""
    body = [[line.label, *(_text_entry(table, line.points.get(n)) for n in table.columns)] for line in table.lines]
    parts = [f"{table.title}, ± half of its 95 % interval", *aligned([_head(table), *body])]
    if table.pairs:
        parts += [MARK] * table.marked + [textwrap.fill(line, 110) for line in (table.verdict, *table.remarks)]
    elif seeds := {s for p in table.points for s in p.scores}:
        parts.append(seeds_text(seeds, draws_of(table.points)))
    return "\n".join(parts)


def _text_entry(table: Table, point: Point | None) -> str:
    if point is None:
        return "-"
    if not point.interval:
        return "missing"
    low, high = point.interval
    mark = (_mark(table, point) or " ") if table.marked else ""
    return f"{table.unit.value(point.value)} ± {table.unit.value((high - low) / 2)}{_seeds_missing(point)}{mark}"


def aligned(rows: list[list[str]]) -> list[str]:
    """Return rows as lines with aligned columns, the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = lambda row: (t.ljust(w) if i == 0 else t.rjust(w) for i, (t, w) in enumerate(zip(row, widths, strict=True)))  # noqa: E731
    return ["  ".join(cells(row)).rstrip() for row in rows]


# --- rows for Markdown and LaTeX -----------------------------------------------------------------------------------


def _head(table: Table) -> list[str]:
    return ["", *(column_name(table, value) for value in table.columns)]


def _value_rows(table: Table, line: Line) -> list[list[str]]:
    """Return the rows of a line of the table: values, intervals, what was chosen, and the paper's numbers, if it has any."""
    points = [line.points.get(n) for n in table.columns]
    rows = [
        [line.label, *(_value_entry(table, p) for p in points)],
        ["95 % interval", *(table.unit.bounds(p.interval) if p and p.interval else "" for p in points)],
    ]
    if any(p.tuned for p in points if p):
        rows.append(["chosen", *(chosen(p) if p else "" for p in points)])
    return rows + _paper_rows(table, points)


def _value_entry(table: Table, point: Point | None) -> str:
    if point is None:
        return "-"
    return table.unit.value(point.value) + _mark(table, point) + _seeds_missing(point) if point.scores else "missing"


def _paper_rows(table: Table, points: list[Point | None]) -> list[list[str]]:
    """Return the paper's numbers for the points of a line, and our differences to them; no rows where it has none."""
    papers = [paper.value(p) if p else None for p in points]
    if all(value is None for value in papers):
        return []
    values = [p.value if p else None for p in points]
    differences = [None if a is None or b is None else a - b for a, b in zip(values, papers, strict=True)]
    return [
        ["paper", *map(table.unit.value, papers)],
        ["ours - paper", *(table.unit.value(d, "+") for d in differences)],
    ]


def comparison_texts(c: Comparison) -> list[str]:
    """Return a comparison's difference, with a star where it is beyond chance, its interval, p and Holm's p."""
    difference = c.unit.value(c.difference, "+") + "*" * c.beyond_chance
    return [difference, c.unit.bounds(c.interval, "+"), p_text(c.p), p_text(c.adjusted)]


def pair_rows(table: Table) -> list[list[str]]:
    """Return the comparisons of a table as rows of texts, in its metric's unit of differences."""
    return [
        [
            c.label,
            *comparison_texts(c),
            f"{100 * c.detectable:.{c.unit.digits}f}" if c.detectable else "no item differs",
            c.test,
            ", ".join(map(str, c.seeds)),
            c.decision,
        ]
        for c in table.unique_pairs
    ]


_INTERVALS = (
    "Intervals (95 %): Wilson's, of differences Newcombe's, for one seed's right or wrong; else percentiles of a bootstrap over "
    "items, and several seeds by their t distribution."
)


def _on_likelihoods(points: list[Point]) -> Iterator[str]:
    for metric in dict.fromkeys(p.metric for p in points):
        if (unit := unit_of(metric)) == BITS:
            yield f"{metric} is shown in {unit.several} per byte. More is better: lm-evaluation-harness's bits_per_byte is its negative."


def _on_clusters(points: list[Point]) -> Iterator[str]:
    clustered = {
        p.benchmark: (p.table.shape[1], p.units.shape[1]) for p in points if p.scores and p.clusters is not None
    }
    for name, (items, clusters) in clustered.items():
        yield f"{name}: its {items:,} items are in {clusters:,} clusters, which intervals and tests draw instead of items."


def footnotes(tables: list[Table]) -> list[str]:
    """Return what a reader must know about the numbers of these tables."""
    points = [p for t in tables for p in t.points]
    seeds = {s for p in points for s in p.scores}
    lines = [_INTERVALS, *_on_likelihoods(points), *_on_clusters(points)]
    if any(t.marked for t in tables):
        lines.append(f"{MARK}.")
    if seeds and not any(t.pairs for t in tables):
        lines.append(seeds_text(seeds, draws_of(points)))
    if any(f"[{LESS}" in line or f"{MORE}]" in line for t in tables for line in t.remarks):
        lines.append(f"{LESS}, {MORE}: an interval that goes beyond LoRA's curve.")
    if any(p.metric.startswith("rouge") and paper.value(p) is not None for p in points):
        lines.append("The paper does not say which ROUGE it has: its number stands beside each.")
    if any(not p.scores for p in points):
        lines.append("missing: planned, but there is no record; -: not part of this sweep.")
    return lines


# --- Markdown ------------------------------------------------------------------------------------------------------


def markdown(caption: str, tables: list[Table], notes: list[str]) -> str:
    """Return an artefact as Markdown: tables with verdicts, comparisons and notes."""
    parts = [f"# {caption}"]
    for table in tables:
        body = [row for line in table.lines for row in _value_rows(table, line)]
        parts += [f"## {table.title}", markdown_rows(_head(table), body), table.verdict]
        if table.remarks:
            parts.append("\n".join(f"- {line}" for line in table.remarks))
        if table.pairs:
            parts.append(markdown_rows(PAIR_HEAD, pair_rows(table)))
    parts += [f"- {line}" for line in (*footnotes(tables), *notes)]
    return "\n\n".join(parts) + "\n"


def markdown_rows(head: list[str], rows: list[list[str]]) -> str:
    line = lambda cells: "| " + " | ".join(c.replace("|", r"\|").replace("*", r"\*") for c in cells) + " |"  # noqa: E731
    return "\n".join([line(head), "| --- " + "| ---: " * (len(head) - 1) + "|", *map(line, rows)])


# --- LaTeX ---------------------------------------------------------------------------------------------------------

_ESCAPES = (
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {
        "\\": r"\textbackslash{}",
        "*": "$^{*}$",
        "<": "$<$",
        "±": r"$\pm$",
    }
)


def latex_text(value: str) -> str:
    """Escape LaTeX's special characters."""
    return "".join(_ESCAPES.get(c, c) for c in value)


def latex(caption: str, tables: list[Table], notes: list[str]) -> str:
    """Return an artefact as LaTeX: a `table` for each benchmark and metric, and one for its comparisons. Needs the
    package booktabs.
    """
    parts = ["% needs \\usepackage{booktabs}"]
    for table in tables:
        title = f"{caption} ({table.title}). {' '.join([table.verdict, *table.remarks, *footnotes(tables), *notes])}"
        rows: list[list[str]] = []
        for line in table.lines:
            first, *others = _value_rows(table, line)
            rows += [first, *([rf"\scriptsize {latex_text(c)}" if c else "" for c in row] for row in others)]
        body = [[latex_text(c) if not c.startswith(r"\scriptsize") else c for c in row] for row in rows]
        parts.append(latex_rows(title, _head(table), body))
        if table.pairs:
            pairs = [[latex_text(c) for c in row] for row in pair_rows(table)]
            parts.append(latex_rows(f"D2LoRA minus LoRA, in {table.unit.several} ({table.title})", PAIR_HEAD, pairs))
    return "\n\n".join(parts) + "\n"


def latex_rows(caption: str, head: list[str], rows: list[list[str]]) -> str:
    """Return a booktabs table of rows that are LaTeX already."""
    lines = [
        r"\begin{table}",
        r"\centering\small",
        rf"\caption{{{latex_text(caption)}}}",
        rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
        r"\toprule",
        " & ".join(map(latex_text, head)) + r" \\",
        r"\midrule",
        *(" & ".join(row) + r" \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines)


# --- CSV -----------------------------------------------------------------------------------------------------------


def csv_text(tables: list[Table]) -> str:
    """Return tables as CSV, one point a row, fractions with all digits; missing values are empty."""
    return csv_of_rows(table_rows(tables), TABLE_COLUMNS)


def table_rows(tables: list[Table]) -> list[Row]:
    """Return the points of tables as rows by column: values with intervals, and comparisons with LoRA."""
    metrics = [metric for table in tables for metric in (table, *table.equal)]
    return [_csv_row(table, p) | p.axes | p.tuned for table in metrics for p in table.points]


def _csv_row(table: Table, p: Point) -> Row:
    papers = paper.value(p)
    low, high = p.interval or (None, None)
    row: Row = {
        k: getattr(p, k) for k in ("benchmark", "metric", *LABELS, "method", "arm", "m", "n", "samples", "value")
    }
    row |= {"low": low, "high": high, "paper": papers, "seeds": " ".join(map(str, p.scores))}
    row |= {
        "items": p.table.shape[1] if p.scores else None,
        "evaluations": " ".join(r.evaluate for r in p.runs.values()),
    }
    if papers is not None and p.value is not None:
        row["to_paper"] = p.value - papers
    if c := table.pairs.get(p):
        row |= {"difference": c.difference, "p": c.p, "p_holm": c.adjusted, "detectable": c.detectable, "test": c.test}
        row |= {"difference_low": c.interval[0], "difference_high": c.interval[1], "beyond_chance": c.beyond_chance}
        row |= {"decision": c.decision, "equivalence_low": c.equivalence[0], "equivalence_high": c.equivalence[1]}
        row |= _outcomes(c.outcomes) if c.outcomes else {}
    return row


def _outcomes(outcomes: Outcomes) -> Row:
    names = ("both_right", "lora_only_right", "d2lora_only_right", "neither_right")
    return dict(zip(names, dataclasses.astuple(outcomes), strict=True))


def csv_rows(head: list[str], rows: list[list[str]]) -> str:
    """Return rows of texts as CSV."""
    return lines_text(head, rows)
