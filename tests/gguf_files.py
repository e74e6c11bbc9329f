"""Good and hostile GGUF files, made by hand: every rule of the format with its violation.

The verdicts were compared with llama.cpp's own reader (gguf.cpp of llama-cpp-python 0.3.36) but for the two lists that
say otherwise.
"""

import struct
from collections.abc import Sequence

U8, U16, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 2, 4, 5, 6, 7, 8, 9, 10
MAX = 2**64 - 1


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return u64(len(data)) + data


def pair(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(key) + u32(kind) + payload


def array(key: str, kind: int, count: int, payload: bytes = b"") -> bytes:
    return pair(key, ARRAY, u32(kind) + u64(count) + payload)


def info(name: str | bytes, dims: Sequence[int], type_id: int = 0, offset: int = 0, count: int | None = None) -> bytes:
    shape = b"".join(map(u64, dims))
    return text(name) + u32(len(dims) if count is None else count) + shape + u32(type_id) + u64(offset)


def make(
    pairs: Sequence[bytes] = (),
    infos: Sequence[bytes] = (),
    data: bytes | int = b"",
    *,
    version: int = 3,
    magic: bytes = b"GGUF",
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    """A file; `counts` of tensors and of pairs when they should lie."""
    tensors, keys = counts or (len(infos), len(pairs))
    head = magic + u32(version) + u64(tensors) + u64(keys) + b"".join(pairs) + b"".join(infos)
    head += bytes(-len(head) % alignment)
    return head + (bytes(data) if isinstance(data, int) else data)


def one(dims: Sequence[int] = (8,), type_id: int = 0, offset: int = 0, data: bytes | int = 32) -> bytes:
    return make([], [info("a", dims, type_id, offset)], data)


SIZES = {U8: 1, 1: 1, U16: 2, 3: 2, U32: 4, I32: 4, F32: 4, BOOL: 1, U64: 8, 11: 8, 12: 8}
ALIGN = pair("general.alignment", U32, b"")
ARCH = pair("general.architecture", STRING, text("llama"))
SCALARS = [
    pair("u8", 0, b"\xff"),
    pair("i8", 1, b"\xff"),
    pair("u16", 2, b"\xff\xff"),
    pair("i16", 3, b"\xff\xff"),
    pair("u32", 4, b"\xff" * 4),
    pair("i32", 5, b"\xff" * 4),
    pair("f32", 6, struct.pack("<f", 1.5)),
    pair("bool", 7, b"\x02"),
    pair("string", 8, text("é\0🍰")),
    pair("u64", 10, b"\xff" * 8),
    pair("i64", 11, b"\xff" * 8),
    pair("f64", 12, struct.pack("<d", 0.1)),
]

ACCEPTED = {
    "nothing in it": make(),
    "no tensors, not padded": make([ARCH], alignment=1),
    "version 2": make([ARCH], [info("a", [8])], 32, version=2),
    "every kind of value": make(SCALARS),
    "every kind of array": make([array(f"a{kind}", kind, 2, bytes(2 * size)) for kind, size in SIZES.items()]),
    "arrays of strings": make([array("t", STRING, 3, text("a") + text("") + text("bc")), array("e", STRING, 0)]),
    "alignment 8": make([ALIGN + u32(8)], [info("a", [3]), info("b", [2], 0, 16)], 24, alignment=8),
    "alignment 1": make([ALIGN + u32(1)], [info("a", [3], 24), info("b", [2], 24, 3)], 5, alignment=1),
    "two tensors, padded": make([], [info("a", [5]), info("b", [3], 0, 32)], 64),
    "last one not padded": make([], [info("a", [5]), info("b", [3], 0, 32)], 44),
    "more behind the last": make([], [info("a", [5])], 100),
    "quantized": one([256, 2], 12, data=288),
    "rank 0": one([], data=4),
    "rank 4": one([2, 1, 2, 2]),
    "no elements": make([], [info("a", [0]), info("b", [0, 7]), info("c", [8])], 32),
    "name of 63 bytes": make([], [info("n" * 63, [8])], 32),
    "empty name": make([], [info("", [8])], 32),
}  # fmt: skip

LAXER = {  # than llama.cpp, which has to know the type
    "unknown type, then another": make([], [info("a", [7, 3], 99), info("b", [8], 0, 64)], 96),
    "unknown type, last": make([], [info("a", [8]), info("b", [1], 4, 32)], 45),
}

STRICTER = {  # than llama.cpp
    "alignment of 2 GiB": (make([ALIGN + u32(2**31)]), "alignment 2147483648 is not"),
    "key is no UTF-8": (make([pair(b"\xff", U8, b"\0")]), "utf-8"),
    "name is no UTF-8": (make([], [info(b"\xff", [8])], 32), "utf-8"),
    "name is a lone surrogate": (make([], [info(b"\xed\xa0\x80", [8])], 32), "utf-8"),
    "data ends early": (one(data=31), "ends before"),
    "no data": (one(data=0), "ends before"),
    "no data, far too large": (one([2**60, 2]), "ends before"),
    "key of 100 KB": (make([pair("k" * 100_000, U8, b"\0")]), "a key of 100000 bytes"),
}

REFUSED = {
    "250,001 tensors": (make([ARCH], counts=(250_001, 0)), "250001 tensors"),
    "100,001 keys": (make([ARCH], counts=(0, 100_001)), "100001 keys"),
    "empty": (b"", "file of 0 bytes ends before its counts"),
    "magic only": (b"GGUF", "ends before its counts"),
    "another magic": (make(magic=b"GGUX"), "not how a GGUF file begins"),
    "a zip file": (b"PK\3\4" + bytes(60), "not how a GGUF file begins"),
    "version 0": (make(version=0), "version 0"),
    "version 1": (make(version=1), "GGUF v1 is older"),
    "version 4": (make(version=4), "version 4"),
    "big-endian": (make(version=0x03000000), "big-endian GGUF (version 3)"),
    "GGML": (b"lmgg" + bytes(60), "GGML is older"),
    "GGMF": (b"fmgg" + u32(1) + bytes(60), "GGMF v1 is older"),
    "GGJT": (b"tjgg" + u32(3) + bytes(60), "GGJT v3 is older"),
    "more keys than bytes": (make([ARCH], counts=(0, 1000)), "ends before its keys"),
    "2^64-1 keys": (make([ARCH], counts=(0, MAX)), "more than it may have"),
    "2^64-1 tensors": (make([ARCH], counts=(MAX, 1)), "more than it may have"),
    "more tensors than bytes": (make([ARCH], counts=(1000, 1)), "ends before its keys and tensors"),
    "key twice": (make([ARCH, ARCH]), "'general.architecture' is there twice"),
    "empty key": (make([pair("", U8, b"\0")]), "a key is empty"),
    "key longer than the file": (make([u64(1 << 15) + b"k" + u32(U8) + b"\0"]), "ends before a key"),
    "unknown kind": (make([pair("k", 13, b"\0" * 8)]), "unknown type 13"),
    "kind of 2^32-1": (make([pair("k", 2**32 - 1, b"\0" * 8)]), "unknown type 4294967295"),
    "array of arrays": (make([array("k", ARRAY, 1, u32(U8) + u64(1) + b"\0")]), "array of arrays"),
    "array of an unknown kind": (make([array("k", 77, 1, b"\0" * 8)]), "unknown type 77"),
    "array of 2^64-1 numbers": (make([array("k", U8, MAX)]), "ends before the value of 'k'"),
    "array of 2^64-1 strings": (make([array("k", STRING, MAX)]), "ends before the value of 'k'"),
    "array of 2^40 strings of none": (make([array("k", STRING, 2**40, bytes(64))]), "ends before the value of 'k'"),
    "string longer than the file": (make([pair("k", STRING, u64(2**40))]), "ends before the value of 'k'"),
    "string of 2^64-1": (make([pair("k", STRING, u64(MAX))]), "ends before the value of 'k'"),
    "item longer than the file": (
        make([array("k", STRING, 2, u64(2**63) + bytes(32))]), "ends before the value of 'k'"
    ),
    "alignment 0": (make([ALIGN + u32(0)]), "alignment 0"),
    "alignment 24": (make([ALIGN + u32(24)]), "alignment 24"),
    "alignment of 64 bits": (make([pair("general.alignment", U64, u64(32))]), "general.alignment is not"),
    "alignment as array": (make([array("general.alignment", U32, 1, u32(32))]), "general.alignment is not"),
    "alignment past the end": (
        make([ALIGN + u32(2**16)], [info("a", [8])], 32), "ends before its first tensor"
    ),
    "tensor twice": (make([], [info("a", [8]), info("a", [8], 0, 32)], 64), "'a' is there twice"),
    "name of 64 bytes": (make([], [info("n" * 64, [8])], 32), "name of a tensor of 64 bytes"),
    "rank 5": (one([1] * 5), "5 dimensions"),
    "rank of 2^32-1": (make([], [info("a", [8], count=2**32 - 1)], 32), "4294967295 dimensions"),
    "dims overflow": (one([2**32, 2**32]), "overflow"),
    "dim of 2^63": (one([2**63]), "overflow"),
    "dims overflow before a zero": (one([2**40, 2**40, 0]), "overflow"),
    "row is no whole block": (one([255], 12, data=288), "whole blocks of 256"),
    "first offset is not 0": (one(offset=32, data=64), "at offset 32, not at 0"),
    "hole": (make([], [info("a", [8]), info("b", [8], 0, 64)], 96), "at offset 64, not at 32"),
    "overlap": (make([], [info("a", [8]), info("b", [8], 0, 0)], 64), "at offset 0, not at 32"),
    "out of order": (make([], [info("a", [8], 0, 32), info("b", [8], 0, 0)], 64), "at offset 32, not at 0"),
    "not aligned": (make([], [info("a", [4]), info("b", [8], 0, 16)], 64), "at offset 16, not at 32"),
    "unknown type, offset going back": (
        make([], [info("a", [8]), info("b", [8], 99, 32), info("c", [8], 0, 0)], 96), "ends before"
    ),
    "header cut in a tensor": (make([], [info("a", [8])], alignment=1)[:-3], "ends before"),
}  # fmt: skip
