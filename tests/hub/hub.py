"""The hub as tests see it: put files in, aim clients at `endpoint`, break things, count what was sent."""

import ssl
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

from tests.hub.api import Api
from tests.hub.cdn import Cdn, Links, Plain, etag_of
from tests.hub.content import Content, default_lfs
from tests.hub.faults import DATA, Fault, Faults, matches
from tests.hub.http import Answer, Incoming
from tests.hub.repos import Repo
from tests.hub.server import Listener
from tests.hub.shaping import Shaper
from tests.hub.wire import Request


class Hub:
    """Two listeners on loopback: the Hub itself at `localhost`, the CDN and plain files at `127.0.0.1`.

    Args:
        page_size: Entries of one page of a listing.
        link_lifetime: Seconds that a signed URL of the CDN is good for.
        certificate: With its key, for both names: all is https then.
    """

    def __init__(self, *, page_size: int = 1000, link_lifetime: float = 3600, certificate: Path | None = None) -> None:
        self.links = Links(link_lifetime)
        self.api = Api(self.links, page_size)
        self.cdn = Cdn(self.links)
        self.shaper = Shaper()
        self._faults = Faults()
        self._arrived = threading.Condition()
        self._requests: list[Request] = []
        self._failures: list[Exception] = []
        tls, scheme = None, "http"
        if certificate is not None:
            tls, scheme = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), "https"
            tls.load_cert_chain(certificate)
        self._listeners = {
            "hub": Listener(lambda i: self._answer(i, self.api), self.shaper, self._failures.append, tls),
            "cdn": Listener(lambda i: self._answer(i, self.cdn), self.shaper, self._failures.append, tls),
        }
        self.endpoint = f"{scheme}://localhost:{self._listeners['hub'].port}"
        self.cdn_endpoint = f"{scheme}://127.0.0.1:{self._listeners['cdn'].port}"
        self.api.endpoint = self.endpoint
        self.api.cdn_endpoint = self.cdn_endpoint

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._faults.clear()
        for listener in self._listeners.values():
            listener.close()
        if self._failures and error is None:
            raise self._failures[0]

    # What is served

    def add_repo(
        self,
        name: str,
        files: Mapping[str, bytes | Path] | Path,
        *,
        private: bool = False,
        gated: bool = False,
        lfs: Callable[[str, int], bool] = default_lfs,
        token: str = "hf_test",
        branch: str = "main",
    ) -> str:
        """Makes a commit whose whole content is `files`; earlier commits stay served.

        Args:
            files: By path, or a directory with all that is below it.
            lfs: Says by path and size what is an LFS file; the others come from the Hub's own host.
            token: The only one that may read the repository when it is private or gated.
        """
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p for p in files.rglob("*") if p.is_file()}
        repo = self.api.repos.setdefault(name, Repo(name, token))
        repo.token, repo.private, repo.gated = token, private, gated
        self.api.tokens.add(token)
        return repo.commit(branch, {path: Content(source) for path, source in files.items()}, lfs)

    def remove_repo(self, name: str) -> None:
        """As if its owner had deleted it or made it private; signed URLs stay good."""
        del self.api.repos[name]

    def plain(
        self,
        path: str,
        source: bytes | Path,
        *,
        etag: str | None = None,
        ranges: bool = True,
        modified: float | None = 1_767_225_600.0,
    ) -> str:
        """Serves a file as a plain web server would, and returns its URL; again with other bytes = changed upstream.

        Args:
            etag: As to be sent, with quotes; empty for none; None for a strong one that depends on the bytes.
            ranges: False for a server that ignores Range.
        """
        content = Content(source)
        self.cdn.plain[path] = Plain(content, etag_of(content, "plain") if etag is None else etag, ranges, modified)
        return f"{self.cdn_endpoint}/plain/{quote(path)}"

    # What was asked

    @property
    def requests(self) -> list[Request]:
        """Requests in the order they came; `status` and `sent` of those under way still change."""
        with self._arrived:
            return list(self._requests)

    def reset(self) -> None:
        """Forgets the requests."""
        with self._arrived:
            self._requests.clear()

    def sent(self, pattern: str = "*") -> int:
        """Bytes of files sent from anywhere, by glob of `file`, of `org/name/file` or of a plain path."""
        return sum(r.sent for r in self.requests if r.stage in DATA and r.status < 300 and matches(r.path, pattern))

    def wait_for(self, pattern: str = "*", count: int = 1, stage: str = "", timeout: float = 20) -> list[Request]:
        """Waits until `count` requests for matching paths have come (since `reset`), and returns them."""

        def found() -> list[Request]:
            return [r for r in self._requests if matches(r.path, pattern) and stage in ("", r.stage)]

        with self._arrived:
            if not self._arrived.wait_for(lambda: len(found()) >= count, timeout):
                raise TimeoutError(f"the test hub got {len(found())} requests for {pattern}, not {count}")
            return found()

    @property
    def connections(self) -> int:
        """How many were accepted so far."""
        return sum(listener.connections for listener in self._listeners.values())

    # How it behaves

    def fault(self, kind: str | int, path: str = "*", times: int | None = 1, after: int = 0, **options: Any) -> Fault:
        """Spoils the next `times` requests that match; kinds and options are those of `tests.hub.faults`."""
        fault = Fault(str(kind), path, times, after, **options)
        self._faults.add(fault)
        return fault

    def clear_faults(self) -> None:
        """Forgets all faults and lets what is stalled go on."""
        self._faults.clear()

    def expire_links(self) -> None:
        """Makes the CDN refuse every URL that was signed so far."""
        self.links.expire()

    def shape(self, rate: float | None = None, latency: float = 0) -> None:
        """Bytes per second that all connections share, seconds before each response."""
        self.shaper.rate = rate
        self.shaper.latency = latency

    def down(self, host: str | None = None) -> None:
        """Stops listening and cuts all connections: of `hub`, of `cdn` or of both."""
        for name, listener in self._listeners.items():
            if host in (None, name):
                listener.stop()

    def up(self, host: str | None = None) -> None:
        """Listens (again), on the same ports."""
        for name, listener in self._listeners.items():
            if host in (None, name):
                listener.start()

    def _answer(
        self, incoming: Incoming, site: Callable[[Incoming], tuple[str, str, Answer]]
    ) -> tuple[Request, Answer]:
        stage, path, answer = site(incoming)
        request = Request(
            method=incoming.method,
            host=incoming.header("host").partition(":")[0],
            path=path,
            range=incoming.header("range"),
            stage=stage,
            target=incoming.target,
            authorized=bool(incoming.header("authorization")),
        )
        with self._arrived:
            self._requests.append(request)
            self._arrived.notify_all()
        return request, self._faults.apply(stage, path, incoming, answer)
