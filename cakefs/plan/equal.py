"""The spans of several models, of those with equal bytes one for all, as far as `knowledge.py` knows. Pure."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from cakefs.model import Extent, Manifest, SpanKey, leaves
from cakefs.plan.knowledge import Knower, Knowledge, Origin
from cakefs.plan.view import Bytes

LocalBytes = Callable[[SpanKey], int]
"""How much of a span is here."""
Mark = object
"""Equal for equal bytes."""


class Known(NamedTuple):
    """A manifest, and of each of its spans: its name, the one that stands for all with equal bytes, what is here."""

    manifest: Manifest
    keys: list[SpanKey]
    roots: list[SpanKey]
    local: list[int]

    def mark(self, data: Bytes) -> Mark:
        """Equal for tensors whose bytes are known to be equal."""
        if isinstance(data, Extent):
            root = self.roots[data.span]
            return root if data.stop - data.start == root.size else (root, data.start, data.stop)
        return (data.op, data.dtype, data.params, data.dtypes, *map(self.mark, data.inputs))

    def here(self, data: Bytes) -> int:
        """Of what is calculated, the part of its inputs that is here."""
        if isinstance(data, Extent):
            return min(data.stop - data.start, self.local[data.span])
        parts = [(extent.size, self.here(extent)) for extent in leaves(data)]
        needed = sum(size for size, _ in parts)
        return data.size * sum(here for _, here in parts) // needed if needed else data.size


def known_models(manifests: Sequence[Manifest], sources: Sequence[Knowledge], local: LocalBytes) -> list[Known]:
    """Joins the spans that have a name in common."""
    knower = Knower(sources)
    parent: dict[SpanKey, SpanKey] = {}
    named: dict[tuple[int, object], SpanKey] = {}

    def root(key: SpanKey) -> SpanKey:
        while (above := parent[key]) != key:
            parent[key] = key = parent[above]
        return key

    listed = [[manifest.key(span) for span in range(len(manifest.spans))] for manifest in manifests]
    for key in (key for keys in listed for key in keys):
        if key not in parent:
            parent[key] = key
            for name in knower.marks(Origin(key.size, key))[1:]:  # the first is the key itself
                other = named.setdefault((key.size, name), key)
                if other is not key:
                    parent[root(key)] = root(other)
    return [
        Known(manifest, keys, [root(key) for key in keys], [local(key) for key in keys])
        for manifest, keys in zip(manifests, listed, strict=True)
    ]
