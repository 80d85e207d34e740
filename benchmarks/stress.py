"""Kill a grid at random moments until it is done, and count what is lost, done twice or different.

    python benchmarks/stress.py [--kills 50] [--workers 2]

A grid of the smoke sweep's size runs once undisturbed. Then it is started again and again in new folders, and all of
its processes are killed (SIGKILL) at a random moment, until there were --kills kills in all; in the end each folder's
grid is finished. Prints a line for each kill, and last the counts: records lost (published, then gone or damaged),
stages done twice (a record's content changed after it was published) and results that differ from the undisturbed
grid's, bit for bit.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def start(output: Path, workers: int) -> subprocess.Popen:
    """Start the grid in a process group of its own, so that all of it can be killed."""
    command = [
        sys.executable,
        str(ROOT / "run.py"),
        "-cn",
        "smoke",
        "n=0,48",
        "m=0,48",
        "recipe.checkpoint_minutes=0",
        f"output={output}",
    ]
    command += ["hydra/launcher=joblib", f"hydra.launcher.n_jobs={workers}"] if workers > 1 else []
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def records(output: Path) -> dict[str, bytes]:
    return {str(f.relative_to(output)): f.read_bytes() for f in sorted((output / "store").glob("*/*/record.json"))}


def results(output: Path) -> dict[str, dict]:
    """Return what each stage computed, by its key: hashes of adapters and items, and metrics without times."""
    by_key = {}
    for content in records(output).values():
        record = json.loads(content)
        values = {k: v for k, v in record["metrics"].items() if isinstance(v, dict) and "value" in v}
        by_key[record["key"]] = {"files": record["files"], "values": values}
    return by_key


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, kills, lost, twice, different, rounds = random.Random(args.seed), 0, 0, 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        calm = Path(folder) / "calm"
        clock = time.monotonic()
        if start(calm, args.workers).wait():
            raise SystemExit("the undisturbed grid failed")
        seconds, expected = time.monotonic() - clock, results(calm)
        print(f"undisturbed: {len(expected)} records in {seconds:.0f} s", flush=True)
        while kills < args.kills:
            rounds += 1
            output, published = Path(folder) / f"round{rounds}", dict[str, bytes]()
            while True:
                process, limit = start(output, args.workers), rng.uniform(0, seconds)
                try:
                    code = process.wait(timeout=limit if kills < args.kills else None)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    kills, code = kills + 1, None
                current = records(output)
                lost += sum(name not in current for name in published)
                twice += sum(name in current and current[name] != content for name, content in published.items())
                published = current
                print(
                    f"round {rounds}: "
                    + (f"killed ({kills}) after {limit:.0f} s" if code is None else f"ended with {code}")
                    + f", {len(current)} records",
                    flush=True,
                )
                if code is not None:
                    break
            final = results(output)
            different += sum(final.get(key) != value for key, value in expected.items())
            check = subprocess.run(
                [sys.executable, "-m", "d2lora.store", "gc", "--yes", "--output", str(output)],
                cwd=ROOT,
                capture_output=True,
                check=True,
            )
            check = subprocess.run(
                [sys.executable, "-m", "d2lora.store", "check", "--output", str(output)],
                cwd=ROOT,
                capture_output=True,
                text=True,
                check=False,
            )
            lost += check.returncode
    print(f"{kills} kills, {rounds} grids: {lost} lost, {twice} done twice, {different} different")


if __name__ == "__main__":
    main()
