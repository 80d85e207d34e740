"""Turn the outcome of a command into an exit code, and errors that the user can fix into one line."""

import contextlib
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from d2lora import data
from d2lora.errors import UserError
from d2lora.settings import key_like

_ended = [0]  # the exit codes of what was done under Hydra, which drops what a task function returns

_DISK = (errno.ENOSPC, errno.EROFS, errno.EDQUOT)  # full, read-only, over quota


def end_with(code: int) -> None:
    """Let the command exit with this code, or a higher one that was given before.

    Not by sys.exit: Hydra's callbacks are called at the end of a job and of a run only if the task function returns.
    """
    _ended.append(code)


def overrides_last(arguments: Sequence[str]) -> list[str]:
    """Return a command line with its overrides after its options: Hydra's parser takes them in one place only.

    `n=8 -m m=0,8` is meant as `-m n=8 m=0,8`, and ended in a usage text.
    """
    overrides = [_is_override(word) for word in arguments]
    options = [word for word, own in zip(arguments, overrides, strict=True) if not own]
    return options + [word for word, own in zip(arguments, overrides, strict=True) if own]


def _is_override(word: str) -> bool:
    """Tell whether a word sets, adds or deletes a key; a value of an option (-cn table3) does not look so."""
    return re.match(r"~|\+{0,2}[\w./@:-]+=", word) is not None and not word.startswith("-")


def guard(main: Callable[[], object]) -> NoReturn:
    """Run main and exit with the code that it returns, or the highest given to `end_with`.

    Exit with 1 for work that failed or a disk error, with 2 for wrong input (one line), with 130 after Ctrl-C, and with
    141 if the reader of the output has closed it.
    """
    with reader_may_leave():
        code = _code(main)
        sys.exit(code if isinstance(code, int) else max(_ended))


def _code(main: Callable[[], object]) -> object:
    """Return main's result, or the exit code of its error.

    Errors in our own code pass through, so that Python prints their traceback.
    """
    try:
        return main()
    except KeyboardInterrupt:
        print("interrupted: what is finished is kept; the same command goes on from there", file=sys.stderr)
        return 130
    except (UserError, HydraException, OmegaConfBaseException) as error:
        return refuse(error)
    except OSError as error:
        return disk_failed(error)
    except (ValueError, TypeError, AttributeError) as error:
        if not _is_from_hydra(error):
            raise
        return refuse(error)


def refuse(error: Exception) -> int:
    """Print what is wrong with the input as one line, and return its exit code."""
    print(f"error: {one_line(error)}", file=sys.stderr)
    return 2


def disk_failed(error: OSError) -> int:
    """Print what the disk refused as one line, and return its exit code. Raise the error if it is of no file or disk."""
    if not (error.filename or error.errno in _DISK):
        raise error
    print(f"error: {error.filename or 'output'}: {error.strerror}; what is finished is kept", file=sys.stderr)
    return 1


@contextlib.contextmanager
def reader_may_leave() -> Iterator[None]:
    """End without a traceback if the reader of the output closes it, as in `run.py dry_run=true | head`."""
    try:
        try:
            yield
        finally:
            if sys.stdout:  # None if the shell closed it
                sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more as it ends
        sys.exit(128 + 13)  # as shells report SIGPIPE


def _is_from_hydra(error: Exception) -> bool:
    """Tell whether Hydra raised an error over the command line: some of its own (method=0) are plain ValueErrors."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").split(".")[0] in ("hydra", "omegaconf", "antlr4", "yaml")


_NO_KEY = re.compile(r"Could not override '(.+)'\. To append to your config use (\+.+)")
_NO_OPTION = re.compile(r"Could not (?:find|load) '([\w/.-]+)/([^/']+)'")
_NO_ARGUMENT = re.compile(
    r"Error in call to target '[\w.]*\.(\w+Launcher)': TypeError\(.* unexpected keyword argument '(\w+)'"
)


def _advice(text: str) -> str | None:
    """Say more than Hydra does of a key that is not in the config: what it advises mostly fails. None for other errors."""
    if "'hydra/sweeper/optuna'" in text:
        return "hydra/sweeper=optuna: not installed: pip install -e '.[optuna]' && pip install --no-deps hydra-optuna-sweeper==1.3.0"
    if unknown := _NO_ARGUMENT.match(text):
        launcher, key = unknown.groups()
        return f"hydra.launcher.{key}: {launcher} has no such setting; hydra/launcher=NAME chooses another launcher"
    if text.startswith("Could not override 'benchmark'. No match"):
        return "benchmark: a task's own are chosen by benchmark@task.benchmark=[lab_math,lab_facts]"
    if not (missing := _NO_KEY.match(text)):
        return None
    key, appended = missing.groups()
    plugin, _, _ = key.removeprefix("hydra.").partition(".")
    if plugin in ("launcher", "sweeper"):
        return f"{key}: the {plugin} has no such setting; hydra/{plugin}=NAME chooses another: --hydra-help lists them"
    if key.startswith("hydra."):
        return f"{key}: there is no such key; --cfg hydra shows all"
    if key_like(key) == key:
        return f"{key}: no file here sets it: {appended} adds it"
    return unknown_key(key)


def unknown_key(key: str) -> str:
    """Return the error of a key that no setting has, with the one that may be meant."""
    like = key_like(key)
    return f"{key}: there is no such key{f' ({like} is meant?)' if like else ''}; --cfg job shows all"


def one_line(error: Exception) -> str:
    """Return an error's message as one line, with Hydra's lists of options joined by commas."""
    if isinstance(error, OverrideParseException):
        return f"{error.override}: not readable: write key=value, key=a,b for several values, key=[a,b] for a list, and quotes around special characters"
    lines = [line for line in str(error).splitlines() if line.strip() and "HYDRA_FULL_ERROR" not in line]
    text = lines[0].strip() if lines else type(error).__name__
    options = [line.strip() for line in lines[1:] if line.startswith("\t") and "provider=" not in line]
    if "primary config" in text:
        options = [*sorted(f.stem for f in (data.ROOT / "sweeps").glob("*.yaml")), "config"]
    if advice := _advice(" ".join(line.strip() for line in lines)):
        return advice
    if "--multirun" in str(error):
        return text + ": several values make a grid: add -m (--multirun); for a list write key=[a,b]"
    if missing := _NO_OPTION.search(text):
        allowed = f"one of {', '.join(options)}" if options else f"there is no file {missing[1]}/{missing[2]}.yaml"
        return f"{missing[1]}={missing[2]}: {allowed}"
    if options:
        return f"{text.split('. ')[0].rstrip('.')}. Available: {', '.join(options)}"
    if len(lines) > 1 and not isinstance(error, UserError):
        return f"{text} {lines[1].strip()}"
    return text
