"""One engine that runs: opened once, given adapters before they are asked, never used again after it failed."""

import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from d2lora.evaluate.vllm.client import Client, Lost, Patience, Reply, first_line

Key = str | None  # of an adapter; None is the base
Request = dict[str, Any]

_CPU_CACHE = "2"  # GiB of keys and values without a GPU
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: when it is killed, nothing of the engine is left
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # likewise
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


class Size(NamedTuple):
    """How much an engine takes: a share of the GPU memory that is free, and sequences at a time."""

    memory: float
    sequences: int


@dataclass(frozen=True)
class Facts:
    """What an engine is opened with, whatever its adapters. `command` starts a worker."""

    command: tuple[str, ...]
    source: str  # a folder, or a name on the Hub with its revision
    revision: str | None
    dtype: str
    vocabulary: int  # token ids are below it
    threads: int | None
    patience: Patience


@dataclass(frozen=True)
class Room:
    """What an engine has room for: adapters of a rank and on some layers, so many in one call less one, and tokens of a text."""

    rank: int
    layers: frozenset[str]
    slots: int
    length: int


class Running:
    """An engine with a base and the adapters that were loaded. Lost, from any method, means that it was ended."""

    def __init__(self, facts: Facts, room: Room, size: Size, log: Path) -> None:
        self._vocabulary = facts.vocabulary
        self._client = Client(facts.command, _environment(facts.threads), log, facts.patience)
        self._names: dict[str, str] = {}  # under which it has each adapter, by our key
        self.checked = False  # against the model in memory, with the adapters that it has
        model = {"base": facts.source, "revision": facts.revision, "dtype": facts.dtype, "length": room.length}
        adapters = {"rank": room.rank, "layers": sorted(room.layers), "slots": room.slots}
        replies = list(self._client.ask("open", **model, **adapters, **size._asdict()))
        self.version = next((str(reply["version"]) for reply in replies if "version" in reply), "")
        if not self.version:
            self.close()
            raise Lost("it did not say its version")

    @property
    def pid(self) -> int:
        """Return its process id."""
        return self._client.pid

    def has(self, key: str) -> bool:
        """Tell whether an adapter is loaded."""
        return key in self._names

    def load(self, key: str, folder: Path, number: int) -> str:
        """Load an adapter; return why vLLM refuses it, or "".

        `number` makes its name one that was never used: under one that was, the old adapter would answer.
        """
        name = f"{key}-{number}"
        # All replies are read: a request that is left before its end ends the worker.
        replies = list(self._client.ask("load", key=name, folder=str(folder.absolute())))
        if refused := [reply["refused"] for reply in replies if "refused" in reply]:
            return f"vLLM: {first_line(refused[0])}"
        self._names[key] = name
        self.checked = False
        return ""

    def call(self, do: str, requests: Sequence[Request], **more: Any) -> Generator[tuple[int, Reply], None, None]:
        """Yield index and reply of each request as it is answered. Lost unless each is, once, with what it wants."""
        named = [request | {"key": request["key"] and self._names[request["key"]]} for request in requests]
        fits = self._answers if do == "generate" else _scores
        open_ones = set(range(len(requests)))
        for reply in self._client.ask(do, requests=named, **more):
            index = reply.get("index")
            if not isinstance(index, int) or index not in open_ones or not fits(reply, requests[index], **more):
                self.close()
                raise Lost(f"it gave a reply that does not fit its request: {str(reply)[:80]}")
            open_ones.remove(index)
            yield index, reply
        if open_ones:
            self.close()
            raise Lost(f"it left out {len(open_ones)} requests")

    def close(self) -> None:
        """Kill it."""
        self._client.close()

    def _answers(self, reply: Reply, request: Request, ends: Sequence[int] = ()) -> bool:
        """Tell whether a reply is an answer: token ids up to its limit, or to the first that ends it."""
        ids, most = reply.get("ids"), request["max_tokens"]
        if not isinstance(ids, list) or not all(isinstance(i, int) and 0 <= i < self._vocabulary for i in ids):
            return False
        last = next((at for at, token in enumerate(ids, 1) if token in ends), most)
        return len(ids) == last <= most


def _scores(reply: Reply, request: Request) -> bool:
    """Tell whether a reply has a log-probability, or NaN, of each token that was asked for, and whether they are the likeliest."""
    values, wanted = reply.get("logprobs"), len(request["ids"]) - request["start"]
    if not isinstance(values, list) or not all(isinstance(value, float | int) for value in values):
        return False
    return len(values) == wanted and isinstance(reply.get("greedy"), bool)


def _environment(threads: int | None) -> dict[str, str]:
    """Return the worker's environment variables: this process's, without those of its Python, and the engine's own."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    own |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    return {"VLLM_CPU_KVCACHE_SPACE": _CPU_CACHE} | own | _ENVIRONMENT
