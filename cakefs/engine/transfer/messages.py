"""What the serving process and its transfer processes say to each other: msgpack over pipes, each message behind its
length.

A `FetchJob` is one contiguous range of one upstream file, cut at chunk boundaries of the spans it covers. Both sides
derive the same list of chunks from it, so that an arrival is just an index.
"""

import logging
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec
from msgspec import Struct

from cakefs import errors
from cakefs.model import CHUNK, Locator, SpanKey


class Settings(Struct, frozen=True, tag=True):
    """First message to a transfer process, sent again with other tokens: these are never in argv or the environment.

    Attributes:
        limit: Bytes that the store may take; 0 for no limit.
        spared_since: What was used later (Unix seconds) is not evicted to keep that limit; 0 where only what is in use,
            pinned or fresh is spared.
        level: From which on messages are written, as `logging` numbers them.
    """

    store: str
    tokens: dict[str, str]
    read_timeout_s: float
    connections: int
    limit: int = 0
    spared_since: float = 0.0
    level: int = logging.WARNING


def tokens_for(endpoint: str, token: str | None) -> dict[str, str]:
    """The token by the one origin that may see it."""
    parts = urlsplit(endpoint)
    return {f"{parts.scheme}://{parts.netloc}": token} if token else {}


class FetchJob(Struct, frozen=True, tag=True):
    """Fetch `[start, stop)` of the file at `locator`; `spans` are the stored pieces it falls into, rising.

    Attributes:
        confirm: Confirm the file if it is complete then; False where somebody else will.
    """

    id: int
    locator: Locator
    identity: str
    start: int
    stop: int
    spans: tuple[tuple[int, int], ...]
    confirm: bool = True


class Arrived(Struct, frozen=True, tag=True):
    """Chunk `index` of a job can be read from the store; `data` instead where the store has no room for it."""

    job: int
    index: int
    data: bytes | None = None


class Done(Struct, frozen=True, tag=True):
    job: int


class Failed(Struct, frozen=True, tag=True):
    """The chunks of the job that have not arrived will not; `kind` names a class of `cakefs.errors`."""

    job: int
    kind: str
    message: str
    hint: str
    retry_after: float | None = None


class Confirmed(Struct, frozen=True, tag=True):
    """Every byte of an upstream file is local and was hashed: `ok` when the published SHA-256 matches."""

    identity: str
    ok: bool


class Idle(Struct, frozen=True, tag=True):
    """Nothing is left to seal or to confirm, as of everything sent before `Flush`."""


class Beat(Struct, frozen=True, tag=True):
    """Nothing but that the process is well: every BEAT_S seconds."""


class Flush(Struct, frozen=True, tag=True):
    """Asks for `Idle` once everything that arrived is sealed."""


class Look(Struct, frozen=True, tag=True):
    """An upstream file of `size` bytes is in use: seal and confirm what an earlier process left undone of it."""

    identity: str
    size: int


Request = Settings | FetchJob | Flush | Look
Report = Arrived | Done | Failed | Confirmed | Idle | Beat

BEAT_S = 2.0

SPARE_CONNECTIONS = 32  # Beyond `connections`, for files of which nothing is on its way while others stall.

_LENGTH = 4
_LIMIT = 1 << 30  # A longer message is a broken stream.


class JobChunk(NamedTuple):
    """A chunk of a span, and where its bytes are in the upstream file."""

    key: SpanKey
    chunk: int
    start: int
    stop: int


def job_chunks(job: FetchJob) -> list[JobChunk]:
    """The chunks that a job brings, in the order of their bytes."""
    chunks: list[JobChunk] = []
    for start, stop in job.spans:
        key = SpanKey(job.identity, start, stop)
        first = (max(job.start, start) - start) // CHUNK
        last = -(-(min(job.stop, stop) - start) // CHUNK)
        for index in range(first, last):
            at = start + index * CHUNK
            chunks.append(JobChunk(key, index, at, min(at + CHUNK, stop)))
    return chunks


def frame(message: Request | Report) -> bytes:
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(_LENGTH, "little") + body


class Unframer:
    """Bytes of a pipe in any pieces -> whole message bodies."""

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes | bytearray) -> list[bytes]:
        self._pending += data
        bodies = []
        while len(self._pending) >= _LENGTH:
            size = int.from_bytes(self._pending[:_LENGTH], "little")
            if size > _LIMIT:
                raise errors.InvalidFormat(f"a message of {size} bytes between cakefs processes")
            if len(self._pending) < _LENGTH + size:
                break
            bodies.append(bytes(self._pending[_LENGTH : _LENGTH + size]))
            del self._pending[: _LENGTH + size]
        return bodies


def failure(job: int, error: errors.CakeError) -> Failed:
    return Failed(job, type(error).__name__, error.message, error.hint, getattr(error, "retry_after", None))


def error_of(failed: Failed) -> errors.CakeError:
    """The error that `failure` described; an unknown kind reads as RemoteUnavailable."""
    kind = getattr(errors, failed.kind, errors.RemoteUnavailable)
    error: errors.CakeError = kind(failed.message, hint=failed.hint)
    if isinstance(error, errors.RemoteUnavailable):
        error.retry_after = failed.retry_after
    return error
