"""Evaluations by an engine in a process of its own, held against a small worker that misbehaves (small_vllm.py)."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import composing
import psutil
import pytest
import torch
from doing import alone, do
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from d2lora import data
from d2lora.base import LOADED, Base, load_base
from d2lora.errors import UserError
from d2lora.evaluate.engine import Questions
from d2lora.evaluate.vllm import adapters as files
from d2lora.evaluate.vllm import installed, probe, sessions
from d2lora.evaluate.vllm.client import Client, Lost, Patience
from d2lora.evaluate.vllm.engine import InVllm
from d2lora.evaluate.vllm.running import Facts, Room, Running, Size
from d2lora.evaluate.vllm.sessions import Adapter, Gone, Session, Unable
from d2lora.settings import Benchmark, Data, Model

SMALL = Path(__file__).parents[1] / "small_vllm.py"
KEYS = ["one", "two", "three"]
PROMPTS = [{"ids": [1, 5, 6], "max_tokens": 9}, {"ids": [1, 7, 8, 9], "max_tokens": 9}]


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base and three adapters of it, each with what the small worker answers from."""
    root = tmp_path_factory.mktemp("engine")
    base = AutoModelForCausalLM.from_pretrained(tiny)
    base.save_pretrained(root / "base")
    for file in tiny.glob("*token*"):
        (root / "base" / file.name).write_bytes(file.read_bytes())
    (root / "base/chat_template.jinja").write_bytes((tiny / "chat_template.jinja").read_bytes())
    for rank, key in zip((4, 9, 4), KEYS, strict=True):
        config = LoraConfig(r=rank, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        torch.manual_seed(rank)
        wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config)
        wrapped.save_pretrained(root / key)
    loaded = load_base(Model(name="tiny", path=str(root / "base"), dtype="float32"), root)
    for tag, key in enumerate(["base", *KEYS]):
        values = probe.expected(loaded, None if key == "base" else root / key).log_probs
        (root / key / "expected.json").write_text(json.dumps({"tag": 100 + tag, "log_probs": values}))
    return root


@pytest.fixture
def base(folder: Path) -> Base:
    return load_base(Model(name="tiny", path=str(folder / "base"), dtype="float32"), folder)


@pytest.fixture
def opened(folder: Path, base: Base, tmp_path: Path) -> Iterator[Callable[..., Session]]:
    """Return opened(keys, fault, ...) -> a session with the small worker, whose log is in tmp_path."""
    sessions_: list[Session] = []

    def start(keys: list[str], answering: float = 60, **fault: object) -> Session:
        if fault:
            (tmp_path / "fault.json").write_text(json.dumps(fault))
        command = (sys.executable, "-I", str(SMALL), str(tmp_path))
        facts = Facts(command, str(folder / "base"), None, "float32", 1024, 1, Patience(60, answering))
        adapters = [Adapter(key, folder / key) for key in keys]
        sessions_.append(Session(base, facts, adapters, tmp_path / "engine.log"))
        sessions_[0].add(adapters)
        return sessions_[0]

    yield start
    for session in sessions_:
        session.close()


def ask(session: Session, key: str | None, *together: str | None, ticks: list | None = None) -> list[list[int]]:
    done = lambda: ticks.append(1) if ticks is not None else None  # noqa: E731
    return [r["ids"] for r in session.answers("generate", key, together, PROMPTS, done, ends=[2])]


def logged(tmp_path: Path, do: str) -> list[dict]:
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["do"] == do]


def answers_of(tag: int) -> list[list[int]]:
    return [[tag, len(prompt["ids"]), 2] for prompt in PROMPTS]


def test_several_adapters_and_the_base_are_each_answered_by_their_own(opened, tmp_path: Path) -> None:
    session, ticks = opened(KEYS), []
    assert not session.refused
    assert ask(session, "one", "two", None, "three", ticks=ticks) == answers_of(101)
    assert len(ticks) == len(PROMPTS), "of its own only"
    before = len(logged(tmp_path, "generate"))
    assert [ask(session, key) for key in ("three", "two", None)] == [answers_of(103), answers_of(102), answers_of(100)]
    assert len(logged(tmp_path, "generate")) == before, "they were asked in the same call"
    calls = [(call["base"], call["adapters"]) for call in logged(tmp_path, "generate")]
    assert {base for base, adapters in calls if adapters} == {False}, "the base is in calls of its own"
    assert max(adapters for _, adapters in calls) == 3
    (start,) = logged(tmp_path, "open")
    assert (start["slots"], start["rank"]) == (4, 16), "one more than adapters; rank 9 rounded up"
    assert session.changes == {None: False, "one": True, "two": True, "three": True}


def test_a_token_that_ties_with_the_likeliest_is_the_likeliest(opened) -> None:
    texts = [{"ids": [1, 5, 6, 7], "start": 2}]
    (reply,) = opened(["one"]).answers("loglikelihood", "one", [], texts, lambda: None)
    assert reply["logprobs"] == pytest.approx([-0.111, -0.121])
    assert reply["greedy"]


def test_an_adapter_that_comes_later_gets_an_id_that_was_never_used(opened, folder: Path, tmp_path: Path) -> None:
    session = opened(["two"])
    session.add([Adapter("three", folder / "three")])
    session.add([Adapter("again", folder / "two")])
    assert [ask(session, key) for key in ("two", "three", "again")] == [answers_of(t) for t in (102, 103, 102)]
    loads = logged(tmp_path, "load")
    assert len({load["number"] for load in loads}) == len({load["name"] for load in loads}) == 3
    assert len(logged(tmp_path, "open")) == 1


@pytest.mark.parametrize(
    "fault",
    [
        *("die", "quit", "raise", "hang", "idle", "babble", "forget", "garbage", "half", "close", "twice"),
        *("list", "words", "beyond", "on", "stale"),
    ],
)
def test_what_a_failed_engine_had_not_answered_is_asked_of_a_fresh_one_with_less(
    opened, tmp_path: Path, capsys, fault: str
) -> None:
    patience = {"answering": 3} if fault in ("hang", "idle") else {}
    session = opened(KEYS, at="generate", do=fault, after=8, starts=1, **patience)
    first = session.pid
    assert ask(session, "one", "two", "three") == answers_of(101)
    assert [ask(session, key) for key in ("two", "three")] == [answers_of(102), answers_of(103)]
    assert not psutil.pid_exists(first)
    starts = logged(tmp_path, "open")
    assert [start["max_num_seqs"] for start in starts] == [256, 32]
    sizes = [call["requests"] for call in logged(tmp_path, "generate")]
    assert (sizes[:3], sizes[-3:]) == ([6, 5, 4], [3, 2, 1]), "three were answered before"
    told = capsys.readouterr().err
    assert "the engine failed: it " in told
    assert "go to a fresh one with 60% of the free memory and 32 sequences at a time" in told


@pytest.mark.parametrize("key", ["two", None])
def test_a_log_probability_that_is_no_number_leaves_its_adapter_to_memory(opened, tmp_path: Path, capsys, key) -> None:
    """Of the base, everything."""
    session = opened(KEYS, at="loglikelihood", do="nan", after=5, starts=1)  # the first answer after the probes
    texts = [{"ids": [1, 5, 6, 7], "start": 2}]
    with pytest.raises(Unable if key else Gone, match="vLLM gave a log-probability of nan"):
        session.answers("loglikelihood", key, [], texts, lambda: None)
    assert capsys.readouterr().err.startswith(f"{'adapter two' if key else 'tiny'} is evaluated in memory: vLLM gave")
    assert session.why_not("two")
    assert bool(session.why_not("one")) == (key is None)
    assert len(logged(tmp_path, "open")) == 1
    if key:
        assert ask(session, "one") == answers_of(101)


def test_answers_are_not_used_where_the_probe_after_them_is_of_another_adapter(opened, tmp_path: Path) -> None:
    session = opened(["one", "two"], at="generate", do="swap", after=5, starts=1)  # 4 are of probes
    with pytest.raises(Unable, match="the log-probabilities of a probe are off by"):
        ask(session, "one", "two")
    assert list(session.refused) == ["one"]
    assert ask(session, "two") == answers_of(102)
    assert ask(session, None) == answers_of(100)
    assert len(logged(tmp_path, "open")) == 1


def test_an_adapter_that_vllm_refuses_costs_no_engine(opened, folder: Path, tmp_path: Path, capsys) -> None:
    session = opened(["one"])
    session.add([Adapter("two", folder / "two")])  # its rank is larger than the engine was opened for
    assert session.refused == {"two": "vLLM: LoRA rank 9 is greater than max_lora_rank 8."}
    assert ask(session, "one", "two", None) == answers_of(101)
    assert len(logged(tmp_path, "open")) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_engine_may_take_longer_to_open_than_to_answer(opened, tmp_path: Path) -> None:
    session = opened(["one"], at="open", do="late", starts=1, answering=1)
    assert ask(session, "one") == answers_of(101)
    assert len(logged(tmp_path, "open")) == 1


def test_a_slow_engine_is_waited_for(opened, tmp_path: Path) -> None:
    """Eight steps of half a second without a finished answer, where three seconds without a word are too many."""
    session = opened(["one"], at="generate", do="slow", after=3, starts=1, answering=3)
    assert ask(session, "one") == answers_of(101)
    assert len(logged(tmp_path, "open")) == 1


def test_a_python_that_does_not_start_is_a_lost_worker(tmp_path: Path) -> None:
    with pytest.raises(Lost, match=r"none does not start: No such file"):
        Client([str(tmp_path / "none")], {}, tmp_path / "log", Patience())


def test_after_two_failures_memory_is_asked_and_nothing_runs_on(opened, tmp_path: Path, capsys) -> None:
    session = opened(["one"], at="generate", do="die", after=3, starts=2)
    with pytest.raises(Gone):
        ask(session, "one")
    assert session.why_not("one")
    assert session.why_not(None)
    assert session.pid is None
    assert "tiny is evaluated in memory: the engine failed again: it ended" in capsys.readouterr().err
    with pytest.raises(Gone):
        ask(session, "one")
    assert len(logged(tmp_path, "open")) == 2
    assert all(not psutil.pid_exists(start["pid"]) for start in logged(tmp_path, "open"))


def test_an_adapter_that_a_fresh_engine_refuses_is_left_out_and_the_others_are_answered(
    opened, folder: Path, tmp_path: Path
) -> None:
    worse = tmp_path / "worse"
    shutil.copytree(folder / "three", worse)
    session = opened(["one", "three"], at="generate", do="die", after=8, starts=1)
    session.add([Adapter("worse", worse)])
    assert not session.refused
    (worse / "expected.json").write_text((folder / "two/expected.json").read_text())
    assert ask(session, "one", "worse", "three") == answers_of(101)
    assert list(session.refused) == ["worse"]
    assert ask(session, "three") == answers_of(103)
    with pytest.raises(Unable, match="the log-probabilities of a probe are off by"):
        ask(session, "worse")


def test_an_engine_that_made_room_is_started_again_when_it_is_asked_and_keeps_its_answers(
    opened, folder: Path, tmp_path: Path, monkeypatch
) -> None:
    session = opened(["one", "two"])
    assert ask(session, "one", "two") == answers_of(101)
    first = session.pid
    monkeypatch.setattr(sessions, "_current", session)
    sessions.make_room()
    assert not psutil.pid_exists(first)
    session.add([Adapter("two", folder / "two")])  # as each further evaluation begins
    assert ask(session, "two") == answers_of(102)
    assert session.pid is None, "it was answered before"
    assert ask(session, "one") == answers_of(101)
    assert len(logged(tmp_path, "open")) == 2


def test_an_engine_that_failed_is_not_tried_once_more_after_it_made_room(opened, tmp_path: Path, monkeypatch) -> None:
    session = opened(["one"], at="open", do="raise", after=0, starts=9)
    monkeypatch.setattr(sessions, "_current", session)
    sessions.make_room()
    session.add([])
    assert session.why_not("one").startswith("the engine failed again")
    session.close()
    log = (tmp_path / "engine.log").read_text()
    assert log.count("START") == 2, "of both engines"


def test_what_was_answered_before_the_last_engine_failed_is_used(opened, tmp_path: Path) -> None:
    session = opened(["one", "two"], at="generate", do="die", after=[7, 4], starts=2)  # 4 and 1 are of probes
    session._room = replace(session._room, slots=2)  # a call for each adapter
    assert ask(session, "one", "two") == answers_of(101)
    assert session.gone
    assert session.why_not("two") == session.gone
    assert session.sequences == 32
    with pytest.raises(Gone):
        ask(session, "two")


def test_an_adapter_that_ends_the_engine_as_it_is_loaded_is_left_out_and_the_others_are_answered(
    opened, tmp_path: Path, capsys
) -> None:
    session = opened(KEYS, at="load", do="die", after=1, starts=1)
    assert list(session.refused) == ["two"]
    assert "adapter two is evaluated in memory: the engine failed as it loaded it: it ended" in capsys.readouterr().err
    assert ask(session, "three", "one", None) == answers_of(103)
    assert [ask(session, key) for key in ("one", None)] == [answers_of(101), answers_of(100)]
    assert len(logged(tmp_path, "open")) == 2


@pytest.mark.parametrize("harm", ["adapter_model.safetensors", "adapter_config.json", "a layer"])
def test_an_adapter_that_can_t_be_read_is_refused_alone(
    opened, folder: Path, tmp_path: Path, capsys, harm: str
) -> None:
    shutil.copytree(folder / "two", tmp_path / "broken")
    if harm == "a layer":
        tensors = load_file(folder / "two/adapter_model.safetensors")
        save_file(
            {name: t[..., :3].clone() for name, t in tensors.items()}, tmp_path / "broken/adapter_model.safetensors"
        )
    else:
        (tmp_path / "broken" / harm).write_bytes(b"cut")
    session = opened(["one"])
    broken = Adapter("broken", tmp_path / "broken")
    assert session.takes(session.facts, [broken]) == (harm != "a layer"), "its rank is larger"
    session.add([broken])
    assert list(session.refused) == ["broken"]
    assert capsys.readouterr().err.startswith("adapter broken is evaluated in memory: it")
    assert ask(session, "one", "broken", None) == answers_of(101)
    assert ask(session, None) == answers_of(100)


def test_reasons_name_no_folder_of_the_machine(opened) -> None:
    error = "/home/me/models/x.so: it's not there, see https://example.org/why/not"
    session = opened(["one"], at="open", do="raise", error=error, after=0, starts=9)
    told = "x.so: it's not there, see https://example.org/why/not"
    assert session.gone == f"the engine failed again: it raised RuntimeError: {told}"


def test_on_a_gpu_the_base_leaves_it_for_the_engine_and_comes_back_when_it_is_computed_with(
    opened, base: Base, monkeypatch
) -> None:
    session, moves = opened(["one"]), []
    monkeypatch.setattr(sessions.bases, "device", lambda: "cuda")
    monkeypatch.setattr(base.model, "to", moves.append)
    again = functools.partial(load_base, next(Model.model_validate_json(name) for name in LOADED), Path())
    session.stop()
    assert moves.pop() == "cuda"
    session._ready()
    assert moves.pop() == "cpu"
    assert again() is base
    assert not moves, "the engine has the GPU"
    session.close()
    assert not moves, "nothing may be computed any more"
    again()
    assert moves == ["cuda"]


def test_an_engine_is_ended_before_a_training_needs_its_memory(opened, tiny: Path, tmp_path: Path, monkeypatch) -> None:
    session, alive = opened(["one"]), []
    engine = session.pid
    monkeypatch.setattr(sessions, "_current", session)
    training = composing.cell(
        "method=sft", "n=4", "method.epochs=1", f"model.path={tiny}", f"output={tmp_path / 'out'}"
    )
    do(alone(training), lambda done, total: alive.append(psutil.pid_exists(engine)))
    assert alive
    assert not any(alive)


def test_an_engine_that_does_not_open_is_said_and_left(opened, capsys) -> None:
    session = opened(["one"], at="open", do="raise", after=0, starts=9)
    assert session.gone
    assert "it raised RuntimeError: the engine broke" in capsys.readouterr().err


def test_an_adapter_whose_probe_is_off_is_refused_alone(opened, folder: Path, tmp_path: Path, capsys) -> None:
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for file in (folder / "one").iterdir():
        (wrong / file.name).write_bytes(file.read_bytes())
    (wrong / "expected.json").write_text((folder / "two/expected.json").read_text())
    session = opened(["three"])
    session.add([Adapter("wrong", wrong)])
    assert list(session.refused) == ["wrong"]
    assert (
        "adapter wrong is evaluated in memory: the log-probabilities of a probe are off by " in capsys.readouterr().err
    )
    assert ask(session, "three", "wrong") == answers_of(103)


def test_a_base_that_the_engine_computes_differently_is_evaluated_in_memory(opened, folder: Path, capsys) -> None:
    expected = folder / "base/expected.json"
    before = expected.read_text()
    expected.write_text((folder / "one/expected.json").read_text())
    try:
        session = opened(["one"])
    finally:
        expected.write_text(before)
    assert session.why_not("one")
    assert session.pid is None
    assert "tiny is evaluated in memory: the log-probabilities of a probe are off by " in capsys.readouterr().err


@pytest.mark.parametrize("key", ["one", None])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_one_line(opened, folder: Path, monkeypatch, capsys, key, value: float) -> None:
    plain = probe._measured
    monkeypatch.setattr(probe, "_measured", lambda model, ids: (plain(model, ids)[0], value if hasattr(model, "peft_config") == bool(key) else 1.0))  # fmt: skip
    session = opened(["one"])
    assert session.why_not("one") == f"the model in memory gives a probe logits of {value:g}"
    assert session.why_not(None) == ("" if key else session.gone)
    (line,) = capsys.readouterr().err.splitlines()
    assert "is evaluated in memory: the model in memory gives a probe logits of " in line


def test_what_the_probe_allows_in_bfloat16_is_half_a_step_at_the_largest_logit() -> None:
    assert [probe.limit(value, "bfloat16") for value in (31.9, 32.0, 1.0)] == [0.0625, 0.125, 0.00390625]
    assert probe.limit(0.0, "bfloat16") < 0.002
    assert probe.limit(31.9, "float32") == probe.EXACT
    expected = probe.Expected([-1.0, -2.0], 1.0)
    assert probe.why_off([-1.004, -2.0], expected, "bfloat16") == ""
    assert probe.why_off([-1.01, -2.0], expected, "bfloat16").endswith("are off by 0.005, and 0.0039 is allowed")
    assert probe.why_off([-1.0002, -2.0], expected, "float32").endswith("off by 0.0002, and 0.0001 is allowed")
    for odd in ([-1.0], [-1.0, float("nan")]):
        assert "off by inf" in probe.why_off(odd, expected, "float32")


def test_what_vllm_can_not_do_is_read_from_an_adapter_s_files(folder: Path, tmp_path: Path) -> None:
    assert files.why_not(folder / "two") is None
    assert files.why_not(folder / "two", quantizes=True) == "it is for a quantized base"
    for change, told in (
        ({"use_dora": True}, "use_dora=True"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head']"),
        ({"bias": "all"}, "bias=all"),
        ({"rank_pattern": {"q_proj": 600}}, "its rank 600 is above 512"),
    ):
        copy = tmp_path / told
        copy.mkdir()
        config = json.loads((folder / "two/adapter_config.json").read_text())
        (copy / "adapter_config.json").write_text(json.dumps(config | change))
        (copy / "adapter_model.safetensors").write_bytes((folder / "two/adapter_model.safetensors").read_bytes())
        assert told in str(files.why_not(copy))
    assert [files.room(rank) for rank in (1, 2, 16, 17, 300, 512)] == [1, 8, 16, 32, 320, 512]


def test_a_head_adapter_is_not_for_vllm(tiny: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), config).save_pretrained(tmp_path / "head")
    assert files.why_not(tmp_path / "head") == "it adapts lm_head"


def test_a_text_that_the_model_has_no_room_for_is_left_to_memory(opened) -> None:
    session = opened(["one"])
    with pytest.raises(Unable, match="a text of 514 tokens with its answer, where the model takes 512"):
        session.answers("generate", "one", [], [{"ids": [5] * 510, "max_tokens": 4}], lambda: None, ends=[2])
    assert ask(session, "one") == answers_of(101)


def test_benchmarks_are_scored_by_the_harness_whoever_answers(opened, base: Base) -> None:
    session = opened(["one"])
    rows = [{"question": f"What is {i} + {i}?", "answer": "4", "text": ["a", "b b"], "label": [1, 2], "right": 1} for i in (1, 2)]  # fmt: skip
    shared = {"data": Data(path="x"), "prompt": "{question}", "max_new_tokens": 8}
    number = Benchmark(kind="number", gold="{answer}", **shared)
    ticks: list[tuple[int, int]] = []
    for key, tag in (("one", 101), (None, 100)):
        engine = InVllm(base, session, key)
        evaluation = engine.evaluate(Questions("sums", number, rows), 0, lambda *tick: ticks.append(tick))
        first = data.encode(base.tokenizer, evaluation.items[0]["prompt"])
        assert evaluation.items[0]["answer"] == base.tokenizer.decode([tag, len(first)])
        assert (evaluation.metrics["accuracy"]["items"], evaluation.batch) == (2, 256)
    assert ticks[-1] == (2, 2)
    choice = Benchmark(kind="choice", gold="{right}", choices="text", labels="label", chat=False, **shared)
    evaluation = InVllm(base, session, "one").evaluate(Questions("choices", choice, rows[:1]), 0, lambda *tick: None)
    assert evaluation.items[0]["loglikelihoods"] == sorted(evaluation.items[0]["loglikelihoods"], reverse=True)
    assert evaluation.items[0]["answer"] == "a"


def test_an_engine_that_is_not_installed_is_refused_before_anything_is_loaded(tiny: Path, tmp_path: Path) -> None:
    for python, told in ((tmp_path / "none", "no Python that starts"), (sys.executable, "has no vLLM")):
        with pytest.raises(UserError, match=f"recipe.engine_python=.*: {told}: build it with `make engine`"):
            composing.cell(f"model.path={tiny}", "recipe.engine=vllm", f"recipe.engine_python={python}")
        in_memory = composing.cell(f"model.path={tiny}", f"recipe.engine_python={python}").config
        installed.check(in_memory.recipe)


PARENT = """
import sys
from pathlib import Path
from d2lora.evaluate.vllm.client import Client, Patience
client = Client([sys.executable, "-I", sys.argv[1], sys.argv[2]], {}, Path(sys.argv[2]) / "log", Patience())
print(client.pid, flush=True)
list(client.ask("open", base="x", revision=None, dtype="float32", length=9, memory=1.0, sequences=2, rank=8, slots=2, layers=[]))
"""


@pytest.mark.parametrize(
    ("end", "frozen"),
    [(signal.SIGKILL, False), (signal.SIGKILL, True), (signal.SIGINT, False), (signal.SIGTERM, False)],
)
def test_nothing_is_left_running_when_the_process_that_asks_is_ended(
    tmp_path: Path, end: signal.Signals, frozen: bool
) -> None:
    (tmp_path / "fault.json").write_text(json.dumps({"at": "open", "do": "hang", "after": 0, "starts": 1}))
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(SMALL), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).parents[2],
        preexec_fn=functools.partial(
            signal.signal, signal.SIGINT, signal.SIG_DFL
        ),  # a shell's background jobs ignore it
    )
    assert parent.stdout
    worker = psutil.Process(int(parent.stdout.readline()))
    while not (tmp_path / "hanging").exists():
        time.sleep(0.05)
    if frozen:
        worker.suspend()  # it can't see that its standard input ends
    os.kill(parent.pid, end)
    parent.wait(30)
    worker.wait(30)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


def test_an_engine_that_says_no_version_is_not_used(tmp_path: Path) -> None:
    command = (sys.executable, "-c", """print('{"id": 1, "end": true}', flush=True); input()""")
    facts = Facts(command, "base", None, "float32", 1024, 1, Patience(60, 60))
    with pytest.raises(Lost, match="it did not say its version"):
        Running(facts, Room(8, frozenset(), 1, 64), Size(0.9, 8), tmp_path / "log")


def test_a_client_that_lost_its_worker_is_not_used_again(tmp_path: Path) -> None:
    client = Client([sys.executable, "-c", "print('hello')"], {}, tmp_path / "log", Patience(10, 10))
    for _ in range(2):
        with pytest.raises(Lost):
            list(client.ask("open"))


def test_a_session_is_used_again_while_it_has_room(opened, folder: Path) -> None:
    session = opened(["one"])
    two, three = (Adapter(key, folder / key) for key in ("two", "three"))
    assert session.takes(session.facts, [three])
    assert not session.takes(session.facts, [two]), "its rank is larger"
    assert not session.takes(session.facts, [three, Adapter("again", folder / "one")]), "a slot for the base is left"
    assert not session.takes(replace(session.facts, dtype="bfloat16"), [three])
