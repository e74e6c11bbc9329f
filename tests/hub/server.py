"""A listener with one thread per connection, to be stopped at any moment without leaving a thread or a socket."""

import socket
import ssl
import threading
from collections.abc import Callable

from tests.hub.http import Answer, Incoming, data_answer, read_request
from tests.hub.shaping import Shaper
from tests.hub.wire import Closed, Request, Sender

App = Callable[[Incoming], tuple[Request, Answer]]


class Listener:
    """One host: a loopback port that stays ours from construction to `close`, also while nothing listens on it.

    Args:
        app: Answers a request; called on the threads of connections.
        fail: Told of exceptions in `app`: they are faults of the hub itself.
        tls: Encrypts all connections.
    """

    def __init__(
        self, app: App, shaper: Shaper, fail: Callable[[Exception], None], tls: ssl.SSLContext | None = None
    ) -> None:
        self.app = app
        self.tls = tls
        self.shaper = shaper
        self.fail = fail
        self.connections = 0
        self._lock = threading.Lock()
        self._threads: dict[threading.Thread, socket.socket] = {}
        self._socket: socket.socket | None = None
        self._stop = threading.Event()
        # Never listens; only keeps the port from becoming some client's ephemeral one while we are down.
        self._guard = bound(0)
        self.port: int = self._guard.getsockname()[1]

    def start(self) -> None:
        if self._socket is not None:
            return
        self._stop = threading.Event()
        self._socket = bound(self.port)
        self._socket.listen(512)
        self._acceptor = threading.Thread(target=self._accept, args=(self._socket, self._stop), daemon=True)
        self._acceptor.start()

    def stop(self) -> None:
        """Refuses new connections and cuts the open ones."""
        if self._socket is None:
            return
        self._stop.set()
        self._socket.shutdown(socket.SHUT_RDWR)
        self._acceptor.join()
        self._socket.close()
        self._socket = None
        with self._lock:  # no socket in the table is closed, so none of their numbers can be another's by now
            threads = list(self._threads)
            for sock in self._threads.values():
                hang_up(sock)
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive(), f"{thread.name} of the test hub does not end"

    def close(self) -> None:
        self.stop()
        self._guard.close()

    def _accept(self, listening: socket.socket, stop: threading.Event) -> None:
        while not stop.is_set():
            try:
                sock, _ = listening.accept()
            except OSError:
                continue
            self.connections += 1
            if self.tls is not None:
                sock = self.tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            thread = threading.Thread(target=self._connection, args=(sock, stop), daemon=True)
            with self._lock:
                self._threads[thread] = sock
            thread.start()

    def _connection(self, sock: socket.socket, stop: threading.Event) -> None:
        try:
            self._serve(sock, stop)
        except (Closed, ConnectionError, ssl.SSLError):  # The client left, or does not trust our certificate.
            pass
        except Exception as error:
            self.fail(error)
        finally:
            with self._lock:
                del self._threads[threading.current_thread()]
            sock.close()

    def _serve(self, sock: socket.socket, stop: threading.Event) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if isinstance(sock, ssl.SSLSocket):
            sock.do_handshake()
        sender = Sender(sock, self.shaper, stop)
        buffer = bytearray()
        while not stop.is_set():
            try:
                incoming = read_request(sock, buffer)
            except ValueError:
                sock.sendall(data_answer(400, b"bad request\n", "text/plain").head(False))
                return
            if incoming is None:
                return
            record, answer = self.app(incoming)
            sender.answer(incoming, answer, record)
            if not incoming.keep_alive:
                return


def bound(port: int) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    return sock


def hang_up(sock: socket.socket) -> None:
    """Wakes the thread that uses the socket, wherever it is blocked."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # no longer connected: then nobody is blocked on it
