import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from d2lora import data
from d2lora.errors import UserError
from d2lora.settings import Benchmark, Data, Model, Task

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real rows in ../shared/data")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "d2lora/lab/base")


def step_task(**more) -> Task:
    fields = {
        "name": "t",
        "data": {"path": "x"},
        "prompt": "{prompt}",
        "prefix": "{initial_reason_steps}",
        "chosen": "{chosen}",
        "rejected": "{rejected}",
        "full_chosen": "{full_chosen}",
        "full_rejected": "{full_rejected}",
    }
    return Task.model_validate(fields | more)


ROW = {
    "prompt": "Ann has 3 cups. Ann buys 2 more. Ann loses 1. How many cups does Ann have now?",
    "initial_reason_steps": "Step 1:",
    "chosen": " 3 + 2 = 5.",
    "rejected": " 3 + 2 = 6.",
    "full_chosen": " 3 + 2 = 5.\nStep 2: 5 - 1 = 4. The answer is \\boxed{4}.",
    "full_rejected": " 3 + 2 = 6.\nStep 2: 6 - 1 = 5. The answer is \\boxed{5}.",
}


def test_one_bos_and_no_eos_after_a_step_in_mid_solution(tokenizer) -> None:
    e = data.pair_example(tokenizer, step_task(), ROW)
    assert e["prompt_ids"].count(tokenizer.bos_token_id) == 1
    assert e["prompt_ids"][0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in e["chosen_ids"] + e["rejected_ids"]
    assert tokenizer.decode(e["prompt_ids"]).endswith("<|assistant|>Step 1:" + tokenizer.decode(e["chosen_ids"][:0]))
    assert tokenizer.decode(e["prompt_ids"] + e["chosen_ids"]).endswith("Step 1: 3 + 2 = 5.")


def test_eos_where_the_solution_ends(tokenizer) -> None:
    last = ROW | {"full_chosen": ROW["chosen"], "full_rejected": ROW["rejected"]}
    for task, row in ((step_task(), last), (step_task(continuation="rest"), ROW)):
        e = data.pair_example(tokenizer, task, row)
        assert e["chosen_ids"][-1] == e["rejected_ids"][-1] == tokenizer.eos_token_id
    assert tokenizer.decode(e["chosen_ids"][:-1]).endswith("\\boxed{4}.")


def test_sft_learns_the_chosen_answer(tokenizer) -> None:
    e = data.pair_example(tokenizer, step_task(), ROW)
    sft = data.sft_examples([e])[0]
    assert sft["input_ids"] == e["prompt_ids"] + e["chosen_ids"]
    assert [i for i in sft["labels"] if i != -100] == e["chosen_ids"]


def test_a_conversation_s_loss_is_on_every_assistant_turn_and_its_end(tokenizer) -> None:
    messages = [
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "2 + 2 = 4."},
        {"role": "user", "content": "And 3 + 3?"},
        {"role": "assistant", "content": "3 + 3 = 6."},
    ]
    e = data.conversation_example(tokenizer, messages)
    learned = tokenizer.decode([i for i, label in zip(e["input_ids"], e["labels"], strict=True) if label != -100])
    assert learned == "2 + 2 = 4.<|end|>3 + 3 = 6.<|end|>"
    assert all(label in (-100, i) for i, label in zip(e["input_ids"], e["labels"], strict=True))
    assert e["input_ids"].count(tokenizer.bos_token_id) == 1


def test_turns_that_a_template_rewrites_are_learned_each_in_its_own_rendering(tokenizer) -> None:
    """Reasoning models' templates drop the thoughts of every turn but the last."""
    own = copy.deepcopy(tokenizer)
    own.chat_template = (
        "{% for m in messages %}{{ m.role }}: {% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('</think>')[-1] }}"
        "{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    turn = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "<think>easy</think>4"}]
    assert set(data.conversation_example(own, turn)) == {"input_ids", "labels"}
    example = data.conversation_example(own, turn * 2)
    assert data.longest(example) == len(example["turns"][1]["input_ids"])
    for e, before in zip(example["turns"], ("", "4<|end|>user: 2 + 2?<|end|>assistant: "), strict=True):
        learned = [i for i in e["labels"] if i != -100]
        assert own.decode(learned) == "<think>easy</think>4<|end|>"
        assert own.decode(e["input_ids"]).endswith(f"{before}<think>easy</think>4<|end|>")


def test_subsets_are_nested_seeded_and_leave_out_what_does_not_fit() -> None:
    rows = [{"ids": [1] * (30 if i % 10 == 0 else 5)} for i in range(100)]

    def make(row: dict) -> dict:
        return {"input_ids": row["ids"]}

    small, large = (data.subset(rows, make, k, 20, "s/0") for k in (10, 50))
    assert large.rows[:10] == small.rows
    assert data.subset(rows, make, 10, 20, "s/1").rows != small.rows
    every = data.subset(rows, make, "all", 20, "s/0")
    assert (len(every.rows), len(every.misfits)) == (90, 10)
    assert every.counts().misfits == 10
    with pytest.raises(UserError, match=r"only 90 .*max_length=20.* 95"):
        data.subset(rows, make, 95, 20, "s/0")


def test_held_out_rows_and_the_rest_part_the_data_set(tmp_path) -> None:
    (tmp_path / "econ.csv").write_text("title,abstract\n" + "\n".join(f"t{i},a{i}" for i in range(50)))

    def part(which: str, seed: int = 0) -> list[str]:
        return [r["title"] for r in data.rows(Data(path=str(tmp_path), file="econ.csv", hold_out=10, part=which), seed)]

    assert len(part("held_out")) == 10
    assert sorted(part("held_out") + part("rest")) == sorted(f"t{i}" for i in range(50))
    assert part("held_out") != part("held_out", seed=1)


@pytest.mark.parametrize(
    "name", ["train.jsonl", "train.json", "train.csv", "train.parquet", "train.jsonl.gz", "train.jsonl.xz"]
)
def test_local_formats(tmp_path, name: str) -> None:
    import gzip
    import lzma

    import pandas

    rows = [{"a": "x", "b": "1"}, {"a": "y", "b": "2"}]
    lines = "".join(json.dumps(r) + "\n" for r in rows)
    file = tmp_path / name
    if name.endswith(".parquet"):
        pandas.DataFrame(rows).to_parquet(file)
    elif name.endswith(".csv"):
        pandas.DataFrame(rows).to_csv(file, index=False)
    else:
        text = json.dumps(rows) if name.endswith(".json") else lines
        {".gz": gzip.open, ".xz": lzma.open}.get(file.suffix, open)(file, "wt").write(text)
    assert data.rows(Data(path=str(tmp_path))) == rows


def test_rows_by_the_values_of_a_column(tmp_path) -> None:
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps({"source": s, "i": i}) + "\n" for i, s in enumerate("aabbc"))
    )
    assert [r["i"] for r in data.rows(Data(path=str(tmp_path), where={"source": ["b", "c"]}))] == [2, 3, 4]
    with pytest.raises(UserError, match=r"data.where.source=d: no row has it; there are a, b, c"):
        data.rows(Data(path=str(tmp_path), where={"source": ["b", "d"]}))
    with pytest.raises(UserError, match=r"missing column origin; it has source, i"):
        data.rows(Data(path=str(tmp_path), where={"origin": ["a"]}))


def test_missing_columns_and_too_few_rows_are_named(tmp_path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "p", "chosen": "c"}) + "\n")
    task = step_task(data={"path": str(tmp_path)})
    with pytest.raises(
        UserError,
        match=r"missing columns full_chosen, full_rejected, initial_reason_steps, rejected; it has prompt, chosen",
    ):
        data.check_task(task, 1, 0)
    task = Task(name="mine", data=Data(path=str(tmp_path)), prompt="{prompt}", chosen="{chosen}")
    with pytest.raises(UserError, match=r"n=2: task=mine has 1 rows"):
        data.check_task(task, 2, 0)


def write(file: Path, rows: list[dict]) -> Data:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Data(path=str(file))


def test_a_column_missing_from_a_later_row_is_named(tmp_path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"a": "x", "b": "y"}, {"a": "x"}])
    with pytest.raises(UserError, match=r"rows.jsonl: row 2: missing column b; it has a$"):
        data.check_task(Task(name="t", data=source, prompt="{a}", chosen="{b}"), 1, 0)


def test_nothing_where_a_text_should_be_is_refused(tmp_path: Path) -> None:
    """It would be trained on as the word None."""
    (tmp_path / "rows.jsonl").write_text('{"a": "x", "b": "y"}\n{"a": null, "b": "y"}\n')
    rows = Data(path=str(tmp_path / "rows.jsonl"))
    data.require_columns(data.rows(rows), rows, "b")
    with pytest.raises(UserError, match=r"rows.jsonl: row 2: nothing in column a$"):
        data.require_columns(data.rows(rows), rows, "a", "b")


def test_a_model_is_also_its_code_and_the_files_of_its_tokenizer(tmp_path: Path) -> None:
    seen = set()
    for name in ("config.json", "modeling_own.py", "merges.txt", "vocab.tiktoken"):
        (tmp_path / name).write_text(name)
        seen.add(str(data.model_identity(Model(name="own", path=str(tmp_path)))))
    seen.add(str(data.model_identity(Model(name="own", path=str(tmp_path), trust_remote_code=True))))
    assert len(seen) == 5


CHOICE = {"kind": "choice", "prompt": "{q}", "gold": "{key}", "choices": "choices.text", "labels": "choices.label"}


@pytest.mark.parametrize(
    ("row", "more", "told"),
    [
        ({"q": "?", "a": "18 eggs"}, {}, None),
        ({"q": "?", "a": "eggs"}, {}, "the gold answer 'eggs' is not a number"),
        ({"q": "?", "a": "18"}, {"prompt": "{q[text]}"}, r"prompt=\{q\[text\]\} can't be filled in"),
        ({"q": "?", "key": "B", "choices": {"text": ["x", "y"], "label": ["A", "B"]}}, CHOICE, None),
        ({"q": "?", "key": "C", "choices": {"text": ["x", "y"], "label": ["A", "B"]}}, CHOICE, "the gold label 'C' is none of A, B"),
        ({"q": "?", "key": "A", "choices": {"label": ["A", "B"]}}, CHOICE, "no list choices.text"),
        ({"q": "?", "key": "A", "choices": ["x", "y"]}, CHOICE, "no list choices.text"),
        ({"q": "?", "key": "A", "choices": {"text": ["x"], "label": ["A", "B"]}}, CHOICE, "1 choices.text, but 2 choices.label"),
    ],
)  # fmt: skip
def test_items_that_can_not_be_scored_are_refused_before_anything_is_trained(tmp_path, row, more, told) -> None:
    good = (
        row if told is None else {"q": "?", "a": "1", "key": "A", "choices": {"text": ["x", "y"], "label": ["A", "B"]}}
    )
    given = {"kind": "number", "prompt": "{q}", "gold": "{a}"} | more
    if "[" in given["prompt"]:
        good = {"q": {"text": "?"}, "a": "1"}
    source = write(tmp_path / "test.jsonl", [good, row])
    if told is None:
        return data.check_benchmark(Benchmark(data=source, **given), 0)
    with pytest.raises(UserError, match=rf"test.jsonl: row 2: {told}"):
        data.check_benchmark(Benchmark(data=source, **given), 0)
    data.check_benchmark(Benchmark(data=source, limit=1, **given), 0)  # the row is not asked


def test_a_file_of_a_data_set_is_found_offline_where_the_hub_s_client_keeps_it(tmp_path) -> None:
    commit, kept = "0123456789abcdef0123456789abcdef01234567", tmp_path / "datasets--someone--titles"
    (kept / "snapshots" / commit).mkdir(parents=True)
    (kept / "snapshots" / commit / "train.csv").write_text("title,abstract\nA,b\n")
    code = (
        "from d2lora import data, settings; "
        f"print(data.rows(settings.Data(path='someone/titles', file='train.csv', revision='{commit}')))"
    )
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=data.ROOT)
    assert done.stdout == "[{'title': 'A', 'abstract': 'b'}]\n", done.stderr


def test_the_hub_s_problems_become_advice() -> None:
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    def of(kind: type) -> Exception:
        error = OSError("top")
        error.__cause__ = kind.__new__(kind)
        return error

    assert "HF_TOKEN" in data.hub_problem("model.path", "meta-llama/x", of(GatedRepoError))
    assert "not on the Hub" in data.hub_problem("model.path", "a/b", of(RepositoryNotFoundError))
    assert "d2lora fetch" in data.hub_problem("data.path", "a/b", of(OfflineModeIsEnabled))


# A Hub that answers in the way a repository's name says, or none at all; nobody waits between its client's retries.
ASK = """
import os, sys, threading, time
from http.server import BaseHTTPRequestHandler, HTTPServer

class Hub(BaseHTTPRequestHandler):
    def do_HEAD(self):
        code, _, header = self.path.split("/resolve/")[0].split("/")[-1].partition("-")
        self.send_response(int(code))
        if header:
            self.send_header("X-Error-Code", header)
        self.end_headers()
    def log_message(self, *_): pass

server = HTTPServer(("127.0.0.1", 0), Hub)
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
if sys.argv[1] == "none":
    server.server_close()
else:
    threading.Thread(target=server.serve_forever, daemon=True).start()
time.sleep = lambda seconds: None
from d2lora import data
from d2lora.settings import Data, Model
from d2lora.errors import UserError
for name in sys.argv[2:]:
    for ask in (lambda: data.check_model(Model(name="x", path=name, revision="main")),
                lambda: data.rows(Data(path=name, file="x.csv", revision="main"))):
        try: ask()
        except UserError as error: print(error)
"""


def ask(tmp_path: Path, hub: str, *names: str) -> list[str]:
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", ASK, hub, *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=data.ROOT, timeout=300)
    assert not done.stderr, done.stderr
    return done.stdout.splitlines()


def test_no_network_is_one_line(tmp_path) -> None:
    told = ask(tmp_path, "none", "a/b")
    assert [line.split("=")[0] for line in told] == ["model.path", "data.path"]
    assert all("the Hub can't be reached" in line for line in told), told


def test_what_the_hub_answers_is_told_apart(tmp_path) -> None:
    words = {
        "503": "answers with status 503",
        "401": "refused the token (status 401)",
        "403": "refused the token (status 403)",
        "403-GatedRepo": "gated",
        "404-RepoNotFound": "not on the Hub",
        "404-EntryNotFound": "not this file of it: Entry Not Found",
    }
    told = ask(tmp_path, "some", *(f"a/{name}" for name in words))
    wanted = [word for word in words.values() for _ in ("model", "data")]
    assert not [line for word, line in zip(wanted, told, strict=True) if word not in line]


def test_a_full_disk_is_not_taken_for_no_network() -> None:
    told = data.hub_problem("data.path", "a/b", OSError(28, "No space left on device"))
    assert "the Hub's answer was OSError: [Errno 28]" in told


@needs_shared
def test_the_real_rows_have_what_the_paper_s_tasks_ask_for(cell) -> None:
    c = cell("scale=laptop", f"data_root={SHARED}", "model=lab").config
    data.check_task(c.task, 3287, 0)
    data.check_warmup(c.warmup, 584, 0)
    for benchmark in c.task.benchmark.values():
        data.check_benchmark(benchmark, 0)
    assert len(data.rows(c.task.benchmark["gsm8k"].data)) == 1319
    assert len(data.rows(c.task.benchmark["arc_easy"].data)) == 2376


def test_lab_splits_share_no_problem() -> None:
    def texts(name: str, **columns: str) -> dict[str, set[str]]:
        return {s: {r[c] for r in data.rows(Data(path=f"d2lora/lab/data/{name}", split=s))} for s, c in columns.items()}

    math = texts("math", train="prompt", validation="question", test="question")
    title = texts("title", train="abstract", validation="abstract", test="abstract")
    facts = texts("facts", validation="question", test="question")
    for splits in (math, title, facts):
        names = list(splits)
        assert all(not splits[a] & splits[b] for a in names for b in names if a < b)
        assert len(splits["test"]) >= 400
    assert len(math["train"]) >= 10_000
    assert len(data.rows(Data(path="d2lora/lab/data/general"))) >= 40_000


@pytest.mark.parametrize(
    ("path", "name"), [("data/test-00000-of-00001.parquet", None), ("main/test-00000-of-00001.parquet", "main")]
)
def test_a_copy_of_a_hub_repository_is_read_as_it_is(tmp_path: Path, path: str, name: str | None) -> None:
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / path
    file.parent.mkdir()
    found = [{"question": "1 + 1?", "choices": {"text": ["2", "3"]}, "chosen": [{"role": "user", "content": "hi"}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(found), file)
    assert data.rows(Data(path=str(tmp_path), name=name, split="test")) == found
    with pytest.raises(UserError, match=r"no split train \(looked for train.jsonl, .*, train-00000-of-00001.parquet"):
        data.rows(Data(path=str(tmp_path), name=name))
