#!/usr/bin/env bash
# trl 1.16.0 (trl.experimental.orpo), peft 0.21.2, transformers 5.24.0, torch 2.13.0
#
# What happens: ORPOTrainer averages the negative log-likelihood of prompts and chosen answers over the tokens of each
# micro-batch, and the micro-batches' means get equal weight. With answers of different lengths the same 8 pairs, in one
# step, give another gradient for per_device_train_batch_size 8, 2 and 1 with gradient_accumulation_steps 1, 4 and 8.
# SFTTrainer counts the tokens of the whole batch, and its gradients agree.
#
# What one would expect: micro-batch and accumulation are a matter of memory; at one effective batch they change
# nothing.
#
# Why it hurts: pairs of unequal length are the rule. Two runs "at batch 16" on GPUs of different memory optimize
# different objectives: in small micro-batches tokens of short answers count more. A difference between SFT and ORPO, or
# between two adapters, can be one of the GPUs they were trained on.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq torch==2.13.0 transformers==5.24.0 peft==0.21.2 trl==1.16.0
cd "$work"
export HF_HOME="$work/cache" PYTHONWARNINGS=ignore::FutureWarning TRL_EXPERIMENTAL_SILENCE=1
"$work/venv/bin/python" - <<'PYTHON'
import sys

import peft, torch, transformers, trl
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

print(", ".join(f"{library.__name__} {library.__version__}" for library in (torch, transformers, peft, trl)))
disable_progress_bars()
words = "one two three four five six seven eight nine ten".split()
vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
)
answers = [" ".join((words * 4)[i : i + 2 + 3 * i]) for i in range(8)]  # of 2 to 23 words
pairs = [{"prompt": "one ", "chosen": a, "rejected": "nine " + a} for a in answers]
texts = [{"text": "one " + a} for a in answers]


class Gradient(transformers.TrainerCallback):
    """Keeps the gradient of the adapter's B of the one step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.found = torch.cat([p.grad.flatten() for n, p in model.named_parameters() if "lora_B" in n]).clone()


def gradient(method: str, micro_batch: int) -> torch.Tensor:
    """Return the adapter's gradient of one step over all 8 rows."""
    transformers.set_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=1, initializer_range=0.3,
    )
    common = dict(
        output_dir="out", max_steps=1, per_device_train_batch_size=micro_batch, max_grad_norm=0.0, use_cpu=True,
        gradient_accumulation_steps=8 // micro_batch, report_to=[], save_strategy="no", logging_strategy="no",
        disable_tqdm=True, bf16=False, remove_unused_columns=method == "sft", gradient_checkpointing=False, seed=0,
    )
    kinds = {"sft": (trl.SFTTrainer, trl.SFTConfig, texts), "orpo": (ORPOTrainer, ORPOConfig, pairs)}
    trainer, settings, rows = kinds[method]
    kept = Gradient()
    running = trainer(
        model=transformers.LlamaForCausalLM(config), args=settings(**common), train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer, callbacks=[kept],
        peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    running.remove_callback(transformers.PrinterCallback)
    running.train()
    return kept.found


off = {}
for method in ("sft", "orpo"):
    whole = gradient(method, 8)
    for micro_batch in (2, 1):
        off[method, micro_batch] = ((gradient(method, micro_batch) - whole).norm() / whole.norm()).item()
        print(
            f"{method}: gradient of the same 8 rows in micro-batches of {micro_batch} and of 8, apart by "
            f"{off[method, micro_batch]:.2%} of its norm"
        )
print("expected: no difference beyond rounding for both")
held = all(off["sft", size] < 1e-3 for size in (2, 1)) and all(off["orpo", size] > 0.02 for size in (2, 1))
print("as described above" if held else "CHANGED: not as described above")
sys.exit(not held)
PYTHON
