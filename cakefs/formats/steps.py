"""Reading a format that takes several looks at a file, without I/O.

A reader is a generator: it yields the byte ranges that it wants next, all at once, is sent their bytes in that order,
and returns what it found. So nobody guesses how much of a file has to be fetched, and the same reader works over HTTP,
over a store and over bytes in memory. Every range lies within the file and is never empty.
"""

from collections.abc import Callable, Generator
from typing import TypeVar

from cakefs.model import ByteRange

T = TypeVar("T")
Steps = Generator[list[ByteRange], list[bytes], T]


def run(steps: Steps[T], read: Callable[[ByteRange], bytes]) -> T:
    """Drives a reader to its end; what it raises comes out here."""
    try:
        wanted = next(steps)
        while True:
            wanted = steps.send([read(part) for part in wanted])
    except StopIteration as done:
        found: T = done.value
        return found
