"""Packed training against TRL's own trainers: the same numbers from fewer tokens."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.attention.flex_attention import create_mask
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.utils import DPODataCollatorWithPadding
from trl.trainer.utils import add_fused_lm_head

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from preference_step import orpo_row

from d2lora import data, worker
from d2lora.base import LOADED, Base
from d2lora.data import Subset, sft_examples
from d2lora.layouts import packing
from d2lora.layouts.families import Reach, Snapshot
from d2lora.outputs import Outputs
from d2lora.train import training

STEPS, BATCH = 50, 4
RATE = 2e-4  # Adam makes steps of this size even of gradients that are rounding: it bounds how far those can lead


@pytest.fixture(scope="module")
def pairs() -> list[dict]:
    """Pairs of very different lengths, with ids of the tiny model."""
    random = torch.Generator().manual_seed(0)

    def ids(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=random))
        return torch.randint(3, 900, (length,), generator=random).tolist()

    return [
        {"prompt_ids": ids(2, 40), "chosen_ids": ids(1, 20), "rejected_ids": ids(1, 20)} for _ in range(STEPS * BATCH)
    ]


def started(tiny: Path, warm: bool) -> PeftModel:
    """A fresh adapter on the tiny model, or one that a warm-up has moved."""
    base = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="sdpa")
    for weight in base.parameters():
        weight.data *= (
            4 if weight.dim() == 2 else 1
        )  # a model without opinions has gradients that are nothing but rounding
    torch.manual_seed(0)
    wrapped = get_peft_model(
        base,
        LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=4, target_modules="all-linear"),
    )
    if warm:
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1)
    return wrapped


def adapter(wrapped: PeftModel) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in wrapped.named_parameters() if "lora_" in n and ".ref." not in n}


def assert_same(found: dict, expected: dict, start: dict) -> None:
    for name, weight in expected.items():
        assert (found[name] - weight).abs().max() < 1e-5, f"{name}: {(found[name] - weight).abs().max():.1e}"
    assert max((weight - start[name]).abs().max() for name, weight in expected.items()) > 2e-3, "something was learned"


ARGUMENTS = {
    "per_device_train_batch_size": BATCH,
    "num_train_epochs": 1,
    "learning_rate": RATE,
    "lr_scheduler_type": "cosine",
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
    "seed": 0,
    "remove_unused_columns": False,
    "gradient_checkpointing": False,
    "bf16": False,
}  # fmt: skip


class PlainDPO(DPOTrainer):
    """TRL's, on ready ids: only its tokenization is skipped."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


class PlainORPO(ORPOTrainer):
    tokenize_row = orpo_row


def unpaired(examples: list[dict]) -> list[dict]:
    """Unpaired examples of our batches' pairs, in their order: the chosen answers of a batch, then the rejected ones. Ids are texts."""
    order = [examples[i] for i in data.shuffled(len(examples), "kto/0")]
    text = lambda ids: "".join(f"{i} " for i in ids)  # noqa: E731
    return [
        {"prompt": text(e["prompt_ids"]), "completion": text(e[f"{kind}_ids"]), "label": kind == "chosen"}
        for start in range(0, len(order), BATCH)
        for kind in ("chosen", "rejected")
        for e in order[start : start + BATCH]
    ]


def ids_of(tokenizer, text: str, **_) -> dict[str, list[int]]:
    """The ids of a text of `unpaired`, without the end that TRL adds."""
    return {"input_ids": [int(number) for number in text.split() if number.isdigit()]}


class PlainSimPO(CPOTrainer):
    tokenize_row = orpo_row  # the two have it in common


def losses(log: list[dict]) -> list[float]:
    """The losses of a log, of step 1 and then the mean of every two: what a record keeps of 50 steps."""
    return [entry["loss"] for entry in training.thin([entry for entry in log if "loss" in entry], 2)]


def plain(wrapped: PeftModel, tokenizer, method: dict, examples: list[dict], folder: Path) -> tuple[dict, list[float]]:
    """The adapter that TRL's own trainer makes of the examples, and its losses."""
    common = {"model": wrapped, "processing_class": tokenizer}
    if method["name"] == "sft":
        args = SFTConfig(str(folder), max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, **ARGUMENTS)
        trainer = SFTTrainer(args=args, train_dataset=Dataset.from_list(sft_examples(examples)), **common)
    elif method["name"] == "dpo":
        args = DPOConfig(str(folder), max_length=None, beta=method["beta"], **ARGUMENTS)
        trainer = PlainDPO(args=args, train_dataset=Dataset.from_list(examples), **common)
        if method["reference"] == "base":
            wrapped.delete_adapter("ref")
    elif method["name"] == "kto":
        own = {key: value for key, value in method.items() if key not in ("name", "reference")}
        args = KTOConfig(str(folder), max_length=512, **own, **ARGUMENTS | {"per_device_train_batch_size": 2 * BATCH})
        with mock.patch("trl.trainer.kto_trainer._tokenize", ids_of):
            trainer = KTOTrainer(args=args, train_dataset=Dataset.from_list(unpaired(examples)), **common)
        if method["reference"] == "base":
            wrapped.delete_adapter("ref")
    elif method["name"] == "simpo":
        own = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": method["beta"], "simpo_gamma": method["gamma"]}
        args = CPOConfig(str(folder), max_length=512, **own, **ARGUMENTS)
        trainer = PlainSimPO(args=args, train_dataset=Dataset.from_list(examples), **common)
    else:
        args = ORPOConfig(str(folder), max_length=512, beta=method["beta"], **ARGUMENTS)
        collator = DPODataCollatorWithPadding(tokenizer.pad_token_id)
        trainer = PlainORPO(args=args, train_dataset=Dataset.from_list(examples), data_collator=collator, **common)
    trainer.train()
    return adapter(wrapped), losses(trainer.state.log_history)


def ours(
    cell, base: Base, wrapped: PeftModel, method: dict, examples: list[dict], folder: Path, *more: str
) -> tuple[dict, list[float]]:
    """The adapter and the losses of our train(), through the recipe's packing."""
    chosen = [f"method={method['name']}", *(f"method.{k}={v}" for k, v in method.items() if k != "name")]
    sizes = [f"recipe.batch={BATCH}", f"recipe.micro_batch={BATCH}", "recipe.max_length=512", "method.epochs=1"]
    this = cell(*chosen, *sizes, *more)
    spec, recipe = replace(this.chain.adapt.spec, lr=RATE), this.config.recipe
    drawn = Subset(examples, list(range(len(examples))), [])
    metrics = training.train(base, wrapped, drawn, spec, recipe, folder, lambda *_: None, folder / "reference")
    return adapter(wrapped), losses(metrics["log"])


METHODS = [
    {"name": "sft"},
    {"name": "dpo", "beta": 0.1, "reference": "warm_start"},
    {"name": "dpo", "beta": 0.1, "reference": "base"},
    {"name": "orpo", "beta": 0.1, "nll": "prompt_and_chosen"},
    {"name": "simpo", "beta": 2.0, "gamma": 1.0},
    {"name": "kto", "beta": 0.1, "reference": "warm_start"},
    {"name": "kto", "beta": 0.1, "reference": "base", "desirable_weight": 1.5, "undesirable_weight": 0.5},
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: "-".join(map(str, m.values())))
@pytest.mark.parametrize(
    ("packed", "warm"),
    [
        pytest.param("prefix_shared", False, marks=pytest.mark.slow),
        ("prefix_shared", True),
        pytest.param("padded", True, marks=pytest.mark.slow),
    ],
    ids=["packed m=0", "packed m>0", "padded m>0"],
)
def test_after_50_steps_the_adapter_is_trl_s(cell, tiny, tmp_path, pairs, method, warm, packed) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    expected, expected_losses = plain(started(tiny, warm), tokenizer, method, pairs, tmp_path / "trl")
    wrapped = started(tiny, warm)
    base = Base("tiny", wrapped.get_base_model(), tokenizer, 0, Snapshot.of(wrapped.get_base_model()))
    start = adapter(wrapped)
    found, found_losses = ours(cell, base, wrapped, method, pairs, tmp_path / "ours", f"recipe.packing={packed}")
    assert_same(found, expected, start)
    assert found_losses == pytest.approx(expected_losses, abs=1e-5)


def test_a_pair_s_log_probabilities_are_those_of_separate_sequences(tiny, pairs) -> None:
    wrapped = started(tiny, warm=True)
    add_fused_lm_head(wrapped.get_base_model())
    packed = packing.pack(pairs[:8], packing.Layout(), 32)
    with torch.no_grad():
        found = packing.by_answer(packing.log_probs(wrapped, packed, packing.Layout()).log_probs, packed).sum(1)
        for index, pair in enumerate(pairs[:8]):
            for answer, got in ((pair["chosen_ids"], found[index]), (pair["rejected_ids"], found[index + 8])):
                ids = torch.tensor([pair["prompt_ids"] + answer])
                logps = wrapped(input_ids=ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
                assert float(got) == pytest.approx(float(logps[-len(answer) :].sum()), abs=5e-5)


def test_no_token_lies_in_a_batch_twice(pairs) -> None:
    packed = packing.pack(pairs[:16], packing.Layout(), 32)
    (rows,) = packed["passes"]
    needed = sum(len(ids) for pair in pairs[:16] for ids in pair.values())
    assert int((rows["sequence"] >= 0).sum()) == needed
    assert rows["ids"].numel() < 1.3 * needed
    assert len(packed["target"]) == sum(len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in pairs[:16])


def test_padded_texts_of_one_length_share_a_pass_and_little_is_padding(pairs) -> None:
    packed = packing.pack(pairs[:16], packing.Layout("padded"), 32)
    used = sum(int((rows["sequence"] >= 0).sum()) for rows in packed["passes"])
    laid = sum(rows["ids"].numel() for rows in packed["passes"])
    assert used == sum(2 * len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in pairs[:16])
    assert laid < 1.25 * used
    assert 1 < len(packed["passes"]) < 16


@pytest.mark.parametrize("reach", [Reach(), Reach("sliding", 6), Reach("chunked", 6)], ids=lambda r: r.kind)
def test_the_block_mask_of_flex_attention_is_the_boolean_mask(pairs, reach) -> None:
    (rows,) = packing.pack(pairs[:4], packing.Layout(), 32)["passes"]
    block = packing.attention(rows, reach, "flex_attention")
    count, length = rows["ids"].shape
    dense = create_mask(block.mask_mod, count, 1, length, length, device="cpu")
    assert torch.equal(dense, packing.attention(rows, reach))
    assert packing.attention(rows, reach).any(-1).all(), "a row of the mask without a True is NaN in softmax"


def test_flex_attention_gives_the_same_log_probabilities(tiny, pairs) -> None:
    """In one long row. Its kernels, and its backward pass, are for GPUs: here its plain form runs."""
    found = {}
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        for kind in ("sdpa", "flex_attention"):
            layout = packing.Layout(attention=kind)
            wrapped, packed = started(tiny, warm=True), packing.pack(pairs[:4], layout, 32)
            wrapped.get_base_model().set_attn_implementation(kind)
            add_fused_lm_head(wrapped.get_base_model())
            found[kind] = packing.by_answer(packing.log_probs(wrapped, packed, layout).log_probs, packed)
    assert torch.allclose(found["sdpa"], found["flex_attention"], atol=5e-5)


def test_the_reference_is_computed_once_for_nested_sizes_and_seeds(cell, tiny, tmp_path) -> None:
    """n = 20 then n = 30, another seed, another method setting: each pair of the order once."""
    from d2lora.store import Store

    computed = []
    for more in (
        ["n=20"],
        ["n=30"],
        ["n=30", "seed=1"],
        ["n=25", "method.beta=0.5"],
        ["n=30", "method.reference=base"],
    ):
        this = cell(f"model.path={tiny}", f"output={tmp_path}", "method=dpo", "method.epochs=1", *more)
        store = Store(Outputs.of(this.config).root)
        worker.do_stage(this.config, this.chain.adapt, store, lambda done, total: None)
        metrics = store.record(this.chain.adapt).metrics
        assert metrics["first_loss"] == pytest.approx(math.log(2), abs=1e-5)
        computed.append(metrics["reference_pairs_computed"])
    assert computed == [20, 10, 0, 0, 0]
    LOADED.clear()


def test_a_reference_remembered_wrongly_is_noticed(cell, tiny, tmp_path) -> None:
    from d2lora.store import Store

    this = cell(f"model.path={tiny}", f"output={tmp_path}", "method=dpo", "method.epochs=1", "n=20")
    store = Store(Outputs.of(this.config).root)
    worker.do_stage(this.config, this.chain.adapt, store, lambda done, total: None)
    for file in (tmp_path / "reference").rglob("*.json"):
        file.write_text(json.dumps([[a - 1, b] for a, b in json.loads(file.read_text())]))
    other = cell(f"model.path={tiny}", f"output={tmp_path}", "method=dpo", "method.epochs=1", "n=20", "seed=1")
    with pytest.raises(RuntimeError, match="DPO's reference is not the warm_start model"):
        worker.do_stage(other.config, other.chain.adapt, store, lambda done, total: None)
    LOADED.clear()


def test_subsets_look_ahead_to_a_whole_block() -> None:
    rows = [{"k": i} for i in range(47)]
    make = lambda row: {"input_ids": [0] * (1 + row["k"]), "labels": []}  # noqa: E731
    small, large = (data.subset(rows, make, n, 40, "s") for n in (13, 40))
    assert [len(small.examples), len(small.ahead), len(large.examples), len(large.ahead)] == [13, 7, 40, 0]
    assert large.examples[:20] == small.examples + small.ahead
    assert small.rows == large.rows[:13]
