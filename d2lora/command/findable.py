"""Say which differences between two arms a grid can find, before it is paid for: per benchmark of right and wrong answers,
or of likelihoods.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from d2lora.command import sizes
from d2lora.errors import UserError
from d2lora.outputs import Outputs
from d2lora.plan import Cell
from d2lora.records import Manifest, Records
from d2lora.report import manifest
from d2lora.scoring import Likelihood
from d2lora.settings import Benchmark, Config
from d2lora.store import Store

if TYPE_CHECKING:
    from d2lora.report.compare import Comparison

# Where nothing was measured: two arms of 60 % that disagree on 20 % of items, trainings that spread by 1.5 points (docs/statistics.md).
_ITEM_SD, _RUN_SD, _SINGLE_SD = 0.224, 0.022, 0.447
_LEAST = 3  # replicates from which a plan can be made: two hardly tell how much trainings differ
_EXACT = 7.9  # items that must differ for the exact test of one replicate (stats.smallest_detectable)
_UNREAD = 1_000  # items to plan with where a data set's size is not known


@dataclass(frozen=True)
class Spreads:
    """Standard deviations of a paired difference: of items' own parts, of replicates' means, of items in one replicate."""

    item_sd: float
    run_sd: float
    single_sd: float
    how: str

    def run_of(self, items: int) -> float:
        """Return the replicates' spread with so many items: at least that of single answers' noise."""
        noise = max(self.single_sd**2 - self.item_sd**2, 0.0)
        return max(self.run_sd, (noise / items) ** 0.5)


_ASSUMED = Spreads(_ITEM_SD, _RUN_SD, _SINGLE_SD, "spreads assumed as in docs/statistics.md")
# Of log-likelihoods in bits a byte: those of the lab's SFT. A larger model's texts have more bits a byte, and larger spreads.
_ASSUMED_LIKELIHOOD = Spreads(0.0033, 0.0006, 0.0081, "spreads assumed as the lab's, docs/statistics.md")


def lines(cells: list[Cell], store: Store) -> list[str]:
    """Return a line for each model, task and benchmark of a grid, if the grid has arms to compare."""
    if len(cells) < 2:
        return []
    replicates = len({(c.config.seed, c.config.data_seed) for c in cells})
    first: dict[tuple[str, str, str], tuple[Config, Benchmark]] = {}
    for config in (c.config for c in cells):
        for name, benchmark in config.task.benchmark.items():
            if benchmark.scoring.right_or_wrong or isinstance(benchmark.scoring, Likelihood):
                first.setdefault((config.model.name, config.task.name, name), (config, benchmark))
    several = len({names[:2] for names in first}) > 1
    spreads = {names: _measured(store.outputs, *names, _assumed(first[names][1])) for names in first}
    return [
        f"  {f'{names[0]}, {names[1]}, ' * several}{names[2]}: {_line(*first[names], replicates, spreads[names])}"
        for names in first
    ]


def _line(config: Config, benchmark: Benchmark, replicates: int, spreads: Spreads) -> str:
    from d2lora import stats  # late: a plan that needs no estimate needs no numpy

    known = sizes.items_of(config, benchmark)
    items = known or _UNREAD
    tested = f"{items:,} items" if known else f"{items:,} items (its own number is not known here yet)"
    margin = config.report.margin_of(benchmark.scoring.unit)
    needed = stats.replicates_needed(margin / 100, items, spreads.item_sd, spreads.run_of(items))
    more = f"{needed} replicates" if needed else "more items, however many replicates"
    text = _differences(tested, items, replicates, spreads, benchmark)
    return f"{text}, four times in five; for {benchmark.scoring.unit.text(margin)}: {more} ({spreads.how})"


def _differences(tested: str, items: int, replicates: int, spreads: Spreads, benchmark: Benchmark) -> str:
    """Say from which difference on the design shows it; of one or two replicates, that three are needed to tell."""
    from d2lora import stats

    effect = stats.smallest_effect(items, max(replicates, _LEAST), spreads.item_sd, spreads.run_of(items))
    kind, clustered = benchmark.scoring, bool(benchmark.cluster or benchmark.varies)
    rounded = kind.unit.rounded
    if replicates >= _LEAST:
        return f"with {tested} and {replicates} replicates differences from {rounded(effect)} on"
    exact = _EXACT / items if kind.right_or_wrong and not clustered else 0.0
    single = max(stats.smallest_effect(items, 1, spreads.single_sd, 0.0), exact)
    alone = f"with {tested} and {replicates} replicate{'s'[: replicates > 1]}"
    if replicates == 1:
        alone += f" differences from {rounded(single)} on, between these trainings only"
    else:
        alone += " hardly any"
    return f"{alone}; with {_LEAST} replicates from {rounded(effect)} on"


def _assumed(benchmark: Benchmark) -> Spreads:
    return _ASSUMED if benchmark.scoring.right_or_wrong else _ASSUMED_LIKELIHOOD


def _measured(outputs: Outputs, model: str, task: str, benchmark: str, assumed: Spreads) -> Spreads:
    """Return the spreads in the store's pairs of LoRA and D2LoRA of this model, task and benchmark; assumed ones without any."""
    from d2lora import stats

    pairs = [c for c in _comparisons(outputs, model, task) if c.lora.benchmark == benchmark]
    if not pairs:
        return assumed
    single = _root(float(row.var(ddof=1)) * _items_a_unit(c) for c in pairs for row in c.units)
    several = [c for c in pairs if len(c.differences) > 1]
    if not several:
        how = f"{assumed.how}; one replicate's measured here on {_count(pairs)}"
        return Spreads(assumed.item_sd, assumed.run_sd, single, how)
    both = [(*stats.spreads(c.units), _items_a_unit(c)) for c in several]
    item_sd = _root(item**2 * scale for item, _, scale in both)
    return Spreads(item_sd, _root(run**2 for _, run, _ in both), single, f"spreads measured here on {_count(several)}")


def _comparisons(outputs: Outputs, model: str, task: str) -> Iterator["Comparison"]:
    """Yield the comparisons of all sweeps on the main metrics of right and wrong answers."""
    from d2lora.report.compare import comparisons
    from d2lora.report.points import points_of

    records = Records(outputs.root)
    for sweep in manifest.sweeps(outputs.root):
        try:
            whole = manifest.read_manifest(outputs.root, sweep)
            cells = [c for c in whole.cells if (c.config["model"]["name"], c.config["task"]["name"]) == (model, task)]
            points = [p for p in points_of(Manifest(sweep=sweep, cells=cells), records) if p.scores]
            yield from dict.fromkeys(comparisons(points).values())
        except (UserError, KeyError, TypeError):
            continue  # damaged, or of an older version: the report says so


def _items_a_unit(comparison: "Comparison") -> float:
    """Return what a variance of units is to be multiplied by to be that of items: clusters are fewer."""
    return comparison.lora.table.shape[1] / comparison.units.shape[1]


def _root(variances: Iterable[float]) -> float:
    listed = list(variances)
    return (sum(listed) / len(listed)) ** 0.5


def _count(pairs: list["Comparison"]) -> str:
    return f"{len(pairs)} comparison{'s'[: len(pairs) > 1]}"
