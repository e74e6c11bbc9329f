"""How far two tensors of one dtype and shape are apart, block by block in bounded memory. Pure, numpy only.

Bytes and bits are compared for every dtype; values for those whose elements are whole bytes. Sums are in float64
(scaled where F64 would leave its range), differences of integers exact. An element that is NaN or infinite on either
side takes no part in cosine and difference but is counted: no number hides it. C64 counts as two F32.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cakefs.formats.safetensors import DTYPES

Array = NDArray[Any]

_BLOCK = 1 << 16  # Bytes at a time: what is calculated of them fits the cache (measured: 64 to 128 KiB).
_FLOATS = {"F64": "<f8", "F32": "<f4", "C64": "<f4", "F16": "<f2"}
_INTEGERS = {
    "BOOL": "u1", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8",
    "I64": "<i8",
}  # fmt: skip


class Similarity(NamedTuple):
    """Attributes:
    size: Bytes of either side.
    cosine: None without values, and where a side is all zero.
    max_diff: The largest |a - b|; an int for integers, None without values.
    left_out: Elements that are NaN or infinite on a side.
    clashes: Those of them that are not the same bits on both sides.
    """

    size: int
    equal_bytes: int
    flipped_bits: int
    cosine: float | None
    max_diff: float | int | None
    left_out: int
    clashes: int

    @property
    def equal(self) -> bool:
        return self.equal_bytes == self.size


class Measure:
    """Takes two tensors in, block by block."""

    def __init__(self, dtype: str) -> None:
        self._decode = _decoder(dtype)
        self._is_integer = dtype in _INTEGERS
        self._products = _Products(scaled=dtype == "F64")
        self._size = self._equal_bytes = self._flipped_bits = self._finite = self._left_out = self._clashes = 0
        self._max_diff: float | int = 0 if self._is_integer else 0.0

    def add(self, a: memoryview, b: memoryview) -> None:
        """The next bytes of both, as many of each, whole elements."""
        with np.errstate(all="ignore"):
            for at in range(0, len(a), _BLOCK):
                self._add(np.frombuffer(a[at : at + _BLOCK], np.uint8), np.frombuffer(b[at : at + _BLOCK], np.uint8))

    def result(self) -> Similarity:
        known = self._decode is not None and bool(self._finite)
        return Similarity(
            self._size,
            self._equal_bytes,
            self._flipped_bits,
            self._products.cosine() if known else None,
            self._max_diff if known else None,
            self._left_out,
            self._clashes,
        )

    def _add(self, a: Array, b: Array) -> None:
        flipped = a ^ b
        self._size += len(a)
        unequal = int(np.count_nonzero(flipped))
        self._equal_bytes += len(a) - unequal
        if unequal:
            self._flipped_bits += int.from_bytes(flipped.tobytes(), "little").bit_count()
        if self._decode is None:
            return
        left, right = self._decode(a), self._decode(b)
        if self._is_integer:
            self._max_diff = max(self._max_diff, _integer_distance(left, right))
            left, right = left.astype(np.float64), right.astype(np.float64)
        else:
            left, right = self._finite_only(left, right, flipped)
            self._max_diff = max(self._max_diff, float(np.abs(left - right).max(initial=0.0)))
        self._finite += len(left)
        self._products.add(left, right)

    def _finite_only(self, a: Array, b: Array, flipped: Array) -> tuple[Array, Array]:
        finite = np.isfinite(a) & np.isfinite(b)
        if finite.all():
            return a, b
        out = ~finite
        self._left_out += int(np.count_nonzero(out))
        self._clashes += int(np.count_nonzero(flipped.reshape(len(a), -1).any(axis=1) & out))
        return a[finite], b[finite]


class _Products:
    """Sums of a*a, b*b and a*b in float64.

    Args:
        scaled: Keep them in range by powers of two: a side's sums count in squares of 2**its exponent.
    """

    def __init__(self, *, scaled: bool) -> None:
        self._scaled = scaled
        self._exponents = [-2000, -2000] if scaled else [0, 0]
        self._aa = self._bb = self._ab = 0.0

    def add(self, a: Array, b: Array) -> None:
        if self._scaled:
            a, b = self._fit(0, a), self._fit(1, b)
        self._aa += _dot(a, a)
        self._bb += _dot(b, b)
        self._ab += _dot(a, b)

    def _fit(self, side: int, values: Array) -> Array:
        """Scales the values, or first the sums where the values are larger than any before."""
        exponent = int(np.frexp(np.abs(values).max(initial=0.0))[1])
        if exponent > self._exponents[side] and values.any():
            shift = self._exponents[side] - exponent
            self._exponents[side] = exponent
            self._ab = math.ldexp(self._ab, shift)
            if side == 0:
                self._aa = math.ldexp(self._aa, 2 * shift)
            else:
                self._bb = math.ldexp(self._bb, 2 * shift)
        fitted: Array = np.ldexp(values, -self._exponents[side])
        return fitted

    def cosine(self) -> float | None:
        norms = math.sqrt(self._aa) * math.sqrt(self._bb)
        return max(-1.0, min(1.0, self._ab / norms)) if norms else None


def _dot(a: Array, b: Array) -> float:
    """In this thread: BLAS would wake one for each core, for microseconds of work."""
    return float(np.einsum("i,i->", a, b))


def _integer_distance(a: Array, b: Array) -> int:
    """Exact: the difference of two 64-bit integers fits 64 bits without sign."""
    wide = np.uint64 if a.dtype.kind == "u" else np.int64
    a, b = a.astype(wide), b.astype(wide)
    return int((np.maximum(a, b).view(np.uint64) - np.minimum(a, b).view(np.uint64)).max(initial=0))


def _decoder(dtype: str) -> Callable[[Array], Array] | None:
    """Bytes -> values: float64, or integers as they are. None for packed elements, whole bytes or not."""
    if dtype not in DTYPES or DTYPES[dtype].bits % 8:
        return None
    if dtype in _INTEGERS:
        return lambda data: data.view(_INTEGERS[dtype])
    if dtype in _FLOATS:
        return lambda data: data.view(_FLOATS[dtype]).astype(np.float64)
    if dtype == "BF16":
        return lambda data: (data.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    table = _EIGHT_BITS[dtype]()
    return lambda data: table[data]


def _small_floats(exponent_bits: int, bias: int, special: Callable[[int, int], float | None]) -> Array:
    """All values of an 8-bit float; `special` takes exponent and fraction and answers for those that are not usual."""
    fraction_bits = 7 - exponent_bits
    values = np.empty(256)
    for code in range(256):
        exponent, fraction = (code & 0x7F) >> fraction_bits, code & ((1 << fraction_bits) - 1)
        size = special(code, fraction)
        if size is None and exponent:
            size = math.ldexp((1 << fraction_bits) + fraction, exponent - bias - fraction_bits)
        elif size is None:
            size = math.ldexp(fraction, 1 - bias - fraction_bits)
        values[code] = -size if code & 0x80 else size
    return values


def _e4m3() -> Array:
    return _small_floats(4, 7, lambda code, fraction: math.nan if code & 0x7F == 0x7F else None)


def _e5m2() -> Array:
    def special(code: int, fraction: int) -> float | None:
        return None if code & 0x7C != 0x7C else math.nan if fraction else math.inf

    return _small_floats(5, 15, special)


def _e4m3fnuz() -> Array:
    return _small_floats(4, 8, lambda code, fraction: math.nan if code == 0x80 else None)


def _e5m2fnuz() -> Array:
    return _small_floats(5, 16, lambda code, fraction: math.nan if code == 0x80 else None)


def _e8m0() -> Array:
    """Powers of two alone."""
    return np.array([math.ldexp(1, code - 127) for code in range(255)] + [math.nan])


_EIGHT_BITS: dict[str, Callable[[], Array]] = {
    "F8_E4M3": _e4m3,
    "F8_E5M2": _e5m2,
    "F8_E4M3FNUZ": _e4m3fnuz,
    "F8_E5M2FNUZ": _e5m2fnuz,
    "F8_E8M0": _e8m0,
}
