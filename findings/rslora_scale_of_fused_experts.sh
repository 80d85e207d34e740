#!/usr/bin/env bash
# peft 0.21.2, transformers 5.24.0, torch 2.13.0
#
# What happens: transformers 5 keeps a Mixtral expert's gate and up projections as one parameter, and PEFT's "all-linear" gives it
# rank 2 r and alpha 2 alpha, so that LoRA's scale alpha / r stays. With use_rslora=True the scale is alpha / sqrt(r):
# doubling both multiplies it by sqrt(2). In one model the experts' first matrices are scaled 41 % more than all other layers.
#
# What one would expect: one scale for all layers, alpha / sqrt(r) of the config, as rsLoRA is defined.
#
# Why it hurts: rank and alpha are what one sweeps with rsLoRA, since its scale is to hold updates steady over ranks. On a mixture of
# experts some layers then learn with another step than was set, without a word.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq torch==2.13.0 transformers==5.24.0 peft==0.21.2
cd "$work"
export HF_HOME="$work/cache"
"$work/venv/bin/python" - <<'PYTHON'
import collections
import sys
import warnings

import peft, torch, transformers
from peft.tuners.lora.layer import LoraLayer

print(", ".join(f"{library.__name__} {library.__version__}" for library in (torch, transformers, peft)))


def scales(rslora: bool) -> dict[float, int]:
    """Return how many adapted layers of a small Mixtral have which scale, for r = 4 and alpha = 4."""
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4,
    )
    lora = peft.LoraConfig(r=4, lora_alpha=4, use_rslora=rslora, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(transformers.MixtralForCausalLM(config), lora)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return dict(collections.Counter(round(layer.scaling["default"], 3) for layer in layers))


with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    plain, rslora = scales(False), scales(True)
warned = [str(w.message) for w in caught if "rslora" in str(w.message).lower()]
print(f"LoRA, alpha / r = 1: {plain} (scale: layers)")
print(f"rsLoRA, alpha / sqrt(r) = 2: {rslora}")
print("warnings that speak of rsLoRA:", warned or "none")
print("expected: one scale for each")
held = set(plain) == {1.0} and set(rslora) == {2.0, 2.828} and not warned
print("as described above" if held else "CHANGED: not as described above")
sys.exit(not held)
PYTHON
