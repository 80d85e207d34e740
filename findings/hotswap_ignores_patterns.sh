#!/usr/bin/env bash
# peft 0.21.2, transformers 5.24.0, torch 2.13.0
#
# What happens: hotswap_adapter looks a layer's rank and alpha up by the full name of its weight
# ("...q_proj.lora_A.default.weight"), which no key of rank_pattern or alpha_pattern ever matches. So each layer gets the scale
# lora_alpha / r of the config's plain values, while the weights are those of the pattern's ranks. For alpha_pattern it
# happens even where the old and the new adapter have the same one.
#
# What one would expect: the logits of the same adapter loaded with from_pretrained, as for adapters without patterns; an
# adapter that can't be swapped is refused (other alpha_patterns, use_rslora and more are).
#
# Why it hurts: adapters of one sweep are hot-swapped into one compiled model, to be evaluated or served. Those with ranks
# or alphas of their own for some layers run at other scales than they were trained with, without a word.
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
from peft.utils.hotswap import hotswap_adapter

print(", ".join(f"{library.__name__} {library.__version__}" for library in (torch, transformers, peft)))
ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))


def base():
    """Return a small random Llama, the same each time."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids).logits


def save(folder: str, seed: int, **patterns) -> None:
    """Save an adapter with values as after a training."""
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **patterns)
    model = peft.get_peft_model(base(), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)


def scale(model) -> float:
    return model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"]


kinds = {
    "another lora_alpha": ({}, {"lora_alpha": 32}),
    "a rank_pattern": ({}, {"rank_pattern": {"q_proj": 2}}),
    "the same alpha_pattern": ({"alpha_pattern": {"q_proj": 32}}, {"alpha_pattern": {"q_proj": 32}}),
}
off, said = {}, []
for name, (old, new) in kinds.items():
    save("old", 1, **old)
    save("new", 2, **new)
    loaded = peft.PeftModel.from_pretrained(base(), "new")
    swapped = peft.PeftModel.from_pretrained(base(), "old")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hotswap_adapter(swapped, "new", adapter_name="default", torch_device="cpu")
    said += [str(each.message) for each in caught if "hotswap" in str(each.message).lower() or "scal" in str(each.message)]
    off[name] = (logits(swapped) - logits(loaded)).abs().max().item()
    print(
        f"an adapter with {name}: q_proj's scale loaded {scale(loaded)}, hot-swapped {scale(swapped)}; "
        f"largest difference of the logits {off[name]:.4f}"
    )
print("warnings that speak of it:", said or "none")
print("expected: the same scale and logits, for each")
held = off["another lora_alpha"] < 1e-3 and all(off[name] > 0.5 for name in list(kinds)[1:]) and not said
print("as described above" if held else "CHANGED: not as described above")
sys.exit(not held)
PYTHON
