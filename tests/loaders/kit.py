"""What the programs have in common: load in every way from everywhere, compare, print."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Way = Callable[[Path], Mapping[str, Any]]

KINDS = ("single", "sharded")  # Both are one file in a mount.


class Near:
    """What was calculated from what was loaded. Sums are added up in an order that depends on threads and addresses."""

    def __init__(self, values: Any) -> None:
        self._values = np.asarray(values)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Near) or self._values.shape != other._values.shape:
            return False
        return bool(np.isfinite(self._values).all()) and np.allclose(self._values, other._values, rtol=1e-3, atol=1e-4)


def run(ways: Mapping[str, Way]) -> None:
    """Prints one JSON object: way -> for each mount, whether it gave what the ordinary directory gives."""
    direct, *mounted = map(Path, sys.argv[1:])
    results = {name: [same(way(direct), way(place)) for place in mounted] for name, way in ways.items()}
    print("results " + json.dumps(results))


def of_each_kind(ways: Mapping[str, Way]) -> dict[str, Way]:
    """The ways, for a model that was published as one file and for one published in shards."""
    return {
        f"{kind}, {name}": lambda place, kind=kind, way=way: way(place / kind)  # type: ignore[misc]
        for kind in KINDS
        for name, way in ways.items()
    }


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Of two loads: the same names, and under each the same text or the same elements of the same type."""
    return bool(one) and one.keys() == other.keys() and all(equal(value, other[name]) for name, value in one.items())


def equal(one: Any, other: Any) -> bool:
    if not hasattr(one, "dtype"):
        return bool(one == other)
    return one.dtype == other.dtype and tuple(one.shape) == tuple(other.shape) and bool((one == other).all())
