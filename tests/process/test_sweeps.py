"""Every sweep, planned in this process: its cells against the paper's grids, their stages against its Table 2."""

import dataclasses
import functools
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from d2lora import plan
from d2lora.command import preflight
from d2lora.command.grid import Composer, expand, values_without_cells, without_warmup
from d2lora.errors import UserError
from d2lora.plan import Cell
from d2lora.settings import INIT_NAMES, init_of

ROOT = Path(__file__).parents[2]
SWEEPS = [f.stem for f in sorted((ROOT / "sweeps").glob("*.yaml"))]


@functools.cache
def cells(sweep: str, *arguments: str) -> list[Cell]:
    """The cells of `python run.py -cn SWEEP ...`, each once."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose(sweep, return_hydra_config=True)
        loader = GlobalHydra.instance().config_loader()
        params = OmegaConf.to_container(config.hydra.sweeper.params)
        grid = expand(OverridesParser.create(config_loader=loader), params, arguments)
        composer = Composer(config, loader)
        return plan.unique(composer(overrides) for overrides in grid)


def points(sweep: str) -> set[tuple]:
    return {(c.config.task.name, c.config.method.name, c.config.m, c.config.n) for c in cells(sweep)}


def grid(task: str, methods: str, m: int, *sizes: int | str) -> set[tuple]:
    return {(task, method, size, n) for method in methods.split() for size in (0, m) for n in sizes}


TABLE_1 = grid("title", "sft", 40_000, 0, 1000, 2000, 5000, "all")
TABLE_3 = grid("math", "sft dpo orpo", 40_000, 0, 1000, 2000, 5000, 10_000)
FIGURE_4 = grid("math", "orpo", 40_000, 100, 200, 500, 1000)


@pytest.mark.parametrize(
    ("sweep", "wanted"),
    [
        ("table1", TABLE_1),
        ("table3", TABLE_3),
        ("figure3", TABLE_3),
        ("figure4", FIGURE_4),
        ("paper", TABLE_1 | TABLE_3 | FIGURE_4),
        ("lab", grid("lab-math", "sft dpo orpo", 4000, 0, 100, 200, 500, 1000)),
        ("lab_table1", grid("lab-title", "sft", 4000, 0, 100, 200, 500, 700)),
        ("lab_figure4", grid("lab-math", "orpo", 4000, 10, 20, 50, 100)),
    ],
)
def test_a_sweep_has_the_paper_s_cells_and_no_others(sweep: str, wanted: set[tuple]) -> None:
    assert points(sweep) == wanted
    assert len(cells(sweep)) == len(wanted)


@pytest.mark.parametrize("sweep", SWEEPS)
def test_every_sweep_composes_and_carries_its_name(sweep: str) -> None:
    assert {c.config.sweep for c in cells(sweep)} == {sweep}


def test_cells_of_two_artefacts_are_the_same_cells() -> None:
    ids = {sweep: {c.id for c in cells(sweep)} for sweep in ("table1", "table3", "figure3", "figure4", "paper")}
    assert ids["figure3"] == ids["table3"]
    assert len(ids["figure4"] & ids["table3"]) == 2, "ORPO at n = 1000"
    assert ids["paper"] == ids["table1"] | ids["table3"] | ids["figure4"]
    assert len({c.chain.warmup.key for c in cells("paper") if c.chain.warmup}) == 1


def test_every_cell_of_the_paper_is_computed_as_table_2_says() -> None:
    for cell in cells("paper"):
        _trained_as_table_2_says(cell)
        _judged_as_section_3_says(cell)


def _trained_as_table_2_says(cell: Cell) -> None:
    trained = [s for s in (cell.chain.warmup, cell.chain.adapt) if s]
    assert len(trained) == (cell.config.m != 0) + (cell.config.n != 0)
    for stage in trained:
        assert stage.spec.model["path"] == "meta-llama/Llama-3.1-8B-Instruct"
        assert (stage.spec.lora.r, stage.spec.lora.alpha) == (16, 16)
        assert stage.spec.schedule == "cosine"
    if warmup := cell.chain.warmup:
        assert (warmup.spec.lr, warmup.spec.epochs, warmup.spec.m) == (1e-7, 1, 40_000)
        assert warmup.spec.data["path"] == "mlabonne/orpo-dpo-mix-40k"
    if adapt := cell.chain.adapt:
        assert (adapt.spec.lr, adapt.spec.epochs) == (
            1e-6,
            {"sft": 3, "dpo": 4, "orpo": 4}[cell.config.method.name],
        )
        assert getattr(adapt.spec.method, "beta", None) == (None if cell.config.method.name == "sft" else 0.1)
        assert adapt.spec.n == cell.config.n


def _judged_as_section_3_says(cell: Cell) -> None:
    names = {s.subject: s.spec.benchmark for s in cell.chain.evaluations}
    assert names["arc_easy"]["kind"] == "choice"
    if cell.config.task.name == "title":
        assert (names["econ_titles"]["kind"], names["econ_titles"]["data"]["hold_out"]) == ("rouge", 100)
    else:
        appendix_a = "{question} Please reason step by step, and put your final answer within \\boxed{{}}."
        assert (names["gsm8k"]["kind"], names["gsm8k"]["prompt"]) == ("number", appendix_a)


def test_inits_has_every_initialization_with_and_without_warm_up_and_their_bases() -> None:
    found = [c.config for c in cells("inits")]
    trained = {(c.init.name, c.method.name, c.m, c.n, c.seed) for c in found if c.n}
    names = [name for name in INIT_NAMES if not init_of(name).variant]
    assert trained == set(itertools.product(names, ("sft", "dpo"), (0, 2000), (100, 500), (0, 1)))
    bases = [c for c in cells("inits") if not c.config.n]
    assert {(c.config.init.name, c.config.m, c.config.seed) for c in bases} == {("lora", 0, 0), ("loftq", 0, 0)}
    assert len({c.chain.evaluations[0].key for c in bases}) == 2, "LoftQ's is a quantized one"
    assert len(found) == len(trained) + len(bases)


def test_lab_controls_has_each_control_with_each_method_that_can_have_it() -> None:
    arms: dict[str, set[str]] = {}
    for cell in cells("lab_controls"):
        arms.setdefault(cell.config.method.name, set()).add(cell.config.control.name if cell.config.m else "LoRA")
    pairwise = {"LoRA", "none", "longer", "merged", "placebo"}
    assert arms == {"sft": pairwise | {"mixed"}, "dpo": pairwise, "orpo": pairwise}
    assert len(cells("lab_controls")) == (6 + 5 + 5) * 2 * 3


def test_lab_instrument_has_six_replicates_of_each_warm_up_and_of_none() -> None:
    found = {
        (c.config.m and c.config.warmup.name, c.config.n, c.config.seed, c.config.data_seed)
        for c in cells("lab_instrument")
    }
    assert found == {(w, n, r, r) for w in (0, "lab", "lab-related") for n in (100, 500) for r in range(6)}


def test_limitations_varies_the_model_m_and_the_warm_up_one_at_a_time() -> None:
    llama = "llama-3.1-8b-instruct"
    axes = {(c.config.model.name, c.config.m, c.config.warmup.name) for c in cells("limitations") if c.config.m}
    models = {model for model, m, mix in axes if (m, mix) == (40_000, "mix40k")}
    assert len(models) >= 8
    assert {name.split("-")[0] for name in models} == {"llama", "qwen2.5", "smollm2"}
    assert {m for model, m, mix in axes if (model, mix) == (llama, "mix40k")} == {
        1000,
        2000,
        5000,
        10_000,
        20_000,
        40_000,
    }
    parts = {mix for model, m, mix in axes if (model, m) == (llama, 2000)}
    assert parts == {"mix40k", "mix-capybara", "mix-ultrafeedback", "mix-math"}
    assert all(sum((model != llama, m not in (2000, 40_000), mix != "mix40k")) <= 1 for model, m, mix in axes)


def test_everything_from_the_hub_is_pinned_to_a_commit() -> None:
    for cell in [*cells("paper"), *cells("limitations")]:
        c = cell.config
        sources = [c.model, c.task.data, c.warmup.data, *(b.data for b in c.task.benchmark.values())]
        assert all(len(source.revision) == 40 for source in sources), c.sweep


def test_a_key_on_the_command_line_replaces_it_in_every_grid_of_a_union() -> None:
    grids = [{"method": "sft", "n": "1,2"}, {"method": "dpo,orpo", "n": 3}]
    assert expand(OverridesParser.create(), grids, ["n=7"]) == [
        ("method=sft", "n=7"), ("method=dpo", "n=7"), ("method=orpo", "n=7")
    ]  # fmt: skip
    assert len(expand(OverridesParser.create(), grids, ["seed=0,1"])) == 2 * (2 + 2)
    assert {(c.config.method.name, c.config.n) for c in cells("paper", "n=300", "m=0")} == {
        ("sft", 300), ("dpo", 300), ("orpo", 300)
    }  # fmt: skip


def test_values_that_make_no_cells_of_their_own_are_named_and_the_first_is_used(cell) -> None:
    def composed(*axes: list[str]) -> list[Cell]:
        return [dataclasses.replace(cell(*o), overrides=o) for o in itertools.product(*axes)]

    both = composed(["n=0", "n=8"], ["recipe.micro_batch=4", "recipe.micro_batch=8", "recipe.micro_batch=2"])
    assert [c.config.recipe.micro_batch for c in plan.unique(both)] == [4, 4]
    assert values_without_cells(both) == [
        "recipe.micro_batch=8,2: no result depends on it, so its cells are those of recipe.micro_batch=4, which is used"
    ]
    assert values_without_cells(composed(["n=0", "n=8"], ["init=lora", "init=gaussian"])) == [], "it matters for n=8"
    assert values_without_cells(composed(["n=8"], ["recipe.micro_batch=4"])) == []


def test_settings_of_a_warm_up_that_no_cell_has_are_named(cell) -> None:
    def told(*overrides: str) -> list[str]:
        return without_warmup([dataclasses.replace(cell(*overrides), overrides=overrides)])

    typed = ("n=8", "warmup=lab_related", "+warmup.data.empty=leave_out", "recipe.lr.warmup=1e-4", "control=placebo")
    assert told(*typed) == [f"{', '.join(typed[1:])}: changes nothing, as there is no warm-up with m=0"]
    assert told(*typed, "m=8") == []
    assert told("n=8", "recipe.lr.sft=1e-4", "control=none") == []
    assert told("n=8", "init=eva", "init.data=general", "warmup=lab_related") == [], "the preparation reads its rows"


def test_rows_and_items_that_repeat_are_counted_in_the_plan(cell, tmp_path: Path) -> None:
    rows = [{"q": f"q{i % 3}", "good": "a", "bad": "b", "id": i} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = [f"task.data.path={tmp_path / 'rows.jsonl'}", "task.prompt='{q}'", "task.prefix=''", "task.chosen='{good}'"]
    own += ["task.rejected='{bad}'", "task.full_chosen=null", "task.full_rejected=null"]
    test = [f"task.benchmark.lab_math.data.path={tmp_path / 'rows.jsonl'}", "task.benchmark.lab_math.limit=4"]
    asked = ["task.benchmark.lab_math.prompt='{q}'", "task.benchmark.lab_math.gold='{good}'"]
    assert preflight.repeats([cell("n=4", *own), cell("n=8", *own)]) == [
        "  task=lab-math: 5 of 8 rows repeat an earlier one, and each is counted"
    ]
    assert preflight.repeats([cell("n=0", *own, *test, *asked)]) == [
        "  lab_math: 1 of 4 items repeat an earlier one, and each is counted"
    ]
    assert preflight.repeats([cell("n=8")]) == []


def test_a_grid_without_cells_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"^seed=range\(1,1\): .* the grid has no cells$"):
        expand(OverridesParser.create(), {"n": "1,2"}, ["seed=range(1,1)"])


def test_a_key_may_be_added_to_a_grid_as_to_a_single_cell() -> None:
    assert expand(OverridesParser.create(), {"n": "1,2"}, ["++n=7"]) == [("++n=7",)]
    (only,) = cells("lab", "n=4", "m=0", "method=sft", "++model.revision=main")
    assert only.config.model.revision == "main"


@pytest.mark.parametrize("params", [[], ["n=1"], [{"n": 1}, None]])
def test_a_union_of_what_is_no_grid_is_refused_in_one_line(params: list) -> None:
    with pytest.raises(UserError, match=r"hydra.sweeper.params=.*a mapping .* or a list of such mappings$"):
        expand(OverridesParser.create(), params, [])


def test_a_sweep_of_the_hub_s_data_sets_is_planned_offline(run) -> None:
    assert run("-cn", "figure4", "dry_run=true").stdout.startswith("sweep figure4: 8 cells, ")


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "launcher", ["submitit_local", *(pytest.param(name, marks=SLOW) for name in ("basic", "joblib", "submitit_slurm"))]
)
def test_a_sweep_that_names_its_workers_takes_any_launcher(launcher: str, run) -> None:
    if launcher.startswith("submitit"):
        pytest.importorskip("submitit")
    text = run("-cn", "lab", "n=0", "m=0", f"hydra/launcher={launcher}", "dry_run=true").stdout
    assert text.startswith("sweep lab: 3 cells, ")


def test_planning_a_grid_loads_no_scipy_or_matplotlib() -> None:
    code = "import sys, d2lora.command.launch, d2lora.report; print({'scipy', 'matplotlib', 'pandas', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "set()"


def test_every_benchmark_belongs_to_a_task(cell) -> None:
    used = set()
    for file in (ROOT / "conf" / "task").glob("*.yaml"):
        if file.stem != "math_local":  # the user's copy of math
            task = cell(f"task={file.stem}").config.task
            used |= {*task.benchmark, *task.validation}
    used |= {name for c in cells("lab") for name in c.config.task.benchmark}  # a sweep may have more
    # Added to a task's own on the command line (docs/evaluation.md, docs/statistics.md).
    for beside in ("lab_math_likelihood", "lab_math_by_template", "gsm8k_likelihood"):
        task = "lab_math" if beside.startswith("lab") else "math"
        used |= {*cell(f"task={task}", f"+benchmark@task.benchmark={beside}").config.task.benchmark}
    assert used == {f.stem for f in (ROOT / "conf" / "benchmark").glob("*.yaml")}
