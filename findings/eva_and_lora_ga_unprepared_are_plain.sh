#!/usr/bin/env bash
# peft 0.21.2, transformers 5.24.0, torch 2.13.0
#
# What happens: get_peft_model() with init_lora_weights="eva" or "lora_ga" but without the step that computes the initialization from
# data (initialize_lora_eva_weights after it, preprocess_loraga before it) gives an adapter with B = 0 and a random A: plain LoRA.
# The config, and every checkpoint's adapter_config.json, go on saying eva or lora_ga. No error, and no warning that names the step.
#
# What one would expect: an error, or a warning, once such an adapter is made for training without its preparation; for CorDA,
# which needs a preparation too, PEFT raises.
#
# Why it hurts: trainers that take a peft_config (TRL's among them) call get_peft_model themselves, so the step is easily missed.
# A comparison of initializations then compares LoRA with LoRA under another name.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq torch==2.13.0 transformers==5.24.0 peft==0.21.2
cd "$work"
export HF_HOME="$work/cache"
"$work/venv/bin/python" - <<'PYTHON'
import sys
import warnings

import peft, torch, transformers
from peft.tuners.lora.config import CordaConfig

print(", ".join(f"{library.__name__} {library.__version__}" for library in (torch, transformers, peft)))

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


def adapter(init: str, **more):
    config = peft.LoraConfig(
        r=4, target_modules="all-linear", init_lora_weights=init, task_type="CAUSAL_LM", **more
    )
    return peft.get_peft_model(base(), config)


kinds = {
    "eva": {"eva_config": peft.EvaConfig()},
    "lora_ga": {"lora_ga_config": peft.LoraGAConfig()},
    "corda": {"corda_config": CordaConfig()},
}
largest, said = {}, {}
for init, more in kinds.items():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = adapter(init, **more)
            largest[init] = max(p.abs().max().item() for n, p in model.named_parameters() if "lora_B" in n)
        except Exception as error:
            largest[init] = f"{type(error).__name__}: {str(error)[:80]}"
    steps = ("initialize_lora_eva_weights", "preprocess_loraga", "preprocess_corda", "not initialized")
    said[init] = [str(w.message) for w in caught if any(step in str(w.message) for step in steps)]
    print(f"{init} unprepared: largest value in B: {largest[init]}; warnings that name the step: {said[init] or 'none'}")
print("expected: an error, or a warning that names the missing step, for each of the three")
held = largest["eva"] == 0 and largest["lora_ga"] == 0 and isinstance(largest["corda"], str) and not any(said.values())
print("as described above" if held else "CHANGED: not as described above")
sys.exit(not held)
PYTHON
