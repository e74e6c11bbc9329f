"""Similarity of tensors: by hand for each dtype, by a straightforward numpy for many."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cakefs.formats.safetensors import DTYPES
from cakefs.plan.similarity import Measure, Similarity


def measure(dtype: str, a: bytes, b: bytes, block: int = 1 << 20) -> Similarity:
    found = Measure(dtype)
    for at in range(0, len(a), block):
        found.add(memoryview(a)[at : at + block], memoryview(b)[at : at + block])
    return found.result()


def packed(dtype: str, values: list[float]) -> bytes:
    return np.array(values, dtype).tobytes()


def bf16(values: list[float]) -> bytes:
    """Of numbers that it has exactly."""
    return (np.array(values, "<f4").view("<u4") >> 16).astype("<u2").tobytes()


def test_by_hand() -> None:
    """(3, 4) and (4, 3): cosine 24/25, one apart; 0x4040 and 0x4080 differ in two bits of one byte."""
    found = measure("BF16", bf16([3, 4]), bf16([4, 3]))
    assert found == Similarity(4, 2, 4, 24 / 25, 1.0, 0, 0)
    assert not found.equal
    assert measure("F32", packed("<f4", [1, 0]), packed("<f4", [0, -2])) == Similarity(8, 5, 9, 0.0, 2.0, 0, 0)
    same = measure("F16", packed("<f2", [1, 2]), packed("<f2", [1, 2]))
    assert same.equal and same.cosine == pytest.approx(1) and same.max_diff == 0


@pytest.mark.parametrize(
    ("dtype", "codes", "values"),
    [
        ("F8_E4M3", [0x00, 0x01, 0x08, 0x38, 0x7E, 0xB8], [0, 2**-9, 2**-6, 1, 448, -1]),
        ("F8_E5M2", [0x00, 0x01, 0x04, 0x3C, 0x7B, 0xBC], [0, 2**-16, 2**-14, 1, 57344, -1]),
        ("F8_E4M3FNUZ", [0x00, 0x01, 0x08, 0x40, 0x7F, 0xC0], [0, 2**-10, 2**-7, 1, 240, -1]),
        ("F8_E5M2FNUZ", [0x00, 0x01, 0x04, 0x40, 0x7F, 0xC0], [0, 2**-17, 2**-15, 1, 57344, -1]),
        ("F8_E8M0", [0x00, 0x7F, 0x80, 0xFE], [2.0**-127, 1, 2, 2.0**127]),
        ("BOOL", [0, 1], [0, 1]),
        ("U8", [0, 255], [0, 255]),
        ("I8", [0, 0x80, 0x7F], [0, -128, 127]),
    ],
)
def test_the_values_of_eight_bits(dtype: str, codes: list[int], values: list[float]) -> None:
    """Each against a one, by the difference."""
    one = {"F8_E4M3": 0x38, "F8_E5M2": 0x3C, "F8_E4M3FNUZ": 0x40, "F8_E5M2FNUZ": 0x40, "F8_E8M0": 0x7F}.get(dtype, 1)
    for code, value in zip(codes, values, strict=True):
        assert measure(dtype, bytes([code]), bytes([one])).max_diff == abs(value - 1)


@pytest.mark.parametrize(
    ("dtype", "code"), [("F8_E4M3", 0x7F), ("F8_E4M3", 0xFF), ("F8_E5M2", 0x7C), ("F8_E5M2", 0x7D), ("F8_E5M2", 0xFF),
                        ("F8_E4M3FNUZ", 0x80), ("F8_E5M2FNUZ", 0x80), ("F8_E8M0", 0xFF)]
)  # fmt: skip
def test_eight_bits_that_are_no_number(dtype: str, code: int) -> None:
    found = measure(dtype, bytes([code, 0x40]), bytes([0x40, 0x40]))
    assert (found.left_out, found.clashes, found.max_diff) == (1, 1, 0)


def test_packed_elements_have_bytes_and_bits_only() -> None:
    for dtype in ("F4", "F6_E2M3", "F6_E3M2", "Q4_K"):
        assert measure(dtype, b"\x0f\x00\x01", b"\xff\x00\x00") == Similarity(3, 1, 5, None, None, 0, 0)


def test_integers_are_exact_from_end_to_end() -> None:
    low, high = (np.iinfo(np.int64).min, np.iinfo(np.int64).max)
    assert measure("I64", packed("<i8", [low]), packed("<i8", [high])).max_diff == 2**64 - 1
    assert measure("I64", packed("<i8", [high]), packed("<i8", [high - 1])).max_diff == 1
    top = np.array([2**64 - 1], "<u8").tobytes()
    assert measure("U64", top, packed("<u8", [0])).max_diff == 2**64 - 1
    assert isinstance(measure("U8", b"\1", b"\1").max_diff, int)


def test_what_is_not_finite_is_left_out_and_counted() -> None:
    a = packed("<f4", [1, math.nan, math.inf, math.inf, -math.inf, 5])
    b = packed("<f4", [2, math.nan, math.inf, 0, math.inf, math.nan])
    found = measure("F32", a, b)
    assert (found.left_out, found.clashes) == (5, 3)
    assert (found.max_diff, found.cosine) == (1.0, 1.0)
    nothing = measure("F32", a[4:8], b[4:8])
    assert (nothing.equal, nothing.cosine, nothing.max_diff, nothing.left_out) == (True, None, None, 1)


def test_a_side_of_zeros_has_no_direction() -> None:
    found = measure("F32", packed("<f4", [0, -0.0]), packed("<f4", [3, 4]))
    assert (found.cosine, found.max_diff) == (None, 4.0)


@pytest.mark.parametrize("scale", [1e300, 1e-300, 1.0])
def test_f64_neither_overflows_nor_vanishes(scale: float) -> None:
    a, b = [3 * scale, 4 * scale], [4 / scale, 3 / scale]
    assert measure("F64", packed("<f8", a), packed("<f8", b), block=8).cosine == pytest.approx(24 / 25)
    grows = measure("F64", packed("<f8", [1e-300, 3e200]), packed("<f8", [7e-200, -1e100]), block=8)
    assert grows.cosine == pytest.approx(-1)
    assert measure("F64", packed("<f8", [1.5e308]), packed("<f8", [-1.5e308])).max_diff == math.inf


PLAIN = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I32": "<i4", "U16": "<u2", "I16": "<i2", "U32": "<u4"}


@given(st.sampled_from(sorted(PLAIN)), st.binary(max_size=400), st.binary(max_size=400), st.sampled_from([8, 64, 4096]))
def test_as_numpy_would_have_it(dtype: str, a: bytes, b: bytes, block: int) -> None:
    size = min(len(a), len(b)) // 8 * 8
    a, b = a[:size], b[:size]
    found = measure(dtype, a, b, block)
    bits = int.from_bytes(a, "big") ^ int.from_bytes(b, "big")
    assert (found.size, found.flipped_bits) == (size, bits.bit_count())
    assert found.equal_bytes == sum(x == y for x, y in zip(a, b, strict=True))
    with np.errstate(all="ignore"):
        left, right = (np.frombuffer(x, PLAIN[dtype]).astype(np.longdouble) for x in (a, b))
        finite = np.isfinite(left) & np.isfinite(right)
        assert found.left_out == np.count_nonzero(~finite)
        left, right = left[finite], right[finite]
        if not len(left):
            assert (found.max_diff, found.cosine) == (None, None)
            return
        assert found.max_diff is not None
        assert found.max_diff == pytest.approx(float(np.abs(left - right).max()), rel=1e-15)
        norms = np.sqrt((left * left).sum()) * np.sqrt((right * right).sum())
        if found.cosine is not None:
            assert found.cosine == pytest.approx(float((left * right).sum() / norms), abs=1e-9)
        else:
            assert norms == 0


def test_every_dtype_of_the_format_is_known() -> None:
    for dtype in DTYPES:
        found = measure(dtype, bytes(range(48)), bytes(range(48)))
        assert found.equal
        assert (found.max_diff is None) == bool(DTYPES[dtype].bits % 8)
