"""The parts of cakefs inside somebody's program: a trio of its own in a thread of its own, for whoever calls.

One for each process, started by the first call and ended with the process, or by `close`. Any thread may call, also one
that runs an event loop. A fork ends it first, since neither threads nor LMDB can cross one: parent and child start
their own with their next call. Starting a program (`subprocess`) is no fork.
"""

import atexit
import logging
import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

import trio

from cakefs.app import open_app
from cakefs.config import Config, load_config
from cakefs.engine.read import FileReader
from cakefs.engine.serve.library import Library
from cakefs.engine.tasks import open_flat_nursery
from cakefs.errors import CakeError
from cakefs.model import MIB

log = logging.getLogger(__name__)
logging.getLogger("cakefs").addHandler(logging.NullHandler())  # What a program logs is its own matter.
T = TypeVar("T")

PIECE = MIB  # Of a read: what the kernel would ask for at most.
CLOSE_S = 20.0  # Transfer processes seal what is complete, then they are killed.


class Closed(CakeError):
    """The session ended before the call did: `close`, or a fork, by another thread."""


class Session:
    """A cakefs that is starting, running or ending."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._started: Future[None] = Future()
        self._thread = threading.Thread(target=self._main, name="cakefs", daemon=True)
        self._thread.start()

    def wait_until_started(self) -> "Session":
        """Raises CakeError where the store cannot be opened."""
        self._started.result()
        return self

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def call(self, function: Callable[[Library], Awaitable[T]]) -> T:
        """Runs it over there and waits. Interrupted, it is cancelled, and has ended before this raises."""
        outcome: Future[T] = Future()
        scope = trio.CancelScope()

        async def run() -> None:
            try:
                with scope:
                    try:
                        outcome.set_result(await function(self._library))
                    except Exception as error:
                        outcome.set_exception(error)
            finally:
                if not outcome.done():
                    outcome.set_exception(Closed("cakefs was closed meanwhile"))

        def start() -> None:
            try:
                self._nursery.start_soon(run)
            except RuntimeError:  # it is ending
                outcome.set_exception(Closed("cakefs was closed meanwhile"))

        self._soon(start)
        try:
            return outcome.result()
        except BaseException:
            if not outcome.done():  # Ctrl-C: nothing may be written to the caller's buffer any more
                self._soon(scope.cancel)
                outcome.exception()
            raise

    def release(self, reader: FileReader) -> None:
        """Closes it over there, some time; safe to call from a finalizer."""
        with suppress(trio.RunFinishedError):  # Then all of its readers ended with it.
            self._trio.run_sync_soon(reader.close)

    def close(self) -> None:
        if self._started.exception() is not None:
            return
        with suppress(trio.RunFinishedError):
            self._trio.run_sync_soon(self._nursery.cancel_scope.cancel)
        self._thread.join(CLOSE_S)

    def _soon(self, function: Callable[[], object]) -> None:
        try:
            self._trio.run_sync_soon(function)
        except trio.RunFinishedError as error:
            raise Closed("cakefs was closed meanwhile") from error

    def _main(self) -> None:
        try:
            trio.run(self._serve)
        except BaseException as error:
            if self._started.done():
                log.error("cakefs ended", exc_info=error)
            else:
                self._started.set_exception(error)

    async def _serve(self) -> None:
        async with open_app(self._config) as app, app.library() as library, open_flat_nursery() as nursery:
            self._library, self._nursery = library, nursery
            self._trio = trio.lowlevel.current_trio_token()
            self._started.set_result(None)
            await trio.sleep_forever()


_lock = threading.Lock()
_current: Session | None = None


def session() -> Session:
    """That of this process. Settings are those of the command line, read when it starts. Raises CakeError."""
    global _current
    with _lock:
        if _current is None or not _current.alive:
            _current = Session(load_config({}))
        return _current.wait_until_started()


def close() -> None:
    """Ends what runs in the background, which otherwise ends with the program; the next call starts it anew."""
    with _lock:
        _end()


def _end() -> None:
    global _current
    ending, _current = _current, None
    if ending is not None:
        ending.close()


def _before_fork() -> None:
    _lock.acquire()  # until after the fork: nobody starts another one meanwhile
    _end()


def _in_child() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(before=_before_fork, after_in_parent=lambda: _lock.release(), after_in_child=_in_child)
atexit.register(close)


async def fill(reader: FileReader, offset: int, target: memoryview) -> None:
    """Reads as many bytes as the target has, all of them inside the file."""
    for at in range(0, len(target), PIECE):
        part = target[at : at + PIECE]
        data = reader.try_read(offset + at, len(part))
        if data is None:
            data = await reader.read(offset + at, len(part))
        part[:] = data  # Before anyone else runs: the buffer is that of the next reply.
        await trio.lowlevel.checkpoint()
