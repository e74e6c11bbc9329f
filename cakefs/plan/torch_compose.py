"""Torch checkpoints in a manifest: the pieces that a published one is stored in, and the safetensors made of it. Pure.

A checkpoint is stored as its storages and what is between them. A storage whose tensors lie in it one after the other
is cut between them, so that each is a piece of its own, equal to that tensor in whatever file; one whose tensors
overlap, or are scattered over it, is a single piece.

The safetensors file has the bytes that the official writer would emit for `torch.load(weights_only=True)`. A tensor is
its piece or a part of one, a strided view is gathered when it is read, and tensors that share a storage are repeated:
a safetensors file cannot say that two are one.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

from cakefs.errors import InvalidFormat
from cakefs.formats.safetensors import TensorSpec, build_header, canonical_key
from cakefs.formats.strictjson import brief
from cakefs.formats.torchckpt import Checkpoint, TensorView
from cakefs.model import (
    COMPUTED,
    MIB,
    ByteRange,
    Computed,
    Digest,
    Extent,
    File,
    Literal,
    Segment,
    TensorInfo,
    View,
)
from cakefs.plan.gather import MAX_DIMS, Strides, gather, reach, simplified

REACH_LIMIT = 64 * MIB  # Bytes that a read of 1 MiB of a strided view may have to look at.


def piece_ranges(found: Checkpoint, file_size: int) -> list[ByteRange]:
    """What a published checkpoint is stored as, without gap."""
    cuts = {0, file_size}
    views: dict[str, list[TensorView]] = {}
    for view in found.tensors:
        views.setdefault(view.storage, []).append(view)
    for key, place in found.storages.items():
        if place.size:
            cuts.update(place, _cuts(place, views.get(key, [])))
    return [ByteRange(*pair) for pair in pairwise(sorted(cuts))]


def _cuts(place: ByteRange, views: Iterable[TensorView]) -> set[int]:
    """Where tensors begin and end in a storage; nothing where they overlap or are scattered."""
    ranges: set[tuple[int, int]] = set()
    for view in views:
        if not view.contiguous:
            return set()
        if view.size:
            ranges.add((view.offset * view.item, view.offset * view.item + view.size))
    if any(one[1] > following[0] for one, following in pairwise(sorted(ranges))):
        return set()
    return {place.start + at for pair in ranges for at in pair}


class StoredCheckpoint:
    """A checkpoint among the spans of a manifest.

    Args:
        pieces: As `piece_ranges` has them.
        first: The span of the first piece; the others follow.
    """

    def __init__(self, path: str, found: Checkpoint, pieces: Sequence[ByteRange], first: int) -> None:
        self.path = path
        self.views = {view.name: view for view in found.tensors}
        self._storages = found.storages
        self._pieces = pieces
        self._starts = [piece.start for piece in pieces]
        self._first = first

    def tensor(self, view: TensorView) -> TensorInfo:
        """Raises InvalidFormat for a view that cannot be gathered at a bounded cost."""
        data = self._data(view)
        whole = isinstance(data, Extent) and data.size == self._pieces[data.span - self._first].size
        if isinstance(data, Extent) and whole and data.size:
            return TensorInfo(view.name, view.dtype, view.shape, data.span)
        return TensorInfo(view.name, view.dtype, view.shape, COMPUTED, data)

    def _data(self, view: TensorView) -> Extent | Computed:
        if not view.size:
            return Extent(self._first, 0, 0)
        start = self._storages[view.storage].start + view.offset * view.item
        if view.contiguous:
            return self._extent(start, start + view.size)
        strides = simplified(Strides(view.shape, view.stride))
        if reach(strides, MIB // view.item) * view.item > REACH_LIMIT or len(strides.shape) > MAX_DIMS:
            size = f"{view.size} bytes with strides {brief(view.stride)}"
            raise InvalidFormat(f"checkpoint {self.path}: tensor {brief(view.name)} of {size} is too scattered to show")
        last = sum((n - 1) * step for n, step in zip(*strides, strict=True))
        source = self._extent(start, start + (last + 1) * view.item)
        return gather(view.dtype, view.size, source, strides)

    def _extent(self, start: int, stop: int) -> Extent:
        piece = bisect_right(self._starts, start) - 1
        begin = self._starts[piece]
        return Extent(self._first + piece, start - begin, stop - begin)


def chosen_views(
    origin: str, weight_map: Mapping[str, str] | None, stored: Mapping[str, StoredCheckpoint]
) -> list[tuple[StoredCheckpoint, TensorView]]:
    """The tensors of a checkpoint, or those that an index names, in the order of the official writer.

    Raises InvalidFormat, naming the index, for a tensor that is not where it says.

    Args:
        weight_map: Tensor -> path in the repository; None where `origin` is no index.
        stored: By path.
    """
    if weight_map is None:
        found = [(stored[origin], view) for view in stored[origin].views.values()]
    else:
        found = []
        for name, path in weight_map.items():
            view = stored[path].views.get(name) if path in stored else None
            if view is None:
                raise InvalidFormat(f"index {origin}: tensor {brief(name)} is not in {brief(path)}")
            found.append((stored[path], view))
    found.sort(key=lambda pair: canonical_key(_spec(pair[1])))
    return found


def converted_file(
    path: str,
    views: Sequence[tuple[StoredCheckpoint, TensorView]],
    put_literal: Callable[[bytes], Digest],
) -> tuple[File, list[TensorInfo]]:
    """The safetensors file of some tensors, and those tensors. Raises InvalidFormat."""
    header = build_header((_spec(view) for _, view in views), {"format": "pt"}, path)
    tensors = [checkpoint.tensor(view) for checkpoint, view in views]
    segments: list[Segment] = [Literal(put_literal(header), len(header))]
    segments += [t.data or Extent(t.span, 0, view.size) for t, (_, view) in zip(tensors, views, strict=True)]
    return File(path, sum(s.size for s in segments), View.MODEL, tuple(segments)), tensors


def _spec(view: TensorView) -> TensorSpec:
    return TensorSpec(view.name, view.dtype, view.shape)
