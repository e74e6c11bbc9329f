"""What an exception means to whoever runs cakefs: an exit code, a line, and the next step."""

import errno
import os
from collections.abc import Iterator
from typing import NamedTuple

from cakefs.errors import CakeError

EXIT_BUG = 70  # EX_SOFTWARE
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


# What the system ran out of, wherever that was: no bug. By errno: what to do.
_SHORTAGES = {
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs: no process can open more files",
    errno.ENOMEM: "close other programs, or raise the limit of memory (ulimit -v)",
}


class Failure(NamedTuple):
    """`message` is empty where nobody needs one: the user pressed Ctrl-C, or closed the pipe."""

    exit_code: int
    message: str = ""
    hint: str = ""


def failure_of(error: BaseException) -> Failure:
    causes = list(_leaves(error))
    if any(isinstance(e, KeyboardInterrupt) for e in causes):
        return Failure(EXIT_INTERRUPTED)
    if any(isinstance(e, BrokenPipeError) for e in causes):
        return Failure(EXIT_BROKEN_PIPE)
    for cause in causes:
        if (code := _code(cause)) in _SHORTAGES:
            return Failure(CakeError.exit_code, os.strerror(code), _SHORTAGES[code])
    for cause in causes:
        if not isinstance(cause, CakeError):
            message = f"internal error: {type(cause).__name__}: {cause}"
            return Failure(EXIT_BUG, message, "run it again with --debug and report what it prints")
    first = causes[0]
    assert isinstance(first, CakeError)
    return Failure(first.exit_code, first.message, first.hint)


def _code(error: BaseException) -> int:
    """The errno of what the system refused; 0 for anything else."""
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    return (error.errno or 0) if isinstance(error, OSError) else 0


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """The exceptions that a group of tasks failed with."""
    if isinstance(error, BaseExceptionGroup):
        for member in error.exceptions:
            yield from _leaves(member)
    else:
        yield error
