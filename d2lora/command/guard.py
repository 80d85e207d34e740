"""How a command ends: its exit code, and one line for what the user can mend."""

import contextlib
import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from d2lora import data
from d2lora.errors import UserError

_DISK = (errno.ENOSPC, errno.EROFS, errno.EDQUOT)  # full, read-only, over quota


def guard(main: Callable[[], object]) -> NoReturn:
    """Run main and exit with its code, or 0 if it returns none.

    Otherwise with 1 for work that failed or a disk that fails, 2 for input that is wrong (one line), 130 after Ctrl-C, 141 where
    nobody reads the output any more.
    """
    with reader_may_leave():
        code = _code(main)
        sys.exit(code if isinstance(code, int) else 0)


def _code(main: Callable[[], object]) -> object:
    """What main returns, or the exit code of the error that it ended with; errors of ours are traced by Python."""
    try:
        return main()
    except KeyboardInterrupt:
        print("interrupted: what is finished is kept; the same command goes on from there", file=sys.stderr)
        return 130
    except (UserError, HydraException, OmegaConfBaseException) as error:
        return refuse(error)
    except OSError as error:
        if not (error.filename or error.errno in _DISK):
            raise
        print(f"error: {error.filename or 'output'}: {error.strerror}; what is finished is kept", file=sys.stderr)
        return 1
    except (ValueError, TypeError, AttributeError) as error:
        if not _is_from_hydra(error):
            raise
        return refuse(error)


def refuse(error: Exception) -> int:
    """Say in one line what is wrong with the input; returns its exit code."""
    print(f"error: {one_line(error)}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def reader_may_leave() -> Iterator[None]:
    """End without a traceback once whoever reads the output has gone, as in `run.py dry_run=true | head`."""
    try:
        try:
            yield
        finally:
            if sys.stdout:  # none where a shell closed it
                sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more as it ends
        sys.exit(128 + 13)  # as a shell tells of SIGPIPE


def _is_from_hydra(error: Exception) -> bool:
    """Whether Hydra raised it over what was typed: some of its refusals (method=0) are plain ValueErrors."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").split(".")[0] in ("hydra", "omegaconf", "antlr4", "yaml")


def one_line(error: Exception) -> str:
    """Hydra's messages in one line; a list of options keeps its commas."""
    lines = [line for line in str(error).splitlines() if line.strip() and "HYDRA_FULL_ERROR" not in line]
    text = lines[0].strip() if lines else type(error).__name__
    options = [line.strip() for line in lines[1:] if line.startswith("\t") and "provider=" not in line]
    if "primary config" in text:
        options = [*sorted(f.stem for f in (data.ROOT / "sweeps").glob("*.yaml")), "config"]
    if "--multirun" in str(error):
        return text + ": several values make a grid: add -m (--multirun); for a list write key=[a,b]"
    if options:
        return f"{text.split('. ')[0].rstrip('.')}. Available: {', '.join(options)}"
    if len(lines) > 1 and not isinstance(error, UserError):
        return f"{text} {lines[1].strip()}"
    return text
