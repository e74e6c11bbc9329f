"""h11's buffer and httpcore's reads, replaced: the same comes out, however it was cut on its way, in larger pieces."""

import random
import ssl
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import h11
import httpcore
import pytest
import trio
import trio.testing
from h11._receivebuffer import ReceiveBuffer
from httpcore._backends.trio import TrioStream
from hypothesis import given
from hypothesis import strategies as st

from cakefs.remotes.received import ENCRYPTED, RECORD, Received, read_records, receive_in_bulk

HEAD = b"HTTP/1.1 206 Partial Content\r\n"


def events(pieces: Sequence[bytes], buffer: type[ReceiveBuffer]) -> list[h11.Event]:
    connection = h11.Connection(h11.CLIENT)
    connection._receive_buffer = buffer()
    connection.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
    connection.send(h11.EndOfMessage())
    found: list[h11.Event] = []
    for piece in (*pieces, b""):
        connection.receive_data(piece)
        while (event := connection.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
            assert isinstance(event, h11.Event)
            found.append(event)
            if isinstance(event, h11.ConnectionClosed):
                return found
    return found


def told(found: list[h11.Event]) -> tuple[list[str], bytes]:
    body = b"".join(bytes(event.data) for event in found if isinstance(event, h11.Data))
    return [repr(event) for event in found if not isinstance(event, h11.Data)], body


def chunked(body: bytes, sizes: Sequence[int]) -> bytes:
    wire, at = b"", 0
    for size in sizes:
        part = body[at : at + size]
        at += len(part)
        wire += b"%x\r\n%s\r\n" % (len(part), part) if part else b""
    rest = body[at:]
    return wire + (b"%x\r\n%s\r\n" % (len(rest), rest) if rest else b"") + b"0\r\n\r\n"


@given(st.binary(max_size=300), st.lists(st.integers(1, 60), max_size=40), st.lists(st.integers(1, 80), max_size=4))
def test_the_same_answers_come_out_however_they_were_cut(body: bytes, cuts: list[int], sizes: list[int]) -> None:
    length = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    for wire in (length, HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(body, sizes), HEAD + b"\r\n" + body):
        pieces, at = [], 0
        for cut in cuts:
            if at < len(wire):
                pieces.append(wire[at : at + cut])
                at += cut
        if at < len(wire):
            pieces.append(wire[at:])
        genuine = told(events(pieces, ReceiveBuffer))
        assert told(events(pieces, Received)) == genuine and genuine[1] == body


def test_a_piece_of_a_body_is_handed_on_as_it_came() -> None:
    pieces = [HEAD + b"Content-Length: 30\r\n\r\n" + b"a" * 10, b"b" * 12, b"c" * 8]
    data = [event.data for event in events(pieces, Received) if isinstance(event, h11.Data)]
    assert [bytes(one) for one in data] == [b"a" * 10, b"b" * 12, b"c" * 8]
    assert data[1] is pieces[1] and data[2] is pieces[2]


def test_two_answers_in_one_piece_stay_two() -> None:
    """The second waits until the first is done with."""
    buffer = Received()
    buffer += b"first\r\nsecond"
    assert buffer.maybe_extract_next_line() == b"first\r\n"
    buffer += b" goes on"
    assert bytes(buffer) == b"second goes on" and buffer.maybe_extract_at_most(6) == b"second"
    assert buffer.maybe_extract_at_most(100) == b" goes on" and not buffer


GENUINE = TrioStream.read


class Endings:
    """How a server ends, after what it had to say."""

    @staticmethod
    async def well(stream: trio.SSLStream[trio.abc.Stream]) -> None:
        await stream.aclose()

    @staticmethod
    async def abruptly(stream: trio.SSLStream[trio.abc.Stream]) -> None:
        await stream.transport_stream.aclose()

    @staticmethod
    async def with_nonsense(stream: trio.SSLStream[trio.abc.Stream]) -> None:
        await stream.transport_stream.send_all(b"\x17\x03\x03\x00\x40" + b"x" * 64)
        await stream.transport_stream.aclose()


def received(
    certificate: Path, sent: Sequence[bytes], read: Callable[..., object], ending: Callable[..., object], limit: int
) -> tuple[list[bytes], str]:
    """What a client gets over TLS, piece by piece, and the error that it ended with."""
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(certificate)
    found: list[bytes] = []
    error = ""

    async def serve(transport: trio.abc.Stream) -> None:
        stream = trio.SSLStream(transport, server, server_side=True, https_compatible=True)
        await stream.do_handshake()
        for piece in sent:
            await stream.send_all(piece)
        await ending(stream)

    async def main() -> None:
        nonlocal error
        mine, other = trio.testing.memory_stream_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, other)
            trusting = ssl.create_default_context(cafile=str(certificate))
            stream = await TrioStream(mine).start_tls(trusting, "localhost", 10)
            await trio.testing.wait_all_tasks_blocked()  # All that will ever come is here.
            try:
                while piece := await read(stream, limit, 10):
                    found.append(piece)
            except httpcore.ReadError as raised:
                error = type(raised).__name__
            await stream.aclose()

    trio.run(main)
    return found, error


@pytest.mark.parametrize("limit", [1 << 20, 50_000, 1000])
@pytest.mark.parametrize("ending", [Endings.well, Endings.abruptly, Endings.with_nonsense])
def test_over_tls_the_same_comes_in_fewer_pieces(certificate: Path, ending: Callable[..., object], limit: int) -> None:
    dice = random.Random(1)
    sent = [dice.randbytes(dice.choice([1, 100, RECORD, RECORD + 1, 100_000])) for _ in range(12)]
    ours, how = received(certificate, sent, read_records, ending, limit)
    genuine = received(certificate, sent, GENUINE, ending, limit)
    assert b"".join(genuine[0]) == b"".join(sent) and genuine[1] == how
    assert max(map(len, ours), default=0) <= limit and all(len(piece) == limit for piece in ours[:-1])
    if ending is Endings.with_nonsense:
        assert how and b"".join(sent).startswith(b"".join(ours))
    else:
        assert not how and b"".join(ours) == b"".join(sent)


def test_without_tls_a_read_is_a_read() -> None:
    async def main() -> None:
        mine, other = trio.testing.memory_stream_pair()
        await other.send_all(b"abc")
        assert await read_records(TrioStream(mine), 2, 10) == b"ab"
        assert await read_records(TrioStream(mine), 2, 10) == b"c"

    trio.run(main)


def test_connections_of_a_process_that_asks_for_it_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("h11._connection.ReceiveBuffer", ReceiveBuffer)
    monkeypatch.setattr("httpcore.AsyncHTTP11Connection.READ_NUM_BYTES", 1)
    monkeypatch.setattr(TrioStream, "read", GENUINE)
    monkeypatch.setattr("trio._highlevel_socket.DEFAULT_RECEIVE_SIZE", 1)
    assert not isinstance(h11.Connection(h11.CLIENT)._receive_buffer, Received)
    receive_in_bulk()
    assert isinstance(h11.Connection(h11.CLIENT)._receive_buffer, Received)
    assert httpcore.AsyncHTTP11Connection.READ_NUM_BYTES == 1 << 20
    assert TrioStream.read is read_records
    assert trio._highlevel_socket.DEFAULT_RECEIVE_SIZE == ENCRYPTED
    assert "DEFAULT_RECEIVE_SIZE" in trio.SocketStream.receive_some.__code__.co_names, "else it is without effect"


LOOK = """
import h11, httpcore
from httpcore._backends.trio import TrioStream
def look(*_):
    print(type(h11.Connection(h11.CLIENT)._receive_buffer).__name__, httpcore.AsyncHTTP11Connection.READ_NUM_BYTES)
    print(TrioStream.read.__name__)
"""


def seen(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", LOOK + code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_transfer_processes_receive_in_bulk() -> None:
    code = "import trio; from cakefs.engine.transfer import worker; trio.run = look; worker.main()"
    assert seen(code) == ["Received", str(1 << 20), "read_records"]


def test_a_program_that_uses_cakefs_keeps_its_own_connections_as_they_are() -> None:
    code = "import cakefs.api, cakefs.app, cakefs.remotes.http, cakefs.engine.transfer.worker; look()"
    assert seen(code) == ["ReceiveBuffer", str(64 << 10), "read"]
