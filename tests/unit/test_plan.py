import pytest

from d2lora import plan, worker
from d2lora.command import summary
from d2lora.command.job import others
from d2lora.errors import UserError
from d2lora.evaluate.vllm import installed
from d2lora.keys import canonical
from d2lora.report.manifest import write_manifest
from d2lora.settings import amount
from d2lora.store import Store

GRID = [(method, m, n) for method in ("sft", "dpo", "orpo") for m in (0, 4000) for n in (0, 100, 1000)]


@pytest.fixture
def grid(cell) -> list[plan.Cell]:
    return [cell(f"method={method}", f"m={m}", f"n={n}") for method, m, n in GRID]


def test_one_warm_up_serves_the_whole_grid(grid) -> None:
    warmups = {c.chain.warmup.key for c in grid if c.chain.warmup}
    assert len(warmups) == 1


def test_cells_without_adaptation_are_evaluated_once_for_all_methods(grid) -> None:
    for m in (0, 4000):
        keys = {s.key for c in grid for s in c.chain.evaluations if (c.config.m, c.config.n) == (m, 0)}
        assert len(keys) == 2, "one a benchmark"


def test_the_base_s_evaluation_knows_no_seed_init_or_recipe(cell) -> None:
    def base(*overrides: str) -> tuple:
        return tuple(s.key for s in cell("n=0", *overrides).chain.evaluations)

    assert base() == base("seed=3") == base("init=gaussian") == base("recipe.lora.r=4") == base("data_seed=1")
    assert base() != base("task.benchmark.lab_math.max_new_tokens=32")


@pytest.mark.parametrize(
    "other",
    ["n=200", "m=32", "seed=1", "data_seed=1", "recipe.lr.dpo=2e-4", "recipe.batch=32", "method.beta=0.2", "method.reference=base",
     "method.epochs=2", "init=gaussian", "recipe.lora.r=8", "recipe.max_length=128", "task.continuation=step", "model.dtype=bfloat16"],
)  # fmt: skip
def test_what_can_change_a_result_changes_the_key(cell, other: str) -> None:
    assert cell("method=dpo", "n=100").chain.adapt.key != cell("method=dpo", "n=100", other).chain.adapt.key


@pytest.mark.parametrize(
    "other",
    [
        "recipe.micro_batch=4",
        "recipe.packing=padded",
        "recipe.attention=flex_attention",
        "recipe.threads=2",
        "recipe.eval_batch=3",
        "sweep=x",
        "output=/x",
        "recipe.lr.sft=1e-5",
        "split_seed=4",
        "recipe.gradient_checkpointing=true",
    ],
)
def test_what_cannot_change_a_result_keeps_the_key(cell, other: str) -> None:
    assert cell("method=dpo", "n=100").chain.adapt.key == cell("method=dpo", "n=100", other).chain.adapt.key


@pytest.mark.parametrize(
    ("setting", "default", "other"),
    [("model.thinking", "false", "true"), ("task.rendered", "false", "true"), ("warmup.rendered", "false", "true"), ("warmup.tools", "tools", "offered")],
)  # fmt: skip
def test_how_rows_are_rendered_is_in_a_key_where_it_is_not_the_default(
    cell, setting: str, default: str, other: str
) -> None:
    def keys(*overrides: str) -> list[str]:
        chain = cell("n=100", "m=100", *overrides).chain
        return [chain.warmup.key, chain.adapt.key]

    assert keys() == keys(f"+{setting}={default}") != keys(f"+{setting}={other}")


def test_keys_carry_no_path(cell, tmp_path) -> None:
    import shutil

    from d2lora.data import ROOT

    shutil.copytree(ROOT / "d2lora/lab/data/math", tmp_path / "elsewhere")
    assert cell("n=8").chain.adapt.key == cell("n=8", f"task.data.path={tmp_path / 'elsewhere'}").chain.adapt.key


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1: "a"}, (1, 2), {"a": {1, 2}}])
def test_a_value_that_json_cannot_carry_is_an_error(value) -> None:
    with pytest.raises((ValueError, TypeError)):
        canonical(value)


def test_the_batches_do_each_stage_once_and_leave_nothing_waiting(grid) -> None:
    batches = plan.batches(grid, set())
    done: set[str] = set()
    every = [s.key for jobs in batches for job in jobs for s in job.stages]
    assert sorted(every) == sorted(s.key for s in plan.stages(grid))
    for jobs in batches:
        for job in jobs:  # any order within a batch: nothing outside the job and the batches before
            mine = {s.key for s in job.stages}
            assert all(s.parent is None or s.parent.key in done | mine for s in job.stages)
        done |= {s.key for job in jobs for s in job.stages}
        costs = [job.cost for job in jobs]
        assert costs == sorted(costs, reverse=True)


def test_nobody_waits_for_the_evaluation_of_a_warm_up(grid) -> None:
    jobs = [[s.kind for s in job.stages] for batch in plan.batches(grid, set()) for job in batch]
    assert ["warmup"] in jobs
    assert not any("warmup" in names and len(names) > 1 for names in jobs)


def test_what_is_done_is_not_planned_again(grid) -> None:
    assert not any(plan.batches(grid, {s.key for s in plan.stages(grid)}))
    some = {s.key for s in plan.stages(grid) if s.kind == "warmup"}
    assert all(s.key not in some for batch in plan.batches(grid, some) for job in batch for s in job.stages)


def test_equal_cells_are_one_cell(cell) -> None:
    assert len(plan.unique([cell("n=8"), cell("n=8", "recipe.threads=2"), cell("n=9")])) == 2


def test_large_amounts_are_written_as_the_paper_does() -> None:
    assert [amount(x) for x in (0, 500, 1000, 40000, 44218, "all")] == ["0", "500", "1k", "40k", "44218", "all"]


@pytest.fixture
def engine(monkeypatch) -> None:
    """An engine is installed, as far as planning asks."""
    monkeypatch.setattr(installed, "identity", lambda config: ENGINE if config.recipe.engine == "vllm" else None)


ENGINE = {"name": "vllm", "version": "0.32.0", "dtype": "float32"}


def test_memory_is_in_no_key_and_an_engine_is_in_an_evaluation_s_alone(cell, engine) -> None:
    plain, asked = cell("n=100", "m=100").chain, cell("n=100", "m=100", "recipe.engine=vllm").chain
    assert [s.key for s in plain.stages] == [s.key for s in cell("n=100", "m=100", "recipe.engine=memory").chain.stages]
    assert [s.key for s in plain.trainings] == [s.key for s in asked.trainings]
    assert not {s.key for s in plain.evaluations} & {s.key for s in asked.evaluations}
    assert asked.evaluations[0].spec.content() == plain.evaluations[0].spec.content() | {"engine": ENGINE}


@pytest.mark.parametrize("init", ["loftq", "dora"])
def test_what_an_engine_cannot_do_is_planned_in_memory_under_memory_s_key(cell, engine, init: str) -> None:
    plain, asked = cell(f"init={init}").chain, cell(f"init={init}", "recipe.engine=vllm").chain
    assert [s.key for s in plain.stages] == [s.key for s in asked.stages]


def test_the_base_has_one_evaluation_whatever_the_cell_would_train(cell, engine) -> None:
    base = [cell("m=0", "n=0", f"init={init}", "recipe.engine=vllm") for init in ("lora", "dora")]
    assert len(plan.unique(base)) == 1
    assert base[0].chain.evaluations[0].spec.engine == ENGINE


def test_flips_are_measured_in_memory(cell, engine) -> None:
    plain, asked = (cell("model.dtype=bfloat16", *more).chain for more in ([], ["recipe.engine=vllm"]))
    assert [s.key for s in plain.flips] == [s.key for s in asked.flips]


def on_engine(cell, *more: str) -> list[plan.Cell]:
    return [cell(f"method={method}", f"m={m}", f"n={n}", "recipe.engine=vllm", *more) for method, m, n in GRID]


def test_with_an_engine_the_batches_do_each_stage_once_and_leave_nothing_waiting(cell, engine) -> None:
    grid = on_engine(cell)
    done: set[str] = set()
    batches = plan.batches(grid, set())
    assert sorted(s.key for jobs in batches for j in jobs for s in j.stages) == sorted(s.key for s in plan.stages(grid))
    for jobs in batches:
        for job in jobs:
            assert all(parent.key in done for parent in job.waits_for)
        done |= {s.key for job in jobs for s in job.stages}


def test_evaluations_of_a_base_are_handed_out_together_after_the_trainings(cell, engine) -> None:
    grid = on_engine(cell)
    *before, last = plan.batches(grid, set())
    asked = {s.key for c in grid for s in c.chain.evaluations}
    assert not any(s.key in asked for jobs in before for job in jobs for s in job.stages)
    (job,) = last
    assert job.shared
    assert {s.key for s in job.stages} == asked
    assert len(job.stages) == len(asked)


def test_several_engines_divide_the_adapters_and_each_base_has_its_own(cell, engine) -> None:
    grid = on_engine(cell)
    jobs = plan.batches(grid, set(), engines=4)[-1]
    assert len(jobs) == 4
    owners = [{s.parent and s.parent.key for s in job.stages} for job in jobs]
    assert sum(map(len, owners)) == len(set().union(*owners)), "an adapter's benchmarks stay together"
    assert max(map(len, owners)) - min(map(len, owners)) <= 1
    two = [*grid, *on_engine(cell, "model.dtype=bfloat16")]
    assert len(plan.batches(two, set())[-1]) == 2
    assert len(plan.batches(two, set(), engines=4)[-1]) == 4


def test_what_is_done_on_an_engine_is_not_planned_again(cell, engine) -> None:
    grid = on_engine(cell)
    trained = {s.key for s in plan.stages(grid) if s.kind != "evaluate"}
    assert [len(jobs) for jobs in plan.batches(grid, trained)] == [0, 0, 0, 0, 1]
    assert not any(plan.batches(grid, {s.key for s in plan.stages(grid)}))


@pytest.mark.parametrize(
    "overrides",
    [
        ["method=dpo", "m=100", "n=100"],
        ["init=eva", "m=100", "control=merged", "n=all"],
        ["task=lab_title", "n=50", "recipe.lr_factor=0.5"],
        ["tune=[recipe.lr]", "n=100", "replicate=3"],
    ],
    ids=" ".join,
)
def test_a_shared_job_finds_its_other_cells_in_the_manifest(cell, engine, tmp_path, overrides: list[str]) -> None:
    own = cell("n=8", "recipe.engine=vllm", "sweep=it", f"output={tmp_path}", "wandb.mode=disabled")
    other = cell(*overrides, "recipe.engine=vllm", "sweep=it", f"output={tmp_path}")
    write_manifest(tmp_path, [own, other])
    asked = [*own.chain.evaluations, *other.chain.validations, *other.chain.evaluations]
    keys = [stage.key for stage in asked]
    (read,) = others(plan.Cell(own.config.model_copy(update={"job": keys}), own.chain))
    assert [s.key for s in read.chain.stages] == [s.key for s in other.chain.stages]
    assert read.id == other.id
    assert read.config.output == own.config.output
    assert read.config.wandb == own.config.wandb
    assert not others(own)


def test_a_shared_job_whose_cells_changed_meanwhile_is_refused(cell, engine, tmp_path) -> None:
    own = cell("n=8", "recipe.engine=vllm", "sweep=it", f"output={tmp_path}")
    write_manifest(tmp_path, [own])
    stale = plan.Cell(own.config.model_copy(update={"job": ["0" * 20]}), own.chain)
    assert others(stale) == []
    with pytest.raises(UserError, match="not a stage of this cell: the code or the data changed"):
        worker.do(stale.config, stale, Store(tmp_path), lambda stage: lambda done, total: None)


def test_a_plan_says_what_is_handed_out_together(cell, engine, tmp_path) -> None:
    text = summary.plan_text(on_engine(cell), Store(tmp_path), engines=2)
    assert "  vllm 0.32.0: 28 evaluations of 13 adapters in 2 jobs, when all trainings are done\n" in text
    assert "does not do" not in text
    others = [cell("n=8", f"init={init}", "recipe.engine=vllm") for init in ("loftq", "dora")]
    text = summary.plan_text([*on_engine(cell), *others], Store(tmp_path))
    assert "  vllm does not do adapters of init=dora,loftq: they are evaluated in memory\n" in text
    assert "vllm" not in summary.plan_text([cell("n=100")], Store(tmp_path))


def test_the_progress_line_says_what_the_engine_is_doing(cell, engine, tmp_path) -> None:
    grid, store = on_engine(cell), Store(tmp_path)
    assert "vllm" not in summary.progress_text(grid, store)
    for stage in grid[0].chain.evaluations:
        store.outputs.unfinished(stage.kind, stage.key, "00000000").mkdir(parents=True)
    assert ", 2 running (vllm 0.32.0), " in summary.progress_text(grid, store)
