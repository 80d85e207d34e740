"""Show progress on a terminal: one line for the sweep, one bar for each running stage; nothing if the output is not a
terminal.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars would hide ours, which say themselves whether they show

from tqdm import tqdm

from d2lora.outputs import Outputs
from d2lora.stages import Stage

_BARS = 8  # shown at once, of a sweep's stages at work


class Bar(contextlib.AbstractContextManager):
    """One bar for the stage at work; quiet when not a terminal."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def stage(self, stage: Stage) -> Callable[[int, int], None]:
        """Return a progress function (steps done, steps in all) for a stage that begins."""
        self._close()
        self.bar = tqdm(total=None, desc=stage.label, leave=False, disable=not sys.stderr.isatty(), unit="step")
        return self._update

    def _update(self, done: int, total: int) -> None:
        assert self.bar is not None, "stage() was called first"
        _set(self.bar, done, total)

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def __exit__(self, *exc: object) -> None:
        self._close()


class Note(contextlib.AbstractContextManager):
    """The progress of a worker's stage in <output>/progress: the terminal may be another process's, on another machine."""

    def __init__(self, output: Path) -> None:
        self.outputs = Outputs(output)
        self.file: Path | None = None  # of the stage at work
        self.written = 0.0

    def stage(self, stage: Stage) -> Callable[[int, int], None]:
        """Return a progress function (steps done, steps in all) for a stage that begins."""
        self._close()
        self.file, self.written = self.outputs.progress(stage.key), 0.0
        return self._update

    def _update(self, done: int, total: int) -> None:
        assert self.file is not None, "stage() was called first"
        if (clock := time.monotonic()) - self.written < 1:
            return
        self.written = clock
        with contextlib.suppress(OSError):  # no stage stops over this
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(f"{done} {total}")

    def _close(self) -> None:
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.file.unlink(missing_ok=True)

    def __exit__(self, *exc: object) -> None:
        self._close()


@contextlib.contextmanager
def board(
    text: Callable[[], str], at_work: Callable[[], list[Stage]], output: Path, every: float = 1.0
) -> Iterator[None]:
    """Show a line for the sweep, and below it a bar for each running stage, updated every second; nothing if not a
    terminal.
    """
    if not sys.stderr.isatty():
        yield
        return
    line, over = tqdm(total=0, bar_format="{desc}", leave=True, disable=False), threading.Event()
    bars: dict[str, tqdm] = {}

    def watch() -> None:
        while not over.wait(every):
            line.set_description_str(text())
            _draw(bars, at_work(), output)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        _draw(bars, [], output)
        line.set_description_str(text())
        line.close()


def _draw(bars: dict[str, tqdm], at_work: list[Stage], output: Path) -> None:
    """Update `bars`, by the keys of their stages, from the workers' progress files; remove those of ended stages."""
    for key in bars.keys() - {stage.key for stage in at_work}:
        bars.pop(key).close()
    for stage in at_work:
        try:
            done, total = map(int, Outputs(output).progress(stage.key).read_text().split())
        except (OSError, ValueError):  # not begun to count, or being written
            continue
        if stage.key not in bars and len(bars) < _BARS:
            bars[stage.key] = tqdm(total=total, initial=done, desc=stage.label, leave=False, disable=False, unit="step")
        if stage.key in bars:
            _set(bars[stage.key], done, total)


def _set(bar: tqdm, done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)
