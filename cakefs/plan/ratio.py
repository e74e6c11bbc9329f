"""Which layers a model is made of when some repeat: David's two ways of saying it. Pure.

`ratio_repeat` in its README's meaning (the default): a pair (s, e) takes layers floor(s·N) to ceil(e·(N-1)), both
included; 0 is the first layer and 1 the last; what lies between the end of one range and a later start, before the
first and after the last, is filled in. Numbers are exact decimals: .29 of 100 layers is 29, where doubles say 28.

`david-code` does what the library's function does instead, in doubles, quirks included: ends excluded, s > e swapped,
values outside 0..1 clamped, gaps between ranges left open, and a tail that repeats its first layer and lacks the last.

`repeat_map_raw` lists the layers. Unlike in Python, -1 is an error, as is an index that does not exist.
"""

import re
from collections.abc import Iterable, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal, Inexact, localcontext
from enum import StrEnum
from math import ceil, floor, isfinite
from typing import NamedTuple

from cakefs.errors import UserError
from cakefs.formats.strictjson import brief

MAX_LAYERS = 100_000  # In one output; far beyond any model, and a map of it is still planned in seconds.

_DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
_INDEX = re.compile(r"-?[0-9]{1,18}")


class Mode(StrEnum):
    README = "readme"
    DAVID_CODE = "david-code"


class Ratio(NamedTuple):
    """From `start` to `end` of the depth; `where` names the entry in messages."""

    start: Decimal
    end: Decimal
    where: str


def parse_ratios(text: str) -> tuple[Ratio, ...]:
    """`0:.3,.2:.4,.4:1`."""
    return tuple(parse_ratio(item.strip(), f"ratio_repeat[{i}]") for i, item in enumerate(text.split(",")))


def parse_ratio(item: str, where: str) -> Ratio:
    start, colon, end = (part.strip() for part in item.partition(":"))
    if not colon or not _DECIMAL.fullmatch(start) or not _DECIMAL.fullmatch(end):
        raise UserError(f"{where}: {brief(item)} is not a pair START:END", hint="write it like '0:.3,.2:.4,.4:1'")
    return Ratio(Decimal(start), Decimal(end), where)


def parse_map(text: str) -> tuple[int, ...]:
    """`0,1,2,1,2,3`; whether the layers exist is for `check_map`."""
    if not text.strip():
        raise UserError("repeat_map_raw is empty", hint="write it like 0,1,2,1,2,3")
    layers = []
    for i, item in enumerate(part.strip() for part in text.split(",")):
        if not _INDEX.fullmatch(item):
            raise UserError(
                f"repeat_map_raw[{i}]: {brief(item)} is not a layer number", hint="write it like 0,1,2,1,2,3"
            )
        layers.append(int(item))
    return tuple(layers)


def check_map(layers: Sequence[int], count: int, where: str = "repeat_map_raw") -> tuple[int, ...]:
    """The same layers, each known to exist in a model of `count` layers."""
    if not layers:
        raise UserError(f"{where} is empty: a model needs at least one layer")
    if len(layers) > MAX_LAYERS:
        raise UserError(f"{where}: {len(layers)} layers are more than {MAX_LAYERS}")
    for i, layer in enumerate(layers):
        if not 0 <= layer < count:
            raise UserError(f"{where}[{i}]: layer {layer} does not exist", hint=f"the layers are 0-{count - 1}")
    return tuple(layers)


def check_ratios(ratios: Sequence[Ratio], mode: Mode) -> None:
    """Raises UserError, naming the entry, for what has no meaning in the mode."""
    if not ratios:
        raise UserError("ratio_repeat is empty")
    for start, end, where in ratios:
        for value in (start, end):
            if not value.is_finite():
                raise UserError(f"{where}: {value} is not a number")
            if mode is Mode.README and not 0 <= value <= 1:
                raise UserError(f"{where}: {value} is not within 0 and 1", hint="0 is the first layer, 1 the last")
        if mode is Mode.README and start > end:
            raise UserError(f"{where}: starts at {start}, after its end {end}", hint=f"did you mean {end}:{start}?")


def ratio_layers(ratios: Sequence[Ratio], count: int, mode: Mode = Mode.README) -> tuple[int, ...]:
    """The layers, in order, of a model of `count` layers repeated so.

    Raises:
        UserError: Naming the entry that is wrong.
    """
    check_ratios(ratios, mode)
    layers = _readme(ratios, count) if mode is Mode.README else _david(ratios, count)
    if len(layers) > MAX_LAYERS:
        raise UserError(f"ratio_repeat gives {len(layers)} layers, more than {MAX_LAYERS}")
    return tuple(layers)


def _readme(ratios: Iterable[Ratio], count: int) -> list[int]:
    layers: list[int] = []
    for start, end, _ in ratios:
        first = min(_times(start, count, ROUND_FLOOR), count - 1)
        last = _times(end, count - 1, ROUND_CEILING)
        layers += range(layers[-1] + 1 if layers else 0, first)  # empty unless there is a gap
        layers += range(first, last + 1)
    layers += range(layers[-1] + 1, count)
    return layers


def _times(ratio: Decimal, count: int, rounding: str) -> int:
    with localcontext(Context(prec=len(ratio.as_tuple().digits) + 12, traps=[Inexact])):
        product = ratio * count
    return int(product.to_integral_value(rounding=rounding))


def _david(ratios: Iterable[Ratio], count: int) -> list[int]:
    layers: list[int] = []
    for entry in ratios:
        low, high = sorted((_clamp(float(entry.start)), _clamp(float(entry.end))))
        layers += range(floor(low * count), ceil(high * count))
    if not layers:
        raise UserError(
            "ratio_repeat: every range is empty in mode david-code", hint="leave the mode out, or widen a range"
        )
    tail = range(layers[-1], count - 1)
    return [*range(layers[0]), *layers, *tail]


def _clamp(value: float) -> float:
    assert isfinite(value)
    return min(max(value, 0.0), 1.0)
