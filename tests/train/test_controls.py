"""The control arms on a tiny random model: what each trains on, what it shares, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import composing
import pytest
import torch
from doing import alone, do
from peft import PeftModel
from transformers import AutoModelForCausalLM

from d2lora import data, plan
from d2lora.data.conversations import conversation
from d2lora.errors import UserError
from d2lora.plan import Cell
from d2lora.records import Record
from d2lora.stages import Stage
from d2lora.store import Store

SMALL = ["recipe.batch=4", "recipe.micro_batch=4", "recipe.lora.r=4", "recipe.lora.alpha=8", "n=8", "m=16"]
SMALL += [f"recipe.lr.{phase}=1e-3" for phase in ("warmup", "sft", "dpo", "orpo")]
IDS = torch.arange(20, 44)[None]


@pytest.fixture(scope="module")
def make(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Cell]:
    """make("control=longer", ...) -> a cell of the tiny model; all share one output, so each stage is done once."""
    output = tmp_path_factory.mktemp("out")
    return lambda *overrides: composing.cell(f"model.path={tiny}", f"output={output}", *SMALL, *overrides)


def record(cell: Cell, stage: Stage | None) -> Record:
    assert stage is not None
    found = do(alone(cell)).record(stage)
    assert found is not None
    return found


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS).logits.float()


def adapted(tiny: Path, store: Store, stage: Stage) -> torch.Tensor:
    """The logits that anyone gets who loads the adapter of a stage on the base."""
    base = AutoModelForCausalLM.from_pretrained(tiny)
    return logits(PeftModel.from_pretrained(base, store.folder(stage) / "adapter").eval())


def test_without_general_samples_or_task_rows_there_is_nothing_to_control(make) -> None:
    for control in ("longer", "mixed", "merged", "placebo"):
        assert make(f"control={control}", "m=0").id == make("m=0").id
        same = make(f"control={control}", "n=0").id == make("n=0").id
        assert same == (control != "placebo"), "a placebo is a warm-up too"
        assert make(f"control={control}").id != make().id


def test_an_arm_shares_what_it_can(make) -> None:
    d2lora, lora = make().chain, make("m=0").chain
    merged, placebo = make("control=merged").chain, make("control=placebo").chain
    assert (merged.warmup, merged.adapt) == (d2lora.warmup, lora.adapt)
    assert merged.merge is not None
    assert merged.merge.parents == (lora.adapt, d2lora.warmup)
    assert placebo.warmup != d2lora.warmup
    assert make("control=longer").chain.warmup is None
    light = make("control=merged", "control.weight=0.5").chain.merge
    assert light is not None
    assert light.key != merged.merge.key


def test_a_grid_hands_an_arm_out_after_what_it_waits_for(make) -> None:
    cells = [make("control=merged"), make("m=0"), make(), make("control=longer"), make("control=placebo")]
    finished: set[str] = set()
    for batch in plan.batches(cells, set()):
        assert all(stage.key in finished for job in batch for stage in job.waits_for)
        finished |= {stage.key for job in batch for stage in job.stages}
    assert finished == {stage.key for stage in plan.stages(cells)}


@pytest.mark.parametrize("method", ["sft", "dpo", "orpo"])
def test_longer_sees_as_many_tokens_as_both_phases(make, method: str) -> None:
    both, longer = make(f"method={method}"), make(f"method={method}", "control=longer")
    apart = [record(both, stage).metrics["tokens_seen"] for stage in (both.chain.warmup, both.chain.adapt)]
    seen = record(longer, longer.chain.adapt)
    assert seen.metrics["tokens_seen"] == pytest.approx(sum(apart), abs=1)
    assert seen.data is not None
    assert seen.data.samples == 8
    assert seen.metrics["steps"] > record(both, both.chain.adapt).metrics["steps"]


def test_mixed_sees_the_rows_of_both_phases_once_more_than_each(make) -> None:
    both, mixed = make(), make("control=mixed")
    apart = [record(both, stage).metrics for stage in (both.chain.warmup, both.chain.adapt)]
    seen = record(mixed, mixed.chain.adapt)
    for what in ("tokens_seen", "samples_seen"):
        assert seen.metrics[what] == sum(metrics[what] for metrics in apart)
    assert seen.data is not None
    assert (seen.data.samples, seen.data.general.samples) == (8, 16)


def test_a_placebo_has_the_answers_of_other_rows(make) -> None:
    rows = data.rows(make().config.warmup.data)[:20]
    others = data.exchanged(rows, "chosen", "placebo/0")
    before, after = ([conversation(row["chosen"]) for row in each] for each in (rows, others))
    assert [c.learned for c in before] == [c.learned for c in after]
    said = lambda c, role: [m["content"] for m in c.messages if m["role"] == role]  # noqa: E731
    assert [said(c, "user") for c in before] == [said(c, "user") for c in after]
    first, second = ([said(c, "assistant")[0] for c in each] for each in (before, after))
    assert sorted(first) == sorted(second), "each row's answers go to one other row"
    assert all(a != b for a, b in zip(first, second, strict=True) if first.count(a) == 1)
    assert data.exchanged(rows, "chosen", "placebo/0") == others != data.exchanged(rows, "chosen", "placebo/1")
    cell = make("control=placebo")
    assert (
        record(cell, cell.chain.warmup).metrics["first_loss"]
        != record(make(), make().chain.warmup).metrics["first_loss"]
    )


@pytest.mark.parametrize("init", ["lora", "pissa", "multilora", "eva", "rslora"])
def test_merged_is_the_exact_sum_of_both_adapters(make, tiny: Path, init: str) -> None:
    more = ["init.samples=8"] if init == "eva" else []
    cell = make(f"init={init}", *more, "control=merged", "control.weight=0.5")
    store, chain = do(alone(cell)), cell.chain
    assert chain.merge is not None
    base, expected = (AutoModelForCausalLM.from_pretrained(tiny) for _ in range(2))
    for stage, weight in ((chain.adapt, 1.0), (chain.warmup, 0.5)):
        assert stage is not None
        other = AutoModelForCausalLM.from_pretrained(tiny)
        merged = PeftModel.from_pretrained(other, store.folder(stage) / "adapter").merge_and_unload()
        for name, parameter in expected.named_parameters():
            parameter.data += weight * (merged.get_parameter(name).data - base.get_parameter(name).data)
    found = adapted(tiny, store, chain.merge)
    assert (found - logits(expected)).abs().max() < 1e-4
    assert (found - logits(base)).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["control=mixed", "method=dpo"], "control=mixed: needs method=sft"),
        (["control=merged", "init=loftq"], "control=merged: with init=loftq two adapters have no sum"),
        (["control=merged", "init=dora"], "control=merged: with init=dora two adapters have no sum"),
        (["control=placebo", "+warmup.rendered=true"], "control=placebo: needs conversations"),
        (["control=merged", "control.weight=0"], "control.weight=0"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(make, overrides: list[str], line: str) -> None:
    with pytest.raises(UserError, match=line):
        make(*overrides)
