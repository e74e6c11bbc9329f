"""A repository of the Hugging Face Hub -> a `Listing` pinned to one commit, by the Hub's own client.

The client is imported on first use (0.3 s) and runs in a thread, since it blocks and has no timeout of its own for
listings. The token is the one given, never one that the client would find by itself.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, urljoin

import trio

from cakefs import __version__
from cakefs.errors import AccessDenied, CakeError, InvalidFormat, NotFound, RemoteUnavailable, UserError
from cakefs.model import Listing, Published
from cakefs.remotes.answers import checked_token, host_of, no_answer, origin, requested_delay, without
from cakefs.remotes.base import make_listing
from cakefs.remotes.wrap import insist

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.hf_api import RepoFile

LISTING_S = 60.0
MAX_ENTRIES = 200_000  # Twice what the Hub recommends as the most: a listing that goes on is no listing.
_LOGIN_HINT = "check the name; if it is private, set HF_TOKEN or log in with `hf auth login`"
_LICENCE_HINT = "accept its licence on its page, then set HF_TOKEN or log in with `hf auth login`"
_TOKEN_HINT = "log in again with `hf auth login`, or correct HF_TOKEN"


class _Tree(NamedTuple):
    """What the client found: the name that the Hub itself uses, the commit, the files."""

    repo: str
    commit: str
    files: "list[RepoFile]"


async def list_repo(
    repo: str, revision: str | None = None, *, endpoint: str, token: str | None, timeout_s: float = LISTING_S
) -> Listing:
    """Lists `org/name` at a branch, tag or commit; None is the default branch.

    Args:
        endpoint: The Hub, without a trailing slash.

    Raises:
        CakeError: NotFound, AccessDenied, RemoteUnavailable; UserError for a name that cannot be one; InvalidFormat for
            an answer that makes no sense.
    """
    ask = _Asker(repo, revision, endpoint, token)
    try:
        with trio.fail_after(timeout_s):
            tree = await insist(lambda: trio.to_thread.run_sync(ask, abandon_on_cancel=True))
    except trio.TooSlowError:
        raise RemoteUnavailable(f"no list of {repo} from {host_of(endpoint)} within {timeout_s:.0f} s") from None
    files = [_published(file, f"{endpoint}/{tree.repo}/resolve/{tree.commit}") for file in tree.files]
    return make_listing(f"{endpoint}/{repo}", tree.commit, revision or "main", files)


class _Asker:
    """The blocking part."""

    def __init__(self, repo: str, revision: str | None, endpoint: str, token: str | None) -> None:
        self.repo = repo
        self.revision = revision
        self.endpoint = endpoint
        self.token = checked_token(endpoint, token) if token else None

    def __call__(self) -> _Tree:
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        with self._translated():
            api = HfApi(
                endpoint=self.endpoint, token=self.token or False, library_name="cakefs", library_version=__version__
            )
            info = api.model_info(self.repo, revision=self.revision, timeout=10)
            commit = info.sha
            if not isinstance(commit, str) or not re.fullmatch("[0-9a-f]{40}", commit):
                raise ValueError("no commit")
            entries = list(islice(self._tree(commit), MAX_ENTRIES + 1))
            if len(entries) > MAX_ENTRIES:
                raise InvalidFormat(f"{self.repo} has more than {MAX_ENTRIES} files and directories")
            file: Any = RepoFile
            return _Tree(info.id or self.repo, commit, [file(**e) for e in entries if e["type"] == "file"])

    def _tree(self, commit: str) -> Iterator[dict[str, Any]]:
        """As `HfApi.list_repo_tree`, which takes the token along where a page leads to another origin."""
        from huggingface_hub import utils

        client: Any = utils  # Its documented functions are not exported to type checkers.
        page = f"{self.endpoint}/api/models/{self.repo}/tree/{commit}?recursive=true"
        while True:
            token = self.token if origin(page) == origin(self.endpoint) else None
            headers = client.build_hf_headers(token=token or False, library_name="cakefs", library_version=__version__)
            answer = client.http_backoff("GET", page, headers=headers)
            client.hf_raise_for_status(answer)
            yield from answer.json()
            following = answer.links.get("next", {}).get("url")
            if following is None:
                return
            page = urljoin(page, following)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        from huggingface_hub import errors

        host = host_of(self.endpoint)
        try:
            yield
        except errors.HFValidationError as error:
            raise UserError(f"not the name of a model: {self.repo!r}", hint="names look like org/name") from error
        except errors.OfflineModeIsEnabled as error:
            raise RemoteUnavailable(f"{self.repo} cannot be listed offline", hint="unset HF_HUB_OFFLINE") from error
        except errors.HfHubHTTPError as error:
            raise self._refusal(error, host) from error
        except (_transport_error(), OSError) as error:
            raise no_answer(host, self.repo, error) from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, MemoryError) as error:
            raise InvalidFormat(f"{host} gave an unexpected answer for {self.repo}: {type(error).__name__}") from error

    def _refusal(self, error: "HfHubHTTPError", host: str) -> CakeError:
        from huggingface_hub import errors

        status, said = error.response.status_code, self._said(error)
        if isinstance(error, errors.GatedRepoError):
            return AccessDenied(f"{host} refused {self.repo} {said}", hint=_LICENCE_HINT)
        if isinstance(error, errors.RepositoryNotFoundError):
            return NotFound(f"{self.repo} not found on {host} {said}", hint=_LOGIN_HINT)
        if isinstance(error, errors.RevisionNotFoundError):
            return NotFound(f"{self.repo} on {host} has no revision {self.revision!r}", hint="check the revision")
        if status in (401, 403):
            return AccessDenied(f"{host} refused {self.repo} {said}", hint=_TOKEN_HINT if self.token else "")
        if status == 404:
            return NotFound(f"{self.repo} not found on {host} {said}", hint=_LOGIN_HINT)
        if status in (408, 425, 429) or status >= 500:
            delay = requested_delay(error.response.headers)
            return RemoteUnavailable(f"{host} cannot list {self.repo} now {said}", retry_after=delay)
        return InvalidFormat(f"{host} gave an unexpected answer for {self.repo} {said}")

    def _said(self, error: "HfHubHTTPError") -> str:
        message = without([self.token] if self.token else [], error.server_message or "")
        return f"({error.response.status_code}: {message})" if message else f"({error.response.status_code})"


def _transport_error() -> type[Exception]:
    """HTTPError of the library that this version of the client uses: httpx or its successor."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(base for base in HfHubHTTPError.__bases__ if base.__name__ == "HTTPError")


def _published(file: "RepoFile", base: str) -> Published:
    """The best name of its content that the Hub tells: SHA-256, Xet hash, git blob id."""
    sha256 = file.lfs.sha256 if file.lfs else ""
    if sha256:
        identity = f"sha256:{sha256}"
    elif file.xet_hash:
        identity = f"xet:{file.xet_hash}"
    else:
        identity = f"git:{file.blob_id}"
    sound = isinstance(file.path, str) and type(file.size) is int and file.size >= 0
    if not sound or not re.fullmatch("(sha256|xet):[0-9a-f]{64}|git:[0-9a-f]{40}", identity):
        raise InvalidFormat(f"{base}: the list of files is malformed at {file.path!r}")
    return Published(file.path, file.size, identity, base + "/" + quote(file.path, errors="surrogatepass"), sha256)
