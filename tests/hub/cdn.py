"""The second host: large files of repositories behind signed, expiring URLs, and plain static files.

The ETag here is not the SHA-256 that the Hub publishes (as with old LFS blobs on S3), but it is strong and stable.
"""

import hashlib
import hmac
import threading
import time
from dataclasses import dataclass
from email.utils import formatdate
from urllib.parse import quote

from tests.hub.content import Content
from tests.hub.http import Answer, Incoming, data_answer, file_answer

DENIED = b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>AccessDenied</Code><Message>%s</Message></Error>\n'


def etag_of(content: Content, salt: str) -> str:
    return '"' + hashlib.md5(f"{salt}{content.sha256()}".encode(), usedforsecurity=False).hexdigest() + '"'


@dataclass(frozen=True)
class Plain:
    """A static file: `etag` as sent, weak or empty if so; `ranges` False for a server that knows no ranges."""

    content: Content
    etag: str
    ranges: bool
    modified: float | None


class Links:
    """Signs URLs of the CDN, each good for `lifetime` seconds."""

    def __init__(self, lifetime: float) -> None:
        self.lifetime = lifetime
        self._epoch = 0
        self._lock = threading.Lock()
        self._files: dict[str, tuple[str, Content]] = {}

    def expire(self) -> None:
        """Makes every URL signed so far invalid."""
        self._epoch += 1

    def sign(self, path: str, content: Content) -> str:
        """Path and query under which the CDN serves a file for some time."""
        key = f"/xet-bridge/{hashlib.sha1(path.encode()).hexdigest()[:24]}/{content.sha256()}"
        with self._lock:
            self._files[key] = (path, content)
        expires = str(int(time.time() + self.lifetime))
        name = quote(f'inline; filename="{path.rpartition("/")[2]}"')
        return (
            f"{key}?response-content-disposition={name}&Expires={expires}&Policy={self._epoch}"
            f"&Signature={self._signature(key, expires)}&Key-Pair-Id=KTESTHUB"
        )

    def find(self, incoming: Incoming) -> tuple[str, Content] | None:
        """File path and content behind a URL, whether or not its signature is still good."""
        return self._files.get(incoming.target.partition("?")[0])

    def valid(self, incoming: Incoming) -> bool:
        query = incoming.query
        expires = query.get("Expires", ["0"])[0]
        signature = self._signature(incoming.target.partition("?")[0], expires)
        good = hmac.compare_digest(query.get("Signature", [""])[0], signature)
        return good and int(expires) > time.time()

    def _signature(self, key: str, expires: str) -> str:
        return hmac.new(b"test hub", f"{key} {expires} {self._epoch}".encode(), "sha256").hexdigest()


class Cdn:
    """Routes of the second host: answers come with their stage and the path of the file they are about."""

    def __init__(self, links: Links) -> None:
        self.links = links
        self.plain: dict[str, Plain] = {}

    def __call__(self, incoming: Incoming) -> tuple[str, str, Answer]:
        if incoming.segments[0] == "plain":
            path = "/".join(incoming.segments[1:])
            return "plain", path, self._plain(incoming, path)
        found = self.links.find(incoming)
        if found is None:
            return "cdn", "/".join(incoming.segments), data_answer(404, DENIED % b"no such key", "application/xml")
        path, content = found
        if not self.links.valid(incoming):
            return "cdn", path, expired()
        return "cdn", path, file_answer(incoming, content, {"ETag": etag_of(content, "cdn")})

    def _plain(self, incoming: Incoming, path: str) -> Answer:
        file = self.plain.get(path)
        if file is None:
            return data_answer(404, b"not found\n", "text/plain")
        headers = {} if file.modified is None else {"Last-Modified": formatdate(file.modified, usegmt=True)}
        if file.etag:
            headers["ETag"] = file.etag
        return file_answer(incoming, file.content, headers, file.ranges)


def expired() -> Answer:
    return data_answer(403, DENIED % b"Request has expired", "application/xml")
