"""Names of layers inside a config, such as the modules that a quantization left alone, for another stack. Pure."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cakefs.errors import UserError
from cakefs.formats.strictjson import brief
from cakefs.plan.modelconfig import Take


class Renames(NamedTuple):
    """Where the layers of the models went: (model, layer) -> new numbers; `word` is what stands before the number."""

    word: str
    numbers: Mapping[Take, Sequence[int]]


def map_names(values: Sequence[Any], renames: Renames, donor: int, where: str) -> Any:
    """A structure of the donor (such as `quantization_config`) with the names of layers in it mapped.

    Args:
        values: The same structure of all models, None where a model has none.

    Raises:
        UserError: Where the models differ in anything but names of layers, or a pattern hides a layer's number.
    """
    pattern = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(renames.word)}\.(\d+)(?![0-9])")
    stripped = [_strip(value, pattern, where) for value in values if value is not None]
    if len(stripped) not in (0, len(values)) or any(s != stripped[0] for s in stripped[1:]):
        raise UserError(f"{where}: differs between the models, so that one cannot hold for all")
    return _map(values, pattern, renames, donor)


def _layer_in(name: object, pattern: re.Pattern[str], where: str) -> int | None:
    if type(name) is not str:
        return None
    match = pattern.search(name)
    plain = name.replace("\\.", ".")
    if (
        (name.startswith("re:") or "\\" in name or "*" in name)
        and pattern.search(plain)
        and re.search(r"[\[(|\\]", name)
    ):
        raise UserError(f"{where}: pattern {brief(name)} speaks of single layers; cakefs cannot renumber it")
    return None if match is None else int(match[1])


def _strip(value: Any, pattern: re.Pattern[str], where: str) -> Any:
    """Without the names of single layers; checks for patterns on the way."""
    if type(value) is dict:
        return {k: _strip(v, pattern, where) for k, v in value.items() if _layer_in(k, pattern, where) is None}
    if type(value) is list:
        return [_strip(v, pattern, where) for v in value if _layer_in(v, pattern, where) is None]
    return value


def _map(values: Sequence[Any], pattern: re.Pattern[str], renames: Renames, donor: int) -> Any:
    own = values[donor]
    if type(own) is list:
        kept = [_map([v] * len(values), pattern, renames, donor) for v in own if not _named(v, pattern)]
        moved = [new for k, other in enumerate(values) for v in other or () for new in _renamed(v, k, pattern, renames)]
        return [*kept, *dict.fromkeys(moved)]
    if type(own) is dict:
        result = {}
        for key in own:
            if not _named(key, pattern):
                result[key] = _map([(o or {}).get(key) for o in values], pattern, renames, donor)
        for k, other in enumerate(values):
            for key, value in (other or {}).items():
                result.update(dict.fromkeys(_renamed(key, k, pattern, renames), value))
        return result
    return own


def _named(name: object, pattern: re.Pattern[str]) -> bool:
    return type(name) is str and pattern.search(name) is not None


def _renamed(name: object, model: int, pattern: re.Pattern[str], renames: Renames) -> list[str]:
    match = pattern.search(name) if type(name) is str else None
    if match is None or type(name) is not str:
        return []
    new = renames.numbers.get(Take(model, int(match[1])), ())
    return [f"{name[: match.start(1)]}{number}{name[match.end(1) :]}" for number in new]
