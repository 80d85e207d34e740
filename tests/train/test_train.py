"""Both phases on a tiny random model, through the same path as everything else."""

import functools
import json
import math
import os
import re
from pathlib import Path

import peft
import pytest
import torch
from doing import adapter, alone, do, only
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.models.llama.modeling_llama import LlamaMLP

from d2lora import data, provenance, report, worker
from d2lora.adapters import attach
from d2lora.base import LOADED, load_base
from d2lora.outputs import Outputs
from d2lora.plan import Cell
from d2lora.records import Record
from d2lora.report.manifest import write_manifest
from d2lora.settings import METHOD_NAMES, METHODS, Model, method_of
from d2lora.settings.recipe import PASS_TOKENS
from d2lora.store import Store
from d2lora.train import training
from d2lora.train.methods import OBJECTIVES
from d2lora.train.sft import PackedSFTTrainer

TINY = [
    "recipe.lr.sft=1e-2",
    "recipe.lr.dpo=1e-2",
    "recipe.lr.orpo=1e-2",
    "recipe.lr.warmup=1e-2",
    "task.benchmark.lab_math.limit=4",
    "task.benchmark.lab_facts.limit=4",
]


@pytest.fixture
def make(cell, tiny: Path, tmp_path: Path):
    """make("n=8", ...) -> a cell of the tiny model."""
    return lambda *overrides: cell(f"model.path={tiny}", f"output={tmp_path / 'out'}", *TINY, *overrides)


def finish(cell: Cell) -> tuple[Store, dict[str, Record]]:
    store = do(cell)
    return store, {s.kind: record for s in cell.chain.stages if (record := store.record(s))}


def trained(cell: Cell) -> dict:
    """What is measured of the cell's adaptation, which nothing is evaluated after."""
    return do(alone(cell)).record(cell.chain.adapt).metrics


def proven(make, *overrides: str) -> Cell:
    """The cell, after another seed's: what is proven once a model is proven, and only a training is seen."""
    do(alone(make(*overrides, "seed=1")))
    return make(*overrides)


@pytest.mark.parametrize("method", METHOD_NAMES)
@pytest.mark.parametrize("packing", ["prefix_shared", "padded"])
def test_the_micro_batch_changes_nothing_beyond_rounding(
    make, method: str, packing: str, tmp_path: Path, monkeypatch
) -> None:
    """Also when n is no multiple of the batch, where the mean of micro-batches' means is another number; and by tokens."""
    monkeypatch.setitem(PASS_TOKENS, "cpu", 600)
    found = []
    for micro in (16, 4, 1, "auto"):
        cell = make(
            f"recipe.packing={packing}",
            f"method={method}",
            "n=22",
            "method.epochs=1",
            "recipe.batch=16",
            f"recipe.micro_batch={micro}",
            f"output={tmp_path / str(micro)}",
        )
        do(alone(cell))
        found.append(adapter(cell))
    for other in found[1:]:
        apart = sum(float((other[k] - w).square().sum()) for k, w in found[0].items()) ** 0.5
        size = sum(float(w.square().sum()) for w in found[0].values()) ** 0.5
        assert apart / size < 1e-3, f"relative distance {apart / size:.1e}"


def test_kto_s_kl_is_estimated_over_the_effective_batch(make, tmp_path: Path) -> None:
    """Also where a micro-batch, or the last batch of an epoch, is a single pair, which has no other prompt."""
    logs = []
    for micro in (8, 1):
        sizes = ["n=17", "method.epochs=3", "recipe.batch=8", f"recipe.micro_batch={micro}"]
        more = ["method.desirable_weight=4", f"output={tmp_path / str(micro)}"]
        logs.append(trained(make("method=kto", *sizes, *more))["log"])
    assert logs[0][0]["kl"] == 0, "nothing is learned yet: policy and reference are one"
    assert logs[0][0]["loss"] == pytest.approx((4 * 0.5 + 0.5) / 2, abs=1e-5)
    assert logs[0][-1]["kl"] > 1
    for key in ("kl", "loss"):
        assert [entry[key] for entry in logs[1]] == pytest.approx([entry[key] for entry in logs[0]], rel=1e-3, abs=1e-4)


def test_gradient_checkpointing_computes_each_layer_again_and_changes_nothing(
    make, tmp_path: Path, monkeypatch
) -> None:
    """Also though the base stays in evaluation mode while its adapter trains."""
    passes, adapters = [], []
    plain = LlamaMLP.forward

    def counted(self, x):
        passes[-1] += torch.is_grad_enabled()
        return plain(self, x)

    for on in ("false", "true"):
        how = [f"recipe.gradient_checkpointing={on}", f"output={tmp_path / on}"]
        cell = proven(make, "n=8", "method.epochs=1", *how)
        passes.append(0)
        with monkeypatch.context() as counting:
            counting.setattr(LlamaMLP, "forward", counted)
            do(alone(cell))
        adapters.append(adapter(cell))
    assert passes[1] == 2 * passes[0] > 0
    assert all(torch.equal(adapters[0][k], adapters[1][k]) for k in adapters[0])


@pytest.mark.parametrize("packing", ["prefix_shared", "padded"])
def test_all_methods_train_on_identical_ids(make, packing: str, tmp_path: Path) -> None:
    """What goes through the model in a step of four pairs: not what data.py made of them, but what the trainers did with that."""
    seen: dict[str, list[list[int]]] = {}
    for method in METHOD_NAMES:
        given = ["method.epochs=1", "recipe.batch=4", "recipe.micro_batch=1", f"recipe.packing={packing}"]
        cell = proven(make, f"method={method}", "n=4", *given)
        base = load_base(cell.config.model, tmp_path)
        begin = base.tokenizer.bos_token_id
        rows = seen[method] = []

        def note(module, arguments, rows=rows, begin=begin) -> None:
            if torch.is_grad_enabled():  # neither the reference nor the proof of the layout
                rows.extend([begin, *(i for i in row if i != begin)] for row in arguments[0].tolist())  # it pads, too

        hook = base.model.get_input_embeddings().register_forward_pre_hook(note)
        do(alone(cell))
        hook.remove()
    render = functools.partial(data.pair_example, base.tokenizer, cell.config.task)
    drawn = data.subset(data.rows(cell.config.task.data), render, 4, cell.config.recipe.max_length, "task/0").examples
    pairs = [tuple(e[f"{part}_ids"] for part in ("prompt", "chosen", "rejected")) for e in drawn]
    assert sorted(seen["sft"]) == sorted(p + c for p, c, _ in pairs)
    packed = [p + c + r for p, c, r in pairs]
    padded = [p + answer for p, c, r in pairs for answer in (c, r)]
    for method in (m for m in METHOD_NAMES if method_of(m).needs_pairs):
        assert sorted(seen[method]) == sorted(packed if packing == "prefix_shared" else padded), method


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_dropout_is_at_work_in_training_and_not_in_the_reference(
    make, method: str, tmp_path: Path, monkeypatch
) -> None:
    modes: list[tuple[bool, bool, float]] = []
    plain = torch.nn.Dropout.forward

    def note(self, x):
        modes.append((torch.is_grad_enabled(), self.training, self.p))
        return plain(self, x)

    cell = proven(make, f"method={method}", "n=16", "method.epochs=1", "recipe.lora.dropout=0.1")
    monkeypatch.setattr(torch.nn.Dropout, "forward", note)
    do(alone(cell))
    assert set(modes) == {(True, True, 0.1), (False, False, 0.1)}, "the latter where an adapter is read again"


@pytest.mark.parametrize("m", [0, 16])
def test_dpo_s_first_loss_is_ln_2_from_the_warm_start(make, m: int) -> None:
    metrics = trained(make("method=dpo", "n=16", f"m={m}", "method.epochs=1"))
    assert metrics["first_loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_dpo_takes_a_single_pair(make) -> None:
    metrics = trained(make("method=dpo", "n=1", "method.epochs=1"))
    assert metrics["first_loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_dpo_s_reference_can_be_the_base(make) -> None:
    """Without warm-up both are one; after a warm-up the policy has left the base and the first loss shows it."""
    cold = trained(make("method=dpo", "n=16", "m=0", "method.epochs=1", "method.reference=base"))
    assert cold["first_loss"] == pytest.approx(math.log(2), abs=1e-5)
    warm = trained(make("method=dpo", "n=16", "m=64", "method.epochs=1", "method.reference=base"))
    assert abs(warm["first_loss"] - math.log(2)) > 1e-3


def test_an_adapter_is_the_same_as_the_first_or_the_last_of_a_process(make, tmp_path: Path) -> None:
    first = make("method=dpo", "n=16", "m=16", "method.epochs=1")
    do(alone(first))
    finish(make("method=sft", "n=8", "init=gaussian", "method.epochs=1"))
    trained(make("method=orpo", "n=8", "init=gaussian", "method.epochs=1"))
    again = make("method=dpo", "n=16", "m=16", "method.epochs=1", f"output={tmp_path / 'again'}")
    do(alone(again))
    for name, weight in adapter(first).items():
        assert torch.equal(weight, adapter(again)[name]), name


def test_anyone_can_load_the_adapter(make, tiny: Path) -> None:
    cell = make("n=16", "m=16", "method.epochs=1")
    store = do(alone(cell))
    base = AutoModelForCausalLM.from_pretrained(tiny)
    ids = torch.arange(10)[None]
    before = base(input_ids=ids).logits
    loaded = PeftModel.from_pretrained(base, store.folder(cell.chain.adapt) / "adapter")
    assert not torch.equal(before, loaded(input_ids=ids).logits)


def test_the_base_is_as_it_was(make, tiny: Path, tmp_path: Path) -> None:
    cell = make("method=orpo", "n=16", "m=16", "method.epochs=1")
    finish(cell)
    base = load_base(cell.config.model, tmp_path)
    fresh = AutoModelForCausalLM.from_pretrained(tiny)
    ids = torch.arange(10)[None]
    assert torch.equal(base.model(input_ids=ids).logits, fresh(input_ids=ids).logits)
    assert {n for n, _ in base.model.named_modules()} == {n for n, _ in fresh.named_modules()}


def test_a_base_that_was_changed_is_noticed(tiny: Path, tmp_path: Path) -> None:
    base = load_base(Model(name="tiny", path=str(tiny)), tmp_path)
    with torch.no_grad():
        base.model.lm_head.weight[0, 0] += 1
    with pytest.raises(RuntimeError, match="changed by an earlier stage"):
        base.check()
    LOADED.clear()


def test_adapters_are_float32_on_a_bfloat16_base(make) -> None:
    cell = make("n=16", "model.dtype=bfloat16", "method.epochs=1")
    do(alone(cell))
    assert {w.dtype for w in adapter(cell).values()} == {torch.float32}
    LOADED.clear()


def test_orpo_s_nll_covers_what_the_config_says(make) -> None:
    losses = {}
    for nll in ("prompt_and_chosen", "completion"):
        losses[nll] = trained(make("method=orpo", "n=16", "method.epochs=1", f"method.nll={nll}"))["first_loss"]
    assert losses["prompt_and_chosen"] != pytest.approx(losses["completion"], rel=1e-4)


@pytest.mark.parametrize("packing", ["prefix_shared", "padded"])
def test_a_machine_with_several_gpus_trains_on_one(make, packing: str, monkeypatch) -> None:
    """Trainer would spread a batch over all it sees, and make it as many times larger."""
    plain = TrainingArguments._setup_devices.func

    def two(self):
        device, self._n_gpu = plain(self), 2
        return device

    found = functools.cached_property(two)
    found.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", found)
    cell = make("n=24", f"recipe.packing={packing}", "method.epochs=1")
    assert trained(cell)["steps"] == 24 // cell.config.recipe.batch


def failed(cell: Cell) -> str:
    """Why the cell's only failed stage failed."""
    cell = only(cell, *cell.chain.results)
    lost = worker.do(cell.config, cell, Store(Outputs.of(cell.config).root), lambda stage: lambda done, total: None)
    assert lost[0] is cell.chain.adapt
    return json.loads(Outputs.of(cell.config).failed(lost[0].key).read_text())["error"]


def test_each_method_has_an_objective() -> None:
    assert tuple(OBJECTIVES) == METHODS


@pytest.mark.parametrize("packing", ["prefix_shared", "padded"])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_a_loss_that_is_no_number_stops_the_stage_and_says_where(make, method: str, packing: str, monkeypatch) -> None:
    cell = make(f"method={method}", "n=24", "recipe.micro_batch=4", f"recipe.packing={packing}", "method.epochs=1")
    trainer, batches = OBJECTIVES[method_of(method)].trainer, []
    plain = trainer.compute_loss

    def compute_loss(self, *args, **more):
        batches.append(1)
        return plain(self, *args, **more) * (float("nan") if len(batches) == 4 else 1.0)

    monkeypatch.setattr(trainer, "compute_loss", compute_loss)
    told = failed(cell)
    assert "the loss is nan at step 2, on rows" in told
    named = [int(row) for row in re.search(r"rows ([\d, ]+) of", told)[1].split(",")]
    rows = data.rows(cell.config.task.data)
    assert len(set(named)) == 4
    assert {row - 1 for row in named} <= set(data.shuffled(len(rows), "task/0")[:30])  # counted from 1, as in the file


def test_weights_that_are_no_number_after_the_last_step_are_not_published(make, monkeypatch) -> None:
    plain = PackedSFTTrainer.train

    def trained(self, **more):
        plain(self, **more)
        next(p for p in self.model.parameters() if p.requires_grad).data[0] = float("nan")

    monkeypatch.setattr(PackedSFTTrainer, "train", trained)
    assert "weights that are no number" in failed(make("n=8", "method.epochs=1"))


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux can reset a process's peak")
@pytest.mark.skipif(torch.cuda.is_available(), reason="of a GPU, torch says it")
def test_a_stage_s_peak_memory_on_a_cpu_is_its_own() -> None:
    provenance.reset_peak_memory()
    before, large = provenance.peak_memory_mb(), b"x" * 300 * 2**20
    during = provenance.peak_memory_mb()
    del large
    provenance.reset_peak_memory()
    assert during > before + 250
    assert provenance.peak_memory_mb() < during - 250


@pytest.mark.parametrize(("system", "unit"), [("linux", 2**10), ("darwin", 1)])
def test_where_the_system_has_no_proc_the_peak_is_the_process_s(monkeypatch, tmp_path: Path, system: str, unit) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(provenance, "_PROC", tmp_path / "none")
    monkeypatch.setattr("sys.platform", system)
    monkeypatch.setattr("resource.getrusage", lambda who: type("Usage", (), {"ru_maxrss": 3 * 2**30 // unit}))
    provenance.reset_peak_memory()
    assert provenance.peak_memory_mb() == 3 * 2**10


def test_a_record_says_where_its_numbers_came_from(make) -> None:
    cell = make("n=16", "m=16")
    store, records = finish(only(cell, *cell.chain.stages))
    for stage in cell.chain.stages:
        record = store.record(stage)
        assert record.spec == stage.spec.content()
        assert record.parent == (stage.parent.key if stage.parent else None)
        assert {"packages", "python", "git", "hardware", "threads", "started"} <= set(record.provenance.as_read())
        assert record.seconds > 0
        assert record.peak_memory_mb > 0
        assert all(data.digest(store.folder(stage) / name) == digest for name, digest in record.files.items())
    assert records["adapt"].data.samples == 16
    assert records["adapt"].metrics["samples_seen"] == 32
    for stage, names in zip(cell.chain.evaluations, (["accuracy"], ["acc", "acc_norm"]), strict=True):
        scores = store.record(stage).scores
        items = [json.loads(line) for line in (store.folder(stage) / "items.jsonl").read_text().splitlines()]
        assert sorted(scores) == names
        for name, score in scores.items():
            assert score.items == len(items) == 4
            assert score.value == pytest.approx(sum(item[name] for item in items) / 4)


def test_an_adapter_that_is_not_applied_is_an_error(make, monkeypatch, tmp_path: Path) -> None:
    cell = make("n=16", "method.epochs=1")
    store = do(alone(cell))
    base = load_base(cell.config.model, tmp_path)
    monkeypatch.setattr(peft.tuners.lora.Linear, "forward", lambda self, x: self.base_layer(x))
    with (
        pytest.raises(RuntimeError, match="not applied"),
        attach.trained(base, store.folder(cell.chain.adapt) / "adapter"),
    ):
        pass


def test_an_adapter_is_merged_once_for_evaluations_that_follow_each_other(make, tmp_path: Path) -> None:
    cell = make("n=16", "method.epochs=1")
    folder = do(alone(cell)).folder(cell.chain.adapt) / "adapter"
    base = load_base(cell.config.model, tmp_path)

    def tested() -> torch.nn.Module:
        with attach.trained(base, folder) as (model, changes):
            assert changes
        return model

    first = tested()
    assert tested() is first
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, folder / "adapter_model.safetensors")
    other = tested()
    assert other is not first
    key = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(first.state_dict()[key], other.state_dict()[key])


def test_an_adapter_that_bfloat16_rounds_away_is_applied_and_the_table_says_what_it_is(make, capsys) -> None:
    """As after few steps at the paper's learning rates."""
    cell = make("n=8", "method.epochs=1", "recipe.lr.sft=1e-8", "model.dtype=bfloat16")
    _, records = finish(cell)
    assert "no GPU here: lab runs in bfloat16 on the CPU, slowly" in capsys.readouterr().err
    assert any(w.any() for name, w in adapter(cell).items() if "lora_B" in name)
    assert records["evaluate"].adapter_changes_logits is False
    write_manifest(Outputs.of(cell.config).root, [cell])
    text = report.finish(Outputs.of(cell.config).root, cell.config.sweep, draw=False)
    assert "In 2 of 2 evaluations of adapters the adapter was too small to change a logit" in text
    larger = make("n=8", "method.epochs=1", "model.dtype=bfloat16")
    assert finish(larger)[1]["evaluate"].adapter_changes_logits is True
    LOADED.clear()


def test_ids_of_the_lab_fit_the_recipe(cell) -> None:
    from transformers import AutoTokenizer

    config = cell().config
    tokenizer = AutoTokenizer.from_pretrained(data.ROOT / "d2lora/lab/base")
    make = functools.partial(data.pair_example, tokenizer, config.task)
    assert data.subset(data.rows(config.task.data), make, 200, config.recipe.max_length, "s").misfits == []


def test_a_log_written_often_is_thinned_to_what_one_written_seldom_says() -> None:
    """Steps 1, 2, 4, 6, 8, 10 with windows of 1, 1, 2, 2, 2, 2 steps, to an entry every 4 steps."""

    often = [
        {"step": s, "loss": float(s), "rewards/margins": 2.0 * s, "grad_norm": s, "epoch": s / 10}
        for s in (1, 2, 4, 6, 8)
    ]
    kept = training.thin(often, 4)
    assert [e["step"] for e in kept] == [1, 4, 8]
    assert [e["loss"] for e in kept] == [1.0, pytest.approx((2 + 2 * 4) / 3), 7.0]
    assert kept[1]["rewards/margins"] == pytest.approx(2 * kept[1]["loss"])
    assert (kept[2]["grad_norm"], kept[2]["epoch"]) == (8, 0.8)
    assert training.thin(often, 1) == often
