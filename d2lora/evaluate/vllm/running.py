"""One engine that runs: opened once, given adapters before they are asked, never used again after it failed."""

import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from d2lora.evaluate.vllm.client import Client, Lost, Patience, Reply

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
        self._client = Client(facts.command, _environment(facts.threads), log, facts.patience)
        self._names: dict[str, str] = {}  # under which it has each adapter, by our key
        self.checked = False  # against the model in memory, with the adapters that it has
        model = {"base": facts.source, "revision": facts.revision, "dtype": facts.dtype, "length": room.length}
        adapters = {"rank": room.rank, "layers": sorted(room.layers), "slots": room.slots}
        replies = list(self._client.ask("open", **model, **adapters, **size._asdict()))
        self.version = str(replies[0].get("version")) if replies else ""

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
        for reply in self._client.ask("load", key=name, folder=str(folder.absolute())):
            if "refused" in reply:
                return f"vLLM: {reply['refused']}"
        self._names[key] = name
        self.checked = False
        return ""

    def call(self, do: str, requests: Sequence[Request], **more: Any) -> Generator[tuple[int, Reply], None, None]:
        """Yield index and reply of each request as it is answered. Lost unless each is, once, with what it wants."""
        named = [request | {"key": request["key"] and self._names[request["key"]]} for request in requests]
        open_ones = set(range(len(requests)))
        for reply in self._client.ask(do, requests=named, **more):
            index = reply.get("index")
            if index not in open_ones or not _fits(do, requests[index], reply, more.get("ends", [])):
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


def _fits(do: str, request: Request, reply: Reply, ends: list[int]) -> bool:
    """Tell whether a reply has what its request wants: an answer up to its end or limit, or all log-probabilities."""
    if do == "generate":
        ids, most = reply.get("ids"), request["max_tokens"]
        return isinstance(ids, list) and (len(ids) == most or (0 < len(ids) < most and ids[-1] in ends))
    values = reply.get("logprobs")
    return isinstance(values, list) and len(values) == len(request["ids"]) - request["start"] and "greedy" in reply


def _environment(threads: int | None) -> dict[str, str]:
    """Return the worker's environment variables: this process's, without those of its Python, and the engine's own."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    own |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    return {"VLLM_CPU_KVCACHE_SPACE": _CPU_CACHE} | own | _ENVIRONMENT
