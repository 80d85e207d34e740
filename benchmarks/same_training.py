"""Train the same cells with earlier builds and with this one, and compare adapters and losses.

    python benchmarks/same_training.py [--before 28f7cc9,7fda736] [--dtypes float32,bfloat16,float64] [--inits ...]
        [--methods ...] [--family llama] [--rate 2e-4] [--checkpointing] [--exact] [--keep FOLDER] [overrides ...]

A cell is a preparation, a warm-up of 16 samples and 50 steps of 8 samples, all through the worker, with the paper's recipe at
each build's own defaults (micro-batches and attention; --checkpointing adds gradient checkpointing, `overrides` anything else),
on a tiny random model. Each build runs in a process of its own on one thread, from a temporary git worktree. A cell is compared
with the first of --before that has its method and initialization: rslora, dora, simpo and kto are younger than 28f7cc9, and
7fda736 is the last build before adapted layers, passes and attention were replaced. --keep holds what the earlier builds trained,
for the next comparison.

In float32 an entry of the table is the largest difference of any adapter's entry (state and PEFT's format), and the limit 1e-5.
In bfloat16 (base in bfloat16, adapter in float32, autocast as on a GPU) it is the largest difference of any step's loss, limit 1e-3.
In float64 both builds train in float64, from and to weights in float32: limit 1e-7, for there rounding hides no fault.
Prints a table for each dtype, how far the adapters were trained, and exits with 1 if a limit is exceeded or a cell failed.

--exact tells what rounding does in float32 and bfloat16. Adam's first step is rate * g / (|g| + 1e-8): an entry whose gradient is by
chance smaller than that moves by its rounding, in any build. Further tables have the differences of the earlier build with itself (at
micro-batches of 1), of both builds with float64 (from the same start and base), and of both in float64.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from host_cost import checked_out

HERE = Path(__file__).resolve().parent.parent
WARM, STEPS, BATCH = 16, 50, 8
LIMITS = {"float32": 1e-5, "bfloat16": 1e-3, "float64": 1e-7}
NEW = "this build"
REGROUPED = "recipe.micro_batch=1"  # the same sums in another order
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
    overrides: tuple[str, ...]
    wide: bool = False  # train in float64: what rounding hides

    @classmethod
    def of(cls, model: str, dtype: str, overrides: tuple[str, ...]) -> "What":
        """Return what is trained in a dtype; in float64, on a base in float32."""
        wide = dtype == "float64"
        return cls(model, "float32" if wide else dtype, overrides, wide)

    @property
    def folder(self) -> str:
        """Return a name for its outputs: keys do not tell how something was computed."""
        return f"{'float64-of-' * self.wide}{self.dtype}-{zlib.crc32(json.dumps(self).encode()):08x}"


class Cell(NamedTuple):
    """An initialization under a method, trained in some way."""

    init: str
    method: str
    what: What


class Trained(NamedTuple):
    """A cell's outcome: the folders of warm-up and adaptation, the loss of each step; or an error."""

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
        return Trained([], [], str(error).splitlines()[0])
    stages = {getattr(stage, "kind", None) or stage.name: stage for stage in cell.chain.stages}
    wanted = [stages[kind] for kind in ("prepare", "warmup", "adapt") if kind in stages]
    config = cell.config.model_copy(update={"job": [stage.key for stage in wanted]})
    store = store_of(Path(output))
    if lost := do(config, type(cell)(config, cell.chain), store, lambda stage: lambda done, total: None):
        failure = json.loads((Path(output) / "failed" / f"{lost[0].key}.json").read_text())
        return Trained([], [], failure["error"])
    folder = store.place if hasattr(store, "place") else store.folder
    folders = [str(folder(stage)) for stage in wanted[-2:]]
    log = json.loads((Path(folders[-1]) / "record.json").read_text())["metrics"]["log"]
    return Trained(folders, [entry["loss"] for entry in log], "")


def in_float64(train: Callable[..., Any]) -> Callable[..., Any]:
    """Return a build's `train(base, wrapped, ...)` that trains in float64, from and to weights in their own dtype."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Wide(TorchDispatchMode):
        """Have float64 wherever code names float32: in norms, log-probabilities, references."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            named = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
            return func(*args, **named)

    def wide(base: Any, wrapped: Any, *args: Any, **kwargs: Any) -> Any:
        dtypes = [(t, t.dtype) for t in (*wrapped.parameters(), *wrapped.buffers())]
        wrapped.double()
        torch.set_default_dtype(torch.float64)
        try:
            with Wide(), patch.object(torch, "set_default_dtype"):  # transformers sets it back for the models it builds
                return train(base, wrapped, *args, **kwargs)
        finally:
            torch.set_default_dtype(torch.float32)
            for tensor, dtype in dtypes:
                tensor.data = tensor.data.to(dtype)

    return wide


def side(root: Path, cells: list[Cell], outputs: str) -> None:
    """Do cells with the build in `root`, and print a line of JSON for each."""
    from hydra import initialize_config_dir

    training = build()[-1]
    training.thin = lambda log, every: log  # records keep the loss of each step
    as_it_is, wide = training.train, in_float64(training.train)
    with initialize_config_dir(str(root / "conf"), version_base="1.3"):
        for init, method, what in cells:
            training.train = wide if what.wide else as_it_is
            os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if what.dtype == "bfloat16" and not what.wide else "no"
            print(json.dumps(trained(init, method, what, f"{outputs}/{what.folder}")), flush=True)


# --- the comparison --------------------------------------------------------------------------------------------------


def run(root: Path, cells: list[Cell], outputs: Path) -> Iterator[tuple[Cell, Trained]]:
    """Yield cells with their outcomes as the build in `root` trains them in a process of its own."""
    given = [(init, method, list(what)) for init, method, what in cells]
    command = [sys.executable, __file__, "--side", json.dumps([str(root), given, str(outputs)])]
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "CUDA_VISIBLE_DEVICES": ""}
    outputs.mkdir(parents=True, exist_ok=True)
    errors = outputs / "errors.log"
    with (
        errors.open("w") as log,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | own, cwd=root
        ) as process,
    ):
        assert process.stdout is not None, "a pipe"
        lines = (line for line in process.stdout if line.startswith("["))
        yield from zip(cells, (Trained(*json.loads(line)) for line in lines), strict=False)
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


def apart(some: Trained, other: Trained, of_losses: bool) -> float:
    """Return the largest difference of two outcomes' losses, or else of their adapters' entries."""
    if some.error or other.error or not len(some.losses) == len(other.losses) == STEPS:
        return math.inf
    if of_losses:
        return max(abs(one - other) for one, other in zip(some.losses, other.losses, strict=True))
    return difference(weights(some.folders[-1]), weights(other.folders[-1]))


def first_with(roots: dict[str, Path], cell: Cell) -> str:
    """Return the first build that has a cell's initialization and method. StopIteration if none has."""
    files = (f"conf/init/{cell.init}.yaml", f"conf/method/{cell.method.partition(':')[0]}.yaml")
    return next(name for name, root in roots.items() if all((root / file).is_file() for file in files))


class Ways(NamedTuple):
    """How a cell was trained: by both builds, by the earlier one with its sums in another order, by both in float64."""

    before: Trained
    now: Trained
    regrouped: Trained | None = None
    before_exact: Trained | None = None
    now_exact: Trained | None = None

    def differences(self, of_losses: bool) -> dict[str, float]:
        """Return differences by what is compared; the first is the one with a limit."""
        pairs = {"this build and the earlier": (self.before, self.now)}
        if self.regrouped and self.before_exact and self.now_exact:
            pairs["the earlier build and itself, micro-batches of 1"] = (self.before, self.regrouped)
            pairs["the earlier build and float64"] = (self.before, self.before_exact)
            pairs["this build and float64"] = (self.now, self.before_exact)
            pairs["both in float64"] = (self.before_exact, self.now_exact)
        return {name: apart(*pair, of_losses) for name, pair in pairs.items()}


def ways(what: What, exact: bool) -> list[tuple[bool, What]]:
    """Return whether this build trains, and what, in the order of `Ways`."""
    regrouped, wide = what._replace(overrides=(*what.overrides, REGROUPED)), what._replace(wide=True)
    more = [(False, regrouped), (False, wide), (True, wide)] if exact and not what.wide else []
    return [(False, what), (True, what), *more]


def train_all(roots: dict[str, Path], cells: list[Cell], exact: bool, keep: Path, new: Path) -> dict[Cell, Ways]:
    """Train cells with all builds that they are compared by, each in one process."""
    by = {
        cell: [
            (NEW if ours else first_with(roots, cell), cell._replace(what=one)) for ours, one in ways(cell.what, exact)
        ]
        for cell in cells
    }
    done: dict[tuple[str, Cell], Trained] = {}
    for name, root in [*roots.items(), (NEW, HERE)]:
        todo = [one for trainings in by.values() for build, one in trainings if build == name]
        for one, outcome in run(root, todo, new if name == NEW else keep / name):
            done[name, one] = outcome
            line = f"{name}: {one.init}, {one.method}, {one.what.folder}"
            print(f"{line}: {outcome.error or 'trained'}", file=sys.stderr, flush=True)
    return {cell: Ways(*(done[training] for training in trainings)) for cell, trainings in by.items()}


def show(dtype: str, outcomes: dict[Cell, Ways]) -> bool:
    """Print a table for each comparison, and tell whether the first is within the limit."""
    of_losses = dtype == "bfloat16"
    tables: dict[str, dict[tuple[str, str], float]] = {}
    for (init, method, _), outcome in outcomes.items():
        for name, value in outcome.differences(of_losses).items():
            tables.setdefault(name, {})[init, method] = value
    for name, table in tables.items():
        print_table(f"{dtype}, {'losses' if of_losses else 'adapters'}: {name}", table)
    moved = [difference(*map(weights, one.now.folders)) for one in outcomes.values() if len(one.now.folders) == 2]
    print(f"limit {LIMITS[dtype]:.0e}; adapters were trained by {min(moved):.1e} to {max(moved):.1e}\n", flush=True)
    return max(next(iter(tables.values())).values()) <= LIMITS[dtype]


def print_table(title: str, table: dict[tuple[str, str], float]) -> None:
    """Print a row for each initialization, a column for each method."""
    inits, methods = (list(dict.fromkeys(names)) for names in zip(*table, strict=True))
    print(f"{title}: largest {max(table.values()):.1e}")
    print(f"{'':<16}" + "".join(f"{method:>10}" for method in methods))
    for init in inits:
        entries = (table.get((init, method)) for method in methods)
        print(f"{init:<16}" + "".join(f"{'-' if entry is None else f'{entry:.1e}':>10}" for entry in entries))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default="28f7cc9,7fda736", help="commits of earlier builds, the preferred first")
    parser.add_argument("--dtypes", default=",".join(LIMITS))
    parser.add_argument("--inits", default=",".join(INITS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--family", default="llama", choices=FAMILIES)
    parser.add_argument("--rate", default="2e-4", help="learning rate of all methods")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing in all builds")
    parser.add_argument("--exact", action="store_true", help="compare with float64, and the earlier build with itself")
    parser.add_argument("--keep", type=Path, help="folder for what the earlier builds train")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="settings of all cells that all builds have")
    args = parser.parse_args()
    if args.side:
        root, cells, outputs = json.loads(args.side)
        sys.path[:0] = [root]
        side(
            Path(root),
            [
                Cell(init, method, What(model, dtype, tuple(more), wide))
                for init, method, (model, dtype, more, wide) in cells
            ],
            outputs,
        )
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
        dtypes, inits, methods = (getattr(args, name).split(",") for name in ("dtypes", "inits", "methods"))
        # The base as reference of a quantized base's adapter is refused by every build.
        pairs = [(i, m) for i in inits for m in methods if not (i == "loftq" and m.endswith(":base"))]
        whats = [What.of(str(model), dtype, tuple(overrides)) for dtype in dtypes]
        cells = [Cell(*pair, what) for what in whats for pair in pairs]
        outcomes = train_all(roots, cells, args.exact, keep, folder / "new")
        right = [
            show(d, {c: o for c, o in outcomes.items() if c.what == w}) for d, w in zip(dtypes, whats, strict=True)
        ]
    sys.exit(not all(right))


if __name__ == "__main__":
    main()
