"""Compose cells as the command line would, cached: Hydra takes a tenth of a second for each, longer than many tests."""

import functools
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from d2lora import plan
from d2lora.command import grid
from d2lora.command.grid import Composer
from d2lora.plan import Cell
from d2lora.settings import Config

ROOT = Path(__file__).parent.parent


def cell(*overrides: str, name: str = "config", folder: str = "conf") -> Cell:
    """Return the checked cell of the overrides.

    Its stages are computed each time, because files may have changed in between.
    """
    output = [o.removeprefix("output=") for o in overrides if o.startswith("output=")]
    config = _config(name, folder, *(o for o in overrides if not o.startswith("output=")))
    if output:  # most tests have a folder of their own, and nothing is interpolated from it
        config = config.model_copy(update={"output": output[-1]})
    return Cell(config, plan.chain(config))


def sweep(*overrides: str, name: str = "config") -> tuple[list[Cell], Composer]:
    """Compose the cells of a grid as run.py -m does, each once, and what composed them."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        whole = compose(name, [], return_hydra_config=True)
        loader = GlobalHydra.instance().config_loader()
        composer = Composer(whole, loader)
        params = OmegaConf.to_container(whole.hydra.sweeper.get("params") or OmegaConf.create({}))
        axes = grid.expand(OverridesParser.create(config_loader=loader), params, overrides)
        cells = grid.valid_cells(composer, axes, check=lambda config, passed: None)
    return plan.unique(cells), composer


@functools.cache
def _config(name: str, folder: str, *overrides: str) -> Config:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / folder), version_base="1.3"):
        return grid.cell_of(compose(name, overrides=list(overrides))).config
