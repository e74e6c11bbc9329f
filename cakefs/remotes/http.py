"""Ranged GET over HTTP: every answer is checked before a byte of it is passed on.

Where a chain of redirects ended (at the Hub a signed URL, good for about an hour) is remembered per URL, so that the
Hub is asked once per file and not once per range. When that place refuses or fails, the file is resolved again. What
the checks cannot see, wrong bytes in a right answer, is found by the file's SHA-256.

Half-open spans become HTTP's inclusive ranges here and nowhere else.
"""

import ssl
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import NamedTuple, Self

import httpx
import trio

from cakefs.errors import CakeError, InvalidFormat, RemoteChanged, RemoteUnavailable
from cakefs.model import ByteRange, Locator
from cakefs.remotes.answers import (
    CHANGED_HINT,
    check_encoding,
    check_head,
    content_range,
    host_of,
    number,
    shown,
    strong_etag,
    translated,
)
from cakefs.remotes.base import Sink
from cakefs.remotes.client import Client, Heads, pieces

CONNECT_S = 10.0
IDLE_S = 30.0
MAX_RESOLVES = 2  # Times that one fetch asks again where a file is, after the place it was sent to refused.
_STALE = frozenset([400, 401, 403, 404, 410])  # How a signed URL that is too old is refused.
_ROUTES_LIMIT = 4096


class Route(NamedTuple):
    """Where a chain of redirects led so far, and the strong ETag seen there (empty when there was none yet)."""

    url: httpx.URL
    etag: str


class Probe(NamedTuple):
    """What one answer tells about a file.

    Attributes:
        size: Of the whole file, in bytes.
        etag: Strong ETag in its quotes, or empty.
        modified: Last-Modified as sent, or empty.
        ranges: Whether the server serves ranges of it.
        linked_etag: The Hub's hash of the content, without quotes: SHA-256 of an LFS file; or empty.
        commit: The Hub's commit, or empty.
    """

    size: int
    etag: str
    modified: str
    ranges: bool
    linked_etag: str
    commit: str


class HttpRemote:
    """Files of any http(s) server. Close it, or use it as an async context manager.

    Args:
        tokens: Bearer token by origin, such as `https://huggingface.co`.
        connect_s: Limit for making a connection.
        idle_s: Limit for waiting without a byte.
        verify: TLS context, where the usual certificates are not to be used.
    """

    def __init__(
        self,
        tokens: Mapping[str, str] | None = None,
        *,
        connect_s: float = CONNECT_S,
        idle_s: float = IDLE_S,
        verify: ssl.SSLContext | bool = True,
    ) -> None:
        self._client = Client(tokens or {}, connect_s=connect_s, idle_s=idle_s, verify=verify)
        self._routes = _Routes()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._client.aclose()

    async def fetch(self, locator: Locator, span: ByteRange, sink: Sink) -> None:
        """As `Remote.fetch`, in one answer: no retry but for a place that refuses."""
        if span.size == 0:
            return
        try:
            with translated(shown(locator.url)):
                async with self._answer(locator, span) as response:
                    check_head(response, locator, span)
                    self._routes.check(locator, response)
                    await _deliver(response, locator, span, sink)
        except CakeError:
            self._routes.drop(locator.url)  # Another place may do better.
            raise

    async def probe(self, url: str) -> Probe:
        """Asks for the first byte: unlike HEAD, this proves ranges and is allowed by signed URLs."""
        heads = Heads()
        with translated(shown(url)):
            async with self._client.get(httpx.URL(url), {"Range": "bytes=0-0"}, heads) as response:
                empty = response.status_code == 416 and response.headers.get("content-range", "").endswith("*/0")
                if response.status_code not in (200, 206) and not empty:
                    raise await self._client.refusal(response, shown(url))
                check_encoding(response, shown(url))
                return _probed(response, heads, 0 if empty else _total(response, shown(url)))

    async def get_small(self, url: str, limit: int) -> bytes:
        """A whole file of at most `limit` bytes. Raises InvalidFormat when it is longer."""
        data = bytearray()
        with translated(shown(url)):
            async with self._client.get(httpx.URL(url), {}, Heads()) as response:
                if response.status_code != 200:
                    raise await self._client.refusal(response, shown(url))
                check_encoding(response, shown(url))
                async with pieces(response) as body:
                    async for piece in body:
                        data += piece
                        if len(data) > limit:
                            raise InvalidFormat(f"{shown(url)} is longer than {limit} bytes")
        return bytes(data)

    @asynccontextmanager
    async def _answer(self, locator: Locator, span: ByteRange) -> AsyncIterator[httpx.Response]:
        """An answer that has bytes, by the remembered route or by a new one."""
        headers = {"Range": f"bytes={span.start}-{span.stop - 1}"}
        for attempt in range(MAX_RESOLVES + 1):
            route = await self._routes.known(locator.url)
            async with self._asked(locator, route, headers) as response:
                if response.status_code in (200, 206):
                    yield response
                    return
                error = await self._client.refusal(response, shown(locator.url))
            direct = response.url == httpx.URL(locator.url)
            if direct or response.status_code not in _STALE or attempt == MAX_RESOLVES:
                raise error
            self._routes.drop(locator.url, route)

    @asynccontextmanager
    async def _asked(
        self, locator: Locator, route: Route | None, headers: Mapping[str, str]
    ) -> AsyncIterator[httpx.Response]:
        """One try: by a route, or from the start, with others waiting for where that leads."""
        if route is not None:
            async with self._client.get(route.url, headers, Heads()) as response:
                yield response
            return
        with self._routes.searching(locator.url) as search:
            # The others need not wait for our bytes: most often the first redirect leads to the end.
            async with self._client.get(httpx.URL(locator.url), headers, Heads(), search.led_to) as response:
                if response.status_code in (200, 206):
                    search.ended(Route(response.url, strong_etag(response.headers)))
                yield response


class _Routes:
    """Where files are. One fetch of a file searches; the others wait for the outcome, and search alone if it failed."""

    def __init__(self) -> None:
        self._routes: OrderedDict[str, Route] = OrderedDict()
        self._searches: dict[str, trio.Event] = {}

    async def known(self, url: str) -> Route | None:
        if url not in self._routes and url in self._searches:
            await self._searches[url].wait()
        return self._routes.get(url)

    @contextmanager
    def searching(self, url: str) -> Iterator["_Search"]:
        """Others wait until the search leads somewhere, or the context is left without that."""
        search = _Search(self, url)
        self._searches[url] = search.told
        try:
            yield search
        finally:
            search.told.set()
            if self._searches.get(url) is search.told:
                del self._searches[url]
            if search.guess is not None:
                self.drop(url, search.guess)

    def put(self, url: str, route: Route) -> None:
        known = self._routes.get(url)
        if not (known and known.url == route.url and known.etag):  # else others were there first, and it must hold
            self._routes[url] = route
        while len(self._routes) > _ROUTES_LIMIT:
            self._routes.popitem(last=False)

    def drop(self, url: str, route: Route | None = None) -> None:
        """Forgets a route; given one, only if no better one was found meanwhile."""
        if route is None or self._routes.get(url) is route:
            self._routes.pop(url, None)

    def check(self, locator: Locator, response: httpx.Response) -> None:
        """Where a file has no validator of its own, one place must at least not change its mind.

        Raises:
            RemoteChanged: It did.
        """
        known, etag = self._routes.get(locator.url), strong_etag(response.headers)
        if known and known.url == response.url and not known.etag:
            self._routes[locator.url] = known._replace(etag=etag)
        elif known and known.url == response.url and known.etag and etag and known.etag != etag:
            raise RemoteChanged(f"{shown(locator.url)} changed upstream: its ETag is another one", hint=CHANGED_HINT)


class _Search:
    """One search. Attributes: guess: A route that was told, and of which no bytes came yet."""

    def __init__(self, routes: _Routes, url: str) -> None:
        self._routes = routes
        self._url = url
        self.told = trio.Event()
        self.guess: Route | None = None

    def led_to(self, url: httpx.URL) -> None:
        self.guess = Route(url, "")
        self._routes.put(self._url, self.guess)
        self.told.set()

    def ended(self, route: Route) -> None:
        self.guess = None
        self._routes.put(self._url, route)
        self.told.set()


async def _deliver(response: httpx.Response, locator: Locator, span: ByteRange, sink: Sink) -> None:
    """Passes the body on as it comes; its last piece only when the body has ended there."""
    size, received, last = span.size, 0, b""
    host, what = host_of(response.url), shown(locator.url)
    async with pieces(response) as body:
        async for piece in body:
            received += len(piece)
            if received > size:
                raise RemoteUnavailable(f"{host} sent more than {size} bytes of {what}")
            if received == size:
                last = piece
            else:
                sink(piece)
    if received < size:
        raise RemoteUnavailable(f"{host} sent {received} bytes of {what} instead of {size}")
    sink(last)


def _total(response: httpx.Response, what: str) -> int:
    """Size of the whole file. Raises InvalidFormat when the server does not say."""
    if response.status_code == 206:
        got = content_range(response.headers)
        size = got.total if got else None
    else:
        size = number(response.headers.get("content-length", ""))
    if size is None:
        raise InvalidFormat(f"{host_of(response.url)} does not say how long {what} is")
    return size


def _probed(response: httpx.Response, heads: Heads, size: int) -> Probe:
    return Probe(
        size=size,
        etag=strong_etag(response.headers),
        modified=response.headers.get("last-modified", ""),
        ranges=response.status_code != 200 or size == 0,
        linked_etag=heads.value("x-linked-etag").strip('"'),
        commit=heads.value("x-repo-commit"),
    )
