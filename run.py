"""Run one cell, or with -m (or a file of sweeps/) a grid: `python run.py --help`."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
# Launchers' workers import hydra_plugins and d2lora from here, wherever the command was typed.
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # so that Hydra raises errors, and guard prints the user's in one line

import hydra  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from d2lora.command.guard import guard, overrides_last  # noqa: E402
from d2lora.command.job import job  # noqa: E402
from d2lora.command.sweepers import reported  # noqa: E402


@hydra.main(config_path="conf", config_name="config", version_base="1.3")
def main(config: DictConfig) -> object:
    return job(config)


if __name__ == "__main__":
    sys.argv[1:] = overrides_last(sys.argv[1:])
    guard(reported()(main))
