"""Answers no decent server gives, and no answers at all: each becomes an error of ours, after right bytes only."""

import inspect
import socket
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from cakefs.errors import CakeError, InvalidFormat, NotFound, RemoteUnavailable, StoreFull
from cakefs.model import ByteRange, Locator
from cakefs.remotes import answers
from cakefs.remotes.http import HttpRemote
from cakefs.remotes.wrap import Retry

DATA = bytes(range(256)) * 400
SPAN = ByteRange(1000, 81000)
WANTED = DATA[1000:81000]
RANGE = b"Content-Range: bytes 1000-80999/102400\r\n"
CHUNKED = b"HTTP/1.1 206 Partial Content\r\n" + RANGE + b"Transfer-Encoding: chunked\r\n\r\n"
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

Script = Callable[[trio.abc.Stream], Awaitable[None]]


def chunks(*bodies: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(body), body) for body in bodies)


async def requested(stream: trio.abc.Stream) -> bytes:
    head = b""
    while b"\r\n\r\n" not in head:
        data = await stream.receive_some()
        if not data:
            break
        head += data
    return head


def saying(answer: bytes) -> Script:
    """A server that sends the same to everyone and hangs up."""

    async def script(stream: trio.abc.Stream) -> None:
        await requested(stream)
        await stream.send_all(answer)

    return script


class Outcome:
    def __init__(self, data: Any = None) -> None:
        self.data = bytearray() if data is None else data
        self.error: CakeError | None = None


def ask(
    script: Script,
    scheme: str = "http",
    server_tls: ssl.SSLContext | None = None,
    client_tls: ssl.SSLContext = NO_TLS,
    budget_s: float | None = None,
    outcome: Outcome | None = None,
) -> Outcome:
    """Fetches SPAN from a server that follows a script."""
    outcome = outcome or Outcome()

    async def serve(stream: trio.abc.Stream) -> None:
        with suppress(trio.BrokenResourceError):  # The client may hang up at any time.
            await script(trio.SSLStream(stream, server_tls, server_side=True) if server_tls else stream)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
            port = listeners[0].socket.getsockname()[1]
            async with HttpRemote(verify=client_tls, idle_s=20) as http:
                remote = Retry(http, budget_s, jitter=lambda low, high: 0.01) if budget_s else http
                try:
                    where = Locator(f"{scheme}://localhost:{port}/dir/file.bin", len(DATA))
                    await remote.fetch(where, SPAN, outcome.data.extend)
                except CakeError as error:
                    outcome.error = error
            nursery.cancel_scope.cancel()

    trio.run(main)
    return outcome


# -- bodies ------------------------------------------------------------


def test_a_chunked_body_of_the_right_length() -> None:
    outcome = ask(saying(CHUNKED + chunks(WANTED[:30000], WANTED[30000:], b"")))
    assert outcome.error is None
    assert outcome.data == WANTED


@pytest.mark.parametrize("extra", [b"x", b"x" * 100000])
def test_a_chunked_body_that_does_not_end_where_it_should(extra: bytes) -> None:
    """The piece that would complete the span is kept back until the body has ended there."""
    outcome = ask(saying(CHUNKED + chunks(WANTED[:30000], WANTED[30000:], extra, b"")))
    assert isinstance(outcome.error, RemoteUnavailable)
    assert "sent more than 80000 bytes" in outcome.error.message
    assert len(outcome.data) < len(WANTED)
    assert WANTED.startswith(outcome.data)


@pytest.mark.parametrize("ending", [b"", b"0\r\n\r\n", b"zz\r\n"])
def test_a_chunked_body_that_ends_too_soon(ending: bytes) -> None:
    outcome = ask(saying(CHUNKED + chunks(WANTED[:30000]) + ending))
    assert isinstance(outcome.error, RemoteUnavailable)
    assert WANTED[:30000].startswith(outcome.data)


def test_a_sink_that_fails_ends_the_fetch() -> None:
    class Full:
        def extend(self, data: bytes) -> None:
            raise StoreFull("no room")

    outcome = ask(saying(CHUNKED + chunks(WANTED[:9], WANTED[9:], b"")), outcome=Outcome(Full()))
    assert isinstance(outcome.error, StoreFull)


def test_fewer_bytes_than_announced() -> None:
    head = b"HTTP/1.1 206 Partial Content\r\n" + RANGE + b"Content-Length: 80000\r\n\r\n"
    outcome = ask(saying(head + WANTED[:-1]))
    assert isinstance(outcome.error, RemoteUnavailable)
    assert "no answer from localhost:" in outcome.error.message
    assert outcome.data == WANTED[:-1]


def test_a_trickle_is_no_transfer() -> None:
    async def script(stream: trio.abc.Stream) -> None:
        await requested(stream)
        await stream.send_all(CHUNKED)
        while True:
            await stream.send_all(chunks(b"x"))
            await trio.sleep(0.02)

    outcome = ask(script, budget_s=0.3)
    assert isinstance(outcome.error, RemoteUnavailable)
    assert "did not come in 1 try" in outcome.error.message
    assert "less than 1 MiB came in 0 s" in outcome.error.message


# -- heads ------------------------------------------------------------

HEADS = [
    (b"HTTP/1.1 206 P\r\n" + RANGE + b"Content-Encoding: gzip\r\n\r\n", InvalidFormat, "gzip-encoded"),
    (b"HTTP/1.1 206 P\r\nContent-Type: multipart/byteranges; boundary=x\r\n\r\n--x", RemoteUnavailable, "no Content-R"),
    (b"HTTP/1.1 206 P\r\nContent-Range: bytes 1000-80998/102400\r\n\r\n", RemoteUnavailable, "another range"),
    (
        b"HTTP/1.1 206 P\r\nContent-Range: bytes 1000-80999/*\r\nContent-Length: 5\r\n\r\n",
        RemoteUnavailable,
        "announced 5",
    ),
    (b"HTTP/1.1 206 P\r\nContent-Range: bytes 0-" + b"9" * 5000 + b"/1\r\n\r\n", RemoteUnavailable, "another range"),
    (b"HTTP/1.1 206 P\r\nContent-Range: \xd9\xa1-\xff\r\n\r\n", RemoteUnavailable, "another range"),
    (b"HTTP/1.1 204 No Content\r\n\r\n", InvalidFormat, "unexpected answer"),
    (b"HTTP/1.1 304 Not Modified\r\n\r\n", InvalidFormat, "unexpected answer"),
    (b"HTTP/1.1 302 Found\r\n\r\n", InvalidFormat, "unexpected answer"),
    (b"HTTP/1.1 301 Moved\r\nLocation: http://[::1/x\r\nContent-Length: 0\r\n\r\n", CakeError, ""),
    (b"HTTP/1.1 301 Moved\r\nLocation: gopher://x/\r\nContent-Length: 0\r\n\r\n", InvalidFormat, "not an http(s) URL"),
    (b"HTTP/1.1 429 Slow\r\nRetry-After: Mon, 99 Foo 99999999999\r\n\r\n", RemoteUnavailable, "(429)"),
    (b"HTTP/1.1 999 Odd\r\n\r\n", RemoteUnavailable, "999"),
    (b"SSH-2.0-OpenSSH_9.2\r\n", RemoteUnavailable, "no answer from localhost"),
    (b"", RemoteUnavailable, "no answer from localhost"),
    (b"HTTP/1.1 206 P\r\nX: " + b"y" * 200_000, RemoteUnavailable, "no answer from localhost"),
    (b"HTTP/1.1 206 P\r\nContent-Length: -5\r\n\r\n", RemoteUnavailable, "no answer from localhost"),
]


@pytest.mark.parametrize(("answer", "kind", "text"), HEADS, ids=range(len(HEADS)))
def test_a_head_that_makes_no_sense(answer: bytes, kind: type[CakeError], text: str) -> None:
    outcome = ask(saying(answer))
    assert isinstance(outcome.error, kind)
    assert text in outcome.error.message
    assert "\n" not in outcome.error.message and len(outcome.error.message) < 600
    assert outcome.data == b""


@pytest.mark.parametrize(
    ("kind", "body", "said"),
    [
        ("application/json", b'{"error": "no\\nsuch \\u0000 thing"}', " (404: no such thing)"),
        ("application/json", b'{"error": 5}', " (404)"),
        ("application/json", b"[" * 10_000, " (404)"),
        ("application/xml", b"<Error><Message>gone</Message></Error>", " (404: gone)"),
        ("text/plain", b"it is\r\n\x1b[31mgone\xff", " (404: it is [31mgone"),
        ("text/html", b"<html><title>Not found</title></html>", " (404)"),
        ("text/plain", b"x" * 10_000_000, " (404: " + "x" * 200 + "...)"),
    ],
    ids=range(7),
)
def test_what_a_server_says_is_shown_as_one_short_line(kind: str, body: bytes, said: str) -> None:
    head = f"HTTP/1.1 404 Not Found\r\nContent-Type: {kind}; charset=utf-8\r\nContent-Length: {len(body)}\r\n\r\n"
    outcome = ask(saying(head.encode() + body))
    assert isinstance(outcome.error, NotFound)
    assert "/dir/file.bin not found" + said in outcome.error.message
    assert outcome.error.message.isprintable()


# -- no connection ------------------------------------------------------------


def test_tls_to_a_server_that_has_none() -> None:
    async def script(stream: trio.abc.Stream) -> None:
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    outcome = ask(script, scheme="https")
    assert isinstance(outcome.error, RemoteUnavailable)
    assert "TLS failed: " in outcome.error.message


def test_a_hang_up_in_the_middle_of_the_handshake() -> None:
    async def script(stream: trio.abc.Stream) -> None:
        await stream.receive_some()

    outcome = ask(script, scheme="https")
    assert isinstance(outcome.error, RemoteUnavailable)
    assert "no answer from localhost:" in outcome.error.message


def test_a_certificate_that_nobody_signed(certificate: Path) -> None:
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(certificate)
    head = b"HTTP/1.1 206 Partial Content\r\n" + RANGE + b"Content-Length: 80000\r\n\r\n"
    outcome = ask(saying(head + WANTED), "https", server, ssl.create_default_context())
    assert isinstance(outcome.error, RemoteUnavailable)
    assert "TLS failed: self-signed certificate" in outcome.error.message
    assert outcome.data == b""
    trusting = ssl.create_default_context(cafile=str(certificate))
    assert ask(saying(head + WANTED), "https", server, trusting).data == WANTED


def test_no_redirect_out_of_tls(certificate: Path) -> None:
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(certificate)
    trusting = ssl.create_default_context(cafile=str(certificate))
    answer = b"HTTP/1.1 302 Found\r\nLocation: http://localhost:1/x\r\nContent-Length: 0\r\n\r\n"
    outcome = ask(saying(answer), "https", server, trusting)
    assert isinstance(outcome.error, InvalidFormat)
    assert "redirects from https to localhost:1/x without TLS" in outcome.error.message


class NoNames(trio.abc.HostnameResolver):
    async def getaddrinfo(self, *args: object, **kwargs: object) -> list[object]:  # type: ignore[override]
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    async def getnameinfo(self, *args: object) -> tuple[str, str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def test_a_host_that_does_not_exist() -> None:
    async def main() -> None:
        trio.socket.set_custom_hostname_resolver(NoNames())
        async with HttpRemote(verify=NO_TLS) as http:
            with pytest.raises(RemoteUnavailable) as caught:
                await http.fetch(Locator("https://nowhere.test/a?token=secret", 10), ByteRange(0, 5), print)
        assert caught.value.message == "no answer from nowhere.test for nowhere.test/a: Name or service not known"

    trio.run(main)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "x",
        "/x",
        "ftp://x/y",
        "http://",
        "https://[::1",
        "http://" + "a" * 70 + ".test/x",
        "http://a..b/",
        "data:,x",
    ],
)
def test_a_url_that_is_none(url: str) -> None:
    async def main() -> None:
        trio.socket.set_custom_hostname_resolver(NoNames())
        async with HttpRemote(verify=NO_TLS) as http:
            with pytest.raises(CakeError):
                await http.fetch(Locator(url, 10), ByteRange(0, 5), print)
            with pytest.raises(CakeError):
                await http.probe(url)

    trio.run(main)


def exceptions_of_httpx() -> list[type[Exception]]:
    found = [getattr(httpx, name) for name in httpx.__all__]
    return [e for e in found if inspect.isclass(e) and issubclass(e, Exception)]


@pytest.mark.parametrize("kind", exceptions_of_httpx(), ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("text", ["", "Bearer hf_secret"])
def test_every_exception_of_httpx_is_translated(kind: type[Exception], text: str) -> None:
    request = httpx.Request("GET", "https://cdn.test/x?Signature=abc")
    takes = inspect.signature(kind).parameters
    arguments = {"request": request, "response": httpx.Response(500, request=request)}
    positional = [text] if "message" in takes else []
    error = kind(*positional, **{name: value for name, value in arguments.items() if name in takes})
    with pytest.raises(CakeError) as caught, answers.translated("hub.test/x"):
        raise error
    assert caught.value.message
    assert "hub.test/x" in caught.value.message
    assert "Signature" not in caught.value.message
    if kind is httpx.LocalProtocolError:
        assert "hf_secret" not in caught.value.message


def test_errors_that_are_not_of_the_network_pass() -> None:
    for error in (CakeError("x"), ValueError("x"), OSError(28, "No space left on device"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, answers.translated("x"):
            raise error
        assert caught.value is error


# -- headers as values ------------------------------------------------------------


@settings(max_examples=50)
@given(st.text(max_size=80))
def test_no_header_breaks_the_reading(text: str) -> None:
    headers = {"content-range": text, "etag": text, "ratelimit": text, "retry-after": text}
    answers.content_range(headers)
    answers.strong_etag(headers)
    delay = answers.requested_delay(headers)
    assert delay is None or delay >= 0
    assert answers.number(text) is None or int(text) >= 0
    line = answers.one_line(text)
    assert line.isprintable() and len(line) <= 203


@given(st.integers(0, 10**18 - 2), st.integers(1, 10**17), st.integers(0, 10**17))
def test_content_range_is_read_half_open(start: int, size: int, rest: int) -> None:
    stop = min(start + size, 10**18 - 1)
    said = {"content-range": f"bytes {start}-{stop - 1}/{min(stop + rest, 10**18 - 1)}"}
    got = answers.content_range(said)
    assert got is not None
    assert (got.start, got.stop) == (start, stop)
    assert got.total is not None and got.total >= stop


def test_a_delay_as_a_date() -> None:
    now = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
    assert answers.requested_delay({"retry-after": "Thu, 01 Jan 2026 12:00:30 GMT"}, now) == 30
    assert answers.requested_delay({"retry-after": "Thu, 01 Jan 2026 11:00:00 GMT"}, now) == 0
    assert answers.requested_delay({"retry-after": "soon"}, now) is None
    assert answers.requested_delay({}, now) is None


def test_only_a_strong_etag_counts() -> None:
    assert answers.strong_etag({"etag": ' "abc" '}) == '"abc"'
    for weak in ('W/"abc"', "abc", '""', ""):
        assert answers.strong_etag({"etag": weak}) == ""
    assert answers.strong_etag({}) == ""


def test_a_url_is_shown_without_its_secrets() -> None:
    assert answers.shown("https://me:pw@host.test:443/a%20b?sig=1#x") == "host.test/a b"
    assert answers.shown("https://host.test:8443/x") == "host.test:8443/x"
    assert answers.one_line("see https://h/x?sig=1&b=2 or 'http://k/y?z'") == "see https://h/x or 'http://k/y"


def test_origins_are_compared_by_scheme_host_and_port() -> None:
    assert (
        answers.origin("https://Host.test") == answers.origin("https://host.test:443/x") == ("https", "host.test", 443)
    )
    assert answers.origin("http://host.test") != answers.origin("https://host.test")
    assert answers.origin("https://host.test:444") != answers.origin("https://host.test")
