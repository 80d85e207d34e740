"""Measure what a second worker gains: wall time of the lab's sweep with one and two workers of one thread.

    python benchmarks/width.py [--n 0,100,200,500,1000] [--m 0,4000]

Prints both times and last `speedup: N.NNx`.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", default="0,100,200,500,1000")
    parser.add_argument("--m", default="0,4000")
    args = parser.parse_args()
    wall = {}
    for workers in (2, 1):
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable,
                str(ROOT / "run.py"),
                "-cn",
                "lab",
                f"n={args.n}",
                f"m={args.m}",
                f"output={folder}",
            ]
            clock = time.monotonic()
            subprocess.run([*command, f"hydra.launcher.n_jobs={workers}"], check=True, capture_output=True)
            wall[workers] = time.monotonic() - clock
            print(f"{workers} worker{'s'[: workers > 1]}: {wall[workers]:.1f} s", flush=True)
    print(f"speedup: {wall[1] / wall[2]:.2f}x")


if __name__ == "__main__":
    main()
