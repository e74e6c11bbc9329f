"""The layout for sharing blocks: the official library reads the same tensors from it, and what can share does."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cakefs.formats.safetensors import DTYPES, parse_header
from cakefs.model import INLINE_LIMIT, Extent, File, Literal, Manifest, View
from cakefs.plan.export import aligned, shareable, upstream_of
from cakefs.plan.layout import Layout
from tests import official
from tests.shelf import Shapes, Shelf

BLOCK = 4096
WEIGHTS = "model.safetensors"


def laid_out(shelf: Shelf, manifest: Manifest, path: str = WEIGHTS, block: int = BLOCK) -> tuple[File, bytes]:
    """The new file and its bytes."""
    file = manifest.shown(View.MODEL)[path]
    data = shelf.read(manifest, path)
    found = aligned(manifest, file, parse_header(data, len(data), path), block)
    assert found is not None
    made, header = found
    return made, header + b"".join(shelf.segment(manifest, s) for s in made.segments[1:])


def made_of(shapes: Shapes) -> tuple[Shelf, Manifest]:
    shelf = Shelf()
    return shelf, shelf.model("org/name", shapes, None)


sizes = st.one_of(st.integers(0, 40), st.sampled_from([1024, 2048, 4096, 8192, 4100, 6000, 10_000]))
tensors = st.dictionaries(
    st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(["F32", "BF16", "I64", "U8"]), st.tuples(sizes)),
    max_size=12,
)


@given(tensors, st.sampled_from([4096, 16384]))
def test_the_official_library_reads_the_same_tensors(shapes: Shapes, block: int) -> None:
    shelf, manifest = made_of(shapes)
    file, data = laid_out(shelf, manifest, block=block)
    assert len(data) == file.size
    assert official.read(data) == official.read(shelf.read(manifest, WEIGHTS))
    header = parse_header(data, len(data), "x")
    assert header.size % block == 0
    assert header.metadata == {"format": "pt"}


@given(tensors, st.sampled_from([4096, 16384]), st.booleans())
def test_what_is_shared_is_whole_blocks_of_blobs(shapes: Shapes, block: int, lay_out: bool) -> None:
    shelf, manifest = made_of(shapes)
    file = laid_out(shelf, manifest, block=block)[0] if lay_out else manifest.shown(View.MODEL)[WEIGHTS]
    layout, stop = Layout.of(file), 0
    for part in shareable(manifest, file, block):
        assert part.offset >= stop and part.offset % block == part.start % block == 0
        stop = part.offset + part.size
        span = manifest.spans[part.span]
        assert span.size > INLINE_LIMIT, "smaller ones have no file"
        assert part.size % block == 0 or (stop == file.size and part.start + part.size == span.size)
        (piece,) = layout.locate(part.offset, part.size)
        assert (piece.ref, piece.start, piece.size) == (part.span, part.start, part.size)


@given(tensors)
def test_every_tensor_that_fills_blocks_is_shared_whole(shapes: Shapes) -> None:
    shelf, manifest = made_of(shapes)
    file, data = laid_out(shelf, manifest)
    shared = {part.offset: part.size for part in shareable(manifest, file, BLOCK)}
    header = parse_header(data, len(data), "x")
    whole = [e for e in header.entries if e.size > INLINE_LIMIT and e.size % BLOCK == 0]
    assert all(shared.get(header.size + e.start) == e.size for e in whole)
    assert len(shared) <= len(whole) + 1


@given(tensors)
def test_elements_lie_where_their_size_divides(shapes: Shapes) -> None:
    """As in a canonical file: readers that map need it."""
    shelf, manifest = made_of(shapes)
    header = parse_header(laid_out(shelf, manifest)[1], laid_out(shelf, manifest)[0].size, "x")
    assert all(e.start % (DTYPES[e.dtype].bits // 8) == 0 for e in header.entries)


def test_the_largest_of_the_others_begins_at_a_block() -> None:
    shelf, manifest = made_of(
        {"a": ("F32", (1500,)), "b": ("F32", (9000,)), "c": ("F32", (2048,)), "d": ("F32", (9001,))}
    )
    file, data = laid_out(shelf, manifest)
    header = parse_header(data, len(data), "x")
    assert [e.name for e in header.entries] == ["c", "b", "a", "d"], "9001 elements would put the others off by 4"
    assert [(p.offset, p.size) for p in shareable(manifest, file, BLOCK)] == [(4096, 8192), (12288, 32768)]


def test_what_is_no_file_of_tensors_is_not_laid_out() -> None:
    """Segments that are not one for each tensor, or a header that would become too long."""
    shelf, manifest = made_of({"a": ("F32", (2048,)), "b": ("F32", (2048,))})
    file = manifest.shown(View.MODEL)[WEIGHTS]
    data = shelf.read(manifest, WEIGHTS)
    header = parse_header(data, len(data), "x")
    one = File(WEIGHTS, len(data), View.BOTH, (Literal("", len(data)),))
    assert aligned(manifest, one, header, BLOCK) is None
    swapped = File(WEIGHTS, len(data), View.BOTH, (file.segments[0], Extent(1, 0, 100), Extent(2, 0, 8192)))
    assert aligned(manifest, swapped, header, BLOCK) is None
    assert aligned(manifest, file, header, 1 << 27) is None


def test_a_file_is_an_upstream_file_only_when_it_is_all_of_it() -> None:
    shelf = Shelf()
    manifest = shelf.published("org/name", {"a.txt": b"x" * 9000, "b.txt": b"y" * 9000, "empty": b""})
    files = manifest.shown(View.MODEL)
    assert upstream_of(manifest, files["a.txt"]) == manifest.sources[0]
    assert upstream_of(manifest, files["empty"]) is None
    a, b = files["a.txt"].segments[0], files["b.txt"].segments[0]
    assert isinstance(a, Extent) and isinstance(b, Extent)
    for segments in ((a, b), (b, a), (Extent(a.span, 0, 8000),), (Extent(a.span, 1, 9000),), (Literal("", 9000),)):
        file = File("c", sum(s.size for s in segments), View.MODEL, segments)
        assert upstream_of(manifest, file) is None
    halves = (Extent(a.span, 0, 5000), Extent(a.span, 5000, 9000))
    assert upstream_of(manifest, File("c", 9000, View.MODEL, halves)) == manifest.sources[0]
    assert [p.size for p in shareable(manifest, files["a.txt"], BLOCK)] == [9000]
    assert [p.size for p in shareable(manifest, File("c", 18000, View.MODEL, (a, b)), BLOCK)] == [8192]


@pytest.mark.parametrize("shapes", [{}, {"a": ("U8", (3,))}])
def test_small_models_have_nothing_to_share(shapes: Shapes) -> None:
    shelf, manifest = made_of(shapes)
    assert list(shareable(manifest, laid_out(shelf, manifest)[0], BLOCK)) == []
