"""Train the same cells with earlier builds and with this one, and compare adapters and losses.

    python benchmarks/same_training.py [--before 28f7cc9,7fda736] [--dtypes float32,bfloat16] [--inits ...] [--methods ...]
        [--family llama] [--rate 2e-4] [--checkpointing] [--keep FOLDER] [overrides ...]

A cell is a preparation, a warm-up of 16 samples and 50 steps of 8 samples, all through the worker, with the paper's recipe at
each build's own defaults (micro-batches and attention; --checkpointing adds gradient checkpointing, `overrides` anything else),
on a tiny random model. Each build runs in processes of its own on one thread, from a temporary git worktree. A cell is compared
with the first of --before that has its method and initialization: rslora, dora, simpo and kto are younger than 28f7cc9, and
7fda736 is the last build before adapted layers, passes and attention were replaced. --keep holds what the earlier builds trained,
for the next comparison.

In float32 an entry of the table is the largest difference of any adapter's entry (state and PEFT's format), and the limit 1e-5.
In bfloat16 (base in bfloat16, adapter in float32, autocast as on a GPU) it is the largest difference of any step's loss, limit 1e-3.
Prints a table for each dtype, how far the adapters were trained, and exits with 1 if a limit is exceeded or a cell failed.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from host_cost import checked_out

HERE = Path(__file__).resolve().parent.parent
WARM, STEPS, BATCH = 16, 50, 8
LIMITS = {"float32": 1e-5, "bfloat16": 1e-3}
FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "phi3": {"num_key_value_heads": 2, "sliding_window": None},  # q, k and v are one matrix, gate and up too
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},  # norms of queries and keys
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4, "sliding_window": None},
}
INITS = ("lora", "gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora", "milora", "corda_kpm", "corda_ipm")
INITS += ("eva", "lora_ga", "loftq", "multilora", "rslora", "dora")
METHODS = (
    "sft",
    "dpo",
    "dpo:base",
    "orpo",
    "simpo",
    "kto",
    "kto:base",
)  # a method, and the reference that it is not at by default


class What(NamedTuple):
    """What is trained, and how."""

    model: str
    dtype: str
    overrides: list[str]

    @property
    def folder(self) -> str:
        """Return a name for its outputs: keys do not tell how something was computed."""
        return f"{self.dtype}-{zlib.crc32(json.dumps(self).encode()):08x}"


class Trained(NamedTuple):
    """A cell's outcome: the folders of warm-up and adaptation, the loss of each step; or an error."""

    init: str
    method: str
    folders: list[str]
    losses: list[float]
    error: str


# --- one build, in a process of its own ------------------------------------------------------------------------------


def build() -> tuple[Any, Any, Any, Any]:
    """Return what composes a cell, what does it, the store, and the module that trains, of either build."""
    from d2lora.store import Store

    try:
        from d2lora import worker
        from d2lora.command import grid
        from d2lora.train import training

        return grid.cell_of, worker.do, Store, training
    except ImportError:
        from d2lora import cli, pipeline, train

        return cli.cell, pipeline.do, Store, train


def save_model(family: str, folder: Path) -> None:
    """Save a random model of two layers with the lab's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(HERE / "d2lora/lab/base")
    torch.manual_seed(0)
    # Four times the usual weights: a model whose logits are all alike would hide what its layers compute.
    config = AutoConfig.for_model(
        family, vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, initializer_range=0.08, tie_word_embeddings=False,
        **{f"{part}_token_id": getattr(tokenizer, f"{part}_token_id") for part in ("bos", "eos", "pad")}, **FAMILIES[family],
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def settings(init: str, method: str, what: What, output: str) -> list[str]:
    """Return a cell's overrides on the command line."""
    name, _, reference = method.partition(":")
    named = [f"init={init}", f"method={name}", *([f"method.reference={reference}"] if reference else [])]
    sizes = [f"n={STEPS * BATCH}", f"m={WARM}", f"recipe.batch={BATCH}", "method.epochs=1", "recipe.max_length=512"]
    lora = ["recipe.lora.r=8", "recipe.lora.alpha=12"]
    model = [f"model.path={what.model}", f"model.dtype={what.dtype}", f"output={output}", "recipe.threads=1"]
    return ["recipe=paper", *named, *sizes, *lora, *model, *what.overrides]


def trained(init: str, method: str, what: What, output: str) -> Trained:
    """Do a cell's preparation and trainings with the build that is imported; what is done is not done again."""
    from hydra import compose

    cell_of, do, store_of, _ = build()
    try:
        cell = cell_of(compose("config", overrides=settings(init, method, what, output)))
    except Exception as error:
        return Trained(init, method, [], [], str(error).splitlines()[0])
    stages = {getattr(stage, "kind", None) or stage.name: stage for stage in cell.chain.stages}
    wanted = [stages[kind] for kind in ("prepare", "warmup", "adapt") if kind in stages]
    config = cell.config.model_copy(update={"job": [stage.key for stage in wanted]})
    store = store_of(Path(output))
    if lost := do(config, type(cell)(config, cell.chain), store, lambda stage: lambda done, total: None):
        failure = json.loads((Path(output) / "failed" / f"{lost[0].key}.json").read_text())
        return Trained(init, method, [], [], failure["error"])
    folder = store.place if hasattr(store, "place") else store.folder
    folders = [str(folder(stage)) for stage in wanted[-2:]]
    log = json.loads((Path(folders[-1]) / "record.json").read_text())["metrics"]["log"]
    return Trained(init, method, folders, [entry["loss"] for entry in log], "")


def side(root: Path, cells: list[tuple[str, str]], what: What, output: str) -> None:
    """Do cells with the build in `root`, and print a line of JSON for each."""
    from hydra import initialize_config_dir

    build()[-1].thin = lambda log, every: log  # records keep the loss of each step
    with initialize_config_dir(str(root / "conf"), version_base="1.3"):
        for init, method in cells:
            print(json.dumps(trained(init, method, what, output)), flush=True)


# --- the comparison --------------------------------------------------------------------------------------------------


def run(root: Path, cells: list[tuple[str, str]], what: What, output: Path) -> Iterator[Trained]:
    """Yield the outcomes of cells as the build in `root` trains them in a process of its own."""
    command = [sys.executable, __file__, "--side", json.dumps([str(root), cells, what, str(output)])]
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "CUDA_VISIBLE_DEVICES": ""}
    own |= {"ACCELERATE_MIXED_PRECISION": "bf16"} if what.dtype == "bfloat16" else {}
    errors = output.parent / f"{output.name}.log"
    errors.parent.mkdir(parents=True, exist_ok=True)
    with (
        errors.open("w") as log,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | own, cwd=root
        ) as process,
    ):
        assert process.stdout is not None, "a pipe"
        for line in process.stdout:
            if line.startswith("["):
                yield Trained(*json.loads(line))
    if process.returncode:
        raise RuntimeError(errors.read_text()[-3000:])


def weights(folder: str) -> dict[str, Any]:
    """Return the tensors of an adapter's record, as it is trained and in PEFT's format, by file and name."""
    from safetensors.torch import load_file

    files = [f for f in sorted(Path(folder).rglob("*.safetensors")) if f.name != "start.safetensors"]
    return {f"{f.parent.name}/{name}": tensor for f in files for name, tensor in load_file(f).items()}


def difference(some: dict[str, Any], others: dict[str, Any]) -> float:
    """Return the largest difference of two adapters' entries; infinite if they have other shapes."""
    if {name: t.shape for name, t in some.items()} != {name: t.shape for name, t in others.items()}:
        return math.inf
    return max(float((tensor - others[name]).abs().max()) for name, tensor in some.items())


def compared(was: Trained, now: Trained) -> tuple[float, float, float]:
    """Return the largest difference of two outcomes' adapters and of their losses, and how far the adapter was trained."""
    if len(was.losses) != STEPS or len(now.losses) != STEPS:
        return math.inf, math.inf, 0.0
    before, (start, after) = weights(was.folders[-1]), map(weights, now.folders)
    losses = max(abs(one - other) for one, other in zip(was.losses, now.losses, strict=True))
    return difference(after, before), losses, difference(start, after)


def first_with(roots: dict[str, Path], init: str, method: str) -> str | None:
    """Return the first build that has an initialization and a method."""
    files = (f"conf/init/{init}.yaml", f"conf/method/{method.partition(':')[0]}.yaml")
    return next((name for name, root in roots.items() if all((root / file).is_file() for file in files)), None)


def compare(roots: dict[str, Path], inits: list[str], methods: list[str], what: What, keep: Path, new: Path) -> bool:
    """Train with all builds, print the table of differences, and tell whether all are within the limit."""
    # The base as reference of a quantized base's adapter is refused by every build.
    cells = [(i, m) for i in inits for m in methods if not (i == "loftq" and m.endswith(":base"))]
    chosen = {cell: first_with(roots, *cell) for cell in cells}
    before: dict[tuple[str, str], Trained] = {}
    for name, root in roots.items():
        for was in run(root, [cell for cell in cells if chosen[cell] == name], what, keep / name / what.folder):
            before[was.init, was.method] = was
    table: dict[tuple[str, str], float] = {}
    moved: list[float] = []
    for now in run(HERE, cells, what, new / what.folder):
        was = before[now.init, now.method]
        error = "; ".join(sorted({was.error, now.error} - {""}))
        adapter, losses, far = (math.inf, math.inf, 0.0) if error else compared(was, now)
        table[now.init, now.method] = adapter if what.dtype == "float32" else losses
        moved.append(far)
        line = f"{now.init}, {now.method} ({chosen[now.init, now.method]}): adapters {adapter:.1e}, losses {losses:.1e}"
        print(f"{line}, trained by {far:.1e} {error}", file=sys.stderr, flush=True)
    show(table, inits, methods, what, moved)
    return max(table.values()) <= LIMITS[what.dtype]


def show(
    table: dict[tuple[str, str], float], inits: list[str], methods: list[str], what: What, moved: list[float]
) -> None:
    """Print a row for each initialization, a column for each method."""
    kind = "adapters' entries" if what.dtype == "float32" else "losses"
    print(f"{what.dtype}: largest difference of {kind}; limit {LIMITS[what.dtype]:.0e}")
    print(f"{'':<16}" + "".join(f"{method:>10}" for method in methods))
    for init in inits:
        entries = (table.get((init, method)) for method in methods)
        print(f"{init:<16}" + "".join(f"{'-' if entry is None else f'{entry:.1e}':>10}" for entry in entries))
    print(
        f"largest of {len(table)}: {max(table.values()):.1e}; adapters were trained by {min(moved):.1e} to {max(moved):.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default="28f7cc9,7fda736", help="commits of earlier builds, the preferred first")
    parser.add_argument("--dtypes", default=",".join(LIMITS))
    parser.add_argument("--inits", default=",".join(INITS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--family", default="llama", choices=FAMILIES)
    parser.add_argument("--rate", default="2e-4", help="learning rate of all methods")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing in all builds")
    parser.add_argument("--keep", type=Path, help="folder for what the earlier builds train")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="settings of all cells that all builds have")
    args = parser.parse_args()
    if args.side:
        root, cells, what, output = json.loads(args.side)
        sys.path[:0] = [root]
        side(Path(root), cells, What(*what), output)
        return
    rates = [f"recipe.lr.{phase}={args.rate}" for phase in ("warmup", "sft", "dpo", "orpo")]
    overrides = rates + ["recipe.gradient_checkpointing=true"] * args.checkpointing + args.overrides
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        keep = (args.keep or folder / "keep").resolve()
        model = keep / f"model-{args.family}"
        if not model.is_dir():
            save_model(args.family, model)
        roots = {commit: stack.enter_context(checked_out(commit)) for commit in args.before.split(",")}
        which = (args.inits.split(","), args.methods.split(","))
        right = [
            compare(roots, *which, What(str(model), dtype, overrides), keep, folder / "new")
            for dtype in args.dtypes.split(",")
        ]
    sys.exit(not all(right))


if __name__ == "__main__":
    main()
