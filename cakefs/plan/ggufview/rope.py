"""Factors of rotary positions, as tensors of the header's side: llama3 scaling and phi3's long and short lists. Pure.

Every step is rounded to float32 as the converter's is. Its powers come from a vector library that is up to one unit
in the last place off for some bases; here they are rounded correctly (equal for every published Llama 3).
"""

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from cakefs.plan.ggufview.refusal import NoGguf
from cakefs.plan.ggufview.settings import Settings, head_width

_FLOAT = struct.Struct("<f")


def factor_tensors(settings: Settings) -> dict[str, bytes]:
    """Tensors of F32 by name, in the order in which they open the file."""
    kind, params = settings.get("rope.kind"), settings.get("rope.params", {})
    if kind == "llama3":
        return {"rope_freqs.weight": _packed(_llama3(params, settings["rope.theta"], head_width(settings)))}
    if kind == "longrope":
        long, short = params["long_factor"], params["short_factor"]
        if not len(long) == len(short) == settings["rope.dims"] // 2:
            raise NoGguf("config.json: long_factor and short_factor do not fit the width of a head")
        return {"rope_factors_long.weight": _packed(long), "rope_factors_short.weight": _packed(short)}
    return {}


def _packed(values: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(values)}f", *map(float, values))


def _llama3(params: Mapping[str, Any], theta: float, width: int) -> list[float]:
    factor = params.get("factor", 8.0)
    low, high = params.get("low_freq_factor", 1.0), params.get("high_freq_factor", 4.0)
    original = params.get("original_max_position_embeddings", 8192)
    longest, shortest = _single(original / low), _single(original / high)
    found = []
    for i in range(0, width, 2):
        frequency = _single(1.0 / _single(_single(theta) ** _single(i / width)))
        wave = _single(_single(1.0 / frequency) * _single(2 * math.pi))
        if wave < shortest:
            found.append(1.0)
        elif wave > longest:
            found.append(factor)
        else:
            ratio = _single(_single(1.0 / wave) * original)
            smooth = _single(_single(ratio - low) / _single(high - low))
            found.append(_single(1.0 / _single(_single(_single(1.0 - smooth) / factor) + smooth)))
    return found


def _single(value: float) -> float:
    """Rounded to float32."""
    rounded: float = _FLOAT.unpack(_FLOAT.pack(value))[0]
    return rounded
