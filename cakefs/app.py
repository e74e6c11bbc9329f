"""Composition root: builds every part once, in order, and takes them down in the reverse."""

import logging
import resource
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cached_property
from typing import TYPE_CHECKING

import trio

from cakefs.config import Config
from cakefs.engine.fetch import Fetcher
from cakefs.engine.known.survey import find_model
from cakefs.engine.local import ContentPool
from cakefs.engine.reading import Reading
from cakefs.engine.serve.demand import Demand
from cakefs.engine.serve.library import Library
from cakefs.engine.tasks import open_flat_nursery
from cakefs.engine.transfer.messages import Settings, tokens_for
from cakefs.errors import CakeError, UserError
from cakefs.model import Manifest
from cakefs.plan.wish import Wish
from cakefs.store.store import Store

if TYPE_CHECKING:  # What asks the Hub takes 0.3 s to import: not for those who find all of a model here.
    from cakefs.engine.disk.meter import Meter
    from cakefs.engine.index import Added
    from cakefs.engine.models.sources import HubSource, UrlSource

log = logging.getLogger(__name__)

FD_RESERVE = 256  # Descriptors left for sockets, LMDB, pipes and the kernel's handles.
FD_WANTED = 16384  # Soft limit asked for; open contents are closed, least recently used first, beyond it.
TOKEN_S = 2.0  # Between looks at the token file.


class App:
    """The parts of one cakefs process. Made by `open_app`."""

    def __init__(self, config: Config, store: Store, fetcher: Fetcher, reading: Reading) -> None:
        self.config = config
        self.store = store
        self.fetcher = fetcher
        self.reading = reading
        fetcher.find_tokens = self._tokens

    @asynccontextmanager
    async def library(self) -> AsyncIterator[Library]:
        """The models as a mount sees them; holds a lease on what it has shown while it is open."""
        demand = self._demand()
        library = Library(self.store, self.reading, demand)
        try:
            async with open_flat_nursery() as nursery:
                if demand is not None:
                    await nursery.start(demand.run)
                nursery.start_soon(library.watch)
                nursery.start_soon(library.counting.run)
                if not self.config.offline:
                    nursery.start_soon(self._watch_token)
                yield library
                nursery.cancel_scope.cancel()
        finally:
            library.close()

    @cached_property
    def _token(self) -> str | None:
        """Looked up when it is first needed; a mount looks again."""
        return None if self.config.offline else hub_token()

    def _tokens(self) -> dict[str, str]:
        return tokens_for(self.config.endpoint, self._token)

    def _demand(self) -> Demand | None:
        from cakefs.engine.models.adding import AddRequest, add_apart

        config = self.config
        if config.offline or not config.on_demand:
            return None

        async def add(wish: Wish) -> None:
            place, cache = str(config.store), str(config.hub_cache) if config.hub_cache else None
            await add_apart(AddRequest(place, config.endpoint, self._token, config.read_timeout_s, cache, wish))

        return Demand(add, lambda: self._token)

    async def _watch_token(self) -> None:
        """A login after `cakefs mount` reaches the mount."""
        while True:
            await trio.sleep(TOKEN_S)
            try:
                self._token = hub_token()
            except CakeError as error:  # such as no descriptor left: what is served goes on
                log.warning("cannot look for a token: %s", error)
                continue
            self.fetcher.use_tokens(self._tokens())

    async def add(
        self, source: "HubSource | UrlSource", name: str, *, update: bool = False, meter: "Meter | None" = None
    ) -> "Added":
        """Lists a source, reads its headers and small files, and stores it under a name; files that are in the Hub
        cache are borrowed there.

        Args:
            update: Let the name stand for something else than before.
            meter: Of what is read in the cache.
        """
        from cakefs.engine.models.adding import add_from_cache
        from cakefs.engine.models.sources import list_source
        from cakefs.remotes.http import HttpRemote

        http = HttpRemote(tokens=self._tokens())
        try:
            listing = await list_source(source, self.config, self._token, http)
            timeout, cache = self.config.read_timeout_s, self.config.hub_cache
            return await add_from_cache(
                self.store, http, listing, name, cache, read_timeout_s=timeout, update=update, meter=meter
            )
        finally:
            await http.aclose()

    async def compose(self, source: "HubSource | UrlSource", name: str) -> Manifest:
        """What `add` would show under the name, which is not stored."""
        from cakefs.engine.models import looking

        return await looking.compose_source(self.store, self.config, self._token, source, name)

    async def read_url(self, url: str, limit: int) -> bytes:
        """A file of at most `limit` bytes, from any server."""
        from cakefs.engine.models import looking

        return await looking.read_url(self.config, self._token, url, limit)

    def model(self, name: str) -> Manifest:
        """The manifest a name stands for. Raises UserError."""
        return find_model(self.store, name)


@asynccontextmanager
async def open_app(config: Config, *, serving: bool = False) -> AsyncIterator[App]:
    """Opens the store and the fetcher; transfer processes start with the first job.

    Args:
        serving: For long, to others: says what the limit of the store is from now on. Else that limit is kept, and what
            is brought or used from now on does not make room for the rest of it.
    """
    raise_fd_limit()
    store = Store.open(config.store)
    try:
        limit = config.limit or store.catalog.numbers.limit()
        if serving:
            limit = config.limit
            store.catalog.numbers.set_limit(limit)
        settings = Settings(
            str(config.store),
            {},
            config.read_timeout_s,
            config.connections,
            limit,
            0.0 if serving else time.time(),
            max(logging.WARNING, logging.getLogger().getEffectiveLevel()),
        )
        fetcher = Fetcher(settings, config.workers, offline=config.offline)
        pool = ContentPool(store, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - FD_RESERVE, cached=serving)
        async with open_flat_nursery() as nursery:
            await nursery.start(fetcher.run)
            try:
                reading = Reading(pool, fetcher, readahead=config.readahead, cached=serving)
                yield App(config, store, fetcher, reading)
            finally:
                nursery.cancel_scope.cancel()
                pool.close()
    finally:
        store.close()


def hub_token() -> str | None:
    """HF_TOKEN, or the token file of `hf auth login`: as huggingface_hub finds it (0.3 s of imports).

    Raises UserError for a file that cannot be read.
    """
    from huggingface_hub import constants, get_token

    try:
        return get_token()
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        hint = "hf auth login writes it anew; or set HF_TOKEN, or HF_HOME"
        raise UserError(f"cannot read the token file {constants.HF_TOKEN_PATH}: {reason}", hint=hint) from error


def raise_fd_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FD_WANTED if hard == resource.RLIM_INFINITY else min(FD_WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
