"""Hold vLLM against evaluations in memory that are done: the items of every record of an output, asked again.

    python benchmarks/engine_equality.py outputs [--python .engine/bin/python] [--adapters 8] [--benchmarks lab_math,lab_facts]

For the base and each adapter of the output's records it prints how many answers are the record's, the largest difference of a
log-likelihood of a choice, and of a token's log-probability in 16 generated answers. Exit code 1 if an answer differs, or a number by more
than 1e-3 (float32).
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEXTS = 16  # whose log-probabilities are compared token by token
sys.path.insert(0, str(ROOT))


def evaluations(output: Path) -> dict:
    """Return by (adapter's folder or None, benchmark) the name and items of evaluations in memory."""
    from d2lora.records import read as read_record
    from d2lora.records import read_items

    done: dict = {}
    for folder in sorted((output / "store/evaluate").glob("[!.]*")):
        record = read_record(folder)
        if record is None or record.spec.get("lm_eval") or record.spec.get("engine"):
            continue
        parents = list((output / "store").glob(f"*/{record.parent}/adapter")) if record.parent else [None]
        for parent in parents:
            name = f"{record.label} ({init_name(parent)})" if parent else record.label
            done[parent, record.benchmark] = (name, read_items(folder))
    return done


def init_name(adapter: Path) -> str:
    """Return the initialization that an adapter's record names."""
    from d2lora.records import read as read_record
    from d2lora.settings.inits import PLAIN

    record = read_record(adapter.parent)
    return str((record.spec.get("init") or {}).get("name", PLAIN)) if record else PLAIN


def differences(answered: list[dict], expected: list[dict]) -> tuple[int, float]:
    """Return how many answers are equal, and the largest difference of a log-likelihood."""
    equal = sum(one["answer"] == other["answer"] for one, other in zip(answered, expected, strict=True))
    pairs = [
        (a, b)
        for one, other in zip(answered, expected, strict=True)
        for a, b in zip(one.get("loglikelihoods", []), other.get("loglikelihoods", []), strict=True)
    ]
    return equal, max((abs(a - b) for a, b in pairs), default=0.0)


def texts(tokenizer, items: list[dict]) -> list[dict]:
    """Return the requests for the log-probabilities of some generated answers behind their prompts."""
    from d2lora import data

    generated = [(data.encode(tokenizer, i["prompt"]), i["answer"]) for i in items[:TEXTS] if "choices" not in i]
    return [
        {"ids": prompt + tokenizer(answer, add_special_tokens=False)["input_ids"], "start": len(prompt)}
        for prompt, answer in generated
    ]


def largest_difference(session, base, key: str | None, folder: Path | None, asked: list[dict]) -> float:
    """Return the largest difference of a token's log-probability between the engine and PEFT in memory."""
    import torch

    from d2lora.adapters import attach

    replies = session.answers("loglikelihood", key, [], asked, lambda: None) if asked else []
    differences = [0.0]
    with torch.inference_mode(), attach.trained(base, folder) as (model, _):
        for text, reply in zip(asked, replies, strict=True):
            ids = torch.tensor([text["ids"]])
            table = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
            expected = table.gather(1, ids[0, 1:, None])[text["start"] - 1 :, 0]
            differences.append(float((expected - torch.tensor(reply["logprobs"])).abs().max()))
    return max(differences)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", default="lab", help="as in conf/model")
    parser.add_argument("--python", default=".engine/bin/python")
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--benchmarks", default="lab_math,lab_facts")
    args = parser.parse_args()

    import yaml

    from d2lora import data
    from d2lora.base import load_base
    from d2lora.evaluate.engine import Questions
    from d2lora.evaluate.vllm import sessions
    from d2lora.evaluate.vllm.engine import InVllm
    from d2lora.outputs import Outputs
    from d2lora.settings import Benchmark, Model
    from d2lora.settings.inits import init_of
    from d2lora.settings.recipe import Machine

    done = evaluations(args.output)
    wanted = args.benchmarks.split(",")
    folders = list(dict.fromkeys(folder for folder, name in done if folder and name in wanted))[: args.adapters]
    outputs = Outputs(args.output)
    model = Model.model_validate(yaml.safe_load((ROOT / f"conf/model/{args.model}.yaml").read_text()))
    machine = Machine(micro_batch=1, engine="vllm", engine_python=args.python, threads=1)
    base = load_base(model, outputs.models)
    adapters = [sessions.Adapter(f.parent.name, f, init_of(init_name(f)).quantizes) for f in folders]
    session = sessions.opened(base, model, adapters, machine, outputs)
    keys = [None, *(a.key for a in adapters)]
    wrong = 0
    for name in wanted:
        benchmark = Benchmark.model_validate(yaml.safe_load((ROOT / f"conf/benchmark/{name}.yaml").read_text())[name])
        rows = data.rows(benchmark.data)
        for key, folder in zip(keys, [None, *folders], strict=True):
            if (folder, name) not in done or session.why_not(key):
                continue
            label, expected = done[folder, name]
            questions = Questions(name, benchmark.model_copy(update={"limit": len(expected)}), rows)
            sizes = {k: len(done.get((f, name), ("", []))[1]) for k, f in zip(keys, [None, *folders], strict=True)}
            together = [k for k, size in sizes.items() if size == len(expected)]
            answered = InVllm(base, session, key, together).evaluate(questions, 0, lambda count, total: None).items
            equal, off = differences(answered, expected)
            token = largest_difference(session, base, key, folder, texts(base.tokenizer, expected))
            wrong += equal < len(expected) or max(off, token) > 1e-3
            print(f"| {label} | {equal} of {len(expected)} | {off:.1e} | {token:.1e} |", flush=True)
    sessions.close()
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
