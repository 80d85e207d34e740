"""What W&B offline costs: the same sweep without it and with it, one after the other, and once more in turn.

    python benchmarks/wandb_cost.py [-cn lab] [--rounds 1] [OVERRIDE ...]

Each side starts from an empty output folder. Prints the wall seconds of each and last the line `cost: N.N %`, of the medians.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def wall(sweep: str, mode: str, overrides: list[str]) -> float:
    """Seconds of a whole sweep. RuntimeError if it fails, or if W&B has no runs where it should."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            str(ROOT / "run.py"),
            "-cn",
            sweep,
            f"output={folder}",
            f"wandb.mode={mode}",
            *overrides,
        ]
        clock = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
        seconds = time.monotonic() - clock
        if done.returncode:
            raise RuntimeError(done.stdout[-1000:] + done.stderr[-2000:])
        runs = len(list(Path(folder).glob("wandb/*run-*")))
        if bool(runs) != (mode == "offline"):
            raise RuntimeError(f"{runs} runs with wandb.mode={mode}")
    print(f"{mode:<10}{seconds:>10.1f} s{runs:>8} runs", flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-cn", dest="sweep", default="lab")
    parser.add_argument("--rounds", type=int, default=1)
    args, overrides = parser.parse_known_args()
    seconds: dict[str, list[float]] = {"disabled": [], "offline": []}
    for number in range(args.rounds):
        for mode in sorted(seconds, reverse=bool(number % 2)):  # in turn: a machine gets slower or faster meanwhile
            seconds[mode].append(wall(args.sweep, mode, overrides))
    without, with_it = (statistics.median(seconds[mode]) for mode in ("disabled", "offline"))
    print(f"cost: {100 * (with_it / without - 1):.1f} %")


if __name__ == "__main__":
    main()
