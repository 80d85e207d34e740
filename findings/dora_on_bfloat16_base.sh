#!/usr/bin/env bash
# peft 0.21.2, transformers 5.24.0, torch 2.13.0
#
# What happens: on a base in bfloat16, PEFT's DoRA (use_dora=True) takes the norms of the weight's rows, with which its magnitude
# vector starts, in bfloat16. Eight bits hold a norm to 0.4 %, and each adapted layer is off by as much before the first
# step, although B is zero. The same weights in float32 start as the base to rounding.
#
# What one would expect: with B = 0 the adapted model is the base, as DoRA is defined and as LoRA on the same base is, bit for bit;
# the adapter's own parameters are float32 by PEFT's default (autocast_adapter_dtype), but the norms are taken before.
#
# Why it hurts: a comparison of LoRA and DoRA on a bfloat16 model, the usual case, starts from two different models; and
# a preference method whose reference is the adapter's start has a reference that is not the base.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq torch==2.13.0 transformers==5.24.0 peft==0.21.2
cd "$work"
export HF_HOME="$work/cache"
"$work/venv/bin/python" - <<'PYTHON'
import sys

import peft, torch, transformers

print(", ".join(f"{library.__name__} {library.__version__}" for library in (torch, transformers, peft)))
ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))


def start(dtype: torch.dtype, dora: bool) -> float:
    """Return how far the freshly adapted Llama's logits are from the base's, at most."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.3,
    )
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    with torch.no_grad():
        base = model(ids).logits.float()
        lora = peft.LoraConfig(r=4, use_dora=dora, target_modules="all-linear", task_type="CAUSAL_LM")
        return (peft.get_peft_model(model, lora).eval()(ids).logits.float() - base).abs().max().item()


off = {}
for dtype in (torch.float32, torch.bfloat16):
    for name, dora in (("LoRA", False), ("DoRA", True)):
        off[name, dtype] = start(dtype, dora)
        print(f"{name} on {dtype}: logits before the first step, largest difference from the base: {off[name, dtype]:.6f}")
print("expected: none on bfloat16 for both")
held = off["LoRA", torch.bfloat16] == 0 and off["DoRA", torch.float32] < 1e-3 and off["DoRA", torch.bfloat16] > 0.01
print("as described above" if held else "CHANGED: not as described above")
sys.exit(not held)
PYTHON
