"""Exceptions become errnos here, and a line in the log. Only FUSEError leaves a handler: others would end the mount."""

import errno
import functools
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from pyfuse3 import FUSEError

from cakefs.errors import CakeError, NotFound, RemoteUnavailable, UserError

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

# Others mislead: EAGAIN looks like the end of the file to Python, EINTR like "again", ENOENT like an absent file.
READ_ERRORS = frozenset({errno.EIO, errno.ETIMEDOUT, errno.ESTALE})
REPEAT_SILENCE_S = 60.0


class Complaints:
    """Logs a failure once a minute: the kernel repeats what failed, page by page."""

    def __init__(self) -> None:
        self._said: dict[str, float] = {}

    def about(self, what: str, error: Exception) -> None:
        """One line for a CakeError or where memory ran out, a traceback for what should not have happened."""
        now = time.monotonic()
        text = f"{what}: {error!r}"
        if now - self._said.get(text, -REPEAT_SILENCE_S) < REPEAT_SILENCE_S:
            return
        self._said = {t: when for t, when in self._said.items() if now - when < REPEAT_SILENCE_S}
        self._said[text] = now
        if isinstance(error, CakeError):
            log.warning("%s: %s%s", what, error.message, f" (hint: {error.hint})" if error.hint else "")
        elif isinstance(error, MemoryError):
            log.error("%s: no memory is left", what)
        else:
            log.error("%s: unexpected failure", what, exc_info=error)


class Complains(Protocol):
    @property
    def complaints(self) -> Complaints: ...


S = TypeVar("S", bound=Complains)
Handler = Callable[Concatenate[S, P], Coroutine[Any, Any, T]]


def answered(handler: Handler[S, P, T]) -> Handler[S, P, T]:
    """Makes every exception of a handler an errno, with the meaning it has where a name is looked up."""

    @functools.wraps(handler)
    async def wrapper(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await handler(self, *args, **kwargs)
        except FUSEError:
            raise
        except Exception as error:
            if not isinstance(error, NotFound):
                self.complaints.about(handler.__name__, error)
            raise FUSEError(error.lookup_errno if isinstance(error, CakeError) else errno.EIO) from None

    return wrapper


def demand_errno(error: CakeError) -> int:
    """What the lookup of a model is answered with that could not be had: mostly, there is none of that name."""
    return errno.ENOENT if isinstance(error, NotFound | RemoteUnavailable | UserError) else error.lookup_errno


def read_errno(error: Exception) -> int:
    """What a failed read is answered with."""
    code = error.errno if isinstance(error, CakeError) else errno.EIO
    return code if code in READ_ERRORS else errno.EIO
