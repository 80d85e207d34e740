#!/usr/bin/env bash
# transformers 5.24.0, llama.cpp's converter as of llama-cpp-python 0.3.36, torch 2.13.0
#
# What happens: from_pretrained(..., gguf_file=...) reads a GGUF file's weights and the base of its rotary embedding, but not how that is
# scaled. llama.cpp's converter writes Llama 3.1's, 3.2's and 3.3's scaling as a tensor "rope_freqs.weight" and linear and YaRN
# scaling as keys "llama.rope.scaling.*"; the loader drops both without a word (it reads such keys of gpt-oss alone). The
# loaded config says rope_type "default", and save_pretrained writes that down.
#
# What one would expect: the logits of the model that was converted, as for a model without scaling, or an error.
#
# Why it hurts: the documentation names loading GGUF for further training, and Llama 3's is the usual file. What is trained, evaluated
# and saved as safetensors is another model, a little from the first tokens on and more the longer the text; with linear
# or YaRN scaling it is another one altogether, and a bad score is booked to quantization.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 gguf==0.19.0 sentencepiece==0.2.1
cd "$work"
"$work/venv/bin/python" -m pip download -qq --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36
tar xzf llama_cpp_python-0.3.36.tar.gz
export HF_HOME="$work/cache" CONVERTER="$work/llama_cpp_python-0.3.36/vendor/llama.cpp/convert_hf_to_gguf.py"
"$work/venv/bin/python" - 2> log <<'PYTHON' || { tail -5 log; exit 1; }
import itertools
import os
import pathlib
import shutil
import subprocess
import sys

import sentencepiece, torch, transformers
from gguf import GGUFReader

print(", ".join(f"{library.__name__} {library.__version__}" for library in (torch, transformers)))
words = ["".join(letters) for letters in itertools.product("abcdefgh", repeat=3)]
pathlib.Path("text").write_text("\n".join(" ".join(words[i : i + 8]) for i in range(0, len(words), 4)))
sentencepiece.SentencePieceTrainer.train(
    input="text", model_prefix="tokenizer", vocab_size=300, model_type="bpe", byte_fallback=True, minloglevel=2
)
ids = torch.randint(3, 300, (1, 1024), generator=torch.Generator().manual_seed(1))
scalings = {
    "none": {"rope_type": "default"},
    "Llama 3.2's": {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "linear, 4": {"rope_type": "linear", "factor": 4.0},
    "YaRN, 4": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
}


def log_probs(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids).logits[0].log_softmax(-1)


held = True
for name, scaling in scalings.items():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        initializer_range=0.2, max_position_embeddings=8192, rope_parameters={"rope_theta": 500000.0, **scaling},
    )
    original = transformers.LlamaForCausalLM(config)
    original.save_pretrained("model")
    shutil.copy("tokenizer.model", "model")
    pathlib.Path("gguf").mkdir(exist_ok=True)
    command = [sys.executable, os.environ["CONVERTER"], "model", "--outtype", "f32", "--outfile", "gguf/model.gguf"]
    subprocess.run(command, capture_output=True, check=True)
    reader = GGUFReader("gguf/model.gguf")
    written = [tensor.name for tensor in reader.tensors if "rope" in tensor.name]
    written += [key for key in reader.fields if ".rope.scaling." in key]
    loaded = transformers.AutoModelForCausalLM.from_pretrained("gguf", gguf_file="model.gguf", dtype=torch.float32)
    own, other = log_probs(original), log_probs(loaded)
    kl = (own.exp() * (own - other)).sum(-1)
    other_token = (own.argmax(-1) != other.argmax(-1)).float()
    print(f"scaling {name}: the file has {written or 'none'}; loaded: {loaded.config.rope_parameters['rope_type']}")
    print(f"  KL to the model that was converted: {kl[:64].mean():.4f} over 64 tokens, {kl.mean():.4f} over 1024; "
          f"another token is the likeliest at {other_token.mean():.0%} of the positions")
    exact = kl.abs().max().item() < 1e-4 and not other_token.any()
    held = held and loaded.config.rope_parameters["rope_type"] == "default" and exact == (name == "none") == (not written)
print("expected: 0.0000 and 0% for each")
print("as described above" if held else "CHANGED: not as described above")
sys.exit(not held)
PYTHON
