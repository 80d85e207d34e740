#!/usr/bin/env bash
# datasets 5.2.0, lm-eval 0.4.13, torch 2.13.0
#
# What happens: where all of a column's strings in a JSON file look like dates ("2021-03-04"), load_dataset("json") makes
# timestamps of them, although each is a string in quotes. One other string in the column ("unknown"), and all stay strings. The
# harness renders such a gold as "2021-03-04 00:00:00", in few-shot examples too, and scores "2021-03-04" as wrong.
#
# What one would expect: a string in JSON is a string. JSON has no dates; numbers in quotes ("007") do stay strings.
#
# Why it hurts: a test of dates scores 0 for a model that answers each of them right, and few-shot examples or training rows
# filled into templates teach a form that is not in the file. A training file with one undated row and a test file without one,
# each loaded by itself, disagree on the form of every answer.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq torch==2.13.0 datasets==5.2.0 lm-eval==0.4.13
cd "$work"
export HF_HOME="$work/cache"
"$work/venv/bin/python" - 2> log <<'PYTHON' || { tail -5 log; exit 1; }
import importlib.metadata
import json
import pathlib
import sys

import lm_eval
from datasets import disable_progress_bars, load_dataset
from lm_eval.api.model import LM

print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("datasets", "pyarrow", "lm_eval")))
disable_progress_bars()


class Knows(LM):
    """A model that gives each item's answer as the file has it."""

    def __init__(self, rows: list[dict]) -> None:
        super().__init__()
        self.answers = {row["question"]: row["answer"] for row in rows}

    def generate_until(self, requests, **_):
        return [self.answers[request.args[0].split("\n\n")[-1]] for request in requests]

    def loglikelihood(self, requests):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def test(name: str, answers: list[str]) -> tuple[str, float, str]:
    """Return the column's type, the score of a model that knows all answers, and its first prompt with two examples."""
    rows = [{"question": f"When was event {i}?", "answer": answer} for i, answer in enumerate(answers)]
    file = f"{name}.jsonl"
    pathlib.Path(file).write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": file}}, "test_split": "test",
        "fewshot_split": "test", "num_fewshot": 2, "output_type": "generate_until", "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}", "generation_kwargs": {"until": ["\n"]},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    kind = load_dataset("json", data_files=file, split="train").features["answer"].dtype
    result = lm_eval.simple_evaluate(Knows(rows), tasks=[task], bootstrap_iters=0, log_samples=True)
    prompt = result["samples"][name][0]["arguments"][0][0]
    return kind, float(result["results"][name]["exact_match,none"]), prompt


dates = [f"2021-03-{day:02}" for day in range(1, 9)]
seen = {"dates": test("dates", dates), "dates_and_unknown": test("dates_and_unknown", [*dates, "unknown"])}
seen["digits"] = test("digits", [f"{number:03}" for number in range(8)])
for name, (kind, score, prompt) in seen.items():
    print(f"{name}: type {kind}, score {score:.2f}, an example in the prompt: {prompt.splitlines()[0]!r}")
print("expected: type string and score 1.00, for each")
held = seen["dates"][:2] == ("timestamp[s]", 0.0) and "00:00:00" in seen["dates"][2]
held = held and all(seen[name][:2] == ("string", 1.0) for name in ("dates_and_unknown", "digits"))
print("as described above" if held else "CHANGED: not as described above")
sys.exit(not held)
PYTHON
