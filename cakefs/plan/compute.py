"""Elements calculated on read, rounded exactly as mergekit 0.1.5 rounds them on torch's CPU kernels. Pure, numpy only.

Every element depends only on those at its place in the inputs, so any byte range of a result is had from the same
element range of each input. Values travel as float32 (float64 for F64), always representable in the dtype they have at
that point; every operation of torch's that rounds is one `_round` here:

- `scale`: product in float32, rounded to the tensor's dtype; `add` likewise, of a sum;
- `cast`: one conversion, from F64 to a 16-bit dtype by way of float32, as C does it;
- `linear`: float32 accumulation by fused multiply-add, division by the float32 sum of weights, then one rounding;
- `task_arithmetic`: every step (delta, times weight, sum, times lambda, add) rounded to the dtype, weights included.

Two operations move elements instead: `interleave`, always outermost (`plan/interleave.py`), and `gather`, always
innermost (`plan/gather.py`).

A sum over five and more deltas in a dtype finer than BF16 is taken in order; torch's own order depends on the number of
threads there. A NaN that is calculated is a NaN; its payload is the one of torch's vector code.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cakefs.errors import InvalidFormat
from cakefs.formats.safetensors import DTYPES
from cakefs.model import Computed, Extent, leaves
from cakefs.plan.gather import OP as GATHER
from cakefs.plan.gather import gathered, needed
from cakefs.plan.interleave import OP as INTERLEAVE
from cakefs.plan.interleave import Rows, steps

Array = NDArray[Any]  # float32, or float64 for F64
Buffer = bytes | bytearray | memoryview

_PLAIN: dict[str, np.dtype[Any]] = {"F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2")}
_BF16 = np.dtype("<u2")
_MIDPOINT_BITS = np.uint64((1 << 28) - 1)
_BLOCK = 1 << 14  # Elements calculated at a time: their intermediate values fit the CPU's cache (measured: 2-5 times).


class Need(NamedTuple):
    """Bytes `[start, stop)` of an input, counted within the span of its extent."""

    extent: Extent
    start: int
    stop: int


def needs(node: Computed, start: int, stop: int) -> list[Need]:
    """What has to be read for the bytes `[start, stop)` of a result, in the order in which `evaluate` takes it."""
    item = item_size(node.dtype)
    if node.op == INTERLEAVE:
        row = row_size(node)
        taken = steps(heads_of(node), start // row, -(-stop // row))
        runs = [(a * row // item, b * row // item) for step in taken for a, b in step.taken]
    else:
        runs = [(start // item, -(-stop // item))]
    sizes = [(leaf, item_size(dtype)) for leaf, dtype in _leaves(node)]
    return [_need(leaf, first, last, size) for first, last in runs for leaf, size in sizes]


def _need(leaf: Extent | Computed, first: int, last: int, size: int) -> Need:
    """For elements of a leaf, `size` bytes each."""
    if isinstance(leaf, Extent):
        return Need(leaf, leaf.start + first * size, leaf.start + last * size)
    (extent,) = leaves(leaf)
    found = needed(leaf, first * size, last * size, size)
    return Need(extent, extent.start + found.start, extent.start + found.stop)


def evaluate(node: Computed, start: int, stop: int, inputs: Sequence[Buffer]) -> bytes:
    """The bytes `[start, stop)` of a result, from those of its `needs`."""
    if node.op == INTERLEAVE:
        return _evaluate_rows(node, start, stop, inputs)
    item = item_size(node.dtype)
    if node.op == GATHER:
        return gathered(node, start, stop, item, inputs[0])
    first, last = start // item, -(-stop // item)
    views = [
        (memoryview(_dense(leaf, first, last, item_size(dtype), data)).cast("B"), item_size(dtype))
        for data, (leaf, dtype) in zip(inputs, _leaves(node), strict=True)
    ]
    parts: list[bytes] = []
    with np.errstate(all="ignore"):
        for block in range(0, last - first, _BLOCK):
            buffers = (data[block * size : (block + _BLOCK) * size] for data, size in views)
            parts.append(_pack(node.dtype, _value(node, buffers)))
    return b"".join(parts)[start - first * item : stop - first * item]


def _dense(leaf: Extent | Computed, first: int, last: int, size: int, data: Buffer) -> Buffer:
    return data if isinstance(leaf, Extent) else gathered(leaf, first * size, last * size, size, data)


def item_size(dtype: str) -> int:
    return DTYPES[dtype].bits // 8


def row_size(node: Computed) -> int:
    """In bytes, of what an `interleave` moves."""
    return node.size // int(node.params[1])


def heads_of(node: Computed) -> Rows:
    """Params of an `interleave`: heads, rows."""
    return Rows(int(node.params[0]), int(node.params[1]))


def _evaluate_rows(node: Computed, start: int, stop: int, inputs: Sequence[Buffer]) -> bytes:
    (part,), (dtype,) = node.inputs, node.dtypes
    if dtype != node.dtype:
        raise InvalidFormat(f"an operation {node.op!r} from {dtype} to {node.dtype}")
    row = row_size(node)
    count = 1 if isinstance(part, Extent) else sum(1 for _ in _leaves(part))
    first, at, done = start // row, 0, list[bytes]()
    for step in steps(heads_of(node), first, -(-stop // row)):
        halves = []
        for a, b in step.taken:
            buffers, at = inputs[at : at + count], at + count
            if isinstance(part, Extent):
                data: Buffer = buffers[0]
            else:
                data = evaluate(part, a * row, b * row, buffers)
            halves.append(np.frombuffer(data, np.uint8).reshape(-1, row))
        done.append(step.arrange(halves).tobytes())
    return b"".join(done)[start - first * row : stop - first * row]


def _leaves(node: Computed) -> Iterator[tuple[Extent | Computed, str]]:
    """What is read: stored elements as they are, or gathered."""
    if node.op == GATHER:
        yield node, node.dtype
        return
    for part, dtype in zip(node.inputs, node.dtypes, strict=True):
        if isinstance(part, Extent):
            yield part, dtype
        else:
            yield from _leaves(part)


def _value(node: Computed, buffers: Iterator[memoryview]) -> Array:
    inputs = [
        _unpack(dtype, next(buffers)) if isinstance(part, Extent) or part.op == GATHER else _value(part, buffers)
        for part, dtype in zip(node.inputs, node.dtypes, strict=True)
    ]
    operation = _OPERATIONS.get(node.op)
    if operation is None:
        raise InvalidFormat(
            f"no operation {node.op!r} to calculate a tensor with", hint="a newer cakefs made this view"
        )
    return operation(inputs, node.dtype, node.params)


# --- dtypes ---------------------------------------------------------------------------------------------------------


def _unpack(dtype: str, data: memoryview) -> Array:
    if dtype == "BF16":
        return (np.frombuffer(data, _BF16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    values = np.frombuffer(data, _PLAIN[dtype])
    return values.astype(np.float32) if dtype == "F16" else values


def _pack(dtype: str, values: Array) -> bytes:
    """Exact: the values are representable."""
    if dtype == "BF16":
        return (values.view(np.uint32) >> np.uint32(16)).astype(_BF16).tobytes()
    return values.astype(_PLAIN[dtype], copy=False).tobytes()


def _round(dtype: str, values: Array) -> Array:
    """To the nearest that the dtype has, ties to even; wide enough for the next step."""
    if dtype == "F64":
        return values.astype(np.float64, copy=False)
    narrow = values.astype(np.float32, copy=False)
    if dtype == "F32":
        return narrow
    if dtype == "F16":
        return narrow.astype(np.float16).astype(np.float32)
    bits = narrow.view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += bits
    rounded &= np.uint32(0xFFFF0000)
    nan = np.isnan(narrow)
    if nan.any():
        rounded[nan] = np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def _number(dtype: str, value: float) -> Any:
    """A number of the recipe as torch hands it to a kernel of the dtype."""
    return np.float64(value) if dtype == "F64" else np.float32(value)


# --- operations -----------------------------------------------------------------------------------------------------


def _cast(inputs: Sequence[Array], dtype: str, params: Sequence[float]) -> Array:
    return _round(dtype, inputs[0])


def _scale(inputs: Sequence[Array], dtype: str, params: Sequence[float]) -> Array:
    return _round(dtype, inputs[0] * _number(dtype, params[0]))


def _add(inputs: Sequence[Array], dtype: str, params: Sequence[float]) -> Array:
    return _round(dtype, inputs[0] + _number(dtype, params[0]))


def _linear(inputs: Sequence[Array], dtype: str, params: Sequence[float]) -> Array:
    """Params: 1 to divide by the sum of weights or 0, then the weights."""
    weights = [_number(dtype, weight) for weight in params[1:]]
    total = np.zeros(inputs[0].shape, weights[0].dtype)
    for values, weight in zip(inputs, weights, strict=True):
        total = fused_add(values, weight, total)
    return _round(dtype, total / sum_weights(weights) if params[0] else total)


def _task_arithmetic(inputs: Sequence[Array], dtype: str, params: Sequence[float]) -> Array:
    """Inputs: the base, then the others. Params: 1 to divide by the sum of weights or 0, lambda, then the weights."""
    base, others = inputs[0], inputs[1:]
    weights = [_round(dtype, np.array([_number(dtype, weight)])) for weight in params[2:]]
    total = np.zeros(base.shape, base.dtype)
    for values, weight in zip(others, weights, strict=True):
        total += _round(dtype, _round(dtype, values - base) * weight)
    delta = _round(dtype, total)
    if params[0]:
        divisor = _round(dtype, np.array([sum_weights([weight[0] for weight in weights])]))
        delta = _round(dtype, delta / np.where(np.abs(divisor) < 1e-8, divisor.dtype.type(1), divisor))
    if params[1] != 1:
        delta = _round(dtype, delta * _number(dtype, params[1]))
    return _round(dtype, base + delta)


_OPERATIONS: dict[str, Callable[[Sequence[Array], str, Sequence[float]], Array]] = {
    "cast": _cast,
    "scale": _scale,
    "add": _add,
    "linear": _linear,
    "task_arithmetic": _task_arithmetic,
}


def sum_weights(weights: Sequence[Any]) -> Any:
    """As torch sums one short contiguous row: eight lanes from eight numbers on, else four.

    The rest beyond full lanes comes first with eight, last with four. Verified up to 39 numbers.
    """
    kind = type(weights[0])
    row = np.array(weights, kind)
    lanes = 64 // row.itemsize // 2
    if len(row) < lanes:
        sums = [kind(0)] * 4
        full = len(row) // 4 * 4
        for i, weight in enumerate(row):
            sums[i % 4 if i < full else 0] += weight
        return ((sums[0] + sums[1]) + sums[2]) + sums[3]
    full = len(row) // lanes * lanes
    parts = _sum_rows(row[:full].reshape(-1, lanes))
    total = kind(0)
    for weight in (*row[full:], *parts):
        total += weight
    return total


def _sum_rows(rows: Array) -> Array:
    full = len(rows) // 4 * 4
    sums = [np.zeros(rows.shape[1], rows.dtype) for _ in range(4)]
    for i, row in enumerate(rows):
        sums[i % 4 if i < full else 0] += row
    result: Array = ((sums[0] + sums[1]) + sums[2]) + sums[3]
    return result


# --- fused multiply-add ---------------------------------------------------------------------------------------------


def fused_add(values: Array, weight: Any, total: Array) -> Array:
    """`values * weight + total`, rounded once."""
    if total.dtype == np.float64:
        return _fused64(values, weight, total)
    product = values.astype(np.float64) * np.float64(weight)  # exact: 24 + 24 bits, and no exponent leaves float64
    addend = total.astype(np.float64)
    wide = product + addend
    result = wide.astype(np.float32)
    # Rounding twice errs only where float64 lands on the middle between two float32 and was not exact itself. A sum is
    # exact when either part can be taken away from it again: one of the two differences never rounds.
    suspect = (wide.view(np.uint64) & _MIDPOINT_BITS) == 0
    if suspect.any():
        suspect &= (wide - product != addend) | (wide - addend != product)
        at = np.nonzero(suspect)[0]
        if len(at):
            result[at] = round_odd(product[at], addend[at]).astype(np.float32)
    return result


def round_odd(a: Array, b: Array) -> Array:
    """The float64 sum of two, where inexact that neighbour of the exact sum whose last bit is odd.

    Rounded to fewer bits it gives what the exact sum would have given.
    """
    total, error = _two_sum(a, b)
    bits = total.view(np.int64)
    even = ((error > 0) | (error < 0)) & ((bits & 1) == 0)
    away = (error > 0) == (total > 0)
    moved: Array = np.where(even, np.where(away, bits + 1, bits - 1), bits).view(np.float64)
    return moved


def _two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    total = a + b
    back = total - a
    return total, (a - (total - back)) + (b - back)


_SAFE = (2.0**-400, 2.0**400)  # Exponents at which neither the error of a product nor its square leaves float64.


def _fused64(a: Array, weight: Any, c: Array) -> Array:
    """By Boldo and Melquiond: the exact product as two numbers, then a sum rounded to odd before it is rounded."""
    b = np.full(a.shape, weight, np.float64)
    high, low = _two_product(a, b)
    top, rest = _two_sum(c, low)
    head, tail = _two_sum(high, top)
    result = head + round_odd(rest, tail)
    plain = a * b + c
    result = np.where(result == 0, plain, result)  # the sign of a zero
    safe = np.ones(a.shape, bool)
    for x in (a, b, c):
        size = np.abs(x)
        safe &= (x == 0) | ((size >= _SAFE[0]) & (size <= _SAFE[1]))
    for i in np.nonzero(~safe)[0]:
        result[i] = _exactly(float(a[i]), float(b[i]), float(c[i]), plain[i])
    return result


def _two_product(a: Array, b: Array) -> tuple[Array, Array]:
    product = a * b
    a_high, a_low = _halves(a)
    b_high, b_low = _halves(b)
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _halves(a: Array) -> tuple[Array, Array]:
    shifted = a * np.float64(2**27 + 1)
    high = shifted - (shifted - a)
    return high, a - high


def _exactly(a: float, b: float, c: float, plain: Any) -> float:
    """By integers of any size; `plain` where a value is not finite or the exact result is zero."""
    if not np.isfinite(a) or not np.isfinite(b) or not np.isfinite(c):
        return float(plain)
    (an, ad), (bn, bd), (cn, cd) = a.as_integer_ratio(), b.as_integer_ratio(), c.as_integer_ratio()
    numerator, denominator = an * bn * cd + cn * ad * bd, ad * bd * cd
    if numerator == 0:
        return float(plain)
    try:
        return numerator / denominator  # CPython rounds the quotient of two ints correctly
    except OverflowError:
        return float("inf") if numerator > 0 else float("-inf")
