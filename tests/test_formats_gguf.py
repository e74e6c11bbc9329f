"""GGUF headers: llama.cpp's verdict, whatever part of the file is there; the bytes of its writer; bounded memory."""

import struct
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cakefs.errors import InvalidFormat
from cakefs.formats import ggml
from cakefs.formats.gguf import (
    HEADER_LIMIT,
    Header,
    Kind,
    Need,
    Scalar,
    aligned,
    ancestor,
    parse_header,
    read_header,
)
from cakefs.formats.ggufalike import read_alike
from cakefs.formats.ggufwrite import TensorSpec, build_header, encode, encode_array
from cakefs.formats.steps import run
from cakefs.model import ByteRange
from tests import gguf_files
from tests.gguf_files import ACCEPTED, LAXER, REFUSED, SCALARS, STRICTER

SPLIT = Path(__file__).parent / "fixtures" / "gguf_split"  # made by llama.cpp's own gguf-split
READABLE = ACCEPTED | LAXER


def parse(file: bytes) -> Header:
    header = parse_header(file, len(file), "x.gguf")
    assert isinstance(header, Header)
    return header


def refusal(file: bytes) -> str:
    with pytest.raises(InvalidFormat) as caught:
        parse_header(file, len(file), "x.gguf")
    assert caught.value.message.startswith("header of x.gguf: ")
    assert len(caught.value.message) < 300 and caught.value.message.isprintable()
    return caught.value.message


@pytest.mark.parametrize("name", READABLE)
def test_reads_what_llama_cpp_reads(name: str) -> None:
    file = READABLE[name]
    header = parse(file)
    assert header.prefix == file[: header.size]
    position = header.size
    for tensor in header.tensors:
        assert tensor.start == position and tensor.size <= tensor.padded
        position += tensor.padded
    assert position <= len(file)


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_llama_cpp_refuses(name: str) -> None:
    file, reason = REFUSED[name]
    assert reason in refusal(file)


@pytest.mark.parametrize("name", STRICTER)
def test_is_stricter_only_as_documented(name: str) -> None:
    file, reason = STRICTER[name]
    assert reason in refusal(file)


@pytest.mark.parametrize("name", READABLE)
def test_a_prefix_is_enough_or_says_how_much_is(name: str) -> None:
    file = READABLE[name]
    whole = parse(file)
    for size in range(len(file)):
        found = parse_header(file[:size], len(file), "x.gguf")
        assert found == whole if size >= whole.size else isinstance(found, Need) and size < found.size <= whole.size


@pytest.mark.parametrize("name", REFUSED)
def test_a_prefix_of_a_bad_file_never_passes(name: str) -> None:
    file, _ = REFUSED[name]
    for size in range(len(file)):
        try:
            found = parse_header(file[:size], len(file), "x.gguf")
        except InvalidFormat:
            continue
        assert isinstance(found, Need) and size < found.size <= len(file)


@pytest.mark.parametrize("first", [1, 24, 100, 10**6])
def test_reading_asks_for_every_byte_once(first: int) -> None:
    words = b"".join(gguf_files.text(f"word {i}") for i in range(500))
    file = gguf_files.make([gguf_files.array("words", gguf_files.STRING, 500, words)], [gguf_files.info("a", [8])], 32)
    asked: list[ByteRange] = []

    def read(part: ByteRange) -> bytes:
        asked.append(part)
        return file[part.start : part.stop]

    assert run(read_header(len(file), "x.gguf", first), read) == parse(file)
    assert [part.start for part in asked] == [0, *(part.stop for part in asked[:-1])]
    assert len(asked) < 12 and all(part.size for part in asked)


def vocabulary(*, first: int = 0, name: str = "", words: int = 9000) -> bytes:
    """A header with three long arrays."""
    listed = b"".join(gguf_files.text(f"word {i + first:06}") for i in range(words))
    pairs = [
        gguf_files.pair("general.name", gguf_files.STRING, gguf_files.text(name)),
        gguf_files.array("tokens", gguf_files.STRING, words, listed),
        gguf_files.array("scores", gguf_files.F32, 20_000, bytes(80_000)),
        gguf_files.array("merges", gguf_files.STRING, words, listed),
        gguf_files.pair("template", gguf_files.STRING, gguf_files.text(name * 9)),
    ]
    return gguf_files.make(pairs, [gguf_files.info("a", [8])], 32)


def alike(file: bytes, like: bytes) -> tuple[Header | None, int]:
    """What is found of a file by another one, and the bytes that were asked for."""
    asked: list[int] = []

    def read(part: ByteRange) -> bytes:
        assert 0 <= part.start < part.stop <= len(file)
        asked.append(part.size)
        return file[part.start : part.stop]

    return run(read_alike(len(file), "x.gguf", parse(like)), read), sum(asked)


@pytest.mark.parametrize("name", ["", "m", "a longer name", "n" * 3000])
def test_a_header_is_read_by_another_with_the_same_vocabulary(name: str) -> None:
    file = vocabulary(name=name)
    found, asked = alike(file, vocabulary(name="like"))
    assert found is not None and asked < len(file) / 4
    assert found.outline() == parse(file).outline()


@pytest.mark.parametrize(
    "file",
    [
        vocabulary(first=1),
        vocabulary(words=8999),
        vocabulary(words=9001),
        vocabulary()[:400_000],
        gguf_files.make([gguf_files.ARCH], [gguf_files.info("a", [40_000])], 160_000),
        vocabulary().replace(b"word 000000", b"word 0000zz", 1),
        vocabulary().replace(b"word 008999", b"word 0089zz", 1),
    ],
)
def test_what_is_not_like_another_header_is_not_read_by_it(file: bytes) -> None:
    try:
        found, _ = alike(file, vocabulary())
    except InvalidFormat:
        found = None
    assert found is None or found == parse(file)


def test_a_header_without_long_arrays_is_read_as_it_is() -> None:
    small = gguf_files.make([gguf_files.ARCH], [gguf_files.info("a", [8])], 32)
    assert alike(small, vocabulary())[0] == parse(small)


def test_values() -> None:
    header = parse(gguf_files.make(SCALARS))
    expected = [255, -1, 65535, -1, 2**32 - 1, -1, 1.5, True, "é\0🍰", 2**64 - 1, -1, 0.1]
    assert [header.get(key) for key in header.fields] == expected
    assert header.get("absent") is None and header.array("absent") == ()
    with pytest.raises(InvalidFormat, match="u8 is not an array"):
        header.array("u8")


def test_values_of_arrays() -> None:
    strings = gguf_files.text("a") + gguf_files.text(b"\xff") + gguf_files.text("")
    pairs = [
        gguf_files.array("s", gguf_files.STRING, 3, strings),
        gguf_files.array("n", 3, 2, struct.pack("<2h", -5, 5)),
    ]
    header = parse(gguf_files.make(pairs))
    assert list(header.array("s")) == ["a", "�", ""]
    assert list(header.array("n")) == [-5, 5]
    with pytest.raises(InvalidFormat, match="n is an array"):
        header.get("n")


def test_tensors_have_both_orders_of_dimensions() -> None:
    (tensor,) = parse(gguf_files.one([256, 2], 12, data=288)).tensors
    assert (tensor.dims, tensor.shape, tensor.dtype, tensor.size) == ((256, 2), (2, 256), "Q4_K", 288)
    (unknown,) = parse(gguf_files.one([1], 99)).tensors
    assert (unknown.dtype, unknown.size) == ("GGML_99", 32)


def test_ancestors_are_recognised() -> None:
    prefixes = [b"lmgg", b"fmgg\1\0\0\0", b"tjgg\3\0\0\0", b"GGUF\1\0\0\0", b"GGUF\3\0\0\0", b"PK\3\4", b""]
    assert [ancestor(p) for p in prefixes] == ["GGML", "GGMF v1", "GGJT v3", "GGUF v1", "", "", ""]


# --- memory -----------------------------------------------------------------------------------------------------------


def peak(file: bytes, file_size: int) -> int:
    """Bytes of memory that a refusal takes."""
    tracemalloc.start()
    try:
        with pytest.raises(InvalidFormat):
            parse_header(file, file_size, "x.gguf")
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", [gguf_files.U8, gguf_files.U64, gguf_files.STRING])
def test_an_array_of_any_claimed_length_costs_nothing(kind: int) -> None:
    """49 bytes of this kill the gguf package's reader."""
    file = gguf_files.make([gguf_files.array("k", kind, 2**61)], alignment=1)
    assert len(file) < 64
    assert peak(file, len(file)) < 100_000
    assert peak(file, 2**62) < 100_000


def test_a_header_past_the_limit_is_refused_before_it_is_fetched() -> None:
    file = gguf_files.make([gguf_files.pair("k", gguf_files.STRING, gguf_files.u64(HEADER_LIMIT))])
    with pytest.raises(InvalidFormat, match=f"more than {HEADER_LIMIT} bytes up to the value of 'k'"):
        run(read_header(2**40, "x.gguf", len(file)), lambda part: file[part.start : part.stop])


def test_a_large_bad_header_costs_a_small_multiple_of_itself() -> None:
    infos = [gguf_files.info(f"t{i}", [0]) for i in range(20_000)]
    file = gguf_files.make([], [*infos, gguf_files.info("t5", [0])])
    assert peak(file, len(file)) < 30 * len(file)


# --- writing ----------------------------------------------------------------------------------------------------------


def rebuilt(file: bytes) -> bytes:
    """The header again, from what was read of it."""
    header = parse(file)
    fields = {key: header.raw(key) for key in header.fields}
    return build_header(fields, [TensorSpec(t.name, t.type_id, t.dims, t.size) for t in header.tensors]).header


@pytest.mark.parametrize("path", sorted(SPLIT.glob("*.gguf")), ids=lambda path: path.stem)
def test_a_rebuilt_header_is_llama_cpps(path: Path) -> None:
    file = path.read_bytes()
    assert rebuilt(file) == file[: parse(file).size]


@pytest.mark.parametrize("name", [n for n in READABLE if n not in ("version 2", "no tensors, not padded")])
def test_any_rebuilt_header_is_the_one_read(name: str) -> None:
    file = READABLE[name]
    assert rebuilt(file) == file[: parse(file).size]


kinds = st.sampled_from([k for k in Kind if k is not Kind.ARRAY])
keys = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda k: k != "general.alignment"
)


def values(kind: Kind) -> st.SearchStrategy[Scalar]:
    if kind is Kind.STRING:
        return st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    if kind is Kind.BOOL:
        return st.booleans()
    if kind in (Kind.F32, Kind.F64):
        return st.floats(width=32 if kind is Kind.F32 else 64, allow_nan=False)
    bits = int(kind.name[1:])
    signed = kind.name[0] == "I"
    return st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else st.integers(0, 2**bits - 1)


@st.composite
def fields(draw: st.DrawFn) -> dict[str, tuple[Kind, Any]]:
    found = {}
    for key in draw(st.lists(keys, max_size=5, unique=True)):
        kind = draw(kinds)
        one, many = values(kind), st.lists(values(kind), max_size=4)
        found[key] = kind, draw(one | many)
    return found


@st.composite
def specs(draw: st.DrawFn) -> list[TensorSpec]:
    names = draw(st.lists(st.text("ab.é", max_size=12), max_size=5, unique=True))
    found = []
    for name in names:
        type_id = draw(st.sampled_from(sorted(ggml.TYPES)))
        rest = draw(st.lists(st.integers(0, 3), max_size=3))
        dims = (ggml.TYPES[type_id].block * draw(st.integers(0, 3)), *rest)
        size = ggml.tensor_size(type_id, dims)
        assert size is not None
        found.append(TensorSpec(name, type_id, dims, size))
    return found


@given(fields(), specs(), st.sampled_from([None, 1, 8, 32, 256]))
def test_a_built_header_parses_to_what_it_was_built_from(
    given_fields: dict[str, tuple[Kind, Any]], tensors: list[TensorSpec], alignment: int | None
) -> None:
    encoded = {k: (encode_array if isinstance(v, list) else encode)(kind, v) for k, (kind, v) in given_fields.items()}
    if alignment:
        encoded["general.alignment"] = encode(Kind.U32, alignment)
    layout = build_header(encoded, tensors)
    header = parse_header(layout.header, layout.size, "x.gguf")
    assert isinstance(header, Header)
    assert {k: _read(header, k) for k in given_fields} == {k: v for k, (_, v) in given_fields.items()}
    assert [TensorSpec(t.name, t.type_id, t.dims, t.size) for t in header.tensors] == tensors
    assert [t.padded - t.size for t in header.tensors] == list(layout.paddings)
    assert header.size == len(layout.header) == aligned(header.size, alignment or 32)
    assert layout.size == header.size + sum(t.padded for t in header.tensors)


def _read(header: Header, key: str) -> Scalar | Sequence[Scalar]:
    return header.get(key) if header.fields[key].length is None else list(header.array(key))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("fields", "tensors", "reason"),
    [
        ({"": encode(Kind.U8, 1)}, [], "a key is empty"),
        ({"general.alignment": encode(Kind.U32, 12)}, [], "power of two up to"),
        ({"general.alignment": encode(Kind.U64, 32)}, [], "32 bits"),
        ({}, [TensorSpec("a", 0, (8,), 32), TensorSpec("a", 0, (8,), 32)], "'a' is there twice"),
        ({}, [TensorSpec("a", 0, (8,), 31)], "takes 32 bytes, not 31"),
        ({}, [TensorSpec("a", 12, (8,), 32)], "whole blocks"),
        ({}, [TensorSpec("a" * 64, 0, (8,), 32)], "too long a name"),
        ({}, [TensorSpec("a", 0, (1,) * 5, 4)], "too many dimensions"),
        ({"k": bytes(HEADER_LIMIT)}, [], "are more than"),
    ],
)
def test_what_no_reader_accepts_is_not_written(
    fields: dict[str, bytes], tensors: list[TensorSpec], reason: str
) -> None:
    with pytest.raises(InvalidFormat, match=f"header of new.gguf: .*{reason}"):
        build_header(fields, tensors, "new.gguf")


@pytest.mark.parametrize(("kind", "value"), [(Kind.U8, 256), (Kind.I32, "x"), (Kind.F32, 1e40)])
def test_a_value_that_does_not_fit_is_refused(kind: Kind, value: Scalar) -> None:
    with pytest.raises(ValueError, match=f"no {kind.name}"):
        encode(kind, value)


# --- the gguf package -------------------------------------------------------------------------------------------------


@pytest.mark.loaders
def test_table_is_the_gguf_packages(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="needs the gguf package")
    numpy = pytest.importorskip("numpy")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_block_count(2)
    writer.add_token_list(["<s>", "▁a", "🍰"])
    writer.add_array("scores", [0.5, -1.0])
    values = numpy.random.default_rng(1).standard_normal((4, 256), dtype=numpy.float32)
    writer.add_tensor("plain", values)
    writer.add_tensor("half", values[:3, :5].astype(numpy.float16))
    quantized = (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.BF16)
    for kind in quantized:
        writer.add_tensor(kind.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = (tmp_path / "x.gguf").read_bytes()
    header = parse(file)
    theirs = gguf.GGUFReader(tmp_path / "x.gguf")
    ours = [(t.name, t.dtype, t.dims, t.start, t.size) for t in header.tensors]
    assert ours == [
        (t.name, t.tensor_type.name, tuple(int(n) for n in t.shape), t.data_offset, t.n_bytes) for t in theirs.tensors
    ]
    assert list(header.array("tokenizer.ggml.tokens")) == ["<s>", "▁a", "🍰"]
    assert header.get("llama.block_count") == 2
    assert rebuilt(file) == file[: header.size]


@pytest.mark.loaders
def test_types_are_the_gguf_packages() -> None:
    constants = pytest.importorskip("gguf.constants", reason="needs the gguf package")
    theirs = {int(kind): (kind.name, *sizes) for kind, sizes in constants.GGML_QUANT_SIZES.items()}
    assert {type_id: tuple(ggml.TYPES[type_id]) for type_id in theirs} == theirs
    assert ggml.TYPES.keys() - theirs.keys() <= {42}  # Q2_0, which llama.cpp has before the package
