"""Download what cells need, for clusters whose nodes are offline: `python -m d2lora.fetch` with run.py's overrides.

Afterwards run.py finds everything in the Hub's cache (HF_HOME) with HF_HUB_OFFLINE=1.
"""

import sys
from collections.abc import Iterable

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from d2lora import cli, data
from d2lora.config import Config, Model, parse
from d2lora.errors import UserError

_HELP = """python -m d2lora.fetch [-cn SWEEP] [OVERRIDE ...]

Downloads the model and data sets that `python run.py` with the same overrides needs, for example
  python -m d2lora.fetch scale=paper
  python -m d2lora.fetch -cn table3"""


def fetch(config: Config) -> Iterable[str]:
    """Download each data set and the model of a config, yielding a line for each. UserError for what can't be had."""
    sources = {
        "task.data": config.task.data,
        "warmup.data": config.warmup.data,
        **{f"benchmark {k}": b.data for k, b in config.task.benchmark.items()},
    }
    for key, source in sources.items():
        rows = data.rows(source, config.split_seed)
        yield f"{key}: {source.path}, {len(rows):,} rows"
    for name in config.task.lm_eval:
        from lm_eval.tasks import TaskManager, get_task_dict

        get_task_dict([name], TaskManager())
        yield f"lm-eval task {name}"
    yield f"model: {_fetch_model(config.model)}"


def _fetch_model(model: Model) -> str:
    place = data.model_files(model)
    if place is not None:
        return f"{model.name} is on this machine"
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.model"] + (["*.py"] if model.trust_remote_code else [])
    try:
        snapshot_download(model.path, revision=model.revision, allow_patterns=patterns)
    except Exception as error:
        raise UserError(data.hub_problem("model.path", model.path, error)) from None
    return f"{model.path}@{model.revision}"


def configs(arguments: list[str]) -> list[Config]:
    """The distinct (model, task, warmup) configs of a command line like run.py's; sweeps of n, m or seeds need no more."""
    name, overrides, rest = "config", [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument in ("-cn", "--config-name") and rest:
            name = rest.pop(0)
        elif argument not in ("-m", "--multirun"):
            overrides.append(argument)
    sys.path.insert(0, str(data.ROOT))
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from d2lora.sweep import expand

    with initialize_config_dir(str(data.ROOT / "conf"), version_base="1.3"):
        whole = compose(name, return_hydra_config=True)
        params = OmegaConf.to_container(whole.hydra.sweeper.get("params") or OmegaConf.create({}))
        combinations = expand(OverridesParser.create(), params, overrides)  # type: ignore[arg-type]
        chosen = {
            tuple(o for o in c if o.split("=")[0] not in ("n", "m", "seed", "data_seed", "method"))
            for c in combinations
        }
        return [_checked(compose(name, overrides=list(c))) for c in sorted(chosen)]


def _checked(composed: DictConfig) -> Config:
    values = OmegaConf.to_container(composed, resolve=True)
    return parse({str(k): v for k, v in values.items()})  # type: ignore[union-attr]


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


if __name__ == "__main__":
    main()
