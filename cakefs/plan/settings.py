"""Parameters of merge methods: scalars, gradients over a slice and filters by tensor name, as mergekit evaluates them.

A list of numbers is a gradient: linear over t, which is 0 at the first layer of a slice and 1 at its last (1 for a
slice of one layer, 0 outside the layers). A list of mappings is conditions: the first whose filter is part of the
tensor's name wins. Where none matches, the next scope is asked: source, slice, top level.
"""

from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import NamedTuple

from cakefs.errors import UserError
from cakefs.formats.strictjson import brief


class Condition(NamedTuple):
    """`values` where `filter` is part of the name (empty: everywhere); more than one is a gradient."""

    filter: str
    values: tuple[float, ...]
    gradient: bool


Settings = Mapping[str, tuple[Condition, ...]]


class Parameter(NamedTuple):
    """What a method says of a parameter.

    Attributes:
        shared: One value for all inputs, filtered by the output's name; else one for each, by the input's name.
        switch: True or false instead of a number.
        idle: Known, and without effect.
    """

    shared: bool = False
    switch: bool = False
    idle: bool = False


_IDLE = Parameter(idle=True)
_SWITCH = Parameter(shared=True, switch=True)
METHODS: Mapping[str, Mapping[str, Parameter]] = {
    "passthrough": {"scale": Parameter()},
    "linear": {"weight": Parameter(), "normalize": _SWITCH},
    "task_arithmetic": {
        "weight": Parameter(), "lambda": Parameter(shared=True), "normalize": _SWITCH,
        "density": _IDLE, "rescale": _IDLE, "int8_mask": _IDLE,
    },
}  # fmt: skip


def known_parameters(method: str) -> Mapping[str, Parameter]:
    return METHODS[method]


def parse_setting(value: object, where: str, parameter: Parameter) -> tuple[Condition, ...]:
    """Raises UserError naming the entry."""
    if type(value) is dict:
        return (_condition(value, where, parameter),)
    if type(value) is list and value and all(type(entry) is dict for entry in value):
        return tuple(_condition(entry, f"{where}[{i}]", parameter) for i, entry in enumerate(value))
    return (Condition("", *_values(value, where, parameter)),)


def _condition(entry: Mapping[str, object], where: str, parameter: Parameter) -> Condition:
    for key in entry:
        if key not in ("filter", "value"):
            raise UserError(f"{where}.{key}: unknown key", hint="known: filter, value")
    if entry.get("value") is None:
        raise UserError(f"{where}.value: missing")
    chosen = entry.get("filter")
    if chosen is not None and type(chosen) is not str:
        raise UserError(f"{where}.filter: {brief(chosen)} is not text")
    return Condition(
        "" if chosen in (None, "*") else str(chosen), *_values(entry["value"], f"{where}.value", parameter)
    )


def _values(value: object, where: str, parameter: Parameter) -> tuple[tuple[float, ...], bool]:
    if type(value) is not list:
        return (_scalar(value, where, parameter),), False
    if not value:
        raise UserError(f"{where} is empty")
    return tuple(_scalar(entry, f"{where}[{i}]", parameter) for i, entry in enumerate(value)), True


def _scalar(value: object, where: str, parameter: Parameter) -> float:
    if parameter.switch:
        if type(value) is not bool:
            raise UserError(f"{where}: {brief(value)} is neither true nor false")
        return float(value)
    if type(value) is not int and not isinstance(value, Decimal):
        raise UserError(f"{where}: {brief(value)} is not a number")
    try:
        number = float(value)
    except OverflowError:
        number = float("inf")
    if number != number or abs(number) > 3e38:
        raise UserError(f"{where}: {value} is not a finite number")
    return number


def resolve(name: str, scopes: Iterable[Settings], tensor: str, t: float, *, switch: bool = False) -> float | None:
    """The value of parameter `name` for a tensor at depth `t` of its slice, or None where no scope says."""
    for scope in scopes:
        for condition in scope.get(name, ()):
            if condition.filter in tensor:
                return _at(condition, t, switch)
    return None


def _at(condition: Condition, t: float, switch: bool) -> float:
    values = condition.values
    if not condition.gradient:
        return values[0]
    scaled = t * (len(values) - 1)
    first = int(scaled)
    if switch:
        return values[first]
    share = scaled - first
    return (1 - share) * values[first] + share * values[min(len(values) - 1, first + 1)]
