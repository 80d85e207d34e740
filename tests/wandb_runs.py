"""Read W&B runs back from the disk with wandb's own reader."""

import importlib.util
import json
import subprocess
from pathlib import Path

CORE = Path(importlib.util.find_spec("wandb").origin).parent / "bin/wandb-core"


def runs(output: Path) -> list[dict]:
    """Return the runs on disk, each with what wandb's reader finds: run (name, config ...), history, summary, artifacts, exit."""
    return [_run(file) for file in sorted((output / "wandb").glob("*run-*/*.wandb"))]


def _run(file: Path) -> dict:
    # What `wandb leet inspect --json` starts, without importing wandb for each.
    reader = [CORE, "leet", "inspect", "--no-observability", "--json", "--run-file", file, file.parent.parent]
    told = subprocess.run(reader, capture_output=True, text=True, check=True)
    records = [json.loads(line) for line in told.stdout.splitlines()]
    found = {
        kind: [r[kind] for r in records if r["type"] == kind] for kind in ("history", "summary", "artifact", "exit")
    }
    run = next(r["run"] for r in records if r["type"] == "run")
    return {
        **run,
        "config": run["config"]["update"],
        "text": "\n".join(json.dumps(r) for r in records if r["type"] != "artifact"),
        "history": [h["item"] for h in found["history"]],
        "summary": {k: v for s in found["summary"] for k, v in s.get("update", {}).items()},
        "artifacts": {(a["name"], a["type"], bool(a.get("use_after_commit"))): a["digest"] for a in found["artifact"]},
        "exit": [e["exit_code"] for e in found["exit"]],
    }
