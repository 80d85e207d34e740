#!/usr/bin/env bash
# peft 0.21.2, transformers 5.24.0, torch 2.13.0
#
# What happens: PEFT hands the prefix to the model's forward pass as `past_key_values`. Since transformers calls that argument
# `cache`, generate() passes an empty cache of its own beside it, and of the two `past_key_values` is the one that is ignored. So a
# model with a prefix generates without it: Llama's and Qwen2's logits and tokens are the base's. For GPT-2 they are those of neither:
# the positions count the prefix that is not read. Forward passes, and so training and log-likelihoods, do read the prefix.
#
# What one would expect: generate() begins with the forward pass's logits, as it does for prompt tuning and p-tuning.
#
# Why it hurts: a prefix is trained, its loss falls, its multiple-choice scores change, and whatever it is asked to write is the
# base's answer: a comparison with LoRA on GSM8K has the base under the name of prefix tuning. The one sign is a FutureWarning
# that speaks of a deprecated argument.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq torch==2.13.0 transformers==5.24.0 peft==0.21.2
cd "$work"
export HF_HOME="$work/cache" PYTHONWARNINGS=ignore::FutureWarning
"$work/venv/bin/python" - 2> log <<'PYTHON' || { tail -5 log; exit 1; }
import sys

import peft, torch, transformers

print(", ".join(f"{library.__name__} {library.__version__}" for library in (torch, transformers, peft)))
ids = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(1))
mask = torch.ones_like(ids)
special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
shape = dict(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3)
bases = {
    "Llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **special)),
    "Qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape, **special, num_key_value_heads=2)),
    "GPT-2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3, **special)
    ),
}
tunings = {
    "prefix tuning": peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "prompt tuning": peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "p-tuning": peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=32, task_type="CAUSAL_LM"),
}


def base(family: str):
    """Return a small random model, the same each time."""
    torch.manual_seed(0)
    return bases[family]().eval()


def first(model) -> torch.Tensor:
    """Return the logits of a forward pass at the first position to be generated."""
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=mask).logits[:, -1]


def generated(model) -> tuple[torch.Tensor, list]:
    """Return the first logits of a greedy generation, and its tokens."""
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return out.logits[0], out.sequences[:, ids.shape[1] :].tolist()


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return (one - other).abs().max().item()


held = True
for family in bases:
    plain, plain_tokens = first(base(family)), generated(base(family))[1]
    for name, config in tunings.items():
        model = peft.get_peft_model(base(family), config)
        logits, tokens = generated(model)
        seen = apart(logits, first(model)), apart(logits, plain), tokens == plain_tokens
        print(f"{family}, {name}: first logits of generate() are off the forward pass's by {seen[0]:.5f}, the base's by {seen[1]:.5f}; "
              f"the same tokens as the base: {seen[2]}")
        if name == "prefix tuning":
            held = held and seen[0] > 0.1 and (family == "GPT-2" or (seen[1] < 1e-3 and seen[2]))
        else:
            held = held and seen[0] < 1e-3 and seen[1] > 0.1
print("expected: 0.00000 off the forward pass's, and other tokens than the base's, for each")
print("as described above" if held else "CHANGED: not as described above")
sys.exit(not held)
PYTHON
