"""Turn overrides into cells: expand a grid, compose each of its cells as Hydra would, and check them."""

import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from d2lora import plan
from d2lora.command import preflight
from d2lora.command.guard import one_line, unknown_key
from d2lora.errors import UserError
from d2lora.outputs import project_path
from d2lora.plan import Cell
from d2lora.settings import RATE, Config, parse
from d2lora.settings.controls import NoControl
from d2lora.settings.recipe import WARMUP

Overrides = tuple[str, ...]  # of one cell, as they are typed: ("method=dpo", "n=1000")

OmegaConf.register_new_resolver("project", lambda path: str(project_path(path)), replace=True)  # conf/config.yaml's


def cell_of(config: DictConfig, overrides: Iterable[str] = ()) -> Cell:
    """Return the checked cell of a composed config; its node `hydra` is ignored.

    UserError for values that are not allowed.
    """
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict), "a config is a mapping"
    values.pop("hydra", None)
    checked = parse({str(k): v for k, v in values.items()})
    return Cell(checked, plan.chain(checked), tuple(overrides))


def expand(parser: OverridesParser, params: object, arguments: Sequence[str]) -> list[Overrides]:
    """Return the overrides of each cell. `params` is a grid (key -> values) or a list of grids, whose cells are joined.

    A key on the command line replaces the sweep file's, in all of its grids. UserError for a grid without cells.
    """
    grids: list[Any] = params if isinstance(params, list) else [params]
    if not grids or not all(isinstance(grid, dict) for grid in grids):
        raise UserError(f"hydra.sweeper.params={params}: a mapping of keys to values, or a list of such mappings")
    return [cell for grid in grids for cell in _product(parser, grid, arguments)]


def _product(parser: OverridesParser, params: Mapping[str, object], arguments: Sequence[str]) -> Iterable[Overrides]:
    """Return the overrides of each cell of one grid."""
    typed = [f"{key}={_as_typed(value)}" for key, value in params.items()]
    axes: dict[str, list[str]] = {}
    for override in [*parser.parse_overrides(typed), *parser.parse_overrides(list(arguments))]:
        axes[override.get_key_element().lstrip("+")] = _values(override)  # ++n=1 replaces n=1, too
    return itertools.product(*axes.values())


def _values(override: Override) -> list[str]:
    """Return an override for each value: n=1,2 -> n=1 and n=2. UserError for a sweep that does not list its values."""
    key = override.get_key_element()
    if override.is_delete():
        return [override.input_line or key]
    if not override.is_sweep_override():
        return [f"{key}={override.get_value_element_as_str()}"]
    if not override.is_discrete_sweep():
        raise UserError(f"{override.input_line}: a grid needs listed values: {key}=a,b,c or {key}=range(a,b)")
    values = [f"{key}={text}" for text in override.sweep_string_iterator()]
    if not values:
        raise UserError(f"{override.input_line}: this lists no value, so the grid has no cells")
    return values


def one_of(parser: OverridesParser, params: object, arguments: Sequence[str]) -> Overrides:
    """Return the overrides of one cell: of each sweep, also of an interval, its first value."""
    grid: Any = params if isinstance(params, dict) else {}
    typed = [*(f"{key}={_as_typed(value)}" for key, value in grid.items()), *arguments]
    first = {o.get_key_element().lstrip("+"): _first(o) for o in parser.parse_overrides(typed)}
    return tuple(first.values())


def _first(override: Override) -> str:
    value = override.value()
    if isinstance(value, IntervalSweep):
        return f"{override.get_key_element()}={value.start}"
    return _values(override)[0]


def _as_typed(value: object) -> str:
    """Write a sweep file's value as on the command line: [a, b] is a,b."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


class Composer:
    """Composes cells.

    Hydra takes about 0.1 s for each, so only each combination of groups is composed, and values are set on copies.
    """

    def __init__(self, config: DictConfig, loader: ConfigLoader) -> None:
        self.config, self.loader = config, loader
        self.parser = OverridesParser.create(config_loader=loader)

    def __call__(self, overrides: Iterable[str]) -> Cell:
        """Return the cell of a list of overrides. UserError if one is wrong."""
        overrides = tuple(overrides)
        plain = [o for o in overrides if self._is_plain(o)]
        try:
            composed = self._groups(tuple(o for o in overrides if o not in plain)).copy()
            for key, value in map(self._value, plain):
                if OmegaConf.select(composed, key, default=self) is self and "." not in key:
                    raise UserError(unknown_key(key))
                OmegaConf.update(composed, key, value)
            return cell_of(composed, overrides)
        except OmegaConfBaseException as error:
            raise UserError(one_line(error)) from None

    @functools.cache  # noqa: B019 (one composer a process)
    def _is_plain(self, override: str) -> bool:
        """Tell whether an override only sets the value of an existing key: no group's choice, nothing added or deleted."""
        parsed = self.parser.parse_override(override)
        changes_keys = parsed.is_add() or parsed.is_force_add() or parsed.is_delete() or parsed.package
        return not changes_keys and not self.loader.get_group_options(parsed.key_or_group)

    @functools.cache  # noqa: B019
    def _value(self, override: str) -> tuple[str, Any]:
        """Return the key and value of an override."""
        parsed = self.parser.parse_override(override)
        return parsed.key_or_group, parsed.value()

    @functools.cache  # noqa: B019
    def _groups(self, overrides: Overrides) -> DictConfig:
        """Compose a config with Hydra, without its node `hydra`."""
        composed = self.loader.load_sweep_config(self.config, list(overrides))
        with open_dict(composed):
            composed.pop("hydra")
        return composed


A = TypeVar("A")
Check = Callable[[Config, preflight.Passed], None]


def valid_cells(
    compose: Composer,
    grid: Iterable[Overrides],
    check: Check = preflight.check,
    composed: Callable[[list[Cell]], None] = lambda cells: None,
) -> list[Cell]:
    """Return the grid's cells, duplicates included. UserError listing the invalid ones, unless skip_invalid is set.

    `composed` is called with the cells once they are composed and before the first check, which reads their rows.
    """
    problems: dict[str, int] = {}  # message -> number of cells that have it
    passed: preflight.Passed = set()

    def checked(cell: Cell) -> Cell:
        check(cell.config, passed)
        return cell

    # All are composed before the first is checked: a check reads rows, which garbage collection would scan while composing.
    cells = _without_errors(compose, grid, problems)
    composed(cells)
    cells = _without_errors(checked, cells, problems)
    if problems and not any(c.config.skip_invalid for c in cells):
        lines = [message + (f" [{n} of the grid's cells]" if n > 1 else "") for message, n in problems.items()]
        raise UserError("; ".join(lines) + ("; skip_invalid=true drops such cells" if cells else ""))
    for message in problems:
        print(f"left out: {message}", file=sys.stderr)
    return cells


def _without_errors(function: Callable[[A], Cell], arguments: Iterable[A], problems: dict[str, int]) -> list[Cell]:
    """Return what a function makes of each argument, without those it refuses: their messages are counted in `problems`."""
    results: list[Cell] = []
    for argument in arguments:
        try:
            results.append(function(argument))
        except (UserError, HydraException) as error:
            message = one_line(error)
            problems[message] = problems.get(message, 0) + 1
    return results


def values_without_cells(cells: list[Cell]) -> list[str]:
    """Return a line for each value of an axis that has no cells of its own, because it changes no stage's key.

    Of equal cells the first is used (`plan.unique`). An axis that matters for some cells only is not reported: `init`,
    for example, does not matter for D2LoRA(0, 0).
    """
    used = {cell.id: _by_key(cell) for cell in plan.unique(cells)}
    present = {(key, value) for values in used.values() for key, value in values.items()}
    instead: dict[tuple[str, str], list[str]] = {}  # (key, value that is used) -> values that are not
    for cell in cells:
        for key, value in _by_key(cell).items():
            other = used[cell.id].get(key)
            if other is not None and (key, value) not in present:
                values = instead.setdefault((key, other), [])
                values += [value] * (value not in values)
    return [
        f"{key}={','.join(values)}: no result depends on it, so its cells are those of {key}={other}, which is used"
        for (key, other), values in instead.items()
    ]


def without_warmup(cells: list[Cell]) -> list[str]:
    """Return a line if settings of the warm-up were typed, and no cell has one: m is 0 unless it is said."""
    if any(cell.config.m != 0 or cell.config.init.looks_at == "general" for cell in cells):
        return []
    typed = dict.fromkeys(override for cell in cells for override in cell.overrides if _is_of_warmup(override))
    return [f"{', '.join(typed)}: changes nothing, as there is no warm-up with m=0"] if typed else []


def _is_of_warmup(override: str) -> bool:
    key, _, value = override.lstrip("+").partition("=")
    return key.split(".")[0] == WARMUP or key == f"{RATE}.{WARMUP}" or (key == "control" and value != NoControl().name)


def _by_key(cell: Cell) -> dict[str, str]:
    """Return the keys and values of a cell's overrides."""
    pairs = (override.partition("=") for override in cell.overrides)
    return {key.lstrip("+"): value for key, _, value in pairs}
