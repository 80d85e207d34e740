#!/usr/bin/env bash
# llama.cpp as of llama-cpp-python 0.3.36, peft 0.21.2, transformers 5.24.0, torch 2.13.0
#
# What happens: convert_lora_to_gguf.py writes one alpha, `lora_alpha`, and llama.cpp scales each layer by that over the layer's rank. Adapters
# with rsLoRA (scale alpha / sqrt(r)) or with an `alpha_pattern` (as EVA leaves, whose layers get ranks of their own) are converted
# without a word and computed with other scales than PEFT's.
#
# What one would expect: the same scales, or an error that names what is not supported.
#
# Why it hurts: with r = 16 rsLoRA's adapter has a quarter of its effect; the model answers fluently, as a worse one.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq torch==2.13.0 transformers==5.24.0 peft==0.21.2 gguf==0.19.0 sentencepiece==0.2.1
cd "$work"
"$work/venv/bin/python" -m pip download -qq --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36
tar xzf llama_cpp_python-0.3.36.tar.gz
export HF_HOME="$work/cache" LLAMA="$work/llama_cpp_python-0.3.36/vendor/llama.cpp"
"$work/venv/bin/python" - <<'PYTHON'
import os
import pathlib
import subprocess
import sys

import peft, torch, transformers
from gguf import GGUFReader
from peft.tuners.lora.layer import LoraLayer

print(", ".join(f"{library.__name__} {library.__version__}" for library in (torch, transformers, peft)))
llama = pathlib.Path(os.environ["LLAMA"])
config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
transformers.LlamaForCausalLM(config).save_pretrained("base")
LAYERS = {"q_proj": "model.layers.0.self_attn.q_proj", "v_proj": "model.layers.0.self_attn.v_proj"}
EVA = {"rank_pattern": {LAYERS["q_proj"]: 4, LAYERS["v_proj"]: 28}, "alpha_pattern": {LAYERS["q_proj"]: 4, LAYERS["v_proj"]: 28}}


def scales(name: str, **settings: object) -> tuple[dict[str, float], dict[str, float], list[str]]:
    """Return the layers' scales in PEFT and in llama.cpp, and what the converter said that may be a warning."""
    lora = peft.LoraConfig(r=16, lora_alpha=16, target_modules=list(LAYERS), task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    model = peft.get_peft_model(transformers.LlamaForCausalLM.from_pretrained("base"), lora)
    model.save_pretrained(name)
    layers = {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}
    own = {short: layers[f"base_model.model.{LAYERS[short]}"].scaling["default"] for short in LAYERS}
    command = [sys.executable, llama / "convert_lora_to_gguf.py", name, "--base", "base", "--outtype", "f32", "--outfile", f"{name}.gguf"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = [line for line in (done.stdout + done.stderr).splitlines() if any(w in line.lower() for w in ("rslora", "alpha_pattern"))]
    reader = GGUFReader(f"{name}.gguf")
    alpha = float(reader.fields["adapter.lora.alpha"].parts[-1][0])
    matrices = {tensor.name: tensor for tensor in reader.tensors}
    ranks = {short: int(matrices[f"blk.0.attn_{short[0]}.weight.lora_b"].shape[0]) for short in LAYERS}
    return own, {short: alpha / rank for short, rank in ranks.items()}, said


rule = "alpha ? adapter_scale * alpha / rank : adapter_scale"
held = rule in (llama / "src/llama-adapter.h").read_text()
print(f"src/llama-adapter.h: scale = {rule}" if held else "src/llama-adapter.h computes the scale in another way")
for name, settings in {"plain": {}, "root": {"use_rslora": True}, "eva": EVA}.items():
    ours, theirs, said = scales(name, **settings)
    print(f"{name}: PEFT {ours}, llama.cpp {theirs}; the converter says {said or 'nothing of it'}")
    held = held and (ours == theirs) == (name == "plain") and not said
print("expected: the same scales, or an error")
print("as described above" if held else "CHANGED: not as described above")
sys.exit(not held)
PYTHON
