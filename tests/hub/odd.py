"""Servers that no decent one is like: silent, never done with the head or with the body of an answer, or with a
certificate that nobody has signed."""

import socket
import ssl
import subprocess
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

Answer = Callable[[socket.socket, threading.Event], None]

DRIP_S = 0.05  # Between two bytes of a head.


def silent(client: socket.socket, stop: threading.Event) -> None:
    """Takes the connection and says nothing: to a client of TLS, a handshake that hangs."""
    stop.wait()


def drip(client: socket.socket, stop: threading.Event) -> None:
    """A slow loris: never silent for long, and never done with its head."""
    client.sendall(b"HTTP/1.1 206 Partial Content\r\nX: ")
    while not stop.wait(DRIP_S):
        client.sendall(b"y")


def saying(answer: bytes) -> Answer:
    """The same to everyone."""

    def say(client: socket.socket, stop: threading.Event) -> None:
        client.recv(65536)
        client.sendall(answer)

    return say


def swelling(client: socket.socket, stop: threading.Event) -> None:
    """JSON that is packed a thousandfold and never ends."""
    client.recv(65536)
    client.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Encoding: gzip\r\n\r\n")
    packer = zlib.compressobj(wbits=31)
    client.sendall(packer.compress(b'{"id": "') + packer.flush(zlib.Z_FULL_FLUSH))
    block = packer.compress(b" " * (16 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    while not stop.is_set():
        client.sendall(block)


def encrypted(certificate: Path) -> Answer:
    """TLS, and an answer for those who accept the certificate."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)

    def answer(client: socket.socket, stop: threading.Event) -> None:
        client.settimeout(5)
        with context.wrap_socket(client, server_side=True) as wrapped:
            wrapped.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

    return answer


@contextmanager
def listening(answer: Answer) -> Iterator[int]:
    """Answers each connection in a thread; yields the port on loopback, where it lasts as long as the context."""
    stop = threading.Event()
    threads: list[threading.Thread] = []
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=128))

        def one(client: socket.socket) -> None:
            with client, suppress(OSError):  # The client may hang up at any time.
                answer(client, stop)

        def accept() -> None:
            while True:
                client = server.accept()[0]
                if stop.is_set():
                    client.close()
                    return
                threads.append(threading.Thread(target=one, args=(client,)))
                threads[-1].start()

        acceptor = threading.Thread(target=accept)
        acceptor.start()
        port = server.getsockname()[1]
        try:
            yield port
        finally:
            stop.set()
            socket.create_connection(("127.0.0.1", port)).close()  # Wakes it.
            for thread in (acceptor, *threads):
                thread.join(10)


def self_signed(directory: Path) -> Path:
    """Key and certificate for localhost and its address, made by the `openssl` command."""
    path = directory / "localhost.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    files = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(path), "-out", f"{path}.crt"]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path
