#!/usr/bin/env bash
# peft 0.21.2, transformers 5.24.0, torch 2.13.0
#
# What happens: GPT-2's Conv1D keeps its weight as (in, out), not (out, in). PEFT's init_lora_weights="olora" takes the
# QR of the weight as it lies there and takes s B A off it, while the forward pass adds s B A transposed. On GPT-2's
# square attn.c_proj nothing fails: the model starts as another one than the base. PiSSA, on the same layer, transposes
# and starts as the base. (On layers that are not square A and B get each other's shapes, and the first pass fails.)
#
# What one would expect: before the first step the adapted model is the base, as OLoRA is defined and as PiSSA does.
#
# Why it hurts: a comparison of initializations on GPT-2 shows OLoRA from a damaged start, and its curve says nothing of
# the method. fan_in_fan_out=True, PEFT's setting for such layers, does not help.
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

print(", ".join(f"{library.__name__} {library.__version__}" for library in (torch, transformers, peft)))
ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))


def start(init: str) -> float:
    """Return how far the freshly adapted GPT-2's log-probabilities are from the base's, at most."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3, bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        base = model(ids).logits.log_softmax(-1)
        lora = peft.LoraConfig(r=8, init_lora_weights=init, target_modules=["attn.c_proj"], fan_in_fan_out=True)
        return (peft.get_peft_model(model, lora).eval()(ids).logits.log_softmax(-1) - base).abs().max().item()


off = {}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for init in ("pissa", "olora"):
        off[init] = start(init)
        print(f"{init}: log-probabilities before the first step, largest difference from the base: {off[init]:.6f}")
warned = [str(w.message) for w in caught if "olora" in str(w.message).lower()]
print("warnings that speak of OLoRA:", warned or "none")
print("expected: no difference beyond rounding for both")
held = off["pissa"] < 1e-3 and off["olora"] > 0.1 and not warned
print("as described above" if held else "CHANGED: not as described above")
sys.exit(not held)
PYTHON
