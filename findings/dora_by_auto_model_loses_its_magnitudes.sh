#!/usr/bin/env bash
# transformers 5.24.0, peft 0.21.2, torch 2.13.0
#
# What happens: AutoModelForCausalLM.from_pretrained(ADAPTER) and model.load_adapter(ADAPTER) load an adapter's A and B but not DoRA's
# magnitudes: the file calls them "lora_magnitude_vector", the module "lora_magnitude_vector.default.weight", and only
# PEFT's own loader knows both. They stay as a new adapter's are, the norms of the base's rows. No error is raised; the load report
# lists their names as UNEXPECTED and as MISSING, and says of the first that they "can be ignored" and of the others "consider training".
#
# What one would expect: the logits of PeftModel.from_pretrained, as for LoRA and rsLoRA.
#
# Why it hurts: a folder with an adapter may be named wherever a model may (pipelines, trainers, an evaluation's pretrained=). A DoRA
# adapter is then trained or scored with half of what it has learned: a comparison with LoRA blames DoRA.
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
transformers.utils.logging.disable_progress_bar()
ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))
torch.manual_seed(0)
config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3
)
transformers.LlamaForCausalLM(config).save_pretrained("base")


def base():
    return transformers.AutoModelForCausalLM.from_pretrained("base")


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids).logits


def by_load_adapter(folder: str):
    """Return the base with an adapter that transformers' method loaded."""
    model = base()
    model.load_adapter(folder)
    return model


ways = {
    "PeftModel.from_pretrained": lambda folder: peft.PeftModel.from_pretrained(base(), folder),
    "AutoPeftModelForCausalLM": peft.AutoPeftModelForCausalLM.from_pretrained,
    "AutoModelForCausalLM": transformers.AutoModelForCausalLM.from_pretrained,
    "load_adapter": by_load_adapter,
}
off = {}
for name, settings in {"LoRA": {}, "rsLoRA": {"use_rslora": True}, "DoRA": {"use_dora": True}}.items():
    model = peft.get_peft_model(base(), peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **settings))
    torch.manual_seed(2)
    with torch.no_grad():  # stands for a training
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(name)
    for way, load in ways.items():
        off[name, way] = (logits(load(name)) - logits(model)).abs().max().item()
for (name, way), largest in off.items():
    print(f"{name}, {way}: logits differ from those of the model that was saved by at most {largest:.6f}")
print("expected: 0 for all")
wrong = {key for key, largest in off.items() if largest > 0.1}
held = wrong == {("DoRA", "AutoModelForCausalLM"), ("DoRA", "load_adapter")} and all(off[key] < 1e-4 for key in off.keys() - wrong)
print("as described above" if held else "CHANGED: not as described above")
sys.exit(not held)
PYTHON
