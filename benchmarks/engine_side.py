"""Time evaluations by vLLM and in memory on a base with random weights, with the base and k adapters.

    python benchmarks/engine_side.py [--layers 32] [--hidden 4096] [--items 64] [--adapters 8] [--tokens 256] [--memory 1]

The shape is Llama-3.1-8B's on a GPU (bfloat16), and a small model's on a CPU (float32). Generated answers of random weights do not
end, so each has all its tokens; prompts are as long as GSM8K's in the median, choices as ARC-Easy's. Both sides take the project's own
path: rows, harness, session with its checks. In memory, as many adapters are evaluated as --memory says, and the others are taken to
last as long. Seconds for all of GSM8K's 1,319 questions and ARC-Easy's 2,376 are those of the items, times their ratio.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
ALL = {"generate": 1319, "choose": 2376}  # GSM8K's test questions, ARC-Easy's
PROMPT_WORDS, CHOICE_WORDS = 60, 5


def questions(items: int, tokens: int) -> dict:
    """Return two benchmarks as d2lora.evaluate.engine.Questions, with rows of random words."""
    from d2lora.evaluate.engine import Questions
    from d2lora.settings import Benchmark, Data

    rng = random.Random(0)
    vocabulary = [
        "apples",
        "two",
        "has",
        "buys",
        "seven",
        "more",
        "each",
        "box",
        "costs",
        "days",
        "and",
        "then",
        "gives",
    ]
    text = lambda count: " ".join(rng.choices(vocabulary, k=count))  # noqa: E731
    rows = [
        {"question": text(PROMPT_WORDS), "answer": "4", "choices": [text(CHOICE_WORDS) for _ in range(4)], "label": "A"}
        for _ in range(items)
    ]
    labels = [{**row, "labels": ["A", "B", "C", "D"]} for row in rows]
    shared = {"data": Data(path="x"), "prompt": "{question}"}
    number = Benchmark(kind="number", gold="{answer}", max_new_tokens=tokens, **shared)
    choice = Benchmark(kind="choice", gold="{label}", choices="choices", labels="labels", chat=False, **shared)
    return {"generate": Questions("sums", number, rows), "choose": Questions("facts", choice, labels)}


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


def main() -> None:
    import torch

    from d2lora.base import load_base
    from d2lora.evaluate.vllm.sessions import Adapter
    from d2lora.outputs import Outputs
    from d2lora.settings import Model
    from d2lora.settings.recipe import Machine

    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32 if gpu else 4)
    parser.add_argument("--hidden", type=int, default=4096 if gpu else 128)
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256 if gpu else 32)
    parser.add_argument(
        "--memory", type=int, default=1, help="adapters that are evaluated in memory; 0: that side is left out"
    )
    parser.add_argument("--batch", type=int, default=64, help="in memory")
    parser.add_argument("--python", default=".engine/bin/python", help="the engine's")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_models(folder, args.layers, args.hidden, args.adapters)
        model = Model(name="random", path=str(folder / "base"), dtype="bfloat16" if gpu else "float32")
        machine = Machine(micro_batch=1, engine="vllm", engine_python=args.python, threads=None if gpu else 1)
        torch.set_num_threads(machine.threads or torch.get_num_threads())
        base, benchmarks = load_base(model, folder), questions(args.items, args.tokens)
        adapters = [Adapter(f"a{i}", folder / f"adapter{i}") for i in range(args.adapters)]
        memory = (
            in_memory(base, [a.folder for a in adapters[: args.memory]], benchmarks, args.batch) if args.memory else {}
        )
        vllm = in_vllm(base, model, adapters, benchmarks, machine, Outputs(folder))
    every = args.adapters + 1
    for name in benchmarks:
        scale, ours = ALL[name] / args.items, every * memory.get(name, float("nan"))
        print(
            f"{name}, {args.items} items, base and {args.adapters} adapters: in memory {ours:.1f} s, vLLM {vllm[name]:.1f} s "
            f"({ours / vllm[name]:.1f} times); all {ALL[name]}: {ours * scale / 60:.1f} and {vllm[name] * scale / 60:.1f} minutes"
        )
    print(json.dumps({"open": vllm["open"], "memory": memory, "vllm": vllm, "arguments": vars(args)}))


if __name__ == "__main__":
    main()
