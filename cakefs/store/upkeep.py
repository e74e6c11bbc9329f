"""Work that grows with the store, and so is done only on demand: counting what is in it, clearing what crashes left."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cakefs.model import SpanKey
from cakefs.store.blobs import Blobs
from cakefs.store.catalog import Catalog
from cakefs.store.files import locked, translated, unlink
from cakefs.store.partial import Partial, map_paths, partial_name, read_key


class Usage(NamedTuple):
    """Attributes:
    blob_bytes: Of all blobs that are ours, inline ones included.
    partial_bytes: What partials take on disk.
    quarantine_bytes: Of blobs that were found wrong or damaged, and replaced; on disk.
    """

    blob_bytes: int
    blob_count: int
    partial_bytes: int
    quarantine_bytes: int


def usage(catalog: Catalog, directory: Path, quarantine: Path) -> Usage:
    borrowed = catalog.borrowed.digests()
    sizes = [size for digest, size, _ in catalog.blobs() if digest not in borrowed]
    set_aside = sum(map(_disk_size, quarantine.iterdir()))
    return Usage(sum(sizes), len(sizes), sum(size for _, size in partials(directory)), set_aside)


def partials(directory: Path) -> Iterator[tuple[SpanKey, int]]:
    with translated(f"read {directory}"):
        for path in map_paths(directory):
            key = read_key(path)
            if key is not None:
                yield key, _partial_size(path)


def sweep_partials(catalog: Catalog, directory: Path) -> int:
    """Removes partials of sealed spans, those without a single chunk, and those whose map says nothing."""
    return sum(_sweep_partial(catalog, path) for path in map_paths(directory))


def _sweep_partial(catalog: Catalog, path: Path) -> int:
    size = _partial_size(path)
    key = read_key(path)
    if key is None or partial_name(key) != path.stem:
        return size if _remove_broken(path) else 0
    partial = Partial.lock(path.parent, key, create=False)
    if partial is None:
        return 0
    with partial:
        if any(partial.sums) and not catalog.recorded([key]):
            return 0
        partial.discard()
    return size


def _remove_broken(path: Path) -> bool:
    """Removes a partial whose map says nothing, if it still does once we have the lock."""
    with locked(path):
        key = read_key(path)
        if key is not None and partial_name(key) == path.stem:
            return False
        for suffix in (".copy", ".data", ".map"):
            unlink(path.with_suffix(suffix))
    return True


def sweep_blobs(catalog: Catalog, blobs: Blobs) -> int:
    """Removes files without a record, and records without a file."""
    with blobs.names():
        files = dict(blobs.files())
        in_file = {digest for digest, _, inline in catalog.blobs() if not inline} - catalog.borrowed.digests()
        freed = sum(_remove(path) for digest, path in files.items() if digest not in in_file)
        catalog.drop_blobs(in_file - files.keys())
        return freed


def sweep_directory(directory: Path) -> int:
    return sum(map(_remove, directory.iterdir()))


def _remove(path: Path) -> int:
    size = _disk_size(path)
    unlink(path)
    return size


def _partial_size(path: Path) -> int:
    return _disk_size(path) + _disk_size(path.with_suffix(".data"))


def _disk_size(path: Path) -> int:
    try:
        return os.stat(path).st_blocks * 512
    except FileNotFoundError:
        return 0
