#!/usr/bin/env bash
# trl 1.16.0, peft 0.21.2, transformers 5.24.0, torch 2.13.0
#
# What happens: DPOTrainer, given a model with an adapter, keeps a copy of it as the reference: it adds an adapter "ref" with the same
# config and copies the weights. With init_lora_weights="pissa" adding it runs PiSSA again, on the residual that the
# first run left in the base, and takes the residual's own largest directions out of it too. OLoRA is the same.
#
# What one would expect: constructing a trainer does not change the model. The adapter that goes in is the base by PiSSA's
# definition, and is the base no longer once the trainer exists.
#
# Why it hurts: DPO trains a policy, against a reference, neither of which is the model that was given. The loss begins at
# ln 2 all the same, because both are wrong alike.
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

print(", ".join(f"{library.__name__} {library.__version__}" for library in (torch, transformers, peft, trl)))
disable_progress_bars()
words = [f"w{i}" for i in range(61)]
vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
)
pairs = Dataset.from_list([{"prompt": f"w{i} ", "chosen": f"w{i} w2", "rejected": f"w3 w{i}"} for i in range(8)])

def base():
    """Return a small random Llama, the same each time."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids).logits


def change(init) -> tuple[float, float]:
    """Return how far the adapted model's logits are from the base's, at most, before and after a trainer is made."""
    expected = logits(base())
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=init, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base(), config)
    before = (logits(model) - expected).abs().max().item()
    arguments = trl.DPOConfig(output_dir="out", report_to=[], use_cpu=True, bf16=False, disable_tqdm=True)
    trl.DPOTrainer(model=model, args=arguments, train_dataset=pairs, processing_class=tokenizer)
    return before, (logits(model) - expected).abs().max().item()


off = {}
for init in (True, "pissa", "olora"):
    off[init] = change(init)
    print(f"init_lora_weights={init}: largest difference from the base's logits {off[init][0]:.6f}, "
          f"with a DPOTrainer made for it {off[init][1]:.6f}")
print("expected: as small after as before, for all three")
held = max(off[True]) < 1e-3 and all(off[i][0] < 1e-2 and off[i][1] > 0.5 for i in ("pissa", "olora"))
print("as described above" if held else "CHANGED: not as described above")
sys.exit(not held)
PYTHON
