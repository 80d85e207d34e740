#!/usr/bin/env bash
# peft 0.21.2, transformers 5.24.0, torch 2.13.0
#
# What happens: LoRA-GA with PEFT's default scale="stable" multiplies B by the singular values of the gradient that
# preprocess_loraga collects. A loss a hundred times as large (a sum in place of a mean) gives a B a hundred times as
# large, and A as before.
#
# What one would expect: A and B from the gradient's directions alone, as the paper defines it (Wang et al. 2024, arXiv
# 2407.05000, section 3.3: orthonormal directions for both, times constants of the layer's size and gamma).
#
# Why it hurts: what the paper calls stable, a start whose size does not depend on the data, depends on how the loss is reduced
# and how many batches are added up. Results of two runs that differ in that alone are not of one method.
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
from peft.tuners.lora.loraga import preprocess_loraga

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


def start(factor: float, scale: str) -> tuple[float, float]:
    """Return the norms of the first layer's A and B where the loss is multiplied by a factor."""
    model = base()
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], init_lora_weights="lora_ga", task_type="CAUSAL_LM",
        lora_ga_config=peft.LoraGAConfig(scale=scale),
    )
    preprocess_loraga(model, config, lambda: (factor * model(input_ids=ids, labels=ids).loss).backward())
    layer = peft.get_peft_model(model, config).base_model.model.model.layers[0].self_attn.q_proj
    return layer.lora_A["default"].weight.norm().item(), layer.lora_B["default"].weight.norm().item()


norms = {}
default = peft.LoraGAConfig().scale
for factor in (1.0, 100.0):
    norms[factor] = start(factor, default)
    print(f"scale={default}, loss x {factor:g}: norm of A {norms[factor][0]:.4f}, of B {norms[factor][1]:.4f}")
ratio = norms[100.0][1] / norms[1.0][1]
print(f"B is {ratio:.1f} times as large")
print("expected: 1.0 times")
held = default == "stable" and abs(ratio - 100) < 1 and abs(norms[100.0][0] / norms[1.0][0] - 1) < 1e-3
print("as described above" if held else "CHANGED: not as described above")
sys.exit(not held)
PYTHON
