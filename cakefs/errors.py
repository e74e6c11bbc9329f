"""The error tree: one class per thing that can go wrong, with three readings of it.

`errno` is what a system call on the mount gets (from `read`; `lookup_errno` where a name is looked up), `exit_code`
what the command line ends with, `retryable` whether asking again can help. Foreign exceptions (httpx, lmdb, OSError)
become one of these in the module that talks to that library; `fs` turns them into errno, `cli` into a message. The
message says what failed and on which object, `hint` what to do next.

    CakeError
    ├── UserError            wrong arguments or recipe: never a traceback
    ├── NotFound             no such model, file or revision
    ├── AccessDenied         gated, private, bad token
    ├── RemoteChanged        upstream is no longer what was added
    ├── RemoteUnavailable    no answer after bounded retries, or offline
    ├── CorruptData          bytes do not match their digest
    ├── InvalidFormat        a header, index or answer that breaks its format
    └── StoreFull            nothing more fits and nothing may be evicted
"""

import errno as _errno
from typing import ClassVar


class CakeError(Exception):
    """Root of every error that cakefs raises on purpose.

    Args:
        message: One line: what failed, on which object.
        hint: The next step, as a sentence fragment or a command; empty when there is none.
    """

    errno: ClassVar[int] = _errno.EIO
    lookup_errno: ClassVar[int] = _errno.EIO
    exit_code: ClassVar[int] = 1
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UserError(CakeError):
    exit_code = 2


class NotFound(CakeError):
    """Never sent from `read` as ENOENT: loaders take that for an absent file (loaders.md, fact 4)."""

    lookup_errno = _errno.ENOENT
    exit_code = 10


class AccessDenied(CakeError):
    lookup_errno = _errno.EACCES
    exit_code = 11


class RemoteChanged(CakeError):
    errno = _errno.ESTALE
    lookup_errno = _errno.ESTALE
    exit_code = 12


class RemoteUnavailable(CakeError):
    """Args:
    retry_after: Seconds that the server asked to wait, if it did.
    whole_host: It asked that for all that is to be had there, not for one file.
    """

    errno = _errno.ETIMEDOUT
    lookup_errno = _errno.ETIMEDOUT
    exit_code = 13
    retryable = True

    def __init__(
        self, message: str, *, hint: str = "", retry_after: float | None = None, whole_host: bool = False
    ) -> None:
        super().__init__(message, hint=hint or (f"try again in {retry_after:.0f} s" if retry_after else ""))
        self.retry_after = retry_after
        self.whole_host = whole_host


class CorruptData(CakeError):
    exit_code = 20


class InvalidFormat(CakeError):
    exit_code = 21


class StoreFull(CakeError):
    errno = _errno.ENOSPC
    exit_code = 30
