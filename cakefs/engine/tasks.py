"""Concurrency as the engine wants it: a nursery whose failure is one error, not a group, as callers and the command
line deal in CakeErrors; and threads that give way."""

import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import ParamSpec, TypeVar

import trio

from cakefs.errors import CakeError

P = ParamSpec("P")
T = TypeVar("T")


async def in_background(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """In a thread that yields to everyone else: hashing a model must not slow down the program that loads it."""

    def run() -> T:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        return function(*args, **kwargs)

    return await trio.to_thread.run_sync(run)


@asynccontextmanager
async def open_flat_nursery() -> AsyncIterator[trio.Nursery]:
    """As `trio.open_nursery`, but a lone error, or the first of nothing but CakeErrors, comes out as itself."""
    try:
        async with trio.open_nursery() as nursery:
            yield nursery
    except BaseExceptionGroup as group:
        errors = list(_leaves(group))
        if len(errors) > 1 and not all(isinstance(error, CakeError) for error in errors):
            raise
        raise errors[0] from errors[0].__cause__


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
