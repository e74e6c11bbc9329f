"""A URL on any HTTP(S) server -> a `Listing`: one file, or a safetensors index with the shards beside it.

A file is named by the server's strong ETag together with the URL, since nothing better is known of it. A URL of the
Hub is pinned to the commit and named by the published SHA-256. Other servers may claim such a hash too: it is
recorded, but names the content only where the Hub says so, else a stranger could pass off other bytes as those of a
model.
"""

import re
from collections.abc import Container, Iterable
from pathlib import PurePosixPath
from urllib.parse import quote

import httpx
import trio

from cakefs.errors import CakeError, InvalidFormat, NotFound, RemoteUnavailable, UserError
from cakefs.formats.sharded import INDEX_LIMIT, index_target, parse_index
from cakefs.model import Listing, Published, is_safe_path
from cakefs.remotes.answers import MODIFIED, Origin, host_of, origin, shown
from cakefs.remotes.base import make_listing
from cakefs.remotes.http import HttpRemote, Probe
from cakefs.remotes.wrap import insist

HUBS = ("https://huggingface.co", "https://hf.co")
PROBES = 8  # At once.
LISTING_S = 300.0  # In all: the largest index on a slow line.


async def list_url(url: str, http: HttpRemote, *, hubs: Iterable[str] = HUBS, timeout_s: float = LISTING_S) -> Listing:
    """Lists what a URL of a file stands for.

    Args:
        hubs: Whose published hashes are believed.

    Raises:
        CakeError: UserError for a URL that names no file; InvalidFormat where an index is broken or the server cannot
            serve parts of files; else as for any file.
    """
    parsed = checked_url(url)
    try:
        with trio.fail_after(timeout_s):
            commit, files = await _list(parsed, http, {origin(hub) for hub in hubs})
    except trio.TooSlowError:
        raise RemoteUnavailable(f"no list of {shown(parsed)} within {timeout_s:.0f} s") from None
    return make_listing(f"{parsed.scheme}://{shown(parsed)}", commit, "", files)


async def _list(parsed: httpx.URL, http: HttpRemote, trusted: Container[Origin]) -> tuple[str, list[Published]]:
    """The commit, or empty, and the files."""
    name = PurePosixPath(parsed.path).name
    commit, first = await _publish(str(parsed), name, http, trusted)
    files = [first]
    if index_target(name) is not None:
        index = parse_index(await insist(lambda: http.get_small(first.url, INDEX_LIMIT)), shown(first.url))
        files += await _shards(first.url, sorted(set(index.weight_map.values())), http, trusted)
    return commit, files


def checked_url(url: str) -> httpx.URL:
    """The URL of a file without its fragment. Raises UserError."""
    try:
        origin(url)
    except CakeError as error:
        raise UserError(error.message) from error
    parsed = httpx.URL(url).copy_with(fragment=None)
    if parsed.userinfo:
        raise UserError(f"the password in the URL of {shown(parsed)} would be stored with the model")
    if parsed.path.endswith("/") or not is_safe_path(PurePosixPath(parsed.path).name):
        raise UserError(
            f"{shown(parsed)} names no file", hint="give the URL of a .safetensors, .index.json or .gguf file"
        )
    return parsed


async def _shards(index_url: str, shards: list[str], http: HttpRemote, trusted: Container[Origin]) -> list[Published]:
    """The shards beside an index, with its query, which may sign for the folder. The first failure ends the others."""
    found: list[Published] = []
    failures: list[CakeError] = []
    limiter = trio.CapacityLimiter(PROBES)
    index = httpx.URL(index_url)

    async def publish(shard: str) -> None:
        try:
            async with limiter:
                url = str(index.join(quote(shard)).copy_with(query=index.query or None))
                found.append((await _publish(url, shard, http, trusted))[1])
        except NotFound as error:
            missing = InvalidFormat(f"index {shown(index_url)} names a shard that is not there: {error.message}")
            failures.append(missing)
            nursery.cancel_scope.cancel()
        except CakeError as error:
            failures.append(error)
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for shard in shards:
            nursery.start_soon(publish, shard)
    if failures:
        raise failures[0]
    return found


async def _publish(url: str, path: str, http: HttpRemote, trusted: Container[Origin]) -> tuple[str, Published]:
    """The commit, if the server knows such, and the file under its best name."""
    probe = await insist(lambda: http.probe(url))
    if not probe.ranges:
        hint = "put it on a server that answers Range requests"
        raise InvalidFormat(f"{host_of(url)} does not serve parts of {shown(url)}", hint=hint)
    commit = probe.commit if re.fullmatch("[0-9a-f]{40}", probe.commit) else ""
    if commit:
        url = re.sub(r"/resolve/[^/]+/", f"/resolve/{commit}/", url, count=1)
    if not (commit and re.fullmatch("[0-9a-f]{64}", probe.linked_etag)):
        return commit, Published(path, probe.size, _identity(url, probe), url, validator=_validator(url, probe, commit))
    sha256 = f"sha256:{probe.linked_etag}"
    identity = sha256 if origin(url) in trusted else f"etag:{url}|{sha256}"
    return commit, Published(path, probe.size, identity, url, probe.linked_etag)


def _validator(url: str, probe: Probe, commit: str) -> str:
    """What must not change between two ranges of one file; without any, ranges of two versions could be mixed."""
    if probe.etag or commit or not probe.size:
        return probe.etag
    if not probe.modified:
        hint = "a change between two reads could not be noticed; serve it with an ETag"
        raise InvalidFormat(f"{host_of(url)} sends neither ETag nor Last-Modified with {shown(url)}", hint=hint)
    return MODIFIED + probe.modified


def _identity(url: str, probe: Probe) -> str:
    if probe.etag:
        return f"etag:{url}|{probe.etag}"
    return f"url:{url}|{probe.size}|{probe.modified}"
