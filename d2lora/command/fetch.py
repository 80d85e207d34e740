"""Download what cells need, for clusters whose nodes are offline: `python -m d2lora.fetch` with run.py's overrides.

Afterwards run.py finds everything in the Hub's cache (HF_HOME) with HF_HUB_OFFLINE=1.
"""

import argparse
import functools
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf

from d2lora import data, plan
from d2lora.command import cli, grid
from d2lora.errors import UserError
from d2lora.settings import Config, Model

_HELP = """python -m d2lora.fetch [-cn SWEEP] [--config-dir FOLDER] [OVERRIDE ...]

Downloads the model and data sets that `python run.py` with the same overrides needs, for example
  python -m d2lora.fetch scale=paper m=0,40000
  python -m d2lora.fetch -cn table3"""


def fetch(config: Config) -> Iterable[str]:
    """Download each data set and the model of a config, yielding a line for each. UserError for what can't be had."""
    for key, source in plan.sources(config).items():
        rows = data.rows(source, config.split_seed)
        yield f"{key}: {source.path}, {len(rows):,} rows"
    for name in config.task.lm_eval:
        _fetch_lm_eval(name)
        yield f"lm-eval task {name}"
    yield f"model: {_fetch_model(config.model)}"


@functools.cache
def _fetch_lm_eval(name: str) -> None:
    data.check_lm_eval([name])
    data.hub()
    try:
        data.harness().load([name])
    except Exception as error:
        raise UserError(data.hub_problem("task.lm_eval", name, error)) from None


@functools.cache
def _fetch_model(model: Model) -> str:
    place = data.model_files(model)
    if place is not None:
        return f"{model.name} is on this machine"
    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model"] + (["*.py"] if model.trust_remote_code else [])
    try:
        data.hub().snapshot_download(model.path, revision=model.revision, allow_patterns=patterns)
    except Exception as error:
        raise UserError(data.hub_problem("model.path", model.path, error)) from None
    return f"{model.path}@{model.revision}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help shows how")


def configs(arguments: list[str]) -> list[Config]:
    """The configs of the cells that run.py makes of the same command line, one of those that read the same."""
    parser = _Parser(prog="d2lora.fetch", add_help=False)
    parser.add_argument("-cn", "--config-name", default="config")
    parser.add_argument("-cd", "--config-dir", type=Path)
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_intermixed_args(arguments)
    sys.path.insert(0, str(data.ROOT))  # for hydra_plugins
    if given.config_dir:
        _search(given.config_dir)
    hydra = [o for o in given.overrides if o.lstrip("+~").startswith(("hydra.", "hydra/"))]
    with initialize_config_dir(str(data.ROOT / "conf"), version_base="1.3"):
        whole = compose(given.config_name, hydra, return_hydra_config=True)
        loader = GlobalHydra.instance().config_loader()
        params = OmegaConf.to_container(whole.hydra.sweeper.get("params") or OmegaConf.create({}))
        overrides = grid.expand(
            OverridesParser.create(config_loader=loader), params, [o for o in given.overrides if o not in hydra]
        )
        cells = grid.valid_cells(grid.Composer(whole, loader), overrides, check=lambda config, seen: None)
    read = [(plan.sources(c.config), c.config.task.lm_eval, c.config.model) for c in cells]
    return list({str(r): c.config for r, c in zip(read, cells, strict=True)}.values())


def _search(folder: Path) -> None:
    """Have Hydra look for configs in a folder too, as run.py's --config-dir does."""
    if not folder.is_dir():
        raise UserError(f"--config-dir {folder}: no such folder")

    class ConfigDir(SearchPathPlugin):
        def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
            search_path.append("command-line", f"file://{folder.resolve()}")

    Plugins.instance().register(ConfigDir)


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(_HELP)
        return
    cli.guard(lambda: _fetch_all(sys.argv[1:]))


def _fetch_all(arguments: list[str]) -> None:
    seen: set[str] = set()
    for config in configs(arguments):
        for line in fetch(config):
            if line not in seen:
                print(line, flush=True)
                seen.add(line)
