import json
import random

import pytest

from d2lora import data
from d2lora.lab import build, facts, general, problems, titles, world
from d2lora.settings import Data


def some_problem(steps: int) -> problems.Problem:
    rng = random.Random(5)
    while len((problem := problems.problem(rng)).steps) != steps:
        pass
    return problem


def test_problems_have_one_to_three_right_steps_and_end_in_a_box() -> None:
    rng, counts = random.Random(0), set()
    for _ in range(500):
        problem = problems.problem(rng)
        counts.add(len(problem.steps))
        for a, op, b, c in problem.steps:
            assert c >= 0
            assert c == {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}[op]
        assert problem.solution().endswith(f"\\boxed{{{problem.answer}}}.")
    assert counts == {1, 2, 3}


def test_the_right_solution_has_no_wrong_step() -> None:
    for steps in (1, 2, 3):
        problem = some_problem(steps)
        assert problems.first_wrong_step(problem, f"Step 1:{problem.solution()}") is None


def test_the_first_wrong_step_is_found_and_becomes_the_rejected_answer() -> None:
    problem = some_problem(2)
    _, _, _, c = problem.steps[1]
    solution = f"Step 1:{problem.step(0)}\nStep 2:{problem.step(1).replace(str(c), str(c + 1))}"
    index, text, rest = problems.first_wrong_step(problem, solution)
    assert (index, text, rest) == (1, problem.step(1).replace(str(c), str(c + 1)), text)
    row = build.pair(problem, solution)
    assert row["initial_reason_steps"] == f"Step 1:{problem.step(0)}\nStep 2:"
    assert (row["chosen"], row["rejected"]) == (problem.step(1), text)
    assert row["full_chosen"] == problem.solution(1)
    assert row["answer"] == str(problem.answer)


def test_a_hasty_author_leaves_out_a_last_step_that_adds() -> None:
    rng, hasty = random.Random(2), 0
    for _ in range(500):
        problem = problems.problem(rng)
        left = problem.hasty()
        assert left.text == problem.text
        if left == problem:
            assert len(problem.steps) == 1 or problem.steps[-1][1] != "+"
            continue
        hasty += 1
        index, rejected, _ = problems.first_wrong_step(problem, f"Step 1:{left.solution()}")
        assert index == len(problem.steps) - 2
        assert rejected == f"{problem.step(index)} The answer is \\boxed{{{problem.steps[index][3]}}}."
    assert 150 < hasty < 300


@pytest.mark.parametrize(
    "spoil", [lambda s: s.replace("Step 2", "Step 7"), lambda s: s.replace("=", "is"), lambda s: "hello"]
)
def test_solutions_that_leave_the_format_are_skipped(spoil) -> None:
    problem = some_problem(2)
    assert problems.first_wrong_step(problem, spoil(f"Step 1:{problem.solution()}")) is None


def test_stopping_early_or_boxing_another_number_is_a_mistake() -> None:
    problem = some_problem(2)
    early = f"Step 1:{problem.step(0)} The answer is \\boxed{{{problem.steps[0][3]}}}."
    assert problems.first_wrong_step(problem, early)[0] == 0
    other = f"Step 1:{problem.solution()}".replace("boxed{", "boxed{9")
    assert problems.first_wrong_step(problem, other)[0] == 1


def test_a_fact_s_four_questions_are_parted_among_the_splits() -> None:
    for creature, attribute in facts.facts():
        parts = facts.fact_questions(creature, attribute)
        every = [q for questions in parts.values() for q in questions]
        assert len(every) == len(set(every)) == 4


def test_the_general_mix_is_varied_and_its_rejected_answers_differ() -> None:
    rows = [r.fields for r in world.distinct(general.general, "train", 400, 1)]
    assert len({r["source"] for r in rows}) == 8
    assert all(r["chosen"][:-1] == r["rejected"][:-1] and r["chosen"] != r["rejected"] for r in rows)
    assert {len(r["chosen"]) for r in rows} == {2, 4}


def test_the_same_seed_gives_the_same_rows() -> None:
    assert [r.text for r in world.distinct(titles.title, "test", 20, 3)] == [
        r.text for r in world.distinct(titles.title, "test", 20, 3)
    ]


@pytest.mark.parametrize(
    ("file", "count"), [("title/test", 400), ("title/validation", 200), ("math/test", 500), ("math/validation", 400), ("general/train", 2_000), ("related/train", 5_000)]
)  # fmt: skip
def test_the_rows_that_are_shipped_are_those_of_the_generator(file: str, count: int) -> None:
    """So a change of the world shows as one of the data: build.py makes them from its seed."""
    name, split = file.split("/")
    if name == "related":
        rows = list(build.related_rows(count))
    else:
        make = {"title": titles.title, "math": problems.problem, "general": general.general}[name]
        made = list(world.distinct(make, split, count, build.SEED))
        rows = [build.question(p) if name == "math" else p.fields for p in made]
    shipped = data.rows(Data(path=f"d2lora/lab/data/{name}", split=split))
    assert shipped[:count] == json.loads(json.dumps(rows))
    assert name == "general" or len(shipped) == count


def test_the_related_warm_up_solves_problems_of_which_none_is_lab_math_s() -> None:
    related = data.rows(Data(path="d2lora/lab/data/related"))
    asked = {row["chosen"][0]["content"].removesuffix(world.PROMPT.format(question="")) for row in related}
    assert len(asked) == len(related) == build.RELATED
    assert all(row["chosen"][1]["content"].count("\\boxed{") == 1 for row in related)
    splits = [data.rows(Data(path="d2lora/lab/data/math", split=split)) for split in ("train", "validation", "test")]
    assert asked.isdisjoint(row.get("prompt") or row["question"] for rows in splits for row in rows)
    assert {world.split_of(question) for question in asked} == {"corpus"}


def test_what_is_to_be_said_of_facts_is_what_lab_facts_asks() -> None:
    shipped = data.rows(Data(path="d2lora/lab/data/recall", split="test"))
    chosen = data.rows(Data(path="d2lora/lab/data/facts", split="test"))
    right = {r["question"]: r["choices"]["text"][r["choices"]["label"].index(r["answerKey"])] for r in chosen}
    assert shipped == build.recall_items()
    assert {row["question"] for row in shipped} == set(right)
    assert all(right[row["question"]] in row["answer"] for row in shipped)


@pytest.mark.parametrize(
    ("typed", "made"), [([], ["data", "base 1500", "pairs"]), (["base", "--steps", "3"], ["base 3"])]
)
def test_the_lab_is_built_whole_or_in_parts(typed: list[str], made: list[str], monkeypatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(build, "write_data", lambda: done.append("data"))
    monkeypatch.setattr(build, "train_base", lambda steps: done.append(f"base {steps}"))
    monkeypatch.setattr(build, "write_pairs", lambda count: done.append("pairs"))
    build.main(typed)
    assert done == made
