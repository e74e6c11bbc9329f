"""How much of what is on this machine was looked at so far."""

import threading
from collections.abc import Callable


class Meter:
    """Counts bytes, from any thread.

    Args:
        show: Called with what is done and what is expected, both in bytes.
    """

    def __init__(self, show: Callable[[int, int], None] = lambda done, expected: None) -> None:
        self._show = show
        self._lock = threading.Lock()
        self.done = self.expected = 0

    def expect(self, size: int) -> None:
        with self._lock:
            self.expected += size

    def advance(self, size: int) -> None:
        with self._lock:
            self.done += size
            self._show(self.done, self.expected)
