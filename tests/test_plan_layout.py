"""Which stored bytes answer a read: compared with slicing the file's bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cakefs.model import ByteRange, Extent, File, Literal, Locator, Manifest, Segment, Source, Span, TensorInfo, View
from cakefs.plan.layout import Kind, Layout, Piece, header_segments

SPAN = 20
SPANS = [bytes(range(n, n + SPAN)) for n in (0, 50, 100, 150, 200)]
LITERALS = {f"x:{n}": bytes(range(255 - n, 255)) for n in range(10)}

extents = st.tuples(st.integers(0, len(SPANS) - 1), st.integers(0, SPAN), st.integers(0, SPAN)).map(
    lambda t: Extent(t[0], min(t[1:]), max(t[1:]))
)
literals = st.integers(0, 9).map(lambda n: Literal(f"x:{n}", n))
segment_lists = st.lists(extents | literals, max_size=12)


def file(segments: list[Segment]) -> File:
    return File("x", sum(s.size for s in segments), View.BOTH, tuple(segments))


def content(segment: Segment) -> bytes:
    if isinstance(segment, Literal):
        return LITERALS[segment.blob]
    return SPANS[segment.span][segment.start : segment.stop]


def bytes_of(layout: Layout, piece: Piece) -> bytes:
    whole = LITERALS[layout.literals[piece.ref].blob] if piece.kind is Kind.LITERAL else SPANS[piece.ref]
    data = whole[piece.start : piece.start + piece.size]
    assert len(data) == piece.size > 0
    return data


@given(segment_lists, st.integers(0, 300), st.integers(0, 300))
def test_the_pieces_of_a_read_are_a_slice_of_the_file(segments: list[Segment], offset: int, size: int) -> None:
    whole = b"".join(map(content, segments))
    layout = Layout.of(file(segments))
    pieces = layout.locate(offset, size)
    assert b"".join(bytes_of(layout, p) for p in pieces) == whole[offset : offset + size]
    assert layout.size == len(whole)


@given(segment_lists, st.integers(0, 300), st.integers(0, 300))
def test_pieces_follow_the_segments_one_by_one(segments: list[Segment], offset: int, size: int) -> None:
    layout = Layout.of(file(segments))
    pieces = layout.locate(offset, size)
    assert [p.segment for p in pieces] == list(range(pieces[0].segment, pieces[-1].segment + 1)) if pieces else True
    for piece in pieces:
        bounds = layout.bounds(piece.segment)
        assert piece.size <= bounds.size
        assert bounds.start < offset + size and offset < bounds.stop


@given(segment_lists)
def test_segments_tile_the_file_and_empty_ones_are_left_out(segments: list[Segment]) -> None:
    layout = Layout.of(file(segments))
    bounds = [layout.bounds(n) for n in range(len(layout))]
    assert [b.size for b in bounds] == [s.size for s in segments if s.size]
    assert [b.start for b in bounds] == [0, *(b.stop for b in bounds)][: len(bounds)]


def test_an_empty_file_has_no_pieces() -> None:
    layout = Layout.of(file([]))
    assert (layout.size, len(layout), layout.locate(0, 10)) == (0, 0, [])


def test_one_read_over_literal_and_extents() -> None:
    layout = Layout.of(file([Literal("x:8", 8), Extent(3, 0, 0), Extent(1, 5, 15), Extent(3, 0, 20)]))
    assert layout.locate(6, 16) == [
        Piece(segment=0, kind=Kind.LITERAL, ref=0, start=6, size=2),
        Piece(segment=1, kind=Kind.EXTENT, ref=1, start=5, size=10),
        Piece(segment=2, kind=Kind.EXTENT, ref=3, start=0, size=4),
    ]
    assert layout.bounds(1) == ByteRange(8, 18)


@pytest.mark.parametrize(("offset", "size"), [(0, 0), (8, 0), (38, 1), (38, 100), (1000, 1), (2**62, 2**20)])
def test_nothing_is_asked_for_and_nothing_found(offset: int, size: int) -> None:
    layout = Layout.of(file([Literal("x:8", 8), Extent(1, 5, 15), Extent(3, 0, 20)]))
    assert layout.locate(offset, size) == []


def test_offsets_past_32_bits() -> None:
    tensor = 5 * 2**40
    layout = Layout.of(File("x", 3 * tensor, View.BOTH, tuple(Extent(n, 0, tensor) for n in range(3))))
    assert layout.locate(2 * tensor - 1, 2) == [Piece(1, False, 1, tensor - 1, 1), Piece(2, False, 2, 0, 1)]


def test_readahead_begins_behind_the_header() -> None:
    """One segment, but several in a GGUF file; a file that is one piece has none."""
    sources = (Source("x", "sha256:x", Locator("x", 100)),)
    spans = tuple(Span(0, start, start + 10) for start in range(0, 100, 10))
    tensors = tuple(TensorInfo(f"t{i}", "F32", (10,), i) for i in range(4, 10))
    pieces = tuple(Extent(i, 0, 10) for i in range(10))
    files = {
        "a.safetensors": (pieces[3:], 1),
        "b.safetensors": (pieces[:1], 0),
        "c.gguf": (pieces, 4),
        "d.gguf": (pieces[:1], 0),
        "e.gguf": ((Literal("xxh3:00", 10), *pieces[4:]), 1),
    }
    shown = tuple(File(path, 10 * len(s), View.BOTH, s) for path, (s, _) in files.items())
    manifest = Manifest("m", "", "", "", 0, sources, spans, tensors, shown)
    assert [header_segments(manifest, file) for file in shown] == [count for _, count in files.values()]
