"""A worker of d2lora.evaluate.vllm whose vLLM is a small model in memory: it gives the answers that the model gives.

python model_vllm.py FOLDER runs d2lora's worker.py on it. FOLDER/log.jsonl gets its process and what it was asked; while there is a
FOLDER/hang, answers are never finished.
"""

import copy
import json
import os
import runpy
import sys
import time
import types
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

WORKER = Path(__file__).parents[1] / "d2lora/evaluate/vllm/worker.py"
folder = Path(sys.argv[1])
torch.set_num_threads(1)


def log(**what: object) -> None:
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(what) + "\n")


class LLM:
    def __init__(self, model: str, **settings: object) -> None:
        log(do="open", pid=os.getpid())
        self.llm_engine = Engine(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval())


class Engine:
    def __init__(self, base: torch.nn.Module) -> None:
        self.models = {0: base}
        self.waiting: list[tuple] = []
        self.new = True

    def add_lora(self, request) -> bool:
        self.models[request.number] = merged(self.models[0], Path(request.path))
        return True

    def add_request(self, name: str, prompt: dict, parameters, lora_request=None) -> None:
        self.waiting.append((name, prompt["prompt_token_ids"], parameters, lora_request.number if lora_request else 0))
        self.new = True

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting)

    def step(self) -> list:
        do = "loglikelihood" if self.waiting[0][2].prompt_logprobs is not None else "generate"
        if self.new:
            log(do=do, requests=len(self.waiting), adapters=len({number for *_, number in self.waiting}))
            self.new = False
        while do == "generate" and (folder / "hang").exists():
            time.sleep(0.05)
        name, ids, parameters, number = self.waiting.pop(0)
        answer = likelihoods if do == "loglikelihood" else generated
        return [types.SimpleNamespace(request_id=name, finished=True, **answer(self.models[number], ids, parameters))]


def merged(base: torch.nn.Module, adapter: Path) -> torch.nn.Module:
    """The base with an adapter's s B A added."""
    config, tensors = (
        json.loads((adapter / "adapter_config.json").read_text()),
        load_file(adapter / "adapter_model.safetensors"),
    )
    model = copy.deepcopy(base)
    for name in tensors:
        if name.endswith(".lora_A.weight"):
            layer = name.removesuffix(".lora_A.weight")
            weight = model.get_parameter(layer.removeprefix("base_model.model.") + ".weight")
            weight.data += config["lora_alpha"] / config["r"] * tensors[f"{layer}.lora_B.weight"] @ tensors[name]
    return model


@torch.inference_mode()
def generated(model: torch.nn.Module, ids: list[int], parameters) -> dict:
    answer: list[int] = []
    while len(answer) < parameters.max_tokens and (not answer or answer[-1] not in parameters.stop_token_ids):
        answer.append(int(model(input_ids=torch.tensor([ids + answer])).logits[0, -1].argmax()))
    return {"outputs": [types.SimpleNamespace(token_ids=answer)]}


@torch.inference_mode()
def likelihoods(model: torch.nn.Module, ids: list[int], parameters) -> dict:
    table = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    scored = [
        {token: types.SimpleNamespace(logprob=float(row[token]), rank=int((row > row[token]).sum()) + 1)}
        for row, token in zip(table, ids[1:], strict=False)
    ]
    return {"prompt_logprobs": [None, *scored]}


class Request:
    def __init__(self, name: str, number: int, path: str) -> None:
        self.name, self.number, self.path = name, number, path


class Parameters:
    def __init__(self, prompt_logprobs=None, max_tokens=1, stop_token_ids=(), **settings: object) -> None:
        self.prompt_logprobs, self.max_tokens, self.stop_token_ids = prompt_logprobs, max_tokens, stop_token_ids


def module(name: str, **content: object) -> None:
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(content)


module("vllm", LLM=LLM, SamplingParams=Parameters, __version__="0.0")
module("vllm.lora")
module("vllm.lora.request", LoRARequest=Request)
runpy.run_path(str(WORKER), run_name="__main__")
