import pytest

from d2lora import plan
from d2lora.keys import canonical
from d2lora.settings import amount

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
