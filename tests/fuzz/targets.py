"""What is fuzzed: each target takes any bytes and fails unless they are read right or refused properly.

"Properly" is an InvalidFormat with one short printable line. What is read has to lie within the file, to be the same
whatever part of the file was there first, and to be what the official reader sees where there is one.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

from cakefs.errors import InvalidFormat
from cakefs.formats import ggml, gguf, safetensors, sharded
from cakefs.formats.ggufalike import read_alike
from cakefs.formats.ggufwrite import TensorSpec, build_header
from cakefs.formats.steps import run
from cakefs.formats.torchckpt import read_checkpoint
from cakefs.model import ByteRange, is_safe_path
from cakefs.plan.gguf_compose import piece_ranges
from tests import gguf_files, official
from tests.torch_files import legacy, zipped

Target = Callable[[bytes], None]


class Refused(Exception):
    """The bytes are refused, as they may be."""


@contextmanager
def refusals() -> Iterator[None]:
    try:
        yield
    except InvalidFormat as error:
        assert len(error.message) < 400 and error.message.isprintable(), error.message
        raise Refused from None


def reader(data: bytes) -> Callable[[ByteRange], bytes]:
    def read(part: ByteRange) -> bytes:
        assert 0 <= part.start < part.stop <= len(data), part
        return data[part.start : part.stop]

    return read


def fuzz_safetensors(data: bytes) -> None:
    with refusals():
        header = safetensors.parse_header(data, len(data), "x.safetensors")
    theirs = official.read(data)
    assert theirs is not None, "the official library refuses it"
    assert {e.name: (e.dtype, e.shape) for e in header.entries} == {n: t[:2] for n, t in theirs.items()}
    again = safetensors.build_header(header.entries, header.metadata)
    parsed = safetensors.parse_header(again, len(again) + len(data) - header.size, "x.safetensors")
    assert parsed.entries == header.entries


def fuzz_gguf(data: bytes) -> None:
    try:
        with refusals():
            header = gguf.parse_header(data, len(data), "x.gguf")
    except Refused:
        try:
            run(gguf.read_header(len(data), "x.gguf", 1), reader(data))
        except InvalidFormat:
            raise Refused from None
        raise AssertionError("read in pieces it is accepted") from None
    assert isinstance(header, gguf.Header), "it asks for more than there is"
    assert run(gguf.read_header(len(data), "x.gguf", 1), reader(data)) == header
    pieces = piece_ranges(header, len(data))
    assert b"".join(data[p.start : p.stop] for p in pieces) == data
    for key, found in header.fields.items():
        header.get(key) if found.length is None else header.array(key)
    fields = {key: header.raw(key) for key in header.fields}
    specs = [TensorSpec(t.name, t.type_id, t.dims, t.size) for t in header.tensors]
    layout = build_header(fields, specs)
    again = gguf.parse_header(layout.header, layout.size, "x.gguf")
    assert isinstance(again, gguf.Header)
    assert {key: again.raw(key) for key in again.fields} == fields
    assert [t[:3] for t in again.tensors] == [s[:3] for s in specs]
    assert all(t.size == s.size or t.type_id not in ggml.TYPES for t, s in zip(again.tensors, specs, strict=True))


@functools.cache
def _vocabulary() -> bytes:
    """A GGUF file with two long arrays."""
    words = b"".join(gguf_files.text(f"{i:06}") for i in range(5000))
    pairs = [
        gguf_files.pair("name", gguf_files.STRING, gguf_files.text("x")),
        gguf_files.array("tokens", gguf_files.STRING, 5000, words),
        gguf_files.array("types", gguf_files.I32, 20_000, bytes(80_000)),
    ]
    return gguf_files.make(pairs, [gguf_files.info("a", [8])], 8192)


def fuzz_alike(data: bytes) -> None:
    """A header read by another one: five bytes each say what is changed in the file, and where."""
    like = gguf.parse_header(_vocabulary(), len(_vocabulary()), "like.gguf")
    assert isinstance(like, gguf.Header)
    file = bytearray(_vocabulary())
    for at in range(0, len(data) - 4, 5):
        file[int.from_bytes(data[at : at + 4], "little") % len(file)] = data[at + 4]
    with refusals():
        found = run(read_alike(len(file), "x.gguf", like), reader(bytes(file)))
    if found is None:
        raise Refused
    assert b"".join(file[p.start : p.stop] for p in piece_ranges(found.outline(), len(file))) == file


def fuzz_torch(data: bytes) -> None:
    with refusals():
        found = run(read_checkpoint(len(data), "x.bin"), reader(data))
    assert found.tensors
    for view in found.tensors:
        place = found.storages[view.storage]
        assert 0 <= place.start <= place.stop <= len(data)
        assert view.name.encode() is not None and view.size >= 0
        last = view.offset + sum((n - 1) * s for n, s in zip(view.shape, view.stride, strict=True))
        assert 0 in view.shape or (last + 1) * view.item <= place.size
        assert safetensors.tensor_size(view.dtype, view.shape) == view.size
    filled = sorted(place for place in found.storages.values() if place.size)
    assert all(one.stop <= following.start for one, following in pairwise(filled))


def fuzz_pickle(data: bytes) -> None:
    """In both containers, so that no checksum stands in the way."""
    if not any([check(fuzz_torch, zipped(data)), check(fuzz_torch, legacy(data))]):
        raise Refused


def fuzz_index(data: bytes) -> None:
    with refusals():
        index = sharded.parse_index(data, "model.safetensors.index.json")
    assert index.weight_map
    for name, shard in index.weight_map.items():
        assert is_safe_path(shard) and name.encode() is not None


TARGETS: dict[str, Target] = {
    "safetensors": fuzz_safetensors,
    "gguf": fuzz_gguf,
    "alike": fuzz_alike,
    "torch": fuzz_torch,
    "pickle": fuzz_pickle,
    "index": fuzz_index,
}


def check(target: Target, data: bytes) -> bool:
    """Whether the bytes were accepted; raises what is wrong with the parser."""
    try:
        target(data)
    except Refused:
        return False
    return True
