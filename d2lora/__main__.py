"""Run `python -m d2lora COMMAND ...`: everything but training, which run.py does. A command imports what it needs when
it runs.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from d2lora.command.guard import guard
from d2lora.errors import UserError
from d2lora.outputs import project_path


class Parser(argparse.ArgumentParser):
    """A parser that reports a wrong command line in one line, as run.py does."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help shows how")


@dataclass(frozen=True)
class Command:
    """A command: its line in the overview, its arguments, and the function that runs it and returns its exit code."""

    line: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    do: Callable[[argparse.Namespace], int | None]
    more: str = ""  # below its arguments in --help


def _output(parser: argparse.ArgumentParser) -> None:
    text = "the folder that run.py was given as output; relative to the project's folder, ~ is your home (default: outputs)"
    parser.add_argument("--output", type=project_path, default="outputs", metavar="FOLDER", help=text)


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweeps", nargs="*", metavar="SWEEP", help="names of sweeps; all without any")
    _output(parser)


def _report(args: argparse.Namespace) -> None:
    from d2lora import report

    print(report.everything(args.output, args.sweeps))


def _check(args: argparse.Namespace) -> int:
    from d2lora.command import upkeep

    return upkeep.check(args.output)


def _gc_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--yes", action="store_true", help="free what is listed")
    _output(parser)


def _gc(args: argparse.Namespace) -> int:
    from d2lora.command import upkeep

    return upkeep.gc(args.output, args.yes)


def _fetch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="as run.py takes them: m=0,40000")
    parser.add_argument("-cn", "--config-name", default="config", metavar="SWEEP", help="a file of sweeps/")
    parser.add_argument("-cd", "--config-dir", type=Path, metavar="FOLDER", help="a folder of your own configs")
    parser.add_argument("-m", "--multirun", action="store_true", help="allowed, as in run.py's line; changes nothing")


def _fetch(args: argparse.Namespace) -> None:
    from d2lora.command.fetch import fetch_all

    fetch_all(args.overrides, args.config_name, args.config_dir)


def _dashboard_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", metavar="SWEEP")
    _output(parser)
    parser.add_argument("--project", default=os.environ.get("WANDB_PROJECT", "d2lora"))
    parser.add_argument("--entity", default=os.environ.get("WANDB_ENTITY"), help="your account's own without it")


def _dashboard(args: argparse.Namespace) -> None:
    from d2lora.mirror import dashboard

    print(dashboard.write(args.output, args.sweep, args.entity, args.project))


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("format", choices=["lm-eval"], help="lm-evaluation-harness' results_*.json and samples_*.jsonl")
    parser.add_argument("sweeps", nargs="*", metavar="SWEEP", help="names of sweeps; all without any")
    parser.add_argument("--folder", type=project_path, help="where to write (default: OUTPUT/report/lm-eval)")
    _output(parser)


def _export(args: argparse.Namespace) -> None:
    from d2lora.report import harness_files

    print(f"written: {harness_files.export(args.output, args.sweeps, args.folder)}")


def _publish_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cell", metavar="CELL", help="its id, as results.csv has it (cell_id)")
    parser.add_argument("--folder", type=project_path, help="write the repository there")
    parser.add_argument("--to", metavar="OWNER/NAME", help="write and upload it, with your login (hf auth login)")
    parser.add_argument("--public", action="store_true", help="a new repository is for everyone; without it, private")
    _output(parser)


def _publish(args: argparse.Namespace) -> None:
    from d2lora.report import publish

    print(publish.publish(args.output, args.cell, args.folder, args.to, args.public))


def _portable_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=project_path, metavar="ADAPTER", help="outputs/store/adapt/<key>/adapter")
    parser.add_argument("copy", type=Path, metavar="FOLDER", help="a new folder")


def _portable(args: argparse.Namespace) -> None:
    from d2lora.adapters import portable

    changed = portable.write(args.adapter, args.copy)
    print(f"{args.copy}: {changed or 'no'} layers' scales are in B now")


COMMANDS = {
    "report": Command("write the report again, from the records, and print the tables", _report_arguments, _report),
    "check": Command("verify the records: damage, edits, missing and foreign files", _output, _check),
    "gc": Command("list what no sweep needs any more; --yes frees it", _gc_arguments, _gc),
    "fetch": Command(
        "download the models and data sets that run.py would need, for machines without a network",
        _fetch_arguments,
        _fetch,
        "examples:\n  python -m d2lora fetch scale=paper m=0,40000\n  python -m d2lora fetch -cn table3",
    ),
    "export": Command(
        "write results as lm-evaluation-harness does, for programs that read it", _export_arguments, _export
    ),
    "publish": Command(
        "make a model repository of a cell: adapter, card, scores; uploads it only with --to",
        _publish_arguments,
        _publish,
        "examples:\n  python -m d2lora publish CELL                    # what it would write\n"
        "  python -m d2lora publish CELL --to me/my-adapter",
    ),
    "portable": Command(
        "copy an adapter for programs that read neither alpha_pattern nor rsLoRA's scale (llama.cpp)",
        _portable_arguments,
        _portable,
        "docs/serving.md shows what it is for",
    ),
    "dashboard": Command("write a sweep's dashboard in W&B and print its address", _dashboard_arguments, _dashboard),
}


def main(name: str | None = None, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command `name`, or the one that is typed first, and exit with its code: 0, 1 or 2 (command/guard.py)."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    guard(lambda: _run(name, typed))


def old_store() -> NoReturn:
    """Run `python -m d2lora.store check|gc`, which also took options before the action."""
    action = next((word for word in sys.argv[1:] if word in ("check", "gc")), None)
    typed = sys.argv[1:]
    if action:
        typed.remove(action)
        main(action, typed)
    main(None, typed)


def _run(name: str | None, typed: list[str]) -> int | None:
    if name is None:
        name, typed = _overview().parse_args(typed[:1]).command, typed[1:]
    command = COMMANDS[name]
    parser = Parser(
        prog=f"python -m d2lora {name}",
        description=command.line[0].upper() + command.line[1:] + ".",
        epilog=command.more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    return command.do(parser.parse_intermixed_args(typed))


def _overview() -> Parser:
    """Return the parser of the first word: a command, or --help, which lists them."""
    lines = "\n".join(f"  {name:<10} {command.line}" for name, command in COMMANDS.items())
    parser = Parser(
        prog="python -m d2lora",
        usage="python -m d2lora COMMAND [--help] ...",
        description="What there is beside the training, which `python run.py` does.",
        epilog=f"commands:\n{lines}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of those below")
    return parser


if __name__ == "__main__":
    main()
