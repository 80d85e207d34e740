"""The program as it is typed: real processes, from another folder."""

import csv
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import made
import pytest
from omegaconf import OmegaConf
from safetensors.torch import load_file

from d2lora import __main__ as entry
from d2lora import data
from d2lora.command import grid, preflight
from d2lora.errors import UserError
from d2lora.outputs import project_path
from d2lora.store import Store

ROOT = Path(__file__).parents[2]
SHORT = ["task.benchmark.lab_math.limit=4", "task.benchmark.lab_facts.limit=4"]
COLUMNS = (
    "cell_id sweep model task method init warmup recipe lr reference m n seed benchmark metric value stderr items "
    "cut empty eval_batch train_seconds eval_seconds peak_memory_mb stage_key misfits left_out batch_flips batch_difference "
    "arm low high samples n_asked m_asked control data_seed rank batch epochs warmup_epochs limit adapter_key warmup_key tuned"
)


def results(out: Path) -> list[dict]:
    with (out / "report" / "results.csv").open() as file:
        return list(csv.DictReader(file))


def one_line(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if "Warning" not in line and line.strip()]
    assert len(lines) == 1, stderr
    return lines[0]


@pytest.fixture
def finished(cell: Callable, tmp_path: Path) -> Callable:
    """finished(["n=4"], ...) -> each of these cells has its records, and is not to be trained by the program."""

    def publish(*cells: list[str]) -> None:
        made.publish(tmp_path / "out", [cell(*overrides, *SHORT, f"output={tmp_path / 'out'}") for overrides in cells])

    return publish


def test_help_names_groups_amounts_and_examples(run) -> None:
    text = run("--help").stdout
    for word in (
        "method: dpo, kto, orpo, sft, simpo",
        "control: longer, merged, mixed, none, placebo",
        "scale: lab, laptop, paper",
        "40000",
        "10000",
        "python run.py -m method=sft,dpo,orpo",
        "-cn lab",
    ):
        assert word in text


def test_cfg_job_prints_the_whole_resolved_cell(run) -> None:
    text = run("--cfg", "job", "--resolve", "method=dpo").stdout
    for word in ("reference: warm_start", "lab_facts:", "target_modules: all-linear", "micro_batch"):
        assert word in text


def test_a_grid_ends_in_a_table_and_is_not_done_twice(run, tmp_path: Path) -> None:
    grid = ["-m", "method=sft,dpo", "n=0,4", "m=0,8", *SHORT]
    text = run(*grid).stdout
    assert "8 cells" in text
    assert re.search(r"warmup +1 stages, 1 shared", text)
    for row in ("SFT LoRA", "SFT D2LoRA(8, n)", "DPO LoRA", "DPO D2LoRA(8, n)"):
        assert re.search(re.escape(row) + r"\s+\d+\.\d\d ± \d+\.\d\d\s+\d", text), text
    assert "missing" not in text
    rows = results(tmp_path / "out")
    assert list(rows[0]) == COLUMNS.split()
    assert len({r["cell_id"] for r in rows}) == 8
    assert {r["benchmark"] for r in rows} == {"lab_math", "lab_facts"}
    assert all(r["items"] == "4" for r in rows)
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "out" / "store").rglob("record.json")}
    again = run(*grid).stdout
    assert "0 to do" in again
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "out" / "store").rglob("record.json")} == before
    items = [
        json.loads(line)
        for f in (tmp_path / "out" / "store" / "evaluate").rglob("items.jsonl")
        for line in f.read_text().splitlines()
    ]
    assert all({"prompt", "answer", "gold"} <= set(i) and (i.get("accuracy", i.get("acc")) in (0, 1)) for i in items)
    assert not [f for f in tmp_path.iterdir() if f.name != "out"], "nothing is written where it was typed"
    (tmp_path / "out" / "store" / "evaluate" / "foreign").mkdir()
    (tmp_path / "out" / "store" / "evaluate" / "foreign" / "record.json").write_text('{"note": "not ours"}')
    damaged = next(f for f in before if "evaluate" in f.parts)
    damaged.write_text(damaged.read_text()[:-20])
    assert f"damaged: {damaged}" in run(*grid, code=1).stderr


def test_a_tuned_sweep_meets_the_test_after_its_choice_and_is_not_done_twice(run, tmp_path: Path) -> None:
    grid = ["-m", "tune=[recipe.lr]", "recipe.lr_factor=0.5,2", "m=0,8", "n=4", "replicate=0,1", *SHORT]
    grid += ["task.validation.lab_math_validation.limit=4", "sweep=tuned"]
    text = run(*grid).stdout
    assert re.search(r"tuned +recipe.lr: 4 candidates in 2 arms; of each arm the best on lab_math_validation", text)
    assert "tuned: recipe.lr is chosen in 2 of 2 arms" in text
    assert len(re.findall(r"\[lr=0\.00[14]: +\d+\.\d\d\]", text)) == 2, text
    out = tmp_path / "out"
    records = {f: json.loads(f.read_text()) for f in (out / "store" / "evaluate").glob("*/record.json")}
    times: dict[str, list[int]] = {}
    for file, record in records.items():
        times.setdefault(record["benchmark"], []).append(file.stat().st_mtime_ns)
    assert {name: len(each) for name, each in times.items()} == {
        "lab_math_validation": 8,
        "lab_math": 4,
        "lab_facts": 4,
    }
    assert max(times["lab_math_validation"]) < min(times["lab_math"] + times["lab_facts"]), "the choice comes first"
    tuning = json.loads((out / "manifests" / "tuned.json").read_text())["tuning"]
    chosen = [id for arm in tuning["arms"] for c in arm["candidates"] if c["chosen"] for id in c["scores"]]
    tested = {r["cell_id"] for r in results(out) if r["benchmark"] == "lab_math"}
    assert len(chosen) == 4
    assert tested == set(chosen)
    again = run(*grid).stdout
    assert "0 to do" in again
    assert {f: f.stat().st_mtime_ns for f in records} == {
        f: f.stat().st_mtime_ns for f in (out / "store" / "evaluate").glob("*/record.json")
    }
    assert json.loads((out / "manifests" / "tuned.json").read_text())["tuning"] == tuning
    assert "add -m" in one_line(run("tune=[recipe.lr]", "n=4", code=2).stderr)


@pytest.mark.slow
def test_joblib_s_workers_make_the_same_adapters(run, tmp_path: Path) -> None:
    grid = ["-m", "method=sft,dpo", "n=8", "m=0,8", *SHORT]
    assert "Warning" not in run(*grid).stderr
    found = {
        f.parent.parent.name: load_file(f) for f in (tmp_path / "out" / "store").rglob("adapter_model.safetensors")
    }
    (tmp_path / "out").rename(tmp_path / "basic")
    run(*grid, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    other = {
        f.parent.parent.name: load_file(f) for f in (tmp_path / "out" / "store").rglob("adapter_model.safetensors")
    }
    assert found.keys() == other.keys()
    assert all((found[k][name] == other[k][name]).all() for k in found for name in found[k])


def test_a_single_cell_prints_its_results_and_no_token_is_in_anything_that_is_written_or_said(
    run, tmp_path: Path, monkeypatch
) -> None:
    planted = {"HF_TOKEN": "hf_plantedtokenplanted", "WANDB_API_KEY": "local" + 40 * "7"}
    for name, value in planted.items():
        monkeypatch.setenv(name, value)
    done = [run("n=4", *SHORT), run("n=4", "model.path=someone/gated", "+model.revision=main", *SHORT, code=2)]
    assert re.search(r"lab_math accuracy: \d+\.\d\d % ± \d+\.\d\d \(4 items\)", done[0].stdout), "a cell's results"
    assert "lab_facts acc:" in done[0].stdout
    done.append(run("n=4", "init=eva", "init.samples=1", *SHORT, code=1))
    files = [f for f in (tmp_path / "out").rglob("*") if f.is_file()]
    assert any("failed" in f.parts for f in files)
    for value in planted.values():
        assert not [d for d in done if value in d.stdout + d.stderr]
        assert not [f for f in files if value.encode() in f.read_bytes()]


@pytest.mark.slow
def test_the_lab_sweep_is_table_3_at_a_tenth(run) -> None:
    text = run("-cn", "lab", "dry_run=true").stdout
    assert "30 cells" in text
    cells = re.findall(r"lab-math-(\w+)-m(\d+)-n(\d+)-s0", text)
    assert {c[0] for c in cells} == {"sft", "dpo", "orpo"}
    assert {int(c[2]) for c in cells} == {0, 100, 200, 500, 1000}
    assert {int(c[1]) > 0 for c in cells} == {False, True}
    assert "without sharing" in text
    assert "all-linear adapts 87 % of lab's weights" in text


def test_a_dry_run_loads_no_torch(run, tmp_path: Path) -> None:
    code = (
        f"import runpy, sys; sys.argv = ['run.py', '-cn', 'smoke', 'dry_run=true', 'output={tmp_path / 'out'}']\n"
        f"try: runpy.run_path({str(ROOT / 'run.py')!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'peft', 'trl', 'lm_eval', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["n=-3"], ["n=-3", "all"]),
        (["n=2.5"], ["n=2.5", "all"]),
        (["n=20000"], ["n=20000", "lab-math", "11,000"]),
        (["method=dpo", "task=lab_title"], ["method=dpo", "rejected", "sft"]),
        (["method=ppo"], ["method=ppo", "dpo, kto, orpo, sft, simpo"]),
        (["nn=3"], ["nn"]),
        (["task.data.path=nowhere"], ["nowhere"]),
        (["scale=laptop"], ["data_root"]),
        (["-cn", "nosuch"], ["nosuch", "lab", "smoke"]),
        (["n=1,2"], ["'n=1,2'", "add -m (--multirun)"]),
        (["-m", "n=1,-2", "method=sft,dpo"], ["n=-2", "2 of the grid's cells", "skip_invalid"]),
        (["-m", "method=sft,dpo", "task=lab_title"], ["method=dpo", "lab-title"]),
        (["scale=paper"], ["xinlai/Math-Step-DPO-10K", "d2lora fetch"]),
    ],
)
def test_bad_input_is_refused_in_one_line_and_nothing_is_written(
    run, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    line = one_line(run(*arguments, code=2).stderr)
    assert line.startswith("error: ")
    assert all(word in line for word in words), line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        (["n=8", "m=8"], ["n=8", "m=8", "warmup.messages=nope"]),
        (["n=8"], ["n=8", "task.chosen='{nope}'"]),
        (["n=8", "m=8", "init=eva", "init.data=general"], ["n=0", "m=9", "init=eva", "init.data=general", "warmup.messages=nope"]),
    ],
)  # fmt: skip
def test_cells_of_the_same_rows_but_other_columns_are_each_checked(cell, good: list[str], bad: list[str]) -> None:
    seen: set[str] = set()
    preflight.check_inputs(cell(*good).config, seen)
    with pytest.raises(UserError, match="missing column nope"):
        preflight.check_inputs(cell(*bad).config, seen)


@pytest.mark.parametrize("grid", [[], ["-m"]])
def test_a_dry_run_refuses_what_the_run_would_refuse(run, grid: list[str]) -> None:
    assert "n=20000: task=lab-math has 11,000 rows" in one_line(run(*grid, "n=20000", "dry_run=true", code=2).stderr)


@pytest.mark.parametrize("grid", [[], pytest.param(["-m"], marks=pytest.mark.slow)])
def test_data_of_a_phase_that_a_cell_has_not_may_be_missing(run, grid: list[str]) -> None:
    missing = ["task.data.path=nowhere", "warmup.data.path=nowhere", "dry_run=true"]
    run(*grid, "n=0", "m=0", *missing)
    for amounts in (["n=1", "m=0"], ["n=0", "m=1"]):
        assert "nowhere" in one_line(run(*grid, *amounts, *missing, code=2).stderr)


def test_missing_columns_are_named(run, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    line = one_line(run("task.data.path=mine.jsonl", "n=1", code=2).stderr)
    assert "missing columns full_chosen, full_rejected, initial_reason_steps" in line


def test_invalid_cells_can_be_dropped(run) -> None:
    done = run("-m", "method=sft,dpo", "task=lab_title,lab_math", "n=0", "skip_invalid=true", "dry_run=true")
    assert "3 cells" in done.stdout
    assert "left out: method=dpo" in done.stderr


def test_a_failure_stays_local_and_is_named(run, cell, tmp_path: Path) -> None:
    """The warm-up fails (its record's place is taken): LoRA cells finish, what depends on it is blocked."""
    warmup = cell("n=4", "m=8", *SHORT).chain.warmup
    (tmp_path / "out" / "store" / "warmup" / warmup.key).mkdir(parents=True)
    done = run("-m", "method=sft,orpo", "n=4", "m=0,8", *SHORT, code=1)
    assert "failed: warm-up m=8 of lab: " in done.stderr
    assert "not a record's folder" in done.stderr
    assert "blocked: sft D2LoRA(8, 4) on lab-math, by warm-up m=8 of lab" in done.stderr
    assert re.search(r"SFT LoRA\s+\d", done.stdout)
    assert re.search(r"SFT D2LoRA\(8, n\)\s+missing", done.stdout)


def test_an_axis_of_any_setting_is_shown(run, finished) -> None:
    finished(*(["n=4", f"recipe.lr.sft={rate}"] for rate in ("1e-3", "1e-4")))
    text = run("-m", "method=sft", "n=4", "recipe.lr.sft=1e-3,1e-4", *SHORT).stdout
    assert "0 to do" in text
    assert "lr=0.001" in text


def test_inits_are_rows_and_seeds_are_folded(run, finished) -> None:
    finished(*(["n=4", f"init={init}", f"seed={seed}"] for init in ("lora", "gaussian") for seed in (0, 1)))
    text = run("-m", "method=sft", "n=4", "init=lora,gaussian", "seed=0,1", *SHORT).stdout
    assert "0 to do" in text
    assert all(re.search(rf"SFT LoRA {init}\s+\d+\.\d\d ± ", text) for init in ("lora", "gaussian"))
    assert "2 training seeds (0, 1), folded into each number" in text


def write_examples(document: str, folder: Path) -> None:
    """Write the files that a document shows into the folder, under the names that it gives them."""
    text = (ROOT / document).read_text()
    examples = re.findall(r"<!-- example: (\S+) -->\n```\w+\n(.*?)```", text, re.S)
    assert examples
    for name, content in examples:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def test_the_files_that_extending_shows_are_a_grid(run, tmp_path: Path) -> None:
    write_examples("docs/extending.md", tmp_path)
    rows = [{"thing": f"thing {i}", "colour": f"red {i}", "wrong": f"blue {i}"} for i in range(16)]
    turns = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Well."}]
    files = {"colours": rows[:12], "colours_test": rows[12:], "chats": [{"chosen": turns}] * 8}
    (tmp_path / "my_data").mkdir()
    for name, lines in files.items():
        (tmp_path / "my_data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    text = run("--config-dir", "my_conf", "-cn", "sizes", "dry_run=true").stdout
    assert text.startswith("sweep sizes: 8 cells, ")


def test_the_readme_s_own_task_benchmark_warm_up_and_model_run(run, tmp_path: Path) -> None:
    write_examples("README.md", tmp_path)
    rows = [{"country": f"Land{i}", "capital": f"City{i}", "wrong": f"Town{i}"} for i in range(24)]
    (tmp_path / "my_data").mkdir()
    for name, part in (("capitals", rows[:20]), ("capitals_test", rows[20:])):
        (tmp_path / "my_data" / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    talk = {"chosen": [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": "Well."}]}
    (tmp_path / "my_data" / "general.jsonl").write_text(8 * (json.dumps(talk) + "\n"))
    shutil.copytree(ROOT / "d2lora" / "lab" / "base", tmp_path / "my_models" / "mine")
    own = ["--config-dir", str(tmp_path / "conf"), "task=capitals", "warmup=mine", "model=mine"]
    text = run("-m", *own, "method=dpo", "n=10", "m=0,8").stdout
    assert re.search(r"DPO D2LoRA\(8, n\)\s+\d", text)
    assert re.search(r"capitals: rouge1.* rougeLsum", text), "equal tables are shown once"


@pytest.mark.parametrize(
    ("new", "old", "code", "words"),
    [
        ("report nosuch", "d2lora.report nosuch", 2, "sweep=nosuch: no such sweep was started here (there: mine)"),
        ("check", "d2lora.store check", 1, "/out/store/adapt/foreign: foreign: not a record's folder"),
        ("gc", "d2lora.store gc", 0, "/out/store/adapt/foreign: in no sweep's manifest"),
        ("dashboard mine", "d2lora.dashboard mine", 2, "/out/report/results.csv: python run.py -cn mine"),
    ],
)
def test_each_command_and_its_old_spelling_find_the_output_in_the_home_folder(
    run, tmp_path: Path, monkeypatch, new: str, old: str, code: int, words: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "out" / "store" / "adapt" / "foreign").mkdir(parents=True)
    (tmp_path / "out" / "manifests").mkdir()
    (tmp_path / "out" / "manifests" / "mine.json").write_text('{"cells": []}')
    module, *arguments = old.split()
    done = [
        run(*new.split(), "--output=~/out", module="d2lora", code=code),
        run(*arguments, "--output", "~/out", module=module, code=code),
    ]
    assert all(words in d.stdout + d.stderr for d in done), done
    assert (done[0].stdout, done[0].stderr) == (done[1].stdout, done[1].stderr)


def test_a_path_of_a_config_is_expanded_as_those_of_the_command_line(monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert grid, "it registers the resolver"
    config = OmegaConf.create({"home": "~/x", "a": "${project:${home}}", "b": "${project:x}"})
    assert (config.a, config.b) == ("/home/me/x", str(ROOT / "x"))
    assert str(project_path("~/x")) == "/home/me/x"


def test_help_lists_the_commands_and_a_wrong_one_is_one_line(capsys) -> None:
    for words, code in (["--help"], 0), (["nosuch"], 2), ([], 2), (["gc", "--nope"], 2):
        with pytest.raises(SystemExit) as end:
            entry.main(arguments=words)
        told = capsys.readouterr()
        assert end.value.code == code
        if code:
            assert "--help" in one_line(told.err)
        else:
            assert all(f"\n  {name} " in told.out for name in entry.COMMANDS)


def test_who_reads_only_the_head_gets_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "run.py"), "n=0", "dry_run=true", f"output={tmp_path / 'out'}"]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert started.stdout
    assert started.stderr
    started.stdout.close()
    assert (started.stderr.read(), started.wait()) == ("", 141)
    started.stderr.close()


def test_a_check_is_remembered_by_all_that_it_reads(cell, monkeypatch, tmp_path: Path) -> None:
    asked: list[str] = []
    for module, name in [(data, "check_task"), (data, "check_warmup"), (data, "check_benchmark")]:
        monkeypatch.setattr(module, name, lambda *given, name=name: asked.append(name))
    for name in ("begin", "check", "check_items"):
        monkeypatch.setattr(preflight.rehearsal, name, lambda *given, name=name: asked.append(name))
    passed: preflight.Passed = set()
    first = ["n=8", "m=8", "init=eva", "init.data=general", f"output={tmp_path}"]
    preflight.check(cell(*first).config, passed)
    once = Counter(asked)
    assert once == {"check_task": 1, "check_warmup": 2, "check_benchmark": 2, "begin": 1, "check": 1, "check_items": 1}
    preflight.check(cell(*first, "seed=1", "recipe.lr.sft=1").config, passed)
    assert Counter(asked) == once, "nothing that is read differs"
    preflight.check(cell(*first, "split_seed=1").config, passed)
    assert Counter(asked) == {name: 2 * count for name, count in once.items()}


def test_fetch_takes_the_same_overrides(run, tmp_path: Path) -> None:
    text = run("fetch", "-cn", "lab", "m=0", module="d2lora").stdout
    assert "task.data: d2lora/lab/data/math, 11,000 rows" in text
    assert "model: lab is on this machine" in text
    assert "warmup.data" not in text
    assert "d2lora fetch" in one_line(run("scale=paper", module="d2lora.fetch", code=2).stderr)


def test_fetch_reads_what_the_cells_of_the_command_line_read(run, tmp_path: Path) -> None:
    """Also one whose settings belong to its method, and whose configs are in a folder of the user's."""
    (tmp_path / "conf" / "warmup").mkdir(parents=True)
    (tmp_path / "conf" / "warmup" / "mine.yaml").write_text("name: mine\ndata: {path: mine.jsonl}\n")
    (tmp_path / "conf" / "own.yaml").write_text("defaults: [config, {override warmup: mine}, _self_]\n")
    (tmp_path / "mine.jsonl").write_text('{"chosen": []}\n')
    given = ["--config-dir", "conf", "-cn", "own", "-m", "method=dpo", "method.reference=base", "n=0,8"]
    text = run(*given, "m=0", "hydra/launcher=basic", module="d2lora.fetch").stdout
    assert text.count("task.data: ") == text.count("model: ") == 1
    assert "warmup.data" not in text
    assert "warmup.data: mine.jsonl, 1 rows" in run(*given, "m=0,1", module="d2lora.fetch").stdout
    assert "--config-dir nope: no such folder" in one_line(run("-cd", "nope", module="d2lora.fetch", code=2).stderr)
    assert "--what" in one_line(run("--what", module="d2lora.fetch", code=2).stderr)


def test_the_harness_is_asked_for_the_names_of_what_is_still_to_do_only(cell, tmp_path: Path, monkeypatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(data, "check_lm_eval", lambda tasks, *more: asked.extend(task.name for task in tasks))
    given = ["n=8", "+task.lm_eval=[hellaswag,piqa]", f"output={tmp_path}"]
    preflight.check_inputs(cell(*given, "dry_run=true").config, set())
    assert asked == []
    done = cell(*given)
    stage = next(s for s in done.chain.evaluations if s.spec.lm_eval == "hellaswag")
    Store(tmp_path).ensure(stage, lambda folder: made.record(stage))
    preflight.check_inputs(done.config, set())
    assert asked == ["piqa"]


def test_the_report_can_be_made_again(finished, tmp_path: Path) -> None:
    finished(["n=0", "sweep=mine"], ["n=4", "sweep=mine"])
    command = [sys.executable, "-m", "d2lora.report", "--output", str(tmp_path / "out")]
    done = subprocess.run([*command, "mine"], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "SFT LoRA" in done.stdout
    assert results(tmp_path / "out")
    wrong = subprocess.run([*command, "other"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert wrong.returncode == 2
    assert "there: mine" in one_line(wrong.stderr)
