"""Measure how much of a bfloat16 model's score depends on the batch size: two evaluations of the base, item by item.

A batch's shape decides in which order products are added. In bfloat16 that can change a greedy answer (arXiv
2506.09501), so a difference of scores that is not larger than this says nothing.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from d2lora.keys import Identity
from d2lora.records import Item, Result, Score
from d2lora.settings import Config
from d2lora.stages import evaluate
from d2lora.stages.evaluate import EvaluateSpec
from d2lora.stages.run import Run
from d2lora.stages.stage import Stage

FLIP_ITEMS = 200  # of a benchmark's, the first: batch 1 is slow


@dataclass(frozen=True)
class FlipsSpec(EvaluateSpec):
    """An evaluation of the base at two batch sizes."""

    batches: tuple[int, int] = (1, 2)
    items: int = FLIP_ITEMS

    KIND: ClassVar[str] = "flips"
    VERSION: ClassVar[int] = 1

    def content(self) -> Identity:
        own = {"batches": list(self.batches), "items": self.items, "evaluation": EvaluateSpec.VERSION}
        return super().content() | own


def stages(config: Config) -> Iterator[Stage[FlipsSpec]]:
    """Yield the evaluations of a bfloat16 base at two batch sizes, shared by all cells; none for a float32 base."""
    if config.model.dtype != "bfloat16":
        return
    batches = (1, max(2, config.recipe.eval_batch))
    for stage in evaluate.stages(config, None):
        spec = FlipsSpec(**vars(stage.spec) | {"engine": None}, batches=batches, items=FLIP_ITEMS)  # the one in memory
        label = f"{stage.label} at batch {batches[0]} and {batches[1]}"
        yield Stage(spec, label=label, subject=stage.subject)


def work(run: Run[FlipsSpec]) -> Result:
    """Evaluate the base at both batch sizes, and write the items that differ."""
    spec, evaluations = run.stage.spec, []
    for number, batch in enumerate(spec.batches):
        half = lambda done, total, before=number: run.progress(before * total + done, 2 * total)  # noqa: E731
        evaluations.append(evaluate.scored(run, run.base.model, batch, half, spec.items))
    (metrics, items_alone, alone), (_, items_together, together) = evaluations
    measured, differing = compare(items_alone, items_together, metrics)
    run.write_items(differing)
    return Result(
        benchmark=run.stage.subject, base=run.config.model.name, batches=[alone, together], metrics=dict(measured)
    )


def compare(alone: list[Item], together: list[Item], metrics: Iterable[str]) -> tuple[dict[str, Score], list[Item]]:
    """Return the Scores, and the items that differ, of the same items evaluated at two batch sizes.

    `answers_flipped` and `<metric>_flipped` are shares of items, `<metric>_difference` is the second score minus the
    first.
    """
    pairs = list(zip(alone, together, strict=True))
    scores = {"answers_flipped": _mean([float(a["answer"] != b["answer"]) for a, b in pairs])}
    columns = ["answer", *metrics]
    for name in columns[1:]:
        differences = [float(b[name]) - float(a[name]) for a, b in pairs]
        scores[f"{name}_flipped"] = _mean([float(d != 0) for d in differences])
        scores[f"{name}_difference"] = _mean(differences)
    differing: list[Item] = [
        {"index": a["index"], "prompt": a["prompt"]} | {name: [a[name], b[name]] for name in columns}
        for a, b in pairs
        if any(a[name] != b[name] for name in columns)
    ]
    return scores, differing


def _mean(values: list[float]) -> Score:
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1) if len(values) > 1 else 0.0
    return Score(value=mean, stderr=math.sqrt(variance / len(values)), items=len(values))


def text(record: Result, metrics: Iterable[str] | None = None) -> str:
    """Return a record as a line, with the named metrics (all by default)."""
    scores, (alone, together) = record.scores, record.batches or (1, 1)
    every = [name.removesuffix("_difference") for name in scores if name.endswith("_difference")]
    answers = scores["answers_flipped"]
    parts = [f"{_percent(answers)} % of {answers.items} answers differ"]
    parts += [
        f"{name} by {100 * scores[f'{name}_difference'].value:+.1f} points (in {_percent(scores[f'{name}_flipped'])} % of items)"
        for name in (every if metrics is None else metrics)
        if name in every
    ]
    return (
        f"{record.benchmark} of the base {record.base} in bfloat16, batch {alone} against {together}: "
        f"{', '.join(parts)}"
    )


def _percent(share: Score) -> str:
    return f"{100 * share.value:.1f}"
