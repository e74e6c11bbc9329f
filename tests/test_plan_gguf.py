"""GGUF files in a manifest: pieces that tile a published file, and the merged file of a split, byte by byte."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from cakefs.errors import InvalidFormat
from cakefs.formats.gguf import Header, Kind, parse_header
from cakefs.formats.ggufwrite import TensorSpec, build_header, encode
from cakefs.model import Extent, File, Literal, Locator, Manifest, Source, Span, View
from cakefs.plan.gguf_compose import Part, is_gguf, merged_file, piece_ranges, split_sets
from tests import gguf_files
from tests.gguf_files import ACCEPTED, LAXER

SPLIT = Path(__file__).parent / "fixtures" / "gguf_split"  # made by llama.cpp's own gguf-split, merged.gguf too


def parse(file: bytes, path: str = "x.gguf") -> Header:
    header = parse_header(file, len(file), path)
    assert isinstance(header, Header)
    return header


class Merge:
    """A manifest of published parts and the file merged of them."""

    def __init__(self, published: Mapping[str, bytes]) -> None:
        self.literals: dict[str, bytes] = {}
        self.published = published
        spans: list[Span] = []
        parts: list[Part] = []
        for source, (path, file) in enumerate(published.items()):
            header = parse(file, path)
            first = len(spans)
            spans += [Span(source, *piece) for piece in piece_ranges(header, len(file))]
            of_tensors = spans[first + 1 : first + 1 + len(header.tensors)]
            parts.append(Part(header, [Extent(first + 1 + i, 0, s.size) for i, s in enumerate(of_tensors)]))
        self.file: File = merged_file("whole.gguf", parts, View.MODEL, self._put)
        sources = tuple(Source(p, f"sha256:{i}", Locator(p, len(f))) for i, (p, f) in enumerate(published.items()))
        self.manifest = Manifest("m", "", "", "", 0, sources, tuple(spans), (), (self.file,))  # checks itself

    def _put(self, data: bytes) -> str:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        assert digest not in self.literals
        self.literals[digest] = data
        return digest

    def read(self) -> bytes:
        files = list(self.published.values())
        parts = []
        for segment in self.file.segments:
            if isinstance(segment, Literal):
                parts.append(self.literals[segment.blob])
            elif isinstance(segment, Extent):
                span = self.manifest.spans[segment.span]
                data = files[span.source][span.start : span.stop]
                parts.append(data[segment.start : segment.stop])
        return b"".join(parts)


def fixture(pattern: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(SPLIT.glob(pattern))}


# --- published --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ACCEPTED | LAXER)
def test_pieces_tile_a_published_file(name: str) -> None:
    file = (ACCEPTED | LAXER)[name]
    header = parse(file)
    pieces = piece_ranges(header, len(file))
    assert b"".join(file[p.start : p.stop] for p in pieces) == file
    assert [p.start for p in pieces[1 : len(header.tensors) + 1]] == [t.start for t in header.tensors]
    assert all(p.start % header.alignment == 0 for p in pieces[1 : len(header.tensors) + 1])


def test_what_is_named_as_gguf() -> None:
    assert [is_gguf(p) for p in ("a/b.gguf", "a.gguf.part", "gguf")] == [True, False, False]


# --- merged -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["part", "bare"])
def test_a_merged_file_is_llama_cpps(prefix: str) -> None:
    """`bare` has no tensors in its first part."""
    merge = Merge(fixture(f"{prefix}-*.gguf"))
    assert merge.read() == (SPLIT / "merged.gguf").read_bytes()
    assert merge.file == File("whole.gguf", len(merge.read()), View.MODEL, merge.file.segments)


def test_only_header_and_paddings_are_new() -> None:
    merge = Merge(fixture("part-*.gguf"))
    literals = [s for s in merge.file.segments if isinstance(s, Literal)]
    header, *paddings = sorted(merge.literals.values(), key=len, reverse=True)
    assert parse_header(header, merge.file.size, "whole.gguf") == parse(merge.read(), "whole.gguf")
    assert all(not any(p) and len(p) < 32 for p in paddings)
    assert sum(s.size for s in literals) == merge.file.size - sum(t.size for t in parse(merge.read()).tensors)


def split(sizes: Iterable[Iterable[int]], alignment: int | None = None) -> dict[str, bytes]:
    """Parts with one byte tensor of each size, every part numbered as it should be."""
    parts = [list(part) for part in sizes]
    total = sum(map(len, parts))
    files: dict[str, bytes] = {}
    for number, part in enumerate(parts):
        fields = {"split.count": encode(Kind.U16, len(parts)), "split.no": encode(Kind.U16, number)}
        if number == 0:
            fields["split.tensors.count"] = encode(Kind.I32, total)
            fields |= {"general.alignment": encode(Kind.U32, alignment)} if alignment else {}
        specs = [TensorSpec(f"t{number}.{i}", 24, (size,), size) for i, size in enumerate(part)]
        layout = build_header(fields, specs)
        data = b"".join(bytes([number + 1]) * s.size + bytes(p) for s, p in zip(specs, layout.paddings, strict=True))
        files[f"w-{number + 1:05}-of-{len(parts):05}.gguf"] = layout.header + data
    return files


@pytest.mark.parametrize("alignment", [None, 8, 64])
def test_a_merged_file_is_padded_as_its_own_header_says(alignment: int | None) -> None:
    """The official tool pads by 32 whatever the key says. Only the first part has the key."""
    merged = Merge(split([[5, 100], [64, 1], [7]], alignment)).read()
    header = parse(merged)
    assert header.alignment == (alignment or 32)
    data = [(t.name, merged[t.start : t.start + t.size]) for t in header.tensors]
    assert data == [
        ("t0.0", b"\1" * 5), ("t0.1", b"\1" * 100), ("t1.0", b"\2" * 64), ("t1.1", b"\2"), ("t2.0", b"\3" * 7)
    ]  # fmt: skip


def test_a_strange_alignment_costs_few_bytes() -> None:
    merge = Merge(split([range(1, 40), range(40, 80)], 1 << 16))
    header, *zeros = sorted(merge.literals.values(), key=len, reverse=True)
    assert len(header) == 1 << 16 and len(zeros) <= 16 and sum(map(len, zeros)) < 1 << 16
    assert merge.file.size == 80 << 16 == len(merge.read())


def test_nothing_but_zeros_pads_a_merged_file() -> None:
    files = split([[5], [6]])
    first = next(iter(files))
    files[first] = files[first].removesuffix(bytes(27)) + b"\xff" * 27
    assert b"\xff" not in Merge(files).read()


def test_a_last_tensor_without_padding_and_empty_ones() -> None:
    files = split([[0, 5], [0], [], [6]])
    files = {path: file.rstrip(b"\0") if path.startswith("w-00004") else file for path, file in files.items()}
    merged = Merge(files).read()
    assert [(t.size, merged[t.start : t.start + t.size][:1]) for t in parse(merged).tensors] == [
        (0, b""), (5, b"\1"), (0, b""), (6, b"\4")
    ]  # fmt: skip


@pytest.mark.parametrize("swap", [["w-00002-of-00003.gguf", "w-00003-of-00003.gguf"]])
def test_parts_in_another_order_are_refused(swap: list[str]) -> None:
    files = split([[1], [2], [3]])
    files[swap[0]], files[swap[1]] = files[swap[1]], files[swap[0]]
    with pytest.raises(InvalidFormat, match=r"header of w-00002-of-00003.gguf: split.no should be 1 in 16 bits, is 2"):
        Merge(files)


def test_what_is_no_part_is_refused() -> None:
    files = split([[1], [2]])
    with pytest.raises(InvalidFormat, match=r"split.count should be 1"):
        Merge(dict(list(files.items())[:1]))
    plain = {"a.gguf": gguf_files.one()}
    with pytest.raises(InvalidFormat, match=r"header of a.gguf: split.no should be 0 in 16 bits, is None"):
        Merge(plain)


def test_numbers_of_another_width_are_refused() -> None:
    pairs = [gguf_files.pair("split.no", gguf_files.U32, gguf_files.u32(0))]
    with pytest.raises(InvalidFormat, match=r"split.no should be 0 in 16 bits, is 0"):
        Merge({"a.gguf": gguf_files.make(pairs)})


def test_another_number_of_tensors_is_refused() -> None:
    files = split([[1], [2, 3]])
    files["w-00002-of-00002.gguf"] = split([[9], [2]])["w-00002-of-00002.gguf"]
    with pytest.raises(InvalidFormat, match=r"split.tensors.count is 3, the parts have 2"):
        Merge(files)


def test_a_tensor_in_two_parts_is_refused() -> None:
    files = split([[1], [2]])
    files["w-00002-of-00002.gguf"] = files["w-00002-of-00002.gguf"].replace(b"t1.0", b"t0.0")
    with pytest.raises(InvalidFormat, match=r"header of whole.gguf: tensor 't0.0' is there twice"):
        Merge(files)


# --- which files are a split ------------------------------------------------------------------------------------------


def test_complete_splits_are_found() -> None:
    whole = [f"Q8/m-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    assert split_sets([*reversed(whole), "README.md"]) == {"Q8/m.gguf": whole}
    assert split_sets(["m-00001-of-00001.gguf"]) == {"m.gguf": ["m-00001-of-00001.gguf"]}


@pytest.mark.parametrize(
    "paths",
    [
        ["m-00001-of-00002.gguf"],
        ["m-00002-of-00002.gguf"],
        ["m-00001-of-00002.gguf", "m-00002-of-00003.gguf"],
        ["m-1-of-2.gguf", "m-2-of-2.gguf"],
        ["m-00000-of-00000.gguf", "m-00001-of-00000.gguf"],
        ["m-00001-of-99999999999.gguf"],
        ["m-00001-of-00001.gguf", "m.gguf"],
        ["a/-00001-of-00001.gguf"],
        ["m-٠٠٠٠١-of-٠٠٠٠١.gguf"],  # noqa: RUF001
    ],
)
def test_what_is_no_split_or_has_its_merged_file(paths: list[str]) -> None:
    assert split_sets(paths) == {}


# --- what two quantizations share -------------------------------------------------------------------------------------


@pytest.mark.loaders
def test_a_second_quantization_shares_all_tensors_of_equal_type(tmp_path: Path) -> None:
    """As Q4_K_M after Q4_K_S: half of the down and value projections are of a larger type, all else is the same."""
    gguf = pytest.importorskip("gguf", reason="needs the gguf package")
    numpy = pytest.importorskip("numpy")
    small, large = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q5_1

    def pieces(name: str, larger: set[str]) -> dict[bytes, int]:
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        writer.add_name(name)
        random = numpy.random.default_rng(1)
        for layer in range(4):
            writer.add_tensor(f"blk.{layer}.attn_norm.weight", random.standard_normal(96, dtype=numpy.float32))
            for part, shape in (
                ("attn_q", (96, 96)),
                ("attn_v", (32, 96)),
                ("ffn_up", (256, 96)),
                ("ffn_down", (96, 256)),
            ):
                key = f"blk.{layer}.{part}.weight"
                kind = large if key in larger else small
                values = random.standard_normal(shape, dtype=numpy.float32)
                writer.add_tensor(key, gguf.quants.quantize(values, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        file = (tmp_path / name).read_bytes()
        found = piece_ranges(parse(file), len(file))
        return {hashlib.sha256(file[p.start : p.stop]).digest(): p.size for p in found}

    before = pieces("s.gguf", {"blk.0.attn_v.weight"})
    after = pieces("m.gguf", {f"blk.{i}.{part}.weight" for i in (0, 1) for part in ("attn_v", "ffn_down")})
    new = sum(size for digest, size in after.items() if digest not in before)
    quantized = sum(gguf.quants.quant_shape_to_byte_shape((96, n), large)[1] * 96 for n in (256, 256))
    value = gguf.quants.quant_shape_to_byte_shape((32, 96), large)[1] * 32
    header = next(iter(after.values()))
    assert new == header + quantized + value  # one attn_v was large before
    assert 1 - new / sum(after.values()) > 0.6
