"""Headers: the verdict of the official library, or a stricter one from a fixed list; the bytes of its writer."""

import json
import math
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cakefs.errors import InvalidFormat
from cakefs.formats.safetensors import (
    DTYPES,
    Header,
    TensorEntry,
    TensorSpec,
    build_header,
    canonical_key,
    header_size,
    parse_header,
    tensor_size,
)
from tests import official
from tests.official import Tensor
from tests.safetensors_files import ACCEPTED, ONE, REFUSED, STRICTER, braced, entry, make, named, one

RANKS = (
    "BOOL F4 F6_E2M3 F6_E3M2 U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ "
    "I16 U16 F16 BF16 I32 U32 F32 C64 F64 I64 U64"
)
MAX = 2**64 - 1


def verdict(file: bytes) -> dict[str, Tensor] | None:
    """Our reading of a whole file in the library's terms."""
    try:
        header = parse_header(file, len(file), "x.safetensors")
    except InvalidFormat as error:
        assert error.message.startswith("header of x.safetensors: ")
        assert len(error.message) < 400 and error.message.isprintable()
        return None
    data = file[header.size :]
    return {e.name: Tensor(e.dtype, e.shape, data[e.start : e.stop]) for e in header.entries}


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepts_what_the_library_accepts(name: str) -> None:
    ours = verdict(ACCEPTED[name])
    assert ours is not None
    assert ours == official.read(ACCEPTED[name])


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_the_library_refuses(name: str) -> None:
    assert official.read(REFUSED[name]) is None
    assert verdict(REFUSED[name]) is None


@pytest.mark.parametrize("name", STRICTER)
def test_is_stricter_than_the_library_only_as_documented(name: str) -> None:
    assert official.read(STRICTER[name]) is not None
    assert verdict(STRICTER[name]) is None


# --- any file -------------------------------------------------------------------------------------------------------

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda n: n != "__metadata__")
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@st.composite
def specs(draw: st.DrawFn, dtypes: tuple[str, ...] = tuple(DTYPES)) -> TensorSpec:
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    if DTYPES[dtype].bits < 8:
        shape.append(4)  # fills bytes
    return TensorSpec(draw(names), dtype, tuple(shape))


def many(dtypes: tuple[str, ...] = tuple(DTYPES)) -> st.SearchStrategy[list[TensorSpec]]:
    return st.lists(specs(dtypes), max_size=8, unique_by=lambda t: t.name)


def laid_out(tensors: list[TensorSpec]) -> tuple[TensorEntry, ...]:
    entries, start = [], 0
    for tensor in tensors:
        stop = start + math.prod(tensor.shape) * DTYPES[tensor.dtype].bits // 8
        entries.append(TensorEntry(tensor.name, tensor.dtype, tensor.shape, start, stop))
        start = stop
    return tuple(entries)


@given(many(), st.dictionaries(texts, texts, max_size=3))
def test_a_built_header_parses_to_what_it_was_built_from(tensors: list[TensorSpec], metadata: dict[str, str]) -> None:
    header = build_header(tensors, metadata)
    entries = laid_out(tensors)
    size = len(header) + (entries[-1].stop if entries else 0)
    assert len(header) % 8 == 0
    assert header_size(header[:8], "x") == len(header)
    assert parse_header(header, size, "x") == Header(
        tuple(sorted(entries, key=lambda e: (e.start, e.stop))), metadata, len(header)
    )


@given(many().filter(len), st.dictionaries(texts, texts, max_size=1), st.data())
def test_an_unusual_entry_changes_nothing_of_the_others(
    tensors: list[TensorSpec], metadata: dict[str, str], data: st.DataObject
) -> None:
    """All plain ones are read at once; with a field more, or metadata behind them, one by one."""
    header = build_header(tensors, metadata)
    members = json.loads(header[8:])
    data.draw(st.sampled_from([members[t.name] for t in tensors]))["more"] = -0.5
    unusual = make(json.dumps(dict(data.draw(st.permutations(list(members.items()))))))
    data_size = laid_out(tensors)[-1].stop
    plain = parse_header(header, len(header) + data_size, "x")
    found = parse_header(unusual, len(unusual) + data_size, "x")
    assert found.metadata == plain.metadata == metadata
    assert sorted(found.entries, key=lambda e: e.name) == sorted(plain.entries, key=lambda e: e.name)


@given(many(tuple(official.WRITER_NAMES)), st.dictionaries(texts, texts, min_size=1, max_size=1) | st.none())
def test_a_canonical_header_is_the_official_writers(tensors: list[TensorSpec], metadata: dict[str, str] | None) -> None:
    ordered = sorted(tensors, key=canonical_key)
    values = {e.name: Tensor(e.dtype, e.shape, bytes(e.size)) for e in laid_out(tensors)}
    file = official.write(values, metadata)
    header = build_header(ordered, metadata or {})
    assert header == file[: len(header)]
    assert len(file) == len(header) + sum(len(t.data) for t in values.values())


def documented(text: bytes) -> bool:
    """Whether a header that the library accepts breaks a rule of the list in the module's docstring."""
    repeated = False

    def members(pairs: list[tuple[str, object]]) -> dict[str, object]:
        nonlocal repeated
        repeated = repeated or len(dict(pairs)) < len(pairs)
        return dict(pairs)

    document = json.loads(text, object_pairs_hook=members)
    entries = [value for name, value in document.items() if name != "__metadata__"]
    return (
        repeated
        or document.get("__metadata__", {}) is None
        or any(not isinstance(e, dict) or isinstance(e["dtype"], dict) for e in entries)
        or any(isinstance(v, list | dict) for e in entries for f, v in e.items() if f not in ("shape", "data_offsets"))
        or any("}" in json.dumps(e)[:-1] for e in entries)
    )


PARTS = [bytes([c]) for c in b'{}[]",:\\0123456789.-eE \n\x00\x1f\x7f\xff']
PARTS += [
    b"null",
    b"true",
    b'"__metadata__"',
    b"{}",
    b"[]",
    b'"x":1,',
    b'"shape":',
    b'"dtype":',
    b'"a"',
    b"F32",
    b"[0,4]",
]
PARTS += [b"\\u0061", b"\\ud800"]
SEEDS = [
    ONE.encode(),
    b'{"__metadata__":{"format":"pt"},"a":%s,"b":%s}' % (entry("I8").encode(), entry(offsets="4,8").encode()),
    b'{"b":{"shape":[],"dtype":"F32","data_offsets":[4,8],"x":"y"},"a":%s}' % entry("I16", "1,2").encode(),
]
edits = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 3), st.sampled_from(PARTS)), min_size=1, max_size=4)


@settings(max_examples=300)
@given(st.sampled_from(SEEDS), edits, st.sampled_from([0, 4, 8]))
def test_a_damaged_header_gets_the_librarys_verdict(
    text: bytes, edits: list[tuple[float, int, bytes]], size: int
) -> None:
    for place, removed, put in edits:
        at = int(place * len(text))
        text = text[:at] + put + text[at + removed :]
    file = make(text, bytes(size))
    ours, theirs = verdict(file), official.read(file)
    assert ours == theirs or (ours is None and documented(text))


@pytest.mark.loaders
def test_numpy_and_torch_write_what_we_build(tmp_path: Path) -> None:
    torch, np = pytest.importorskip("torch"), pytest.importorskip("numpy")
    from safetensors.numpy import save_file as save_numpy
    from safetensors.torch import save_file as save_torch

    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "ä": np.zeros(3, np.int8), "a": np.zeros((), np.int64)}
    tensors = {"h.10": torch.ones(2, 3, dtype=torch.bfloat16), "h.2": torch.ones(4), "e": torch.zeros(0, 2)}
    tensors["m"] = torch.tensor([True, False])
    save_numpy(arrays, tmp_path / "n.safetensors")
    save_torch(tensors, tmp_path / "t.safetensors", metadata={"format": "pt"})
    for name, meta in (("n", {}), ("t", {"format": "pt"})):
        file = (tmp_path / f"{name}.safetensors").read_bytes()
        header = parse_header(file, len(file), name)
        assert header.metadata == meta
        assert build_header(header.entries, meta) == file[: header.size]
        assert list(header.entries) == sorted(header.entries, key=canonical_key)


# --- what the library cannot tell -----------------------------------------------------------------------------------


def test_dtypes_rank_as_the_library_sorts_them() -> None:
    assert sorted(DTYPES, key=lambda name: DTYPES[name].rank) == RANKS.split()


def test_entries_come_in_file_order_with_empty_tensors_first_where_they_lie() -> None:
    file = named(
        8, z=entry(offsets="4,8"), e=entry(shape="0", offsets="4,4"), y=entry(), f=entry(shape="0", offsets="4,4")
    )
    assert [e.name for e in parse_header(file, len(file), "x").entries] == ["y", "e", "f", "z"]


def test_a_header_may_come_with_data_behind_it_or_without() -> None:
    file = one(4)
    size = header_size(file[:8], "x")
    assert parse_header(file[:size], len(file), "x") == parse_header(file, len(file), "x")


@pytest.mark.parametrize("cut", [0, 7, 8, 9, -1])
def test_a_cut_header_is_refused(cut: int) -> None:
    file = make(ONE)
    with pytest.raises(InvalidFormat, match=r"x\.safetensors"):
        parse_header(file[:cut], len(file) + 4, "x.safetensors")


def test_length_limits() -> None:
    assert header_size((100_000_000).to_bytes(8, "little"), "x") == 100_000_008
    for length in (0, 1, 100_000_001, 2**63, MAX):
        with pytest.raises(InvalidFormat, match=f"header of x: length {length} "):
            header_size(length.to_bytes(8, "little"), "x")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hole between", "tensor 'b' leaves a hole before it: [5, 9) after 4"),
        ("overlap", "tensor 'b' overlaps the one before: [3, 7) after 4"),
        ("rest behind the data", "tensors cover 4 of 5 bytes of data"),
        ("dtype C128", "tensor 'a': unknown dtype 'C128'"),
        ("range smaller than the shape", "tensor 'a': [0, 3) is not 4 bytes, as U8 (4,) takes"),
        ("product past 64 bits", "tensor 'a': shape (4294967296, 4294967296) overflows"),
        ("metadata with a number", "malformed JSON: no string in __metadata__, then comma or end, at byte 29"),
        ("no shape", "tensor 'a': no field shape"),
    ],
)
def test_messages_name_the_file_the_tensor_and_the_rule(name: str, message: str) -> None:
    with pytest.raises(InvalidFormat) as caught:
        parse_header(REFUSED[name], len(REFUSED[name]), "dir/x.safetensors")
    assert caught.value.message == f"header of dir/x.safetensors: {message}"


HOSTILE = {
    "plain tensors, no shape twice": braced(
        ",".join(f'"{i}":{entry(shape=f"{i + 999},{i + 9999},{i + 1},{i + 5}")}' for i in range(40_000))
    ),
    "plain tensors of many dimensions": braced(
        ",".join(f'"{i}":{entry(shape="999," * 3000 + "0")}' for i in range(200))
    ),
    "lists in a list": '{"a":{"x":[' + "[]," * 1_000_000 + "0]}}",
    "objects": '{"a":[' + "{}," * 1_000_000 + "0]}",
    "levels": "[" * 3_000_000,
    "short strings": '{"a":{"x":[' + '"ab",' * 600_000 + "0]}}",
    "one long number": braced(f'"a":{entry(shape="9" * 3_000_000)}'),
    "backslashes": '{"' + "\\\\" * 1_500_000,
    "quotes": '"' * 3_000_000,
    "one name": '{"' + "n" * 3_000_000 + '":{}}',
    "spaces": " " * 3_000_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_costs_a_small_multiple_of_its_size(name: str) -> None:
    file = make(HOSTILE[name])
    tracemalloc.start()
    try:
        with pytest.raises(InvalidFormat):
            parse_header(file, len(file), "x")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * len(file)


def test_tensor_size() -> None:
    assert tensor_size("BF16", (2, 3)) == 12
    assert tensor_size("F4", (6,)) == 3
    assert tensor_size("F64", ()) == 8
    assert tensor_size("U8", (0, 2**63)) == 0
    for dtype, shape in (("F4", (1,)), ("U8", (2**33, 2**33)), ("X", (1,))):
        with pytest.raises(ValueError):
            tensor_size(dtype, shape)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([TensorSpec("a", "U8", (1,))] * 2, "tensor 'a' is there twice"),
        ([TensorSpec("__metadata__", "U8", (1,))], "tensor '__metadata__' is there twice"),
        ([TensorSpec("\ud800", "U8", (1,))], "surrogates not allowed"),
        ([TensorSpec("a", "F5", (1,))], "unknown dtype 'F5'"),
        ([TensorSpec("a", "F4", (3,))], "do not fill bytes"),
    ],
)
def test_a_header_that_no_reader_would_accept_is_not_built(tensors: list[TensorSpec], message: str) -> None:
    with pytest.raises(InvalidFormat, match=message) as caught:
        build_header(tensors, {}, "model.safetensors")
    assert caught.value.message.startswith("header of model.safetensors: ")


def test_a_header_over_the_limit_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cakefs.formats.safetensors.HEADER_LIMIT", 1000)
    fits = 1000 - len(braced(f'"":{entry(shape="0", offsets="0,0")}'))
    assert len(build_header([TensorSpec("n" * fits, "U8", (0,))], {}, "x")) == 1008
    with pytest.raises(InvalidFormat, match="header of x: 1008 bytes are more than 1000"):
        build_header([TensorSpec("n" * (fits + 1), "U8", (0,))], {}, "x")
