"""W&B as its users see it: real sweeps, whose runs are read back with wandb's own reader."""

import contextlib
import http.server
import io
import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import made
import psutil
import pytest
from wandb_runs import runs

from d2lora import mirror as mirrored
from d2lora.data import overlap
from d2lora.mirror import sender
from d2lora.progress import log
from d2lora.records import Record
from d2lora.stages import Stage, flips
from d2lora.store import Store

ROOT = Path(__file__).parents[2]
KEY = "local" + 40 * "0"  # of the right form; openwandb's documented local key
SMALL = ["task.benchmark.lab_math.limit=4", "~task.benchmark.lab_facts"]


def typed(folder: Path, *arguments: str, environment: dict | None = None, output: str = "out") -> SimpleNamespace:
    """`python run.py` typed in a folder that is the home, without W&B's settings of the caller: what it printed, seconds."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "NETRC"))}
    command = [sys.executable, str(ROOT / "run.py"), *arguments, *SMALL, f"output={folder / output}"]
    start = time.monotonic()
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=folder,
        env=own | {"HOME": str(folder)} | (environment or {}),
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return SimpleNamespace(out=done.stdout, err=done.stderr, seconds=time.monotonic() - start)


def records(output: Path) -> dict[str, dict]:
    return {f.parent.name: json.loads(f.read_text()) for f in (output / "store").glob("*/*/record.json")}


def results(output: Path) -> dict[str, dict]:
    """What a stage's record says of its result: metrics without the run of the process, and the adapter's hash."""
    return {
        key: {
            "metrics": {k: v for k, v in r["metrics"].items() if k != "log"},
            "log": [{k: e[k] for k in ("step", "loss")} for e in r["metrics"].get("log", [])],
            "files": {k: v for k, v in r["files"].items() if k.endswith((".safetensors", ".jsonl"))},
        }
        for key, r in records(output).items()
    }


def warnings(done: SimpleNamespace) -> list[str]:
    return [line for line in done.err.splitlines() if line.startswith(("W&B", "wandb"))]


GRID = ["-m", "method=sft,dpo", "n=0,24", "m=8", "sweep=mine"]


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A sweep of two joblib workers, offline, with a key in the environment and its data in the home folder."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(ROOT / "d2lora/lab/data/math", home / "secret_place/math")
    grid = [*GRID, f"task.data.path={home / 'secret_place/math'}", "wandb.mode=offline"]
    grid += ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    done = typed(home, *grid, environment={"WANDB_API_KEY": KEY})
    return SimpleNamespace(
        home=home, grid=grid, done=done, out=home / "out", left=left_of(home), runs=runs(home / "out")
    )


def left_of(home: Path) -> list[psutil.Process]:
    """Processes that a sweep typed in `home` has left behind, W&B's among them."""
    named = [p for p in psutil.process_iter(["cmdline"]) if str(home) in " ".join(p.info["cmdline"] or [])]
    return named + [p for p in psutil.process_iter(["name"]) if p.info["name"] == "wandb-core" and _of(p, home)]


def _of(process: psutil.Process, home: Path) -> bool:
    try:
        return process.environ().get("HOME") == str(home)
    except psutil.Error:
        return False


def by_key(offline: SimpleNamespace) -> dict[str, dict]:
    return {r["run_id"]: r for r in offline.runs}


def test_every_stage_and_cell_is_a_run_of_its_own_and_the_sweep_has_a_report(offline) -> None:
    assert warnings(offline.done) == []
    ids = [r["run_id"] for r in offline.runs]
    assert len(ids) == len(set(ids))
    assert set(records(offline.out)) <= set(ids)
    kinds = {kind: sum(r["job_type"] == kind for r in offline.runs) for kind in ("warmup", "adapt", "cell", "report")}
    assert kinds == {"warmup": 1, "adapt": 2, "cell": 4, "report": 1}
    assert {r["run_group"] for r in offline.runs} == {"mine"}
    assert all(r["exit"] == [0] for r in offline.runs)
    assert "wandb sync" in offline.done.out.splitlines()[-1]


OTHERS = {
    "submitit_local": ("submitit", ["hydra.launcher.timeout_min=5"]),
    "ray": ("ray", ["+hydra.launcher.ray.init.num_cpus=2"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["submitit_local", pytest.param("ray", marks=pytest.mark.ray)])
def test_workers_of_other_launchers_keep_the_same_runs(launcher: str, offline, tmp_path: Path) -> None:
    module, more = OTHERS[launcher]
    pytest.importorskip(module)
    grid = [*GRID, f"task.data.path={offline.home / 'secret_place/math'}", "wandb.mode=offline"]
    done = typed(tmp_path, *grid, f"hydra/launcher={launcher}", *more, environment={"RAY_AUTH_MODE": "disabled"})
    assert warnings(done) == []
    kept = runs(tmp_path / "out")
    assert sorted(r["run_id"] for r in kept) == sorted(by_key(offline))
    assert all(r["exit"] == [0] for r in kept)
    assert left_of(tmp_path) == []


def test_names_and_tags_are_those_of_the_field(offline) -> None:
    named = {r["display_name"]: r for r in offline.runs if r["job_type"] == "adapt"}
    assert set(named) == {f"{method} · D2LoRA(8, 24) · s0" for method in ("sft", "dpo")}
    assert set(named["dpo · D2LoRA(8, 24) · s0"]["tags"]) == {"dpo", "lora", "D2LoRA"}
    evaluations = {r["display_name"] for r in offline.runs if r["job_type"] == "evaluate"}
    assert {"lab_math · warm-up · D2LoRA(8, 0) · s0", "lab_math · dpo · D2LoRA(8, 24) · s0"} <= evaluations


def test_a_stage_s_run_has_its_spec_and_the_metrics_of_its_record(offline) -> None:
    found = by_key(offline)
    for key, record in records(offline.out).items():
        run = found[key]
        assert run["config"]["spec"] == record["spec"]
        assert run["summary"]["seconds"] == record["seconds"]
        for metric, value in record["metrics"].items():
            if record["stage"] == "evaluate":
                name = f"{record['benchmark']}/{metric}"
                assert run["summary"][name] == value["value"]
                assert run["summary"][f"{name}_low"] <= value["value"] <= run["summary"][f"{name}_high"]
            elif record["stage"] in ("warmup", "adapt") and metric != "log":
                assert run["summary"][metric] == value


def test_a_training_has_the_flat_settings_that_cells_have(offline) -> None:
    (adapted,) = [
        r for r in offline.runs if r["display_name"] == "dpo · D2LoRA(8, 24) · s0" and r["job_type"] == "adapt"
    ]
    (cell,) = [r for r in offline.runs if r["display_name"] == adapted["display_name"] and r["job_type"] == "cell"]
    shared = ("m", "n", "arm", "method", "init", "model", "task", "recipe", "seed", "lr")
    assert {k: adapted["config"][k] for k in shared} == {k: cell["config"][k] for k in shared}
    (warm,) = [r["config"] for r in offline.runs if r["job_type"] == "warmup"]
    assert (warm["m"], warm["n"], warm["arm"], warm["init"]) == (8, 0, "D2LoRA", "lora")
    assert not {"method", "task", "lr"} & set(warm), "it serves cells of other methods too"


def test_training_is_logged_over_samples_seen_and_agrees_with_the_record(offline) -> None:
    found = by_key(offline)
    dpo = [r for r in records(offline.out).values() if r["spec"].get("method", {}).get("name") == "dpo"]
    assert dpo
    for record in dpo:
        history = found[record["key"]]["history"]
        assert [h["samples_seen"] for h in history] == [8, 16, 24]  # batches of 8, one epoch
        assert [h["train/loss"] for h in history] == [e["loss"] for e in record["metrics"]["log"]]
        assert {f"train/{k}" for k in ("learning_rate", "grad_norm", "rewards/margins", "rewards/accuracies")} <= set(
            history[-1]
        )
        assert all(history[-1][f"train/{k}"] > 0 for k in ("samples_per_second", "tokens_per_second", "memory_mb"))


def test_an_evaluation_has_a_table_of_its_items(offline) -> None:
    record = next(r for r in records(offline.out).values() if r["stage"] == "evaluate")
    run = by_key(offline)[record["key"]]
    assert run["summary"]["items._type"] == "table-file"
    table = json.loads(next((offline.out / "wandb").glob(f"*{record['key']}/files/media/table/*.json")).read_text())
    lines = (offline.out / "store/evaluate" / record["key"] / "items.jsonl").read_text().splitlines()
    assert [dict(zip(table["columns"], row, strict=True))["answer"] for row in table["data"]] == [
        json.loads(line)["answer"] for line in lines
    ]


def test_a_cell_s_run_is_flat_has_its_results_and_names_its_stages(offline) -> None:
    cells = {
        (r["config"]["method"], r["config"]["m"], r["config"]["n"]): r for r in offline.runs if r["job_type"] == "cell"
    }
    assert set(cells) == {(method, 8, n) for method in ("sft", "dpo") for n in (0, 24)}
    made = records(offline.out)
    for run in cells.values():
        (key,) = run["config"]["stages"]["evaluate"].values()
        assert run["summary"]["lab_math/accuracy"] == made[key]["metrics"]["accuracy"]["value"]
        assert run["config"]["arm"] == "D2LoRA"
    assert cells["dpo", 8, 24]["config"]["config"]["method"]["beta"] == 0.1


def test_the_report_run_has_the_tables_and_figures_that_were_written(offline) -> None:
    (run,) = [r for r in offline.runs if r["job_type"] == "report"]
    logged = {k.split(".")[0] for h in run["history"] for k in h}
    written = {f.stem for f in (offline.out / "report/mine").iterdir() if f.suffix in (".png", ".csv")}
    assert {"results", "tables", *written} <= logged
    assert any(f.suffix == ".png" for f in (offline.out / "report/mine").iterdir())


def test_lineage_leads_from_base_and_data_over_the_warm_up_to_the_adapter(offline) -> None:
    found = by_key(offline)
    warm = next(r for r in records(offline.out).values() if r["stage"] == "warmup")
    made = found[warm["key"]]["artifacts"]
    adapted = [r for r in records(offline.out).values() if r["stage"] == "adapt" and r["parent"] == warm["key"]]
    assert len(adapted) == 2
    for record in adapted:
        artifacts = found[record["key"]]["artifacts"]
        name = f"warmup-{warm['key']}"
        # The same content has the same digest: W&B makes it one version, whichever run is uploaded first.
        assert artifacts[name, "model", True] == made[name, "model", False]
        assert {("base-lab", "base", True), ("dataset-lab-math", "dataset", True)} <= set(artifacts)
        assert (f"adapt-{record['key']}", "model", False) in artifacts


def test_no_secret_and_no_path_of_the_home_is_in_what_is_uploaded(offline) -> None:
    for run in offline.runs:
        assert "host" not in run
        assert KEY not in run["text"]
        assert str(offline.home) not in run["text"]
        assert str(ROOT) not in run["text"]
        assert "secret_place" not in run["text"]
    cells = [r for r in offline.runs if r["job_type"] == "cell"]
    assert {r["config"]["config"]["task"]["data"]["path"] for r in cells} == {"math"}
    for file in (offline.out / "wandb").rglob("*"):
        if file.is_file() and not file.is_symlink():
            assert KEY.encode() not in file.read_bytes(), file
        if file.is_file() and "files" in file.parts:
            assert str(offline.home).encode() not in file.read_bytes(), file
            assert str(ROOT).encode() not in file.read_bytes(), file


def test_nothing_is_left_running_and_nothing_is_written_to_the_home(offline) -> None:
    assert offline.left == []
    assert {f.name for f in offline.home.iterdir()} <= {"secret_place", "out", ".config", ".cache"}


def test_what_is_finished_is_not_logged_again(offline) -> None:
    before = {f.name for f in (offline.out / "wandb").glob("*run-*")}
    typed(offline.home, *offline.grid)
    assert {f.name for f in (offline.out / "wandb").glob("*run-*")} == before


def mirror_training(this, stage: Stage) -> None:
    """Mirror a stage that publishes an adapter, as a training or a preparation does."""

    def work(folder: Path) -> Record:
        (folder / "adapter").mkdir()
        content = {"base_model_name_or_path": this.config.model.path}
        (folder / "adapter" / "adapter_config.json").write_text(json.dumps(content))
        (folder / "adapter" / "adapter_model.safetensors").write_text(stage.key)
        return made.record(stage)

    store = Store(Path(this.config.output))
    with mirrored.stage(this.config, stage, store):
        store.ensure(stage, work)
    mirrored.flush(this.config)


def test_artifacts_can_be_turned_off(tmp_path: Path, cell) -> None:
    this = cell("n=4", *SMALL, "wandb.mode=offline", "wandb.artifacts=false", f"output={tmp_path}")
    mirror_training(this, this.chain.adapt)
    record = {"benchmark": "lab_math", "metrics": {"accuracy": {"value": 1.0, "stderr": 0.0, "items": 1}}}
    mirror(this, this.chain.evaluations[0], record, [{"answer": "4", "accuracy": 1.0}])
    found = {r["job_type"]: r for r in runs(tmp_path)}
    assert found.keys() == {"adapt", "evaluate"}
    assert {kind for r in found.values() for _, kind, _ in r["artifacts"]} == {"run_table"}
    assert "LoRA" in found["adapt"]["tags"]


def test_a_prepared_initialization_is_a_run_and_an_input(tmp_path: Path, cell) -> None:
    this = cell("n=4", "init=pissa", *SMALL, "wandb.mode=offline", f"output={tmp_path}")
    for stage in this.chain.trainings:
        mirror_training(this, stage)
    found = {r["job_type"]: r for r in runs(tmp_path)}
    prepared = found["prepare"]["run_id"]
    assert found["prepare"]["display_name"] == "prepare · D2LoRA(0, 0) · s0"
    assert "pissa" in found["adapt"]["tags"]
    assert {(f"prepare-{prepared}", "model", True), ("base-lab", "base", True)} <= set(found["adapt"]["artifacts"])
    assert (f"prepare-{prepared}", "model", False) in found["prepare"]["artifacts"]


def test_a_stage_that_failed_is_shown_as_failed_and_continues_its_run(tmp_path: Path, cell) -> None:
    """The same id in both tries; the second is what it ends with."""
    this = cell("n=4", *SMALL, "wandb.mode=offline", f"output={tmp_path}")
    store, adapt = Store(tmp_path), this.chain.adapt

    def attempt(fail: bool) -> None:
        with mirrored.stage(this.config, adapt, store):
            log({"loss": 1.0}, 8)
            if fail:
                raise RuntimeError("no memory")
            store.ensure(adapt, lambda folder: made.record(adapt, metrics={"last_loss": 1.0}))

    with pytest.raises(RuntimeError):
        attempt(fail=True)
    attempt(fail=False)
    mirrored.flush(this.config)
    first, second = sorted(runs(tmp_path), key=lambda r: -r["exit"][0])
    assert (first["exit"], second["exit"]) == ([1], [0])
    assert first["run_id"] == second["run_id"] == adapt.key
    assert second["summary"]["last_loss"] == 1.0


def mirror(this, stage: Stage, result: dict, items: list[dict]) -> dict:
    """The run of a stage that publishes this result with these items."""
    output = Path(this.config.output)
    store = Store(output)

    def work(folder: Path) -> Record:
        (folder / "items.jsonl").write_text("".join(json.dumps(i, ensure_ascii=False) + "\n" for i in items))
        return made.record(stage, **result)

    with mirrored.stage(this.config, stage, store):
        store.ensure(stage, work)
    mirrored.flush(this.config)
    return next(run for run in runs(output) if run["run_id"] == stage.key)


def test_line_separators_in_a_text_do_not_cut_an_item(tmp_path: Path, cell, capsys) -> None:
    this = cell("n=4", *SMALL, "wandb.mode=offline", f"output={tmp_path}")
    items = [{"answer": f"one{mark}two", "accuracy": 1.0} for mark in "\u2028\u2029\x85"]
    record = {"benchmark": "lab_math", "metrics": {"accuracy": {"value": 1.0, "stderr": 0.0, "items": 3}}}
    run = mirror(this, this.chain.evaluations[0], record, items)
    assert capsys.readouterr().err == ""
    assert run["summary"]["lab_math/accuracy_low"] > 0
    (table,) = (tmp_path / "wandb").glob("*run-*/files/media/table/*.json")
    assert [row[0] for row in json.loads(table.read_text())["data"]] == [item["answer"] for item in items]


def test_a_contamination_check_that_finds_every_item_shows_its_share(tmp_path: Path, cell, capsys) -> None:
    this = cell("n=4", *SMALL, "wandb.mode=offline", f"output={tmp_path}")
    items = [{"index": i, "question": "Who?", "exact": 7, "ngram13": None, "ngram": None} for i in range(2)]
    record = {"pair": "lab / lab_math", "metrics": overlap.shares(items, 2)}
    run = mirror(this, this.chain.contamination[0], record, items)
    assert capsys.readouterr().err == ""
    found = {k: v for k, v in run["summary"].items() if k.startswith("lab / lab_math")}
    shares = {"exact": 1.0, "exact_items": 2, "ngram13": 0.0, "ngram13_items": 2}
    assert found == {f"lab / lab_math/{name}": value for name, value in shares.items()}


def test_two_batch_sizes_show_what_flipped(tmp_path: Path, cell, capsys) -> None:
    this = cell("n=0", *SMALL, "model.dtype=bfloat16", "wandb.mode=offline", f"output={tmp_path}")
    alone, together = ([{"index": 0, "prompt": "?", "answer": a, "accuracy": s}] for a, s in (("4", 1.0), ("5", 0.0)))
    found, items = flips.compare(alone, together, ["accuracy"])
    run = mirror(this, this.chain.flips[0], {"benchmark": "lab_math", "batches": [1, 8], "metrics": found}, items)
    assert capsys.readouterr().err == ""
    assert run["display_name"] == this.chain.flips[0].label
    assert run["summary"]["lab_math/answers_flipped"] == 1
    assert run["summary"]["lab_math/accuracy_difference"] == -1
    (table,) = (tmp_path / "wandb").glob("*run-*/files/media/table/*.json")
    assert json.loads(table.read_text())["data"] == [[0, "?", '["4", "5"]', "[1.0, 0.0]"]]


def test_a_cell_s_run_that_could_not_be_filled_is_sent_again(tmp_path: Path, cell, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sender, "_state", sender._State())
    this = cell("n=4", *SMALL, "wandb.mode=offline", f"output={tmp_path}")
    made.publish(tmp_path, [this])

    def sent() -> list[bool]:
        mirrored.cell(this, Store(tmp_path))
        mirrored.flush(this.config)
        return ["lab_math/accuracy" in run["summary"] for run in runs(tmp_path)]

    with monkeypatch.context() as patched:
        patched.setattr("d2lora.mirror.cells._fill_cell", lambda run, cell, results: results["nosuch"])
        assert sent() == [False]
    assert "nosuch" in capsys.readouterr().err
    assert True in sent()
    there = len(runs(tmp_path))
    sent()
    assert len(runs(tmp_path)) == there, "and then no more"


# --- without a server that works -----------------------------------------------------------------------------------


class _Refuses(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.send_error(500)

    do_GET = do_POST

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def silent() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def refusing() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def down() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return f"http://127.0.0.1:{port}"


@pytest.mark.parametrize(
    "kind", ["refusing", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("silent", "down"))]
)
def test_a_server_that_does_not_work_costs_one_warning(kind: str, tmp_path: Path, request) -> None:
    url = request.getfixturevalue(kind)
    done = typed(tmp_path, "n=4", "wandb.patience=3", environment={"WANDB_BASE_URL": url, "WANDB_API_KEY": KEY})
    assert "lab_math accuracy" in done.out
    (line,) = warnings(done)
    assert "runs are kept on disk" in line
    kept = runs(tmp_path / "out")
    seconds = {key: record["seconds"] for key, record in records(tmp_path / "out").items()}
    assert {r["run_id"]: r["summary"]["seconds"] for r in kept if r["job_type"] != "cell"} == seconds
    assert len(list((tmp_path / "out/wandb").glob("*run-*/"))) == len(kept) == len(seconds) + 1, "one folder a run"
    assert all(r["exit"] == [0] for r in kept)
    assert done.seconds < 90


def test_runs_that_fail_together_are_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(io.StringIO):
        def write(self, text: str) -> int:
            time.sleep(0.05)  # as a terminal may; meanwhile the other threads come by
            return super().write(text)

    err = Slow()
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(sender, "_state", sender._State())
    threads = [threading.Thread(target=sender._fail, args=(ConnectionError("gone"),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert err.getvalue() == "W&B: gone: runs are kept on disk from here on\n"


def check_of(cell: Callable) -> list[str]:
    """What is typed for the check of a cell's data alone: a run as any, of a stage that needs no torch."""
    (stage,) = cell("n=4", *SMALL).chain.contamination
    return ["n=4", f"job=['{stage.key}']"]


def test_auto_is_offline_without_credentials_and_online_with_a_netrc(tmp_path: Path, down: str, cell) -> None:
    environment, stages = {"WANDB_BASE_URL": down}, check_of(cell)
    assert warnings(typed(tmp_path, *stages, environment=environment)) == []
    assert len(runs(tmp_path / "out")) == 1
    machine = down.removeprefix("http://")
    (tmp_path / ".netrc").write_text(f"machine {machine}\n  login user\n  password {KEY}\n")
    (tmp_path / ".netrc").chmod(0o600)
    done = typed(tmp_path, *stages, "wandb.patience=2", environment=environment, output="online")
    assert "runs are kept on disk" in warnings(done)[0], "it tried to be online"
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nmode = offline\n")  # as `wandb offline` leaves it
    assert warnings(typed(tmp_path, *stages, environment=environment, output="off")) == []


def test_online_without_credentials_never_asks(tmp_path: Path, cell) -> None:
    (line,) = warnings(typed(tmp_path, *check_of(cell), "wandb.mode=online"))
    assert "WANDB_API_KEY" in line


@pytest.mark.parametrize("environment", [{"WANDB_MODE": "disabled"}, {"WANDB_DISABLED": "true"}])
def test_disabled_writes_nothing(tmp_path: Path, environment: dict, cell) -> None:
    typed(tmp_path, *check_of(cell), environment=environment)
    assert not (tmp_path / "out" / "wandb").exists()


def test_a_cell_of_who_has_disabled_wandb_is_not_said_to_be_online(tmp_path: Path, cell) -> None:
    assert "W&B: runs in" in typed(tmp_path, *check_of(cell), output="offline").out
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nmode = disabled\n")  # as `wandb disabled` leaves it
    assert "W&B" not in typed(tmp_path, *check_of(cell)).out


def test_what_the_environment_and_the_settings_say_of_runs_is_heeded(tmp_path: Path, cell) -> None:
    said = {"WANDB_TAGS": "mine, other", "WANDB_RUN_GROUP": "ours", "WANDB_DIR": str(tmp_path / "kept")}
    typed(tmp_path, *check_of(cell), "wandb.mode=offline", "wandb.tags=[third]", "wandb.notes=why", environment=said)
    (run,) = runs(tmp_path / "kept")
    assert run["tags"] == ["third", "mine", "other"]
    assert (run["run_group"], run["notes"]) == ("ours", "why")
    assert not list((tmp_path / "out").glob("wandb/*run*"))


@pytest.mark.parametrize("name", ["dataset-modèle", "base-" + 130 * "x", "report-日本", "base-ok"])
def test_a_name_that_wandb_refuses_is_made_fit(name: str) -> None:
    import wandb

    made = sender.fit(name)
    wandb.Artifact(made, "base")  # raises for a name that it refuses
    assert (made == name) == (name == "base-ok")
    assert sender.fit(f"{name}è") != made


@pytest.mark.parametrize(("key", "words"), [("wandb.mode=on", "online"), ("wandb.patience=0", "greater than 0")])
def test_settings_are_checked(run: Callable, key: str, words: str) -> None:
    stderr = run(key, code=2).stderr
    assert key in stderr
    assert words in stderr


def test_the_dashboard_has_accuracy_over_n_the_curves_and_the_table(offline) -> None:
    pytest.importorskip("wandb_workspaces", reason="the extra dashboard is not installed")
    from d2lora.mirror import dashboard

    metrics = dashboard.main_metrics(offline.out, "mine")
    assert metrics == ["lab_math/accuracy"]
    spec = json.dumps(dashboard.report("mine", metrics, "me", "lab")._to_model().model_dump(mode="json", by_alias=True))
    for word in ("lab_math/accuracy over n", "train/loss", "samples_seen", "rewards/margins", "jobType", '"results"'):
        assert word in spec


def test_the_dashboard_of_a_sweep_without_results_is_refused(run: Callable) -> None:
    assert "sweep=nosuch: no results" in run("nosuch", module="d2lora.dashboard", code=2).stderr


# --- a real server -------------------------------------------------------------------------------------------------
# openwandb speaks W&B's protocol. Its licence is not for us to depend on, so it lives in an environment of its own
# (`make .wandb-server/ready`), and without one these tests are skipped.


class Server:
    """openwandb on loopback; what it knows is read from its database and its pages."""

    def __init__(self, program: Path, folder: Path) -> None:
        self.program, self.folder = program, folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.environment = {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY}
        self.start()

    def start(self) -> None:
        command = [self.program, "serve", "--host", "127.0.0.1", "--port", str(self.port), "--data-dir", self.folder]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(300):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/login", timeout=5):
                return self._hash_faster()
            time.sleep(0.1)
        raise RuntimeError("openwandb does not start")

    def _hash_faster(self) -> None:
        """It checks the key at each request with bcrypt, a third of a second of CPU: fewer rounds do here."""
        code = f"import bcrypt; print(bcrypt.hashpw({KEY.encode()!r}, bcrypt.gensalt(4)).decode())"
        python = self.program.parent / "python"
        hashed = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        self.ask("UPDATE api_keys SET key_hash = ?", hashed)

    def ask(self, query: str, *values: str) -> list[tuple]:
        with contextlib.closing(sqlite3.connect(self.folder / "openwandb.db", timeout=30)) as base, base:
            return base.execute(query, values).fetchall()

    def runs(self) -> dict[str, tuple[str, str, dict]]:
        """Run id -> its name, state and summary."""
        rows = self.ask("SELECT run_id, display_name, state, summary_json FROM runs")
        return {key: (name, state, json.loads(summary)) for key, name, state, summary in rows}

    def page(self, path: str) -> str:
        """A page as a user who is logged in gets it."""
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        user = json.dumps({"username": "admin", "password": "admin123"}).encode()
        login = urllib.request.Request(
            f"{self.url}/api/v2/auth/login", data=user, headers={"Content-Type": "application/json"}
        )
        opener.open(login, timeout=30).close()
        with opener.open(f"{self.url}{path}", timeout=30) as answer:
            return answer.read().decode()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    program = Path(os.environ.get("D2LORA_WANDB_SERVER", ROOT / ".wandb-server/bin/openwandb"))
    if not program.exists():
        pytest.skip(
            f"no W&B-compatible server: {program} is not there (make .wandb-server/ready, or D2LORA_WANDB_SERVER)"
        )
    found = Server(program, tmp_path / "server")
    yield found
    found.kill()


CHAIN = ["-m", "method=sft", "n=16", "m=8", "sweep=mine", "wandb.project=lab"]


def same(server: Server, output: Path) -> None:
    """The server has all runs of an output folder, ended, with the numbers of the records."""
    there = server.runs()
    for key, record in records(output).items():
        _, state, summary = there[key]
        assert state == "finished"
        if record["stage"] == "evaluate":
            assert summary["lab_math/accuracy"] == record["metrics"]["accuracy"]["value"]
        elif record["stage"] != "contamination":
            assert summary["last_loss"] == pytest.approx(record["metrics"]["last_loss"])
            logged = server.ask("SELECT value FROM metrics WHERE run_id = ? AND key = 'train/loss' ORDER BY step", key)
            assert [v for (v,) in logged] == pytest.approx([e["loss"] for e in record["metrics"]["log"]])
    assert sum(key.startswith("cell-") for key in there) == 1
    assert sum(key.startswith("report-") for key in there) == 1


@pytest.mark.wandb_server
def test_a_sweep_is_watched_on_a_server(server: Server, tmp_path: Path) -> None:
    done = typed(tmp_path, *CHAIN, environment=server.environment)
    assert warnings(done) == []
    first, last = [line for line in done.out.splitlines() if line.startswith("W&B: ")]
    assert first.startswith(f"W&B: {server.url}/"), "the first run's address, while there is something to watch"
    assert last.startswith(f"W&B: the runs are online: {server.url}/")
    assert "/runs/report-" in last
    same(server, tmp_path / "out")
    files = {name.split("/")[-1].split("_")[0] for (name,) in server.ask("SELECT name FROM files") if "media" in name}
    assert {"items", "results", "table"} <= files
    kinds = {kind for (kind,) in server.ask("SELECT artifact_type FROM artifacts")}
    assert {"model", "run_table", "report"} <= kinds  # it keeps no inputs: lineage is tested offline
    page = server.page("/projects/default/lab")
    for name in ("sft · D2LoRA(8, 16) · s0", "warm-up · D2LoRA(8, 0) · s0", "report · mine"):
        assert name in page


class Sweeps:
    """A stand-in before the server for what it lacks: the three queries of `wandb agent`. It passes on all others.

    `trials` are what agents get, in order: run id -> arguments. `sweep_of` collects which runs said that they are a sweep's.
    """

    def __init__(self, server: Server, command: list[str], trials: dict[str, dict]) -> None:
        self.server, self.config = server, json.dumps({"command": command})
        self.trials, self.sweep_of = dict(trials), {}
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.pass_on(b"")

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if answer := outer.answer(body) if self.path == "/graphql" else None:
                    self.send(200, {"Content-Type": "application/json"}, json.dumps({"data": answer}).encode())
                else:
                    self.pass_on(body)

            do_PUT = do_PATCH = do_POST

            def pass_on(self, body: bytes) -> None:
                headers = {
                    k: v for k, v in self.headers.items() if k.lower() not in ("content-length", "accept-encoding")
                }
                request = urllib.request.Request(
                    outer.server.url + self.path, data=body or None, headers=headers, method=self.command
                )
                try:
                    with urllib.request.urlopen(request, timeout=30) as got:
                        self.send(got.status, got.headers, got.read())
                except urllib.error.HTTPError as error:
                    self.send(error.code, error.headers, error.read())

            def send(self, status: int, headers, body: bytes) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.environment = server.environment | {"WANDB_BASE_URL": f"http://127.0.0.1:{self.http.server_port}"}
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def answer(self, body: bytes) -> dict | None:
        asked = json.loads(body)
        query, variables = asked.get("query", ""), asked.get("variables") or {}
        if "mutation UpsertBucket" in query:
            self.sweep_of[variables.get("name")] = variables.get("sweep")
        if "SweepWithRuns" in query:
            return {"project": {"sweep": {"config": self.config, "runs": {"edges": []}}}}
        if "CreateAgent" in query:
            return {"createAgent": {"agent": {"id": "agent"}}}
        if "mutation Heartbeat" in query:
            return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(self.next(variables))}}
        return None

    def next(self, variables: dict) -> list[dict]:
        if json.loads(variables["runState"]) or not self.trials:
            return []
        run, arguments = next(iter(self.trials.items()))
        del self.trials[run]
        args = {name: {"value": value} for name, value in arguments.items()}
        return [{"type": "run", "run_id": run, "program": str(ROOT / "run.py"), "args": args}]


@pytest.mark.wandb_server
def test_trials_of_a_wandb_sweep_have_the_cells_results_and_stages_their_own_runs(
    server: Server, tmp_path: Path
) -> None:
    """The real agent, with `${args_no_hyphens}`; the third trial is a cell that is done already, the second is wrong."""
    command = ["${env}", "${interpreter}", "${program}", "${args_no_hyphens}", *SMALL, f"output={tmp_path / 'out'}"]
    trials = {"trial-a": {"n": 4, "seed": 0}, "trial-b": {"n": -4}, "trial-c": {"n": 4, "seed": 0}}
    sweeps = Sweeps(server, command, trials)
    own = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "NETRC"))}
    own |= sweeps.environment | {"HOME": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    agent = [sys.executable, "-m", "wandb", "agent", "--count", "3", "default/lab/mysweep"]
    done = subprocess.run(agent, cwd=tmp_path, env=own, capture_output=True, text=True, timeout=500, check=False)
    told = done.stdout + done.stderr
    assert "error: n=-4" in told, told
    assert not sweeps.trials
    there, made = server.runs(), records(tmp_path / "out")
    assert set(made) <= set(there), "each stage has a run of its own"
    accuracy = next(r for r in made.values() if r["stage"] == "evaluate")["metrics"]["accuracy"]["value"]
    for trial in ("trial-a", "trial-c"):
        assert there[trial][1] == "finished"
        assert there[trial][2]["lab_math/accuracy"] == accuracy
        assert f"/runs/{trial}" in told, "its address is printed"
    assert {run: sweep for run, sweep in sweeps.sweep_of.items() if sweep} == {
        "trial-a": "mysweep",
        "trial-c": "mysweep",
    }
    (config,) = server.ask("SELECT config_json FROM runs WHERE run_id = 'trial-a'")
    assert '"seed"' in config[0]
    for host, program in server.ask("SELECT host, program FROM runs"):
        assert host == ""
        assert program in ("", "run.py"), "no path of this machine"


@pytest.mark.wandb_server
def test_a_server_that_dies_costs_no_record_and_the_rest_is_synced_in_any_order(server: Server, tmp_path: Path) -> None:
    """It is killed once the first run has arrived; the records are those of a sweep that W&B has nothing to do with."""

    def kill() -> None:
        while not server.runs():
            time.sleep(0.05)
        server.kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    done = typed(tmp_path, *CHAIN, "wandb.patience=5", environment=server.environment)
    killer.join()
    (line,) = warnings(done)
    assert "runs are kept on disk" in line
    typed(tmp_path, *CHAIN, "wandb.mode=disabled", output="plain")
    assert results(tmp_path / "out") == results(tmp_path / "plain")

    server.start()
    folders = sorted((tmp_path / "out/wandb").glob("*run-*"), reverse=True)
    subprocess.run(
        [sys.executable, "-m", "wandb", "sync", "--include-online", *folders],
        env=os.environ | server.environment | {"WANDB_MODE": "online", "HOME": str(tmp_path)},
        cwd=tmp_path,
        check=True,
        timeout=300,
        capture_output=True,
    )
    same(server, tmp_path / "out")
