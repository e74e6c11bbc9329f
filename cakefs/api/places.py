"""Paths as below a mount -> what they stand for in the store. Pure but for adding a model on demand."""

from collections.abc import Mapping
from typing import NamedTuple

from cakefs.engine.serve.library import Library
from cakefs.errors import NotFound
from cakefs.model import File, View
from cakefs.plan.wish import Wish, wish_for

SCHEME = "cakefs://"
ORIGINAL = ".cakefs/original/"


class Place(NamedTuple):
    """Below a model.

    Attributes:
        root: How the path began: nothing, or `.cakefs/original/`.
        inner: Of a file or directory; empty for the model itself.
    """

    root: str
    model: str
    manifest_id: str
    inner: str

    @property
    def view(self) -> View:
        return View.ORIGINAL if self.root else View.MODEL


def plain(path: str) -> str:
    """Without scheme and slashes around it."""
    return path.removeprefix(SCHEME).strip("/")


def locate(path: str, names: Mapping[str, str]) -> Place | None:
    """None where no model has such a name. Args: names: Of all models, with their manifests."""
    root = ORIGINAL if path.startswith(ORIGINAL) else ""
    parts = path[len(root) :].split("/")
    for count in range(len(parts), 0, -1):
        name = "/".join(parts[:count])
        if name in names:
            return Place(root, name, names[name], "/".join(parts[count:]))
    return None


async def find(library: Library, path: str) -> Place:
    """As a look-up below a mount: a model that nobody added is added where that is switched on.

    Raises:
        NotFound: There is no such model, or nothing adds it.
        CakeError: What adding it raised.
    """
    place = locate(path, library.names())
    if place is None:
        wish = _wish(path)
        if wish is None or not library.on_demand:
            hint = f"cakefs add {wish.name}" if wish else "`cakefs ls` says what there is, `cakefs add` brings more"
            raise NotFound(f"no model here for {path!r}", hint=hint)
        await library.demand(wish)
        place = locate(path, library.names())
    if place is None:
        raise NotFound(f"no model here for {path!r}")
    return place


def file_at(library: Library, place: Place) -> File:
    """Raises NotFound for what is no file."""
    files = library.manifest(place.manifest_id).shown(place.view)
    if place.inner not in files:
        what = f"no file {place.inner!r} in" if place.inner else "a directory, and no file:"
        raise NotFound(f"{what} {place.root}{place.model}", hint=f"cakefs show {place.model}")
    return files[place.inner]


def _wish(path: str) -> Wish | None:
    parts = path.removeprefix(ORIGINAL).split("/")
    return wish_for(parts[0], parts[1]) if len(parts) > 1 else None
