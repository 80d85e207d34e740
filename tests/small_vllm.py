"""A worker of d2lora.evaluate.vllm whose vLLM is the few lines below: with vLLM's own faults, and others on demand.

python small_vllm.py FOLDER runs d2lora's worker.py on it. FOLDER/fault.json says how it misbehaves: {"do": what, "after":
answers, or a list of those of each start, "starts": how many starts do}. FOLDER/log.jsonl gets what it was asked. An adapter's folder has expected.json, the
log-probabilities of the probe, and so has the base's; an answer tells which folder it is of, by its tag.
"""

import json
import os
import runpy
import sys
import time
import types
from pathlib import Path

WORKER = Path(__file__).parents[1] / "d2lora/evaluate/vllm/worker.py"
TAG, IDLE = "tag", "idle"
EXITS = {"die": 7, "quit": 0, "half": 0}
LINES = {  # replies that do not fit their request
    "half": b'{"id": 3, "ind',
    "garbage": b"\xff\x00INFO: loading\n",
    "babble": b'{"id": 0}\n',
    "forget": {"end": True},
    "list": {"index": [0], "ids": [101, 2]},
    "words": {"index": 0, "ids": ["a"] * 9},
    "beyond": {"index": 0, "ids": [10**6] * 9},
    "on": {"index": 0, "ids": [101, 2, 5, 2]},
}
STEP_FAULT: list[str] = []  # the fault of this step
OUTPUTS: list = []  # where replies are written
folder = Path(sys.argv[1])
wanted_steps = list(range(8))  # of a slow engine, without a finished answer


def log(**what: object) -> None:
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(what) + "\n")


def due(do: str, answers: int) -> dict:
    """Return the fault that is to happen now; {} if none is."""
    wanted = json.loads((folder / "fault.json").read_text()) if (folder / "fault.json").exists() else {}
    if wanted.get("starts", 0) < START or wanted["at"] != do:
        return {}
    after = wanted.get("after", 0)
    return wanted if answers == (after[START - 1] if isinstance(after, list) else after) else {}


def fault(do: str, answers: int) -> bool:
    """Misbehave if it is time to. Return whether nothing is answered in this step."""
    wanted = due(do, answers)
    what = wanted.get("do", "")
    STEP_FAULT[:] = [what]
    if what == IDLE:
        time.sleep(0.1)
        return True
    if what == "slow":
        wanted_steps.pop()
        time.sleep(0.5)
        return bool(wanted_steps)
    if what == "raise":
        raise RuntimeError(wanted.get("error", "the engine broke"))
    if what == "hang":
        (folder / "hanging").touch()
    if what == "close":
        OUTPUTS[0].close()
        os.close(REPLIES)
    if what in LINES:
        line = LINES[what]
        os.write(REPLIES, line if isinstance(line, bytes) else json.dumps({"id": LAST["id"]} | line).encode() + b"\n")
    if what == "twice":
        os.write(REPLIES, json.dumps(LAST).encode() + b"\n")
    if what in EXITS:
        os._exit(EXITS[what])
    time.sleep({"hang": 600, "close": 600, "late": 2}.get(what, 0))
    return False


def read(path: str) -> tuple[int, list[float]]:
    content = json.loads((Path(path) / "expected.json").read_text())
    return content[TAG], content["log_probs"]


class LLM:
    def __init__(self, model: str, max_lora_rank: int = 16, max_loras: int = 1, **settings: object) -> None:
        fault("open", 0)
        log(do="open", rank=max_lora_rank, slots=max_loras, pid=os.getpid(), **{k: settings[k] for k in ("max_num_seqs", "max_model_len")})  # fmt: skip
        if max_lora_rank not in (1, 8, 16, 32, 64, 128, 256, 320, 512):
            raise ValueError(f"max_lora_rank {max_lora_rank}")
        self.llm_engine = Engine(model, max_lora_rank, max_loras)


class Engine:
    def __init__(self, base: str, rank: int, slots: int) -> None:
        self.base, self.rank, self.slots = base, rank, slots
        self.folders: dict[int, str] = {}
        self.waiting: list[tuple] = []
        self.answers = self.loads = 0
        self.swapped = False  # whether each adapter is answered by the last one

    def add_lora(self, request) -> bool:
        config = json.loads((Path(request.path) / "adapter_config.json").read_text())
        if config["r"] > self.rank:
            raise ValueError(f"LoRA rank {config['r']} is greater than max_lora_rank {self.rank}.")
        fault("load", self.loads)
        self.loads += 1
        log(do="load", name=request.name, number=request.number)
        self.folders.setdefault(request.number, request.path)  # as vLLM: an id that it knows is not loaded again
        return True

    def add_request(self, name: str, prompt: dict, parameters, lora_request=None) -> None:
        assert lora_request is None or lora_request.number in self.folders, "asked before it was loaded"
        self.waiting.append((name, prompt["prompt_token_ids"], parameters, lora_request and lora_request.number))

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def step(self) -> list:
        """Answer all requests, the last one first."""
        numbers = sorted({number for *_, number in self.waiting if number})
        last = numbers[-1] if len(numbers) >= self.slots else None  # as vLLM: the base gets the last slot's adapter
        do = "generate" if self.waiting[0][2].prompt_logprobs is None else "loglikelihood"
        log(do=do, requests=len(self.waiting), adapters=len(numbers), base=any(n is None for *_, n in self.waiting))
        name, ids, parameters, number = self.waiting[-1]
        if fault(do if len(ids) != 40 or do == "generate" else "probe", self.answers):
            return [types.SimpleNamespace(request_id=name, finished=False)] * (IDLE not in STEP_FAULT)
        self.waiting.pop()
        self.answers += 1
        self.swapped |= "swap" in STEP_FAULT
        if number and self.swapped:
            number = max(self.folders)
        tag, log_probs = read(self.folders[number or last] if number or last else self.base)
        if do == "loglikelihood":
            values = log_probs if len(ids) == 40 else [-tag / 1000.0 - i / 100 for i in range(len(ids) - 1)]
            rank = 1 if parameters.prompt_logprobs else 2  # as vLLM, of a token that ties with the likeliest
            scored = [{i: types.SimpleNamespace(logprob=v, rank=rank)} for i, v in zip(ids[1:], values, strict=True)]
            if "nan" in STEP_FAULT:
                scored[-1][ids[-1]].logprob = float("nan")
            return [types.SimpleNamespace(request_id=name, finished=True, prompt_logprobs=[None, *scored])]
        name = "1" if "stale" in STEP_FAULT else name
        answer = types.SimpleNamespace(token_ids=[tag, len(ids), *parameters.stop_token_ids[:1]])
        return [types.SimpleNamespace(request_id=name, finished=True, outputs=[answer])]


class Request:
    def __init__(self, name: str, number: int, path: str) -> None:
        self.name, self.number, self.path = name, number, path


def module(name: str, **content: object) -> None:
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(content)


class Parameters:
    def __init__(self, prompt_logprobs: int | None = None, **settings: object) -> None:
        self.prompt_logprobs = prompt_logprobs
        self.stop_token_ids = settings.get("stop_token_ids")


module("torch", cuda=types.SimpleNamespace(is_available=lambda: False))
module("vllm", LLM=LLM, SamplingParams=Parameters, __version__="0.0")
module("vllm.lora")
module("vllm.lora.request", LoRARequest=Request)
starts = folder / "starts"
START = len(starts.read_text()) + 1 if starts.exists() else 1
starts.write_text("x" * START)
print("START", file=sys.stderr)
worker = runpy.run_path(str(WORKER), run_name="worker")
REPLIES, LAST = os.dup(1), {}


def write(replies, reply: dict) -> None:
    OUTPUTS[:] = [replies]
    LAST.update(reply)
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


worker["serve"].__globals__.update(_write=write, _SILENCE=1.0)
worker["main"]()
