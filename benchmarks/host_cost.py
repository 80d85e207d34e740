"""Count what a training step costs the host, and what it saves for the backward pass: an earlier build beside this one.

    python benchmarks/host_cost.py [--before 28f7cc9] [--methods sft,dpo,orpo] [--steps 3] [--rounds 3]

Both builds train with the paper's recipe at their own defaults (recipe=paper), each in processes of its own on one
thread, in turns. The earlier one is checked out into a temporary git worktree.

Time is mostly the host's on a Llama of 32 layers, width 32, r = 4 and pairs of a few tokens, in float32: CPU seconds of the
process and ATen operations (forward, backward and optimizer, with the optimizer's `foreach` that a GPU has) per pair. A fifth
of this build's samples in `perf` were kernels there, so the seconds are measured at half the width too.
DPO's reference is computed before the first step and is not in it.

Memory is of the real dtype and proportions: bfloat16 under autocast, width 1024, r = 4 and rows of real lengths / 4 (so
that rank and length are to the width what they are at 4096). Bytes are those that autograd saves for one micro-batch,
each storage once and without weights, per token, layer (the difference of three layers and one) and unit of width.

Prints a line for each method and figure: both builds, the fraction and the ratio.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
QUARTER = 4
SHAPES = {"bytes": (4096 // QUARTER, 128 // QUARTER), "narrow seconds": (16, 4)}  # width, and of a head; else 32, 8


# --- one build, in a process of its own ------------------------------------------------------------------------------


def pairs_of(kind: str, count: int) -> list[dict[str, list[int]]]:
    """Return random pairs: of a few tokens to time, of a quarter of real step-preference rows' lengths for memory."""
    from gpu import PROMPT, STEP, length

    rng = random.Random(0)

    def draw(deciles: tuple[int, ...], few: int) -> list[int]:
        tokens = few if kind != "bytes" else max(2, length(deciles, rng) // QUARTER)
        return [rng.randrange(10, 250) for _ in range(tokens)]

    return [
        {"prompt_ids": draw(PROMPT, 3), "chosen_ids": draw(STEP, 2), "rejected_ids": draw(STEP, 2)}
        for _ in range(count)
    ]


def base_of(root: Path, kind: str, bf16: bool, layers: int):
    """Return a Base with random weights, in the class of either build."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(root / "d2lora/lab/base")
    width, head = SHAPES.get(kind, (32, 8))
    shape = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=width * 7 // 2, num_hidden_layers=layers,
        num_attention_heads=width // head, num_key_value_heads=width // head // 4, max_position_embeddings=2048,
        attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if bf16 else torch.float32)
    net = LlamaForCausalLM(shape).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    try:
        from d2lora.base import Base, checksum
        from d2lora.layouts.families import Snapshot

        return Base("random", net, tokenizer, checksum(net), Snapshot.of(net))
    except ImportError:
        from d2lora import model

        return model.Base("random", net, tokenizer, model.checksum(net))


class Watch:
    """Counts operations and saved bytes of each step; `train` tells it when a step ends."""

    def __init__(self, weights: set[int]) -> None:
        self.weights, self.operations = weights, Counter[str]()
        self.steps: list[tuple[float, Counter[str]]] = []
        self.saved: dict[int, int] = {}
        self.bytes, self.unpacking = 0, False

    def pack(self, tensor):
        """Note a tensor that autograd saves, by its storage; a micro-batch begins with the first one after a backward pass."""
        if self.unpacking:
            self.saved, self.unpacking = {}, False
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights and storage.data_ptr() not in self.saved:
            self.saved[storage.data_ptr()] = storage.nbytes()
            self.bytes += storage.nbytes()
        return tensor

    def unpack(self, tensor):
        self.unpacking = True
        return tensor

    def step(self, done: int, total: int) -> None:
        self.steps.append((time.process_time(), self.operations.copy()))

    def counting(self, kind: str) -> AbstractContextManager[Any]:
        """Return a context that counts operations, as Python sees them dispatched, or saved bytes."""
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode

        operations = self.operations

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                operations[func.overloadpacket.__name__] += 1
                return func(*args, **(kwargs or {}))

        if kind == "operations":
            return Mode()
        return torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack) if kind == "bytes" else nullcontext()


def as_on_a_gpu() -> None:
    """Have AdamW and clipping run over all weights at once, as they do by default on a GPU and not on a CPU."""
    from torch.utils import _foreach_utils

    supported = _foreach_utils._get_foreach_kernels_supported_devices
    devices = [*supported(), "cpu"]
    for module in (_foreach_utils, *filter(None, map(sys.modules.get, ("torch.optim.optimizer",)))):
        if hasattr(module, "_get_foreach_kernels_supported_devices"):
            module._get_foreach_kernels_supported_devices = lambda: devices  # type: ignore[attr-defined]


def new_build(method: str, overrides: list[str]) -> tuple[Any, Any, Callable, Callable]:
    """Return spec, recipe, the adapter's context and train() of a build with stages."""
    from hydra import compose

    from d2lora.adapters import attach
    from d2lora.adapters.start import Start
    from d2lora.command import grid
    from d2lora.train import training

    cell = grid.cell_of(compose("config", overrides=[f"method={method}", *overrides]))
    spec = cell.chain.adapt.spec
    start = Start(spec.lora, spec.init, spec.seed)
    return spec, cell.config.recipe, lambda base: attach.adapter(base, start, None), training.train


def old_build(method: str, overrides: list[str]) -> tuple[Any, Any, Callable, Callable]:
    """Return the same of the build before that, where a spec is a mapping."""
    from hydra import compose

    from d2lora import cli, model, train

    cell = cli.cell(compose("config", overrides=[f"method={method}", *overrides]))
    spec = cell.chain.adapt.spec
    return spec, cell.config.recipe, lambda base: model.adapter(base, spec, None), train.train


def measured(root: Path, kind: str, method: str, bf16: bool, layers: int, steps: int) -> dict:
    """Train and return measurements per pair of the steps after the first, and the saved bytes per token of all."""
    import torch
    from hydra import initialize_config_dir

    torch.set_num_threads(1)
    as_on_a_gpu()
    # Attention by text is one call on a GPU, and on a CPU a call a text.
    overrides = ["recipe=paper", "method.epochs=1", "recipe.attention=sdpa"]
    overrides += [f"recipe.lora.{k}={16 // QUARTER}" for k in ("r", "alpha")]
    with initialize_config_dir(str(root / "conf"), version_base="1.3"):
        build = new_build if (root / "d2lora/stages").is_dir() else old_build
        spec, recipe, adapter, train = build(method, overrides)
    from d2lora.data import Subset

    base, batch = base_of(root, kind, bf16, layers), spec.batch if is_dataclass(spec) else spec["batch"]
    pairs = pairs_of(kind, steps * batch)
    drawn = Subset(pairs, list(range(len(pairs))), [])
    watch = Watch({p.untyped_storage().data_ptr() for p in base.model.parameters()})
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        wrapped = stack.enter_context(adapter(base))
        watch.weights |= {p.untyped_storage().data_ptr() for p in wrapped.parameters()}
        stack.enter_context(watch.counting(kind))
        metrics = train(base, wrapped, drawn, spec, recipe, folder / "run", watch.step, folder / "reference")
    (first, counted), (last, all_counted) = watch.steps[0], watch.steps[steps - 1]
    done = (steps - 1) * batch
    return {
        "seconds": (last - first) / done,
        "operations": (all_counted - counted).total() / done,
        "bytes": watch.bytes / metrics["tokens_seen"],
        "micro_batch": metrics["micro_batch"],
        "kinds": {name: count / (steps - 1) for name, count in (all_counted - counted).most_common()},
    }


def side(root: Path, kind: str, method: str, bf16: bool, layers: int, steps: int) -> dict:
    """Run `measured` of a build in a process of its own."""
    command = [sys.executable, __file__, "--side", json.dumps([str(root), kind, method, bf16, layers, steps])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({"ACCELERATE_MIXED_PRECISION": "bf16"} if bf16 else {})
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def _per_layer(root: Path, method: str, steps: int) -> float:
    """Return bytes saved per token, layer and unit of width: what two more layers add."""
    one, three = (side(root, "bytes", method, True, layers, steps)["bytes"] for layers in (1, 3))
    return (three - one) / 2 / (4096 // QUARTER)


@contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """Check out a commit into a temporary git worktree inside the `with` block."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "before"
        subprocess.run(
            ["git", "worktree", "add", "--detach", str(root), commit], cwd=HERE, check=True, capture_output=True
        )
        try:
            yield root
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(root)], cwd=HERE, check=True)


def compare(before: Path, method: str, steps: int, rounds: int) -> None:
    """Measure both builds in turns and print their figures."""
    builds, values = (before, HERE), dict[str, list[float]]()
    for kind, name in (("seconds", "host ms per pair"), ("narrow seconds", "the same, half the width")):
        timed = [[side(root, kind, method, False, 32, steps)["seconds"] for root in builds] for _ in range(rounds)]
        values[name] = [1000 * min(seconds) for seconds in zip(*timed, strict=True)]
    for name, bf16 in (("operations per pair, float32", False), ("operations per pair, bfloat16", True)):
        values[name] = [side(root, "operations", method, bf16, 32, steps)["operations"] for root in builds]
    values["bytes per token, layer, width"] = [_per_layer(root, method, steps) for root in builds]
    for name, (was, now) in values.items():
        print(
            f"{method + ', ' + name:<44}{was:>10.1f}{now:>10.1f}{f'1/{was / now:.2f}':>10}{now / was:>8.3f}", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default="28f7cc9", help="commit of the earlier build")
    parser.add_argument("--methods", default="sft,dpo,orpo")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        root, *how = json.loads(args.side)
        sys.path[:0] = [root]
        print(json.dumps(measured(Path(root), *how)))
        return
    print(f"{'':<44}{args.before[:9]:>10}{'this':>10}{'':>10}{'ratio':>8}")
    with checked_out(args.before) as before:
        for method in args.methods.split(","):
            compare(before, method, args.steps, args.rounds)


if __name__ == "__main__":
    main()
