"""A log that says the same cause once in a while: a server that refuses says so to each of a hundred requests."""

import logging
import time

QUIET_S = 30.0
REMEMBERED = 1000


class Repeats(logging.Filter):
    """Drops records with a cause (the last argument) that was just logged; the next one to pass says how many."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[tuple[str, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        arguments = record.args if isinstance(record.args, tuple) else ()
        key, now = (record.name, str(arguments[-1] if arguments else record.msg)), time.monotonic()
        since, dropped = self._seen.get(key, (-QUIET_S, 0))
        if now - since < QUIET_S:
            self._seen[key] = (since, dropped + 1)
            return False
        if len(self._seen) >= REMEMBERED:
            self._seen.clear()
        self._seen[key] = (now, 0)
        if dropped:
            record.msg, record.args = f"{record.getMessage()} (and {dropped} more like this)", ()
        return True
