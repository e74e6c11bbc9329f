"""Sending answers: sendfile in large pieces, in fine ones on the shaped link, and the faults that happen on the wire.

With TLS the kernel cannot do that, and what a broken connection got of an answer is not known to the byte.

What is counted as sent is counted *before* it is handed to the kernel, so that a client which has everything never sees
a lower count; when a connection breaks, the count is put right to what the client's side acknowledged.
"""

import fcntl
import os
import select
import socket
import ssl
import struct
import termios
import threading
import time
from dataclasses import dataclass

from tests.hub.http import Answer, Incoming, Part, Wire, split
from tests.hub.shaping import Shaper

MIB = 1024 * 1024
PIECE = 8 * MIB
SMALL = 64 * 1024
# How long a reset waits for a client that does not read what comes before it.
DRAIN_S = 5.0
# tcpi_bytes_acked of struct tcp_info (linux/tcp.h), which counts from the start of the connection.
BYTES_ACKED = 120


@dataclass
class Request:
    """One request that the hub got, and what it answered.

    Attributes:
        host: Host name the client used: `localhost` is the hub, `127.0.0.1` the CDN and the plain server.
        path: `org/name/file` for files by whatever URL, the name given to `plain`, else the path of the URL.
        range: The Range header, or empty.
        status: 0 while nothing was answered.
        sent: Bytes of body.
        stage: `api`, `resolve`, `cache` (small files), `cdn` or `plain`.
        authorized: The request carried an Authorization header.
        target: Path and query as sent.
    """

    method: str
    host: str
    path: str
    range: str
    stage: str
    target: str
    authorized: bool
    status: int = 0
    sent: int = 0


class Closed(Exception):
    """The connection is at its end, by a fault or by the other side."""


class Sender:
    """The sending side of one connection."""

    def __init__(self, sock: socket.socket, shaper: Shaper, stop: threading.Event) -> None:
        self.sock = sock
        self.shaper = shaper
        self.stop = stop
        self.written = 0
        self.encrypts = isinstance(sock, ssl.SSLSocket)

    def answer(self, incoming: Incoming, answer: Answer, record: Request) -> None:
        """Sends one answer. Raises Closed when nothing more can be sent on this connection."""
        self.shaper.wait_latency(self.stop)
        record.status = answer.status
        before = self.written
        head = answer.head(incoming.keep_alive)
        parts = answer.parts if incoming.method != "HEAD" else ()
        try:
            if answer.wire is None:
                self._send(head, parts, record)
            else:
                self._send_badly(head, parts, record, answer.wire)
        except ConnectionError as error:
            record.sent = max(0, self._acknowledged() - before - len(head))
            raise Closed from error

    def _send_badly(self, head: bytes, parts: tuple[Part, ...], record: Request, wire: Wire) -> None:
        first, rest = split(parts, wire.after)
        if first or wire.head:
            self._send(head, first, record)
            head = b""
        if wire.action == "reset":
            self._drain()
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if wire.action in ("drop", "reset"):
            raise Closed
        if wire.action == "stall":
            self._stall(wire)
            self._send(head, rest, record)
            return
        slow = Shaper()
        slow.rate = wire.rate
        with slow.sending():
            self._send(head, rest, record, slow)

    def _drain(self) -> None:
        """Waits until the other side has all that was written: an RST discards the rest."""
        until = time.monotonic() + DRAIN_S
        while time.monotonic() < until and not self.stop.is_set():
            if not struct.unpack("i", fcntl.ioctl(self.sock, termios.TIOCOUTQ, b"\0" * 4))[0]:
                return
            time.sleep(0.001)

    def _stall(self, wire: Wire) -> None:
        """Returns when the fault is released or its seconds are over; raises Closed when the client leaves."""
        poll = select.poll()
        poll.register(self.sock, select.POLLRDHUP)
        until = time.monotonic() + (wire.seconds if wire.seconds is not None else 1e9)
        while time.monotonic() < until and not wire.released.wait(0.02):
            if self.stop.is_set() or poll.poll(0):
                raise Closed

    def _send(self, head: bytes, parts: tuple[Part, ...], record: Request, slow: Shaper | None = None) -> None:
        length = sum(p.stop - p.start for p in parts)
        if slow is None and length <= SMALL:
            with self.shaper.sending():
                self.shaper.pay(length, self.stop)
            body = b"".join(p.content.read(p.start, p.stop) for p in parts)
            record.sent += len(body)
            self.sock.sendall(head + body)
            self.written += len(head) + len(body)
            return
        self.sock.sendall(head, 0 if self.encrypts else socket.MSG_MORE)
        self.written += len(head)
        with self.shaper.sending():
            for part in parts:
                self._send_part(part, record, slow)

    def _send_part(self, part: Part, record: Request, slow: Shaper | None) -> None:
        fd = os.open(part.content.path, os.O_RDONLY | os.O_CLOEXEC) if part.content.path else -1
        view = memoryview(part.content.data or b"")
        try:
            position = part.start
            while position < part.stop:
                size = min(part.stop - position, self.shaper.piece(PIECE))
                if slow is not None:
                    size = min(size, slow.piece(PIECE))
                    slow.pay(size, self.stop)
                self.shaper.pay(size, self.stop)
                record.sent += size
                sent = self._send_piece(fd, view, position, size)
                record.sent -= size - sent
                self.written += sent
                position += sent
        finally:
            if fd >= 0:
                os.close(fd)

    def _send_piece(self, fd: int, view: memoryview, position: int, size: int) -> int:
        if fd < 0:
            return self.sock.send(view[position : position + size])
        if self.encrypts:
            sent = self.sock.send(os.pread(fd, min(size, MIB), position))
        else:
            sent = os.sendfile(self.sock.fileno(), fd, position, size)
        if sent == 0:
            raise OSError("the file served became shorter")
        return sent

    def _acknowledged(self) -> int:
        info = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, BYTES_ACKED + 8)
        return int(struct.unpack_from("Q", info, BYTES_ACKED)[0])
