"""Elements calculated on read: against exact arithmetic, and against what torch gave."""

import struct
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cakefs.errors import InvalidFormat
from cakefs.model import Computed, Extent
from cakefs.plan.compute import evaluate, fused_add, needs, round_odd, sum_weights

F32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
F64 = st.floats(allow_nan=False, allow_infinity=False)
BITS = {"F16": (11, -24), "BF16": (8, -133), "F32": (24, -149), "F64": (53, -1074)}
LARGEST = {"F16": 16, "BF16": 128, "F32": 128, "F64": 1024}


def nearest(value: Fraction, dtype: str) -> float:
    """Round half to even, from the definition: a multiple of the unit in the last place."""
    bits, smallest = BITS[dtype]
    size = abs(value)
    if not size:
        return 0.0
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if size < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - bits + 1, smallest)
    units, rest = divmod(size, unit)
    units += rest * 2 > unit or (rest * 2 == unit and units % 2)
    rounded = units * unit
    if rounded >= Fraction(2) ** LARGEST[dtype]:
        return float("-inf") if value < 0 else float("inf")
    return float(rounded) if value > 0 else -float(rounded)


def node(op: str, dtype: str, count: int, dtypes: Sequence[str], params: Sequence[float] = ()) -> Computed:
    size = {"F64": 8, "F32": 4}.get(dtype, 2)
    extents = tuple(Extent(i, 0, count * {"F64": 8, "F32": 4}.get(d, 2)) for i, d in enumerate(dtypes))
    return Computed(op, dtype, count * size, extents, tuple(dtypes), tuple(params))


def f32(*values: float) -> bytes:
    return struct.pack(f"<{len(values)}f", *values)


def bf16(*values: float) -> bytes:
    return b"".join(struct.pack("<f", v)[2:] for v in values)


def from_bf16(data: bytes) -> list[float]:
    return [struct.unpack("<f", b"\0\0" + data[i : i + 2])[0] for i in range(0, len(data), 2)]


@given(st.lists(st.tuples(F32, F32), min_size=1, max_size=20), F32)
def test_a_fused_float32_step_rounds_once(pairs: list[tuple[float, float]], weight: float) -> None:
    values, totals = (np.array(column, np.float32) for column in zip(*pairs, strict=True))
    with np.errstate(all="ignore"):
        result = fused_add(values, np.float32(weight), totals)
    for got, (value, total) in zip(result, pairs, strict=True):
        assert float(got) == nearest(Fraction(value) * Fraction(weight) + Fraction(total), "F32")


@given(st.floats(2.0**-120, 2.0**100, width=32), st.sampled_from([2**-23, 2**-22, -(2**-24)]), st.sampled_from([1, -1]))
def test_a_hair_beside_the_middle_is_seen(total: float, hair: float, sign: int) -> None:
    """Rounded to float64 first, these fall on the middle between two float32, and then to the wrong side."""
    unit = float(np.spacing(np.float32(total)))
    value, weight = np.float32(unit / 2 * (1 + hair) * sign), np.float32(1 - hair)
    got = fused_add(np.array([value]), weight, np.array([total], np.float32))[0]
    assert float(got) == nearest(Fraction(float(value)) * Fraction(float(weight)) + Fraction(total), "F32")


@given(st.lists(st.tuples(F64, F64), min_size=1, max_size=8), F64)
def test_a_fused_float64_step_rounds_once(pairs: list[tuple[float, float]], weight: float) -> None:
    values, totals = (np.array(column, np.float64) for column in zip(*pairs, strict=True))
    with np.errstate(all="ignore"):
        result = fused_add(values, np.float64(weight), totals)
    for got, (value, total) in zip(result, pairs, strict=True):
        assert float(got) == nearest(Fraction(value) * Fraction(weight) + Fraction(total), "F64")


@given(st.floats(-1, 1), st.floats(-1, 1))
def test_a_fused_float64_step_cancels_exactly(value: float, weight: float) -> None:
    total = np.array([-value * weight])
    got = fused_add(np.array([value]), np.float64(weight), total)[0]
    assert float(got) == nearest(Fraction(value) * Fraction(weight) + Fraction(float(total[0])), "F64")


@given(F64, F64)
def test_rounding_to_odd_keeps_what_a_second_rounding_needs(a: float, b: float) -> None:
    exact = Fraction(a) + Fraction(b)
    if abs(exact) < 2**1020:
        with np.errstate(all="ignore"):
            odd = float(round_odd(np.array([a]), np.array([b]))[0])
        assert nearest(Fraction(odd), "F32") == nearest(exact, "F32")


@pytest.mark.parametrize(("dtype", "code"), [("F16", "<e"), ("BF16", None)])
@given(value=F32)
def test_casts_round_to_even(dtype: str, code: str | None, value: float) -> None:
    got = evaluate(node("cast", dtype, 1, ["F32"]), 0, 2, [f32(value)])
    assert (struct.unpack(code, got)[0] if code else from_bf16(got)[0]) == nearest(Fraction(value), dtype)


@given(value=st.floats(-1e30, 1e30))
def test_a_cast_from_float64_to_16_bits_goes_through_float32(value: float) -> None:
    once = nearest(Fraction(value), "F32")
    got = evaluate(node("cast", "BF16", 1, ["F64"]), 0, 2, [struct.pack("<d", value)])
    assert from_bf16(got)[0] == nearest(Fraction(once), "BF16")


@given(value=st.floats(-60000, 60000, width=16), factor=st.floats(-4, 4))
def test_scale(value: float, factor: float) -> None:
    got = evaluate(node("scale", "F16", 1, ["F16"], [factor]), 0, 2, [struct.pack("<e", value)])
    product = nearest(Fraction(value) * Fraction(float(np.float32(factor))), "F32")
    assert struct.unpack("<e", got)[0] == nearest(Fraction(product), "F16")


@given(values=st.lists(st.floats(-100, 100, width=16), min_size=2, max_size=2), weights=st.tuples(F32, F32))
def test_linear_is_fused_then_divided_then_rounded(values: list[float], weights: tuple[float, float]) -> None:
    a, b = (float(np.float32(w % 4 + 0.1)) for w in weights)
    got = evaluate(node("linear", "F16", 1, ["F16", "F16"], [1.0, a, b]), 0, 2, [struct.pack("<e", v) for v in values])
    first = nearest(Fraction(values[0]) * Fraction(a), "F32")
    second = nearest(Fraction(values[1]) * Fraction(b) + Fraction(first), "F32")
    total = nearest(Fraction(a) + Fraction(b), "F32")
    assert struct.unpack("<e", got)[0] == nearest(Fraction(nearest(Fraction(second) / Fraction(total), "F32")), "F16")


def test_task_arithmetic_rounds_every_step() -> None:
    base, other = from_bf16(bf16(1.0078125))[0], from_bf16(bf16(0.33203125))[0]
    weight = nearest(Fraction(0.3), "BF16")
    delta = nearest(Fraction(other) - Fraction(base), "BF16")
    part = nearest(Fraction(nearest(Fraction(delta) * Fraction(weight), "F32")), "BF16")
    scaled = nearest(Fraction(nearest(Fraction(part) * Fraction(float(np.float32(0.7))), "F32")), "BF16")
    got = evaluate(
        node("task_arithmetic", "BF16", 1, ["BF16", "BF16"], [0.0, 0.7, 0.3]), 0, 2, [bf16(base), bf16(other)]
    )
    assert from_bf16(got) == [nearest(Fraction(base) + Fraction(scaled), "BF16")]


def test_a_sum_of_nothing_but_minus_zeros_is_zero() -> None:
    """torch sums from +0, so that base -0 becomes +0."""
    minus = bf16(-0.0)
    assert (
        evaluate(node("task_arithmetic", "BF16", 1, ["BF16", "BF16"], [0.0, 1.0, 1.0]), 0, 2, [minus, minus]) == b"\0\0"
    )
    assert evaluate(node("linear", "BF16", 1, ["BF16"], [0.0, 1.0]), 0, 2, [minus]) == b"\0\0"


# Hexadecimal, little-endian, as torch 2.13.0+cpu and mergekit 0.1.5 gave them; the inputs are INPUTS below.
INPUTS = "0000803f000000bf0000a03e0000803eabaaaa3e000000800000807fcdcccc3d01000000ffffff7e0000c87f00000038"
"""1, -.5, .3125, .25, 1/3, -0, inf, .1, the least, a large, NaN, 2**-15."""


def test_special_values() -> None:
    data = bytes.fromhex(INPUTS)
    count = len(data) // 4
    halved = np.frombuffer(evaluate(node("scale", "F32", count, ["F32"], [0.5]), 0, len(data), [data]), "<f4")
    expected = [0.5, -0.25, 0.15625, 0.125, float(np.float32(1 / 3) / 2), 0.0, float("inf")]
    assert halved[:7].tolist() == expected and np.signbit(halved[5])
    assert halved[8] == 0.0 and np.isnan(halved[10])  # half of the least number rounds to even
    narrow = evaluate(node("cast", "BF16", count, ["F32"]), 0, count * 2, [data])
    assert narrow[20:22] == b"\xff\xff"  # the NaN of torch's vector code
    assert from_bf16(narrow[16:20]) == [0.0, 2.0**127]
    wide = evaluate(node("linear", "F32", count, ["F32", "F32"], [1.0, 0.0, 1.0]), 0, len(data), [data, data])
    assert np.isnan(np.frombuffer(wide, "<f4")[6])  # inf times 0


@pytest.mark.parametrize(
    ("weights", "total"),
    [
        ([0.1, 0.2, 0.3], 0.1 + 0.2 + 0.3),
        ([1.0, 2.0**-24, 2.0**-24, 2.0**-24], 1.0),
        ([2.0**-24, 1.0, 0.0, 0.0, 2.0**-24], 1.0 + 2.0**-23),  # the fifth joins the first of four lanes
        ([2.0**-24] * 7 + [1.0], 1.0 + 2.0**-21),
        ([2.0**-24] * 8 + [1.0], 1.0),  # eight lanes: the ninth comes first
    ],
)
def test_weights_are_summed_in_the_order_of_torch(weights: list[float], total: float) -> None:
    assert float(sum_weights([np.float32(w) for w in weights])) == float(np.float32(total))


def nested() -> tuple[Computed, list[bytes]]:
    """Two dtypes that meet in float32, merged, then narrowed."""
    rng = np.random.default_rng(1)
    count = 40_000
    a = (rng.integers(0, 2**16, count, dtype=np.uint16) & 0xBFFF).tobytes()  # finite BF16
    b = rng.standard_normal(count).astype("<f2").tobytes()
    wide = [
        Computed("cast", "F32", count * 4, (Extent(i, 100, 100 + count * 2),), (dtype,))
        for i, dtype in enumerate(("BF16", "F16"))
    ]
    merged = Computed("linear", "F32", count * 4, tuple(wide), ("F32", "F32"), (1.0, 0.4, 0.6))
    return Computed("cast", "BF16", count * 2, (merged,), ("F32",)), [a, b]


@pytest.mark.parametrize(
    ("start", "stop"),
    [(0, 80_000), (0, 1), (1, 2), (3, 4), (7, 65_537), (79_999, 80_000), (500, 500), (32_767, 32_769)],
)
def test_any_range_is_had_from_the_same_elements(start: int, stop: int) -> None:
    tree, inputs = nested()
    whole = evaluate(tree, 0, tree.size, inputs)
    wanted = needs(tree, start, stop)
    assert [need.extent.span for need in wanted] == [0, 1]
    assert all(need.start % 2 == 0 and need.stop - need.start <= stop - start + 2 for need in wanted)
    parts = [data[need.start - 100 : need.stop - 100] for data, need in zip(inputs, wanted, strict=True)]
    assert evaluate(tree, start, stop, parts) == whole[start:stop]


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_any_buffer_is_read(wrap: Callable[[bytes], bytes | bytearray | memoryview]) -> None:
    assert evaluate(node("scale", "F32", 1, ["F32"], [2.0]), 0, 4, [wrap(f32(1.5))]) == f32(3.0)


def test_an_operation_of_a_newer_version_is_named() -> None:
    with pytest.raises(InvalidFormat, match="slerp"):
        evaluate(node("slerp", "F32", 1, ["F32"]), 0, 4, [f32(1.0)])
