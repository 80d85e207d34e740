"""Measure what a step of preference training costs: TRL as it comes, TRL at its best, an earlier build, and this one.

    python benchmarks/preference_step.py [--rows FOLDER] [--pairs 16] [--epochs 4] [--methods dpo,orpo] [--sides ...]

Runs on the lab's pairs and base or, with --rows, on the step-preference rows in FOLDER (columns of
math-step-pref) and SmolLM2-135M (extra [laptop]). `--methods sft` works for the two builds alone. Each side runs in a process of its own on one thread, on the same
pairs with an effective batch of 16. TRL as it comes has its default micro-batch of 8 (4 with real rows, for memory),
padding, and DPO's reference in every step. TRL at its best computes the reference in advance and groups similar
lengths. The earlier build (--before, 28f7cc9) is checked out into a temporary git worktree, and runs with the micro-batch
that it had here, 4 or 8; this build with its own default, recipe.micro_batch=auto. Each side trains one epoch; a
reference in advance counts once for --epochs epochs. Seconds are the process's on the processor: others that run beside
it count less. Prints for each method tokens, seconds per pair, peak memory and first losses, and last, over all methods,
`speedup: N.Nx` (against TRL as it comes), `speedup_best: N.Nx`, and `against the build before: pairs/s N.NNx, memory N.NNx`.
"""

import argparse
import contextlib
import functools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
BATCH = 16
BEFORE, NOW = "before", "d2lora"
SIDES = ("TRL as it comes", "TRL at its best", BEFORE, NOW)


def prepare(rows: str | None, pairs: int, method: str, micro_batch: int | str):
    """Return the base, `pairs` tokenized pairs, a spec and a recipe."""
    import torch
    from hydra import compose, initialize_config_dir

    from d2lora import data
    from d2lora.base import load_base
    from d2lora.command import grid

    torch.set_num_threads(1)
    real = ["scale=laptop", "task.data.path=" + rows, f"data_root={rows}", "recipe.max_length=1024"] if rows else []
    keep = [f"recipe.batch={BATCH}", f"recipe.micro_batch={micro_batch}", "~task.benchmark"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cell = grid.cell_of(compose("config", overrides=[f"method={method}", f"n={pairs}", *real, *keep]))
    base = load_base(cell.config.model, ROOT / "outputs" / "models")
    make = functools.partial(data.pair_example, base.tokenizer, cell.config.task)
    spec = cell.chain.adapt.spec
    spec = replace(spec, lr=1e-5, method=spec.method.model_copy(update={"epochs": 1}))
    drawn = data.subset(data.rows(cell.config.task.data), make, pairs, spec.max_length, "task/0")
    return base, drawn, spec, cell.config.recipe


class Counter:
    """Counts the tokens (padding included) that go through a model, and notes the first loss."""

    def __init__(self, backbone) -> None:
        self.tokens = 0
        backbone.register_forward_pre_hook(self.see, with_kwargs=True)

    def see(self, module, args, kwargs) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        self.tokens += ids.numel()


def ours(base, drawn, spec, recipe, folder: Path) -> dict:
    from d2lora.adapters import attach
    from d2lora.adapters.start import Start
    from d2lora.layouts import choice
    from d2lora.train import training
    from d2lora.train.dpo import PackedDPOTrainer

    with attach.adapter(base, Start(spec.lora, spec.init, spec.seed), None) as wrapped:
        counter = Counter(base.model.base_model)
        reference, choose, spent = PackedDPOTrainer.before_training, choice.choose, []
        PackedDPOTrainer.before_training = lambda *a, **k: timed(reference, spent, *a, **k)
        # Once a model: beside the reference, which is once a policy.
        choice.choose = lambda *a, **k: timed(choose, spent, *a, **k)
        clock = time.monotonic()
        metrics = training.train(base, wrapped, drawn, spec, recipe, folder, lambda *_: None, folder / "reference")
        seconds = time.monotonic() - clock
    return {
        "seconds": seconds - sum(spent),
        "reference": sum(spent),
        "tokens": counter.tokens,
        "loss": metrics["first_loss"],
    }


def timed(function, spent: list[float], *args, **kwargs):
    clock = time.monotonic()
    result = function(*args, **kwargs)
    spent.append(time.monotonic() - clock)
    return result


def orpo_row(trainer, pair: dict, model=None) -> dict:
    """Return a pair's ids as TRL's ORPOTrainer.tokenize_row returns them."""
    row, prompt = {}, pair["prompt_ids"]
    for kind in ("chosen", "rejected"):
        answer = pair[f"{kind}_ids"]
        row[f"{kind}_input_ids"] = prompt + answer
        row[f"{kind}_attention_mask"] = [1] * len(row[f"{kind}_input_ids"])
        row[f"{kind}_labels"] = [-100] * len(prompt) + answer
    return row


def theirs(best: bool, base, drawn, spec, recipe, folder: Path) -> dict:
    """Train with TRL's own trainer; only its tokenization is skipped."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer
    from trl.experimental.utils import DPODataCollatorWithPadding

    from d2lora.adapters import attach
    from d2lora.adapters.start import Start
    from d2lora.train import training

    dpo = spec.method.name == "dpo"
    plain = type("Plain", (DPOTrainer,), {"_prepare_dataset": lambda self, dataset, *a, **k: dataset})
    if not dpo:
        plain = type("Plain", (ORPOTrainer,), {"tokenize_row": orpo_row})
    lengths = [
        {**e, "length": max(len(e["chosen_ids"]), len(e["rejected_ids"])) + len(e["prompt_ids"])}
        for e in drawn.examples
    ]
    settings = training.arguments(spec, recipe, folder, 1, spec.epochs) | {"beta": spec.method.beta}
    settings |= {"max_length": None if dpo else spec.max_length}
    settings |= {
        "per_device_train_batch_size": recipe.micro_batch,
        "gradient_accumulation_steps": BATCH // recipe.micro_batch,
    }
    if best:
        settings |= {"train_sampling_strategy": "group_by_length", "length_column_name": "length"}
        settings |= {"precompute_ref_log_probs": True} if dpo else {}
    with attach.adapter(base, Start(spec.lora, spec.init, spec.seed), None) as wrapped:
        counter, spent = Counter(base.model.base_model), []
        if best and dpo:
            inner = plain._precompute_ref_logps
            plain._precompute_ref_logps = lambda *a, **k: timed(inner, spent, *a, **k)
        collator = None if dpo else DPODataCollatorWithPadding(base.tokenizer.pad_token_id)
        clock = time.monotonic()
        trainer = plain(
            model=wrapped, args=(DPOConfig if dpo else ORPOConfig)(**settings), train_dataset=Dataset.from_list(lengths),
            processing_class=base.tokenizer, data_collator=collator,
        )  # fmt: skip
        trainer.train()
        seconds = time.monotonic() - clock
    first = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return {"seconds": seconds - sum(spent), "reference": sum(spent), "tokens": counter.tokens, "loss": first}


def side(name: str, rows: str | None, pairs: int, method: str) -> dict:
    """Return one side's measurements."""
    work = {SIDES[0]: functools.partial(theirs, False), SIDES[1]: functools.partial(theirs, True), NOW: ours}[name]
    prepared = prepare(rows, pairs, method, "auto" if name == NOW else 4 if rows else 8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        measured = work(*prepared, Path(folder))
    return measured | {"memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, "idle": before / 2**10}


# In a process: the earlier build's script too reads seconds from time.monotonic.
RUN = "import runpy, sys, time; time.monotonic = time.process_time; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """Yield a folder with an earlier build, with this one's converted models."""
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder) / "build"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--quiet", "--detach", where, commit], check=True)
        try:
            (ROOT / "outputs" / "models").mkdir(parents=True, exist_ok=True)
            (where / "outputs").mkdir(exist_ok=True)
            (where / "outputs" / "models").symlink_to(ROOT / "outputs" / "models")
            yield where
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", where], check=True)


def measured(root: Path, name: str, rows: str | None, pairs: int, method: str) -> dict:
    """Return the measurements of a side, in a process of its own, with the script of the build in `root`."""
    command = [sys.executable, "-c", RUN, str(root / "benchmarks" / "preference_step.py"), "--pairs", str(pairs)]
    command += ["--side", NOW if name == BEFORE else name, method]
    command += ["--rows", str(Path(rows).resolve())] if rows else []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=root)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(
    rows: str | None, pairs: int, methods: list[str], epochs: int, sides: list[str], before: Path | None
) -> None:
    """Run all sides and print their table and the ratios."""
    where = "real rows, SmolLM2-135M" if rows else "the lab"
    print(f"{where}: {pairs} pairs, effective batch {BATCH}, one thread; a reference is shared by {epochs} epochs")
    print(f"{'':<24}{'tokens':>10}{'step s/pair':>13}{'ref s/pair':>12}{'pairs/s':>9}{'peak MB':>9}{'first loss':>12}")
    total, peak = dict.fromkeys(sides, 0.0), dict.fromkeys(sides, 0.0)
    for method in methods:
        for name in sides:
            r = measured(before if name == BEFORE and before else ROOT, name, rows, pairs, method)
            each = r["seconds"] / pairs + r["reference"] / pairs / epochs
            total[name] += each
            peak[name] = max(peak[name], r["memory"])
            print(
                f"{method + ', ' + name:<24}{r['tokens']:>10,}{r['seconds'] / pairs:>13.3f}{r['reference'] / pairs:>12.3f}"
                f"{1 / each:>9.2f}{r['memory']:>9.0f}{float(r['loss']):>12.4f}",
                flush=True,
            )
    for name, label in zip(SIDES[:2], ("speedup", "speedup_best"), strict=True):
        if name in total:
            print(f"{label}: {total[name] / total[NOW]:.1f}x")
    if BEFORE in total:
        print(
            f"against the build before: pairs/s {total[BEFORE] / total[NOW]:.2f}x, memory {peak[NOW] / peak[BEFORE]:.2f}x"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help="folder with real step-preference rows")
    parser.add_argument("--pairs", type=int, help="400 in the lab, 16 of the real rows")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--methods", default="dpo,orpo")
    parser.add_argument("--sides", default=",".join(SIDES), help="which of them, d2lora among them")
    parser.add_argument("--before", default="28f7cc9", help="the commit of the earlier build")
    parser.add_argument("--side", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(side(args.side[0], args.rows, args.pairs, args.side[1])))
        return
    sides = args.sides.split(",")
    with checked_out(args.before) if BEFORE in sides else contextlib.nullcontext() as before:
        for rows in [args.rows] if args.rows else [None]:
            pairs = args.pairs or (BATCH if rows else 25 * BATCH)
            compare(rows, pairs, args.methods.split(","), args.epochs, sides, before)


if __name__ == "__main__":
    main()
