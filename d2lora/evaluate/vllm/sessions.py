"""Keep one engine for a base and its adapters: checked against the model in memory, and replaced when it fails."""

import atexit
import contextlib
import gc
import math
import re
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lm_eval.models.utils import resolve_max_length

from d2lora import base as bases
from d2lora.base import Base
from d2lora.evaluate.vllm import adapters as files
from d2lora.evaluate.vllm import installed, probe
from d2lora.evaluate.vllm.client import WORKER, Lost, Patience, Reply
from d2lora.evaluate.vllm.installed import EngineIdentity
from d2lora.evaluate.vllm.running import Facts, Key, Request, Room, Running, Size
from d2lora.keys import digest
from d2lora.outputs import Outputs
from d2lora.settings import Model
from d2lora.settings.recipe import Machine

SIZES = (Size(0.9, 256), Size(0.6, 32))  # the second is that of the fresh engine after one that failed
_TOGETHER = 31  # adapters in one call at most: more are evaluated in several
_LENGTH = 4096  # tokens of prompt and answer that an engine is opened for, unless a request has more
_FOLDERS = re.compile(r"(?<![\w.:/])/(?:[^\s/'\":,]+/)+")  # of an absolute path, up to its last name


class Gone(Exception):
    """The engine failed, and so did a fresh one with less memory: what it did not answer is left to the model in memory."""


class Unable(Exception):
    """The engine can't do this request, or not with this adapter: it is to be done in memory."""


class Adapter(NamedTuple):
    """An adapter in PEFT's format, under the key of the stage that trained it."""

    key: str
    folder: Path
    quantizes: bool = False  # it is for a quantized base

    @property
    def why_not(self) -> str | None:
        """Return why vLLM can't do it, as its files say; None if it can."""
        return files.why_not(self.folder, self.quantizes)


class Session:
    """An engine with a base. It starts when adapters are added; a call has at most one adapter less than there are slots.

    vLLM (0.32) answers the base's requests with an adapter if they share a call with as many adapters as there are slots.
    """

    def __init__(self, base: Base, facts: Facts, adapters: Sequence[Adapter], log: Path) -> None:
        self._base, self.facts, self._log = base, facts, log
        self._most = resolve_max_length(base.model.config, base.tokenizer)
        able = [a.folder for a in adapters if not a.why_not]
        rank = files.room(max(map(files.rank, able), default=1))
        layers = frozenset[str]().union(*map(files.layers, able))
        self._room = Room(rank, layers, min(len(able), _TOGETHER) + 1, min(self._most, _LENGTH))
        self._adapters: dict[str, Adapter] = {}
        self._expected: dict[Key, probe.Expected] = {}
        self._unread: dict[
            tuple[Key, str], list[Reply]
        ] = {}  # by adapter and requests: what `answers` has not returned yet
        self._loads = 0
        self._running: Running | None = None
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
        return self._running.pid if self._running else None

    def why_not(self, key: Key) -> str:
        """Return why an adapter, or the base, is to be evaluated in memory; "" if it is not, or some of its answers are there."""
        if any(answered == key for answered, _ in self._unread):
            return ""
        return self.gone or (self.refused.get(key, "") if key else "")

    @property
    def sequences(self) -> int:
        """Return how many sequences the engine does at a time."""
        return SIZES[min(self.failures, len(SIZES) - 1)].sequences

    def takes(self, facts: Facts, adapters: Sequence[Adapter]) -> bool:
        """Tell whether this engine can be used for these facts and adapters, in one call, without opening another."""
        if facts != self.facts or self.gone:
            return facts == self.facts
        able, room = [a.folder for a in adapters if not a.why_not], self._room
        fit = all(files.rank(folder) <= room.rank and files.layers(folder) <= room.layers for folder in able)
        return fit and min(len(able), _TOGETHER) < room.slots

    def add(self, adapters: Sequence[Adapter]) -> None:
        """Load those adapters that it does not have, and check each, and the base, against the model in memory.

        Print a line for what is not to be evaluated by the engine. An engine that made room is not started for adapters that it
        had.
        """
        new = [a for a in adapters if a.key not in self._adapters]
        if self.gone or not (new or None not in self._expected):
            return
        self._adapters |= {a.key: a for a in new}
        for adapter in new:
            if why := adapter.why_not:
                self._refuse(adapter.key, why)
        self._expect(new)
        with contextlib.suppress(Gone):  # `gone` says so
            self._ready()

    def answers(
        self, do: str, key: Key, together: Sequence[Key], requests: list[Request], done: Callable[[], None], **more: Any
    ) -> list[Reply]:
        """Return the replies to requests under an adapter, in order; `done` is called at each.

        Those under the adapters in `together` are sent in the same call, and returned when it is their turn, also if the engine
        fails later. Gone or Unable if they are left to the model in memory.
        """
        name = digest([do, requests, more])
        if (key, name) in self._unread:
            for _ in requests:
                done()
            return self._unread.pop((key, name))
        self._check_able(key)
        able = [k for k in dict.fromkeys((key, *together)) if k is None or self._can(k)]
        replies: dict[tuple[Key, int], Reply] = {}
        with contextlib.suppress(Gone):  # those under some adapters may be whole all the same
            self._ask(do, able, requests, replies, lambda k: done() if k == key else None, **more)
        for k in able:
            own = [replies[k, i] for i in range(len(requests)) if (k, i) in replies]
            if len(own) == len(requests):
                self._unread[k, name] = own
        if (key, name) not in self._unread:
            self._check_able(key)
        return self._unread.pop((key, name))

    def close(self) -> None:
        """End the engine for good. Its log is left where something went wrong. The base stays where it is, for load_base to move."""
        self._unread.clear()
        self._kill()
        if not self.failures and not self.gone:
            self._log.unlink(missing_ok=True)

    def stop(self) -> None:
        """End the engine until it is needed again, and give back its memory: on a GPU the base is moved back there."""
        self._kill()
        self._base.model.to(bases.device())  # type: ignore[arg-type]  # transformers hides its argument

    def _kill(self) -> None:
        if self._running:
            self._running.close()
        self._running, self._base.lent = None, False

    def _can(self, key: str) -> bool:
        return key in self._adapters and key not in self.refused

    def _check_able(self, key: Key) -> None:
        """Raise Unable for an adapter that is to be evaluated in memory, and Gone where everything is."""
        if key is not None and key in self.refused:
            raise Unable(self.refused[key])
        if self.gone:
            raise Gone(self.gone)

    def _ask(
        self,
        do: str,
        keys: Sequence[Key],
        requests: list[Request],
        replies: dict[tuple[Key, int], Reply],
        done: Callable[[Key], None],
        **more: Any,
    ) -> None:
        """Send requests under each adapter, and add the replies to `replies`, by adapter and index. What an engine that fails had
        not answered goes to a fresh one; adapters that this refuses are left out. Gone if that fails too.
        """
        self._make_room(requests)
        for part in _calls(keys, self._room.slots - 1):
            every = [(k, i) for k in part for i in range(len(requests))]
            while any(one not in replies and one[0] not in self.refused for one in every):
                engine = self._ready()
                missing = [one for one in every if one not in replies and one[0] not in self.refused]
                try:
                    asked = [{"key": k} | requests[i] for k, i in missing]
                    with contextlib.closing(engine.call(do, asked, **more)) as answered:
                        for index, reply in answered:
                            self._take(missing[index], reply, replies)
                            done(missing[index][0])
                except Lost as lost:
                    left = sum(one not in replies for one in every)
                    self._lost(lost, f"{left} of {len(every)} requests")
            self._compare_again(part, replies)

    def _take(self, asked: tuple[Key, int], reply: Reply, replies: dict[tuple[Key, int], Reply]) -> None:
        """Add a reply to those of its adapter. One whose numbers are none ends the use of the engine for the adapter, or the base."""
        key, _ = asked
        odd = next((value for value in reply.get("logprobs", []) if not math.isfinite(value)), None)
        if odd is None:
            replies[asked] = reply
        elif key is None:
            self._end(f"vLLM gave a log-probability of {odd}")
        elif key not in self.refused:
            self._refuse(key, f"vLLM gave a log-probability of {odd}")

    def _compare_again(self, keys: Sequence[Key], replies: dict[tuple[Key, int], Reply]) -> None:
        """Send the probe after answers, too. Those of an adapter, or the base, that is off by now are taken out of `replies`."""
        able = [key for key in keys if key is None or self._can(key)]
        if not self._running or not able:
            return
        try:
            self._compare(self._running, able)
        except Lost as lost:
            self._lost(lost, "further requests")
        off = {key for key in keys if (self.gone if key is None else key in self.refused)}
        for asked in [asked for asked in replies if asked[0] in off]:
            del replies[asked]

    def _make_room(self, requests: Sequence[Request]) -> None:
        """Have the engine opened for longer texts where one needs it. Unable where the model itself has no room."""
        longest = max((len(r["ids"]) + r.get("max_tokens", 1) for r in requests), default=0)
        if longest > self._most:
            raise Unable(f"a text of {longest} tokens with its answer, where the model takes {self._most}")
        if longest > self._room.length:
            self._room = replace(self._room, length=min(self._most, 1 << (longest - 1).bit_length()))
            self._kill()

    def _ready(self) -> Running:
        """Return a running engine that has the adapters and is checked. Gone if it can't be had in two tries."""
        while not self.gone:
            try:
                if not self._running:
                    _free(self._base)
                    self._running = Running(self.facts, self._room, SIZES[self.failures], self._log)
                    self.version = self._running.version
                self._load_and_check(self._running)
                if self._running:  # not ended by the check
                    return self._running
            except Lost as lost:
                self._lost(lost, "all requests")
        raise Gone(self.gone)

    def _load_and_check(self, engine: Running) -> None:
        """Load the adapters that the engine lacks, before any request is theirs, and compare their probes."""
        new = [a for a in self._adapters.values() if self._can(a.key) and not engine.has(a.key)]
        for adapter in new:
            self._loads += 1
            try:
                if why := engine.load(adapter.key, adapter.folder, self._loads):
                    self._refuse(adapter.key, why)
            except Lost as lost:  # the next engine would fail at the same adapter
                self._refuse(adapter.key, f"the engine failed as it loaded it: {lost}")
                raise
        if engine.checked:
            return
        loaded: list[Key] = [a.key for a in new if engine.has(a.key)]
        size = max(1, self._room.slots - 1)
        calls: list[list[Key]] = [[None], *(loaded[i : i + size] for i in range(0, len(loaded), size))]
        for keys in [*calls, *calls[:1] * bool(loaded)]:  # the base again, after adapters
            if not self.gone:
                self._compare(engine, keys)
        engine.checked = True

    def _compare(self, engine: Running, keys: Sequence[Key]) -> None:
        """Send the probe under these adapters, in one call, and refuse those whose log-probabilities are off."""
        ids, dtype = probe.ids(self._base), self.facts.dtype
        requests = [{"key": key, "ids": ids, "start": 1} for key in keys]
        replies = dict(engine.call("loglikelihood", requests))  # all of them, before one can end the engine
        for index, key in enumerate(keys):
            why = probe.why_off(replies[index]["logprobs"], self._expected[key], dtype)
            if why and key is None:
                self._end(why)
            elif why and key:
                self._refuse(key, why)

    def _expect(self, new: Sequence[Adapter]) -> None:
        """Compute what the probe gives in memory, under the base and under new adapters. One that PEFT does not load is refused: its
        own evaluation fails, and no other's.
        """
        if None not in self._expected:
            self._expected[None] = probe.expected(self._base, None)
        for adapter in new:
            if adapter.key in self.refused:
                continue
            try:
                self._expected[adapter.key] = probe.expected(self._base, adapter.folder)
            except Exception as error:
                self._refuse(adapter.key, f"it is not computed in memory: {type(error).__name__}")

    def _refuse(self, key: str, why: str) -> None:
        self.refused[key] = _without_folders(why)
        print(f"adapter {key} is evaluated in memory: {why}", file=sys.stderr)

    def _lost(self, lost: Lost, what: str) -> None:
        """Give up the engine; the next is opened with less. Gone if this one had."""
        self._running = None
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
        """Use no engine from here on."""
        self.gone = _without_folders(why)
        print(f"{self._base.name} is evaluated in memory: {why} (see {self._log})", file=sys.stderr)
        self.stop()


def _calls(keys: Sequence[Key], adapters: int) -> list[list[Key]]:
    """Divide the base and adapters into calls of so many adapters; the base is in one of its own."""
    own: list[Key] = [key for key in keys if key is not None]
    shares: list[list[Key]] = [own[i : i + adapters] for i in range(0, len(own), max(1, adapters))]
    return [[None], *shares] if None in keys else shares


def _without_folders(text: str) -> str:
    """Return a text with the last names of its absolute paths: records, reports and W&B name no folder of a machine."""
    return _FOLDERS.sub("", text)


def _free(base: Base) -> None:
    """Move the base off the GPU: the engine loads it again, and takes the memory that is free."""
    base.lent, base.tested = True, None
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
    vocabulary = len(base.model.get_input_embeddings().weight)  # type: ignore[arg-type]  # an Embedding's
    facts = Facts(command, source, model.revision, model.dtype, vocabulary, machine.threads, Patience())
    if _current is None or not _current.takes(facts, adapters):
        close()
        _current = Session(base, facts, adapters, outputs.engine_log(secrets.token_hex(4)))
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
    """End the engine, which takes memory that an evaluation in this process needs.

    Its session stays, with what it has answered; where it failed, it is not tried once more.
    """
    if _current:
        _current.stop()
