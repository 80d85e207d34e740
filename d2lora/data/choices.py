"""Read what a row of a multiple-choice benchmark offers, and which of it is right."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from d2lora.data.files import Row
from d2lora.data.item_texts import Unscorable, filled, is_text, is_unfilled, line_of
from d2lora.data.texts import NotText, field, is_blank, only_field, quoted, text_of
from d2lora.settings import Benchmark


def choices(benchmark: Benchmark, row: Row) -> list[str]:
    """Return the answers that a row offers to choose from."""
    return [text for text, _ in _offered(benchmark, row)]


def right_choice(benchmark: Benchmark, row: Row) -> int:
    """Return the index of the right choice. Unscorable if the row does not say which it is."""
    labels = [label for _, label in _offered(benchmark, row)]
    gold = _gold_label(benchmark, row)
    if isinstance(gold, bool) and not any(isinstance(label, bool) for label in labels):
        raise Unscorable(f"gold={line_of(benchmark.gold)}: {{}}", f"{gold} is no text")
    right = [index for index, label in enumerate(labels) if _names(label, gold)]
    if not right:
        listed = ", ".join(line_of(_spelled(label)) for label in labels)
        raise Unscorable("the gold label {}", f"{_spelled(gold)!r} is none of {listed}")
    return right[0]


def _offered(benchmark: Benchmark, row: Row) -> list[tuple[str, Any]]:
    """Return a row's choices, at least two, and the label of each."""
    options = listed_options(benchmark)
    texts: list[str | None] = [_option(t, row) for t in options] if options else [*_texts(row, benchmark.choices)]
    labels = _labels(benchmark, row, texts)
    offered = [(text, label) for text, label in zip(texts, labels, strict=False) if text is not None]
    if options:
        _require_distinct([text for text, _ in offered], "choices")
    if len(offered) < 2:
        raise Unscorable("only one choice is offered")
    return offered


def listed_options(benchmark: Benchmark) -> list[str]:
    """Return the templates of choices that the benchmark's file lists; none where they are a list in each row."""
    return benchmark.choices if isinstance(benchmark.choices, list) else []


def _option(template: str, row: Row) -> str | None:
    """Return a listed choice; None if its columns are empty: some rows have fewer choices than others."""
    return None if is_unfilled(template, row) else filled("choices", template, row)


def _labels(benchmark: Benchmark, row: Row, texts: Sequence[str | None]) -> Sequence[Any]:
    """Return the labels of a row's choices. Values listed for all rows may be more than a row has choices."""
    if benchmark.labels is None:
        return texts
    constant = isinstance(benchmark.labels, list)
    labels: Sequence[Any] = benchmark.labels if constant else _label_list(row, benchmark.labels)
    if len(labels) < len(texts) or (len(labels) > len(texts) and not constant):
        name = "choices" if listed_options(benchmark) else benchmark.choices
        raise Unscorable("{}", f"{len(texts)} {name}, but {len(labels)} {'labels' if constant else benchmark.labels}")
    return labels


def _label_list(row: Row, path: Any) -> list[Any]:
    """Return the labels in a row's list; truth values as they are."""
    values = _at(row, path)
    if isinstance(values, list) and values and all(isinstance(value, bool) for value in values):
        return values
    return _texts(row, path)


def _gold_label(benchmark: Benchmark, row: Row) -> Any:
    """Return the label of the right choice: a column's truth value or number as it is, else the filled template."""
    name = only_field(benchmark.gold)
    try:
        value = field(name, row) if name else None
    except (NotText, LookupError, AttributeError, TypeError, ValueError):
        value = None  # filled says why
    return value if isinstance(value, bool | int | float) else filled("gold", benchmark.gold, row)


def _names(label: Any, gold: Any) -> bool:
    """Tell whether a gold names a label: equal as texts, or, where one is a number or a truth value, as such."""
    if isinstance(label, bool) and isinstance(gold, str):
        return gold.strip().lower() == _spelled(label)  # pandas writes True
    return label == gold if isinstance(label, bool) or isinstance(gold, bool) else _spelled(label) == _spelled(gold)


def _spelled(label: Any) -> str:
    """Spell a label: true, 2 (also of 2.0, as tables with blanks hold it), or its text."""
    if isinstance(label, bool):
        return str(label).lower()
    text = str(label).strip() if isinstance(label, int | float) else str(label)
    return re.sub(r"^(-?\d+)\.0$", r"\1", text)


def _texts(row: Row, path: Any) -> list[str]:
    """Return the texts of a list in a row. Unscorable if one is blank or appears twice."""
    values = _at(row, path)
    if not isinstance(values, list):
        raise Unscorable(f"no list {path}")
    if not values:
        raise Unscorable(f"the list {path} is empty")
    if others := [value for value in values if not is_text(value)]:
        raise Unscorable(f"{path} holds what is no text: {{}}", quoted(others[0]))
    texts = [text_of(value) for value in values]
    if any(map(is_blank, texts)):
        raise Unscorable(f"{path} holds a blank text")
    _require_distinct(texts, path)
    return texts


def _require_distinct(texts: Sequence[str], path: Any) -> None:
    """Raise Unscorable if a text appears twice: which of the two would be the right one?"""
    counts = Counter(text.strip() for text in texts)
    if twice := [text for text in texts if counts[text.strip()] > 1]:
        raise Unscorable(f"{path} holds {{}} more than once", quoted(twice[0]))


def _at(row: Row, path: str | None) -> Any:
    """Return the value at a dotted path in a row; None if there is none."""
    value: Any = row
    for part in (path or "").split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
