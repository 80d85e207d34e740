"""The choice of tuned settings: of each arm the candidate that is best on validation, from manifests' cells and records alone."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from d2lora.errors import UserError
from d2lora.records import Candidate, ManifestCell, Number, Records, TunedArm, Tuning
from d2lora.report import axes
from d2lora.report.axes import LABELS, Axes, general, order_of
from d2lora.scoring import shown_metrics
from d2lora.settings import amount
from d2lora.settings.controls import control_of
from d2lora.stages.evaluate import EvaluateSpec

_EQUAL = 1e-12  # means of the same scores in another order differ by less


@dataclass
class Arm:
    """One method, m, n and so on: its cells by their values of the tuned settings, in order of these."""

    label: str
    candidates: dict[tuple[str, ...], list[ManifestCell]] = field(default_factory=dict)


def values_of(cell: ManifestCell, keys: Sequence[str]) -> Axes:
    """Return the cell's values of the tuned settings `keys`, of those that its result depends on."""
    settings = axes.settings_of(cell)
    return {key: settings[key] for key in keys if key in settings}


def arms(cells: Sequence[ManifestCell], keys: Sequence[str]) -> list[Arm]:
    """Return the arms of cells: those that differ in seeds and in the tuned settings alone are of one arm.

    A cell that depends on no tuned setting, as the base on no learning rate, is in none.
    """
    labels, others = axes.differing_settings(cells)
    label_keys = [*labels, *(key for key in others if key not in (*keys, "data_seed"))]
    by_identity: dict[tuple[object, ...], Arm] = {}
    for cell in cells:
        if values := values_of(cell, keys):
            arm = by_identity.setdefault(_identity(cell, keys), Arm(_label(cell, label_keys)))
            arm.candidates.setdefault(tuple(values.get(key, "") for key in keys), []).append(cell)
    for arm in by_identity.values():
        arm.candidates = dict(sorted(arm.candidates.items(), key=lambda pair: tuple(map(order_of, pair[0]))))
    return list(by_identity.values())


def _identity(cell: ManifestCell, keys: Sequence[str]) -> tuple[object, ...]:
    """Return what a cell is, but for its seeds and the tuned settings."""
    settings = axes.settings_of(cell).items()
    others = sorted((key, value) for key, value in settings if key not in keys and key != "data_seed")
    config = cell.config
    return config["method"]["name"], config["m"], config["n"], axes.control(config), *others


def _label(cell: ManifestCell, varied: Iterable[str]) -> str:
    """Return an arm's name, as rows of tables have it, with its n."""
    config, settings = cell.config, axes.settings_of(cell)
    names = {key: config[key]["name"] for key in LABELS} | ({} if general(config) else {"warmup": ""})
    others = [
        names[key] if key in LABELS else axes.text(key, settings[key]) for key in varied if key in names | settings
    ]
    m, n = (amount(config[key]) for key in ("m", "n"))
    shape = f"LoRA n={n}" if config["m"] == 0 else control_of(axes.control(config)).label.format(m=m, n=n)
    return " ".join(filter(None, [config["method"]["name"].upper(), shape, *others]))


def choose(
    cells: Sequence[ManifestCell], keys: Sequence[str], own: Collection[str], records: Records, before: Tuning | None
) -> Tuning:
    """Return every candidate's validation scores and each arm's choice: the best mean of the candidates with all seeds.

    `own` are the ids of cells with the recipe's own values; `before` is an earlier choice of the same sweep, which more candidates
    may move. Of equal means the smaller value is taken.
    """
    met = tested(before)
    return Tuning(keys=list(keys), arms=[_chosen(arm, keys, own, records, met) for arm in arms(cells, keys)])


def tested(tuning: Tuning | None) -> set[str]:
    """Return the ids of cells that were ever chosen, and so met the test."""
    candidates = [c for arm in tuning.arms for c in arm.candidates] if tuning else []
    return {id for c in candidates if c.chosen or c.chosen_before for id in c.scores}


def _chosen(arm: Arm, keys: Sequence[str], own: Collection[str], records: Records, met: Collection[str]) -> TunedArm:
    """Return an arm with its candidates' scores and the choice among them."""
    every = [cell for cells in arm.candidates.values() for cell in cells]
    benchmark = next(iter(every[0].stages.validation))
    scores = {cell.id: _scores(cell, benchmark, records) for cell in every}
    metric = next((shown_metrics(list(each))[0] for each in scores.values() if each), None)
    seeds = list(dict.fromkeys(map(_seed, every)))
    candidates = []
    for texts, cells in arm.candidates.items():
        values = {key: text for key, text in zip(keys, texts, strict=True) if text}
        means = {cell.id: scores[cell.id].get(metric or "") for cell in cells}
        candidate = _candidate(values, means, _missing(seeds, cells, means))
        marks = {"own": any(cell.id in own for cell in cells), "chosen_before": any(cell.id in met for cell in cells)}
        candidates.append(candidate.model_copy(update=marks))
    best = max((c.mean for c in candidates if c.mean is not None), default=None)
    first = next((i for i, c in enumerate(candidates) if best is not None and _ties(c, best)), None)
    if first is not None:
        candidates[first] = candidates[first].model_copy(update={"chosen": True, "chosen_before": False})
    return TunedArm(label=arm.label, benchmark=benchmark, metric=metric, candidates=candidates)


def _scores(cell: ManifestCell, benchmark: str, records: Records) -> dict[str, Number]:
    """Return a cell's validation scores by metric; none where there is no record, or a damaged one, which the sweep's end names."""
    try:
        record = records.get(EvaluateSpec.KIND, cell.stages.validation.get(benchmark))
    except UserError:
        return {}
    return {metric: score.value for metric, score in record.scores.items()} if record else {}


def _missing(seeds: Iterable[str], cells: Iterable[ManifestCell], scores: Mapping[str, Number | None]) -> list[str]:
    """Return the seeds of an arm of which a candidate's cells have no result."""
    scored = {_seed(cell) for cell in cells if scores[cell.id] is not None}
    return [seed for seed in seeds if seed not in scored]


def _candidate(values: Axes, scores: dict[str, Number | None], missing: list[str]) -> Candidate:
    known = [score for score in scores.values() if score is not None]
    mean = None if missing else sum(known) / len(known)
    return Candidate(
        values=values, scores=scores, mean=mean, missing=missing, own=False, chosen=False, chosen_before=False
    )


def _seed(cell: ManifestCell) -> str:
    """Return what tells a cell from others of its candidate."""
    seed, draw = cell.config["seed"], cell.config["data_seed"]
    return f"seed {seed}" + (f", data_seed {draw}" if draw not in (0, seed) else "")


def _ties(candidate: Candidate, mean: float) -> bool:
    return candidate.mean is not None and abs(candidate.mean - mean) < _EQUAL


def tied(arm: TunedArm) -> list[Candidate]:
    """Return the candidates whose mean is the chosen one's, itself among them."""
    chosen = arm.chosen
    return [c for c in arm.candidates if _ties(c, chosen.mean)] if chosen and chosen.mean is not None else []


def edges(arm: TunedArm) -> dict[str, str]:
    """Return the numeric tuned settings whose chosen value is the largest or smallest of those tried: which of the two."""
    at_edge = {}
    for key, value in (arm.chosen.values if arm.chosen else {}).items():
        values = {axes.number(c.values[key]) for c in arm.candidates if key in c.values}
        numbers = [number for number in values if number is not None]
        own = axes.number(value)
        if own is not None and len(numbers) == len(values) > 1 and own in (max(numbers), min(numbers)):
            at_edge[key] = "largest" if own == max(numbers) else "smallest"
    return at_edge


def stand(tuning: Tuning, before: Tuning | None) -> Tuning:
    """Return the candidates with what was chosen before: while results are to come, no choice is made by a part of them."""
    chosen = {id for arm in before.arms if arm.chosen for id in arm.chosen.scores} if before else set()
    return tuning.model_copy(update={"arms": [_standing(arm, chosen) for arm in tuning.arms]})


def _standing(arm: TunedArm, chosen: Collection[str]) -> TunedArm:
    standing = [
        c.model_copy(update={"chosen": held, "chosen_before": c.chosen_before and not held})
        for c in arm.candidates
        for held in [any(id in chosen for id in c.scores)]
    ]
    return arm.model_copy(update={"candidates": standing})
