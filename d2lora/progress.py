"""What a person sees while it works: one bar for the stage, one line for the sweep; nothing where nobody looks."""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator

os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars would hide ours, which say themselves whether they show

from tqdm import tqdm

from d2lora.plan import Stage


class Bar(contextlib.AbstractContextManager):
    """One bar for the stage at work, below the sweep's line; quiet when not a terminal or asked to be."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet or not sys.stderr.isatty()
        self.bar: tqdm | None = None

    def stage(self, stage: Stage) -> Callable[[int, int], None]:
        """A progress function (steps done, steps in all) for a stage that begins."""
        self._close()
        self.bar = tqdm(total=None, desc=stage.label, position=1, leave=False, disable=self.quiet, unit="step")
        return self._update

    def _update(self, done: int, total: int) -> None:
        assert self.bar is not None, "stage() was called first"
        self.bar.total = total
        self.bar.update(done - self.bar.n)

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def __exit__(self, *exc: object) -> None:
        self._close()


@contextlib.contextmanager
def line(text: Callable[[], str], every: float = 1.0) -> Iterator[None]:
    """One line on the terminal, written anew every second; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield
        return
    bar, over = tqdm(total=0, bar_format="{desc}", position=0, leave=True, disable=False), threading.Event()

    def watch() -> None:
        while not over.wait(every):
            bar.set_description_str(text())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        bar.set_description_str(text())
        bar.close()
