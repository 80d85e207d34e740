"""Run vLLM in its own environment and process, as client.py asks over pipes.

The engine's Python runs this file by its path: it imports vLLM and nothing of d2lora. A request is a JSON line on
standard input, {"id": 3, "do": "generate", ...}; the replies with its id are JSON lines on standard output, and the
last one has "end" or "error". There is no port, and prompts are token ids. The process ends with its standard input.
"""

import contextlib
import ctypes
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

Request = dict[str, Any]
_SILENCE = 30.0  # seconds after which a word is said, if no answer is finished but some have grown
_ALIVE = {"alive": True}


class Engine:
    """A base in vLLM with the adapters that were loaded."""

    def __init__(self) -> None:
        self.llm: Any = None
        self.adapters: dict[str, Any] = {}  # by the client's key: vLLM's LoRARequest
        self.numbers = 0

    def open(
        self, base: str, revision: str | None, dtype: str, length: int, memory: float, sequences: int,
        rank: int, slots: int, layers: list[str],
    ) -> Iterator[dict[str, Any]]:  # fmt: skip
        """Load a base for texts of up to `length` tokens, with room for adapters of rank `rank` on these `layers`.

        It takes a share, `memory`, of the GPU memory that is free, and does so many `sequences` at a time.
        """
        import torch

        if cuda := torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            memory *= free / total
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiling takes longer than all answers of a small model
        import vllm

        # The layers are named because vLLM would adapt the head too, and then raises where likelihoods are asked for.
        room = {"max_lora_rank": rank, "max_loras": slots, "max_cpu_loras": slots + 64, "lora_target_modules": layers}
        self.llm = vllm.LLM(
            model=base,
            revision=revision,
            dtype=dtype,
            skip_tokenizer_init=True,  # prompts and answers are token ids
            max_model_len=length,
            max_num_seqs=sequences,
            gpu_memory_utilization=memory,
            generation_config="vllm",  # not the checkpoint's temperatures and penalties
            enable_prefix_caching=False,  # an answer does not depend on what was asked before
            enforce_eager=not cuda,
            distributed_executor_backend="uni",
            disable_log_stats=True,
            seed=0,
            **({"enable_lora": True} | room if layers else {}),
        )
        yield {"version": vllm.__version__, "device": "cuda" if cuda else "cpu"}

    def load(self, key: str, folder: str) -> Iterator[dict[str, Any]]:
        """Load an adapter in PEFT's format under a key that was never used before, or yield why vLLM refuses it."""
        from vllm.lora.request import LoRARequest

        if key in self.adapters:
            raise ValueError(f"{key}: this key has an adapter")
        self.numbers += 1  # never used again: vLLM would answer with the old folder's adapter
        request = LoRARequest(key, self.numbers, folder)
        try:
            self.llm.llm_engine.add_lora(request)  # before anything is asked of it, this fails without harm
        except ValueError as error:
            yield {"refused": str(error)}
            return
        self.adapters[key] = request

    def generate(self, requests: list[Request], ends: list[int]) -> Iterator[dict[str, Any]]:
        """Yield the greedy answer to each prompt, in any order, with the token that ended it if one of `ends` did.

        A request is {"key", "ids", "max_tokens"}; key null is the base.
        """
        from vllm import SamplingParams

        def parameters(request: Request) -> Any:
            # Its own eos_token_id is left out: `ends` are the ids at which the project ends an answer.
            limits = {"max_tokens": request["max_tokens"], "stop_token_ids": ends, "ignore_eos": True}
            return SamplingParams(temperature=0.0, detokenize=False, **limits)

        for index, output in self._answers([(r, parameters(r)) for r in requests]):
            yield {"index": index, "ids": list(output.outputs[0].token_ids)} if output else _ALIVE

    def loglikelihood(self, requests: list[Request]) -> Iterator[dict[str, Any]]:
        """Yield for each text the log-probability of its tokens from `start` on, and whether each is the likeliest.

        A request is {"key", "ids", "start"}; start is at least 1.
        """
        from vllm import SamplingParams

        def parameters(request: Request) -> Any:
            # With 0, a token that ties with the likeliest has rank 2, and so has that one (findings/vllm_rank_of_tied_tokens.sh).
            return SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)

        for index, output in self._answers([(r, parameters(r)) for r in requests]):
            if not output:
                yield _ALIVE
                continue
            request = requests[index]
            ids, start = request["ids"], request["start"]
            values = [output.prompt_logprobs[at][ids[at]] for at in range(start, len(ids))]
            yield {"index": index, "logprobs": [v.logprob for v in values], "greedy": all(v.rank == 1 for v in values)}

    def _answers(self, requests: list[tuple[Request, Any]]) -> Iterator[tuple[int, Any]]:
        """Ask vLLM all requests together, and yield each one's index and output when it is finished; None while answers grow.

        Nothing is said of an engine that steps and does nothing: it counts as hung.
        """
        engine, open_ones = self.llm.llm_engine, dict[str, int]()
        for index, (request, parameters) in enumerate(requests):
            adapter = None if request["key"] is None else self.adapters[request["key"]]
            self.numbers += 1
            open_ones[name := str(self.numbers)] = index  # an output of another name, or a second one, is an error
            engine.add_request(name, {"prompt_token_ids": request["ids"]}, parameters, lora_request=adapter)
        spoken = time.monotonic()
        while engine.has_unfinished_requests():
            outputs = engine.step()
            finished = [output for output in outputs if output.finished]
            if finished or (outputs and time.monotonic() > spoken + _SILENCE):
                yield from [(open_ones.pop(o.request_id), o) for o in finished] or [(-1, None)]
                spoken = time.monotonic()


def serve(replies: Any) -> None:
    """Do the requests on standard input one after another, until it ends."""
    engine, requests = Engine(), _requests()
    while True:
        request = requests.get()
        number, do = request.pop("id"), request.pop("do")
        try:
            for part in getattr(engine, do)(**request):
                _write(replies, {"id": number} | part)
            _write(replies, {"id": number, "end": True})
        except Exception as error:  # the client ends this process: an engine that has raised is not used again
            _write(replies, {"id": number, "error": f"{type(error).__name__}: {error}"})


def _write(replies: Any, reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


def _requests() -> "queue.SimpleQueue[Request]":
    """Return a queue that a thread fills from standard input, and which ends the process when that ends."""
    requests: queue.SimpleQueue[Request] = queue.SimpleQueue()

    def read() -> None:
        with contextlib.suppress(ValueError):  # a line that its sender's end has cut
            for line in sys.stdin:
                requests.put(json.loads(line))
        # Also in the middle of a request: nobody waits for its answer. The client made a process group for this.
        os.killpg(0, signal.SIGKILL) if os.getpgrp() == os.getpid() else os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return requests


def _end_with_parent() -> None:
    """Have Linux kill this process when its parent dies, even if it hangs."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main() -> None:
    """Serve on pipes: what libraries print on standard output goes to standard error."""
    _end_with_parent()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(replies)


if __name__ == "__main__":
    main()
