"""Bodies in large pieces, for processes that do nothing but transfer: no library on the way has a setting for it.

h11 moves each byte three times between its buffer and what it hands out. Those copies were 1.6 of 7 s that a transfer
of 1 GB held the interpreter's locks (py-spy --gil, two processes). So its buffer is replaced by one that hands a piece
on as it came where nothing else waits in it: all but the first piece of an answer.

httpcore reads 64 KiB at a time. With 256 KiB a transfer took 2.3 CPU s/GB instead of 3.7; without the copies 1 MiB
spares another tenth (loopback, runs side by side).

TLS comes in records of at most 16 KiB, and trio hands out one at a time, each with a round of its scheduler: receiving
took 3.3 CPU s/GB instead of the 0.5 without TLS. With all records that have arrived it takes 1.2.
"""

import ssl
from collections.abc import Iterator

import h11._connection
import httpcore
import trio._highlevel_socket
from h11._receivebuffer import ReceiveBuffer
from httpcore._backends.trio import TrioStream

from cakefs.model import KIB, MIB

RECORD = 16 * KIB  # The most that a record of TLS holds.
ENCRYPTED = 256 * KIB  # Read of it at once; more gains nothing.


class Received(ReceiveBuffer):
    """h11's buffer; `_data` is the one piece received while that is all there is."""

    _data: bytes | bytearray  # type: ignore[assignment]

    def __iadd__(self, data: bytes | bytearray) -> "Received":
        if self._data:
            self._own()
            self._data += data
        else:
            self._data = data
        return self

    def maybe_extract_at_most(self, count: int) -> bytes | bytearray | None:  # type: ignore[override]
        if len(self._data) > count or not self._data:
            return super().maybe_extract_at_most(count)
        whole, self._data = self._data, b""
        self._next_line_search = self._multiple_lines_search = 0
        return whole

    def _extract(self, count: int) -> bytearray:
        self._own()
        return super()._extract(count)

    def _own(self) -> None:
        if not isinstance(self._data, bytearray):
            self._data = bytearray(self._data)


_read = TrioStream.read


async def read_records(stream: TrioStream, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
    """In the place of `TrioStream.read`: of TLS, all that has arrived."""
    tls: ssl.SSLObject | None = stream.get_extra_info("ssl_object")
    if tls is None:
        return await _read(stream, max_bytes, timeout)
    first = await _read(stream, min(RECORD, max_bytes), timeout)
    return b"".join([first, *_decrypted(tls, max_bytes - len(first))]) if first else first


def _decrypted(tls: ssl.SSLObject, limit: int) -> Iterator[bytes]:
    """What can be had without waiting for the network, at most so much. Raises httpcore.ReadError: It is broken."""
    try:
        while limit and (piece := tls.read(min(RECORD, limit))):
            limit -= len(piece)
            yield piece
    except (ssl.SSLWantReadError, ssl.SSLEOFError):
        pass  # The next read waits for more, or finds that there is no more.
    except ssl.SSLError as error:  # Told once only: later reads find an end.
        raise httpcore.ReadError(str(error)) from error


def receive_in_bulk() -> None:
    """From now on, on all connections of this process: of anybody else's in it, too, so not in the user's programs."""
    h11._connection.ReceiveBuffer = Received  # type: ignore[attr-defined]
    httpcore.AsyncHTTP11Connection.READ_NUM_BYTES = MIB
    TrioStream.read = read_records  # type: ignore[method-assign, assignment]
    trio._highlevel_socket.DEFAULT_RECEIVE_SIZE = ENCRYPTED
