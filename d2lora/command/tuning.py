"""Tuning: a sweep's candidates are judged on validation benchmarks, and of each arm only the best meets the test.

A job carries the keys of its stages, so until the choice is made, from the store's records alone, no candidate's job has an
evaluation on the test among them. Cells at the recipe's own values, and those that depend on no tuned setting, are chosen by nobody:
their evaluations on the test are planned from the start. Test sets are read before the choice by the checks that need no model: that
their columns are there, and whether training sets contain their items.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Collection

from d2lora import data
from d2lora.command.grid import Overrides
from d2lora.errors import UserError
from d2lora.plan import Cell
from d2lora.records import Records, Tuning
from d2lora.report import choice, manifest
from d2lora.settings import RATE, Config
from d2lora.stages import Stage
from d2lora.store import Store


class Tuner:
    """A sweep's candidates: what is done of them before the choice, the choice, and what is done after it."""

    def __init__(self, cells: list[Cell], compose: Callable[[Overrides], Cell], store: Store) -> None:
        """Take the cells of a sweep with `tune`. UserError where there is nothing to choose among, or the test to choose on."""
        self.cells, self.store, self.keys = cells, store, cells[0].config.tune
        self.entries = [manifest.entry(cell) for cell in cells]
        self.arms = choice.arms(self.entries, self.keys)
        self._check()
        self.own = self._at_own_values(compose)
        self.before = self._earlier()

    def begin(self) -> tuple[list[Cell], Tuning]:
        """Return the cells as they are before the choice, and the choice that stands until then: an earlier one, or none."""
        return self._without_test(self.own), choice.stand(self._choice(), self.before)

    def choose(self) -> tuple[list[Cell], list[Cell], Tuning]:
        """Return all cells as they are after the choice, the chosen ones among them, and the choice."""
        tuning = self._choice()
        chosen = {id for arm in tuning.arms if arm.chosen for id in arm.chosen.scores}
        cells = self._without_test(self.own | chosen)
        return cells, [cell for cell in cells if cell.id in chosen], tuning

    def later(self) -> list[Stage]:
        """Return as many evaluations on the test as may follow the choice: those of one candidate an arm."""
        whole, stages = {cell.id: cell for cell in self.cells}, []
        for arm in self.arms:
            others = [cells for cells in arm.candidates.values() if cells[0].id not in self.own]
            stages += [s for cell in max(others, key=len, default=[]) for s in whole[cell.id].chain.evaluations]
        return stages

    def note(self) -> str:
        """Return the plan's line."""
        count = sum(len(arm.candidates) for arm in self.arms)
        benchmarks = ", ".join(dict.fromkeys(next(iter(cell.stages.validation)) for cell in self.entries))
        fixed = f"; {len(self.own)} cells have the recipe's own and are evaluated in any case" if self.own else ""
        return (
            f"  tuned         {', '.join(self.keys)}: {count} candidates in {len(self.arms)} arms; of each arm the best on {benchmarks} "
            f"is evaluated on the test: up to {len(self.later())} stages more{fixed}"
        )

    def _choice(self) -> Tuning:
        """Return the choice by the records that there are now."""
        return choice.choose(self.entries, self.keys, self.own, Records(self.store.outputs.root), self.before)

    def _without_test(self, but: Collection[str]) -> list[Cell]:
        """Return the cells, candidates without evaluations on the test: not those of `but`, nor those that have met it before."""
        candidates = {cell.id for arm in self.arms for cells in arm.candidates.values() for cell in cells}
        met = choice.tested(self.before)
        done = {c.id for c in self.cells if c.id in met and all(map(self.store.done, c.chain.evaluations))}
        untested = candidates - set(but) - done
        return [without_test(cell) if cell.id in untested else cell for cell in self.cells]

    def _at_own_values(self, compose: Callable[[Overrides], Cell]) -> set[str]:
        """Return the ids of candidates whose tuned settings are what the configuration says without the sweep's values of them."""
        by_id, own = {cell.id: cell for cell in self.cells}, set()
        for arm in self.arms:
            first = by_id[next(iter(arm.candidates.values()))[0].id]
            others = tuple(o for o in first.overrides if not any(_sets(o, key) for key in self.keys))
            if others == first.overrides:
                continue
            with contextlib.suppress(UserError):  # the recipe's own values may be none that this cell can have
                values = choice.values_of(manifest.entry(compose(others)), self.keys)
                own |= {cell.id for cell in arm.candidates.get(tuple(values.get(key, "") for key in self.keys), [])}
        return own

    def _earlier(self) -> Tuning | None:
        with contextlib.suppress(UserError):  # there is none, or a damaged one, which begins anew
            return manifest.read_manifest(self.store.outputs.root, self.cells[0].config.sweep).tuning
        return None

    def _check(self) -> None:
        for index, key in enumerate(self.keys):
            values_of_arms = [{values[index] for values in arm.candidates} for arm in self.arms]
            if not any(len(values) > 1 for values in values_of_arms):
                known = any(values - {""} for values in values_of_arms)
                example = f"{RATE}_factor=0.5,1,2" if key == RATE else f"{key}=A,B"
                what = (
                    f"every candidate has the same: list several, as in {example}"
                    if known
                    else "no result of this sweep depends on it"
                )
                raise UserError(f"tune={key}: {what}")
        for config in {cell.config.task.name: cell.config for cell in self.cells}.values():
            refuse_the_test(config)


def without_test(cell: Cell) -> Cell:
    """Return a cell without its evaluations on the test."""
    return Cell(cell.config, dataclasses.replace(cell.chain, evaluations=()), cell.overrides)


def _sets(override: str, key: str) -> bool:
    """Tell whether an override gives a tuned setting its value."""
    name = override.partition("=")[0].lstrip("+")
    if key == RATE:
        return name in (RATE, f"{RATE}_factor") or (name.startswith(f"{RATE}.") and name != f"{RATE}.warmup")
    if key.endswith(".epochs") and name.startswith("recipe.epochs"):  # where conf takes it from
        return True
    return name == key or ("." in name and key.startswith(f"{name}."))


def refuse_the_test(config: Config) -> None:
    """Raise UserError for a validation benchmark that reads the rows of a test."""
    tests = {name: data.identity(b.data, config.split_seed) for name, b in config.task.benchmark.items()}
    for name, benchmark in config.task.validation.items():
        if same := [test for test, rows in tests.items() if rows == data.identity(benchmark.data, config.split_seed)]:
            raise UserError(f"task.validation.{name}: reads the rows of the test, task.benchmark.{same[0]}")


def refuse_single(config: Config) -> None:
    """Raise UserError for a cell that is to be tuned without others."""
    if config.tune:
        raise UserError(
            f"tune={','.join(config.tune)}: chooses among the cells of a sweep: add -m (--multirun) and list values"
        )


def summary(tuning: Tuning) -> str:
    """Return the line that says that the choice is made."""
    chosen = sum(arm.chosen is not None for arm in tuning.arms)
    return f"tuned: {', '.join(tuning.keys)} is chosen in {chosen} of {len(tuning.arms)} arms; now the test of the chosen cells"
