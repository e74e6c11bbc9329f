"""Strided views gathered on read: any run of bytes, against numpy's own view."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cakefs.model import Computed, Extent
from cakefs.plan.compute import evaluate, needs
from cakefs.plan.gather import Strides, gather, needed, reach, simplified

DTYPES = {1: "U8", 2: "BF16", 4: "F32", 8: "I64"}


@st.composite
def views(draw: st.DrawFn) -> tuple[Strides, int]:
    dims = draw(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 9)), max_size=4))
    return Strides(tuple(n for n, _ in dims), tuple(s for _, s in dims)), draw(st.sampled_from(list(DTYPES)))


def made(strides: Strides, item: int) -> tuple[Computed, bytes, bytes]:
    """The node, its source, and the result as numpy sees it."""
    count = sum((n - 1) * s for n, s in zip(*strides, strict=True)) + 1
    source = np.random.default_rng(count).bytes(count * item)
    view = np.ndarray(strides.shape, f"V{item}", source, 0, [s * item for s in strides.steps])
    node = gather(DTYPES[item], view.size * item, Extent(3, 7, 7 + len(source)), simplified(strides))
    return node, source, view.tobytes()


@given(views(), st.data())
def test_any_run_of_bytes(view: tuple[Strides, int], data: st.DataObject) -> None:
    strides, item = view
    node, source, whole = made(strides, item)
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = data.draw(st.integers(start + 1, len(whole)))
    (need,) = needs(node, start, stop)
    assert need.extent == Extent(3, 7, 7 + len(source)) and 7 <= need.start < need.stop <= 7 + len(source)
    assert evaluate(node, start, stop, [source[need.start - 7 : need.stop - 7]]) == whole[start:stop]
    run = -(-stop // item) - start // item
    assert need.stop - need.start <= reach(simplified(strides), run) * item


@given(views(), st.integers(0, 100))
def test_below_other_calculations(view: tuple[Strides, int], seed: int) -> None:
    """As a merge scales what a torch checkpoint keeps turned around."""
    strides, _ = view
    node, _, whole = made(strides, 4)
    values = np.random.default_rng(seed).standard_normal(len(whole) // 4).astype("<f4")
    count = (node.inputs[0].size) // 4
    source = np.zeros(count, "<f4")
    turned = np.ndarray(strides.shape, "<f4", source.data, 0, [s * 4 for s in strides.steps])
    if len(set(np.ndarray(strides.shape, "<i8", np.arange(count).data, 0, [s * 8 for s in strides.steps]).flat)) < len(
        values
    ):
        return  # elements that are the same one
    turned[...] = values.reshape(strides.shape)
    scaled = Computed("scale", "F32", len(whole), (node,), ("F32",), (0.5,))
    (need,) = needs(scaled, 0, len(whole))
    assert evaluate(scaled, 0, len(whole), [source.tobytes()[need.start - 7 : need.stop - 7]]) == (values / 2).tobytes()


@pytest.mark.parametrize(
    ("strides", "fewest"),
    [
        (Strides((2, 3, 4), (12, 4, 1)), Strides((24,), (1,))),
        (Strides((4, 3), (1, 4)), Strides((4, 3), (1, 4))),
        (Strides((1, 5, 1), (99, 2, 7)), Strides((5,), (2,))),
        (Strides((3, 4, 5), (0, 5, 1)), Strides((3, 20), (0, 1))),
        (Strides((), ()), Strides((1,), (1,))),
    ],
)
def test_simplified(strides: Strides, fewest: Strides) -> None:
    assert simplified(strides) == fewest


def test_a_read_of_inner_turns_looks_at_few_rows() -> None:
    """Convolutions in channels-last order: a read needs its own kernels; a transposed matrix all of its storage."""
    conv = simplified(Strides((512, 256, 3, 3), (256 * 9, 1, 3 * 256, 256)))
    assert reach(conv, 1024) <= 2 * 256 * 9
    assert reach(Strides((1000, 2000), (1, 1000)), 10) > 1_900_000
    node = gather("F32", 512 * 256 * 9 * 4, Extent(0, 0, 512 * 256 * 9 * 4), conv)
    assert needed(node, 0, 4096, 4).size <= 2 * 256 * 9 * 4
