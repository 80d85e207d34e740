"""Measure how long the report of a large grid takes, and its size: 1,000 evaluations of 1,319 items each.

    python benchmarks/report.py FOLDER     makes the records in FOLDER (once), then times the report in a process of its own

Prints seconds, peak memory and the page's size, and if a Chromium is installed the seconds until it has drawn the page.
Limits: 60 s, 2 GB, 10 MB.
"""

import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

AXES = {"n": [0, 100, 200, 500, 1000, 2000, 5000, 10000], "m": [0, 5000, 10000, 20000, 40000], "seed": [0, 1, 2, 3, 4]}
ITEMS = 1319
WORDS = "Step by step, we find that the number of apples times their price gives what is asked for. "


def make(output: Path) -> None:
    """Write records of the paper's math grid with more m and n and five seeds, as a run would write them."""
    import made
    from hydra import compose, initialize_config_dir

    from d2lora.command.grid import cell_of

    grid = []
    for method in ("sft", "dpo", "orpo"):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = cell_of(compose("config", overrides=["scale=paper", f"method={method}", "sweep=large"])).config
        grid += made.cells(config, **AXES)
    made.publish(output, grid, ITEMS, text=lambda i: f"{WORDS * 4}So the answer is \\boxed{{{i}}}.")


def main() -> None:
    output = Path(sys.argv[1]).resolve()
    if not (output / "manifests" / "large.json").exists():
        make(output)
    evaluations = len(list((output / "store" / "evaluate").iterdir()))
    start = time.monotonic()
    command = [sys.executable, "-m", "d2lora.report", "--output", str(output)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    seconds, page = time.monotonic() - start, output / "report" / "index.html"
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10
    print(f"{evaluations} evaluations of {ITEMS} items: {seconds:.1f} s, peak memory {memory:.0f} MB")
    print(f"page: {page.stat().st_size / 1e6:.1f} MB", end="")
    if browser := shutil.which("chromium") or shutil.which("google-chrome"):
        start = time.monotonic()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        subprocess.run(
            [browser, *flags, page.as_uri()], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        print(f", drawn {time.monotonic() - start:.1f} s after the browser's start", end="")
    print()


if __name__ == "__main__":
    main()
