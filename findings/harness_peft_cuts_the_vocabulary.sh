#!/usr/bin/env bash
# lm-eval 0.4.13, peft 0.21.2, transformers 5.24.0, torch 2.13.0
#
# What happens: many models have more rows in their embeddings than their tokenizer has tokens (Qwen2.5: 151,936 or 152,064
# for 151,665), so that the size is a round number. With peft=ADAPTER the harness resizes the model to the tokenizer's length
# first ("for LoRAs with added tokens"), which cuts those rows off. Without peft= they stay. An adapter with B = 0, which is the
# base by definition, then gets other log-likelihoods than the base: each softmax has fewer terms.
#
# What one would expect: the base's own log-likelihoods to the last digit, as the same adapter gets when the PeftModel is
# handed over as `pretrained`.
#
# Why it hurts: a base and its adapters, evaluated with the same command but for peft=, are not scored alike, and the
# difference is booked to the adapter. A line of log level INFO says that the layer is resized.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq torch==2.13.0 transformers==5.24.0 peft==0.21.2 lm-eval==0.4.13
cd "$work"
export HF_HOME="$work/cache"
"$work/venv/bin/python" - <<'PYTHON'
import importlib.metadata
import sys

import peft, torch, transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers

version = importlib.metadata.version("lm_eval")
print(", ".join(f"{library.__name__} {library.__version__}" for library in (torch, transformers, peft)), f"lm_eval {version}")
transformers.utils.logging.disable_progress_bar()
words = [f"w{i}" for i in range(97)]
vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
)


def save_base(rows: int) -> None:
    """Save a small random Llama whose embeddings have this many rows, and its adapter with B = 0."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=rows, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        bos_token_id=1, eos_token_id=1, pad_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained("base")
    tokenizer.save_pretrained("base")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, lora).save_pretrained("adapter")


def log_likelihoods(model: HFLM) -> list[float]:
    asked = [("w1 w2 w3", " w4"), ("w5 w6", " w7 w8 w9"), ("w9", " " + " ".join(words[10:40]))]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(asked)]
    return [total for total, _ in model.loglikelihood(requests, disable_tqdm=True)]


def apart(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other))


off, handed = {}, {}
for rows in (100, 128):
    save_base(rows)
    base = log_likelihoods(HFLM("base", device="cpu"))
    by_name = log_likelihoods(HFLM("base", peft="adapter", device="cpu"))
    model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained("base"), "adapter")
    in_memory = log_likelihoods(HFLM(model, tokenizer=tokenizer, device="cpu"))
    off[rows], handed[rows] = apart(base, by_name), apart(base, in_memory)
    print(f"{rows} rows for 100 tokens. Log-likelihoods of 1, 3 and 30 tokens")
    for name, totals in (("base", base), ("B = 0, peft=", by_name), ("B = 0, a PeftModel", in_memory)):
        print(f"  {name}: " + ", ".join(f"{total:.4f}" for total in totals))
print("expected: equal, for both sizes")
held = off[100] < 1e-4 and off[128] > 0.1 and max(handed.values()) < 1e-4
print("as described above" if held else "CHANGED: not as described above")
sys.exit(not held)
PYTHON
