"""Dispatch: arguments -> command, errors -> message and exit code.

A command is a module with HELP, `configure(parser)` and `run(args, out) -> exit code`. The modules are light: what they
need of the engine they import in `run`, so that `cakefs --help` is instant. Here, and only here, an exception ends.
"""

import argparse
import logging
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn, Protocol, cast

from cakefs import __version__
from cakefs.cli.failures import failure_of
from cakefs.cli.options import add_global_options
from cakefs.cli.out import Out
from cakefs.errors import UserError

# Name -> module below cakefs.cli, in the order of `cakefs --help`.
COMMANDS = {
    "mount": "mount",
    "umount": "umount",
    "add": "add",
    "ls": "ls",
    "show": "show",
    "pull": "pull",
    "slice": "slice",
    "merge": "merge",
    "status": "status",
    "verify": "verify",
    "rm": "rm",
    "gc": "gc",
    "doctor": "doctor_command",
    "completion": "completion",
}


class Command(Protocol):
    HELP: str

    def configure(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace, out: Out) -> int: ...


class Parser(argparse.ArgumentParser):
    """Wrong arguments are a UserError like any other mistake."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message, hint=f"{self.prog} --help")


class LogLines(logging.Handler):
    """What the engine logs, as notes: they find their way around a progress bar.

    The latest line waits for the next: when the command fails, the error says the same, and once is enough.
    """

    def __init__(self, out: Out) -> None:
        super().__init__()
        self._out = out
        self._latest = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.settle()
        self._latest = f"{record.levelname.lower()}: {record.getMessage()}"

    def settle(self) -> None:
        if self._latest:
            self._out.note(self._latest)
            self._latest = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; no exception leaves."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    out = Out()
    try:
        code = _run(arguments, out)
        out.flush()
        return code
    except BaseException as error:
        return _end_with(error, out, debug="--debug" in arguments)


def _run(arguments: Sequence[str], out: Out) -> int:
    try:
        args = build_parser().parse_args(arguments)
    except SystemExit:  # after --help and --version
        return 0
    out.quiet = args.quiet
    lines = LogLines(out)
    logging.basicConfig(level=logging.DEBUG if args.debug else logging.WARNING, handlers=[lines])
    code: int = args.run(args, out)
    lines.settle()
    return code


def build_parser() -> Parser:
    """The whole tree of arguments."""
    parser = Parser(
        prog="cakefs",
        description="Every ML model as an ordinary directory: lazily fetched, deduplicated by tensor, verified.",
        epilog="`cakefs COMMAND --help` says more about each.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"cakefs {__version__}")
    add_global_options(parser, top=True)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name, module in COMMANDS.items():
        command = cast(Command, import_module(f"cakefs.cli.{module}"))
        child = subparsers.add_parser(
            name,
            help=command.HELP,
            description=f"{command.HELP[0].upper()}{command.HELP[1:]}.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.configure(child)
        add_global_options(child, top=False)
        child.set_defaults(run=command.run)
    return parser


def _end_with(error: BaseException, out: Out, *, debug: bool) -> int:
    failure = failure_of(error)
    if failure.message:
        if debug:
            traceback.print_exception(error)
        out.error(failure.message, failure.hint)
    return failure.exit_code
