"""What a disk does to the files of a store, and to those that it borrows from: bytes flip, files are cut, grow, go, or
are found in each other's place."""

import os
import random
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from cakefs.model import CHUNK, SpanKey
from cakefs.store.store import Store
from tests.crash.place import LARGE, ONE, Place, published
from tests.crash.scenarios import ALL
from tests.store_child import flip

PAGE = 4096
# Kinds of LMDB's pages, by the flags in their headers (lmdb.h, mdb.c: P_BRANCH and so on).
KINDS = {"branch": 1, "leaf": 2, "overflow": 4, "meta": 8}
_HEADER = struct.Struct("<QHHI")  # number of the page, padding, flags, how many pages


class Damage(NamedTuple):
    """Attributes:
    base: As of a scenario.
    hurt: What becomes of the store.
    prepare: Before it is hurt.
    heals: Names whose bytes can be had again, afterwards.
    ends: Whether who reads it may be ended by a signal, as LMDB's pages have no checksums.
    """

    base: str
    hurt: Callable[[Place], object]
    prepare: Callable[[Place], object] = lambda place: None
    heals: tuple[str, ...] = ALL
    ends: bool = False


# What happens to files


def middle(paths: list[Path]) -> None:
    for path in paths:
        flip(path, path.stat().st_size // 2)


def first(paths: list[Path]) -> None:
    for path in paths:
        flip(path, 0)


def cut(paths: list[Path]) -> None:
    for path in paths:
        os.truncate(path, path.stat().st_size // 2)


def empty(paths: list[Path]) -> None:
    for path in paths:
        os.truncate(path, 0)


def grow(paths: list[Path]) -> None:
    for path in paths:
        os.truncate(path, path.stat().st_size + 8)


def delete(paths: list[Path]) -> None:
    for path in paths:
        path.unlink()


def swap(paths: list[Path]) -> None:
    """Each is where its neighbour was; those of the same size are neighbours."""
    ordered = sorted(paths, key=lambda path: path.stat().st_size)
    contents = [path.read_bytes() for path in ordered]
    for path, data in zip(ordered, contents[1:] + contents[:1], strict=True):
        path.chmod(0o600)
        path.write_bytes(data)


HURTS = [middle, first, cut, empty, grow, delete, swap]


# To which files


def blobs(place: Place) -> list[Path]:
    return sorted((place.store / "blobs").glob("??/*"))


def partial(pattern: str) -> Callable[[Place], list[Path]]:
    return lambda place: sorted((place.store / "partial").glob(pattern))


def on(files: Callable[[Place], list[Path]], hurt: Callable[[list[Path]], None]) -> Callable[[Place], None]:
    def both(place: Place) -> None:
        paths = files(place)
        assert paths
        hurt(paths)

    return both


def begin(place: Place) -> None:
    """Partials: one that lacks a chunk, one that is whole and not sealed."""
    with Store.open(place.store) as store:
        for name, chunks in ((LARGE, 1), (ONE, 9)):
            manifest = store.catalog.models.manifest(store.catalog.models.all()[name].manifest)
            for index, span in enumerate(manifest.spans):
                key = manifest.key(index)
                data = published()[name].get(manifest.sources[span.source].path, b"")[key.start : key.stop]
                if not store.has(key) and len(data) > CHUNK // 16:
                    for at in range(0, len(data), CHUNK)[:chunks]:
                        store.write_chunk(key, at // CHUNK, data[at : at + CHUNK])


# The catalog


def catalog(place: Place) -> Path:
    return place.store / "catalog/data.mdb"


def fill(place: Place) -> None:
    """So that tables have more pages than one, and a row that is longer than a page."""
    with Store.open(place.store) as store:
        spans = [(SpanKey(f"sha256:{n:064}", 0, 8), struct.pack("<Q", n)) for n in range(400)]
        store.put_spans([*spans, (SpanKey("sha256:long", 0, 3000), bytes(3000))])


def pages(path: Path, kind: str) -> Iterable[int]:
    data, at = path.read_bytes(), 0
    while at < len(data):
        _, _, flags, count = _HEADER.unpack_from(data, at)
        if flags & KINDS[kind]:
            yield at
        at += PAGE * (max(1, count) if flags & KINDS["overflow"] and at >= 2 * PAGE else 1)


def page(kind: str, number: int, write: Callable[[int], bytes]) -> Callable[[Place], None]:
    """Other bytes in one page of that kind."""

    def hurt(place: Place) -> None:
        found = list(pages(catalog(place), kind))
        assert found, f"no page is a {kind}"
        with catalog(place).open("r+b") as file:
            file.seek(found[number % len(found)])
            file.write(write(PAGE))

    return hurt


def swap_pages(one: int, other: int, *, numbered: bool) -> Callable[[Place], None]:
    """Two pages of trees change places; `numbered`: each has the number of its new place, as it should."""

    def hurt(place: Place) -> None:
        found = [at for kind in ("leaf", "branch") for at in pages(catalog(place), kind)]
        first, second = found[one % len(found)], found[other % len(found)]
        data = catalog(place).read_bytes()
        kept = 8 if numbered else 0
        with catalog(place).open("r+b") as file:
            for to, of in ((first, second), (second, first)):
                file.seek(to + kept)
                file.write(data[of + kept : of + PAGE])

    return hurt


def noise(size: int) -> bytes:
    return random.Random(8).randbytes(size)


def bits(seed: int) -> Callable[[Place], None]:
    """A few bits, anywhere."""

    def hurt(place: Place) -> None:
        dice = random.Random(seed)
        for _ in range(3):
            flip(catalog(place), dice.randrange(2 * PAGE, catalog(place).stat().st_size))

    return hurt


# The small ones


def spoil(*names: str) -> Callable[[Place], None]:
    def hurt(place: Place) -> None:
        for name in names:
            (place.store / name).parent.mkdir(parents=True, exist_ok=True)
            (place.store / name).write_bytes(noise(5000))

    return hurt


DAMAGES = {f"blobs-{hurt.__name__}": Damage("pulled", on(blobs, hurt)) for hurt in HURTS}
DAMAGES |= {
    f"partial-{suffix}-{hurt.__name__}": Damage("added", on(partial(f"*.{suffix}"), hurt), begin, (ONE, LARGE))
    for suffix in ("data", "map")
    for hurt in (middle, cut, delete, swap)
}
DAMAGES |= {
    f"page-{kind}-{write.__name__}": Damage("pulled", page(kind, number, write), fill, ends=True)
    for number, kind in enumerate([*KINDS, "meta"])
    for write in (bytes, noise)
}
DAMAGES |= {
    f"pages-{'numbered' if numbered else 'swapped'}-{one}-{other}": Damage(
        "pulled", swap_pages(one, other, numbered=numbered), fill, ends=True
    )
    for numbered in (False, True)
    for one, other in ((10, 9), (10, 4), (16, 4), (1, 29))
}
DAMAGES |= {f"bits-{seed}": Damage("pulled", bits(seed), ends=True) for seed in range(4)}
DAMAGES |= {
    "backup": Damage("pulled", spoil("backup/data.mdb", "backup/new/data.mdb")),
    "leases": Damage("pulled", spoil("run/dead/lock", "run/dead/sha256:00", "run/odd/nothing")),
    "lock-of-lmdb": Damage("pulled", spoil("catalog/lock.mdb")),
}
