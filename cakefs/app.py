"""Composition root: builds every part once, in order, and takes them down in the reverse."""

import logging
import resource
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import trio

from cakefs.config import Config
from cakefs.engine.fetch import Fetcher
from cakefs.engine.index import Added, Indexer
from cakefs.engine.library import Library
from cakefs.engine.local import ContentPool
from cakefs.engine.messages import Settings
from cakefs.engine.read import Reading
from cakefs.engine.sources import HubSource, UrlSource, list_source
from cakefs.engine.survey import find_model
from cakefs.engine.tasks import open_flat_nursery
from cakefs.model import Manifest
from cakefs.remotes.http import HttpRemote
from cakefs.remotes.wrap import Limit, Log, Retry
from cakefs.store.store import Store

log = logging.getLogger(__name__)

FD_RESERVE = 256  # Descriptors left for sockets, LMDB, pipes and the kernel's handles.
FD_WANTED = 16384  # Soft limit asked for; open contents are closed, least recently used first, beyond it.
TOKEN_S = 2.0  # Between looks at the token file.
ADD_CONNECTIONS = 16  # Headers and small files are latency, not bandwidth.


class App:
    """The parts of one cakefs process. Made by `open_app`."""

    def __init__(self, config: Config, store: Store, fetcher: Fetcher, reading: Reading, token: str | None) -> None:
        self.config = config
        self.store = store
        self.fetcher = fetcher
        self.reading = reading
        self._token = token

    @asynccontextmanager
    async def library(self) -> AsyncIterator[Library]:
        """The models as a mount sees them; holds a lease on what it has shown while it is open."""
        library = Library(self.store, self.reading)
        try:
            async with open_flat_nursery() as nursery:
                nursery.start_soon(library.watch)
                if not self.config.offline:
                    nursery.start_soon(self._watch_token)
                yield library
                nursery.cancel_scope.cancel()
        finally:
            library.close()

    async def _watch_token(self) -> None:
        """A login after `cakefs mount` reaches the mount."""
        while True:
            await trio.sleep(TOKEN_S)
            self._token = hub_token()
            self.fetcher.use_tokens(tokens_for(self.config, self._token))

    async def add(self, source: HubSource | UrlSource, name: str, *, update: bool = False) -> Added:
        """Lists a source, reads its headers and small files, and stores it under a name.

        Args:
            update: Let the name stand for something else than before.
        """
        http = HttpRemote(tokens=tokens_for(self.config, self._token))
        try:
            listing = await list_source(source, self.config, self._token, http)
            remote = Retry(Limit(Log(http), ADD_CONNECTIONS), budget_s=self.config.read_timeout_s)
            with self.store.guard():
                return await Indexer(self.store, remote).add(listing, name, update=update)
        finally:
            await http.aclose()

    def model(self, name: str) -> Manifest:
        """The manifest a name stands for. Raises UserError."""
        return find_model(self.store, name)


@asynccontextmanager
async def open_app(config: Config) -> AsyncIterator[App]:
    """Opens the store and the fetcher; transfer processes start with the first job."""
    raise_fd_limit()
    token = None if config.offline else hub_token()
    store = Store.open(config.store)
    try:
        settings = Settings(str(config.store), tokens_for(config, token), config.read_timeout_s, config.connections)
        fetcher = Fetcher(settings, config.workers, offline=config.offline)
        pool = ContentPool(store, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - FD_RESERVE)
        async with open_flat_nursery() as nursery:
            await nursery.start(fetcher.run)
            try:
                yield App(config, store, fetcher, Reading(pool, fetcher, readahead=config.readahead), token)
            finally:
                nursery.cancel_scope.cancel()
                pool.close()
    finally:
        store.close()


def hub_token() -> str | None:
    """HF_TOKEN, or the token file of `hf auth login`: as huggingface_hub finds it (0.3 s of imports)."""
    from huggingface_hub import get_token

    return get_token()


def tokens_for(config: Config, token: str | None) -> dict[str, str]:
    """The token by the one origin that may see it."""
    parts = urlsplit(config.endpoint)
    return {f"{parts.scheme}://{parts.netloc}": token} if token else {}


def raise_fd_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FD_WANTED if hard == resource.RLIM_INFINITY else min(FD_WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
