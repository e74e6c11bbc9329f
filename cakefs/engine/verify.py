"""Reading every stored byte again: once, whichever models have it, and for both of the sums that it must have."""

from collections.abc import Collection
from typing import NamedTuple

from cakefs.buffers import page_aligned
from cakefs.engine.jobs import Progress
from cakefs.engine.local import stream
from cakefs.engine.transfer.confirm import Following, complete, confirm_source
from cakefs.errors import CorruptData, NotFound
from cakefs.model import MIB, Literal, Manifest, Source, SpanKey
from cakefs.store.borrowing import Borrowing
from cakefs.store.store import Store


class Repair(NamedTuple):
    """What verify found, in numbers, and one line for each thing that did not hold.

    Attributes:
        bad: What upstream has: dropped by `repair`, and then fetched again.
        lost: What only adding the model again brings back: headers that were synthesized.
    """

    spans: int
    bytes: int
    confirmed: int
    incomplete: int
    bad: list[str]
    lost: list[str]


class Verifier:
    """Reads models of a store. For one thread at a time.

    Args:
        repair: Forget what does not hold, so that it counts as missing.
    """

    def __init__(self, store: Store, *, repair: bool) -> None:
        self._store = store
        self._repair = repair
        self._buffer = page_aligned(4 * MIB)
        self._spans: dict[SpanKey, str] = {}  # those that were read, and what is wrong with them
        self._files: dict[str, bool | None] = {}  # upstream files, whether they have their published hash
        Borrowing(store).forget_lost()  # What is gone there is missing here, not bad.

    def verify(self, manifest: Manifest, progress: Progress) -> Repair:
        """Reads every stored byte of a model again and confirms every complete upstream file of it."""
        bad: list[str] = []
        spans = size = confirmed = incomplete = 0
        for source, keys in zip(manifest.sources, _by_source(manifest), strict=True):
            whole = complete(self._store, source.identity, source.locator.size)
            ok = self._check(source, whole, keys, progress)
            read = [key for key in keys if key in self._spans]
            spans, size = spans + len(read), size + sum(key.size for key in read)
            wrong = [f"{_label(manifest, keys[key])}: {self._spans[key]}" for key in read if self._spans[key]]
            if ok is False:
                wrong.append(f"{source.path}: does not have the published SHA-256; it will be fetched again")
            bad += wrong
            confirmed += ok is True and (bool(source.sha256) or source.identity.startswith("git:"))
            incomplete += bool(source.sha256) and not whole and not wrong
        return Repair(spans, size, confirmed, incomplete, bad, self._lost_literals(manifest))

    def _check(
        self, source: Source, whole: list[SpanKey], wanted: Collection[SpanKey], progress: Progress
    ) -> bool | None:
        """Reads what is wanted of a file and was not read yet; the rest of it, too, where that proves all of it.

        Args:
            whole: All spans of a file that is complete.

        Returns: As `confirm_source`; None, too, for a file of which a byte is known to be wrong.
        """
        identity, size = source.identity, source.locator.size
        following = Following(self._store, identity, size)
        following.over = not whole
        sound = True
        for key in {**dict.fromkeys(whole), **dict.fromkeys(sorted(wanted))}:
            own = key in wanted
            told = progress if own else _nobody
            if key in self._spans:
                told(key.size)
                sound &= not self._spans[key]
            elif self._store.has(key):
                wrong = self._read(key, following, told, repair=self._repair and own)
                sound &= not wrong
                if own or not wrong:  # What is wrong with others is said and mended with the models that have it.
                    self._spans[key] = wrong
        if not sound:
            return None  # The rest of it need not be dropped.
        if identity not in self._files:
            self._files[identity] = confirm_source(self._store, identity, size, again=True, following=following)
        return self._files[identity]

    def _read(self, key: SpanKey, following: Following, progress: Progress, *, repair: bool) -> str:
        """What is wrong with a span; nothing of a good one."""
        record = self._store.catalog.find(key)
        pieces = stream(self._store, key, self._buffer, forget=repair)
        try:
            for piece in following.through(key.start, key.stop, record.digest if record else "", pieces):
                progress(len(piece))
        except CorruptData as error:
            if repair:
                self._store.drop_span(key)
            return error.message
        return ""

    def _lost_literals(self, manifest: Manifest) -> list[str]:
        """Damaged headers, in words; dropped by `repair`, so that the next `add` stores them anew."""
        lost = {}
        for file in manifest.files:
            for segment in file.segments:
                if isinstance(segment, Literal):
                    try:
                        self._store.literal(segment.blob)
                    except (CorruptData, NotFound) as error:
                        lost[segment.blob] = f"header of {file.path}: {error.message}"
        if lost and self._repair:
            for key, digest in self._store.catalog.listing():
                if digest in lost:
                    self._store.drop_span(key)
        return list(lost.values())


def _by_source(manifest: Manifest) -> list[dict[SpanKey, int]]:
    """For each upstream file the spans that are not empty, with their numbers."""
    found: list[dict[SpanKey, int]] = [{} for _ in manifest.sources]
    for number, span in enumerate(manifest.spans):
        if (key := manifest.key(number)).size:
            found[span.source][key] = number
    return found


def _nobody(size: int) -> None:
    """Is told of progress that is not of the model."""


def _label(manifest: Manifest, span: int) -> str:
    source = manifest.sources[manifest.spans[span].source]
    name = next((t.name for t in manifest.tensors if t.span == span), "")
    return f"{name} in {source.path}" if name else source.path
