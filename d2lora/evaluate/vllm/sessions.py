"""Keep one engine for a base and its adapters: checked against the model in memory, and replaced when it fails."""

import atexit
import contextlib
import gc
import os
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lm_eval.models.utils import resolve_max_length

from d2lora import base as bases
from d2lora.base import Base
from d2lora.evaluate.vllm import adapters as files
from d2lora.evaluate.vllm import installed, probe
from d2lora.evaluate.vllm.client import WORKER, Client, Lost, Patience, Reply
from d2lora.evaluate.vllm.installed import EngineIdentity
from d2lora.keys import digest
from d2lora.outputs import Outputs
from d2lora.settings import Model
from d2lora.settings.recipe import Machine

Key = str | None  # of an adapter; None is the base
Request = dict[str, Any]

_TOGETHER = 31  # adapters in one call at most: more are asked in several
_LENGTH = 4096  # tokens of prompt and answer that an engine is opened for, unless more are asked
_CPU_CACHE = "2"  # GiB of keys and values without a GPU
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: when it is killed, nothing of the engine is left
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # likewise
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


class Gone(Exception):
    """The engine failed, and so did a fresh one with less memory: what it did not answer is to be asked in memory."""


class Unable(Exception):
    """The engine can't do this request, or not with this adapter: it is to be done in memory."""


class Adapter(NamedTuple):
    """An adapter in PEFT's format, under the key of the stage that trained it."""

    key: str
    folder: Path
    quantizes: bool = False  # it is for a quantized base


class Size(NamedTuple):
    """How much an engine takes: a share of the GPU memory that is free, and sequences at a time."""

    memory: float
    sequences: int


SIZES = (Size(0.9, 256), Size(0.6, 32))  # the second is that of the fresh engine after one that failed


@dataclass(frozen=True)
class Facts:
    """What an engine is opened with, beside its adapters. `command` starts a worker."""

    command: tuple[str, ...]
    source: str  # a folder, or a name on the Hub with its revision
    revision: str | None
    dtype: str
    threads: int | None
    patience: Patience


class Session:
    """An engine with a base. It starts when adapters are added; at most `slots` - 1 of them are asked in one call.

    vLLM (0.32) answers the base's requests with an adapter if they share a call with as many adapters as there are slots.
    """

    def __init__(self, base: Base, facts: Facts, adapters: Sequence[Adapter], log: Path) -> None:
        self._base, self.facts, self._log = base, facts, log
        able = [a for a in adapters if files.why_not(a.folder, a.quantizes) is None]
        self._slots = min(len(able), _TOGETHER) + 1
        self._rank = files.room(max((files.rank(a.folder) for a in able), default=1))
        self._layers = {layer for a in able for layer in files.layers(a.folder)}
        self._most = resolve_max_length(base.model.config, base.tokenizer)
        self._length = min(self._most, _LENGTH)
        self._adapters: dict[str, Adapter] = {}
        self._names: dict[str, str] = {}  # under which the running engine has each adapter
        self._loads = 0
        self._checked = False  # the running engine, against the model in memory
        self._kept: dict[tuple[Key, str], list[Reply]] = {}
        self._expected: dict[Key, probe.Expected] = {}
        self._client: Client | None = None
        self.failures = 0  # engines that failed
        self.gone = ""  # why there is no engine any more
        self.refused: dict[str, str] = {}  # by the adapter's key: why it is evaluated in memory
        self.version = ""

    @property
    def identity(self) -> EngineIdentity:
        """Return what a record says of the engine."""
        return EngineIdentity(name=installed.NAME, version=self.version, dtype=self.facts.dtype)

    @property
    def changes(self) -> Mapping[Key, bool]:
        """Return of each adapter whether it changes the base's logits."""
        return {key: expected.changes for key, expected in self._expected.items()}

    @property
    def pid(self) -> int | None:
        """Return the process id of the running engine."""
        return self._client.pid if self._client else None

    def why_not(self, key: Key) -> str:
        """Return why an adapter, or the base, is to be evaluated in memory; "" if it is not."""
        return self.gone or (self.refused.get(key, "") if key else "")

    def takes(self, facts: Facts, adapters: Sequence[Adapter]) -> bool:
        """Tell whether this engine can be used for these facts and adapters, in one call, without opening another."""
        able = [a for a in adapters if files.why_not(a.folder, a.quantizes) is None]
        if facts != self.facts or self.gone:
            return facts == self.facts
        room = all(files.rank(a.folder) <= self._rank and files.layers(a.folder) <= self._layers for a in able)
        return room and min(len(able), _TOGETHER) < self._slots

    def add(self, adapters: Sequence[Adapter]) -> None:
        """Load those adapters that it does not have, and check each, and the base, against the model in memory.

        Say in a line what is not to be evaluated by the engine.
        """
        if self.gone:
            return
        new = [a for a in adapters if a.key not in self._adapters]
        self._adapters |= {a.key: a for a in new}
        for adapter in new:
            if why := files.why_not(adapter.folder, adapter.quantizes):
                self._refuse(adapter.key, why)
        self._expect([None, *(a.key for a in new if a.key not in self.refused)])
        try:
            self._ready()
        except Gone:
            return

    def answers(
        self, do: str, key: Key, together: Sequence[Key], requests: list[Request], done: Callable[[], None], **more: Any
    ) -> list[Reply]:
        """Return the replies to requests under an adapter, in order; `done` is called at each.

        Those under the adapters in `together` are asked in the same call, and kept until they are asked for. Gone or
        Unable if the model in memory has to be asked.
        """
        name = digest([do, requests, more])
        if (key, name) not in self._kept:
            able = [
                k
                for k in dict.fromkeys((key, *together))
                if (k in self._adapters or k is None) and k not in self.refused
            ]
            every = [{"key": k} | request for k in able for request in requests]
            replies = self._ask(do, every, lambda k: done() if k == key else None, **more)
            size = len(requests)
            self._kept |= {(k, name): replies[i * size : (i + 1) * size] for i, k in enumerate(able)}
        else:
            for _ in requests:
                done()
        return self._kept.pop((key, name))

    def close(self) -> None:
        """End the engine, and give back its memory: on a GPU the base is moved back there."""
        self._kept.clear()
        self._stop()
        if not self.failures:
            self._log.unlink(missing_ok=True)

    def _stop(self) -> None:
        if self._client:
            self._client.close()
            self._client = None
        self._base.model.to(bases.device())  # type: ignore[arg-type]  # transformers hides its argument

    def _ask(self, do: str, requests: list[Request], done: Callable[[Key], None], **more: Any) -> list[Reply]:
        """Ask requests, each with its "key"; what an engine that fails had not answered is asked of a fresh one."""
        self._make_room(requests)
        replies: dict[int, Reply] = {}
        for part in _calls(requests, self._slots - 1):
            while missing := [i for i in part if i not in replies]:
                self._ready()
                try:
                    with contextlib.closing(self._call(do, [requests[i] for i in missing], **more)) as answered:
                        for index, reply in answered:
                            replies[missing[index]] = reply
                            done(requests[missing[index]]["key"])
                except Lost as lost:
                    left = sum(i not in replies for i in part)
                    self._lost(lost, f"{left} of {len(part)} requests")
        return [replies[i] for i in range(len(requests))]

    def _call(self, do: str, requests: list[Request], **more: Any) -> Generator[tuple[int, Reply], None, None]:
        """Yield index and reply of each request as it is answered. Lost unless each is, once, with what was asked for."""
        for request in requests:
            if why := self.why_not(request["key"]):
                raise Unable(why)
        assert self._client is not None, "it is ready"
        named = [request | {"key": request["key"] and self._names[request["key"]]} for request in requests]
        open_ones = set(range(len(requests)))
        for reply in self._client.ask(do, requests=named, **more):
            index = reply.get("index")
            if index not in open_ones or not _fits(do, requests[index], reply, more.get("ends", [])):
                self._client.close()
                raise Lost(f"it gave a reply that does not fit its request: {str(reply)[:80]}")
            open_ones.remove(index)
            yield index, reply
        if open_ones:
            self._client.close()
            raise Lost(f"it left out {len(open_ones)} requests")

    def _make_room(self, requests: Sequence[Request]) -> None:
        """Have the engine opened for longer texts where one needs it. Unable where the model itself has no room."""
        longest = max((len(r["ids"]) + r.get("max_tokens", 1) for r in requests), default=0)
        if longest > self._most:
            raise Unable(f"a text of {longest} tokens with its answer, where the model takes {self._most}")
        if longest > self._length:
            self._length = min(self._most, 1 << (longest - 1).bit_length())
            if self._client:
                self._client.close()
                self._client = None

    def _ready(self) -> None:
        """Start an engine if none is running, load what it lacks, and check what it gives. Gone if that fails twice."""
        while not self.gone:
            try:
                self._start()
                self._load_and_check()
                return
            except Lost as lost:
                self._lost(lost, "all requests")
        raise Gone(self.gone)

    def _start(self) -> None:
        if self._client:
            return
        _free(self._base)
        self._names.clear()
        self._checked = False
        size = SIZES[self.failures]
        self._client = Client(self.facts.command, _environment(self.facts.threads), self._log, self.facts.patience)
        opened = list(
            self._client.ask(
                "open", base=self.facts.source, revision=self.facts.revision, dtype=self.facts.dtype,
                rank=self._rank, slots=self._slots, layers=sorted(self._layers), length=self._length, **size._asdict(),
            )
        )  # fmt: skip
        self.version = str(opened[0].get("version")) if opened else ""

    def _load_and_check(self) -> None:
        """Load the adapters that the engine lacks, before anything is asked of them, and compare their probes."""
        new = [a for a in self._adapters.values() if a.key not in self.refused and a.key not in self._names]
        if self._checked and not new:
            return
        for adapter in new:
            self._load(adapter)
        loaded: list[Key] = [a.key for a in new if a.key in self._names]
        size = max(1, self._slots - 1)
        calls: list[list[Key]] = [[None], *(loaded[i : i + size] for i in range(0, len(loaded), size))]
        for keys in [*calls, *calls[:1] * bool(loaded)]:  # the base again, after adapters
            if not self.gone:
                self._compare(keys)
        self._checked = True

    def _load(self, adapter: Adapter) -> None:
        """Load an adapter under a name that was never used before: under one that was, the old adapter would answer."""
        assert self._client is not None, "started"
        self._loads += 1
        name = f"{adapter.key}-{self._loads}"
        for reply in self._client.ask("load", key=name, folder=str(adapter.folder.absolute())):
            if "refused" in reply:
                self._refuse(adapter.key, f"vLLM: {reply['refused']}")
                return
        self._names[adapter.key] = name

    def _compare(self, keys: Sequence[Key]) -> None:
        """Ask the probe under these adapters, in one call, and refuse those whose log-probabilities are off."""
        ids, dtype = probe.ids(self._base), self.facts.dtype
        asked = [{"key": key, "ids": ids, "start": 1} for key in keys]
        replies = dict(self._call("loglikelihood", asked))  # all of them, before one can end the engine
        for index, key in enumerate(keys):
            expected = self._expected[key]
            off = probe.off(replies[index]["logprobs"], expected, dtype)
            if off <= (limit := probe.limit(expected, dtype)):
                continue
            why = f"the log-probabilities of a probe are off by {off:.2g}, and {limit:.2g} is allowed"
            if key is None:
                self._end(why)
            else:
                self._refuse(key, why)

    def _expect(self, keys: Sequence[Key]) -> None:
        for key in keys:
            if key not in self._expected:
                self._expected[key] = probe.expected(self._base, self._adapters[key].folder if key else None)

    def _refuse(self, key: str, why: str) -> None:
        self.refused[key] = why
        print(f"adapter {key} is evaluated in memory: {why}", file=sys.stderr)

    def _lost(self, lost: Lost, what: str) -> None:
        """Give up the engine; the next is opened with less. Gone if this one had."""
        self._client = None
        self.failures += 1
        if self.failures == len(SIZES):
            self._end(f"the engine failed again: {lost}")
            raise Gone(self.gone)
        size = SIZES[self.failures]
        print(
            f"the engine failed: {lost}; {what} go to a fresh one with {size.memory:.0%} of the free memory and "
            f"{size.sequences} sequences at a time",
            file=sys.stderr,
        )

    def _end(self, why: str) -> None:
        """Use no engine from now on."""
        self.gone = why
        print(f"{self._base.name} is evaluated in memory: {why} (see {self._log})", file=sys.stderr)
        self._stop()


def _calls(requests: Sequence[Request], adapters: int) -> list[list[int]]:
    """Divide requests, by index, into calls of some adapters each; the base's are a call of their own."""
    keys = [key for key in dict.fromkeys(request["key"] for request in requests) if key is not None]
    shares = [set(keys[i : i + adapters]) for i in range(0, len(keys), max(1, adapters))]
    calls = [[i for i, request in enumerate(requests) if request["key"] in share] for share in [{None}, *shares]]
    return [call for call in calls if call]


def _fits(do: str, request: Request, reply: Reply, ends: list[int]) -> bool:
    """Tell whether a reply has what its request asks for: an answer up to its end or limit, or all log-probabilities."""
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


def _free(base: Base) -> None:
    """Move the base off the GPU: the engine loads it again, and takes the memory that is free."""
    if bases.device() == "cuda":
        base.model.to("cpu")  # type: ignore[arg-type]  # transformers hides its argument
        gc.collect()
        torch.cuda.empty_cache()


_current: Session | None = None  # of this process


def opened(base: Base, model: Model, adapters: Sequence[Adapter], machine: Machine, outputs: Outputs) -> Session:
    """Return this process's session for a base, with these adapters loaded and checked.

    Another that is open is used if it can take them, else closed.
    """
    global _current
    command = (str(installed.python_of(machine)), "-I", str(WORKER))
    source = bases.source(model, outputs.models)
    facts = Facts(command, source, model.revision, model.dtype, machine.threads, Patience())
    if _current is None or not _current.takes(facts, adapters):
        close()
        _current = Session(base, facts, adapters, outputs.engine_log(os.getpid()))
    _current.add(adapters)
    return _current


@atexit.register
def close() -> None:
    """End this process's engine, if there is one: its memory is free when this returns."""
    global _current
    if _current:
        _current.close()
    _current = None


def make_room() -> None:
    """End the engine where it takes memory that an evaluation in this process needs: on a GPU."""
    if bases.device() == "cuda":
        close()
