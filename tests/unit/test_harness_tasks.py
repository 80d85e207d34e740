"""Tasks of lm-evaluation-harness as settings: what enters a key, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from d2lora.command import preflight
from d2lora.data import harness_tasks
from d2lora.errors import UserError
from d2lora.settings import HarnessTask


def spec(cell: Callable, *overrides: str) -> dict:
    """What the key of the cell's evaluation by the harness covers."""
    (stage,) = [s for s in cell("n=8", *overrides).chain.evaluations if s.spec.lm_eval]
    return stage.spec.content()


def test_only_settings_that_differ_enter_a_key(cell) -> None:
    plain = spec(cell, "+task.lm_eval=[gsm8k]")
    assert set(plain) == {"lm_eval", "libraries"}
    assert spec(cell, "+task.lm_eval=[{name:gsm8k,chat:false}]") == plain
    changed = spec(cell, "+task.lm_eval=[{name:gsm8k,filter:flexible-extract,fewshot:0,limit:9}]")
    assert changed == plain | {"harness": {"filter": "flexible-extract", "fewshot": 0, "limit": 9}}


def test_a_task_of_the_user_s_enters_a_key_by_its_content_wherever_it_is(cell, tmp_path: Path) -> None:
    def written(folder: str, **changes: str) -> dict:
        path = tmp_path / folder
        path.mkdir(exist_ok=True)
        files = {"code.py": "def asked(doc): return doc['q']", "rows.jsonl": '{"q": "1"}'} | {
            "other.yaml": "task: other"
        }
        lines = {
            "task": "mine", "dataset_path": "json", "doc_to_text": "!function code.asked",
            "dataset_kwargs": f"{{data_files: {{test: {path}/rows.jsonl}}}}",
        }  # fmt: skip
        for name, text in (files | {"mine.yaml": "\n".join(f"{k}: {v}" for k, v in lines.items())} | changes).items():
            (path / name).write_text(text)
        return spec(cell, "+task.lm_eval=[mine]", f"+task.lm_eval_path={path}")

    first = written("one")
    assert str(tmp_path) not in json.dumps(first)
    assert written("two") == first
    assert written("two", **{"other.yaml": "task: another"}) == first, "another task is none of its business"
    assert written("two", **{"rows.jsonl": '{"q": "2"}'}) != first
    assert written("two", **{"code.py": "def asked(doc): return 'q'"}) != first


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("[{name:gsm8k,shots:5}]", "task.lm_eval.0.shots: there is no such key"),
        ("[{name:gsm8k,limit:0}]", "task.lm_eval.0.limit=0: input should be greater than 0"),
        ("[gsm8k,{name:gsm8k,chat:true}]", "lm_eval=gsm8k: more than one benchmark has this name"),
        ("[lab_math]", "lm_eval=lab_math: more than one benchmark has this name"),
    ],
)
def test_settings_of_a_task_are_checked(cell, given: str, told: str) -> None:
    with pytest.raises(UserError) as refused:
        cell("n=8", f"+task.lm_eval={given}")
    assert told in str(refused.value)


def test_a_dry_run_looks_for_the_names_of_tasks_and_loads_none(cell, tmp_path: Path, monkeypatch) -> None:
    """The harness's own index, which takes many seconds, is asked for a name that is in no file only."""
    asked: list[str] = []
    monkeypatch.setattr(harness_tasks, "_require_single", lambda name, folder: asked.append(name))
    (tmp_path / "mine.yaml").write_text("task: 'mine'  # my own\ndataset_path: json\n")
    given = ["n=8", "dry_run=true", f"output={tmp_path / 'out'}", f"+task.lm_eval_path={tmp_path}"]
    config = cell(*given, "+task.lm_eval=[gsm8k,mine]").config
    preflight.check_inputs(config, set())
    assert asked == []
    harness_tasks.check_names(cell(*given, "+task.lm_eval=[mine_too]").config.task.harness_tasks, str(tmp_path))
    assert asked == ["mine_too"]


def test_a_mistyped_name_is_refused_without_the_harness_s_index(monkeypatch) -> None:
    monkeypatch.setattr(harness_tasks, "harness", lambda: pytest.fail("reads 14,000 files"))
    with pytest.raises(UserError, match=r"task.lm_eval=gsm8kk: lm-evaluation-harness has no such task"):
        harness_tasks.check_names([HarnessTask(name="gsm8kk")])


@pytest.mark.parametrize("group", ["acp_bench_hard_with_pddl", "mafand_afr-eng", "bertaqa"])
def test_names_of_groups_and_tags_are_left_to_the_harness_s_index(monkeypatch, group: str) -> None:
    monkeypatch.setattr(harness_tasks, "harness", lambda: SimpleNamespace(all_subtasks=[], all_tasks=[group]))
    with pytest.raises(UserError, match=rf"task.lm_eval={group}: a group of tasks"):
        harness_tasks.check_names([HarnessTask(name=group)])
