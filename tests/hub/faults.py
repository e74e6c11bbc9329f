"""What can be made to go wrong: one fault replaces or bends one answer; the first that fits a request is used up by it.

Kinds:
    drop, reset     FIN or RST after `after` bytes of body; with 0 before the head, unless `head` is true
    stall           silent after `after` bytes, until `Fault.release()`, `clear_faults()` or `seconds`; then it goes on
    slow            `rate` bytes per second from `after` on
    short           well-formed, but the body ends after `after` bytes, or `by` bytes early
    long            `by` bytes more than announced by Content-Range
    corrupt         the byte at `after` is inverted, or those of its bits that `flips` has
    wrong-range     another range than asked for, honestly labelled
    no-range        200 and the whole file
    etag            another strong ETag, same bytes
    gzip            compressed, for clients that accept it
    gzip-anyway     compressed, whatever the client accepts
    expired         403 as of a signed URL that is too old
    redirect        302 to `to`
    redirect-loop   302 to itself, for ever, each hop another URL
    any 4xx or 5xx  that status; `retry_after` and `headers` are sent along
"""

import gzip
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from tests.hub.api import problem
from tests.hub.cdn import expired
from tests.hub.content import Content
from tests.hub.http import Answer, Incoming, Part, Wire, data_answer, split, whole

DATA = ("cache", "cdn", "plain")
FILES = ("resolve", *DATA)
WIRE = frozenset(["drop", "reset", "stall", "slow"])


@dataclass(eq=False)
class Fault:
    """A fault waiting for requests; the kinds are in the docstring of this module.

    Attributes:
        path: Glob of `org/name/file`, of `file` or of a plain path; at stage `api` of `org/name`.
        times: How many requests it spoils; None for all.
        stage: Which requests it looks at: one or more of `api`, `resolve`, `cache`, `cdn`, `plain`. Faults of bodies
            look at the last three, others at all but `api`, redirects at `resolve` and `plain`, `expired` at `cdn`.
        method: Only this one; None for all. Faults of bodies look at GET.
        position: Only answers that have this byte of the file, and `after` is where that byte is.
        flips: Bits of the byte that `corrupt` inverts.
        hits: How many requests it has spoiled.
    """

    kind: str
    path: str = "*"
    times: int | None = 1
    after: int = 0
    stage: str | Sequence[str] = ()
    method: str | None = ""
    position: int | None = None
    head: bool = False
    by: int = 1
    flips: int = 0xFF
    rate: float = 64 * 1024
    seconds: float | None = None
    retry_after: float | None = None
    to: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    hits: int = 0
    released: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        of_body = self.kind in WIRE or self.kind in BODY
        if not (of_body or self.kind in STATUS or re.fullmatch("[45][0-9][0-9]", self.kind)):
            raise ValueError(f"no such fault: {self.kind}")
        if not self.stage:
            self.stage = STAGES.get(self.kind, DATA if of_body else FILES)
        elif isinstance(self.stage, str):
            self.stage = (self.stage,)
        if self.method == "":
            self.method = "GET" if of_body else None

    def release(self) -> None:
        """Lets what is stalled go on, and stalls no more."""
        self.released.set()

    def fits(self, stage: str, path: str, incoming: Incoming, answer: Answer) -> bool:
        """Whether this fault can spoil this answer."""
        wanted = stage in self.stage and self.method in (None, incoming.method) and matches(path, self.path)
        if not wanted or self.times == self.hits:
            return False
        if self.kind.isdigit() or self.kind in STATUS:
            return True
        return self._fits_body(incoming, answer)

    def _fits_body(self, incoming: Incoming, answer: Answer) -> bool:
        if answer.status >= (400 if self.kind in WIRE else 300):
            return False
        if self.kind in ("wrong-range", "no-range") and answer.status != 206:
            return False
        if self.kind == "gzip" and not (answer.status == 200 and "gzip" in incoming.header("accept-encoding")):
            return False
        if self.position is not None:
            return any(p.start <= self.position < p.stop for p in answer.parts)
        return self.after == 0 or self.after < answer.length

    def spoil(self, incoming: Incoming, answer: Answer) -> Answer:
        if self.position is not None and answer.parts:
            return replace(self, position=None, after=self.position - answer.parts[0].start).spoil(incoming, answer)
        if self.kind in WIRE:
            return replace(answer, wire=Wire(self.kind, self.after, self.head, self.rate, self.seconds, self.released))
        if self.kind.isdigit():
            return self._status(answer)
        return (STATUS.get(self.kind) or BODY[self.kind])(self, incoming, answer)

    def _status(self, answer: Answer) -> Answer:
        headers = dict(self.headers)
        if self.retry_after is not None:
            headers["Retry-After"] = f"{self.retry_after:g}"
        if self.kind == "416" and answer.parts:
            headers["Content-Range"] = f"bytes */{answer.parts[0].content.size}"
        return problem(int(self.kind), f"test hub: {self.kind} on purpose", headers=headers)


def matches(path: str, pattern: str) -> bool:
    """Whether a glob fits `org/name/file`, `file` within its repository, or the path of a plain file."""
    return fnmatchcase(path, pattern) or fnmatchcase(path.split("/", 2)[-1], pattern)


def redirect(location: str) -> Answer:
    return data_answer(302, b"Found", "text/plain", {"Location": location})


def loop(incoming: Incoming) -> Answer:
    """The next hop of an endless chain of redirects."""
    hop = int(incoming.query.get("loop", ["0"])[0]) + 1
    return redirect(f"{incoming.target.partition('?')[0]}?loop={hop}")


def shortened(fault: Fault, incoming: Incoming, answer: Answer) -> Answer:
    return replace(answer, parts=split(answer.parts, fault.after or max(0, answer.length - fault.by))[0])


def lengthened(fault: Fault, incoming: Incoming, answer: Answer) -> Answer:
    return replace(answer, parts=(*answer.parts, *whole(Content(b"\0" * fault.by))))


def corrupted(fault: Fault, incoming: Incoming, answer: Answer) -> Answer:
    before, rest = split(answer.parts, fault.after)
    wrong, after = split(rest, 1)
    inverted = bytes(b ^ fault.flips for p in wrong for b in p.content.read(p.start, p.stop))
    return replace(answer, parts=(*before, *whole(Content(inverted)), *after))


def shifted(fault: Fault, incoming: Incoming, answer: Answer) -> Answer:
    content, start, stop = answer.parts[0]
    if stop < content.size:
        start, stop = start + 1, stop + 1
    elif start > 0:
        start, stop = start - 1, stop - 1
    else:
        start = 1
    moved = replace(answer, parts=(Part(content, start, stop),))
    return moved.with_headers(Content_Range=f"bytes {start}-{stop - 1}/{content.size}")


def without_range(fault: Fault, incoming: Incoming, answer: Answer) -> Answer:
    return replace(answer, status=200, parts=whole(answer.parts[0].content)).with_headers(Content_Range=None)


def other_etag(fault: Fault, incoming: Incoming, answer: Answer) -> Answer:
    return answer.with_headers(ETag='"changed-on-purpose"')


def compressed(fault: Fault, incoming: Incoming, answer: Answer) -> Answer:
    body = gzip.compress(b"".join(p.content.read(p.start, p.stop) for p in answer.parts))
    return replace(answer, parts=whole(Content(body))).with_headers(Content_Encoding="gzip", Accept_Ranges=None)


Spoiler = Callable[[Fault, Incoming, Answer], Answer]
# Faults that need a body to spoil.
BODY: dict[str, Spoiler] = {
    "short": shortened,
    "long": lengthened,
    "corrupt": corrupted,
    "wrong-range": shifted,
    "no-range": without_range,
    "etag": other_etag,
    "gzip": compressed,
    "gzip-anyway": compressed,
}
# Faults that replace any answer.
STATUS: dict[str, Spoiler] = {
    "expired": lambda fault, incoming, answer: expired(),
    "redirect": lambda fault, incoming, answer: redirect(fault.to),
    "redirect-loop": lambda fault, incoming, answer: loop(incoming),
}
STAGES = {"expired": ("cdn",), "redirect": ("resolve", "plain"), "redirect-loop": ("resolve", "plain")}


class Faults:
    """The faults that wait, in the order they were added."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, fault: Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def clear(self) -> None:
        """Forgets all faults and lets what is stalled go on."""
        with self._lock:
            for fault in self._faults:
                fault.release()
            self._faults.clear()

    def apply(self, stage: str, path: str, incoming: Incoming, answer: Answer) -> Answer:
        if "loop" in incoming.query:
            return loop(incoming)
        with self._lock:
            fault = next((f for f in self._faults if f.fits(stage, path, incoming, answer)), None)
            if fault is None:
                return answer
            fault.hits += 1
        return fault.spoil(incoming, answer)
