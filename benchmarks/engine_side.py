"""Time evaluations by vLLM and in memory on a base with random weights, with the base and k adapters.

    python benchmarks/engine_side.py [--commit 28f7cc9] [--layers 32] [--hidden 4096] [--items 64] [--adapters 8] [--tokens 256]

The shape is Llama-3.1-8B's on a GPU (bfloat16), and a small model's on a CPU (float32). Generated answers of random weights do not
end, so each has all its tokens; prompts are as long as GSM8K's in the median, choices as ARC-Easy's. Both sides take the project's own
path: rows, harness, session with its checks. In memory, as many adapters are evaluated as --memory says, and the others are taken to
last as long; with --commit, that commit evaluates them in memory too, in a process of its own. Seconds for all of GSM8K's 1,319
questions and ARC-Easy's 2,376 are those of the items, times their ratio; vLLM's start is counted once to each.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["TQDM_DISABLE"] = "1"  # the harness's bars
ALL = {"generate": ("GSM8K", 1319), "choose": ("ARC-Easy", 2376)}  # the data sets whose whole test is extrapolated to
PROMPT_WORDS, CHOICE_WORDS = 60, 5
WORDS = ("apples", "two", "has", "buys", "seven", "more", "each", "box", "costs", "days", "and", "then", "gives")


def questions(folder: Path, items: int, tokens: int) -> dict[str, dict]:
    """Write rows of random words, and return two benchmarks of them as in conf/benchmark."""
    rng = random.Random(0)
    text = lambda count: " ".join(rng.choices(WORDS, k=count))  # noqa: E731
    choices = lambda: {"choices": [text(CHOICE_WORDS) for _ in range(4)], "labels": [*"ABCD"], "label": "A"}  # noqa: E731
    rows = [{"question": text(PROMPT_WORDS), "answer": "4", **choices()} for _ in range(items)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {"data": {"path": str(folder / "rows.jsonl")}, "prompt": "{question}"}
    number = {"kind": "number", "gold": "{answer}", "max_new_tokens": tokens}
    choice = {"kind": "choice", "gold": "{label}", "choices": "choices", "labels": "labels", "chat": False}
    return {"generate": shared | number, "choose": shared | choice}


def write_models(folder: Path, layers: int, hidden: int, adapters: int) -> None:
    """Write a base with random weights and adapters of rank 16 on all its linear layers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    gpu = torch.cuda.is_available()
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "d2lora/lab/base")
    width = 128 if gpu else 32
    shape = LlamaConfig(
        vocab_size=128_256 if gpu else len(tokenizer), hidden_size=hidden, intermediate_size=hidden * 7 // 2,
        num_hidden_layers=layers, num_attention_heads=hidden // width, num_key_value_heads=max(1, hidden // width // 4),
        max_position_embeddings=8192, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if gpu else torch.float32)
    with torch.device("cuda" if gpu else "cpu"):
        net = LlamaForCausalLM(shape)
    net.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    lora = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    for index in range(adapters):
        torch.manual_seed(index)
        wrapped = get_peft_model(net, lora)
        wrapped.save_pretrained(folder / f"adapter{index}")
        net = wrapped.unload()
    torch.set_default_dtype(torch.float32)


def timed(work: Callable[[], object]) -> float:
    clock = time.monotonic()
    work()
    return time.monotonic() - clock


def earlier(
    commit: str, folder: Path, model: dict, benchmarks: dict, folders: list[Path], batch: int
) -> dict[str, float]:
    """Return the seconds that another commit takes in memory, each benchmark for one adapter (the mean over `folders`)."""
    from engine import Side, checkout

    seconds = {}
    (folder / "model.yaml").write_text(json.dumps(model))
    with checkout(commit) as tree:
        for name, benchmark in benchmarks.items():
            (folder / f"{name}.yaml").write_text(json.dumps({name: benchmark}))
            side = Side(
                tree, ["--model", str(folder / "model"), "--benchmark", str(folder / name), "--batch", str(batch)]
            )
            side.evaluate(None, False)  # imports, proofs
            seconds[name] = sum(side.evaluate(str(each), False)["seconds"] for each in folders) / len(folders)
            side.close()
    return seconds


def in_memory(base, folders: list[Path | None], benchmarks: dict, batch: int) -> dict[str, float]:
    """Return the seconds of each benchmark for one adapter (the mean over `folders`), evaluated one after another."""
    from d2lora.adapters import attach
    from d2lora.evaluate import harness
    from d2lora.layouts import proof

    total = dict.fromkeys(benchmarks, 0.0)
    proofs = proof.Memory(Path(tempfile.mkdtemp()), {})
    for folder in folders:
        with attach.trained(base, folder) as (tested, _):
            engine = harness.InMemory(base, tested, proofs)
            for name, wanted in benchmarks.items():
                total[name] += timed(lambda e=engine, q=wanted: e.evaluate(q, batch, lambda done, count: None))
    return {name: seconds / len(folders) for name, seconds in total.items()}


def in_vllm(base, model, adapters: list, benchmarks: dict, machine, outputs) -> dict[str, float]:
    """Return the seconds until the engine is open and checked, and of each benchmark for the base and all adapters."""
    from d2lora.evaluate.vllm import sessions
    from d2lora.evaluate.vllm.engine import InVllm

    clock = time.monotonic()
    session = sessions.opened(base, model, adapters, machine, outputs)
    seconds = {"open": time.monotonic() - clock}
    if session.gone or session.refused:
        raise SystemExit(f"vLLM can't be timed: {session.gone or session.refused}")
    keys = [None, *(adapter.key for adapter in adapters)]
    for name, wanted in benchmarks.items():
        engines = [InVllm(base, session, key, keys) for key in keys]
        seconds[name] = timed(lambda e=engines, q=wanted: [x.evaluate(q, 0, lambda done, count: None) for x in e])
    sessions.close()
    return seconds


def table(items: int, adapters: int, memory: dict[str, dict[str, float]], vllm: dict[str, float]) -> str:
    """Return a line for each benchmark and way to evaluate: seconds for the base and all adapters, and minutes for a whole test."""
    lines = [
        f"| base and {adapters} adapters | by | {items} items, s | how much vLLM is faster | whole test, min | faster with its start |"
    ]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: |")
    for name, (whole, count) in ALL.items():
        scale, own = count / items, vllm[name]
        total = own * scale + vllm["open"]
        lines.append(f"| {whole}, {name} | vLLM | {own:.1f} | | {total / 60:.1f} | |")
        for by, seconds in memory.items():
            each = (adapters + 1) * seconds[name]
            faster = f"{each / own:.1f} | {each * scale / 60:.1f} | {each * scale / total:.1f}"
            lines.append(f"| {whole}, {name} | {by} | {each:.1f} | {faster} |")
    return "\n".join([*lines, f"vLLM's start, with its checks: {vllm['open']:.1f} s"])


def main() -> None:
    import torch

    from d2lora import data
    from d2lora.base import load_base
    from d2lora.evaluate.engine import Questions
    from d2lora.evaluate.vllm.sessions import Adapter
    from d2lora.outputs import Outputs
    from d2lora.settings import Benchmark, Model
    from d2lora.settings.recipe import Machine

    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32 if gpu else 4)
    parser.add_argument("--hidden", type=int, default=4096 if gpu else 128)
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256 if gpu else 32)
    parser.add_argument("--memory", type=int, default=1, help="adapters that are evaluated in memory; 0: none")
    parser.add_argument("--commit", help="evaluates them in memory as well, for example 28f7cc9")
    parser.add_argument("--batch", type=int, default=64, help="in memory")
    parser.add_argument("--python", default=".engine/bin/python", help="the engine's")
    args = parser.parse_args()
    memory = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_models(folder, args.layers, args.hidden, args.adapters)
        settings = {"name": "random", "path": str(folder / "base"), "dtype": "bfloat16" if gpu else "float32"}
        asked, folders = (
            questions(folder, args.items, args.tokens),
            [folder / f"adapter{i}" for i in range(args.adapters)],
        )
        if args.commit and args.memory:
            memory[f"memory, {args.commit}"] = earlier(
                args.commit, folder, settings, asked, folders[: args.memory], args.batch
            )
        model = Model.model_validate(settings)
        machine = Machine(micro_batch=1, engine="vllm", engine_python=args.python, threads=None if gpu else 1)
        torch.set_num_threads(machine.threads or torch.get_num_threads())
        base, tests = load_base(model, folder), {name: Benchmark.model_validate(b) for name, b in asked.items()}
        benchmarks = {name: Questions(name, test, data.rows(test.data)) for name, test in tests.items()}
        if args.memory:
            memory["memory"] = in_memory(base, folders[: args.memory], benchmarks, args.batch)
        adapters = [Adapter(f"a{i}", each) for i, each in enumerate(folders)]
        vllm = in_vllm(base, model, adapters, benchmarks, machine, Outputs(folder))
    print(table(args.items, args.adapters, memory, vllm))


if __name__ == "__main__":
    main()
