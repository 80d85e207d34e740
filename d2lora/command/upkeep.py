"""What `python -m d2lora check` and `gc` do with the store."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from d2lora import store
from d2lora.errors import UserError


def check(output: Path) -> int:
    """Print what is wrong in the store under `output`. Returns the exit code: 1 if there is something to look at."""
    return _in_one_line(output, lambda: _check(output))


def gc(output: Path, yes: bool) -> int:
    """Print what no sweep's manifest needs any more, and with `yes` free it. Returns the exit code."""
    return _in_one_line(output, lambda: _gc(output, yes))


def _check(output: Path) -> int:
    faults = list(store.check(output))
    print("\n".join([*faults, f"{len(store.entries(output))} entries, {len(faults)} of them to look at"]))
    return 1 if faults else 0


def _gc(output: Path, yes: bool) -> int:
    garbage = list(store.garbage(output))
    for path, why in garbage:
        print(f"{_size(path) / 1e6:8.1f} MB  {path}: {why}")
        if yes:
            _remove(path)
    total = f"{len(garbage)} entries"
    print(f"freed {total}" if yes else f"{total} could be freed: gc --yes")
    return 0


def _in_one_line(output: Path, work: Callable[[], int]) -> int:
    """The exit code of `work`, or 1 for what keeps it from being done, which is told in one line."""
    try:
        return work()
    except UserError as error:
        message = str(error)
    except BrokenPipeError:  # whoever read the output has gone
        raise
    except (OSError, ValueError, KeyError) as error:  # a damaged manifest, a folder that can't be read or freed
        message = f"{output}: {type(error).__name__}: {error}"
    print(f"error: {message}", file=sys.stderr)
    return 1


def _size(path: Path) -> int:
    return sum(f.stat().st_size for f in [path, *path.rglob("*")] if f.is_file())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
