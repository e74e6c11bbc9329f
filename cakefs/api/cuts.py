"""An index such as `[3:7, :, ...]` into a tensor -> the byte ranges of it, and where each goes. Pure."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import prod
from types import EllipsisType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Index = int | slice | EllipsisType

# Rows that are no further apart than this are read with what lies between what is wanted of them: a read of a few
# bytes takes as long as one of so many.
NEAR = 64 * 1024
BLOCK = 16 << 20  # How much is read at once in that way.


class Cut(NamedTuple):
    """A box of a tensor.

    Attributes:
        bounds: Per axis, what is taken.
        final: What remains to be indexed of the box: steps, and axes that go.
    """

    bounds: tuple[range, ...]
    final: tuple[int | slice, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(len(bound) for bound in self.bounds)


class Rows(NamedTuple):
    """Rows to be read whole, of which the columns `[first, last)` of each are wanted; all counted in elements.

    Attributes:
        offsets: Where each row begins, rising.
        size: Of a row.
        slots: Number of the first and of the last-plus-one row in the box.
    """

    offsets: NDArray[np.int64]
    size: int
    first: int
    last: int
    slots: tuple[int, int]

    @property
    def whole(self) -> bool:
        return self.last - self.first == self.size

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """Offset in the tensor, offset among the rows, size; rows that touch are one."""
        if not len(self.offsets):
            return
        breaks = np.flatnonzero(np.diff(self.offsets) != self.size) + 1
        starts = [0, *breaks.tolist(), len(self.offsets)]
        for start, stop in pairwise(starts):
            yield int(self.offsets[start]), start * self.size, (stop - start) * self.size


def cut(index: Index | tuple[Index, ...], shape: Sequence[int]) -> Cut:
    """Raises IndexError."""
    given = index if isinstance(index, tuple) else (index,)
    dots = [i for i, one in enumerate(given) if one is Ellipsis]
    if len(dots) > 1 or len(given) - len(dots) > len(shape):
        raise IndexError(f"too many indices for a tensor of shape {list(shape)}")
    at = dots[0] if dots else len(given)
    rest = (slice(None),) * (len(shape) - len(given) + len(dots))
    whole = (*given[:at], *rest, *given[at + 1 :])
    axes = [_axis(one, size, axis) for axis, (one, size) in enumerate(zip(whole, shape, strict=True))]
    return Cut(tuple(bound for bound, _ in axes), tuple(final for _, final in axes))


def _axis(index: Index, size: int, axis: int) -> tuple[range, int | slice]:
    if isinstance(index, slice):
        start, stop, step = index.indices(size)
        if step < 1:
            raise IndexError("a slice with a negative step cannot be read")
        return range(start, max(start, stop)), slice(None, None, step)
    if isinstance(index, EllipsisType) or not hasattr(index, "__index__"):
        raise IndexError(f"{type(index).__name__} cannot index a tensor that was not read: numbers, slices and ...")
    number = index.__index__()
    if not -size <= number < size:
        raise IndexError(f"index {number} is out of bounds for axis {axis} with size {size}")
    number %= size
    return range(number, number + 1), 0


def rows(bounds: Sequence[range], shape: Sequence[int], width: int) -> Iterator[Rows]:
    """What to read of a tensor with elements of so many bytes, in blocks."""
    if not prod(map(len, bounds)):
        return
    partial = [axis for axis, size in enumerate(shape) if len(bounds[axis]) != size]
    axis = partial[-1] if partial else 0
    inner = prod(shape[axis + 1 :])
    size, bound = (shape[axis], bounds[axis]) if shape else (1, range(1))
    offsets = np.zeros(1, np.int64)
    for outer in range(axis):
        steps = np.arange(bounds[outer].start, bounds[outer].stop, dtype=np.int64) * prod(shape[outer + 1 :])
        offsets = (offsets[:, None] + steps).ravel()
    first, last = bound.start * inner, bound.stop * inner
    if len(offsets) == 1 or size * inner * width > NEAR:
        yield Rows(offsets + first, last - first, 0, last - first, (0, len(offsets)))
        return
    block = max(1, BLOCK // (size * inner * width))
    for start in range(0, len(offsets), block):
        part = offsets[start : start + block]
        yield Rows(part, size * inner, first, last, (start, start + len(part)))
