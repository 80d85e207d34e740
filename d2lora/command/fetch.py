"""Download what cells need, for clusters whose nodes are offline: `python -m d2lora fetch` with run.py's overrides.

Afterwards run.py finds everything in the Hub's cache (HF_HOME) with HF_HUB_OFFLINE=1.
"""

import functools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from d2lora import data, plan
from d2lora.command import grid
from d2lora.errors import UserError
from d2lora.settings import Config, Model
from d2lora.stages import prepare


def fetch(config: Config) -> Iterable[str]:
    """Download each data set and the model of a config, and yield a line for each.

    UserError for what can't be downloaded.
    """
    for key, source in prepare.sources(config).items():
        rows = data.rows(source, config.split_seed)
        yield f"{key}: {source.path}, {len(rows):,} rows"
    for task in config.task.harness_tasks:
        _fetch_lm_eval(task.name, config.task.lm_eval_path)
        yield f"lm-eval task {task.name}"
    yield f"model: {_fetch_model(config.model)}"


@functools.cache
def _fetch_lm_eval(name: str, folder: str | None = None) -> None:
    """Download the data of one of lm-evaluation-harness's tasks, or of one in the user's folder."""
    data.hub()
    data.load_harness_task(name, folder)


@functools.cache
def _fetch_model(model: Model) -> str:
    """Download a model, and return a line about it."""
    if data.model_files(model) is not None:
        return f"{model.name} is on this machine"
    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model"] + (["*.py"] if model.trust_remote_code else [])
    try:
        data.hub().snapshot_download(model.path, revision=model.revision, allow_patterns=patterns)
    except Exception as error:
        raise UserError(data.hub_problem("model.path", model.path, error)) from None
    return f"{model.path}@{model.revision}"


def configs(overrides: Sequence[str], name: str = "config", folder: Path | None = None) -> list[Config]:
    """Return the configs of the cells that run.py makes of the same command line, one of those that read the same.

    `name` is the primary config's (-cn), `folder` the user's own configs (--config-dir).
    """
    sys.path.insert(0, str(data.ROOT))  # for hydra_plugins
    if folder:
        _search(folder)
    hydra = [o for o in overrides if o.lstrip("+~").startswith(("hydra.", "hydra/"))]
    with initialize_config_dir(str(data.ROOT / "conf"), version_base="1.3"):
        composed = compose(name, hydra, return_hydra_config=True)
        loader = GlobalHydra.instance().config_loader()
        params = OmegaConf.to_container(composed.hydra.sweeper.get("params") or OmegaConf.create({}))
        parser = OverridesParser.create(config_loader=loader)
        axes = grid.expand(parser, params, [o for o in overrides if o not in hydra])
        cells = plan.unique(grid.valid_cells(grid.Composer(composed, loader), axes, check=lambda config, passed: None))
    inputs = [(prepare.sources(c.config), c.config.task.harness_tasks, c.config.model) for c in cells]
    return list({str(r): c.config for r, c in zip(inputs, cells, strict=True)}.values())


def _search(folder: Path) -> None:
    """Let Hydra find configs in this folder too, as run.py's --config-dir does."""
    if not folder.is_dir():
        raise UserError(f"--config-dir {folder}: no such folder")

    class ConfigDir(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            search_path.append("command-line", f"file://{folder.resolve()}")

    Plugins.instance().register(ConfigDir)


def fetch_all(overrides: Sequence[str], name: str = "config", folder: Path | None = None) -> None:
    """Download what the cells of a command line need, and print a line for each data set and model once."""
    printed: set[str] = set()
    for config in configs(overrides, name, folder):
        for line in fetch(config):
            if line not in printed:
                print(line, flush=True)
                printed.add(line)
