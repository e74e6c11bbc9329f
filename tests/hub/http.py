"""HTTP/1.1 as values: requests read from a socket, answers not yet sent, and the rules of ranges and conditions."""

import json
import re
import socket
from dataclasses import dataclass, field, replace
from functools import cached_property
from http import HTTPStatus
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote

from tests.hub.content import Content

MAX_HEAD = 64 * 1024


@dataclass
class Incoming:
    """One request as it came. `segments` are the decoded parts of the path between slashes."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes
    keep_alive: bool

    @cached_property
    def segments(self) -> list[str]:
        return [unquote(s) for s in self.target.partition("?")[0].split("/")[1:]]

    @cached_property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(self.target.partition("?")[2])

    def header(self, name: str) -> str:
        return self.headers.get(name, "")


class Part(NamedTuple):
    """A run of bytes of an answer's body."""

    content: Content
    start: int
    stop: int


@dataclass(frozen=True)
class Wire:
    """How the sending of one answer goes wrong: after `after` bytes of body `action` happens.

    Attributes:
        action: `drop` (FIN), `reset` (RST), `stall` (wait until `released` says go on) or `slow`.
        head: Whether the head is sent before that when `after` is 0.
        rate: Bytes per second of `slow`.
    """

    action: str
    after: int = 0
    head: bool = False
    rate: float = 0
    seconds: float | None = None
    released: Any = None


@dataclass(frozen=True)
class Answer:
    """A response to be sent; `parts` make its body, of which HEAD sends only the length."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    parts: tuple[Part, ...] = ()
    wire: Wire | None = None

    @property
    def length(self) -> int:
        return sum(p.stop - p.start for p in self.parts)

    def with_headers(self, **headers: str | None) -> "Answer":
        """A copy with headers set, or removed where the value is None; `_` stands for `-`."""
        changed = dict(self.headers)
        for name, value in headers.items():
            changed.pop(name.replace("_", "-"), None)
            if value is not None:
                changed[name.replace("_", "-")] = value
        return replace(self, headers=changed)

    def head(self, keep_alive: bool) -> bytes:
        lines = [f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        if self.status != 304 and "Content-Length" not in self.headers:
            lines.append(f"Content-Length: {self.length}")
        if not keep_alive:
            lines.append("Connection: close")
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


def whole(content: Content) -> tuple[Part, ...]:
    return (Part(content, 0, content.size),) if content.size else ()


def split(parts: tuple[Part, ...], at: int) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """Cuts a body into its first `at` bytes and the rest."""
    first: list[Part] = []
    rest: list[Part] = []
    for content, start, stop in parts:
        cut = min(stop, start + max(at, 0))
        at -= stop - start
        if start < cut:
            first.append(Part(content, start, cut))
        if cut < stop:
            rest.append(Part(content, cut, stop))
    return tuple(first), tuple(rest)


def data_answer(status: int, body: bytes, content_type: str, headers: dict[str, str] | None = None) -> Answer:
    return Answer(status, {"Content-Type": content_type, **(headers or {})}, whole(Content(body)))


def json_answer(value: object, headers: dict[str, str] | None = None, status: int = 200) -> Answer:
    return data_answer(status, json.dumps(value).encode(), "application/json; charset=utf-8", headers)


def file_answer(incoming: Incoming, content: Content, headers: dict[str, str], ranges: bool = True) -> Answer:
    """Serves a file: 200, 206, 304 or 416 as Range, If-Range and If-None-Match say."""
    etag = headers.get("ETag", "")
    headers = {"Content-Type": "application/octet-stream", **headers}
    if ranges:
        headers["Accept-Ranges"] = "bytes"
    if etag and etag in [e.strip() for e in incoming.header("if-none-match").split(",")]:
        return Answer(304, headers)
    wanted = requested_range(incoming, content.size, etag) if ranges else None
    if wanted is None:
        return Answer(200, headers, whole(content))
    start, stop = wanted
    if start >= stop:
        return data_answer(416, b"range not satisfiable\n", "text/plain", {"Content-Range": f"bytes */{content.size}"})
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{content.size}"
    return Answer(206, headers, (Part(content, start, stop),))


def requested_range(incoming: Incoming, size: int, etag: str) -> tuple[int, int] | None:
    """Half-open range that a GET asks for: empty when it cannot be had, None when the whole file is to be sent."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", incoming.header("range"))
    condition = incoming.header("if-range")
    if incoming.method != "GET" or not match or (condition and (condition != etag or etag.startswith("W/"))):
        return None
    first, last = match.groups()
    if first:
        stop = size if not last else min(int(last) + 1, size)
        return None if last and int(last) < int(first) else (int(first), stop)
    return (max(size - int(last), 0), size) if last else None


def read_request(sock: socket.socket, buffer: bytearray) -> Incoming | None:
    """Next request of a connection, or None when the client is gone. Raises ValueError on what is not HTTP."""
    while (end := buffer.find(b"\r\n\r\n")) < 0:
        if len(buffer) > MAX_HEAD:
            raise ValueError("head too long")
        if not _receive(sock, buffer):
            return None
    first, *lines = bytes(buffer[:end]).decode("latin-1").split("\r\n")
    del buffer[: end + 4]
    method, target, version = first.split(" ")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    length = int(headers.get("content-length", 0))
    while len(buffer) < length:
        if not _receive(sock, buffer):
            return None
    body = bytes(buffer[:length])
    del buffer[:length]
    keep_alive = version == "HTTP/1.1" and headers.get("connection", "").lower() != "close"
    return Incoming(method, target, headers, body, keep_alive)


def _receive(sock: socket.socket, buffer: bytearray) -> bool:
    data = sock.recv(MAX_HEAD)
    buffer += data
    return bool(data)
