"""The order of rows that llama's original weights have: within each head the halves alternate. Pure.

Hugging Face keeps the rows of q and k of a head as two halves; row `2 j` of a head is row `j` of the first half, row
`2 j + 1` row `j` of the second. So any run of rows takes at most two runs of the input per head that it cuts, and whole
heads take themselves.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from numpy.typing import NDArray

OP = "interleave"


class Rows(NamedTuple):
    """`total` rows in `heads` heads, each of an even number of them."""

    heads: int
    total: int

    @property
    def head(self) -> int:
        return self.total // self.heads


class Step(NamedTuple):
    """A run of rows of the result.

    Attributes:
        taken: Runs of rows of the input: one of whole heads, or the two halves of a part of one.
        half: Rows of half a head.
        skip: Rows at the front of what the halves give that are not wanted; `kept` are.
    """

    taken: tuple[tuple[int, int], ...]
    half: int
    skip: int
    kept: int

    def arrange(self, inputs: "Sequence[NDArray[Any]]") -> "NDArray[Any]":
        """The rows of the result, from those of `taken`."""
        import numpy as np  # 0.1 s: not for those who only make a node

        width = inputs[0].shape[1]
        if len(inputs) == 1:
            return inputs[0].reshape(-1, 2, self.half, width).swapaxes(1, 2).reshape(-1, width)
        rows = np.stack(tuple(inputs), axis=1).reshape(-1, width)
        return rows[self.skip : self.skip + self.kept]


def steps(rows: Rows, start: int, stop: int) -> Iterator[Step]:
    """The rows `[start, stop)` of the result."""
    size, half = rows.head, rows.head // 2
    while start < stop:
        head, first = divmod(start, size)
        whole = (stop - start) // size if first == 0 else 0
        if whole:
            yield Step(((start, start + whole * size),), half, 0, whole * size)
            start += whole * size
            continue
        last = min(stop - head * size, size)
        a, b = head * size + first // 2, head * size + -(-last // 2)
        yield Step(((a, b), (a + half, b + half)), half, first % 2, last - first)
        start = head * size + last
