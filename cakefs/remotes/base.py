"""What a source of bytes is, for those who use one and for those who wrap one."""

from collections.abc import Callable, Iterable
from pathlib import PurePosixPath
from typing import Protocol

from cakefs.errors import InvalidFormat
from cakefs.formats.strictjson import brief
from cakefs.model import ByteRange, Listing, Locator, Published, is_safe_path

Sink = Callable[[bytes], None]
"""Takes the bytes of one fetch, in order, in pieces of any size."""


class Remote(Protocol):
    async def fetch(self, locator: Locator, span: ByteRange, sink: Sink) -> None:
        """Gives exactly the bytes of `span`, in order and each once, to `sink`.

        Raises:
            CakeError: They did not all come. What `sink` got before is right; the rest may be asked for again.
        """
        ...


async def read(remote: Remote, locator: Locator, span: ByteRange) -> bytes:
    """The bytes of a span that fits in memory."""
    pieces: list[bytes] = []
    await remote.fetch(locator, span, pieces.append)
    return b"".join(pieces)


def make_listing(origin: str, revision: str, requested: str, files: Iterable[Published]) -> Listing:
    """A listing whose paths can all be shown, in sorted order.

    Raises:
        InvalidFormat: A path that leaves its directory, comes twice, or is a directory for another one.
    """
    known: dict[str, Published] = {}
    for file in files:
        if file.path in known:
            raise InvalidFormat(f"{origin} lists a path twice: {brief(file.path)}")
        if not is_safe_path(file.path):
            raise InvalidFormat(f"{origin} lists an unsafe path: {brief(file.path)}")
        known[file.path] = file
    for path in known:
        if any(str(parent) in known for parent in PurePosixPath(path).parents):
            raise InvalidFormat(f"{origin} lists a file below a file: {brief(path)}")
    return Listing(origin, revision, requested, tuple(known[path] for path in sorted(known)))
