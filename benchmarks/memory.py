"""Measure whether memory grows over a long multirun: resident memory after each of 40 cells in one process.

    python benchmarks/memory.py [--cells 40]

Cells alternate SFT, DPO and ORPO, with and without warm-up, each with its own seed, evaluated on 16 items. Prints a
line every five cells and last the growth from the fifth to the last.
"""

import argparse
import itertools
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

FEW_ITEMS = ("task.benchmark.lab_math.limit=16", "task.benchmark.lab_facts.limit=16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=40)
    args = parser.parse_args()
    import psutil
    from hydra import compose, initialize_config_dir

    from d2lora import worker
    from d2lora.command import grid
    from d2lora.store import Store

    axes = itertools.product(range(args.cells), ("sft", "dpo", "orpo"), (0, 16))
    resident: list[float] = []
    with tempfile.TemporaryDirectory() as folder, initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for seed, method, m in itertools.islice(axes, args.cells):
            overrides = [f"seed={seed}", f"method={method}", f"m={m}", "n=16", f"output={folder}", *FEW_ITEMS]
            this = grid.cell_of(compose("config", overrides))
            if worker.do(this.config, this, Store(Path(folder)), lambda stage: lambda done, total: None):
                raise SystemExit("a cell failed")
            resident.append(psutil.Process().memory_info().rss / 2**20)
            if len(resident) % 5 == 0:
                print(f"{len(resident):>3} cells: {resident[-1]:.0f} MB resident", flush=True)
    print(f"growth from cell 5 to {len(resident)}: {100 * (resident[-1] / resident[4] - 1):.1f} %")


if __name__ == "__main__":
    main()
