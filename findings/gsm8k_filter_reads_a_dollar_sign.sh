#!/usr/bin/env bash
# lm-eval 0.4.13 (task gsm8k, version 3), torch 2.13.0
#
# What happens: gsm8k's filter "flexible-extract" takes the last match of "(-?[$0-9.,]{2,})|(-?[0-9]+)" for the number. Two
# characters of dollar sign, dot and comma are a match too. So an answer set in TeX at the end of a sentence, $\boxed{18}$. ,
# is read as "$.", one in display maths, $$\boxed{18}$$ , as "$$", and one followed by an ellipsis as "...". Each scores 0, and so
# does $18.00. The other filter, "strict-match", wants "#### 18" and gives 0 to all of these.
#
# What one would expect: 18 is read from each; \boxed{18} without dollar signs is.
#
# Why it hurts: instruct models, and adapters trained on solutions with boxed answers, write just this. An adapter that learns
# to put its answer into $...$ or to end with a full stop loses points, and one that learns "#### 18" gains them, at equal skill.
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

import lm_eval, yaml
from datasets import disable_progress_bars
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask

print("lm_eval", importlib.metadata.version("lm_eval"))
disable_progress_bars()
config = yaml.safe_load((pathlib.Path(lm_eval.__file__).parent / "tasks/gsm8k/gsm8k.yaml").read_text())
pathlib.Path("rows.json").write_text(json.dumps({"question": "How many?", "answer": "9 + 9 = 18.\n#### 18"}))
del config["dataset_name"]
config |= {"dataset_path": "json", "dataset_kwargs": {"data_files": {"train": "rows.json", "test": "rows.json"}}}
config |= {"num_fewshot": 0}


class Says(LM):
    """A model that gives one answer to everything."""

    def __init__(self, answer: str) -> None:
        super().__init__()
        self.answer = answer

    def generate_until(self, requests, **_):
        return [self.answer for _ in requests]

    def loglikelihood(self, requests):
        raise NotImplementedError

    loglikelihood_rolling = loglikelihood


def score(answer: str) -> tuple[float, str]:
    """Return flexible-extract's score of an answer to the one question, and what it read."""
    result = lm_eval.evaluate(
        Says(answer), {"gsm8k": ConfigurableTask(config=dict(config))}, bootstrap_iters=0, log_samples=True, verbosity="ERROR"
    )
    (sample,) = (s for s in result["samples"]["gsm8k"] if s["filter"] == "flexible-extract")
    return float(sample["exact_match"]), sample["filtered_resps"][0]


right = ["#### 18", "The answer is 18.", r"The answer is \boxed{18}", "The answer is $18.", r"The answer is $\boxed{18}$"]
lost = [
    r"The answer is $\boxed{18}$.",
    r"$$\boxed{18}$$",
    r"$$= 18\text{ dollars}.$$",
    "It is 18...",
    "She makes $18.00 a day.",
]
seen = {answer: score(answer) for answer in [*right, *lost]}
for answer, (points, read) in seen.items():
    print(f"{points:.0f}  {answer:32} read as {read!r}")
print("expected: 1 for each")
held = all(seen[answer][0] == 1 for answer in right) and all(seen[answer][0] == 0 for answer in lost)
print("as described above" if held else "CHANGED: not as described above")
sys.exit(not held)
PYTHON
