"""Measure training speed on a GPU: pairs/s, tokens/s, MFU and peak memory of SFT, DPO and ORPO.

    python benchmarks/gpu.py --ladder [--results FILE] [--minutes 8]
    python benchmarks/gpu.py [--layers 32] [--steps 6] [--batch 16] [--micro auto] [--methods ...] [--layouts ...]

With --ladder: each cure's before and after, from the recipe as it was (micro-batches of 4, sdpa) on; what matters most
comes first, no rung begins after --minutes, and results are also written to a file as they come (JSON lines). A
rung that this machine can't do says why, and the next one is measured.

The project's own train() runs on Llama-3.1-8B's architecture with random weights in bfloat16, LoRA r = 16 on all linear
layers, and pairs with the lengths of real step-preference rows. Without --ladder: padded batches (TRL's) and shared prefixes with `sdpa`
and with `flex_attention`, with and without gradient checkpointing; with Liger's layer kernels if `liger-kernel` is
installed. MFU counts 4 N FLOP a token (LoRA: forward 2 N, backward through the frozen weights 2 N) of the tokens that
are not padding, relative to 989 TFLOP/s (H100, dense bfloat16). Without a GPU a small model runs, to show that the
script works; its MFU has no meaning.
"""

import argparse
import itertools
import json
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PEAK = 989e12
# Deciles 0, 10, ..., 100 of tokens in 2,000 real step-preference rows: prompt with shared steps, and one step.
PROMPT = (63, 134, 175, 206, 234, 265, 296, 346, 407, 513, 1000)
STEP = (2, 14, 18, 21, 24, 28, 31, 36, 42, 56, 420)
BEFORE = {"micro_batch": 4, "attention": "sdpa"}
# Settings of each rung; those not named are the recipe's defaults. Each is measured for all methods before the next one.
LADDER: tuple[tuple[str, dict], ...] = (
    ("as it was: micro-batches of 4, sdpa", BEFORE),
    ("the defaults: micro_batch=auto, attention=auto", {}),
    ("the whole batch at once, sdpa", {"attention": "sdpa"}),
    ("attention by text", {"attention": "by_text"}),
    ("FlexAttention", {"attention": "flex_attention"}),
    ("layers compiled", {"compile": "layers"}),
    ("kernels of the Hub", {"kernels": True}),
    ("gradient checkpointing", {"gradient_checkpointing": True}),
    ("layers compiled, kernels of the Hub", {"compile": "layers", "kernels": True}),
    ("padded", {"packing": "padded"}),
)
LAYOUTS = {
    "padded": ("padded", "sdpa"),
    "prefix_shared": ("prefix_shared", "sdpa"),
    "flex_attention": ("prefix_shared", "flex_attention"),
}


def length(deciles: tuple[int, ...], rng: random.Random) -> int:
    at = rng.uniform(0, 10)
    low = min(int(at), 9)
    return round(deciles[low] + (at - low) * (deciles[low + 1] - deciles[low]))


def make_pairs(count: int, vocabulary: int) -> list[dict]:
    rng = random.Random(0)
    draw = lambda deciles: [rng.randrange(10, vocabulary) for _ in range(length(deciles, rng))]  # noqa: E731
    return [{"prompt_ids": draw(PROMPT), "chosen_ids": draw(STEP), "rejected_ids": draw(STEP)} for _ in range(count)]


def dtype() -> str:
    """Return bfloat16; on a CPU, where that is very slow, float32."""
    import torch

    return "bfloat16" if torch.cuda.is_available() else "float32"


def load(layers: int, hidden: int, liger: bool):
    """Return a Base with random weights. Its tokenizer is the lab's, of which only the padding token is used."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from d2lora.base import Base, checksum, device
    from d2lora.layouts.families import Snapshot

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(fused_linear_cross_entropy=False)
    shape = LlamaConfig(
        vocab_size=128_256 if torch.cuda.is_available() else 2_000, hidden_size=hidden, intermediate_size=hidden * 7 // 2, num_hidden_layers=layers,
        num_attention_heads=hidden // 128, num_key_value_heads=max(1, hidden // 512), max_position_embeddings=8192,
        rope_theta=500_000.0, attn_implementation="sdpa",
    )  # fmt: skip
    torch.set_default_dtype(getattr(torch, dtype()))
    with torch.device(device()):
        net = LlamaForCausalLM(shape)
    torch.set_default_dtype(torch.float32)
    net.eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "d2lora/lab/base")
    return Base("llama-3.1-8b, random", net, tokenizer, checksum(net), Snapshot.of(net))


def measure(base, method: str, how: dict, pairs: list[dict], args) -> dict:
    """Return pairs/s, tokens/s and peak memory of the steps after the first two, in which kernels are compiled."""
    import torch
    from hydra import compose, initialize_config_dir

    from d2lora.adapters import attach
    from d2lora.adapters.start import Start
    from d2lora.command import grid
    from d2lora.data import Subset
    from d2lora.train import training

    own = {"batch": args.batch, "micro_batch": args.micro, "max_length": 2048, "threads": "null"}
    settings = own | {"lora.r": 16, "lora.alpha": 16} | how
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        overrides = [
            f"method={method}",
            "method.epochs=1",
            "recipe=paper",
            *(f"recipe.{k}={v}" for k, v in settings.items()),
        ]
        cell = grid.cell_of(compose("config", overrides))
    recipe, spec = cell.config.recipe, replace(cell.chain.adapt.spec, lr=1e-6, model={"dtype": dtype()})
    clocks: list[float] = []
    memory: list[float] = []

    def watch(done: int, total: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            memory.append(torch.cuda.max_memory_allocated() / 2**30)
            if done == 1:  # of training alone: not of DPO's reference, nor of the checks around a stage
                torch.cuda.reset_peak_memory_stats()
        clocks.append(time.monotonic())

    with (
        tempfile.TemporaryDirectory() as folder,
        attach.adapter(base, Start(spec.lora, spec.init, spec.seed), None) as wrapped,
    ):
        drawn = Subset(pairs, list(range(len(pairs))), [])
        metrics = training.train(base, wrapped, drawn, spec, recipe, Path(folder), watch, Path(folder) / "reference")
    seconds = (clocks[-1] - clocks[1]) / (len(clocks) - 2)
    tokens = metrics["tokens_seen"] / len(clocks) / seconds
    peak = memory[-1] if memory else float("nan")
    laid = {"attention": metrics["attention"], "pass_tokens": metrics.get("pass_tokens"), "loss": metrics["last_loss"]}
    return {"pairs": args.batch / seconds, "tokens": tokens, "memory": peak, **laid}


def ladder(base, size: float, pairs: list[dict], args) -> None:
    """Measure the rungs in their order, as long as there is time, and write each result at once."""
    import torch

    end, before = time.monotonic() + 60 * args.minutes, {}
    with open(args.results, "a") as file:
        for (name, how), method in itertools.product(LADDER, args.methods.split(",")):
            if time.monotonic() > end:
                print(f"{args.minutes:g} minutes are over: {name} and what follows is not measured", flush=True)
                return
            try:
                r = measure(base, method, how, pairs, args)
            except (
                torch.OutOfMemoryError,
                Exception,
            ) as error:  # whatever a machine lacks: the next rung may do without
                line = next(iter(str(error).strip().splitlines()), type(error).__name__)
                print(f"{method + ', ' + name:<56} not measured: {line[:120]}", flush=True)
                base.restore()
                continue
            before.setdefault(method, r["pairs"])
            r["mfu"] = 4 * size * r["tokens"] / PEAK
            print(
                f"{method + ', ' + name:<56}{r['pairs']:>9.2f}{r['tokens']:>10.0f}{100 * r['mfu']:>7.1f}{r['memory']:>10.1f}"
                f"{r['pairs'] / before[method]:>7.2f}x  {r['attention']}",
                flush=True,
            )
            file.write(json.dumps({"method": method, "rung": name, "settings": how, **r}) + "\n")
            file.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="32 on a GPU, 2 without")
    parser.add_argument("--hidden", type=int, help="4096 on a GPU, 128 without")
    parser.add_argument("--ladder", action="store_true", help="each cure's before and after")
    parser.add_argument("--minutes", type=float, default=7.0, help="after which no rung of the ladder begins")
    parser.add_argument("--results", default="ladder.jsonl", help="the file that the ladder's results are added to")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--micro", default="auto")
    parser.add_argument("--methods", default="sft,dpo,orpo")
    parser.add_argument("--layouts", default="padded,prefix_shared,flex_attention", help="the last on a GPU only")
    parser.add_argument("--checkpointing", default="off,on", help="of gradients")
    parser.add_argument("--liger", action="store_true", help="with Liger's layer kernels")
    args = parser.parse_args()
    import torch

    gpu = torch.cuda.is_available()
    base = load(args.layers or (32 if gpu else 2), args.hidden or (4096 if gpu else 128), args.liger)
    size = sum(p.numel() for p in base.model.parameters())
    pairs = make_pairs(args.steps * args.batch, base.model.config.vocab_size)
    device = torch.cuda.get_device_name() if gpu else "no GPU: a reduced model on the CPU, its MFU means nothing"
    print(
        f"{device}; {size / 1e9:.2f} B parameters, {dtype()}, micro-batch {args.micro} of {args.batch}, MFU = 4 N x tokens/s / 989 TFLOP/s"
    )
    if args.ladder:
        print(f"{'':<56}{'pairs/s':>9}{'tokens/s':>10}{'MFU %':>7}{'peak GiB':>10}{'faster':>8}  attention")
        ladder(base, size, pairs, args)
        return
    print(f"{'':<44}{'pairs/s':>9}{'tokens/s':>10}{'MFU %':>7}{'peak GiB':>10}")
    layouts = [layout for layout in args.layouts.split(",") if gpu or layout != "flex_attention"]
    for method, layout, checkpointing in itertools.product(
        args.methods.split(","), layouts, args.checkpointing.split(",")
    ):
        packing, attention = LAYOUTS[layout]
        how = {"packing": packing, "attention": attention, "gradient_checkpointing": checkpointing == "on"}
        name = f"{method}, {packing}, {attention}" + (", checkpointing" if checkpointing == "on" else "")
        try:
            r = measure(base, method, how, pairs, args)
        except torch.OutOfMemoryError:
            print(f"{name:<44}{'out of memory':>19}", flush=True)
            continue
        mfu = 100 * 4 * size * r["tokens"] / PEAK
        print(f"{name:<44}{r['pairs']:>9.2f}{r['tokens']:>10.0f}{mfu:>7.1f}{r['memory']:>10.1f}", flush=True)


if __name__ == "__main__":
    main()
