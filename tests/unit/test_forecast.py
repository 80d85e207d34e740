"""What a plan says before it is paid for: what the design can find, time, memory and cost. Records are made up."""

import re
from pathlib import Path

import made
import pytest

from d2lora import stats
from d2lora.command import findable, sizes
from d2lora.command.forecast import Forecast
from d2lora.command.summary import plan_text
from d2lora.errors import UserError
from d2lora.outputs import Outputs, write_json
from d2lora.plan import Cell
from d2lora.report.manifest import read_manifest
from d2lora.settings import Data
from d2lora.stages import Stage
from d2lora.stages.base_facts import shape_file
from d2lora.store import Store

LIMITS = ("task.benchmark.lab_math.limit=40", "task.benchmark.lab_facts.limit=40")


def lab(cell, output: Path, *overrides: str) -> Cell:
    return cell(f"output={output}", "sweep=mine", *LIMITS, *overrides)


def publish(store: Store, stage: Stage, **facts: object) -> None:
    store.ensure(stage, lambda folder: made.record(stage, **facts))


def training(store: Store, cell: Cell, tokens: int, seconds: float, **facts: object) -> None:
    stage = cell.chain.adapt
    publish(store, stage, metrics={"samples_seen": stage.samples, "tokens_seen": tokens}, seconds=seconds, **facts)


def test_stages_between_measured_sizes_are_on_the_line_through_them(cell, tmp_path: Path) -> None:
    store = Store(tmp_path)
    training(store, lab(cell, tmp_path, "n=10"), 200, 3.0, peak_memory_mb=900.0)
    training(store, lab(cell, tmp_path, "n=100"), 2000, 12.0, peak_memory_mb=1000.0)
    half = lab(cell, tmp_path, "n=50", "seed=1")
    estimate = Forecast([half], store).of(half.chain.adapt)
    assert estimate.seconds == pytest.approx(2 + 0.005 * 1000), "2 s, and 5 ms for each of 50 x 2 x 10 tokens"
    assert estimate.memory == 1000 * 2**20, "the most that was measured"
    assert len(estimate.keys) == 2


def test_stages_of_another_size_than_the_only_one_measured_are_scaled_less_than_in_proportion(
    cell, tmp_path: Path
) -> None:
    """A stage has seconds of its own beside its tokens: a hundred times as many do not take a hundred times as long."""
    store = Store(tmp_path)
    training(store, lab(cell, tmp_path, "n=10"), 200, 3.0)
    seconds = {}
    for n in (10, 100, 1000):
        other = lab(cell, tmp_path, f"n={n}", "seed=1")
        seconds[n] = Forecast([other], store).of(other.chain.adapt).seconds
    assert seconds[10] == pytest.approx(3.0)
    assert 3.0 < seconds[100] < 30
    assert seconds[100] < seconds[1000] < 300


def test_an_item_takes_as_long_under_another_limit_and_another_model_is_another(cell, tmp_path: Path) -> None:
    store = Store(tmp_path)
    made.publish(tmp_path, [lab(cell, tmp_path, "n=0")])
    stage = lab(cell, tmp_path, "n=10").chain.evaluations[0]
    mine = lab(cell, tmp_path, "n=10")
    assert Forecast([mine], store).of(stage).seconds == pytest.approx(1.0), "40 items in a second, adapter or not"
    whole = cell(f"output={tmp_path}", "n=10", "task.benchmark.lab_math.limit=80")
    assert Forecast([whole], store).of(whole.chain.evaluations[0]).keys
    other = lab(cell, tmp_path, "n=10", "model.dtype=bfloat16")
    assert not Forecast([other], store).of(other.chain.evaluations[0]).keys


def test_an_evaluation_of_a_larger_model_is_not_forecast_by_a_smaller_one_s_seconds(cell, tmp_path: Path) -> None:
    """The 40 items of the 1 M model's record took a second; a model of other files has no record, and is computed."""
    made.publish(tmp_path, [lab(cell, tmp_path, "n=0")])
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    large = lab(cell, tmp_path, "n=0", f"model.path={folder}", "model.name=large-135m")
    stage = large.chain.evaluations[0]
    estimate = Forecast([large], Store(tmp_path)).of(stage)
    assert not estimate.keys
    assert any("135 M parameters" in words for words in estimate.assumed)
    assert estimate.seconds > 10


def test_the_time_is_that_of_the_busiest_worker_with_its_start_and_the_report(cell, tmp_path: Path) -> None:
    store = Store(tmp_path)
    training(store, lab(cell, tmp_path, "n=10"), 200, 100.0, load_seconds=4.0)
    grid = made.cells(lab(cell, tmp_path, "n=10").config, seed=[1, 2, 3])
    alone, two, three = (Forecast(grid, store, workers).seconds for workers in (1, 2, 3))
    assert 300 < alone < 330
    assert 200 < two < 230, "two trainings after each other, whatever the third's worker does"
    assert 100 < three < 130


def test_a_plan_never_says_that_the_time_is_unknown(cell, tmp_path: Path) -> None:
    for overrides in (["n=10"], ["n=all", "scale=paper"], ["n=all", "m=all", "scale=paper", "method=dpo", "plan.gpu=a100"], ["init=pissa", "n=4"],
                      ["model.dtype=bfloat16"], ["n=8", "m=8", "control=merged"], ["n=8", "m=8", "control=longer"]):  # fmt: skip
        text = plan_text([cell(f"output={tmp_path}", *overrides)], Store(tmp_path))
        assert "unknown" not in text
        assert text.splitlines()[-1].startswith("  about ")
    assert "10,000 rows assumed where all are meant" in plan_text(
        [cell(f"output={tmp_path}", "n=all", "scale=paper")], Store(tmp_path)
    )


def test_flop_of_the_methods_at_a_gpu_s_rate(cell, tmp_path: Path) -> None:
    """8 B parameters by the model's name, 4 N FLOP a token of SFT; a reference's forward pass, once in DPO's four epochs."""
    found = {}
    for method in ("sft", "dpo", "kto"):
        c = cell(f"output={tmp_path}", "scale=paper", f"method={method}", "n=1000", "plan.gpu=h100", "method.epochs=4")
        found[method] = Forecast([c], Store(tmp_path)).of(c.chain.adapt).seconds - 0.6  # what a stage takes beside
    tokens, rate = 4 * 1000 * 2048 / 4, 989e12 * 0.14
    assert found["sft"] == pytest.approx(4 * 8e9 * tokens / rate)
    assert found["dpo"] == pytest.approx(4.5 * 8e9 * tokens / rate)
    assert found["kto"] == pytest.approx(6.5 * 8e9 * tokens / rate)


def test_a_named_gpu_is_not_forecast_from_a_processor_s_records(cell, tmp_path: Path) -> None:
    store = Store(tmp_path)
    training(store, lab(cell, tmp_path, "n=10"), 200, 3.0)
    priced = lab(cell, tmp_path, "n=10", "seed=1", "plan.gpu=h200", "plan.price=3600")
    lines = Forecast([priced], store, workers=2).lines()
    adapt = next(line for line in lines if line.startswith("  adapt"))
    assert "from H200's 989 TFLOP/s at 14 % MFU, as an earlier build, 1 M parameters" in adapt
    assert "GPU-hours, peak" in adapt
    seconds = Forecast([priced], store, workers=2).seconds
    assert (
        lines[-1] == f"  about {seconds:.0f} s with 2 workers, {seconds * 2 / 3600:.2f} GPU-hours, ${2 * seconds:,.2f}"
    )
    measured = made.PROVENANCE | {"hardware": {"machine": "x86_64", "gpu": "NVIDIA H200"}}
    training(store, lab(cell, tmp_path, "n=11"), 220, 3.0, provenance=measured)
    assert "measured here on 1 record" in "".join(Forecast([priced], store).lines())


def test_too_much_memory_is_said(cell, tmp_path: Path) -> None:
    fits, not_ = (
        cell(
            f"output={tmp_path}", "scale=paper", "n=10", "plan.gpu=h100", f"recipe.batch={b}", f"recipe.micro_batch={b}"
        )
        for b in (4, 64)
    )
    assert "more than" not in "".join(Forecast([fits], Store(tmp_path)).lines())
    assert "(more than the 80 GB there are)" in "".join(Forecast([not_], Store(tmp_path)).lines())


def test_passes_by_tokens_are_forecast_to_fit(cell, tmp_path: Path) -> None:
    """Where memory would end they are halved, as in a training; a typed micro-batch is taken as it is."""

    def peak(*more: str) -> float:
        one = cell(f"output={tmp_path}", "scale=paper", "n=10", *more)
        return Forecast([one], Store(tmp_path)).of(one.chain.adapt).memory

    doubled = "model.dtype=float32"
    assert peak("plan.gpu=h200", doubled) > 80e9 > peak("plan.gpu=h100", doubled)
    assert peak("plan.gpu=h100") > peak("plan.gpu=h100", "recipe.gradient_checkpointing=true")
    assert peak("plan.gpu=h100") < 80e9 < peak("plan.gpu=h100", "recipe.micro_batch=16")
    assert peak("plan.gpu=h200") == peak("plan.gpu=h200", "recipe.batch=64"), "8,192 tokens at most"


def test_the_lab_s_size_is_read_from_its_files_and_others_are_remembered_or_named(cell, tmp_path: Path) -> None:
    shape = sizes.shape_of(cell(f"output={tmp_path}").config)
    assert (shape.parameters, shape.layers, shape.hidden, shape.kv, shape.vocabulary) == (984_192, 4, 128, 128, 1024)
    paper = cell(f"output={tmp_path}", "scale=paper").config
    assert sizes.shape_of(paper).assumed == "8.0 B parameters by its name"
    assert 25 < sizes.shape_of(paper).layers < 40
    small = cell(f"output={tmp_path}", "scale=paper", "model=smollm2-135m").config
    assert sizes.shape_of(small).assumed == "135 M parameters by its name"
    remembered = {"parameters": 8_030_261_248, "layers": 32, "hidden": 4096, "kv": 1024, "vocabulary": 128_256}
    write_json(shape_file(paper), remembered)
    assert sizes.shape_of(paper) == sizes.Shape(**remembered)


def test_items_are_the_limit_or_the_rows_that_are_known(cell, tmp_path: Path) -> None:
    paper, here = cell(f"output={tmp_path}", "scale=paper").config, cell(f"output={tmp_path}").config
    assert sizes.items_of(here, here.task.benchmark["lab_math"]) == 500
    assert sizes.items_of(paper, paper.task.benchmark["gsm8k"]) == 1319
    assert sizes.items_of(paper, paper.task.benchmark["arc_easy"]) == 2376
    unread = paper.task.benchmark["gsm8k"].model_copy(update={"data": Data(path="some/set", revision="main")})
    assert sizes.items_of(paper, unread) is None
    assert sizes.items_of(paper, unread.model_copy(update={"limit": 7})) == 7


# --- what a design can find ----------------------------------------------------------------------------------------------


def found(output: Path, grid: list[Cell]) -> list[str]:
    return findable.lines(grid, Store(output))


def test_without_measurements_the_assumed_spreads_are_named(cell, tmp_path: Path) -> None:
    base = cell(f"output={tmp_path}", "scale=paper", "report.margin=3").config
    grid = [c for seed in range(3) for c in made.cells(base.model_copy(update={"seed": seed}), m=[0, 40], n=[10])]
    gsm8k, arc = found(tmp_path, grid)
    effect = stats.smallest_effect(1319, 3, 0.224, 0.022)
    assert gsm8k == (
        f"  gsm8k: with 1,319 items and 3 replicates differences from {100 * effect:.1f} points on, four times in five; "
        f"for 3 points: {stats.replicates_needed(0.03, 1319, 0.224, 0.022)} replicates (spreads assumed as in docs/statistics.md)"
    )
    assert arc.startswith("  arc_easy: with 2,376 items")


def test_titles_are_not_right_or_wrong(cell, tmp_path: Path) -> None:
    grid = made.cells(cell(f"output={tmp_path}", "task=lab_title").config, m=[0, 8], n=[8])
    assert [line.split(":")[0] for line in found(tmp_path, grid)] == ["  lab_facts"]


def test_one_training_finds_differences_between_these_trainings_only(cell, tmp_path: Path) -> None:
    grid = made.cells(cell(f"output={tmp_path}").config, m=[0, 8], n=[8])
    line = found(tmp_path, grid)[0]
    single = stats.smallest_effect(500, 1, 0.447, 0.0)
    assert (
        f"with 500 items and 1 replicate differences from {100 * single:.1f} points on, between these trainings only"
        in line
    )
    assert "; with 3 replicates from " in line
    assert found(tmp_path, grid[:1]) == [], "nothing to compare"


def test_spreads_are_those_of_the_store_s_pairs(cell, tmp_path: Path) -> None:
    """More replicates and more items find smaller differences; the records' spreads are said and used."""
    grid = [
        c
        for seed in range(4)
        for c in made.cells(lab(cell, tmp_path, "method=sft").config.model_copy(update={"seed": seed}), m=[0, 8], n=[8])
    ]
    made.publish(tmp_path, grid)
    line = found(tmp_path, grid)[0]
    assert line.endswith("(spreads measured here on 1 comparison)")
    few = [c for c in grid if c.config.seed < 3]
    number = lambda text: float(text.split("from ")[1].split()[0])  # noqa: E731
    assert number(line) < number(found(tmp_path, few)[0])
    elsewhere = made.cells(cell(f"output={tmp_path}", "task=lab_title").config, m=[0, 8], n=[8])
    assert "assumed" in found(tmp_path, elsewhere)[0], "another task's"


def test_the_plan_s_settings_change_no_cell_and_are_in_no_manifest(cell, tmp_path: Path) -> None:
    plain, priced = lab(cell, tmp_path, "n=8"), lab(cell, tmp_path, "n=8", "plan.gpu=h100", "plan.price=2.5")
    assert plain.id == priced.id
    made.publish(tmp_path, [priced])
    assert "plan" not in read_manifest(tmp_path, "mine").cells[0].config


@pytest.mark.parametrize("overrides", [["plan.gpu=b200"], ["plan.price=0"], ["report.columns=plan.gpu"]])
def test_bad_settings_of_a_plan_are_refused(cell, overrides: list[str]) -> None:
    with pytest.raises(UserError, match=overrides[0].split("=")[0]):
        cell(*overrides)


def test_a_damaged_record_does_not_stop_a_plan(cell, tmp_path: Path) -> None:
    c = lab(cell, tmp_path, "n=8")
    made.publish(tmp_path, [c])
    (Outputs(tmp_path).record(c.chain.adapt.kind, c.chain.adapt.key) / "record.json").write_text("{")
    assert Forecast([lab(cell, tmp_path, "n=8", "seed=1")], Store(tmp_path)).lines()


def test_a_likelihood_s_detectable_difference_stands_beside_accuracy_s(cell, tmp_path: Path) -> None:
    base = cell(
        f"output={tmp_path}", "+benchmark@task.benchmark=lab_math_likelihood", "report.likelihood_margin=0.5"
    ).config
    grid = [c for seed in range(3) for c in made.cells(base.model_copy(update={"seed": seed}), m=[0, 40], n=[10])]
    lines = {line.split(":")[0].strip(): line for line in found(tmp_path, grid)}
    assert list(lines) == ["lab_math", "lab_facts", "lab_math_likelihood"]
    line = lines["lab_math_likelihood"]
    assert re.search(r"with 500 items and 3 replicates differences from 0\.\d\d hundredths of a bit on", line)
    assert "; for 1 point: " in lines["lab_math"], "its margin is another"
    assert "; for 0.5 hundredths of a bit: 3 replicates (spreads assumed as the lab's" in line
    made.publish(tmp_path, grid)
    assert "spreads measured here" in found(tmp_path, grid)[2]
