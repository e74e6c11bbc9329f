"""`cakefs://org/name/model.safetensors` for whatever speaks fsspec. Read-only; paths are those below a mount.

A look at an unknown `org/name` adds it where a mount would (`on_demand`); listings show what is known.
"""

import errno
import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, NoReturn, TypeVar

from fsspec.spec import AbstractFileSystem

from cakefs.api import files
from cakefs.api.places import ORIGINAL, file_at, find, locate, plain
from cakefs.api.session import session
from cakefs.engine.serve.library import Library
from cakefs.errors import AccessDenied, CakeError, NotFound

Entry = dict[str, Any]
T = TypeVar("T")


class CakeFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """The models here, as `fsspec.filesystem("cakefs")`. Settings are those of the command line."""

    protocol = "cakefs"
    root_marker = ""

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        return plain(os.fspath(path))

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        path = self._strip_protocol(path)
        entries = _asked(path, lambda library: _listed(library, path))
        return entries if detail else [entry["name"] for entry in entries]

    def info(self, path: str, **_: Any) -> Entry:
        path = self._strip_protocol(path)
        return _asked(path, lambda library: _info(library, path))

    def exists(self, path: str, **_: Any) -> bool:
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True

    def created(self, path: str) -> datetime:
        """When the model was added, in this revision."""
        return datetime.fromtimestamp(self.info(path)["created"], UTC)

    modified = created

    def ukey(self, path: str) -> str:
        """Another one when the file is another one."""
        path = self._strip_protocol(path)

        async def key(library: Library) -> str:
            place = await find(library, path)
            return f"{place.manifest_id}/{place.root}{place.inner}"

        return _asked(path, key)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        path = self._strip_protocol(path)
        with _translated(path), files.open(path, buffering=1) as file:
            first, last, _step = slice(start, end).indices(file.size)
            file.seek(first)
            return file.read(max(0, last - first))

    def _open(self, path: str, mode: str = "rb", **_: Any) -> files.BufferedFile:
        if mode != "rb":
            _refuse(path)
        with _translated(path):
            return files.open(path)

    def _refused(self, path: Any, *_: Any, **__: Any) -> NoReturn:
        _refuse(path)

    mkdir = makedirs = rmdir = rm = rm_file = _rm = cp_file = mv = pipe_file = put_file = touch = _refused


def _refuse(path: Any) -> NoReturn:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))


def _asked(path: str, question: Callable[[Library], Awaitable[T]]) -> T:
    with _translated(path):
        return session().call(question)


@contextmanager
def _translated(path: str) -> Iterator[None]:
    """fsspec and all above it know the errors of the operating system."""
    try:
        yield
    except NotFound as error:
        raise FileNotFoundError(errno.ENOENT, error.message, path) from error
    except AccessDenied as error:
        raise PermissionError(errno.EACCES, f"{error.message} ({error.hint})", path) from error
    except CakeError as error:
        raise OSError(error.errno, error.message, path) from error


async def _listed(library: Library, path: str) -> list[Entry]:
    names = library.names()
    if locate(path, names) is None:
        above = _names_below(path, names)
        if above or not path:
            return above
    place = await find(library, path)
    found = library.manifest(place.manifest_id).shown(place.view)
    if place.inner in found:
        return [await _info(library, path)]
    start = f"{place.inner}/" if place.inner else ""
    below = {name[len(start) :].split("/")[0] for name in found if name.startswith(start)}
    if not below:
        raise NotFound(f"nothing at {path!r}")
    return [await _info(library, f"{path}/{name}") for name in sorted(below)]


def _names_below(path: str, names: Any) -> list[Entry]:
    """Directories that only lead to models."""
    root = ORIGINAL if f"{path}/".startswith(ORIGINAL) else ""
    start = "" if f"{path}/" in (ORIGINAL, "/") else f"{path[len(root) :]}/"
    below = {name[len(start) :].split("/")[0] for name in names if name.startswith(start)}
    return [_directory(f"{root}{start}{name}") for name in sorted(below)]


async def _info(library: Library, path: str) -> Entry:
    names = library.names()
    if not path or (locate(path, names) is None and _names_below(path, names)):
        return _directory(path)
    place = await find(library, path)
    manifest = library.manifest(place.manifest_id)
    shown = manifest.shown(place.view)
    if place.inner and place.inner not in shown:
        if any(name.startswith(f"{place.inner}/") for name in shown):
            return _directory(path) | {"created": manifest.created}
        file_at(library, place)  # raises
    if not place.inner:
        return _directory(path) | {"created": manifest.created, "origin": manifest.origin}
    return {"name": path, "size": shown[place.inner].size, "type": "file", "created": manifest.created}


def _directory(path: str) -> Entry:
    return {"name": path, "size": 0, "type": "directory"}
