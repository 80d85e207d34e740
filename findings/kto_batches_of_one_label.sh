#!/usr/bin/env bash
# trl 1.16.0, peft 0.21.2, transformers 5.24.0, torch 2.13.0
#
# What happens: KTOTrainer takes a data set of pairs (prompt, chosen, rejected) and makes two examples of each, in blocks
# of 1,000 rows: all chosen answers of a block, then all rejected ones. Its KL term needs a fixed order, so it refuses any
# other than "sequential" and nothing is shuffled. Of 400 pairs in batches of 8 the first 50 batches are desirable
# examples alone, the last 50 undesirable ones alone, in every epoch.
#
# What one would expect: batches with both, as the same examples, shuffled before, give them.
#
# Why it hurts: in a batch of one label the KL, which is of the same answers after other prompts, moves with the rewards it is
# subtracted from, and for half an epoch nothing pulls the other way. A curve over an epoch shows the order, not what is
# learned, and a training that ends early has seen one side only. Nothing is said of it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq torch==2.13.0 transformers==5.24.0 peft==0.21.2 trl==1.16.0
cd "$work"
export HF_HOME="$work/cache" PYTHONWARNINGS=ignore::FutureWarning
"$work/venv/bin/python" - <<'PYTHON'
import random
import sys

import peft, torch, transformers, trl
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers

print(", ".join(f"{library.__name__} {library.__version__}" for library in (torch, transformers, peft, trl)))
disable_progress_bars()
words = "one two three four five six seven eight nine ten".split()
vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
)
pairs = [{"prompt": f"{words[i % 10]} ", "chosen": words[(i + 1) % 10], "rejected": words[(i + 9) % 10]} for i in range(400)]
examples = [
    {"prompt": pair["prompt"], "completion": pair[kind], "label": kind == "chosen"}
    for pair in pairs
    for kind in ("chosen", "rejected")
]
random.Random(0).shuffle(examples)


def labels(rows: list[dict], **settings) -> list[list[bool]]:
    """Return the labels of each batch of an epoch."""
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )
    trainer = trl.KTOTrainer(
        model=transformers.LlamaForCausalLM(config), processing_class=tokenizer, train_dataset=Dataset.from_list(rows),
        args=trl.KTOConfig(output_dir="out", per_device_train_batch_size=8, use_cpu=True, bf16=False, report_to=[], **settings),
        peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    return [batch["label"].tolist() for batch in trainer.get_train_dataloader()]


of_pairs, of_examples = labels(pairs), labels(examples)
mixed, wanted = (sum(0 < sum(batch) < len(batch) for batch in batches) for batches in (of_pairs, of_examples))
first = next(i for i, batch in enumerate(of_pairs) if not all(batch))
try:
    labels(pairs, train_sampling_strategy="random")
    refused = False
except ValueError as error:
    refused = "train_sampling_strategy='sequential'" in str(error)
print(f"the examples of 400 pairs, shuffled before: {wanted} of {len(of_examples)} batches have both labels")
print(f"the 400 pairs: {mixed} of {len(of_pairs)}; {first} desirable batches, then {len(of_pairs) - first} undesirable ones")
print(f'train_sampling_strategy="random" is {"refused" if refused else "taken"}')
print("expected: most batches have both for both")
held = mixed == 0 and wanted > 90 and refused
print("as described above" if held else "CHANGED: not as described above")
sys.exit(not held)
PYTHON
