"""Names of layers inside a config, such as the modules that a quantization left alone, for another stack. Pure."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cakefs.errors import UserError
from cakefs.formats.strictjson import brief
from cakefs.plan.layers import same_stack
from cakefs.plan.modelconfig import Take

_REGEX = re.compile(r"re:|[+-]:|.*[\\\[(|]", re.DOTALL)
_ANY_NUMBER = re.compile(r"\[0-9\][+*]?|\\d[+*]?")
# A number where a name has a layer's: at the start of a component, perhaps in brackets.
_HIDDEN = re.compile(r"(?:^|[.:])[(\[?:^]*[0-9]")


class Renames(NamedTuple):
    """Where the layers of the models, all under `prefix`, went: (model, layer) -> new numbers."""

    prefix: str
    numbers: Mapping[Take, Sequence[int]]


def map_names(values: Sequence[Any], renames: Renames, donor: int, where: str) -> Any:
    """A structure of the donor (such as `quantization_config`) with the names of layers in it mapped.

    Args:
        values: The same structure of all models, None where a model has none.

    Raises:
        UserError: Where the models differ in anything but names of layers, or a pattern hides a layer's number.
    """
    names = _Names(renames, where)
    stripped = [names.strip(value) for value in values if value is not None]
    if len(stripped) not in (0, len(values)) or any(s != stripped[0] for s in stripped[1:]):
        raise UserError(f"{where}: differs between the models, so that one cannot hold for all")
    return names.map(values, donor)


class _Names:
    """Finds layers in names, and gives them their new numbers."""

    def __init__(self, renames: Renames, where: str) -> None:
        self._prefix, self._numbers, self._where = renames.prefix, renames.numbers, where
        word = re.escape(renames.prefix.rpartition(".")[2])
        self._pattern = re.compile(rf"(?<![A-Za-z0-9_]){word}\.(\d+)(?![0-9])")

    def strip(self, value: Any) -> Any:
        """Without the names of single layers; checks for patterns on the way."""
        if type(value) is dict:
            return {k: self.strip(v) for k, v in value.items() if self._find(k) is None}
        if type(value) is list:
            return [self.strip(v) for v in value if self._find(v) is None]
        return value

    def map(self, values: Sequence[Any], donor: int) -> Any:
        own = values[donor]
        if type(own) is list:
            kept = [self.map([v] * len(values), donor) for v in own if self._find(v) is None]
            moved = [new for model, other in enumerate(values) for v in other or () for new in self._renamed(v, model)]
            return [*kept, *dict.fromkeys(moved)]
        if type(own) is dict:
            plain = (key for key in own if self._find(key) is None)
            result = {key: self.map([(other or {}).get(key) for other in values], donor) for key in plain}
            for model, other in enumerate(values):
                for key, value in (other or {}).items():
                    result.update(dict.fromkeys(self._renamed(key, model), value))
            return result
        return own

    def _find(self, name: object) -> re.Match[str] | None:
        """Where a name says which layer it is of. Refuses a pattern that says it in a way not to be rewritten."""
        if type(name) is not str:
            return None
        match = self._pattern.search(name)
        if match is not None and not same_stack(name[: match.start()], self._prefix):
            return None
        if _REGEX.match(name) and (match is None or re.search(r"[\\\[(|]", name)):
            if _HIDDEN.search(_ANY_NUMBER.sub("", name).replace("\\", "")):
                raise UserError(
                    f"{self._where}: pattern {brief(name)} speaks of single layers; cakefs cannot renumber it"
                )
        elif match is not None and name[match.end() :].startswith("*"):
            others = {str(take.layer) for take in self._numbers} - {match[1]}
            if any(other.startswith(match[1]) for other in others):
                raise UserError(f"{self._where}: {brief(name)} speaks of several layers; cakefs cannot renumber it")
        return match

    def _renamed(self, name: object, model: int) -> list[str]:
        match = self._find(name)
        if match is None:
            return []
        rest = re.sub(r"^\*", ".*", match.string[match.end() :])  # `layers.6*` would also be layer 60 of a longer stack
        new = self._numbers.get(Take(model, int(match[1])), ())
        return [f"{match.string[: match.start(1)]}{number}{rest}" for number in new]
