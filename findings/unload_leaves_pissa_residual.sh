#!/usr/bin/env bash
# peft 0.21.2, transformers 5.24.0, torch 2.13.0
#
# What happens: unload() of a model with a PiSSA adapter returns the residual, the base without its largest directions, and not the
# base. PiSSA writes the residual over the base's weights when the adapter is added, and unload() does not undo that.
#
# What one would expect: the base. unload()'s docstring: "Gets back the base model by removing all the lora modules without
# merging. This gives back the original base model."
#
# Why it hurts: whoever evaluates the base after the adapter in one process, or trains the next adapter on it, works on a model
# that is neither, and no error or warning says so.
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


def unloaded(init) -> float:
    """Return how far the logits of the base that unload() gives back are from the base's own, at most."""
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=init, task_type="CAUSAL_LM")
    return (logits(peft.get_peft_model(base(), config).unload()) - logits(base())).abs().max().item()


with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    off = {init: unloaded(init) for init in (True, "pissa")}
for init, value in off.items():
    print(f"init_lora_weights={init}: largest difference of the unloaded model's logits from the base's: {value:.6f}")
warned = [str(w.message) for w in caught if "unload" in str(w.message).lower() or "pissa" in str(w.message).lower()]
print("warnings that speak of it:", warned or "none")
print("expected: 0 for both")
held = off[True] == 0 and off["pissa"] > 0.5 and not warned
print("as described above" if held else "CHANGED: not as described above")
sys.exit(not held)
PYTHON
