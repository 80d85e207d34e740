"""Start a worker process in the engine's environment, ask it over pipes, and end it for good if anything goes wrong."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")
Reply = dict[str, Any]


class Lost(Exception):
    """The worker died, raised, or was silent for too long. It has been killed."""


@dataclass(frozen=True)
class Patience:
    """Seconds without a word from the worker after which it counts as hung."""

    opening: float = 1800.0  # loading weights from a slow disk, capturing CUDA graphs
    answering: float = 600.0  # between two steps of the engine, each of a token for all sequences


class Client:
    """A running worker. It is in a process group of its own, which is killed as a whole when the client is closed.

    The worker ends by itself when this process dies, however that happens.
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str], log: Path, patience: Patience) -> None:
        self._log, self._patience, self._number, self._closed = log, patience, 0, False
        log.parent.mkdir(parents=True, exist_ok=True)
        self._process = _started(command, environment, log)
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def pid(self) -> int:
        """Return the worker's process id, which is also its group's."""
        return self._process.pid

    def ask(self, do: str, **arguments: Any) -> Iterator[Reply]:
        """Send a request and yield its replies as they come.

        Lost if the worker fails; an iterator that is left early ends the worker as well, as its further replies would be
        taken for those to the next request.
        """
        if self._process.poll() is not None:
            self.close()  # it may have left processes of its group
            raise Lost(f"it ended{self._last_words()}")
        self._number += 1
        request = json.dumps({"id": self._number, "do": do} | arguments) + "\n"
        # In a thread: a worker that hangs does not read, and a long request does not fit the pipe.
        threading.Thread(target=self._write, args=(request.encode(),), daemon=True).start()
        wait = self._patience.opening if do == "open" else self._patience.answering
        try:
            while True:
                reply = self._reply(wait)
                if reply.get("end"):
                    return
                if "alive" not in reply:
                    yield reply
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kill the worker and all that it started, and wait for its end."""
        if self._closed:
            return  # its id may be that of another process by now
        self._closed = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def _reply(self, wait: float) -> Reply:
        """Return the next reply to the last request. Lost if there is none."""
        try:
            line = self._lines.get(timeout=wait)
        except queue.Empty:
            raise Lost(f"it said nothing for {wait:.0f} s") from None
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError):
            raise Lost(f"it ended{self._last_words()}" if not line else f"it said {line[:80]!r}") from None
        if not isinstance(reply, dict) or reply.get("id") != self._number:
            raise Lost(f"it answered another request: {line[:80]!r}")
        if "error" in reply:
            raise Lost(f"it raised {first_line(reply['error'])}")
        return reply

    def _last_words(self) -> str:
        """Return the last line that the worker wrote to its log, in brackets."""
        with contextlib.suppress(OSError):
            lines = self._log.read_text(errors="replace").strip().splitlines()
            return f" ({lines[-1][:200]})" if lines else ""
        return ""

    def _read(self) -> None:
        """Put the worker's lines into the queue, and an empty one when it has ended."""
        assert self._process.stdout is not None
        with self._process.stdout as lines:  # closed here: elsewhere that would wait for this thread's reading
            for line in lines:
                self._lines.put(line)
        self._lines.put(b"")

    def _write(self, request: bytes) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(ValueError, OSError):  # the worker is gone: that is seen where its reply is waited for
            self._process.stdin.write(request)
            self._process.stdin.flush()


def first_line(text: object) -> str:
    """Return the first line of what a worker said."""
    return next(iter(str(text).splitlines()), "")


def _started(command: Sequence[str], environment: dict[str, str], log: Path) -> "subprocess.Popen[bytes]":
    """Start a process with pipes, and its standard error added to the log. Lost if its program is not there."""
    with log.open("ab") as stderr:  # behind what an engine that failed has written
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment,
                start_new_session=True,  # a group of its own: Ctrl-C reaches this process alone, which then ends the worker
            )
        except OSError as error:
            raise Lost(f"{command[0]} does not start: {error.strerror}") from None
