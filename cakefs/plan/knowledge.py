"""What is known of bytes without a look at them: names, from any number of sources. Pure.

Two spans that have a name in common have equal bytes. Where a kind of name is *exact*, two different names of that kind
mean different bytes. A source may only repeat what somebody else *claims*; what rests on that is told apart, and is
never a reason to put bytes under a name (`plan/pullplan.py` says what is).

Everything that tells equal bytes is one `Knowledge`: the store's own index, SHA-256s that we computed, imported
hashes.json. One more, say the reconstruction terms of Xet (not exact: the same bytes can be cut in many ways) or a
registry (exact, claimed), is one more item of the list. That equal source identities with equal bounds are equal bytes
needs no source.
"""

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import NamedTuple, Protocol

from cakefs.model import Extent, Manifest, SpanKey
from cakefs.plan.view import Bytes, byte_keys


class Knowledge(Protocol):
    """Names for the bytes of whole spans. `exact` is the same for all sources of a kind."""

    @property
    def kind(self) -> str:
        """What the names are, such as `sha256`."""
        ...

    @property
    def exact(self) -> bool:
        """Whether different names mean different bytes."""
        ...

    @property
    def claimed(self) -> bool:
        """Whether somebody else says so, and it was not checked here."""
        ...

    def name(self, key: SpanKey) -> str | None: ...


class Names(NamedTuple):
    """A source that is a table."""

    kind: str
    table: Mapping[SpanKey, str]
    exact: bool = True
    claimed: bool = False

    def name(self, key: SpanKey) -> str | None:
        return self.table.get(key)


class Relation(StrEnum):
    EQUAL = "equal"
    DIFFERENT = "different"
    UNKNOWN = "unknown"


class Comparison(NamedTuple):
    """`claimed`: it rests on what somebody else said."""

    relation: Relation
    claimed: bool


class Origin(NamedTuple):
    """Some bytes: how many, and where they come from. Equal places are equal bytes; a whole span has names, too."""

    size: int
    place: SpanKey | tuple[object, ...]


_EQUAL, _DIFFERENT, _UNKNOWN = (Comparison(relation, False) for relation in Relation)
_SAID_EQUAL, _SAID_DIFFERENT = (Comparison(relation, True) for relation in (Relation.EQUAL, Relation.DIFFERENT))


def origin_of(manifest: Manifest, data: Bytes) -> Origin:
    """Of the bytes of a tensor. Parts of a span, and what is calculated, have no names of their own."""
    if isinstance(data, Extent):
        span = manifest.spans[data.span]
        if data.stop - data.start == span.stop - span.start:
            return Origin(data.stop - data.start, manifest.key(data.span))
    return Origin(data.size, byte_keys(manifest, data))


class Knower:
    """Answers from a list of sources. Of sources of one kind, the earlier one is believed."""

    def __init__(self, sources: Iterable[Knowledge]) -> None:
        self._kinds: dict[str, list[Knowledge]] = {}
        for source in sources:
            self._kinds.setdefault(source.kind, []).append(source)

    def compare(self, a: Origin, b: Origin) -> Comparison:
        """Whether the bytes are equal. What was checked here decides before what is claimed."""
        if a.size != b.size:
            return _DIFFERENT
        if not a.size or a.place == b.place:
            return _EQUAL
        said = _UNKNOWN
        if not (isinstance(a.place, SpanKey) and isinstance(b.place, SpanKey)):
            return said
        for sources in self._kinds.values():
            one, other = _name(sources, a.place), _name(sources, b.place)
            if one is None or other is None or (one[0] != other[0] and not sources[0].exact):
                continue
            equal, claimed = one[0] == other[0], one[1] or other[1]
            if not claimed:
                return _EQUAL if equal else _DIFFERENT
            if said is _UNKNOWN:
                said = _SAID_EQUAL if equal else _SAID_DIFFERENT
        return said

    def marks(self, origin: Origin) -> list[object]:
        """Any of them in common with those of other bytes of that size: the two are equal, or claimed to be."""
        names: list[object] = [origin.place]
        if isinstance(origin.place, SpanKey):
            for kind, sources in self._kinds.items():
                if (found := _name(sources, origin.place)) is not None:
                    names.append((kind, found[0]))
        return names


def _name(sources: Iterable[Knowledge], key: SpanKey) -> tuple[str, bool] | None:
    for source in sources:
        if (name := source.name(key)) is not None:
            return name, source.claimed
    return None
