"""One imaginary link that all connections of the hub share: a rate, and a latency before each response.

Time is kept as an absolute schedule, so that late wake-ups cost nothing while anybody sends; an idle link gathers no
credit, else a client that asks for one range after the other would not feel the latency.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

# How far behind its schedule a busy link may catch up: more than a wake-up is late, less than a reader would notice.
CREDIT_S = 0.02
# Longest sleep that nobody needs to interrupt.
SHORT_S = 0.05


class Shaper:
    def __init__(self) -> None:
        self.rate: float | None = None
        self.latency = 0.0
        self._lock = threading.Lock()
        self._busy = 0
        self._clock = 0.0

    def piece(self, unshaped: int) -> int:
        """Bytes to send at once: half a millisecond of the link, so 64 KiB at 1 Gbit/s."""
        return unshaped if self.rate is None else max(1024, min(1 << 20, int(self.rate / 2000) + 1))

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Marks the link busy."""
        with self._lock:
            self._busy += 1
            if self._busy == 1:
                self._clock = max(self._clock, time.monotonic())
        try:
            yield
        finally:
            with self._lock:
                self._busy -= 1

    def pay(self, size: int, stop: threading.Event) -> None:
        """Waits until the link has carried `size` more bytes."""
        if self.rate is None:
            return
        with self._lock:
            now = time.monotonic()
            self._clock = max(self._clock, now - CREDIT_S) + size / self.rate
            delay = self._clock - now
        wait(delay, stop)

    def wait_latency(self, stop: threading.Event) -> None:
        wait(self.latency, stop)


def wait(delay: float, stop: threading.Event) -> None:
    if 0 < delay < SHORT_S:
        time.sleep(delay)
    elif delay > 0:
        stop.wait(delay)
