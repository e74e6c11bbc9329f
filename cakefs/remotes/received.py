"""Bodies without copies, for processes that do nothing but transfer: neither h11 nor httpcore has a setting for it.

h11 moves each byte three times between its buffer and what it hands out. Those copies were 1.6 of 7 s that a transfer
of 1 GB held the interpreter's locks (py-spy --gil, two processes). So its buffer is replaced by one that hands a piece
on as it came where nothing else waits in it: all but the first piece of an answer.

httpcore reads 64 KiB at a time. With 256 KiB a transfer took 2.3 CPU s/GB instead of 3.7; without the copies 1 MiB
spares another tenth (loopback, runs side by side).
"""

import h11._connection
import httpcore
from h11._receivebuffer import ReceiveBuffer

from cakefs.model import MIB


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


def receive_in_bulk() -> None:
    """From now on, on all connections of this process: of anybody else's in it, too, so not in the user's programs."""
    h11._connection.ReceiveBuffer = Received  # type: ignore[attr-defined]
    httpcore.AsyncHTTP11Connection.READ_NUM_BYTES = MIB
