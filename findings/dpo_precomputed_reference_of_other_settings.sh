#!/usr/bin/env bash
# trl 1.16.0, peft 0.21.2, transformers 5.24.0, datasets 5.2.0, torch 2.13.0
#
# What happens: with precompute_ref_log_probs=True DPOTrainer stores the reference's log-probabilities beside the data set's own cache and
# takes them up again in later runs. Their name is a hash of the tokenized rows and of the model's weights. What else they depend on is
# not in it: ld_alpha, and max_length under truncation_mode="keep_end", which cuts in the collator. A run with another value
# compares its policy with the reference of the first one, without a word.
#
# What one would expect: policy and reference begin equal, so that the first loss is ln 2 and the margins are 0, as they are when
# the same run comes first, or without precompute_ref_log_probs.
#
# Why it hurts: a sweep over ld_alpha or max_length trains its first value as meant and all others against a wrong reference: pairs
# that look won already give next to no gradient. Which value is the good one depends on the order of the runs.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq torch==2.13.0 transformers==5.24.0 peft==0.21.2 trl==1.16.0 datasets==5.2.0
cd "$work"
export HF_HOME="$work/cache" PYTHONWARNINGS=ignore::FutureWarning TRL_EXPERIMENTAL_SILENCE=1
"$work/venv/bin/python" - 2> log <<'PYTHON' || { tail -5 log; exit 1; }
import json
import math
import pathlib
import random
import shutil
import sys

import datasets, peft, torch, transformers, trl
from tokenizers import Tokenizer, models, pre_tokenizers

print(", ".join(f"{library.__name__} {library.__version__}" for library in (torch, transformers, peft, trl, datasets)))
datasets.disable_progress_bars()
transformers.utils.logging.set_verbosity_error()
words = [f"w{i}" for i in range(61)]
vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
)
draw = random.Random(0)
pairs = [
    {"prompt": f"w{i} ", "chosen": " ".join(draw.choices(words, k=20 + i)), "rejected": " ".join(draw.choices(words, k=10 + i))}
    for i in range(8)
]
pathlib.Path("pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))


def first_step(**settings) -> tuple[float, float]:
    """Return loss and margin of the first step over all pairs, for the same fresh adapter on the same base each time."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3
    )
    args = trl.DPOConfig(
        output_dir="out", max_steps=1, per_device_train_batch_size=8, logging_steps=1, report_to=[], use_cpu=True, bf16=False,
        save_strategy="no", disable_tqdm=True, **settings,
    )
    trainer = trl.DPOTrainer(
        transformers.LlamaForCausalLM(config), args=args, processing_class=tokenizer,
        train_dataset=datasets.load_dataset("json", data_files="pairs.jsonl", split="train"),
        peft_config=peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return trainer.state.log_history[0]["loss"], trainer.state.log_history[0]["rewards/margins"]


keep_end = {"truncation_mode": "keep_end"}
sweeps = {
    "ld_alpha": [{"max_length": None}, {"max_length": None, "ld_alpha": 0.5}],
    "max_length": [{"max_length": 1024, **keep_end}, {"max_length": 16, **keep_end}],
}
held = True
for name, sweep in sweeps.items():
    for precompute in (False, True):
        for order in (sweep, sweep[::-1]):
            shutil.rmtree("cache", ignore_errors=True)
            for turn, settings in enumerate(order):
                loss, margin = first_step(precompute_ref_log_probs=precompute, **settings)
                print(f"precompute_ref_log_probs={precompute}, run {turn + 1}, {name}={settings.get(name)}: "
                      f"first loss {loss:.4f}, margin {margin:.4f}")
                right = abs(loss - math.log(2)) < 1e-3 and abs(margin) < 1e-3
                held = held and right == (turn == 0 or not precompute)
print(f"expected: {math.log(2):.4f} and 0 for each")
print("as described above" if held else "CHANGED: not as described above")
sys.exit(not held)
PYTHON
