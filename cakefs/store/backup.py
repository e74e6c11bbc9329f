"""A copy of the catalog, from which one that broke is made again: which bytes belong where is written nowhere else.

    backup/data.mdb     the catalog as it was some minutes ago
    backup/new/         the next copy, while it is made; or one that is tried out

A copy that is old does no harm: each of its rows is checked against what is there when it is used (sums of chunks,
sizes, stamps of borrowed files). What was added or sealed since then is not in it, and is added or fetched again.
"""

import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cakefs.errors import CakeError, CorruptData
from cakefs.store.catalog import Catalog
from cakefs.store.files import locked, sync_directories, sync_file
from cakefs.store.pages import check_pages

RATE = 1 << 20  # Bytes of catalog for which a copy is not made again within a second: a large one is copied seldom.
HINT = "cakefs verify --repair"

_log = logging.getLogger("cakefs.store")


def copy_path(store: Path) -> Path:
    return store / "backup" / "data.mdb"


def keep(store: Path, catalog: Catalog) -> None:
    """Makes a copy, if there is news and no recent one. One that cannot be made (a full disk) is made another time."""
    if catalog.readonly or not catalog.changed or _is_recent(copy_path(store), catalog.used_bytes):
        return
    try:
        with scratch(store) as new:
            catalog.copy(new)
            check(new)
            os.chmod(new / "data.mdb", 0o600)
            sync_file(new / "data.mdb")
            os.replace(new / "data.mdb", copy_path(store))
            sync_directories([new.parent, store])
    except (CakeError, OSError) as error:
        _log.info("no copy of the catalog: %s", error)


@contextmanager
def scratch(store: Path) -> Iterator[Path]:
    """An empty directory for a catalog that is looked at, ours alone, and gone afterwards."""
    new = store / "backup" / "new"
    new.parent.mkdir(mode=0o700, exist_ok=True)
    with locked(store / "backup.lock"):
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700)
        try:
            yield new
        finally:
            shutil.rmtree(new, ignore_errors=True)


def sweep(store: Path) -> None:
    """Removes what a crash left of a copy that was being made."""
    if (new := store / "backup" / "new").exists():
        with locked(store / "backup.lock"):  # else somebody is making one
            shutil.rmtree(new, ignore_errors=True)


def check(directory: Path) -> None:
    """Reads all of a catalog. Raises CorruptData; a badly broken one may end the process."""
    with opened(directory) as catalog:
        catalog.walk()


def try_out(directory: Path, empty: Path) -> None:
    """Looks at the pages of a catalog, and changes all of it, in a copy of its file: pages that took each other's
    place, or are in use and free, are not met before that. Raises CorruptData, or ends the process, as `check` may."""
    with opened(directory) as catalog:
        catalog.copy_file(empty)
    check_pages(empty / "data.mdb")
    with opened(empty) as catalog:
        before = catalog.digest()
        catalog.rewrite()
        catalog.walk()
        if catalog.digest() != before:
            raise CorruptData(f"catalog {directory} is broken: it does not keep what is written", hint=HINT)


@contextmanager
def opened(directory: Path) -> Iterator[Catalog]:
    catalog = Catalog.open(directory)
    try:
        yield catalog
    finally:
        catalog.close()


def check_present(store: Path) -> None:
    """Raises CorruptData for a catalog that vanished: a new, empty one must not take its place unasked."""
    data = store / "catalog" / "data.mdb"
    if copy_path(store).exists() and not (data.exists() and data.stat().st_size):
        raise CorruptData(f"catalog {data.parent} is gone", hint=HINT)


def put_back(store: Path) -> Path | None:
    """Sets the broken catalog aside, and the copy in its place; an empty one where there is no copy. Nobody else may
    have the store open.

    Returns: What was set aside.
    """
    data, copy = store / "catalog" / "data.mdb", store / "catalog" / "copy.mdb"
    aside = store / f"catalog-broken-{time.time_ns()}.mdb"
    if copy_path(store).exists():
        shutil.copy(copy_path(store), copy)  # with its mode
        sync_file(copy)
    if data.exists():
        os.link(data, aside)
        sync_directories([store])  # before its other name goes
    if copy.exists():
        os.replace(copy, data)
    else:
        data.unlink(missing_ok=True)
    sync_directories([data.parent])
    return aside if aside.exists() else None


def drop_copy(store: Path) -> bool:
    """It is broken, too, or its room is needed. Returns: False when there is none."""
    try:
        copy_path(store).unlink()
    except FileNotFoundError:
        return False
    return True


def _is_recent(path: Path, size: int) -> bool:
    try:
        age = time.time() - path.stat().st_mtime
    except OSError:
        return False
    return 0 <= age < size / RATE
