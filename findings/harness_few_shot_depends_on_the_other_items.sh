#!/usr/bin/env bash
# lm-eval 0.4.13, torch 2.13.0
#
# What happens: the few-shot examples of an item are drawn from one random generator that goes on from item to item. So an item's
# prompt depends on which items were asked before it: asked alone with samples={...}, or by the second of two processes (as
# accelerate launch shares them out), it has other examples than in the whole run, at the same seed.
#
# What one would expect: one seed, one prompt for each item; samples= chooses items, and a second GPU only makes it faster.
#
# Why it hurts: two adapters evaluated on one and on two GPUs get different questions, and the difference of their scores is
# partly that. Items picked out of a run to be looked at or asked again are other prompts than those that were scored, and
# a paired test over items pairs what is not alike.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq torch==2.13.0 lm-eval==0.4.13
cd "$work"
export HF_HOME="$work/cache"
"$work/venv/bin/python" - 2> log <<'PYTHON' || { tail -5 log; exit 1; }
import importlib.metadata
import json
import pathlib
import sys

import lm_eval
from datasets import disable_progress_bars
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask

print("lm_eval", importlib.metadata.version("lm_eval"))
disable_progress_bars()
rows = {"train": [{"q": f"t{i}", "a": f"{i}"} for i in range(50)], "test": [{"q": f"q{i}", "a": f"{i}"} for i in range(8)]}
for name, part in rows.items():
    pathlib.Path(f"{name}.json").write_text("\n".join(map(json.dumps, part)))
config = {
    "task": "few", "dataset_path": "json", "dataset_kwargs": {"data_files": {name: f"{name}.json" for name in rows}},
    "test_split": "test", "fewshot_split": "train", "num_fewshot": 3, "output_type": "generate_until",
    "doc_to_text": "{{q}}", "doc_to_target": "{{a}}", "generation_kwargs": {"until": ["\n"]}, "target_delimiter": "=",
    "fewshot_delimiter": ", ", "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


class Keeps(LM):
    """A model that keeps its prompts, by the item they end with."""

    prompts: dict[str, str]

    def generate_until(self, requests, **_):
        self.prompts = {request.args[0].split(", ")[-1]: request.args[0] for request in requests}
        return ["" for _ in requests]

    def loglikelihood(self, requests):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def asked(**choice) -> dict[str, str]:
    """Return the prompts of an evaluation in one process."""
    model = Keeps()
    lm_eval.simple_evaluate(model, tasks=[dict(config)], fewshot_random_seed=1234, bootstrap_iters=0, **choice)
    return model.prompts


def asked_by(rank: int, processes: int) -> dict[str, str]:
    """Return the prompts that one of several processes builds, as evaluate() has it build them."""
    task = ConfigurableTask(config=dict(config))
    task.set_fewshot_seed(1234)
    task.build_all_requests(rank=rank, world_size=processes)
    return {instance.args[0].split(", ")[-1]: instance.args[0] for instance in task.instances}


whole, again, first, some = asked(), asked(), asked(limit=6), asked(samples={"few": [5, 6]})
second = asked_by(1, 2)
for name, prompts in (
    ("all items", whole), ("all items, again", again), ("the first 6", first), ("items 5 and 6", some), ("process 2 of 2", second)
):
    print(f"{name:18} {prompts['q5']}")
same = sum(prompt == whole[item] for rank in (0, 1) for item, prompt in asked_by(rank, 2).items())
print(f"prompts of two processes that are those of one: {same} of {len(whole)}")
print("expected: one prompt for q5 at one seed, and 8 of 8")
held = whole == again and first["q5"] == whole["q5"] and some["q5"] != whole["q5"] != second["q5"] and same < len(whole)
held = held and asked_by(0, 1) == whole
print("as described above" if held else "CHANGED: not as described above")
sys.exit(not held)
PYTHON
