"""Plug d2lora into Hydra: sweeps/ on the search path, and the grid sweeper. Both only call d2lora."""

from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, ListConfig, OmegaConf


class SweepsOnThePath(SearchPathPlugin):
    """Lets `-cn table3` find sweeps/table3.yaml: hydra.searchpath in a config would come too late for that."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("d2lora", f"file://{Path(__file__).parent.parent / 'sweeps'}")


class GridSweeper(Sweeper):
    """A sweeper that plans the whole grid before anything runs (d2lora.command.launch)."""

    def __init__(self, params: DictConfig | ListConfig | None = None) -> None:
        self.params = OmegaConf.to_container(params) if params else {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from hydra.core.plugins import Plugins

        self.grid_config, self.loader = config, hydra_context.config_loader
        self.hydra_launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        from d2lora.command.launch import sweep

        sweep(self.grid_config, self.loader, self.hydra_launcher, self.params, arguments)


ConfigStore.instance().store(
    group="hydra/sweeper", name="grid", provider="d2lora", node={"_target_": f"{__name__}.GridSweeper", "params": None}
)
