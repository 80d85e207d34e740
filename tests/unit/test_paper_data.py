"""The five data sets of the paper: small files in their Hub layouts, and real rows where ../shared/data has them."""

from pathlib import Path

import pandas
import pytest
from transformers import AutoTokenizer

from d2lora import data
from d2lora.command import preflight
from d2lora.errors import UserError
from d2lora.scoring import answers

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real rows in ../shared/data")

STEPS = "Let's think step by step.\nStep 1: Ann has 3 + 2 = 5 cups.\nStep 2:"
PAIRS = [
    {
        "dataset": "gsm8k",
        "prompt": "Ann has 3 cups, buys 2 and loses 1. How many has she?",
        "initial_reason_steps": STEPS,
        "chosen": " She loses 1, so 5 - 1 = 4.",
        "rejected": " She loses 1, so 5 - 1 = 3.",
        "full_chosen": " She loses 1, so 5 - 1 = 4.\nStep 3: The answer is \\boxed{4}.",
        "full_rejected": " She loses 1, so 5 - 1 = 3.\nStep 3: The answer is \\boxed{3}.",
        "answer": "4",
    },
    {
        "dataset": "MATH",
        "prompt": "Let $f(x)=\\frac{x}{2}$. What is $f(8)$?",
        "initial_reason_steps": "Step 1:",
        "chosen": " $f(8)=\\frac{8}{2}=4$, so \\boxed{4}.",
        "rejected": " $f(8)=16$, so \\boxed{16}.",
        "full_chosen": " $f(8)=\\frac{8}{2}=4$, so \\boxed{4}.",
        "full_rejected": " $f(8)=16$, so \\boxed{16}.",
        "answer": "4",
    },
]
TITLES = [{"abstract": f'Abstract {i}, of "many"\nlines.', "title": f"Title {i}: prices, wages"} for i in range(150)]
SOURCES = {"Airoboros": 30, "ultrachat": 30, "prm_dpo_pairs": 40}


def turns(*contents: str, system: str | None = None) -> list[dict]:
    told = [{"role": role, "content": c} for role, c in zip(["user", "assistant"] * 9, contents, strict=False)]
    return ([{"role": "system", "content": system}] if system else []) + told


MIX = [
    {
        "source": source,
        "chosen": turns(f"Question {i}?", "One answer.", "And then?", f"Good answer {i}."),
        "rejected": turns(f"Question {i}?", "One answer.", "And then?", f"Bad answer {i}."),
        "prompt": f"Question {i}?",
        "question": f"Question {i}?",
    }
    for source, count in SOURCES.items()
    for i in range(count)
]
GSM8K = [
    {"question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
    {"question": "q", "answer": "#### 1,200"},
]
ARC = [
    {
        "id": "a",
        "question": "Which is a metal?",
        "choices": {"text": ["iron", "wood"], "label": ["A", "B"]},
        "answerKey": "A",
    },
    {
        "id": "b",
        "question": "Which burns?",
        "choices": {"text": ["iron", "wood"], "label": ["1", "2"]},
        "answerKey": "2",
    },
]
# Where a folder like the Hub's holds the rows -> the rows.
LAYOUTS = {
    "Math-Step-DPO-10K/train.parquet": PAIRS,
    "econ_paper_abstracts/econ_dataset.csv": TITLES,
    "orpo-dpo-mix-40k/train.parquet": MIX,
    "gsm8k/main/test.parquet": GSM8K,
    "ai2_arc/ARC-Easy/test.parquet": ARC,
}
PLACES = {
    "math": {"task.data": "Math-Step-DPO-10K", "task.benchmark.gsm8k.data": "gsm8k", "task.benchmark.arc_easy.data": "ai2_arc"},
    "title": {"task.data": "econ_paper_abstracts", "task.benchmark.econ_titles.data": "econ_paper_abstracts", "task.benchmark.arc_easy.data": "ai2_arc"},
}  # fmt: skip


def write(folder: Path, place: str, rows: list[dict]) -> None:
    file = folder / place
    file.parent.mkdir(parents=True, exist_ok=True)
    frame = pandas.DataFrame(rows)
    frame.to_csv(file, index=False) if file.suffix == ".csv" else frame.to_parquet(file)


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A folder with the five data sets, small, in their Hub layouts."""
    for place, rows in LAYOUTS.items():
        write(tmp_path, place, rows)
    return tmp_path


@pytest.fixture
def paper(cell, hub: Path):
    """paper("title", "n=3", ...) -> the config of the paper's task, at the paper's scale, on the small files."""

    def make(task: str, *overrides: str):
        places = PLACES[task] | {"warmup.data": "orpo-dpo-mix-40k"}
        moved = [f"{key}.path={hub / place}" for key, place in places.items()]
        unpinned = [f"{key}.revision=null" for key in places]
        return cell("scale=paper", f"task={task}", "model=lab", *moved, *unpinned, *overrides).config

    return make


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "d2lora/lab/base")


@pytest.mark.parametrize(("task", "n"), [("math", 2), ("title", 50)])
def test_the_paper_s_tasks_read_their_data_sets(paper, task: str, n: int) -> None:
    preflight.check_inputs(paper(task, f"n={n}", "m=100"), set())
    preflight.check_inputs(paper(task, "n=all", "m=all"), set())
    with pytest.raises(UserError, match=rf"n={n + 1}: task={task} has {n} rows"):
        preflight.check_inputs(paper(task, f"n={n + 1}"), set())
    with pytest.raises(UserError, match=r"m=101: warmup=mix40k has 100 rows"):
        preflight.check_inputs(paper(task, f"n={n}", "m=101"), set())


@pytest.mark.parametrize(
    ("place", "task", "column"),
    [
        *(("Math-Step-DPO-10K/train.parquet", "math", c) for c in PAIRS[0] if c not in ("dataset", "answer")),
        ("econ_paper_abstracts/econ_dataset.csv", "title", "abstract"),
        ("econ_paper_abstracts/econ_dataset.csv", "title", "title"),
        ("orpo-dpo-mix-40k/train.parquet", "math", "chosen"),
        ("gsm8k/main/test.parquet", "math", "question"),
        ("gsm8k/main/test.parquet", "math", "answer"),
        *(("ai2_arc/ARC-Easy/test.parquet", "title", c) for c in ("question", "choices", "answerKey")),
    ],
)
def test_a_column_that_a_data_set_lacks_is_named(paper, hub: Path, place: str, task: str, column: str) -> None:
    write(hub, place, [{k: v for k, v in row.items() if k != column} for row in LAYOUTS[place]])
    with pytest.raises(UserError, match=rf"{place.split('/')[0]}: missing column {column}; it has "):
        preflight.check_inputs(paper(task, "n=1", "m=1"), set())


def test_a_pair_s_ids_begin_with_one_bos_and_end_with_eos_only_where_the_solution_does(paper, tokenizer) -> None:
    task = paper("math").task
    step, whole = (data.pair_example(tokenizer, task, row) for row in data.rows(task.data))
    for example in (step, whole):
        assert example["prompt_ids"].count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(step["prompt_ids"]).endswith("Step 2:"), "the steps before the fork are given"
    assert tokenizer.eos_token_id not in step["chosen_ids"] + step["rejected_ids"]
    assert whole["chosen_ids"][-1] == whole["rejected_ids"][-1] == tokenizer.eos_token_id


def test_a_title_s_example_is_its_abstract_and_title(paper, tokenizer) -> None:
    task = paper("title").task
    row = data.rows(task.data)[0]
    example = data.pair_example(tokenizer, task, row)
    assert tokenizer.decode(example["chosen_ids"]) == row["title"] + tokenizer.eos_token
    assert row["abstract"] in tokenizer.decode(example["prompt_ids"])
    assert "rejected_ids" not in example


def test_a_row_of_the_mix_is_learned_from_on_every_assistant_turn(paper, tokenizer) -> None:
    row = data.rows(paper("math").warmup.data)[7]
    assert learned(tokenizer, row["chosen"]) == "One answer.<|end|>Good answer 7.<|end|>"


def test_a_system_turn_is_read_and_not_learned(tokenizer) -> None:
    assert learned(tokenizer, turns("Hello?", "Yes.", system="Be brief.")) == "Yes.<|end|>"


def learned(tokenizer, messages: list[dict]) -> str:
    example = data.conversation_example(tokenizer, messages)
    pairs = zip(example["input_ids"], example["labels"], strict=True)
    return tokenizer.decode([i for i, label in pairs if label != -100])


def test_gold_answers_are_read_as_their_data_sets_write_them(paper) -> None:
    benchmark = paper("math").task.benchmark
    rows = data.rows(benchmark["gsm8k"].data)
    assert [answers.final_number(benchmark["gsm8k"].gold.format(**row)) for row in rows] == [4, 1200]
    docs = data.rows(benchmark["arc_easy"].data)
    harness = pytest.importorskip("d2lora.evaluate.harness", reason="this one test of the folder needs torch")
    task = harness.task_of("arc_easy", benchmark["arc_easy"], docs, template=True)
    assert [task.doc_to_choice(d)[task.doc_to_target(d)] for d in task.test_docs()] == ["iron", "wood"]


def test_100_titles_are_held_out_by_split_seed_before_anything_else(paper) -> None:
    def split(*overrides: str) -> tuple[list[str], list[str]]:
        c = paper("title", *overrides)
        sources = (c.task.benchmark["econ_titles"].data, c.task.data)
        held, rest = ([r["title"] for r in data.rows(source, c.split_seed)] for source in sources)
        return held, rest

    held, rest = split()
    assert (len(held), len(rest)) == (100, 50)
    assert sorted(held + rest) == sorted(row["title"] for row in TITLES)
    assert split("seed=1", "data_seed=1", "n=3") == (held, rest)
    assert split("split_seed=1")[0] != held


def test_all_is_what_the_held_out_titles_leave(paper, tokenizer) -> None:
    c = paper("title", "n=all")
    rows = data.rows(c.task.data, c.split_seed)
    every = data.subset(rows, lambda row: data.pair_example(tokenizer, c.task, row), "all", 1024, "task/0")
    assert every.counts().samples == 50, "the record says the true size of the paper's 7k"


def test_the_40k_are_a_seeded_subset_of_the_mix_that_contains_the_smaller_ones(paper, tokenizer) -> None:
    rows = data.rows(paper("math").warmup.data)

    def drawn(m: int, seed: int = 0) -> list[int]:
        make = lambda row: data.conversation_example(tokenizer, row["chosen"])  # noqa: E731
        return data.subset(rows, make, m, 1024, f"warmup/{seed}").rows

    assert len(set(drawn(40))) == 40
    assert drawn(40)[:10] == drawn(10)
    assert drawn(40) != drawn(40, seed=1)
    assert len({rows[i]["source"] for i in drawn(40)}) == 3, "drawn from the whole mix, not from its head"


def test_a_part_of_the_mix_is_chosen_by_its_source(paper) -> None:
    c = paper("math", "warmup=mix_math", "warmup.data.where.source=[prm_dpo_pairs]")
    assert len(data.rows(c.warmup.data)) == SOURCES["prm_dpo_pairs"]
    with pytest.raises(
        UserError, match=r"data.where.source=prm-dpo: no row has it; there are Airoboros, prm_dpo_pairs"
    ):
        data.rows(paper("math", "warmup=mix_math", "warmup.data.where.source=[prm-dpo]").warmup.data)


def test_the_parts_of_the_mix_share_no_source(cell) -> None:
    named = [
        cell("scale=paper", f"warmup=mix_{p}").config.warmup.data.where["source"]
        for p in ("capybara", "ultrafeedback", "math")
    ]
    every = [source for part in named for source in part]
    assert len(every) == len(set(every)) == 23


def test_a_template_that_writes_today_s_date_is_given_a_fixed_one(tokenizer) -> None:
    """Llama 3.2's template: without a date it asks for today's, and a prompt would change every day."""
    dated = (
        "{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}"
        '{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}{%- endif %}Today Date: {{ date_string }} '
    )
    messages = turns("Hello?")

    def rendered(template: str) -> str:
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)

    assert rendered(data.undated(dated)) == "<|begin|>Today Date: 26 Jul 2024 "
    assert rendered(dated) != rendered(data.undated(dated))
    assert data.undated(tokenizer.chat_template) == tokenizer.chat_template
    assert data.undated(None) is None


# --- the real rows -------------------------------------------------------------------------------------------------


@pytest.fixture
def real(cell):
    return cell("scale=laptop", f"data_root={SHARED}", "model=lab", "n=all", "m=all").config


@pytest.mark.thorough
@needs_shared
def test_the_real_rows_have_the_columns_of_the_hub_s_data_sets(real) -> None:
    preflight.check_inputs(real, set())
    assert set(PAIRS[0]) <= set(data.rows(real.task.data)[0])
    assert set(MIX[0]) <= set(data.rows(real.warmup.data)[0])
    assert set(ARC[0]) <= set(data.rows(real.task.benchmark["arc_easy"].data)[0])


@needs_shared
def test_real_pairs_have_one_bos_and_eos_only_at_the_end_of_a_solution(real, tokenizer) -> None:
    endings = {True: 0, False: 0}
    for row in data.rows(real.task.data)[::6]:
        example = data.pair_example(tokenizer, real.task, row)
        assert example["prompt_ids"][0] == tokenizer.bos_token_id
        assert (example["prompt_ids"] + example["chosen_ids"]).count(tokenizer.bos_token_id) == 1
        for name in ("chosen", "rejected"):
            last = row[name].strip() == row[f"full_{name}"].strip()
            assert example[f"{name}_ids"].count(tokenizer.eos_token_id) == last
            endings[last] += 1
    assert min(endings.values()) > 20, "both kinds are among the rows"


@needs_shared
def test_real_conversations_are_learned_from_on_all_their_assistant_turns(real, tokenizer) -> None:
    several = 0
    for row in data.rows(real.warmup.data)[::10]:
        said = [m["content"] for m in row["chosen"] if m["role"] == "assistant"]
        ids = tokenizer("".join(f"{text}<|end|>" for text in said), add_special_tokens=False)["input_ids"]
        assert learned(tokenizer, row["chosen"]) == tokenizer.decode(ids)
        several += len(said) > 1
    assert several > 3


@needs_shared
def test_every_real_gold_answer_is_read(real) -> None:
    gsm8k, arc = (real.task.benchmark[name] for name in ("gsm8k", "arc_easy"))
    assert all(answers.final_number(gsm8k.gold.format(**row)) is not None for row in data.rows(gsm8k.data))
    assert all(row["answerKey"] in row["choices"]["label"] for row in data.rows(arc.data))


@needs_shared
def test_real_parts_are_chosen_by_source(real) -> None:
    rows = data.rows(real.warmup.data)
    part = data.rows(real.warmup.data.model_copy(update={"where": {"source": ["orca_dpo_pairs"]}}))
    assert part == [row for row in rows if row["source"] == "orca_dpo_pairs"]
    assert 0 < len(part) < len(rows)
