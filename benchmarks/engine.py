"""Compare evaluations of this code with those of another commit: seconds, operations, and the answers of every item.

    python benchmarks/engine.py --store outputs/store [--commit 28f7cc9] [--adapters 8] [--repeats 3]
    python benchmarks/engine.py --store outputs/store --model smollm2 --rows gsm8k/test.jsonl --limit 32 --adapters 0

Both sides read the same adapters (the first of the store's, or with 0 the base alone), attach one after another, generate
the benchmark's answers in memory with one thread, and score them. Each side is a process of its own; an adapter is evaluated on one
side and then on the other, as often as --repeats says, and its shortest time counts. Operations are ATen calls of one evaluation: a
number without noise, which does not depend on the machine's load. Processor seconds are those that the process ran: on a busy machine it
waits for its turn. The last line is `speedup: N.NNx`.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CLOCKS = ("seconds", "processor")
GSM8K = {"lab": "lab_math", "smollm2": "gsm8k"}


# --- a side: a process of one build ----------------------------------------------------------------------------------


class Side:
    """A build in a process of its own, which answers requests: {adapter, count} -> {seconds, operations, answers}."""

    def __init__(self, root: Path, arguments: Sequence[str]) -> None:
        command = [sys.executable, __file__, "--side", *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            command, cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.code = self._read()["code"]
        if Path(self.code).parent != root / "d2lora":
            raise RuntimeError(f"{self.code} was imported, not {root}/d2lora")

    def evaluate(self, adapter: str | None, count: bool) -> dict[str, Any]:
        """Evaluate an adapter, or the base; with `count`, count operations, which takes longer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"adapter": adapter, "count": count}) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"the side ended with {self.process.wait()}")

    def close(self) -> None:
        """End the process, by closing what it reads."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def side(arguments: argparse.Namespace) -> None:
    """Load the base with the build that PYTHONPATH names, and answer requests until there are no more."""
    import torch

    import d2lora

    torch.set_num_threads(1)
    print(json.dumps({"code": d2lora.__file__}), flush=True)
    run = _evaluation(arguments)
    for line in sys.stdin:
        request = json.loads(line)
        with _Operations() if request["count"] else contextlib.nullcontext() as operations:
            clocks = time.monotonic(), time.process_time()
            answers, right = run(request["adapter"])
            seconds, processor = time.monotonic() - clocks[0], time.process_time() - clocks[1]
        count = operations.count if operations else None
        result = {"seconds": seconds, "processor": processor, "answers": answers, "accuracy": right}
        print(json.dumps(result | {"operations": count}), flush=True)


def _evaluation(arguments: argparse.Namespace):
    """Return a function that evaluates an adapter, as a stage of the build would: (answers, accuracy)."""
    import yaml

    cache = Path(tempfile.gettempdir()) / "d2lora-benchmark"
    model = yaml.safe_load((Path("conf/model") / f"{arguments.model}.yaml").read_text())
    name = arguments.benchmark or GSM8K.get(arguments.model, "lab_math")
    file = Path("conf/benchmark") / f"{name}.yaml"  # an absolute name is a file elsewhere
    benchmark = yaml.safe_load(file.read_text())[file.stem] | {"limit": arguments.limit}
    if arguments.tokens:
        benchmark["max_new_tokens"] = arguments.tokens
    if arguments.rows:
        benchmark["data"] = {"path": str(arguments.rows)}
    if Path("d2lora/evaluate").is_dir():
        return _current(name, model, benchmark, cache, arguments.batch)
    return _before_stages(name, model, benchmark, cache, arguments.batch)


def _current(name: str, model: dict, benchmark: dict, cache: Path, batch: int):
    from d2lora import data
    from d2lora.adapters import attach
    from d2lora.base import load_base
    from d2lora.evaluate import harness
    from d2lora.layouts import proof
    from d2lora.settings import Benchmark, Model

    test = Benchmark.model_validate(benchmark)
    questions = harness.Questions(name, test, data.rows(test.data))
    base = load_base(Model.model_validate(model), cache)
    proofs = proof.Memory(Path(tempfile.mkdtemp()), {})

    def run(adapter: str | None) -> tuple[list[str], float]:
        with attach.trained(base, Path(adapter) if adapter else None) as (tested, _):
            engine = harness.InMemory(base, tested, proofs)
            metrics, items, _ = engine.evaluate(questions, batch, lambda done, total: None)
        return [item["answer"] for item in items], next(iter(metrics.values()))["value"]

    return run


def _before_stages(name: str, model: dict, benchmark: dict, cache: Path, batch: int):
    """Evaluate with the modules of commits up to 28f7cc9."""
    from d2lora.config import Benchmark, Model

    from d2lora import data, evaluate
    from d2lora import model as models

    test = Benchmark.model_validate(benchmark)
    rows = data.rows(test.data)
    base = models.base(Model.model_validate(model), cache)
    template = base.tokenizer.chat_template is not None

    def run(adapter: str | None) -> tuple[list[str], float]:
        task = evaluate.task_of(name, test, rows, template)
        with models.trained(base, Path(adapter) if adapter else None) as (tested, _):
            chat = test.chat and template
            metrics, items = evaluate.evaluate(base, tested, task, chat, batch, lambda done, total: None)
        return [item["answer"] for item in items], next(iter(metrics.values()))["value"]

    return run


def _Operations() -> Any:
    """Return a context that counts ATen calls."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Operations(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += 1
            return function(*args, **(kwargs or {}))

    return Operations()


# --- the comparison --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """Yield a temporary git worktree of a commit."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT)]
        subprocess.run([*git, "worktree", "add", "--detach", str(tree), commit], check=True, capture_output=True)
        try:
            yield tree.resolve()
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=True, capture_output=True)


def adapters(arguments: argparse.Namespace) -> list[str | None]:
    """Return the folders of the adapters to evaluate; the base alone if none are asked for."""
    if not arguments.adapters:
        return [None]
    folders = sorted(arguments.store.resolve().glob("adapt/*/adapter"))[: arguments.adapters]
    if len(folders) < arguments.adapters:
        raise SystemExit(f"--store={arguments.store}: {len(folders)} adapters, {arguments.adapters} are asked for")
    return [str(folder) for folder in folders]


def compare(sides: dict[str, Side], tested: list[str | None], repeats: int) -> dict[str, list[dict[str, Any]]]:
    """Evaluate each on all sides in turn. Return for each side the results, with the shortest time of each."""
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for adapter in tested:
        tries = [{name: one.evaluate(adapter, False) for name, one in sides.items()} for _ in range(repeats)]
        for name in sides:
            shortest = {clock: min(attempt[name][clock] for attempt in tries) for clock in CLOCKS}
            results[name].append(tries[0][name] | shortest)
        line = "  ".join(f"{name} {results[name][-1]['seconds']:.2f} s" for name in sides)
        print(f"{Path(adapter).parent.name if adapter else 'base'}: {line}", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=ROOT / "outputs/store", help="the store that has the adapters")
    parser.add_argument("--commit", default="28f7cc9", help="the other side")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", default="lab", help="a file of conf/model")
    parser.add_argument("--benchmark", help="a file of conf/benchmark (lab: lab_math, smollm2: gsm8k)")
    parser.add_argument("--rows", type=Path, help="a file of rows to use in place of the benchmark's data set")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--tokens", type=int, help="in place of the benchmark's max_new_tokens")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--side", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rows:
        arguments.rows = arguments.rows.resolve()
    if arguments.side:
        side(arguments)
        return
    tested = adapters(arguments)
    with checkout(arguments.commit) as tree:
        sides = {arguments.commit: Side(tree, sys.argv[1:]), "this code": Side(ROOT, sys.argv[1:])}
        for one in sides.values():
            one.evaluate(tested[0], False)  # imports, proofs
        results = compare(sides, tested, arguments.repeats)
        operations = {name: one.evaluate(tested[-1], True)["operations"] for name, one in sides.items()}
        for one in sides.values():
            one.close()
    then, now = results.values()
    pairs = [pair for a, b in zip(then, now, strict=True) for pair in zip(a["answers"], b["answers"], strict=True)]
    sums = {name: {c: sum(outcome[c] for outcome in outcomes) for c in CLOCKS} for name, outcomes in results.items()}
    print(f"\n{'':<12}{'seconds':>10}{'processor':>12}{'operations':>12}{'accuracy':>10}")
    for name, outcomes in results.items():
        accuracy = sum(outcome["accuracy"] for outcome in outcomes) / len(outcomes)
        times = f"{sums[name]['seconds']:>10.1f}{sums[name]['processor']:>12.1f}"
        print(f"{name:<12}{times}{operations[name]:>12,}{100 * accuracy:>10.2f}")
    print(f"{sum(a == b for a, b in pairs):,} of {len(pairs):,} answers are equal")
    faster = {clock: sums[arguments.commit][clock] / sums["this code"][clock] for clock in CLOCKS}
    print(f"speedup: {faster['seconds']:.2f}x ({faster['processor']:.2f}x in processor seconds)")


if __name__ == "__main__":
    main()
