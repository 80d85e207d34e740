"""Benchmarks through the harness: each item once, likelihoods in float32, greedy where greedy is said."""

import json
import math
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import composing
import families
from configurations import configurations
from doing import do

from d2lora import data
from d2lora.base import Base, load_base
from d2lora.command import fetch, preflight, summary
from d2lora.errors import UserError
from d2lora.evaluate import harness
from d2lora.evaluate.task import harness_task
from d2lora.layouts import proof
from d2lora.records import Records
from d2lora.scoring import kind_named
from d2lora.settings import Benchmark, Data, HarnessTask, Model, Task
from d2lora.store import Store

ROWS = [{"question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(1, 5)]


@pytest.fixture
def base(tiny: Path, tmp_path: Path):
    """base(dtype="bfloat16", template=False, generation={...}) -> the tiny model as a checkpoint might have it."""

    def load(dtype: str = "float32", template: bool = True, generation: dict | None = None, eos: bool = True) -> Base:
        folder = tmp_path / "base"
        shutil.copytree(tiny, folder)
        if not template:
            (folder / "chat_template.jinja").unlink()
        if not eos:
            file = folder / "tokenizer_config.json"
            settings = json.loads(file.read_text())
            file.write_text(json.dumps({name: value for name, value in settings.items() if name != "eos_token"}))
        if generation:
            file = folder / "generation_config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | generation))
        return load_base(Model(name="tiny", path=str(folder), dtype=dtype), tmp_path)

    return load


def run(base: Base, task, chat: bool = False) -> tuple[dict, list[dict]]:
    return asked(base, task, chat, 2)[:2]


def asked(base: Base, task, chat: bool, batch: int) -> tuple[dict, list[dict], int]:
    with tempfile.TemporaryDirectory() as folder:
        memory = proof.Memory(Path(folder), {})
        return harness.evaluate(base, base.model, harness.Test(task, chat), batch, lambda done, total: None, memory)


def numbers(**more) -> Benchmark:
    return Benchmark(
        data=Data(path="d2lora/lab/data/math"), kind="number", prompt="{question}", gold="{answer}", max_new_tokens=3, **more
    )  # fmt: skip


def test_a_bfloat16_model_s_likelihoods_are_not_rounded_to_bfloat16(base) -> None:
    benchmark = Benchmark(
        data=Data(path="d2lora/lab/data/facts"), kind="choice", prompt="{question}", gold="{answerKey}",
        choices="choices.text", labels="choices.label", chat=False,
    )  # fmt: skip
    rows = data.rows(Data(path="d2lora/lab/data/facts", split="validation"))[:4]
    _, items = run(base("bfloat16"), harness.task_of("facts", benchmark, rows, template=True))
    found = torch.tensor([x for item in items for x in item["loglikelihoods"]])
    assert (found != found.bfloat16().float()).any()


@pytest.mark.parametrize(("name", "batch"), [("minimax", 1), ("llama", 3)])
def test_a_batch_gives_the_answers_of_single_texts_or_is_not_used(tmp_path, capsys, name: str, batch: int) -> None:
    """MiniMax's cached states are wrong beside padding: most of its answers would change with the batch."""
    base = families.loaded(name, configurations()[name](), tmp_path)
    texts = [
        "What is 1 + 1?",
        "Tom has 3 apples and buys 4 more apples. How many apples has he then?",
        "What is 20 - 6?",
    ]
    rows = [{"question": text, "answer": "2"} for text in texts]
    task = harness.task_of("sums", numbers().model_copy(update={"max_new_tokens": 8}), rows, template=True)
    _, together, used = asked(base, task, True, 3)
    told = capsys.readouterr().err
    _, alone, _ = asked(base, task, True, 1)
    assert used == batch
    assert [item["answer"] for item in together] == [item["answer"] for item in alone]
    assert (f"{name}: evaluated one by one" in told) is (batch == 1)


def test_greedy_is_greedy_whatever_the_checkpoint_asks_for(base) -> None:
    asked = {"repetition_penalty": 1.3, "do_sample": True, "temperature": 0.6}
    found = base(generation=asked).model.generation_config
    assert found.repetition_penalty in (None, 1.0)
    assert not found.do_sample
    assert found.eos_token_id is not None


@pytest.mark.parametrize("template", [True, False])
def test_a_base_is_asked_as_it_was_trained(base, template: bool) -> None:
    loaded = base(template=template)
    _, items = run(loaded, harness.task_of("sums", numbers(), ROWS, template), chat=template)
    assert items[0]["prompt"].endswith(data.rendered_prompt(loaded.tokenizer, ROWS[0]["question"]))


def test_a_tokenizer_without_an_end_of_its_own_is_given_the_template_s(base, capsys) -> None:
    """The harness asks for it before it generates anything."""
    loaded = base(eos=False)
    assert loaded.tokenizer.eos_token == "<|end|>"
    assert "its tokenizer names none: training and generation end with <|end|>" in capsys.readouterr().err
    _, items = run(loaded, harness.task_of("sums", numbers(), ROWS, True), chat=True)
    assert len(items) == len(ROWS)


def test_a_base_without_a_template_can_not_learn_from_conversations(base) -> None:
    with pytest.raises(UserError, match="has no chat template"):
        data.conversation_example(base(template=False).tokenizer, [{"role": "user", "content": "Hello"}])


def test_an_answer_read_in_two_ways_is_one_item(base) -> None:
    both = [{"name": name, "filter": [{"function": "take_first"}]} for name in ("strict", "flexible")]
    task = ConfigurableTask(
        config={
            "task": "sums",
            "custom_dataset": lambda **_: {"test": Dataset.from_list(ROWS)},
            "test_split": "test",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "output_type": "generate_until",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 3},
            "filter_list": both,
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        }
    )
    metrics, items = run(base(), task)
    assert metrics["exact_match"]["items"] == len(ROWS)
    assert [item["index"] for item in items] == [0, 1, 2, 3]


@pytest.mark.parametrize(("name", "told"), [("mmlu", "a group of tasks"), ("no_such", "has no such task")])
def test_a_task_of_the_harness_is_a_single_one_that_it_has(name: str, told: str) -> None:
    with pytest.raises(UserError, match=f"task.lm_eval={name}: .*{told}"):
        data.check_lm_eval([HarnessTask(name=name)])


@pytest.mark.parametrize("kind", ["rouge", "choice"])
def test_a_prompt_that_the_harness_would_cut_is_refused(base, kind: str) -> None:
    """The model takes 512 tokens; a prompt without its beginning would be scored as any other."""
    row = {"question": "sum " * 511, "text": ["a", "b"], "label": ["A", "B"], "answer": "A"}
    benchmark = Benchmark(
        data=Data(path="x"), kind=kind, prompt="{question}", gold="{answer}", choices="text", labels="label", chat=False,
        max_new_tokens=8,
    )  # fmt: skip
    short = harness.task_of("t", benchmark, [row | {"question": "sum"}], template=True)
    loaded = base()
    assert run(loaded, short)[1]
    with pytest.raises(UserError, match=r"an item of \d+ tokens, where \d+ fit \(the model takes 512"):
        run(loaded, harness.task_of("t", benchmark, [row], template=True))


def test_rows_whose_values_differ_in_type_are_taken_as_they_are(base) -> None:
    rows = [{"question": "1 + 1?", "answer": 2, "by": "a"}, {"question": "3 / 2?", "answer": 1.5, "by": 7}]
    _, items = run(base(), harness.task_of("sums", numbers(), rows, template=True))
    assert [item["gold"] for item in items] == ["2", "1.5"]


ARC = """---
configs:
- config_name: ARC-Easy
  data_files:
  - {split: train, path: ARC-Easy/train.jsonl}
  - {split: validation, path: ARC-Easy/validation.jsonl}
  - {split: test, path: ARC-Easy/test.jsonl}
---
"""


def test_a_task_named_by_the_harness_gives_what_the_same_benchmark_as_a_file_does(
    base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The harness's arc_easy, over the lab's facts in the place where it looks for the Hub's data set."""
    folder = tmp_path / "allenai/ai2_arc/ARC-Easy"
    folder.mkdir(parents=True)
    (folder.parent / "README.md").write_text(ARC)
    facts = Data(path="d2lora/lab/data/facts", split="test")
    rows = data.rows(facts)[:24]
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    loaded = base()
    benchmark = Benchmark(
        data=facts, kind="choice", prompt="Question: {question}\nAnswer:", gold="{answerKey}",
        choices="choices.text", labels="choices.label", chat=False,
    )  # fmt: skip
    named, items = run(loaded, harness_task(HarnessTask(name="arc_easy")))
    assert named == run(loaded, harness.task_of("facts", benchmark, rows, template=True))[0]
    assert [item["prompt"] for item in items] == [f"Question: {row['question']}\nAnswer:" for row in rows]


def test_what_a_task_of_the_harness_can_not_download_is_one_line() -> None:
    with pytest.raises(UserError, match=r"task.lm_eval=hellaswag: .*the Hub can't be reached"):
        fetch._fetch_lm_eval("hellaswag")


OWN = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}, train: {rows}}}}}
test_split: test
fewshot_split: train
output_type: generate_until
doc_to_text: !function texts.asked
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\n"], do_sample: false, max_gen_toks: 6}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
filter_list:
- {{name: strict, filter: [{{function: regex, regex_pattern: '#### (\\d+)'}}, {{function: take_first}}]}}
- {{name: loose, filter: [{{function: regex, regex_pattern: '(\\S)'}}, {{function: take_first}}]}}
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with one task of the harness's form, its function and its data."""
    folder = tmp_path / "own_tasks"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "texts.py").write_text("def asked(doc):\n    return doc['question']\n")
    (folder / "sums.yaml").write_text(OWN.format(rows=folder / "rows.jsonl"))
    return folder


def test_a_task_in_a_folder_of_the_user_s_with_filter_limit_and_examples(base, own: Path, capsys) -> None:
    loaded = base()
    task = HarnessTask(name="sums")
    data.check_lm_eval([task], str(own))
    assert "its filter strict counts; it also has loose" in capsys.readouterr().err
    engine = harness.InMemory(loaded, loaded.model, proof.Memory(own.parent, {}))

    def answers(**settings) -> list[dict]:
        questions = harness.Questions("sums", harness=task.model_copy(update=settings), folder=str(own))
        return engine.evaluate(questions, 2, lambda done, total: None).items

    strict, loose = answers(), answers(filter="loose", limit=3)
    assert [len(strict), len(loose)] == [4, 3]
    assert {item["answer"] for item in strict} == {"[invalid]"}
    assert all(item["raw"] not in ("", "[invalid]") for item in strict), "the model's own words are kept"
    assert all(item["answer"] in item["raw"] for item in loose)
    examples = answers(fewshot=2, chat=True)[0]["prompt"]
    assert examples.count("What is ") == 3
    assert examples.count("user") == 3, "examples are turns of their own"


def test_a_chat_template_that_a_base_has_not_is_not_left_out_silently(base, own: Path) -> None:
    questions = harness.Questions("sums", harness=HarnessTask(name="sums", chat=True), folder=str(own))
    with pytest.raises(UserError, match="chat=true: the base has no chat template"):
        harness.as_test(questions, base(template=False))


def test_a_metric_that_a_sweeper_is_to_optimize_is_looked_for_before_the_first_trial(own: Path) -> None:
    data.check_lm_eval([HarnessTask(name="sums")], str(own), [("sums", "exact_match"), ("other", "acc")])
    with pytest.raises(UserError, match=r"objective=sums/acc: sums has exact_match"):
        data.check_lm_eval([HarnessTask(name="sums")], str(own), [("sums", "acc")])


def test_what_does_not_fit_a_task_of_the_harness_shows_before_training(own: Path) -> None:
    for settings, told in (
        ({"name": "sums", "filter": "exact"}, "filter=exact: strict, loose"),
        ({"name": "nosuch"}, "has no such task: .*own_tasks has sums"),
    ):
        with pytest.raises(UserError, match=told):
            data.check_lm_eval([HarnessTask(**settings)], str(own))
    (own / "rows.jsonl").unlink()
    with pytest.raises(UserError, match=r"task.lm_eval=sums: its data can't be had"):
        data.check_lm_eval([HarnessTask(name="sums")], str(own))
    with pytest.raises(UserError, match=r"task.lm_eval_path=nowhere: no such folder here"):
        data.check_lm_eval([HarnessTask(name="sums")], "nowhere")


def test_dates_that_the_harness_would_show_as_times_are_refused(own: Path) -> None:
    dated = [row | {"answer": f"2021-03-0{i}"} for i, row in enumerate(ROWS, 1)]
    (own / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in dated))
    with pytest.raises(UserError, match=r"task.lm_eval=sums: the harness reads answer in its JSON data as times"):
        data.check_lm_eval([HarnessTask(name="sums")], str(own))
    unused = [row | {"written": f"2021-03-0{i}"} for i, row in enumerate(ROWS, 1)]
    (own / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in unused))
    data.check_lm_eval([HarnessTask(name="sums")], str(own))


def test_answers_of_which_a_filter_leaves_marks_only_are_told(base, own: Path, capsys) -> None:
    marks = (
        "- {name: marks, filter: [{function: map, mapping_dict: {}, default_value: '$.'}, {function: take_first}]}\n"
    )
    (own / "sums.yaml").write_text((own / "sums.yaml").read_text() + marks)
    loaded = base()
    engine = harness.InMemory(loaded, loaded.model, proof.Memory(own.parent, {}))
    for name, told in (("marks", True), ("strict", False)):
        questions = harness.Questions("sums", harness=HarnessTask(name="sums", filter=name), folder=str(own))
        engine.evaluate(questions, 2, lambda done, total: None)
        assert ("sums: of 4 of 4 answers the filter read marks only, such as '$.'" in capsys.readouterr().err) == told


def generated(kind: str, rows: list[dict], **more) -> Benchmark:
    return Benchmark(
        data=Data(path="x"), kind=kind, prompt="{question}", gold="{answer}", **({"max_new_tokens": 3} | more)
    )


def test_answers_cut_at_max_new_tokens_are_marked_and_counted(base, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of random weights does not end by itself; one whose first token is an end says nothing."""
    loaded = base()
    task = harness.task_of("sums", numbers(), ROWS, template=True)
    _, items = run(loaded, task)
    assert [item.get("cut") for item in items] == [True] * 4
    assert harness.counts(items) == {"cut": 4, "empty": sum(not i["answer"].strip() for i in items)}
    first = loaded.tokenizer(items[0]["answer"], add_special_tokens=False)["input_ids"]
    ends = [*range(len(loaded.tokenizer))]
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", ends)
    _, ended = run(loaded, task)
    assert len(first) > 0
    assert not [item for item in ended if "cut" in item], "each answer ends with its first token"


def test_one_answer_is_cut_and_another_is_not(base) -> None:
    """Of two prompts in one batch: the end token is the one that the first answers with at once."""
    loaded = base()
    rows = [
        {"question": text, "answer": "1"}
        for text in ("sum", "What is 7 + 8?", "two apples and", "x y z", "red", "blue or green")
    ]
    task = harness.task_of("sums", generated("rouge", rows), rows, template=True)
    ids = []
    for row in rows:
        prompt = loaded.tokenizer(row["question"], return_tensors="pt")
        ids.append(loaded.model.generate(**prompt, max_new_tokens=3, do_sample=False)[0, -3:].tolist())
    end = next(i for found in ids for i in found if 0 < sum(i in other for other in ids) < len(ids))
    loaded.model.generation_config.eos_token_id = [end]
    _, items = run(loaded, task)
    assert [bool(item.get("cut")) for item in items] == [end not in found for found in ids]


def test_choices_have_no_counts(base) -> None:
    row = {"question": "sum", "text": ["a", "b"], "label": [1, 2], "answer": 1}
    benchmark = generated("choice", [row], choices="text", labels="label", chat=False)
    metrics, items = run(base(), harness.task_of("t", benchmark, [row], template=True))
    assert (items[0]["gold"], items[0]["choices"], metrics["acc"]["items"]) == ("a", ["a", "b"], 1)
    assert harness.counts(items) == {}


@pytest.mark.parametrize("kind", ["exact", "number", "rouge"])
def test_the_best_of_several_golds_counts(base, kind: str) -> None:
    """The identical answer is among the golds of the first row only."""
    loaded = base()
    said = "18" if kind == "number" else "a red apple"
    rows = [{"question": "a?", "answer": ["20", said, "7"]}, {"question": "b?", "answer": ["20", "7"]}]
    task = harness.task_of("t", generated(kind, rows), rows, template=True)
    docs = list(task.test_docs())
    scores = [task.process_results(doc, [said]) for doc in docs]
    assert [set(s.values()) for s in scores] == [{1.0}, {0.0}]
    assert set(scores[0]) == set(kind_named(kind).metrics)
    metrics, items = run(loaded, task)
    assert items[0]["gold"] == f"20 | {said} | 7"
    assert tuple(metrics) == kind_named(kind).metrics


def test_exact_answers_are_right_or_wrong_by_their_text(base) -> None:
    rows = [{"question": "where?", "answer": r"3\sqrt{13}"}]
    task = harness.task_of("t", generated("exact", rows), rows, template=True)
    doc = next(iter(task.test_docs()))
    for answer, score in ((r"It is \boxed{3 \sqrt{13}}.", 1.0), ("3", 0.0), ("", 0.0), (r"\boxed{3\sqrt{12}}", 0.0)):
        assert task.process_results(doc, [answer]) == {"accuracy": score}


def test_a_prompt_or_gold_that_is_no_text_is_refused_before_anything_is_asked() -> None:
    for row in (
        {"question": None, "answer": "1"},
        {"question": ["a"], "answer": "1"},
        {"question": "a", "answer": [["1"]]},
    ):
        with pytest.raises(UserError, match="row 2: "):
            harness.task_of("t", numbers(), [ROWS[0], row], template=True)


@pytest.mark.parametrize(
    ("name", "more"),
    [("task.benchmark.lab_math", []), ("task.validation.lab_math_validation", ["tune=[recipe.lr]"])],
    ids=["benchmark", "validation"],
)
def test_items_keep_the_cluster_that_their_benchmark_names(name: str, more: list[str], tiny, tmp_path: Path) -> None:
    file = tmp_path / "passages.jsonl"
    rows = [row | {"passage": passage} for row, passage in zip(ROWS, ("a", "a", "b", None), strict=True)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    test_set = [f"model.path={tiny}", f"{name}.data.path={file}", f"~{name}.data.split", f"+{name}.cluster=passage"]
    short = [f"{name}.max_new_tokens=3", "~task.benchmark.lab_facts", "task.benchmark.lab_math.limit=4"]
    cell = composing.cell("n=0", *test_set, *short, *more, f"output={tmp_path / 'out'}")
    do(cell)
    key = (cell.chain.validations or cell.chain.evaluations)[0].key
    records = Records(tmp_path / "out")
    records.get("evaluate", key)
    assert [item["cluster"] for item in records.texts(key, [0, 1, 2, 3])] == ["a", "a", "b", "row 3"]
    assert records.clusters(key).tolist() == [0, 0, 1, 2]


def test_turns_are_rendered_as_a_conversation(base) -> None:
    """A system turn and history in the benchmark's file, and in a column of its rows."""
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hi."},
    ]
    loaded = base()
    asked_for = [*history, {"role": "user", "content": "What is 1 + 1?"}]
    rendered = loaded.tokenizer.apply_chat_template(asked_for, tokenize=False, add_generation_prompt=True)
    given = {"data": {"path": "x"}, "kind": "number", "gold": "{answer}", "max_new_tokens": 3}
    of_file = Benchmark.model_validate(given | {"prompt": [*history, {"role": "user", "content": "{question}"}]})
    of_row = Benchmark.model_validate(given | {"prompt": "{question}"})
    for benchmark, row in ((of_file, ROWS[0]), (of_row, ROWS[0] | {"question": asked_for})):
        items = run(loaded, harness.task_of("t", benchmark, [row], template=True), chat=True)[1]
        assert items[0]["prompt"] == rendered
    with pytest.raises(UserError, match="needs a model with a chat template"):
        run(loaded, harness.task_of("t", of_file, [ROWS[0]], template=False), chat=False)


def test_items_that_are_left_out_are_counted_and_the_others_keep_their_rows(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "items.jsonl"
    rows = [*ROWS, {"question": None, "answer": "1"}, {"question": "how many cups " * 300, "answer": "1"}, ROWS[0]]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["data.path=" + str(file), "max_new_tokens=3"]
    new = ["data.empty=leave_out", "too_long=leave_out"]
    overrides = [f"task.benchmark.lab_math.{o}" for o in given] + [f"+task.benchmark.lab_math.{o}" for o in new]
    cell = composing.cell(
        "n=0", f"model.path={tiny}", "~task.benchmark.lab_facts", *overrides, f"output={tmp_path / 'out'}"
    )
    preflight.check(cell.config, set())
    do(cell)
    key = cell.chain.evaluations[0].key
    records = Records(tmp_path / "out")
    record = records.get("evaluate", key)
    assert record.passed_over == {"empty": 1, "too long for the model": 1}
    assert [item["index"] for item in records.texts(key, range(5))] == [0, 1, 2, 3, 6]
    text = summary.cell_text(cell, Store(tmp_path / "out"))
    assert "lab_math: 1 items left out of the scores (too long for the model)" in text
    assert "5 of 5 answers stopped at max_new_tokens" in text


# --- the likelihood of reference solutions ---------------------------------------------------------------------------

SOLUTION = "Step 1: 3 + 4 = 7. The answer is \\boxed{7}."
SOLVED = [{"question": f"What is {i} + 4?", "answer": SOLUTION.replace("3", str(i))} for i in range(1, 6)]


def likelihoods(base: Base, template: bool, rows: list[dict]) -> tuple[dict, list[dict]]:
    benchmark = generated("likelihood", rows)
    return run(base, harness.task_of("t", benchmark, rows, template), chat=template)


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("end", ["", "\n"])
def test_a_solution_s_likelihood_is_that_of_the_tokens_that_training_learns(base, template: bool, end: str) -> None:
    """The harness would count white space with which a template ends to the solution."""
    loaded = base(template=template)
    if template and end:
        loaded.tokenizer.chat_template += "{% if add_generation_prompt %}\n{% endif %}"
    task = Task(name="t", data=Data(path="x"), prompt="{question}", chosen="{answer}", full_chosen="{answer}")
    metrics, items = likelihoods(loaded, template, SOLVED)
    for row, item in zip(SOLVED, items, strict=True):
        example = data.pair_example(loaded.tokenizer, task, row)
        answer = example["chosen_ids"][: len(example["chosen_ids"]) - 1]  # without its end
        ids = torch.tensor([example["prompt_ids"] + answer])
        with torch.no_grad():
            logps = loaded.model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        nats = float(logps[len(example["prompt_ids"]) - 1 :].sum())
        assert item["loglikelihood_per_byte"] == pytest.approx(nats / math.log(2) / len(row["answer"]), abs=1e-5)
        assert (item["answer"], item["gold"]) == (None, row["answer"])
    mean = sum(item["loglikelihood_per_byte"] for item in items) / len(items)
    assert metrics["loglikelihood_per_byte"]["value"] == pytest.approx(mean)
    assert harness.counts(items) == {}


def test_what_gsm8k_writes_around_a_solution_is_not_scored(base) -> None:
    written = {"question": "a?", "answer": "He has 3 + 4 = <<3+4=7>>7 eggs.\n#### 7"}
    plain = {"question": "a?", "answer": "He has 3 + 4 = 7 eggs."}
    _, items = likelihoods(base(), True, [written, plain])
    assert items[0]["loglikelihood_per_byte"] == items[1]["loglikelihood_per_byte"] < 0
    assert items[0]["gold"] == plain["answer"]


def test_a_gold_without_a_solution_is_refused(base) -> None:
    with pytest.raises(UserError, match=r"row 2: the gold answer '\\n#### 7' has no solution to score"):
        likelihoods(base(), True, [SOLVED[0], {"question": "a?", "answer": "\n#### 7"}])
