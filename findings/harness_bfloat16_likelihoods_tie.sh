#!/usr/bin/env bash
# lm-eval 0.4.13, transformers 5.24.0, torch 2.13.0
#
# What happens: the harness takes log_softmax and the sum over a choice's tokens in the logits' own type. For a model in bfloat16,
# as dtype="auto" loads it, a log-likelihood between -128 and -256 is a whole number: two choices often tie, and argmax then
# takes the one that stands first. Others are ranked by rounding alone. softmax_dtype="float32", which is not the default,
# gives what the same logits say.
#
# What one would expect: a sum of 30 or 100 log-probabilities taken in float32, as losses are in training.
#
# Why it hurts: with choices of a sentence or more (HellaSwag, TruthfulQA, preference pairs) a part of the items is decided by the
# order of the choices. A small difference between two adapters is below it, and where the gold stands first it scores.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq torch==2.13.0 transformers==5.24.0 accelerate lm-eval==0.4.13
cd "$work"
export HF_HOME="$work/cache"
"$work/venv/bin/python" - 2> log <<'PYTHON' || { tail -5 log; exit 1; }
import importlib.metadata
import random
import sys

import torch, transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers

print(f"torch {torch.__version__}, transformers {transformers.__version__}, lm_eval {importlib.metadata.version('lm_eval')}")
words = [f"w{i}" for i in range(97)]
vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
)
torch.manual_seed(0)
shape = transformers.LlamaConfig(
    vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    bos_token_id=1, eos_token_id=1, pad_token_id=0,
)
transformers.LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained("model")
tokenizer.save_pretrained("model")
draw = random.Random(0)
items = [("w1 w2 w3", [" " + " ".join(draw.choices(words, k=30)) for _ in range(2)]) for _ in range(100)]


def likelihoods(**settings) -> list[tuple[float, float]]:
    """Return both choices' log-likelihoods for each item."""
    model = HFLM("model", device="cpu", batch_size=20, **settings)
    requests = [Instance("loglikelihood", {}, (context, choice), i) for i, (context, pair) in enumerate(items) for choice in pair]
    totals = [total for total, _ in model.loglikelihood(requests, disable_tqdm=True)]
    return list(zip(totals[::2], totals[1::2], strict=True))


def ties(pairs: list[tuple[float, float]]) -> int:
    return sum(one == other for one, other in pairs)


default, exact = likelihoods(), likelihoods(softmax_dtype="float32")
whole = all(total == round(total) for pair in default for total in pair)
other = sum((a < b) != (c < d) for (a, b), (c, d) in zip(default, exact, strict=True))
print(f"first item, default: {default[0]}; softmax_dtype=float32: ({exact[0][0]:.4f}, {exact[0][1]:.4f})")
print(f"100 items of two choices of 30 tokens: {ties(default)} ties by default, {ties(exact)} with softmax_dtype=float32")
print(f"all default log-likelihoods are whole numbers: {whole}; items that get the other choice: {other}")
print("expected: no ties and the same choices")
held = whole and ties(default) > 20 and ties(exact) == 0 and other > 10
print("as described above" if held else "CHANGED: not as described above")
sys.exit(not held)
PYTHON
