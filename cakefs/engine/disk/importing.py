"""Importing what is on this machine: each model that was found becomes one that is shown."""

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import NamedTuple

import trio

from cakefs.config import Config
from cakefs.engine.disk import folder, hubcache, ollama
from cakefs.engine.disk.adopt import Adopter, Turns
from cakefs.engine.disk.found import Found, Skipped
from cakefs.engine.disk.meter import Meter
from cakefs.engine.index import Added
from cakefs.engine.known.naming import model_name
from cakefs.engine.tasks import open_flat_nursery
from cakefs.errors import CakeError, NotFound, StoreFull, UserError
from cakefs.model import SMALL_FILE_LIMIT
from cakefs.store.borrowing import Borrowing
from cakefs.store.store import Store

HUB_CACHE, OLLAMA = "hub-cache", "ollama"


class Imported(NamedTuple):
    """Attributes:
    skipped: What was not taken, and why.
    borrowed_bytes: That are new in the store and lie in files of somebody else; `stored_bytes` lie in ours.
    """

    models: list[Added]
    skipped: list[Skipped]
    borrowed_bytes: int
    stored_bytes: int


def find(what: str, name: str | None, config: Config, environ: Mapping[str, str]) -> tuple[list[Found], list[Skipped]]:
    """The models of the Hub cache, of an Ollama store, or of a path. In a thread.

    Raises:
        CakeError: NotFound where there is no such place, UserError where it is no model.
    """
    try:
        if what == HUB_CACHE:
            cache = _there([config.hub_cache] if config.hub_cache else [], "Hub cache")
            if hubcache.shown_by_us(cache):
                raise UserError(f"{cache} is what cakefs shows", hint="name the client's own cache in HF_HUB_CACHE")
            return hubcache.find(cache, config.endpoint)
        if what == OLLAMA:
            return ollama.find(_there(ollama.locations(environ), "Ollama store"))
        found, skipped = folder.find(Path(os.path.expanduser(what)), name or "")
        return [found], skipped
    except OSError as error:
        raise CakeError(f"cannot read {error.filename}: {error.strerror}") from error


def _there(places: Sequence[Path], what: str) -> Path:
    for place in places:
        if os.path.isdir(place):  # also where we may not look
            return place
    raise NotFound(f"no {what} at {' or '.join(map(str, places))}", hint="HF_HUB_CACHE and OLLAMA_MODELS name others")


async def import_found(
    store: Store,
    found: Iterable[Found],
    skipped: Sequence[Skipped],
    meter: Meter,
    *,
    copy: bool,
    update: bool,
    one: bool,
    limit: int,
) -> Imported:
    """Adopts and shows models, as many at a time as there are cores.

    Args:
        update: Let a name that stands for something else now stand for this.
        one: It is what the user named: what is wrong with it is raised, not noted.
        limit: As `Adopter` has it.
    """
    models = list(found)
    noted = [list(skipped), *([] for _ in models)]
    done: dict[int, Added] = {}
    turns, slots = Turns(), trio.CapacityLimiter(len(os.sched_getaffinity(0)))
    reading = defaultdict[str, trio.Lock](trio.Lock)

    async def adopt(number: int, model: Found) -> None:
        adopter = Adopter(store, meter=meter, copy=copy, limit=limit, turns=turns)
        async with AsyncExitStack() as held:
            # What two models have is read for the first; the second then finds it known.
            for what in await trio.to_thread.run_sync(_large, model):
                await held.enter_async_context(reading[what])
            await held.enter_async_context(slots)
            try:
                model_name(model.name)
                with store.guard():
                    done[number] = await adopter.add(model, update=update)
            except CakeError as error:
                if one or isinstance(error, StoreFull):
                    raise
                adopter.skipped.insert(0, Skipped(model.name, error.message))
        noted[number + 1] = adopter.skipped

    meter.expect(sum(file.size for model in models for file in model.listing.files if file.path in model.paths))
    before = await trio.to_thread.run_sync(_bytes, store)
    async with open_flat_nursery() as nursery:
        for number, model in enumerate(models):
            nursery.start_soon(adopt, number, model)
    after = await trio.to_thread.run_sync(_bytes, store)
    added = [done[number] for number in sorted(done)]
    return Imported(
        added, [one for some in noted for one in some], max(0, after[0] - before[0]), max(0, after[1] - before[1])
    )


def _large(model: Found) -> list[str]:
    """The large files of a model that are here: where they are and what they should be, each once and in order."""
    large = [file for file in model.listing.files if file.path in model.paths and file.size > SMALL_FILE_LIMIT]
    names = {file.identity for file in large if not file.identity.endswith(":")}
    return sorted(names | {os.path.realpath(model.paths[file.path]) for file in large})


def _bytes(store: Store) -> tuple[int, int]:
    return Borrowing(store).bytes(), store.usage().blob_bytes


def check_name(what: str, name: str | None) -> None:
    """Raises UserError for a name where there are many models."""
    if name and what in (HUB_CACHE, OLLAMA):
        raise UserError(f"{what} has many models: --as cannot name them all", hint="leave it out")
