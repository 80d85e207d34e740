"""Read from a benchmark's rows the prompt and the gold answers, and check before a run that every row has them."""

from collections import defaultdict
from collections.abc import Sequence
from string import Formatter
from typing import Any

from d2lora.data.conversations import written
from d2lora.data.sources import Row, require_braces, require_columns, rows
from d2lora.data.texts import NotText, field, fill, is_blank, quoted, text_of
from d2lora.errors import UserError
from d2lora.scoring import MultipleChoice
from d2lora.settings import Benchmark, fields


class _Unscorable(Exception):
    """A row that can't be evaluated.

    `problem` is shared by rows with the same fault; `value` is this row's, and fills its {}.
    """

    def __init__(self, problem: str, value: str = "") -> None:
        super().__init__(problem)
        self.problem, self.value = problem, value


def check_benchmark(benchmark: Benchmark, split_seed: int) -> None:
    """Read a benchmark's rows and check them.

    UserError if columns are missing or a row that would be evaluated can't be scored.
    """
    all_rows = rows(benchmark.data, split_seed)
    evaluated = all_rows[: benchmark.limit]
    lists = {path.split(".")[0] for path in (benchmark.choices, benchmark.labels) if path}
    clusters = {benchmark.cluster} if benchmark.cluster else set()
    columns = sorted(fields(benchmark.prompt) | fields(benchmark.gold) | lists | clusters)
    require_columns(evaluated, benchmark.data, *columns, empty=True)
    for template in (benchmark.prompt, benchmark.gold):
        require_braces(template, all_rows, benchmark.data.path)
    check_items(benchmark, evaluated)


def check_items(benchmark: Benchmark, evaluated: Sequence[Row]) -> None:
    """Check that rows can be evaluated and scored.

    UserError listing those that can't, one line for each kind of problem.
    """
    bad: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for index, row in enumerate(evaluated):
        try:
            _check(benchmark, row)
        except _Unscorable as error:
            bad[error.problem].append((getattr(row, "number", index + 1), error.value))
    if bad:
        lines = "; ".join(_line(problem, numbered, len(evaluated)) for problem, numbered in bad.items())
        raise UserError(f"data.path={benchmark.data.path}: {lines}")


def _line(problem: str, numbered: list[tuple[int, str]], total: int) -> str:
    """Return "row 2: ..." or "rows 2, 5, 9 and 63 more (66 of 488): ...", with the values of the first three."""
    numbers = ", ".join(str(number) for number, _ in numbered[:3])
    more = f" and {len(numbered) - 3:,} more" if len(numbered) > 3 else ""
    several = f" ({len(numbered):,} of {total:,})" if len(numbered) > 1 else ""
    values = ", ".join(dict.fromkeys(value for _, value in numbered[:3]))
    return f"row{'s'[: len(numbered) > 1]} {numbers}{more}{several}: {_with(problem, values)}"


def _with(problem: str, value: str) -> str:
    """Fill the value into the problem's last {}: a template quoted in it may have {} of its own."""
    before, mark, after = problem.rpartition("{}")
    return f"{before}{value}{after}" if mark else problem


def _check(benchmark: Benchmark, row: Row) -> None:
    """Raise _Unscorable unless a row has a prompt, and gold answers or choices that an answer can be compared with."""
    if is_blank(_filled("prompt", benchmark.prompt, row)):
        raise _Unscorable("the prompt is blank")
    kind = benchmark.scoring
    if isinstance(kind, MultipleChoice):
        right_choice(benchmark, row)
        return
    for gold in _golds(benchmark, row):
        if problem := "the gold answer is blank" if is_blank(gold) else kind.problem(gold):
            raise _Unscorable(problem, quoted(gold))


def _filled(name: str, template: str, row: Row) -> str:
    """Fill the row's texts into a template. _Unscorable where a value is no text."""
    try:
        for column in (column for _, column, _, _ in Formatter().parse(template) if column is not None):
            if isinstance(value := field(column, row), str) and written(value) is not None:
                raise NotText(f"{quoted(value)} is a list that is written out")
        return fill(template, row)
    except NotText as error:
        raise _Unscorable(f"{name}={_line_of(template)}: {{}}", str(error)) from None
    except (LookupError, AttributeError, TypeError, ValueError) as error:  # "{choices[text]}"
        problem = f"{name}={_line_of(template)} can't be filled in ({type(error).__name__}: {{}})"
        raise _Unscorable(problem, str(error)) from None


def _line_of(template: str) -> str:
    """Return a template as an error line shows it."""
    return template if "\n" not in template else quoted(template)


# --- golds ---------------------------------------------------------------------------------------------------------


def golds(benchmark: Benchmark, row: Row) -> list[str]:
    """Return the gold answers of a row: one, or one for each element if the template's only field is a list of texts.

    UserError if it has none.
    """
    try:
        return _golds(benchmark, row)
    except _Unscorable as error:
        raise UserError(f"data.path={benchmark.data.path}: {_with(error.problem, error.value)}") from None


def _golds(benchmark: Benchmark, row: Row) -> list[str]:
    parts = list(Formatter().parse(benchmark.gold))
    names = [name for _, name, _, _ in parts if name is not None]
    try:
        value = field(names[0], row) if len(names) == 1 else None
    except (LookupError, AttributeError, TypeError, ValueError):
        value = None  # _filled says why
    if not isinstance(value, list) or _is_text(value):
        return [_filled("gold", benchmark.gold, row)]
    if not value:
        raise _Unscorable("the list of golds is empty")
    if not all(_is_text(element) for element in value):
        raise _Unscorable("the list of golds {} holds what is no text", quoted(value))
    try:
        return [
            "".join(
                before + ("" if name is None else format(text_of(element), spec or ""))
                for before, name, spec, _ in parts
            )
            for element in value
        ]
    except ValueError as error:  # "{price:d}"
        raise _Unscorable(
            f"gold={_line_of(benchmark.gold)} can't be filled in (ValueError: {{}})", str(error)
        ) from None


def _is_text(value: Any) -> bool:
    try:
        text_of(value)
    except NotText:
        return False
    return True


# --- choices -------------------------------------------------------------------------------------------------------


def choices(benchmark: Benchmark, row: Row) -> list[str]:
    """Return the answers that a row offers to choose from."""
    return _texts(row, benchmark.choices)


def right_choice(benchmark: Benchmark, row: Row) -> int:
    """Return the index of the right choice. _Unscorable if the row does not say which it is."""
    offered, labels = _texts(row, benchmark.choices), _texts(row, benchmark.labels)
    if len(offered) != len(labels):
        raise _Unscorable("{}", f"{len(offered)} {benchmark.choices}, but {len(labels)} {benchmark.labels}")
    gold = _filled("gold", benchmark.gold, row)
    if gold not in labels:
        raise _Unscorable("the gold label {}", f"{gold!r} is none of {', '.join(map(_line_of, labels))}")
    return labels.index(gold)


def _texts(row: Row, path: str | None) -> list[str]:
    """Return the texts of a list in a row. _Unscorable if one is blank or there twice."""
    values = _at(row, path)
    if not isinstance(values, list):
        raise _Unscorable(f"no list {path}")
    if not values:
        raise _Unscorable(f"the list {path} is empty")
    if others := [value for value in values if not _is_text(value)]:
        raise _Unscorable(f"{path} holds what is no text: {{}}", quoted(others[0]))
    texts = [text_of(value) for value in values]
    if any(map(is_blank, texts)):
        raise _Unscorable(f"{path} holds a blank text")
    if twice := [text for text in texts if [other.strip() for other in texts].count(text.strip()) > 1]:
        raise _Unscorable(f"{path} holds {{}} more than once", quoted(twice[0]))
    return texts


def _at(row: Row, path: str | None) -> Any:
    """Return the value at a dotted path in a row; None if there is none."""
    value: Any = row
    for part in (path or "").split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
