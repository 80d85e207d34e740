"""A tuned sweep's report: the chosen cells beside those at the recipe's own values, and what every candidate scored."""

from collections import defaultdict
from collections.abc import Callable, Iterator

from d2lora.records import Candidate, Manifest, Records, TunedArm, Tuning
from d2lora.report import formats
from d2lora.report.axes import short_name
from d2lora.report.choice import edges, tied
from d2lora.report.content import Rows
from d2lora.report.points import Point, points_of
from d2lora.scoring import Unit, unit_of


def points(manifest: Manifest, records: Records) -> tuple[list[Point], list[Point]]:
    """Return the points of a sweep's cells. Of a tuned sweep those of the chosen cells, and those of its cells at the
    recipe's own values, if there are any.

    Both have the cells that depend on no tuned setting. UserError as of points_of.
    """
    if manifest.tuning is None:
        return points_of(manifest, records), []
    chosen = points_of(_cells(manifest, lambda c: c.chosen), records, manifest.tuning.keys)
    if not any(c.own for arm in manifest.tuning.arms for c in arm.candidates):
        return chosen, []
    return chosen, points_of(_cells(manifest, lambda c: c.own), records)


def _cells(manifest: Manifest, wanted: Callable[[Candidate], bool]) -> Manifest:
    """Return the manifest with the wanted candidates' cells, and those that depend on no tuned setting."""
    assert manifest.tuning is not None
    candidates = [c for arm in manifest.tuning.arms for c in arm.candidates]
    left_out = {id for c in candidates if not wanted(c) for id in c.scores}
    return manifest.model_copy(update={"cells": [cell for cell in manifest.cells if cell.id not in left_out]})


def roles(tuning: Tuning | None) -> dict[str, str]:
    """Return what each candidate's cells are, by their ids: chosen, candidate, and whether at the recipe's own values."""
    arms = tuning.arms if tuning else []
    return {id: ", ".join(_role(c)) for arm in arms for c in arm.candidates for id in c.scores}


def _role(candidate: Candidate) -> list[str]:
    role = "chosen" if candidate.chosen else "chosen before" if candidate.chosen_before else "candidate"
    return [role, *["fixed"] * candidate.own]


def notes(tuning: Tuning) -> list[str]:
    """Return what to know of a choice: how it was made, ties, choices at the edge of what was tried, missing results, moved ones."""
    keys = " and ".join(tuning.keys)
    how = f"Tuned: {keys} of each arm is the candidate with the best mean over seeds on the validation benchmark; the test had no part in it."
    lines = [*_ties(tuning), *_edges(tuning), *_missing(tuning), *_moved(tuning)]
    return [how, *lines]


def fixed_notes(tuning: Tuning) -> list[str]:
    """Return what to know of the table at the recipe's own values."""
    keys = " and ".join(tuning.keys)
    lacking = [arm.label for arm in tuning.arms if not any(c.own for c in arm.candidates)]
    lines = [f"Fixed: {keys} as in the recipe, whatever validation says."]
    return lines + ([f"Its own value was not among the candidates of {'; '.join(lacking)}."] if lacking else [])


def _ties(tuning: Tuning) -> Iterator[str]:
    for arm in tuning.arms:
        if len(same := tied(arm)) > 1:
            yield f"{arm.label}: {', '.join(map(_values, same))} tie on {arm.benchmark}; the smaller is taken."


def _edges(tuning: Tuning) -> Iterator[str]:
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for arm in tuning.arms:
        for key, edge in edges(arm).items():
            assert arm.chosen is not None, "it has an edge"
            groups[key, edge].append(f"{arm.label} ({arm.chosen.values[key]})")
    for (key, edge), labels in groups.items():
        yield f"The best {key} is the {edge} tried: widen, in {len(labels)} of {len(tuning.arms)} arms: {'; '.join(labels)}."


def _missing(tuning: Tuning) -> Iterator[str]:
    for arm in tuning.arms:
        for candidate in arm.candidates:
            if candidate.missing:
                seeds = ", ".join(candidate.missing)
                yield f"{arm.label}, {_values(candidate)}: not among the candidates: no result on {arm.benchmark} of {seeds}."
        if arm.chosen is None:
            yield f"{arm.label}: nothing is chosen: no candidate has results of all its seeds on {arm.benchmark}."


def _moved(tuning: Tuning) -> Iterator[str]:
    for arm in tuning.arms:
        before = [_values(c) for c in arm.candidates if c.chosen_before]
        if before and arm.chosen:
            yield f"{arm.label}: {', '.join(before)} was chosen before, with fewer candidates or results; now {_values(arm.chosen)} is."


def _values(candidate: Candidate) -> str:
    return ", ".join(f"{short_name(key)}={value}" for key, value in candidate.values.items())


# --- the table of candidates ---------------------------------------------------------------------------------------


def text(tuning: Tuning) -> str:
    """Return a line an arm for the terminal: each candidate's values and mean, the chosen one in brackets."""
    tried = max((len(arm.candidates) for arm in tuning.arms), default=0)
    rows = [
        [arm.label, *(_short(arm, c) for c in arm.candidates), *[""] * (tried - len(arm.candidates))]
        for arm in tuning.arms
    ]
    units = ", ".join(dict.fromkeys(_unit(arm).name for arm in tuning.arms))
    head = f"candidates for {' and '.join(tuning.keys)}, validation score in {units}, mean over seeds: [chosen]"
    return "\n".join([head, *formats.aligned(rows)]) if rows else ""


def _unit(arm: TunedArm) -> Unit:
    return unit_of(arm.metric or "")


def _short(arm: TunedArm, candidate: Candidate) -> str:
    text = f"{_values(candidate)}: {_unit(arm).value(candidate.mean) or 'missing'}"
    return f"[{text}]" if candidate.chosen else f" {text} "


def table(tuning: Tuning) -> Rows:
    """Return a row for each candidate."""
    head = ["arm", "benchmark", *map(short_name, tuning.keys), "validation", "seeds", "what it is"]
    return Rows(head, [_row(tuning, arm, candidate) for arm in tuning.arms for candidate in arm.candidates])


def _row(tuning: Tuning, arm: TunedArm, candidate: Candidate) -> list[str]:
    scored = [score for score in candidate.scores.values() if score is not None]
    span = f"{_unit(arm).value(min(scored))} to {_unit(arm).value(max(scored))}" if len(scored) > 1 else ""
    return [
        arm.label,
        f"{arm.benchmark} {arm.metric or ''}".strip(),
        *(candidate.values.get(key, "-") for key in tuning.keys),
        _unit(arm).value(candidate.mean) or "missing",
        f"{len(scored)}" + (f": {span}" if span else ""),
        ", ".join(_role(candidate)),
    ]
