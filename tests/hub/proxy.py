"""A proxy as companies have them: plain HTTP by full URLs, all else through tunnels, by CONNECT or SOCKS 5."""

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

from tests.hub.odd import listening


class Proxy:
    """Attributes: reached: Host and port of whatever clients were connected to, in order."""

    def __init__(self) -> None:
        self.reached: list[str] = []
        self.port = 0

    def answer(self, client: socket.socket, stop: threading.Event) -> None:
        client.settimeout(30)
        first = client.recv(1, socket.MSG_PEEK)
        if first == b"\x05":
            self._socks(client)
        elif first:
            self._http(client)

    def _http(self, client: socket.socket) -> None:
        head, rest = _head(client)
        method, target, version = head[0].split(b" ")
        if method == b"CONNECT":
            with self._connected(target.decode()) as server:
                client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                server.sendall(rest)
                _join(client, server)
            return
        url = urlsplit(target.decode())
        path = f"{url.path}?{url.query}" if url.query else url.path
        lines = [line for line in head[1:] if not line.lower().startswith(b"connection:")]
        with self._connected(url.netloc) as server:
            request = [b" ".join([method, path.encode(), version]), *lines, b"Connection: close"]
            server.sendall(b"\r\n".join(request) + b"\r\n\r\n" + rest)
            while data := server.recv(1 << 16):
                client.sendall(data)

    def _socks(self, client: socket.socket) -> None:
        """RFC 1928, without login, to names and IPv4 addresses."""
        _exactly(client, _exactly(client, 2)[1])
        client.sendall(b"\x05\x00")
        kind = _exactly(client, 4)[3]
        host = _exactly(client, _exactly(client, 1)[0]).decode() if kind == 3 else socket.inet_ntoa(_exactly(client, 4))
        port = struct.unpack(">H", _exactly(client, 2))[0]
        with self._connected(f"{host}:{port}") as server:
            client.sendall(b"\x05\x00\x00\x01" + bytes(6))
            _join(client, server)

    def _connected(self, place: str) -> socket.socket:
        self.reached.append(place)
        host, _, port = place.rpartition(":")
        return socket.create_connection((host, int(port)))


@contextmanager
def proxy() -> Iterator[Proxy]:
    """Listens on a port of loopback as long as the context lasts."""
    found = Proxy()
    with listening(found.answer) as found.port:
        yield found


def _head(client: socket.socket) -> tuple[list[bytes], bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        piece = client.recv(1 << 16)
        if not piece:
            raise ConnectionError("the client left")
        data += piece
    head, _, rest = data.partition(b"\r\n\r\n")
    return head.split(b"\r\n"), rest


def _exactly(client: socket.socket, size: int) -> bytes:
    data = client.recv(size, socket.MSG_WAITALL)
    if len(data) < size:
        raise ConnectionError("the client left")
    return data


def _join(client: socket.socket, server: socket.socket) -> None:
    thread = threading.Thread(target=_pass_on, args=(client, server))
    thread.start()
    _pass_on(server, client)
    thread.join(10)


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
