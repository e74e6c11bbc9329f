"""Which tensors of two models are known to be equal, and the picture of it."""

import json
import time
from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st

from cakefs.cli.bars import ABSENT, draw_groups
from cakefs.cli.diff import mark
from cakefs.errors import InvalidFormat
from cakefs.formats.hashes import TensorHash, encode_hashes, parse_hashes
from cakefs.model import Extent, File, Locator, Manifest, Source, Span, SpanKey, TensorInfo, View
from cakefs.plan.diff import Diff, Row, State, diff_models, group_cells
from cakefs.plan.knowledge import Knowledge, Names

SIZES = {"a": 8, "b": 8, "c": 8, "d": 16, "e": 0}
NAMES = st.sampled_from(sorted(SIZES))


def model(name: str, tensors: Mapping[str, str], *, dtype: str = "U8", path: str = "model.safetensors") -> Manifest:
    """Tensor -> the content it has; the size of a content is that of its first letter."""
    source, spans, infos, at = Source(path, f"sha256:{name}", Locator("http://x", 1 << 20)), [], [], 8
    for i, (tensor, content) in enumerate(tensors.items()):
        spans.append(Span(0, at, at + SIZES[content[0]]))
        infos.append(TensorInfo(tensor, dtype, (SIZES[content[0]],), i))
        at += SIZES[content[0]]
    extents = tuple(Extent(i, 0, span.size) for i, span in enumerate(spans))
    file = File(path, at - 8, View.BOTH, extents)
    return Manifest(name, "", "", "", 0, (source,), tuple(spans), tuple(infos), (file,))


def told(contents: Mapping[str, Mapping[str, str]], kind: str, *, exact: bool = True, claimed: bool = False) -> Names:
    """A source that names tensors of models by their content."""
    models = {name: model(name, tensors) for name, tensors in contents.items()}
    table = {m.key(i): content for name, m in models.items() for i, content in enumerate(contents[name].values())}
    return Names(kind, table, exact, claimed)


def states(diff: Diff) -> dict[str, str]:
    return {row.name: str(row.state) for row in diff.rows}


A = {"x.0.w": "a1", "x.1.w": "a2", "x.2.w": "b1", "old": "d1"}
B = {"x.0.w": "a1", "x.1.w": "a3", "x.2.w": "d1", "new": "d2"}


def test_equal_different_only_and_unknown() -> None:
    known = told({"m": A, "n": B}, "blob")
    diff = diff_models(model("m", A), model("n", B), [known])
    assert states(diff) == {
        "x.0.w": "equal",
        "x.1.w": "different",
        "x.2.w": "different",
        "old": "only_a",
        "new": "only_b",
    }
    assert {row.name: row.twin for row in diff.rows if row.twin} == {"old": "x.2.w"}
    blind = diff_models(model("m", A), model("n", B), [])
    assert states(blind) == states(diff) | {"x.0.w": "unknown", "x.1.w": "unknown"}
    totals = diff.totals()
    assert totals[State.DIFFERENT] == (2, 16, 24) and totals[State.ONLY_A] == (1, 16, 0)
    assert sum(total.tensors for total in totals.values()) == 5


def test_a_model_is_equal_to_itself_without_any_source() -> None:
    assert set(states(diff_models(model("m", A), model("m", A), [])).values()) == {"equal"}


def test_equal_bytes_of_another_dtype_are_marked() -> None:
    known = told({"m": A, "n": A}, "blob")
    rows = diff_models(model("m", A), model("n", A, dtype="I8"), [known]).rows
    assert all(row.state is State.EQUAL and row.retyped for row in rows)


def test_a_claim_never_outweighs_what_was_checked_here() -> None:
    """Of one kind the earlier source is believed; of several kinds the one that nobody else says."""
    lie = told({"m": {"x": "a1"}, "n": {"x": "a1"}}, "sha256", claimed=True)
    truth = told({"m": {"x": "a1"}, "n": {"x": "a2"}}, "sha256")
    blobs = told({"m": {"x": "a1"}, "n": {"x": "a2"}}, "blob")
    m, n = model("m", {"x": "a"}), model("n", {"x": "a"})
    (claimed,) = diff_models(m, n, [lie]).rows
    assert (claimed.state, claimed.claimed) == (State.EQUAL, True)
    for sources in ([truth, lie], [lie, blobs], [blobs, lie]):
        (row,) = diff_models(m, n, sources).rows
        assert (row.state, row.claimed) == (State.DIFFERENT, False)


def test_a_source_that_is_not_exact_tells_equal_and_never_different() -> None:
    """As the terms of Xet will: the same bytes can be cut in many ways."""
    m, n = model("m", {"x": "a", "y": "b"}), model("n", {"x": "a", "y": "b"})
    terms = told({"m": {"x": "a1", "y": "b1"}, "n": {"x": "a1", "y": "b2"}}, "xet", exact=False)
    assert states(diff_models(m, n, [terms])) == {"x": "equal", "y": "unknown"}


def test_equal_names_in_several_files_are_told_apart_by_path() -> None:
    def two(name: str) -> Manifest:
        one = model(name, {"w": "a"}, path="unet/x.safetensors")
        sources = (one.sources[0], Source("vae/x.safetensors", f"sha256:{name}2", Locator("http://x", 1 << 20)))
        tensors = (TensorInfo("w", "U8", (8,), 0), TensorInfo("w", "U8", (8,), 1))
        files = (one.files[0], File("vae/x.safetensors", 8, View.BOTH, (Extent(1, 0, 8),)))
        return Manifest(name, "", "", "", 0, sources, (one.spans[0], Span(1, 8, 16)), tensors, files)

    assert list(states(diff_models(two("m"), two("n"), []))) == ["unet/x.safetensors:w", "vae/x.safetensors:w"]
    mixed = diff_models(two("m"), model("n", {"w": "a"}, path="vae/x.safetensors"), [])
    assert states(mixed) == {"unet/x.safetensors:w": "only_a", "vae/x.safetensors:w": "unknown"}


TENSORS = st.dictionaries(st.sampled_from("stuvw"), st.builds("{}{}".format, NAMES, st.integers(1, 2)), max_size=5)


@given(TENSORS, TENSORS, st.lists(st.tuples(st.sampled_from(["blob", "sha256"]), st.booleans()), max_size=3))
def test_diff_is_symmetric_complete_and_true(
    a: dict[str, str], b: dict[str, str], sources: list[tuple[str, bool]]
) -> None:
    """With sources that are true, whatever a diff says is true; the other way round it says the same."""
    known: list[Knowledge] = [told({"m": a, "n": b}, kind, claimed=claimed) for kind, claimed in sources]
    m, n = model("m", a), model("n", b)
    rows = diff_models(m, n, known).rows
    mirror = {State.ONLY_A: State.ONLY_B, State.ONLY_B: State.ONLY_A}

    def turned(row: Row) -> Row:
        return row._replace(state=mirror.get(row.state, row.state), size_a=row.size_b, size_b=row.size_a)

    assert sorted(map(turned, rows)) == sorted(diff_models(n, m, known).rows)
    assert sorted(row.name for row in rows) == sorted(a.keys() | b.keys())
    for row in rows:
        if row.name in a and row.name in b:
            empty = SIZES[a[row.name][0]] == SIZES[b[row.name][0]] == 0
            equal = a[row.name] == b[row.name] or empty
            assert row.state in ((State.EQUAL,) if equal else (State.DIFFERENT,)) or row.state is State.UNKNOWN
            assert row.state is not State.UNKNOWN or not sources
        if row.twin:
            assert (a if row.state is State.ONLY_B else b)[row.twin] == (a | b)[row.name]


def test_the_picture_has_a_character_for_each_layer() -> None:
    rows = [
        (f"m.layers.{i}.{part}", state, 8) for i in (0, 1, 2, 4) for part, state in zip("ab", LAYER[i], strict=True)
    ]
    lines = draw_groups(group_cells([*rows, ("head", "equal", 1), ("norm", "only_a", 1)]), mark)
    assert lines == [f"m.layers 0-4  █░▒{ABSENT}?", "other         █<"]


LAYER = {0: ("equal", "equal"), 1: ("different", "unknown"), 2: ("equal", "different"), 4: ("unknown", "unknown")}


def test_a_deep_stack_takes_several_lines() -> None:
    lines = draw_groups(group_cells((f"m.{i}.w", "equal", 1) for i in range(100)), mark)
    assert lines == ["m 0-63   " + "█" * 64, "m 64-99  " + "█" * 36]


ENTRIES = st.builds(
    lambda name, start, size, digest: TensorHash(name, start, start + size, "model.safetensors", digest.hex()),
    st.text(min_size=1),
    st.integers(0, 1 << 60),
    st.integers(0, 1 << 60),
    st.binary(min_size=32, max_size=32),
)


@given(st.lists(ENTRIES, unique_by=lambda e: e.name, max_size=5))
def test_hashes_json_reads_back_what_it_wrote(entries: list[TensorHash]) -> None:
    assert parse_hashes(encode_hashes(entries).encode(), "x") == entries


@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(st.sampled_from(["data_offsets", "file_name", "hash", "size", "a"]), inner)
        ),
        max_leaves=12,
    ).map(lambda value: json.dumps(value).encode())
)
def test_whatever_a_hashes_json_holds_it_is_read_or_refused(data: bytes) -> None:
    try:
        parse_hashes(data, "x")
    except InvalidFormat as error:
        assert str(error).startswith("x")


def test_span_keys_of_equal_files_need_no_source() -> None:
    """Two repositories with the same file, of which nothing was fetched."""
    m, n = model("same", A), model("same", A)
    assert SpanKey("sha256:same", 8, 16) in {m.key(0), n.key(0)}
    assert set(states(diff_models(m, n, [])).values()) == {"equal"}


def test_tens_of_thousands_of_tensors_are_compared_in_seconds() -> None:
    tensors = {f"m.layers.{i // 1000}.experts.{i % 1000}.w": "a1" for i in range(30_000)}
    m, n = model("m", tensors), model("n", tensors)
    began = time.process_time()
    diff = diff_models(m, n, [told({"m": tensors, "n": tensors}, "blob")])
    assert len(group_cells((row.name, row.state, row.size_a) for row in diff.rows)) == 1
    assert time.process_time() - began < 7
