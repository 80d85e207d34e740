"""Run `python -m d2lora check` and `gc`."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from d2lora import store
from d2lora.errors import UserError
from d2lora.outputs import Outputs


def check(output: Path) -> int:
    """Print what is wrong in the store under `output`. Return the exit code: 1 if anything is."""
    return _in_one_line(output, lambda: _check(output))


def gc(output: Path, yes: bool) -> int:
    """Print what no sweep's manifest needs any more, and with `yes` delete it. Return the exit code."""
    return _in_one_line(output, lambda: _gc(output, yes))


def _check(output: Path) -> int:
    faults = list(store.check(output))
    print("\n".join([*faults, f"{len(Outputs(output).entries())} entries, {len(faults)} of them to look at"]))
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
    """Return the exit code of `work`; if it raises, print the error as one line and return 1."""
    try:
        if not output.is_dir():
            raise UserError(f"{output}: no such folder: --output names the one that run.py was given")
        return work()
    except UserError as error:
        message = str(error)
    except BrokenPipeError:  # the reader of the output has closed it: guard handles that
        raise
    except (OSError, ValueError, KeyError) as error:  # a damaged manifest, a folder that can't be read or deleted
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
