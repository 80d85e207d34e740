#!/usr/bin/env bash
# trl 1.16.0, peft 0.21.2, transformers 5.24.0, torch 2.13.0
#
# What happens: given a model with a trained adapter, DPOTrainer makes the reference as a second adapter "ref" and copies the
# parameters whose names contain ".default.". Names that end with ".default" are left at their fresh values: LoRA on
# embeddings, trainable_token_indices, and all of VeRA, IA3, LoHa and LoKr. Of these four the reference is the base; of the
# first two it is a part of the adapter.
#
# What one would expect: the reference is the adapter that was given, so that policy and reference begin equal and the first
# loss is ln 2, as it is for LoRA on linear layers. Nothing is said of it.
#
# Why it hurts: DPO after SFT is compared over adapter types, or with and without trained embeddings, and each is held to
# another reference: the penalty pulls some of them back to the base, before the SFT. KTOTrainer and GRPOTrainer copy alike.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq torch==2.13.0 transformers==5.24.0 peft==0.21.2 trl==1.16.0
cd "$work"
export HF_HOME="$work/cache" PYTHONWARNINGS=ignore::FutureWarning TRL_EXPERIMENTAL_SILENCE=1
"$work/venv/bin/python" - <<'PYTHON'
import math
import sys

import peft, torch, transformers, trl
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers

print(", ".join(f"{library.__name__} {library.__version__}" for library in (torch, transformers, peft, trl)))
disable_progress_bars()
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
words = [f"w{i}" for i in range(61)]
vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
raw.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
)
pairs = Dataset.from_list([{"prompt": f"w{i} ", "chosen": f"w{i} w2", "rejected": f"w3 w{i}"} for i in range(8)])
ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))
linear = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
kinds = {
    "LoRA, linear layers": peft.LoraConfig(r=4, **linear),
    "LoRA, also embed_tokens": peft.LoraConfig(r=4, **linear | {"target_modules": ["q_proj", "v_proj", "embed_tokens"]}),
    "LoRA and token embeddings": peft.LoraConfig(r=4, trainable_token_indices=[3, 4, 5], **linear),
    "VeRA": peft.VeraConfig(r=16, **linear),
    "IA3": peft.IA3Config(feedforward_modules=[], **linear),
    "LoHa": peft.LoHaConfig(r=4, **linear),
    "LoKr": peft.LoKrConfig(r=4, **linear),
}


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


def trained(config):
    """Return a saved and loaded adapter whose values are no fresh ones."""
    model = peft.get_peft_model(base(), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained("adapter")
    return peft.PeftModel.from_pretrained(base(), "adapter", is_trainable=True)


def first_step(config) -> tuple[float, float, float]:
    """Return DPO's first loss, and how far the reference's logits are from the adapter's and from the base's, at most."""
    model = trained(config)
    start = logits(model)
    arguments = trl.DPOConfig(
        output_dir="out", report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, max_steps=1, logging_steps=1,
        learning_rate=0.0, per_device_train_batch_size=8,
    )
    trainer = trl.DPOTrainer(model=model, args=arguments, train_dataset=pairs, processing_class=tokenizer)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    model.set_adapter("ref")
    reference = logits(model)
    return trainer.state.log_history[0]["loss"], *((reference - other).abs().max().item() for other in (start, logits(base())))


seen = {}
for name, config in kinds.items():
    seen[name] = first_step(config)
    print(
        f"{name}: first loss {seen[name][0]:.4f}; largest difference of the reference's logits from the adapter's "
        f"{seen[name][1]:.4f}, from the base's {seen[name][2]:.4f}"
    )
print(f"expected: first loss ln 2 = {math.log(2):.4f} and no difference from the adapter's, for each")
right = [name for name, (loss, off, _) in seen.items() if abs(loss - math.log(2)) < 1e-3 and off < 1e-3]
fresh = [name for name, (_, _, off) in seen.items() if off < 1e-3]
held = right == ["LoRA, linear layers"] and fresh == ["VeRA", "IA3", "LoHa", "LoKr"]
print("as described above" if held else "CHANGED: not as described above")
sys.exit(not held)
PYTHON
