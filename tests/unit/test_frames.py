"""Results as data: frames, the notebook, the harness' files and a model repository, from made-up records and real ones."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import made
import numpy as np
import pandas as pd
import pytest
import yaml
from made import grid

import d2lora
from d2lora import stats
from d2lora.__main__ import main
from d2lora.command import summary
from d2lora.errors import UserError
from d2lora.mirror import values
from d2lora.records import Records
from d2lora.report import compare, evidence, formats, harness_files, manifest, publish, results, tables
from d2lora.report.content import Sweep
from d2lora.report.points import Point, Run, points_of
from d2lora.scoring.kinds import PERCENT
from d2lora.store import Store

ROOT = Path(__file__).parents[2]
REAL = ROOT / "tests" / "old_store"  # its sweep `grid`: SFT and DPO, LoRA and D2LoRA, two seeds
WARMED = "lab-math-sft-m8-n8-s0-c5e788bc"


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the lab's task at n = 0, 100 and all, LoRA and D2LoRA, one seed."""
    folder = tmp_path_factory.mktemp("frames")
    made.publish(folder, grid(n=[0, 100, "all"], m=[0, 4000]))
    return folder


def test_numbers_stay_numbers_whatever_was_typed(output: Path) -> None:
    file, _ = results.write_results(output, Records(output))
    for frame in (pd.read_csv(file), d2lora.results(output=output)):
        assert set(frame.n) == {0, 100, 6970}
        assert set(frame.n_asked.astype(str)) == {"0", "100", "all"}
        assert len(frame[frame.n == 100]) == len(frame[frame.n_asked.astype(str) == "100"]) > 0
        trained = frame[frame.n == 100]
        assert set(trained["rank"]) == {16}
        assert (trained.batch > 0).all()
        assert (trained.epochs > 0).all()
        assert set(trained.data_seed) == {0}
        assert frame.limit.isna().all()


def test_a_limit_is_in_the_rows_of_its_benchmark_alone(tmp_path: Path) -> None:
    made.publish(tmp_path, grid("task.benchmark.lab_math.limit=40", n=[0]))
    frame = d2lora.results(output=tmp_path).set_index("benchmark")
    assert frame.limit["lab_math"] == 40
    assert np.isnan(frame.limit.drop("lab_math").to_numpy(dtype=float)).all()


def test_a_row_has_its_keys_its_settings_and_the_table_s_interval(output: Path) -> None:
    frame = d2lora.results("mine", output=output)
    cells = {cell.id: cell for cell in manifest.read_manifest(output, "mine").cells}
    point = {
        (p.benchmark, p.metric, p.m, p.n): p for p in points_of(manifest.read_manifest(output, "mine"), Records(output))
    }
    for row in frame.itertuples():
        stages = cells[row.cell_id].stages
        assert row.stage_key == stages.evaluate[row.benchmark]
        assert row.adapter_key == (stages.adapt or stages.warmup) or (stages.adapt is stages.warmup is None)
        if p := point.get((row.benchmark, row.metric, row.m_asked, row.n_asked)):
            assert (row.low, row.high) == pytest.approx(p.interval)
            assert row.arm == p.arm
    trained = frame[frame.n == 100].iloc[0]
    assert trained["recipe.lora.alpha"] == 16
    assert trained["benchmark.kind"] in ("number", "choice", "exact")
    assert frame[frame.n == 0]["recipe.weight_decay"].isna().any(), "the base does not depend on a recipe"


def test_a_single_cell_prints_the_interval_of_the_table(output: Path) -> None:
    cells = grid(n=[100], m=[0])
    table = next(
        t
        for t in tables.build(points_of(manifest.read_manifest(output, "mine"), Records(output)))
        if "lab_math" in t.title
    )
    entry = next(p for p in table.points if (p.m, p.n) == (0, 100))
    low, high = entry.interval
    printed = summary.cell_text(cells[0], Store(output))
    assert f"lab_math accuracy: {PERCENT.value(entry.value)} % ± {PERCENT.value((high - low) / 2)} (" in printed


def test_an_interval_from_a_standard_error_is_wilson_s_of_right_and_wrong_alone() -> None:
    scores = np.array([[1.0] * 7 + [0.0] * 33])
    stderr = float(scores.std(ddof=1) / 40**0.5)
    assert stats.interval_of_mean(7 / 40, stderr, 40) == pytest.approx(stats.wilson(7, 40))
    low, high = stats.interval_of_mean(0.0, 0.0, 40, graded=True)
    assert (low, high) == (0, 0)
    assert stats.interval_of_mean(0.0, 0.0, 40) == pytest.approx(stats.wilson(0, 40))
    assert stats.interval_of_mean(0.5, None, 40) is None


def test_neither_torch_nor_at_first_pandas_is_imported(output: Path) -> None:
    script = f"""
import sys, d2lora
assert "pandas" not in sys.modules and "pydantic" not in sys.modules
d2lora.results(output={str(output)!r}), d2lora.items("mine", output={str(output)!r}), d2lora.curves("mine", output={str(output)!r})
assert "torch" not in sys.modules and "matplotlib.pyplot" not in sys.modules
assert "results" in dir(d2lora)
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=120)


@pytest.mark.thorough
def test_a_thousand_records_would_be_a_frame_in_two_seconds(tmp_path: Path) -> None:
    made.publish(tmp_path, grid(n=[100, 200, 300], m=[0, 1000, 2000], seed=range(8)), items=2)
    records = sum(1 for _ in tmp_path.glob("store/*/*/record.json"))
    assert records > 200
    d2lora.results(output=tmp_path)  # the imports
    start = time.process_time()  # of this process alone, as tests share their cores
    d2lora.results(output=tmp_path)
    assert (time.process_time() - start) / records * 1000 < 2


def test_items_stand_side_by_side_and_flips_are_those_that_mcnemar_counts(output: Path) -> None:
    items = d2lora.items("mine", benchmark="lab_math", output=output)
    points = [
        p for p in points_of(manifest.read_manifest(output, "mine"), Records(output)) if p.benchmark == "lab_math"
    ]
    for point, comparison in compare.comparisons(points).items():
        own = items[items.n == point.rows]
        counts = comparison.outcomes
        assert (own.change == 1).sum() == counts.d2lora_only
        assert (own.change == -1).sum() == counts.lora_only
        assert counts.both + counts.d2lora_only + counts.lora_only + counts.neither == len(own)
        assert own.change.mean() == pytest.approx(comparison.difference)
    assert {"prompt", "gold", "answer_lora", "answer_d2lora", "score_lora", "score_d2lora"} <= set(items.columns)


def test_any_two_cells_can_stand_side_by_side_and_an_unknown_one_is_named(output: Path) -> None:
    first, second = (cell.id for cell in manifest.read_manifest(output, "mine").cells[:2])
    items = d2lora.items("mine", cells=(first, second), output=output)
    assert set(items.benchmark) == {"lab_math", "lab_facts"}
    assert "answer_first" in items.columns
    with pytest.raises(UserError, match="cells=nosuch: no cell of sweep mine"):
        d2lora.items("mine", cells=(first, "nosuch"), output=output)
    with pytest.raises(UserError, match="no such sweep"):
        d2lora.results("nosuch", output=output)


def test_the_base_stands_beside_each_seed_s_warm_up(tmp_path: Path) -> None:
    made.publish(tmp_path, grid(n=[0], m=[0, 4000], seed=[0, 1]))
    items = d2lora.items("mine", benchmark="lab_math", output=tmp_path)
    assert set(items.seed) == {0, 1}
    assert len(items) == 2 * items["index"].nunique()


def test_curves_have_what_trainings_logged_once_each() -> None:
    curves = d2lora.curves("grid", output=REAL)
    keys = curves.groupby("stage").key.nunique()
    assert dict(keys) == {"adapt": 8, "warmup": 2}
    assert curves.loss.notna().all()
    assert curves[curves.stage == "warmup"].method.isna().all()
    log = json.loads((REAL / "store" / "adapt" / "3f5c16709b3f1338babf" / "record.json").read_text())["metrics"]["log"]
    own = curves[curves.key == "3f5c16709b3f1338babf"]
    assert own.loss.tolist() == [entry["loss"] for entry in log]
    frame = d2lora.results("grid", output=REAL)
    assert set(curves[curves.stage == "adapt"].key) == set(frame.adapter_key)


def test_a_table_is_the_table_s_file_as_a_frame(output: Path) -> None:
    frame = d2lora.table("mine", output=output)
    own = tables.build(points_of(manifest.read_manifest(output, "mine"), Records(output)))
    assert frame.value.tolist() == [p.value for table in own for p in table.points]
    assert set(frame.n) == {0, 100, 6970}
    assert frame[frame.arm != "LoRA"].difference.notna().all()


def test_the_notebook_runs_as_it_is(monkeypatch) -> None:
    """Its cells in order, as a kernel would run them, on a store of real records instead of the lab's."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    cells = json.loads((ROOT / "docs" / "results.ipynb").read_text())["cells"]
    codes = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert '"lab", "outputs"' in codes[0]
    codes[0] = codes[0].replace('"lab", "outputs"', f'"grid", {str(REAL)!r}')
    names: dict = {}
    for code in codes:
        assert len(code.splitlines()) <= 5
        exec(code, names)  # the cells of our own notebook
    assert set(names["table"].arm) == {"LoRA", "D2LoRA(8, n)"}
    assert set(names["flipped"].change) <= {1.0, -1.0}
    assert names["curves"].label.nunique() == 4


# --- tables --------------------------------------------------------------------------------------------------------


def rouge(metric: str, m: int, scores: list[float]) -> Point:
    names = {"model": "lab", "task": "t", "method": "sft", "init": "lora", "warmup": "w" if m else "", "recipe": "r"}
    point = Point(**names, m=m, n=10, benchmark="titles", metric=metric, tested={"same"})
    point.runs[0] = Run(f"cell{m}", f"{metric}{m}", None, None)
    point.scores[0] = np.array(scores)
    return point


def test_equal_metrics_share_a_table_and_have_both_their_rows_in_its_file() -> None:
    first, second = [0.1, 0.5, 0.3], [0.2, 0.5, 0.4]
    points = [rouge(metric, m, scores) for metric in ("rougeL", "rougeLsum") for m, scores in ((0, first), (8, second))]
    (table,) = tables.build(points)
    assert table.title == "titles: rougeL and rougeLsum (equal on every item) in %"
    assert {row["metric"] for row in formats.table_rows([table])} == {"rougeL", "rougeLsum"}
    points[-1].scores[0] = np.array([0.2, 0.5, 0.41])
    assert [t.title for t in tables.build(points)] == ["titles: rougeL in %", "titles: rougeLsum in %"]


def test_zeros_of_rouge_are_not_wrong_answers() -> None:
    lora, d2lora_point = rouge("rouge1", 0, [0.0] * 40), rouge("rouge1", 8, [0.0] * 40)
    assert lora.interval == (0.0, 0.0)
    comparison = compare.compared(lora, d2lora_point)
    assert comparison.test == "paired bootstrap"
    assert (comparison.detectable, comparison.outcomes) == (0, None)


def test_the_shares_of_an_overlap_check_are_explained() -> None:
    cells = manifest.read_manifest(REAL, "grid").cells
    content = evidence.contamination_content(Sweep("grid", cells, [], Records(REAL)))
    assert content is not None
    exact, ngram13 = content.notes
    assert exact.startswith("exact: the share of test items whose whole question")
    assert "13 words in a row in common with a row of the training set" in ngram13


# --- files for others ----------------------------------------------------------------------------------------------


def test_the_harness_s_own_readers_read_the_export(tmp_path: Path) -> None:
    """lm-eval's functions by which its scripts find files, and its table; a line has what zeno_visualize.py takes from it."""
    from lm_eval import utils

    harness_files.export(REAL, ["grid"], tmp_path)
    folder = tmp_path / WARMED
    files = [file.as_posix() for file in folder.iterdir()]
    content = json.loads(Path(utils.get_latest_filename(utils.get_results_filenames(files))).read_text())
    frame = d2lora.results("grid", output=REAL)
    accuracy = frame[(frame.cell_id == WARMED) & (frame.metric == "accuracy")].value.iloc[0]
    assert f"{accuracy:.3f}" in utils.make_table(content)
    samples = {utils.get_file_task_name(Path(f).name): f for f in utils.get_sample_results_filenames(files)}
    assert set(samples) == {"lab_math", "lab_facts"} == set(content["configs"])
    assert content["config"]["model_args"]["peft"] == WARMED
    for task, file in samples.items():
        lines = [json.loads(line) for line in Path(file).read_text().splitlines()]
        config = content["configs"][task]
        assert [line["doc_id"] for line in lines] == list(range(content["n-samples"][task]["effective"]))
        for metric in config["metric_list"]:
            mean = sum(line[metric["metric"]] for line in lines) / len(lines)
            assert mean == pytest.approx(content["results"][task][f"{metric['metric']},none"])
        if config["output_type"] == "multiple_choice":
            chosen = [np.argmax([float(response[0]) for response in line["filtered_resps"]]) for line in lines]
            assert [float(str(c) == line["target"]) for c, line in zip(chosen, lines, strict=True)] == [
                x["acc"] for x in lines
            ]
        else:
            assert all(line["arguments"]["gen_args_0"]["arg_0"] and len(line["filtered_resps"]) == 1 for line in lines)


def test_a_published_cell_has_a_card_that_the_hub_reads_and_nothing_of_the_machine(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    folder = tmp_path / "repository"
    publish.publish(REAL, WARMED, folder, None, public=False)
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-generation"
    assert {"lora", "transformers"} <= set(card.data.tags)
    assert card.data.base_model is None, "a local model has no name on the Hub"
    frame = d2lora.results("grid", output=REAL).query("cell_id == @WARMED and metric == 'accuracy'")
    assert card.data.eval_results[0].metric_value == pytest.approx(100 * frame.value.iloc[0], abs=0.01)
    assert "D2LoRA is " in card.text
    assert "PEFT 0." in card.text
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "lab"
    weights = (folder / "adapter_model.safetensors").read_bytes()
    assert (
        weights
        == (REAL / "store" / "adapt" / "8058dae609915e88d3d9" / "adapter" / "adapter_model.safetensors").read_bytes()
    )
    publish.publish(REAL, WARMED, folder, None, public=False)  # again: over its own folder


def test_scores_on_the_hub_s_data_are_entries_of_its_leaderboards(tmp_path: Path, monkeypatch) -> None:
    from huggingface_hub import parse_eval_result_entries

    cell = grid("scale=paper", "+benchmark@task.benchmark=gsm8k_likelihood", n=[1000], m=[40000])[0]
    made.publish(tmp_path, [cell])
    texts = publish.eval_results(publish.find(tmp_path, cell.id))
    assert "gsm8k_likelihood" not in texts, "it would stand as GSM8K's accuracy"
    (entry,) = parse_eval_result_entries(yaml.safe_load(texts["gsm8k"]))
    assert (entry.dataset_id, entry.task_id) == ("openai/gsm8k", "main")
    assert "95 % interval" in entry.notes
    card = publish.card(publish.find(tmp_path, cell.id))
    assert card.data.base_model == "meta-llama/Llama-3.1-8B-Instruct"
    assert "base_model:adapter:meta-llama/Llama-3.1-8B-Instruct" in card.data.tags


def test_publishing_is_a_dry_run_unless_told_and_says_in_one_line_what_is_wrong(tmp_path: Path, capsys) -> None:
    def run(*words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as left:
            main("publish", [*words, "--output", str(REAL)])
        told = capsys.readouterr()
        return int(left.value.code or 0), told.out + told.err

    before = sorted(REAL.rglob("*"))
    code, text = run(WARMED)
    assert code == 0
    assert "dry run: nothing is written or uploaded" in text
    assert sorted(REAL.rglob("*")) == before
    code, text = run("nosuch")
    assert code == 2
    assert "nosuch: no cell of a sweep here" in text
    code, text = run("lab-math-sft-m0-n0-s0-684d8ec4")
    assert "the base itself: there is no adapter" in text
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    code, text = run(WARMED, "--folder", str(mine))
    assert (code, (mine / "thesis.txt").read_text()) == (2, "mine")
    code, text = run(WARMED, "--folder", str(tmp_path / "new"), "--to", "me/adapter")
    assert code == 2, "no network in tests"
    assert "nothing more is uploaded" in text
    assert (tmp_path / "new" / "README.md").exists()


def test_publishing_replaces_nothing_but_what_it_has_written(tmp_path: Path) -> None:
    stored = tmp_path / "adapter"  # as the store has it: PEFT's files, without a card
    stored.mkdir()
    clone = tmp_path / "clone"
    publish.publish(REAL, WARMED, clone, None, public=False)
    (clone / "notes.md").write_text("mine")
    (stored / "adapter_config.json").write_text("{}")
    for folder in (stored, clone):
        before = {f: f.read_bytes() for f in folder.iterdir()}
        with pytest.raises(UserError, match="not a published cell's folder"):
            publish.publish(REAL, WARMED, folder, None, public=False)
        assert {f: f.read_bytes() for f in folder.iterdir()} == before
    assert {f.name for f in tmp_path.iterdir()} == {"adapter", "clone"}, "no temporary folder is left"


def test_a_damaged_sweep_hides_no_cell_of_another(tmp_path: Path) -> None:
    (cell,) = grid(n=[100], m=[0])
    made.publish(tmp_path, [cell])
    (tmp_path / "manifests" / "damaged.json").write_text("{")
    assert publish.find(tmp_path, cell.id).manifest.sweep == "mine"
    with pytest.raises(UserError, match=r"nosuch: no cell of a sweep here.*damaged"):
        publish.find(tmp_path, "nosuch")


def test_a_path_of_the_cell_s_own_is_refused_in_what_is_published(tmp_path: Path) -> None:
    rows, output = tmp_path / "rows", tmp_path / "output"
    shutil.copytree(ROOT / "d2lora" / "lab" / "data" / "math", rows)
    (cell,) = grid(f"task.data.path={rows}", n=[100], m=[0])
    made.publish(output, [cell])
    with pytest.raises(UserError, match=r"/rows, which is of this machine"):
        publish.check_private("README.md", f"trained on {rows}", publish.find(output, cell.id))


@pytest.mark.parametrize(
    ("host", "text", "refused"),
    [
        ("lab", "D2LoRA of lab on lab-math, one of the lab's", False),
        ("adapter", "A LoRA adapter of lab", False),
        ("lab", "rows from //lab/share", True),
        ("lab", "user@lab:data", True),
        ("gpu-17", "trained on gpu-17", True),
        ("gpu-17", "trained on gpu-170", False),
        ("lab-math", "D2LoRA on lab-math", False),
    ],
)
def test_a_host_s_name_is_refused_where_it_is_one_and_not_as_an_ordinary_word(
    tmp_path: Path, monkeypatch, host: str, text: str, refused: bool
) -> None:
    (cell,) = grid(n=[100], m=[0])
    made.publish(tmp_path, [cell])
    monkeypatch.setattr(publish.socket, "gethostname", lambda: host)
    check = lambda: publish.check_private("README.md", text, publish.find(tmp_path, cell.id))  # noqa: E731
    if refused:
        with pytest.raises(UserError, match=f"it would say {host}, which is of this machine"):
            check()
    else:
        check()


def test_a_path_of_this_machine_is_one_as_a_whole(tmp_path: Path, monkeypatch) -> None:
    (cell,) = grid(n=[100], m=[0])
    made.publish(tmp_path, [cell])
    monkeypatch.setattr(publish.Path, "home", lambda: Path("/me"))
    repository = publish.find(tmp_path, cell.id)
    publish.check_private("README.md", "huggingface.co/me/adapter and /media, a menu", repository)
    for text in ("/me", "read from /me/rows", '"/me"'):
        with pytest.raises(UserError, match="it would say /me, which"):
            publish.check_private("README.md", text, repository)


def test_items_that_belong_together_have_the_tables_interval(tmp_path: Path) -> None:
    cells = grid("+task.benchmark.lab_math.cluster=passage", n=[100], m=[0])
    made.publish(tmp_path, cells, items=200)
    file = tmp_path / "store" / "evaluate" / cells[0].chain.evaluations[0].key / "items.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    items = [line | {"cluster": f"passage {line['index'] % 20}"} for line in lines]
    file.write_text("".join(json.dumps(item) + "\n" for item in items))
    (point,) = [
        p for p in points_of(manifest.read_manifest(tmp_path, "mine"), Records(tmp_path)) if p.benchmark == "lab_math"
    ]
    (row,) = d2lora.results(output=tmp_path).query("benchmark == 'lab_math'").to_dict("records")
    assert (row["low"], row["high"]) == point.interval
    assert values._interval("accuracy", items) == point.interval
    assert point.interval != stats.interval(point.table)


def test_items_of_two_test_sets_are_not_joined(tmp_path: Path) -> None:
    cells = grid(n=[100], m=[0, 4000])
    made.publish(tmp_path, cells)
    file = tmp_path / "store" / "evaluate" / cells[0].chain.evaluations[0].key / "items.jsonl"
    file.write_text(file.read_text().replace('"gold": "', '"gold": "not '))
    with pytest.raises(UserError, match="lab_math: these are items of two test sets"):
        d2lora.items("mine", cells=(cells[0].id, cells[1].id), output=tmp_path)


def test_a_likelihood_is_no_percentage_and_no_answer(tmp_path: Path) -> None:
    cells = grid("+benchmark@task.benchmark=lab_math_likelihood", n=[100], m=[0])
    made.publish(tmp_path, cells)
    lines = summary.cell_text(cells[0], Store(tmp_path)).splitlines()
    (line,) = [line for line in lines if "per_byte" in line]
    assert " hundredths of a bit ± " in line
    assert "%" not in line
    folder = harness_files.export(tmp_path, ["mine"]) / cells[0].id
    (file,) = folder.glob("results_*.json")
    assert json.loads(file.read_text())["configs"]["lab_math_likelihood"]["output_type"] == "loglikelihood"
    (file,) = folder.glob("samples_lab_math_likelihood_*.jsonl")
    sample = json.loads(file.read_text().splitlines()[0])
    assert sample["arguments"]["gen_args_0"]["arg_1"] == f" {sample['doc']['gold']}"


def test_no_path_of_a_setting_is_uploaded() -> None:
    config = {"task": {"lm_eval_path": "/scratch/me/tasks"}, "recipe": {"engine_python": "/scratch/me/bin/python"}}
    assert "scratch" not in json.dumps(values.public(config))
