"""The counters for Prometheus, on a unix socket of this user or a loopback port: nobody else is answered.

Enough HTTP for a scraper: one GET, one answer, closed. A web page that has its own name point to 127.0.0.1 learns
nothing: there, a Host that is no loopback address is refused. A scraper that is slow or says nothing is not waited for,
and nothing that one says can end the mount.
"""

import ipaddress
import logging
import os
import re
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import trio

from cakefs.engine.serve.metrics import render
from cakefs.engine.tasks import open_flat_nursery
from cakefs.errors import CakeError, UserError

log = logging.getLogger(__name__)

HINT = "unix:/path, or a loopback address such as 127.0.0.1:9400"
REQUEST_LIMIT = 8192
PATIENCE_S = 5.0
AT_ONCE = 8
Status = Callable[[], Mapping[str, object]]


class Exporter:
    """Who answers, and with what."""

    def __init__(self, status: Status) -> None:
        self.status = status
        self.place = ""
        self.limiter = trio.CapacityLimiter(AT_ONCE)

    def use(self, status: Status) -> None:
        """From now on another status is told."""
        self.status = status


@asynccontextmanager
async def exporting(address: str, status: Status) -> AsyncIterator[Exporter]:
    """Answers at an address while it is open; nowhere when it is empty. Raises CakeError when it cannot."""
    exporter = Exporter(status)
    if not address:
        yield exporter
        return
    listener, exporter.place = _listen(address)
    try:
        async with open_flat_nursery() as nursery:
            nursery.start_soon(trio.serve_listeners, partial(_answer, exporter), [listener])
            log.info("metrics at %s", exporter.place)
            yield exporter
            nursery.cancel_scope.cancel()
    finally:
        if address.startswith("unix:"):
            _forget(address.removeprefix("unix:"))


def check_address(address: str) -> None:
    """Raises UserError for what is neither a unix socket nor a loopback port."""
    if address.startswith("unix:/"):
        return
    host, colon, port = address.rpartition(":")
    if not (colon and port.isascii() and port.isdigit() and int(port) < 65536 and _is_loopback(host)):
        raise UserError(f"metrics are not served at {address!r}", hint=HINT)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _listen(address: str) -> tuple[trio.SocketListener, str]:
    check_address(address)
    try:
        sock = _unix(address.removeprefix("unix:")) if address.startswith("unix:") else _loopback(address)
    except OSError as error:
        raise CakeError(
            f"cannot serve metrics at {address}: {error.strerror}", hint="choose another address"
        ) from error
    sock.listen(AT_ONCE)
    place = address if sock.family == socket.AF_UNIX else f"http://{address.rpartition(':')[0]}:{sock.getsockname()[1]}"
    return trio.SocketListener(trio.socket.from_stdlib_socket(sock)), f"{place}/metrics" if "//" in place else place


def _unix(path: str) -> socket.socket:
    """What an earlier process left there is replaced; one that answers is not, nor anything that is no socket."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        if Path(path).is_socket() and not _is_alive(path):
            os.unlink(path)
        before = os.umask(0o177)
        try:
            sock.bind(path)
        finally:
            os.umask(before)
    except BaseException:
        sock.close()
        raise
    return sock


def _forget(path: str) -> None:
    Path(path).unlink(missing_ok=True)


def _is_alive(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        return other.connect_ex(path) == 0


def _loopback(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    host = "127.0.0.1" if host == "localhost" else host.strip("[]")
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, int(port)))
    except BaseException:
        sock.close()
        raise
    return sock


async def _answer(exporter: Exporter, stream: trio.SocketStream) -> None:
    """No exception leaves: a scraper that goes away is nothing to a mount."""
    try:
        with trio.move_on_after(PATIENCE_S):
            async with stream, exporter.limiter:
                head = await _head(stream)
                if head:
                    code, body = _reply(head, exporter.status, any_host=stream.socket.family == socket.AF_UNIX)
                    await stream.send_all(_message(code, body))
    except trio.BrokenResourceError:
        pass  # It did not wait for the answer.


async def _head(stream: trio.SocketStream) -> bytes:
    """The request up to the empty line; empty where none came."""
    head = b""
    while b"\r\n\r\n" not in head:
        piece = await stream.receive_some(REQUEST_LIMIT)
        head += piece
        if not piece or len(head) > REQUEST_LIMIT:
            return b""
    return head


def _reply(head: bytes, status: Status, *, any_host: bool) -> tuple[str, str]:
    host = re.search(rb"^host:[ \t]*(\S*?)(:\d+)?[ \t]*\r$", head, re.IGNORECASE | re.MULTILINE)
    if not any_host and host and host[1] and not _is_loopback(host[1].decode("latin-1")):
        return "403 Forbidden", "not for other hosts\n"
    asked = re.match(rb"(\S+) (\S+) HTTP/1\.\d\r\n", head)
    if asked is None:
        return "400 Bad Request", "no HTTP\n"
    method, target = asked.groups()
    if method != b"GET":
        return "405 Method Not Allowed", "only GET\n"
    if target.partition(b"?")[0] not in (b"/metrics", b"/"):
        return "404 Not Found", "see /metrics\n"
    return "200 OK", render(status())


def _message(code: str, body: str) -> bytes:
    data = body.encode()
    head = f"HTTP/1.1 {code}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
    return f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data
