"""Dispatch: arguments -> command, errors -> message and exit code.

A command is a module with HELP, `configure(parser)` and `run(args, out) -> exit code`. The modules are light: what they
need of the engine they import in `run`, so that `cakefs --help` is instant. Here, and only here, an exception ends.
"""

import argparse
import logging
import sys
import traceback
from collections.abc import Iterable, Sequence
from importlib import import_module
from itertools import pairwise
from typing import NoReturn, Protocol, cast

from cakefs import __version__
from cakefs.cli.failures import failure_of
from cakefs.cli.options import add_global_options
from cakefs.cli.out import Out
from cakefs.errors import UserError

# Name -> module below cakefs.cli, in the order of `cakefs --help`.
SAY_MORE = {"--layers", "--repeat-map", "--ratio-repeat"}  # of an empty value: what there is to choose from

COMMANDS = {
    "mount": "mount",
    "umount": "umount",
    "add": "add",
    "import": "import_command",
    "ls": "ls",
    "show": "show",
    "plan": "plan",
    "pull": "pull",
    "diff": "diff",
    "slice": "slice",
    "merge": "merge",
    "compare": "compare",
    "export": "export",
    "hashes": "hashes",
    "status": "status",
    "report": "report",
    "verify": "verify",
    "rm": "rm",
    "gc": "gc",
    "evict": "evict",
    "pin": "pin",
    "unpin": "unpin",
    "doctor": "doctor_command",
    "service": "service",
    "completion": "completion",
    "help": "help",
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

    The latest line waits for the next: when the command fails, the error mostly says the same, and once is enough. Nor
    is the same line said again and again. A record that is marked `at_once` does not wait.
    """

    def __init__(self, out: Out) -> None:
        super().__init__()
        self._out = out
        self._latest = ""
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        line = f"{record.levelname.lower()}: {record.getMessage()}"
        if self._cause(line) != self._cause(self._latest):
            self.settle()
        self._latest = line
        if getattr(record, "at_once", False):
            self.settle()

    def settle(self, error: str = "") -> None:
        """Says the latest line, unless it was said before or `error`, which comes next, has the same cause."""
        latest, self._latest = self._latest, ""
        cause = self._cause(latest)
        if latest and cause not in self._said and not (error and cause in error):
            self._said.add(cause)
            self._out.note(latest)

    @staticmethod
    def _cause(line: str) -> str:
        """Of `warning: bytes 0-9 of a file: cause`."""
        return line.split(": ", 2)[-1]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; no exception leaves."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    out = Out()
    lines = LogLines(out)
    try:
        code = _run(arguments, out, lines)
        out.flush()
        return code
    except BaseException as error:
        return _end_with(error, out, lines, debug="--debug" in arguments)


def _run(arguments: Sequence[str], out: Out, lines: LogLines) -> int:
    # To pathlib it is the directory that we happen to be in.
    if any(not word and before not in SAY_MORE for before, word in pairwise(["", *arguments])):
        raise UserError("an argument is empty", hint="is a variable of the shell not set?")
    try:
        args, surplus = build_parser(_asked_for(arguments)).parse_known_args(arguments)
    except SystemExit:  # after --help and --version
        return 0
    if surplus:
        raise UserError(f"unrecognized arguments: {' '.join(surplus)}", hint=f"cakefs {args.command} --help")
    out.quiet = args.quiet
    level = logging.DEBUG if args.debug else logging.ERROR if args.quiet else logging.WARNING
    logging.basicConfig(level=level, handlers=[lines])
    code: int = args.run(args, out)
    lines.settle()
    return code


def _asked_for(arguments: Sequence[str]) -> Iterable[str]:
    """The one command that is asked for, or all: to build them all is half the time of a short one."""
    words = iter(arguments)
    for word in words:
        if word in ("--store", "--endpoint"):
            next(words, None)
        elif not word.startswith("-") or word in ("-h", "--help"):
            return [word] if word in COMMANDS else COMMANDS
    return COMMANDS


def build_parser(commands: Iterable[str] = COMMANDS) -> Parser:
    """The tree of arguments, or some branches of it."""
    parser = Parser(
        prog="cakefs",
        description="Every ML model as an ordinary directory: lazily fetched, deduplicated by tensor, verified.",
        epilog="`cakefs COMMAND --help` says more about each.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"cakefs {__version__}")
    add_global_options(parser, top=True)
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name in commands:
        command = cast(Command, import_module(f"cakefs.cli.{COMMANDS[name]}"))
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


def _end_with(error: BaseException, out: Out, lines: LogLines, *, debug: bool) -> int:
    failure = failure_of(error)
    lines.settle(failure.message)
    if failure.message:
        if debug:
            traceback.print_exception(error)
        out.error(failure.message, failure.hint)
    return failure.exit_code
