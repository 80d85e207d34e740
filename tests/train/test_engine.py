"""vLLM itself, in .engine: the answers and likelihoods of the model in memory, for the base, a plain and an EVA adapter."""

import os
from pathlib import Path

import composing
import pytest
from doing import do

from d2lora import data
from d2lora.base import load_base
from d2lora.evaluate.engine import Questions
from d2lora.evaluate.vllm import adapters as files
from d2lora.evaluate.vllm import installed, sessions
from d2lora.evaluate.vllm.engine import InVllm
from d2lora.outputs import ROOT, Outputs
from d2lora.records import read_items

PYTHON = Path(os.environ.get("ENGINE_PYTHON", ROOT / ".engine/bin/python"))
ITEMS = {"lab_math": 60, "lab_facts": 20}  # of answers, and of choices, each with four likelihoods
SHORT = ["method.epochs=1", *(f"task.benchmark.{name}.limit={count}" for name, count in ITEMS.items())]

pytestmark = [
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason=f"{PYTHON} is not there: make engine"),
]


def test_answers_and_likelihoods_are_those_of_the_model_in_memory(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, which vLLM fills with zeros as it starts
    asked = [f"output={tmp_path}", "recipe.engine=vllm", f"recipe.engine_python={PYTHON}"]
    config = composing.cell("n=0", *asked).config
    outputs = Outputs.of(config)
    items: dict[tuple[str | None, str], list[dict]] = {}
    adapters = []
    for own in (["n=0"], ["n=64"], ["n=64", "init=eva", "init.samples=32"]):
        cell = composing.cell(*own, f"output={tmp_path}", *SHORT)
        do(cell)
        parent = cell.chain.evaluations[0].parent
        for stage in cell.chain.evaluations:
            items[parent and parent.key, stage.subject] = read_items(outputs.record("evaluate", stage.key))
        if parent:
            adapters.append(sessions.Adapter(parent.key, outputs.record(parent.kind, parent.key) / "adapter"))
    plain, eva = adapters
    assert files.rank(plain.folder) < files.rank(eva.folder), "its layers have ranks of their own"
    base = load_base(config.model, outputs.models)
    session = sessions.opened(base, config.model, adapters, config.recipe, outputs)
    try:
        assert (session.gone, session.refused) == ("", {}), capsys.readouterr().err
        assert session.version == installed.version(PYTHON).split("+")[0]
        for name, count in ITEMS.items():
            benchmark = config.benchmarks[name].model_copy(update={"limit": count})
            questions = Questions(name, benchmark, data.rows(benchmark.data))
            for key in (None, plain.key, eva.key):
                engine = InVllm(base, session, key, (None, plain.key, eva.key))
                answered = engine.evaluate(questions, 0, lambda done, total: None).items
                assert len(answered) == count
                _same(answered, items[key, name])
    finally:
        sessions.close()


def _same(answered: list[dict], expected: list[dict]) -> None:
    for one, other in zip(answered, expected, strict=True):
        assert one.keys() == other.keys()
        scores = [item.pop("loglikelihoods", []) for item in (one, other)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)
        assert one == other
