#!/usr/bin/env bash
# trl 1.16.0, transformers 5.24.0, torch 2.13.0
#
# What happens: TRL's SFT and DPO trainers compute log-probabilities by the body's last hidden state times the matrix of
# the model's output embeddings (add_fused_lm_head). ModernBERT-decoder has a dense layer, an activation and a norm
# between the two. They are left out, without a word: the loss that SFTTrainer reports and trains on is not the model's.
#
# What one would expect: the loss of the model's own logits, or an error for a head that is more than one matrix.
#
# Why it hurts: the adapter is fitted to a model that generation and evaluation never run. A LoRA on the head's dense
# layer gets no gradient, and DPO's margins, its reference's too, are those of another model. Nothing in the logs shows
# it: the loss falls all the same.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq torch==2.13.0 transformers==5.24.0 trl==1.16.0
cd "$work"
export HF_HOME="$work/cache" PYTHONWARNINGS=ignore::FutureWarning TRL_EXPERIMENTAL_SILENCE=1
"$work/venv/bin/python" - <<'PYTHON'
import sys

import torch, transformers, trl
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers

print(", ".join(f"{library.__name__} {library.__version__}" for library in (torch, transformers, trl)))
disable_progress_bars()
words = "one two three four five six seven eight nine ten".split()
vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
)
rows = [" ".join((words * 3)[i : i + 12]) for i in range(8)]


def decoder(kind: str):
    """Build a tiny random decoder whose predictions are far from uniform."""
    torch.manual_seed(0)
    size = dict(vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    size |= dict(intermediate_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=1)
    if kind == "Llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size))
    else:
        size |= dict(cls_token_id=1, sep_token_id=1)
        model = transformers.ModernBertDecoderForCausalLM(transformers.ModernBertDecoderConfig(**size))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and ("lm_head" in name or "decoder.weight" in name or "embed" in name):
                weight.normal_(std=0.5)
    return model


def losses(kind: str) -> dict[str, float]:
    """Return the mean loss per token that SFTTrainer reports, the model's own, and that of the head's matrix alone."""
    model = decoder(kind)
    args = trl.SFTConfig(
        output_dir="out", report_to=[], use_cpu=True, disable_tqdm=True, bf16=False, per_device_eval_batch_size=8
    )
    data = Dataset.from_list([{"text": row} for row in rows])
    trainer = trl.SFTTrainer(
        model=model, args=args, train_dataset=data, eval_dataset=data, processing_class=tokenizer
    )
    trainer.remove_callback(transformers.PrinterCallback)
    found = {"SFTTrainer": trainer.evaluate()["eval_loss"]}
    batch = next(iter(trainer.get_eval_dataloader()))  # the trainer's own batch, through the model's usual forward
    with torch.no_grad():
        found["the model's own"] = model.eval()(**batch).loss.item()
        hidden = model.base_model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
        logits = model.get_output_embeddings()(hidden)[:, :-1]
        found["the last matrix alone"] = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch["labels"][:, 1:].flatten()
        ).item()
    return found


off, alone = {}, {}
for kind in ("Llama", "ModernBERT-decoder"):
    found = losses(kind)
    off[kind] = abs(found["SFTTrainer"] - found["the model's own"])
    alone[kind] = abs(found["SFTTrainer"] - found["the last matrix alone"])
    print(f"{kind}, loss per token: " + ", ".join(f"{name} {loss:.4f}" for name, loss in found.items()))
print("expected: SFTTrainer's is the model's own for both, up to rounding")
held = off["Llama"] < 1e-3 and off["ModernBERT-decoder"] > 0.1 and max(alone.values()) < 1e-3
print("as described above" if held else "CHANGED: not as described above")
sys.exit(not held)
PYTHON
