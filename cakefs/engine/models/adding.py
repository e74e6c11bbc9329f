"""Adding a model as one call, and as a process of its own.

A mount that adds on demand does it in another process: headers of 90,000 tensors are seconds of Python, and one busy
thread beside the serving loop would cost it three quarters of its throughput. The wish comes on stdin, with the token,
which is never in argv or the environment; the outcome goes to stdout. Killed at any point, it leaves no name behind.
It may write the store and nothing else, and has a limit of memory: what it reads comes from strangers.
"""

import logging
import resource
import sys
from pathlib import Path

import msgspec
import trio
from msgspec import Struct

from cakefs.engine.disk.adopt import Adopter
from cakefs.engine.disk.found import Found
from cakefs.engine.disk.hubcache import files_with
from cakefs.engine.disk.meter import Meter
from cakefs.engine.index import Added
from cakefs.engine.transfer.confine import confine
from cakefs.engine.transfer.messages import Done, Failed, error_of, failure, tokens_for
from cakefs.errors import CakeError, NotFound
from cakefs.execute import child_environment, python_command
from cakefs.model import Listing
from cakefs.plan.wish import Wish
from cakefs.remotes import hub
from cakefs.remotes.http import HttpRemote
from cakefs.remotes.wrap import Limit, Log, Retry
from cakefs.store.store import Store

log = logging.getLogger(__name__)

MEMORY = 4 << 30  # For a header of 90,000 tensors many times over; less than a bomb takes.
CONNECTIONS = 16  # Headers and small files are latency, not bandwidth.


class AddRequest(Struct, frozen=True):
    """What the process needs; `token` is for the endpoint's own origin."""

    store: str
    endpoint: str
    token: str | None
    read_timeout_s: float
    hub_cache: str | None
    wish: Wish


async def add_from_cache(
    store: Store,
    http: HttpRemote,
    listing: Listing,
    name: str,
    cache: Path | None,
    *,
    read_timeout_s: float,
    update: bool = False,
    meter: Meter | None = None,
) -> Added:
    """Reads the headers and small files of what was listed, and stores it under a name; all files that are in the Hub
    cache are borrowed there first.
    """
    paths = await trio.to_thread.run_sync(files_with, cache, listing.files) if cache else {}
    remote = Retry(Limit(Log(http), CONNECTIONS), budget_s=read_timeout_s)
    meter = meter or Meter()
    meter.expect(sum(file.size for file in listing.files if file.path in paths))
    with store.guard():
        return await Adopter(store, remote, meter=meter).add(Found(name, listing, paths), update=update)


async def add_apart(request: AddRequest) -> None:
    """Grants a wish in a process of its own, which is killed when this is cancelled.

    Raises:
        CakeError: as the process says.
    """
    command = python_command("cakefs.engine.models.adding")
    done = await trio.run_process(
        command, stdin=msgspec.msgpack.encode(request), capture_stdout=True, check=False, env=child_environment()
    )
    if done.returncode:
        raise CakeError(f"the process that adds {request.wish.name} ended with {done.returncode}")
    outcome = msgspec.msgpack.decode(done.stdout, type=Done | Failed)
    if isinstance(outcome, Failed):
        raise error_of(outcome)


async def _grant(request: AddRequest) -> Done | Failed:
    store = Store.open(Path(request.store), create=False)
    confine(store.path)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    http = HttpRemote(tokens=tokens_for(request.endpoint, request.token))
    try:
        listing = await _list(request)
        name, cache, timeout = request.wish.name, request.hub_cache, request.read_timeout_s
        added = await add_from_cache(store, http, listing, name, Path(cache) if cache else None, read_timeout_s=timeout)
        for warning in added.warnings:
            log.warning("%s: %s", request.wish.name, warning)
        return Done(0)
    except CakeError as error:
        return failure(0, error)
    finally:
        await http.aclose()
        store.close()


async def _list(request: AddRequest) -> Listing:
    """Of the branch that moved to the wished commit, so that it is known as that; else of the revision itself."""
    wish = request.wish
    for branch in wish.branches:
        try:
            listing = await hub.list_repo(
                wish.repo, None if branch == "main" else branch, endpoint=request.endpoint, token=request.token
            )
        except NotFound:
            continue
        if listing.revision == wish.revision:
            return listing
    return await hub.list_repo(wish.repo, wish.revision, endpoint=request.endpoint, token=request.token)


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr)
    request = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=AddRequest)
    sys.stdout.buffer.write(msgspec.msgpack.encode(trio.run(_grant, request)))


if __name__ == "__main__":
    main()
