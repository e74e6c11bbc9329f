"""Which ranges are asked for, given which chunks are missing."""

from hypothesis import given
from hypothesis import strategies as st

from cakefs.model import CHUNK, File, Locator, Manifest, Source, Span
from cakefs.plan.requests import ChunkRef, range_requests, span_chunks


def manifest(*sizes: int, sources: int = 1) -> Manifest:
    """Spans of these sizes behind each other, dealt to the sources in turn."""
    ends = [0] * sources
    spans = []
    for index, size in enumerate(sizes):
        source = index % sources
        spans.append(Span(source, ends[source], ends[source] + size))
        ends[source] += size
    files = tuple(Source(f"f{i}", f"sha256:{i:064}", Locator(f"http://x/{i}", end)) for i, end in enumerate(ends))
    return Manifest("a/b", "o", "r", "main", 0, files, tuple(spans), (), tuple[File, ...]())


def all_chunks(m: Manifest) -> list[ChunkRef]:
    return [ref for i, span in enumerate(m.spans) for ref in span_chunks(i, 0, span.size)]


def test_neighbours_share_a_request_whatever_the_order_they_are_named_in() -> None:
    m = manifest(1000, 2000, 3000)
    (request,) = range_requests(m, reversed(all_chunks(m)))
    assert (request.start, request.stop) == (0, 6000)
    assert request.spans == ((0, 1000), (1000, 3000), (3000, 6000))


def test_a_gap_is_never_asked_for() -> None:
    m = manifest(1000, 2000, 3000)
    requests = list(range_requests(m, [ChunkRef(0, 0), ChunkRef(2, 0)]))
    assert [(r.start, r.stop) for r in requests] == [(0, 1000), (3000, 6000)]


def test_chunks_are_counted_from_the_start_of_their_span() -> None:
    m = manifest(10, 3 * CHUNK)
    (request,) = range_requests(m, [ChunkRef(1, 2)])
    assert (request.start, request.stop) == (10 + 2 * CHUNK, 10 + 3 * CHUNK)


def test_sources_are_never_mixed() -> None:
    m = manifest(1000, 1000, 1000, 1000, sources=2)
    assert [(r.source, r.start, r.stop) for r in range_requests(m, all_chunks(m))] == [(0, 0, 2000), (1, 0, 2000)]


@given(st.lists(st.integers(1, 3 * CHUNK), min_size=1, max_size=12), st.integers(1, 3), st.data())
def test_requests_cover_exactly_the_chunks(sizes: list[int], sources: int, data: st.DataObject) -> None:
    m = manifest(*sizes, sources=sources)
    refs = data.draw(st.lists(st.sampled_from(all_chunks(m)), max_size=20))
    requests = list(range_requests(m, refs, limit=2 * CHUNK))
    wanted = sum(min(CHUNK, m.spans[r.span].size - r.chunk * CHUNK) for r in set(refs))
    assert sum(r.stop - r.start for r in requests) == wanted
    assert all(r.stop - r.start <= 2 * CHUNK for r in requests)
    for r in requests:
        assert r.spans[0][0] <= r.start < r.spans[0][1]
        assert r.spans[-1][0] < r.stop <= r.spans[-1][1]
