"""Tensors that are scattered over the bytes they are in: strided views, as torch keeps them. Pure, numpy only.

A run of elements of such a view is a few boxes: slices of whole rows, planes and so on, at most two a dimension. What a
read has to look at lies between the first and the last element of its boxes: a few rows for a view that only its inner
dimensions turn, all of the storage for a transposed matrix. `reach` tells how much that can be, so that what would cost
too much is refused when the manifest is made.
"""

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from cakefs.model import ByteRange, Computed, Extent

OP = "gather"
MAX_DIMS = 32  # Of an array of numpy 1.
_WORDS = {1: "u1", 2: "<u2", 4: "<u4", 8: "<u8"}


class Strides(NamedTuple):
    """Lengths and steps of the dimensions, outermost first, in elements; no step is negative."""

    shape: tuple[int, ...]
    steps: tuple[int, ...]


class Box(NamedTuple):
    """Elements of a run that a slice of some dimension holds, the dimensions within being whole.

    Attributes:
        offset: Of its first element in the source.
    """

    offset: int
    strides: Strides

    @property
    def stop(self) -> int:
        return self.offset + sum((n - 1) * step for n, step in zip(*self.strides, strict=True)) + 1


def gather(dtype: str, size: int, source: Extent, strides: Strides) -> Computed:
    """A tensor whose first element is at the beginning of `source` and whose last is at the end."""
    numbers = (*strides.shape, *strides.steps)
    return Computed(OP, dtype, size, (source,), (dtype,), tuple(map(float, numbers)))


def simplified(strides: Strides) -> Strides:
    """The same view with the fewest dimensions: without those of one element, and joined where steps allow it."""
    shape: list[int] = []
    steps: list[int] = []
    for length, step in zip(*strides, strict=True):
        if length == 1:
            continue
        if shape and steps[-1] == length * step:
            shape[-1] *= length
            steps[-1] = step
        else:
            shape.append(length)
            steps.append(step)
    return Strides(tuple(shape) or (1,), tuple(steps) or (1,))


def reach(strides: Strides, run: int) -> int:
    """Elements of the source, at most, between the first and the last one of any `run` elements."""
    most = within = inner = 1
    for length, step in zip(reversed(strides.shape), reversed(strides.steps), strict=True):
        most = max(most, min(length - 1, -(-run // inner)) * step + within)
        within += (length - 1) * step
        inner *= length
    return most


def needed(node: Computed, start: int, stop: int, item: int) -> ByteRange:
    """Bytes of the source, from its beginning, that hold the bytes `[start, stop)` of the result."""
    boxes = list(_boxes(_strides(node), start // item, -(-stop // item)))
    return ByteRange(min(b.offset for b in boxes) * item, max(b.stop for b in boxes) * item)


def gathered(node: Computed, start: int, stop: int, item: int, data: bytes | bytearray | memoryview) -> bytes:
    """The bytes `[start, stop)` of the result, from the bytes that `needed` says."""
    import numpy as np  # 0.1 s: not for those who only make a node

    first = start // item
    boxes = list(_boxes(_strides(node), first, -(-stop // item)))
    base = min(box.offset for box in boxes)
    parts = [
        np.ndarray(
            box.strides.shape, _WORDS[item], data, (box.offset - base) * item, [s * item for s in box.strides[1]]
        )
        for box in boxes
    ]
    return b"".join(part.tobytes() for part in parts)[start - first * item : stop - first * item]


def _strides(node: Computed) -> Strides:
    numbers = tuple(map(int, node.params))
    half = len(numbers) // 2
    return Strides(numbers[:half], numbers[half:])


def _boxes(strides: Strides, first: int, last: int) -> Iterator[Box]:
    """Those of the elements `[first, last)`, which are at least one."""
    shape, steps = strides
    inner = [prod(shape[d + 1 :]) for d in range(len(shape))]
    while first < last:
        d = next(d for d, size in enumerate(inner) if first % size == 0 and first + size <= last)
        at = [first // size % length for size, length in zip(inner, shape, strict=True)]
        count = min((last - first) // inner[d], shape[d] - at[d])
        offset = sum(i * step for i, step in zip(at, steps, strict=True))
        yield Box(offset, Strides((count, *shape[d + 1 :]), steps[d:]))
        first += count * inner[d]
