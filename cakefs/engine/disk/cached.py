"""Before a transfer: what somebody else brought into the Hub cache since a model was added need not come again."""

from collections.abc import Sequence
from pathlib import Path

import trio

from cakefs.engine.disk.adopt import Adopter
from cakefs.engine.disk.found import Skipped
from cakefs.engine.disk.hubcache import files_of
from cakefs.engine.disk.meter import Meter
from cakefs.model import Manifest
from cakefs.store.store import Store


async def borrow_cached(
    store: Store, manifest: Manifest, spans: Sequence[int], cache: Path | None, meter: Meter
) -> list[Skipped]:
    """Borrows what is missing of these spans from files of the cache, after hashing those.

    Returns: Those that are not what their name says.
    """
    if cache is None or store.catalog.readonly:
        return []
    here = store.catalog.recorded(map(manifest.key, spans))
    missing = {manifest.spans[span].source for span in spans if manifest.key(span) not in here}
    paths = await trio.to_thread.run_sync(files_of, cache, [manifest.sources[index] for index in sorted(missing)])
    meter.expect(sum(source.locator.size for source in manifest.sources if source.path in paths))
    adopter = Adopter(store, meter=meter)
    if paths:
        await adopter.adopt(manifest, paths)
    return adopter.skipped
