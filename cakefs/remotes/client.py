"""GET requests that follow redirects by hand, so that a token goes only to the scheme, host and port it belongs to."""

import logging
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress

import httpx

from cakefs import __version__
from cakefs.errors import CakeError, InvalidFormat, UserError
from cakefs.remotes.answers import Origin, cause_of, checked_token, host_of, one_line, origin, refusal, shown

MAX_REDIRECTS = 5
_REDIRECTS = frozenset([301, 302, 303, 307, 308])
_BODY_LIMIT = 16 * 1024  # Of an answer that is not the file: enough for an error, cheap enough to keep the connection.

# They log whole URLs, and a signed URL is a password.
for _name in ("httpx", "httpcore"):
    logging.getLogger(_name).setLevel(logging.WARNING)


class Heads:
    """Heads of the answers along a chain of redirects: the Hub tells some things only before the last."""

    def __init__(self) -> None:
        self._heads: list[tuple[Origin, httpx.Headers]] = []

    def add(self, response: httpx.Response) -> None:
        self._heads.append((origin(response.url), response.headers))

    def value(self, name: str) -> str:
        """What the origin that was asked says; where it sends us to has no say."""
        return next((head[name] for place, head in self._heads if place == self._heads[0][0] and name in head), "")


class Client:
    """Connections, kept alive, and the tokens. Arguments as for `HttpRemote`."""

    def __init__(
        self, tokens: Mapping[str, str], *, connect_s: float, idle_s: float, verify: ssl.SSLContext | bool
    ) -> None:
        self._tokens = {origin(url): checked_token(url, token) for url, token in tokens.items()}
        with _usable_environment():
            self._client = httpx.AsyncClient(
                headers={"User-Agent": f"cakefs/{__version__}", "Accept": "*/*", "Accept-Encoding": "identity"},
                timeout=httpx.Timeout(idle_s, connect=connect_s, pool=None),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=30),
                follow_redirects=False,
                verify=verify,
            )

    async def aclose(self) -> None:
        await self._client.aclose()

    @asynccontextmanager
    async def get(
        self,
        url: httpx.URL,
        headers: Mapping[str, str],
        heads: Heads,
        sent_to: Callable[[httpx.URL], None] = lambda url: None,
    ) -> AsyncIterator[httpx.Response]:
        """The first answer that is no redirect, its body unread; `heads` gets those of the whole chain.

        Args:
            sent_to: Told of every place that is asked next, before it is asked.
        """
        seen: list[httpx.URL] = []
        while True:
            if url in seen or len(seen) > MAX_REDIRECTS:
                problem = "redirects in a circle" if url in seen else f"redirects more than {MAX_REDIRECTS} times"
                raise InvalidFormat(f"{host_of(url)} {problem}, from {shown(seen[0])}")
            seen.append(url)
            async with self._sent(url, headers) as response:
                heads.add(response)
                if response.status_code not in _REDIRECTS or "location" not in response.headers:
                    yield response
                    return
                await _body(response)
                url = _target(response)
                sent_to(url)

    async def refusal(self, response: httpx.Response, what: str) -> CakeError:
        """The error that an answer without the wanted bytes stands for."""
        return refusal(response, await _body(response), what, self._tokens.values())

    @asynccontextmanager
    async def _sent(self, url: httpx.URL, headers: Mapping[str, str]) -> AsyncIterator[httpx.Response]:
        token = self._tokens.get(origin(url))
        authorized = {**headers, "Authorization": f"Bearer {token}"} if token else headers
        request = self._client.build_request("GET", url, headers=authorized)
        try:
            response = await self._client.send(request, stream=True)
        except (OSError, UnicodeError) as error:  # A host name that cannot be encoded gets past the libraries.
            raise httpx.ConnectError(str(error), request=request) from error
        try:
            yield response
        finally:
            await response.aclose()


@contextmanager
def _usable_environment() -> Iterator[None]:
    """httpx looks at the variables for proxies and certificates when a client is made, and fails as it happens to."""
    try:
        yield
    except OSError as error:
        hint = "SSL_CERT_FILE and SSL_CERT_DIR name them, if set"
        raise UserError(f"the certificates to trust cannot be read: {cause_of(error)}", hint=hint) from error
    except (ValueError, ImportError, httpx.InvalidURL) as error:
        hint = "see HTTPS_PROXY, HTTP_PROXY and ALL_PROXY: such as http://host:port or socks5://host:port"
        raise UserError(f"a proxy that is set cannot be used: {one_line(str(error))}", hint=hint) from error


@asynccontextmanager
async def pieces(response: httpx.Response) -> AsyncIterator[AsyncIterator[bytes]]:
    """The body as it comes. It may be left unread.

    httpx nests five generators and closes none that is left early, which trio complains about and tidies up too late.
    So the connection is closed, and they are run to their end, which is an error at once.
    """
    body = response.aiter_raw()
    try:
        yield body
    finally:
        await response.aclose()
        with suppress(httpx.HTTPError):
            async for _ in body:
                pass


async def _body(response: httpx.Response) -> bytes:
    """The beginning of a body that is not the file; a short one is read to its end, which keeps the connection."""
    data = b""
    async with pieces(response) as body:
        async for piece in body:
            data += piece
            if len(data) > _BODY_LIMIT:
                break
    return data[:_BODY_LIMIT]


def _target(response: httpx.Response) -> httpx.URL:
    target = response.url.join(response.headers["location"])
    if response.url.scheme == "https" and target.scheme != "https":
        raise InvalidFormat(f"{host_of(response.url)} redirects from https to {shown(target)} without TLS")
    return target
