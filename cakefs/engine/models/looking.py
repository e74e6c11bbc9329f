"""Looking at a model without adding it, and at small files anywhere: what `plan` and `hashes` need of the network."""

from cakefs.config import Config
from cakefs.engine.index import Indexer
from cakefs.engine.models.adding import CONNECTIONS
from cakefs.engine.models.sources import HubSource, UrlSource, list_source
from cakefs.engine.transfer.messages import tokens_for
from cakefs.errors import RemoteUnavailable
from cakefs.model import Manifest
from cakefs.remotes.http import HttpRemote
from cakefs.remotes.wrap import Limit, Log, Retry
from cakefs.store.store import Store


async def compose_source(
    store: Store, config: Config, token: str | None, source: HubSource | UrlSource, name: str
) -> Manifest:
    """What `add` would show under the name. Its headers and small files are in the store then, for gc or for `add`."""
    async with HttpRemote(tokens=tokens_for(config.endpoint, token)) as http:
        listing = await list_source(source, config, token, http)
        remote = Retry(Limit(Log(http), CONNECTIONS), budget_s=config.read_timeout_s)
        with store.guard():
            return await Indexer(store, remote).compose(listing, name)


async def read_url(config: Config, token: str | None, url: str, limit: int) -> bytes:
    """A small file of any server. Raises InvalidFormat when it has more than `limit` bytes."""
    if config.offline:
        raise RemoteUnavailable(f"cannot read {url} offline", hint="leave out --offline and unset HF_HUB_OFFLINE")
    async with HttpRemote(tokens=tokens_for(config.endpoint, token)) as http:
        return await http.get_small(url, limit)
