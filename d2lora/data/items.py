"""Read from a benchmark's rows the prompt and the gold answers, and check before a run that every row has them."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import Formatter

from d2lora.data.choices import listed_options, right_choice
from d2lora.data.conversations import Message, Turn, is_silent, message, written
from d2lora.data.files import Row, listed
from d2lora.data.item_texts import Unscorable, filled, is_text, is_unfilled, line_of
from d2lora.data.sources import number_of, require_braces, require_columns, rows
from d2lora.data.texts import NotText, field, is_blank, only_field, quoted, text_of
from d2lora.errors import UserError
from d2lora.scoring import MultipleChoice
from d2lora.settings import Benchmark, fields

EMPTY, TOO_LONG = "empty", "too long for the model"  # the reasons of items that are left out


def check_benchmark(benchmark: Benchmark, split_seed: int) -> None:
    """Read a benchmark's rows and check them.

    UserError if columns are missing or a row that would be evaluated can't be scored.
    """
    all_rows = rows(benchmark.data, split_seed)
    evaluated = all_rows[: benchmark.limit]
    require_columns(evaluated, benchmark.data, *item_columns(benchmark), empty=True)
    prompt_columns = set().union(*map(fields, benchmark.prompts))
    # Columns A to E in the prompt, and the letters as choices, are meant as they stand.
    options = [option for option in listed_options(benchmark) if option not in prompt_columns]
    for template in (*benchmark.prompts, benchmark.gold, *options):
        require_braces(template, all_rows, benchmark.data.path)
    scored = [row for row in evaluated if not is_left_out(benchmark, row)]
    if not scored:
        raise UserError(f"data.path={benchmark.data.path}: all {len(evaluated):,} items are left out ({EMPTY})")
    check_items(benchmark, scored)


def item_columns(benchmark: Benchmark) -> list[str]:
    """Return the columns that a benchmark reads, sorted."""
    lists = {path.split(".")[0] for path in (benchmark.choices, benchmark.labels) if isinstance(path, str)}
    clusters = {benchmark.cluster} if benchmark.cluster else set()
    return sorted(lists.union(clusters, *map(fields, (*benchmark.prompts, benchmark.gold, *listed_options(benchmark)))))


def check_items(benchmark: Benchmark, evaluated: Sequence[Row]) -> None:
    """Check that rows can be evaluated and scored.

    UserError listing those that can't, one line for each kind of problem.
    """
    bad: dict[str, list[tuple[int, str]]] = defaultdict(list)
    empty = False
    for index, row in enumerate(evaluated):
        try:
            _check(benchmark, row)
        except Unscorable as error:
            bad[error.problem].append((number_of(row, index), error.value))
            empty = empty or _is_empty(benchmark, row)
    if bad:
        lines = "; ".join(_line(problem, numbered, len(evaluated)) for problem, numbered in bad.items())
        advice = "; data.empty=leave_out in the benchmark's file leaves out items without a prompt or gold" * empty
        raise UserError(f"data.path={benchmark.data.path}: {lines}{advice}")


def is_left_out(benchmark: Benchmark, row: Row) -> bool:
    """Tell whether an item has no prompt or no gold, and is to be left out for it."""
    return benchmark.data.empty == "leave_out" and _is_empty(benchmark, row)


def _is_empty(benchmark: Benchmark, row: Row) -> bool:
    """Tell whether the columns of the prompt, or those of the gold, hold nothing but nulls and blanks."""
    prompts = [template for template in benchmark.prompts if fields(template)]
    if prompts and all(is_unfilled(template, row) for template in prompts):
        return True
    return is_unfilled(benchmark.gold, row)


@dataclass(frozen=True)
class ItemRows:
    """The rows of a benchmark that are evaluated, by their indices, and how many are left out, by reason."""

    rows: list[int]
    left_out: dict[str, int]


def item_rows(benchmark: Benchmark, all_rows: Sequence[Row], is_too_long: Callable[[Row], bool]) -> ItemRows:
    """Choose the rows to evaluate: the first `limit`, without those that the benchmark's settings leave out."""

    def reason(row: Row) -> str:
        if is_left_out(benchmark, row):
            return EMPTY
        return TOO_LONG if benchmark.too_long == "leave_out" and is_too_long(row) else ""

    reasons = [reason(row) for row in all_rows[: benchmark.limit]]
    left_out = dict(sorted(Counter(filter(None, reasons)).items()))
    return ItemRows([index for index, why in enumerate(reasons) if not why], left_out)


def _line(problem: str, numbered: list[tuple[int, str]], total: int) -> str:
    """Return "row 2: ..." or "rows 2, 5, 9 and 63 more (66 of 488): ...", with the values of the first three."""
    several = f" ({len(numbered):,} of {total:,})" if len(numbered) > 1 else ""
    values = ", ".join(dict.fromkeys(value for _, value in numbered[:3]))
    return f"{listed([number for number, _ in numbered])}{several}: {_with(problem, values)}"


def _with(problem: str, value: str) -> str:
    """Fill the value into the problem's last {}: a template quoted in it may have {} of its own."""
    before, mark, after = problem.rpartition("{}")
    return f"{before}{value}{after}" if mark else problem


def _check(benchmark: Benchmark, row: Row) -> None:
    """Raise Unscorable unless a row has a prompt, and gold answers or choices that an answer can be compared with."""
    prompt = _prompt(benchmark, row)
    if is_blank(prompt) if isinstance(prompt, str) else any(map(is_silent, prompt)):
        raise Unscorable("the prompt is blank")
    kind = benchmark.scoring
    if isinstance(kind, MultipleChoice):
        right_choice(benchmark, row)
        return
    for gold in _golds(benchmark, row):
        if problem := "the gold answer is blank" if is_blank(gold) else kind.problem(gold):
            raise Unscorable(problem, quoted(gold))


# --- prompts -------------------------------------------------------------------------------------------------------


def item_prompt(benchmark: Benchmark, row: Row) -> str | list[Message]:
    """Return what a row asks: a text, or the turns of a conversation whose next turn is the answer.

    UserError if it has neither.
    """
    try:
        return _prompt(benchmark, row)
    except Unscorable as error:
        raise UserError(f"data.path={benchmark.data.path}: {_with(error.problem, error.value)}") from None


def _prompt(benchmark: Benchmark, row: Row) -> str | list[Message]:
    template = benchmark.prompt
    if not isinstance(template, str):
        return [{"role": turn.role, "content": filled("prompt", turn.content, row)} for turn in template]
    turns = _turns(template, row)
    if turns is None:
        return filled("prompt", template, row)
    if not benchmark.chat:
        raise Unscorable(f"prompt={line_of(template)} holds a conversation, which needs chat: true")
    try:
        messages = [message(turn, f"turn {number}")[0] for number, turn in enumerate(turns, 1)]
    except UserError as error:
        raise Unscorable(f"prompt={line_of(template)}: {{}}", str(error)) from None
    if messages[-1]["role"] not in ("user", "tool"):
        raise Unscorable(f"prompt={line_of(template)} ends with a turn of the {messages[-1]['role']}: nothing is asked")
    return messages


def _turns(template: str, row: Row) -> list[Turn] | None:
    """Return the turns in a column; None if the template is more than a column, or it holds no conversation."""
    name = only_field(template)
    try:
        value = field(name, row) if name else None
        value = written(value) if isinstance(value, str) else value
    except (NotText, LookupError, AttributeError, TypeError, ValueError):
        return None  # filled says why
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        return None
    return value if all("role" in turn or "from" in turn for turn in value) else None


# --- golds ---------------------------------------------------------------------------------------------------------


def golds(benchmark: Benchmark, row: Row) -> list[str]:
    """Return the gold answers of a row: one, or one for each element if the template's only field is a list of texts.

    UserError if it has none.
    """
    try:
        return _golds(benchmark, row)
    except Unscorable as error:
        raise UserError(f"data.path={benchmark.data.path}: {_with(error.problem, error.value)}") from None


def _golds(benchmark: Benchmark, row: Row) -> list[str]:
    parts = list(Formatter().parse(benchmark.gold))
    names = [name for _, name, _, _ in parts if name is not None]
    try:
        value = field(names[0], row) if len(names) == 1 else None
    except (LookupError, AttributeError, TypeError, ValueError):
        value = None  # filled says why
    if not isinstance(value, list) or is_text(value):
        return [filled("gold", benchmark.gold, row)]
    if not value:
        raise Unscorable("the list of golds is empty")
    if not all(is_text(element) for element in value):
        raise Unscorable("the list of golds {} holds what is no text", quoted(value))
    try:
        return [
            "".join(
                before + ("" if name is None else format(text_of(element), spec or ""))
                for before, name, spec, _ in parts
            )
            for element in value
        ]
    except ValueError as error:  # "{price:d}"
        raise Unscorable(f"gold={line_of(benchmark.gold)} can't be filled in (ValueError: {{}})", str(error)) from None
