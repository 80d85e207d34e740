#!/usr/bin/env bash
# transformers 5.24.0, torch 2.13.0
#
# What happens: with output_router_logits=True a mixture of experts adds router_aux_loss_coef times its balancing loss to the loss. Its
# cross-entropy is divided by the tokens of the whole batch (num_items_in_batch), so Trainer does not divide the loss by
# gradient_accumulation_steps any more, and the balancing loss is divided by nothing. At one effective batch, 8 steps of accumulation
# count it 8 times, in the gradient and in the loss that is logged.
#
# What one would expect: one coefficient, however the batch is split. With equal rows both parts are the same in each micro-batch,
# so that all splits should give one gradient, as they do without the balancing loss. TRL's SFTTrainer does divide it.
#
# Why it hurts: a GPU with less memory gets the same batch in more steps and, at a coefficient of 0.001 and 64 steps, a router that
# is pushed to balance as by 0.064. The loss is higher too, so two runs that differ in memory alone look as if one learned less.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq torch==2.13.0 transformers==5.24.0 accelerate==1.15.0 datasets==5.2.0
cd "$work"
export HF_HOME="$work/cache" PYTHONWARNINGS=ignore::FutureWarning
"$work/venv/bin/python" - <<'PYTHON'
import sys

import torch, transformers
from datasets import Dataset

print(", ".join(f"{library.__name__} {library.__version__}" for library in (torch, transformers)))
transformers.utils.logging.set_verbosity_error()
row = torch.randint(3, 64, (24,), generator=torch.Generator().manual_seed(1)).tolist()
rows = Dataset.from_list([{"input_ids": row, "labels": row}] * 8)
shape = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3)
families = {
    "Mixtral": lambda **more: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**shape, intermediate_size=64, num_local_experts=4, **more)
    ),
    "Qwen3-MoE": lambda **more: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**shape, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, head_dim=16, **more)
    ),
}


def step(family: str, balancing: bool, micro_batch: int) -> tuple[torch.Tensor, float]:
    """Return the routers' gradient and the loss that is logged, for one step over all 8 rows."""
    torch.manual_seed(0)
    model = families[family](output_router_logits=balancing, router_aux_loss_coef=0.1)
    routers = [parameter for name, parameter in model.named_parameters() if name.endswith("mlp.gate.weight")]
    gradients = []

    class Keep(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_, **__):
            gradients.extend(parameter.grad.clone().flatten() for parameter in routers)

    settings = transformers.TrainingArguments(
        output_dir="out", max_steps=1, per_device_train_batch_size=micro_batch, gradient_accumulation_steps=8 // micro_batch,
        max_grad_norm=0, logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, bf16=False,
    )
    trainer = transformers.Trainer(model, settings, train_dataset=rows, callbacks=[Keep()])
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return torch.cat(gradients), trainer.state.log_history[0]["loss"]


held = True
for family in families:
    parts = {}
    for micro_batch in (8, 2, 1):
        (gradient, loss), (without, plain) = step(family, True, micro_batch), step(family, False, micro_batch)
        parts[micro_batch] = (gradient - without).norm().item(), loss - plain
        whole = parts[8]
        times = [part / all_at_once for part, all_at_once in zip(parts[micro_batch], whole, strict=True)]
        print(f"{family}, {8 // micro_batch} micro-batches of {micro_batch}: loss {loss:.3f}, without balancing {plain:.3f}; "
              f"balancing's part of the routers' gradient {times[0]:.2f} times that of one batch, of the loss {times[1]:.2f} times")
        held = held and all(abs(factor - 8 / micro_batch) < 0.01 for factor in times)
print("expected: 1.00 times for each")
print("as described above" if held else "CHANGED: not as described above")
sys.exit(not held)
PYTHON
