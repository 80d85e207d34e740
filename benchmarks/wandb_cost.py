"""Measure what W&B offline costs: a sweep with it and one without, at the same time, on a core each, then with the
cores swapped.

    python benchmarks/wandb_cost.py [-cn lab] [OVERRIDE ...]

One after the other they could not be compared, because a shared machine may be a fifth faster or slower five minutes
later. Each starts from an empty output folder, with the sweep file's number of workers, all on its core. Prints the
wall seconds of each and last the line `cost: N.N %`, the geometric mean of both rounds. Needs Linux and two cores.
"""

import argparse
import functools
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def together(sweep: str, overrides: list[str], cores: dict[str, int]) -> dict[str, float]:
    """Return the sweep's wall seconds by W&B mode, run at the same time.

    RuntimeError if one fails, or has W&B runs when disabled.
    """
    with tempfile.TemporaryDirectory() as folder:
        clock = time.monotonic()
        sweeps = {mode: _begin(sweep, overrides, mode, core, Path(folder, mode)) for mode, core in cores.items()}
        seconds: dict[str, float] = {}
        while running := sweeps.keys() - seconds:
            seconds |= {mode: time.monotonic() - clock for mode in running if sweeps[mode].poll() is not None}
            time.sleep(0.05)
        for mode, process in sweeps.items():
            runs = len(list(Path(folder, mode).glob("wandb/*run-*")))
            if process.returncode or bool(runs) != (mode == "offline"):
                raise RuntimeError(f"wandb.mode={mode}: exit code {process.returncode}, {runs} runs")
            print(f"{mode:<10}{seconds[mode]:>10.1f} s{runs:>8} runs   core {cores[mode]}", flush=True)
    return seconds


def _begin(sweep: str, overrides: list[str], mode: str, core: int, output: Path) -> subprocess.Popen:
    arguments = [f"output={output}", f"wandb.mode={mode}", *overrides]
    command = [sys.executable, str(ROOT / "run.py"), "-cn", sweep, *arguments]
    pinned = functools.partial(os.sched_setaffinity, 0, {core})
    return subprocess.Popen(command, preexec_fn=pinned, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-cn", dest="sweep", default="lab")
    args, overrides = parser.parse_known_args()
    one, other = sorted(os.sched_getaffinity(0))[:2]
    rounds = [together(args.sweep, overrides, {"disabled": a, "offline": b}) for a, b in ((one, other), (other, one))]
    ratio = math.prod(r["offline"] / r["disabled"] for r in rounds) ** (1 / len(rounds))
    print(f"cost: {100 * (ratio - 1):.1f} %")


if __name__ == "__main__":
    main()
