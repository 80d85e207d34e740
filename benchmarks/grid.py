"""Compare the lab's grid with what one would write otherwise: one process for each cell, plain TRL, batched generation.

    python benchmarks/grid.py [--n 0,100] [--m 0,4000] [--workers 2]

Both sides train on the same rows with the same settings and are scored on the same items, with one thread for each
worker. The other side's processes load the base, warm up if m > 0, train with TRL's trainers as they come, and
evaluate; they share nothing. Answers are whole solutions (task.continuation=rest), because TRL adds EOS to every
answer. Neither side logs to W&B; ours writes its report. Prints the seconds of each part for both sides, their
accuracies, and last the line `speedup: N.Nx` of the wall times.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
METHODS = ("sft", "dpo", "orpo")
CONTINUATION = "task.continuation=rest"
PARTS = ("start-up", "contamination", "warm-up", "adaptation", "evaluation")


# --- the other side: one cell, one process -------------------------------------------------------------------------


def plain_cell(method: str, m: int, n: int) -> dict:
    """Run one cell as a script would. Return the seconds of each part, and the accuracies."""
    clock = time.monotonic()
    import torch
    from hydra import compose, initialize_config_dir
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from d2lora.command import grid

    torch.set_num_threads(1)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = grid.cell_of(
            compose("config", overrides=[f"method={method}", f"m={m}", f"n={n}", CONTINUATION])
        ).config
    tokenizer = AutoTokenizer.from_pretrained(ROOT / config.model.path)
    model = AutoModelForCausalLM.from_pretrained(ROOT / config.model.path)
    seconds = {"start-up": _lap(clock)}
    clock = time.monotonic()
    if m:
        model = _plain_train(
            "sft",
            model,
            tokenizer,
            _warmup_rows(config, tokenizer),
            config,
            config.recipe.rate("warmup"),
            config.warmup.epochs,
        )
    seconds["warm-up"] = _lap(clock)
    clock = time.monotonic()
    if n:
        rate = config.recipe.rate(method)
        model = _plain_train(
            method, model, tokenizer, _task_rows(config, tokenizer), config, rate, config.method.epochs
        )
    seconds["adaptation"] = _lap(clock)
    clock = time.monotonic()
    scores = {
        "lab_math": _plain_math(model.eval(), tokenizer, config),
        "lab_facts": _plain_facts(model.eval(), tokenizer, config),
    }
    seconds["evaluation"] = _lap(clock)
    return {"seconds": seconds, "scores": scores}


def _lap(since: float) -> float:
    return time.monotonic() - since


def _warmup_rows(config, tokenizer) -> list[dict]:
    from d2lora import data

    rows = data.rows(config.warmup.data)
    order = data.shuffled(len(rows), f"warmup/{config.data_seed}")[: config.m]
    return [data.conversation_example(tokenizer, rows[i]["chosen"]) for i in order]


def _task_rows(config, tokenizer) -> list[dict]:
    from d2lora import data

    rows, task, out = data.rows(config.task.data), config.task, []
    for i in data.shuffled(len(rows), f"task/{config.data_seed}")[: config.n]:
        prompt = data.rendered_prompt(tokenizer, task.prompt.format(**rows[i]), task.prefix.format(**rows[i]))
        prompt = prompt.removeprefix(tokenizer.bos_token)  # TRL adds one
        answers = {"chosen": rows[i]["full_chosen"], "rejected": rows[i]["full_rejected"]}
        out.append(
            {"prompt": prompt, "completion": answers["chosen"]}
            if config.method.name == "sft"
            else {"prompt": prompt, **answers}
        )
    return out


def _plain_train(method, model, tokenizer, rows, config, rate, epochs):
    """Train with TRL's trainer as it comes, and return the trained PeftModel."""
    from datasets import Dataset
    from peft import LoraConfig, PeftModel
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    recipe = config.recipe
    trainer, arguments = {
        "sft": (SFTTrainer, SFTConfig),
        "dpo": (DPOTrainer, DPOConfig),
        "orpo": (ORPOTrainer, ORPOConfig),
    }[method]
    own = {"dataset_kwargs": {"skip_prepare_dataset": True}} if "input_ids" in rows[0] else {}
    args = arguments(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=recipe.micro_batch, num_train_epochs=epochs, learning_rate=rate,
        lr_scheduler_type="cosine", weight_decay=0.0, optim="adamw_torch", seed=config.seed, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True, gradient_checkpointing=False, max_length=recipe.max_length, bf16=False, **own,
    )  # fmt: skip
    lora = LoraConfig(task_type="CAUSAL_LM", r=recipe.lora.r, lora_alpha=recipe.lora.alpha, target_modules="all-linear")
    fresh = {} if isinstance(model, PeftModel) else {"peft_config": lora}
    run = trainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **fresh)
    run.train()
    return run.model


def _plain_math(model, tokenizer, config, batch: int = 128) -> float:
    import torch

    from d2lora import data
    from d2lora.scoring import answers

    benchmark = config.task.benchmark["lab_math"]
    rows, right = data.rows(benchmark.data), 0
    tokenizer.padding_side = "left"
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        prompts = [data.rendered_prompt(tokenizer, benchmark.prompt.format(**r)) for r in some]
        inputs = tokenizer(
            prompts, return_tensors="pt", padding=True, add_special_tokens=False, return_token_type_ids=False
        )
        with torch.inference_mode():
            out = model.generate(
                **inputs, max_new_tokens=benchmark.max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(
            answers.final_number(t) == answers.final_number(r["answer"]) for t, r in zip(texts, some, strict=True)
        )
    return right / len(rows)


def _plain_facts(model, tokenizer, config, batch: int = 128) -> float:
    import torch

    from d2lora import data

    benchmark = config.task.benchmark["lab_facts"]
    rows, tokenizer.padding_side = data.rows(benchmark.data), "right"
    pairs = [(benchmark.prompt.format(**r), " " + choice) for r in rows for choice in r["choices"]["text"]]
    scores: list[float] = []
    for start in range(0, len(pairs), batch):
        some = pairs[start : start + batch]
        inputs = tokenizer([a + b for a, b in some], return_tensors="pt", padding=True, return_token_type_ids=False)
        with torch.inference_mode():
            logps = model(**inputs).logits[:, :-1].log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
        for line, mask, (prompt, _) in zip(logps, inputs["attention_mask"], some, strict=True):
            first, last = len(tokenizer(prompt)["input_ids"]) - 1, int(mask.sum()) - 1
            scores.append(float(line[first:last].sum()))
    right = 0
    for i, row in enumerate(rows):
        four = scores[4 * i : 4 * i + 4]
        right += row["choices"]["label"][four.index(max(four))] == row["answerKey"]
    return right / len(rows)


# --- the comparison ------------------------------------------------------------------------------------------------


def other_side(cells: list[tuple[str, int, int]], workers: int) -> tuple[float, list[dict]]:
    """Run all cells, and return the wall seconds and each process's output."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def one(cell: tuple[str, int, int]) -> dict:
        command = [sys.executable, __file__, "--cell", json.dumps(cell)]
        clock = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        outputs = json.loads(done.stdout.strip().splitlines()[-1])
        outputs["seconds"]["start-up"] += _lap(clock) - sum(outputs["seconds"].values())
        return outputs

    clock = time.monotonic()
    with ThreadPoolExecutor(workers) as pool:
        outputs = list(pool.map(one, cells))
    return _lap(clock), outputs


def our_side(n: str, m: str, workers: int, output: Path) -> tuple[float, dict, dict]:
    """Run the sweep; return wall seconds, seconds of each part, and accuracies {(method, m, n): {benchmark: value}}."""
    import csv

    command = [
        sys.executable,
        str(ROOT / "run.py"),
        "-cn",
        "lab",
        f"n={n}",
        f"m={m}",
        CONTINUATION,
        "wandb.mode=disabled",
        f"output={output}",
        f"hydra.launcher.n_jobs={workers}",
    ]
    clock = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wall = _lap(clock)
    if done.returncode:
        raise RuntimeError(done.stdout[-1000:] + done.stderr[-2000:])
    parts = dict.fromkeys(PARTS, 0.0)
    names = {"contamination": "contamination", "warmup": "warm-up", "adapt": "adaptation", "evaluate": "evaluation"}
    for file in (output / "store").glob("*/*/record.json"):
        record = json.loads(file.read_text())
        parts[names[record["stage"]]] += record["seconds"]
    parts["start-up"] = wall * workers - sum(parts.values())
    scores: dict = {}
    with (output / "report" / "results.csv").open() as lines:
        for row in csv.DictReader(lines):
            if row["metric"] in ("accuracy", "acc"):
                scores.setdefault((row["method"], int(row["m"]), int(row["n"])), {})[row["benchmark"]] = float(
                    row["value"]
                )
    return wall, parts, scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", default="0,100")
    parser.add_argument("--m", default="0,4000")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        print(json.dumps(plain_cell(*json.loads(args.cell))))
        return
    cells = [(method, int(m), int(n)) for method in METHODS for m in args.m.split(",") for n in args.n.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        wall, parts, scores = our_side(args.n, args.m, args.workers, Path(folder))
    other_wall, told = other_side(cells, args.workers)
    other_parts = {p: sum(t["seconds"].get(p, 0.0) for t in told) for p in PARTS}

    print(f"{len(cells)} cells, {args.workers} workers of one thread each; seconds summed over workers")
    print(f"{'':<12}{'d2lora':>10}{'a process a cell':>18}")
    for part in PARTS:
        print(f"{part:<12}{parts[part]:>10.1f}{other_parts[part]:>18.1f}")
    print(f"{'wall':<12}{wall:>10.1f}{other_wall:>18.1f}")
    print(f"\n{'cell':<22}{'math':>8}{'theirs':>8}{'facts':>8}{'theirs':>8}")
    for cell, t in zip(cells, told, strict=True):
        ours = scores[cell]
        print(
            f"{cell!s:<22}{ours['lab_math']:>8.3f}{t['scores']['lab_math']:>8.3f}{ours['lab_facts']:>8.3f}{t['scores']['lab_facts']:>8.3f}"
        )
    work, other_work = (sum(v for p, v in side.items() if p != "start-up") for side in (parts, other_parts))
    print(f"\nwithout start-up (imports, loading): {other_work / work:.1f}x")
    print(f"speedup: {other_wall / wall:.1f}x")


if __name__ == "__main__":
    main()
