"""What an HTTP answer means, or the absence of one: pure functions from answers to values and to `CakeError`s.

A URL is named by host and path only: its query may be a signature, its user part a password. What a server says is
shown as one short line, without the tokens that we know.
"""

import json
import re
import ssl
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import NamedTuple

import httpx

from cakefs.errors import AccessDenied, CakeError, InvalidFormat, NotFound, RemoteChanged, RemoteUnavailable, UserError
from cakefs.model import ByteRange, Locator

Origin = tuple[str, str, int]
"""Scheme, host and port: what a token belongs to."""

_PORTS = {"http": 80, "https": 443}
_RETRYABLE = frozenset([408, 425, 429])

CHANGED_HINT = "`cakefs add --update` takes the new version"
MODIFIED = "modified "  # Begins a validator that is a Last-Modified date: of a server without strong ETags.


def origin(url: str | httpx.URL) -> Origin:
    """Raises InvalidFormat on a URL that is not http(s) with a host."""
    try:
        parsed = httpx.URL(url)
        host, port = parsed.host, parsed.port
    except (httpx.InvalidURL, UnicodeError) as error:  # UnicodeError: of a host's name
        raise InvalidFormat(f"not a URL: {one_line(str(error))}") from error
    if parsed.scheme not in _PORTS or not host:
        raise InvalidFormat(f"not an http(s) URL: {parsed.scheme}{':' if parsed.scheme else ''}//{shown(parsed)}")
    port = _PORTS[parsed.scheme] if port is None else port
    if not 0 < port < 1 << 16:  # the system would take the rest of it
        raise InvalidFormat(f"not a URL: no port can be {port}")
    return parsed.scheme, host, port


def host_of(url: str | httpx.URL) -> str:
    """Host, and port unless it is the usual one."""
    try:
        return httpx.URL(url).netloc.decode("ascii", "replace")
    except httpx.InvalidURL:
        return "(a malformed URL)"


@lru_cache(maxsize=1024)  # httpx looks at each character of a URL: six times a request were a seventh of its CPU.
def shown(url: str | httpx.URL) -> str:
    """A URL as it may appear in messages and logs."""
    try:
        return host_of(url) + one_line(httpx.URL(url).path, limit=1000)
    except httpx.InvalidURL:
        return host_of(url)


def checked_token(url: str, token: str) -> str:
    """A token that can be sent. Raises UserError for one that cannot; httpx would quote it in its error."""
    token = token.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        hint = "correct HF_TOKEN, or log in with `hf auth login`"
        raise UserError(f"the token for {host_of(url)} has characters that no token has", hint=hint)
    return token


# -- heads ----------------------------------------------------------------------------------------------------------


class ContentRange(NamedTuple):
    """Content-Range in our half-open form; `total` is None where the server does not say."""

    start: int
    stop: int
    total: int | None


def content_range(headers: Mapping[str, str]) -> ContentRange | None:
    match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", headers.get("content-range", "").strip())
    if match is None:
        return None
    first, last, total = match.groups()
    return ContentRange(int(first), int(last) + 1, None if total == "*" else int(total))


def strong_etag(headers: Mapping[str, str], name: str = "etag") -> str:
    """The ETag in its quotes, or empty when there is none or a weak one."""
    value = headers.get(name, "").strip()
    return value if re.fullmatch(r'"[^"]+"', value) else ""


def number(text: str) -> int | None:
    """A header that is a number of bytes."""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text.strip()) else None


def requested_delay(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Seconds that a server asks to wait, by an exhausted RateLimit or by Retry-After (seconds or a date)."""
    limit = re.search(r";\s*r\s*=\s*0+\s*;\s*t\s*=\s*(\d{1,9})", headers.get("ratelimit", ""))
    if limit is not None:
        return float(limit[1]) + 1  # The window may end anywhere within that second.
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d+)?", value):
        return float(value)
    try:
        when = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return max(0.0, (when - (now or datetime.now(UTC))).total_seconds())


def check_encoding(response: httpx.Response, what: str) -> None:
    encoding = response.headers.get("content-encoding", "").strip().lower()
    if encoding not in ("", "identity"):
        raise InvalidFormat(f"{what} came {one_line(encoding)}-encoded although plain bytes were asked for")


def check_head(response: httpx.Response, locator: Locator, span: ByteRange) -> None:
    """Accepts a 206 for exactly `span`, or a 200 when `span` is the whole file, of the file that we know.

    Raises:
        RemoteChanged: Another size or another strong ETag.
        RemoteUnavailable: Not the range that was asked for; another try may bring it.
        InvalidFormat: Compressed although that was excluded.
    """
    what = shown(locator.url)
    check_encoding(response, what)
    got = content_range(response.headers)
    length = number(response.headers.get("content-length", ""))
    size = length if response.status_code == 200 else got.total if got else None
    whole = span == (0, locator.size)
    if size is not None and size != locator.size and (whole or response.status_code == 206):
        raise RemoteChanged(f"{what} changed upstream: {size} bytes instead of {locator.size}", hint=CHANGED_HINT)
    _check_validator(response.headers, locator.validator, what)
    if response.status_code == 200:
        if not whole:
            raise RemoteUnavailable(f"{host_of(response.url)} ignored the range asked of {what}")
    elif got is None or (got.start, got.stop) != span:
        said = response.headers.get("content-range", "no Content-Range")
        raise RemoteUnavailable(f"{host_of(response.url)} sent another range of {what}: {one_line(said)}")
    if length is not None and length != span.size:
        raise RemoteUnavailable(f"{host_of(response.url)} announced {length} bytes of {what} instead of {span.size}")


def _check_validator(headers: httpx.Headers, validator: str, what: str) -> None:
    if validator.startswith(MODIFIED):
        if headers.get("last-modified", "") != validator.removeprefix(MODIFIED):
            raise RemoteChanged(f"{what} changed upstream: its Last-Modified is another one", hint=CHANGED_HINT)
    elif validator and strong_etag(headers) != validator:
        raise RemoteChanged(f"{what} changed upstream: its ETag is another one", hint=CHANGED_HINT)


def refusal(response: httpx.Response, body: bytes, what: str, secrets: Iterable[str]) -> CakeError:
    """The error that an answer without the wanted bytes stands for.

    Args:
        body: Its beginning.
        what: Was asked for.
        secrets: Never shown, should the server repeat them.
    """
    status, host = response.status_code, host_of(response.url)
    said = without(secrets, _said(response.headers, body))
    because = f"({status}: {said})" if said else f"({status})"
    if status in (404, 410):
        return NotFound(f"{what} not found {because}", hint="check the name and the revision")
    if status in (401, 403, 451):
        return AccessDenied(f"{host} refused {what} {because}", hint=_login_hint(response))
    if status == 407:
        return AccessDenied(f"the proxy refused {what} {because}", hint="set HTTPS_PROXY with user and password")
    if status == 416:
        return RemoteChanged(f"{what} changed upstream: {host} has no such range {because}", hint=CHANGED_HINT)
    if status in _RETRYABLE or status >= 500:
        delay = requested_delay(response.headers)
        limited = status == 429  # whoever asks too often, whatever for
        return RemoteUnavailable(f"{host} cannot serve {what} now {because}", retry_after=delay, whole_host=limited)
    return InvalidFormat(f"{host} gave an unexpected answer for {what} {because}")


def _login_hint(response: httpx.Response) -> str:
    token_sent = "authorization" in response.request.headers
    if "x-error-code" not in response.headers and "x-repo-commit" not in response.headers:
        return ""
    if response.headers.get("x-error-code") == "GatedRepo" and token_sent:
        return "accept the licence of the model on its page, with the account that HF_TOKEN belongs to"
    if token_sent:
        return "the token may not read this model, or has expired: log in again with `hf auth login`"
    return "accept the licence of the model if it has one, then set HF_TOKEN or log in with `hf auth login`"


def _said(headers: Mapping[str, str], body: bytes) -> str:
    """What the server says about an error; empty when it says nothing readable."""
    if message := headers.get("x-error-message"):
        return message
    if headers.get("content-encoding", "identity") != "identity":
        return ""
    text = body.decode("utf-8", "replace")
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind.endswith("json"):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return ""
        error = value.get("error") if isinstance(value, dict) else None
        return error if isinstance(error, str) else ""
    if kind.endswith("xml"):  # S3 and those who do as S3 does
        match = re.search(r"<Message>([^<]*)</Message>", text)
        return match[1] if match else ""
    return text if kind == "text/plain" else ""


def without(secrets: Iterable[str], text: str) -> str:
    """Text of a stranger in one line. The secrets go before it is cut, or the beginning of one could be left."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return one_line(text)


def one_line(text: str, limit: int = 200) -> str:
    """Text of a stranger as it may stand in a message: printable, short, and no URL with its query."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    line = re.sub(r"(https?://[^\s?\"']+)\?\S+", r"\1", line)
    return line if len(line) <= limit else line[:limit] + "..."


# -- no answer ------------------------------------------------------------------------------------------------------


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Turns whatever httpx raises while `what` is asked for into a `CakeError`."""
    try:
        yield
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise InvalidFormat(f"{what}: not a URL that can be fetched") from error
    except httpx.LocalProtocolError as error:
        raise InvalidFormat(f"{what}: {cause_of(error)}") from error
    except (httpx.HTTPError, httpx.StreamError, httpx.CookieConflict) as error:
        raise no_answer(_from(error), what, error) from error


def no_answer(host: str, what: str, error: BaseException) -> RemoteUnavailable:
    """What an exception of a library means for who asked `host`, where that is known, for `what`."""
    asked = f" from {host}" if host else ""
    distrusted = any(isinstance(reason, ssl.SSLCertVerificationError) for reason in _reasons(error))
    hint = "SSL_CERT_FILE can name a bundle with the certificate of your proxy or mirror" if distrusted else ""
    return RemoteUnavailable(f"no answer{asked} for {what}: {cause_of(error)}", hint=hint)


# By name: huggingface_hub uses a successor of httpx, whose classes are others of the same names.
_REASONS = {
    "ConnectTimeout": "no connection in time",
    "ReadTimeout": "no byte came in time",
    "WriteTimeout": "the request could not be sent in time",
    "PoolTimeout": "no connection was free in time",
    "LocalProtocolError": "the request breaks HTTP",  # Its own text quotes headers, and a token is one.
}


def _from(error: Exception) -> str:
    """The host that was asked: after a redirect not the one that the user knows."""
    try:
        return host_of(error.request.url) if isinstance(error, httpx.RequestError) else ""
    except RuntimeError:  # Raised by httpx where no request is known.
        return ""


def cause_of(error: BaseException) -> str:
    """The deepest reason that says something: the exceptions of the libraries themselves are often empty."""
    if type(error).__name__ in _REASONS:
        return _REASONS[type(error).__name__]
    reasons = list(_reasons(error))
    for reason in reversed(reasons):
        if isinstance(reason, ssl.SSLError):
            return f"TLS failed: {one_line(getattr(reason, 'verify_message', '') or str(reason))}"
        if isinstance(reason, OSError) and reason.strerror:
            return one_line(reason.strerror)
    return next((one_line(str(reason)) for reason in reasons if str(reason)), type(error).__name__)


def _reasons(error: BaseException) -> Iterator[BaseException]:
    """An exception and what led to it, deeper ones later; of a group the first."""
    reason: BaseException | None = error
    for _ in range(20):
        if reason is None:
            return
        yield reason
        inner = reason.exceptions[0] if isinstance(reason, BaseExceptionGroup) else None
        reason = inner or reason.__cause__ or reason.__context__
