"""YAML as a recipe needs it: no key twice, numbers that say what they look like, one document. Pure.

Decimals come as `Number`, so .29 stays .29. Numbers are those of YAML 1.2: 1e-3 is one, while 010, 1:30 and 1_000,
which YAML 1.1 reads as 8, 90 and 1000, stay text for the caller to refuse.
"""

import re
from decimal import Decimal
from typing import Any

import yaml

from cakefs.formats.strictjson import brief

LIMIT = 1024 * 1024  # Bytes of a recipe; 100,000 slices fit.

_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,17})")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]{1,3})?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_LEADING_ZERO = re.compile(r"[-+]?0[0-9]")


class Number(Decimal):
    """Looks in messages as it was written."""

    __repr__ = Decimal.__str__


def decode_yaml(text: str) -> Any:
    """The value of the only document. Raises ValueError with a short message that tells line and column."""
    if len(text) > LIMIT:
        raise ValueError(f"{len(text)} characters are more than {LIMIT}")
    try:
        value = yaml.load(text, _Loader)
        if _entries(value, {}) > LIMIT:
            raise ValueError(f"its aliases make more than {LIMIT} entries of it")
        return value
    except yaml.MarkedYAMLError as error:
        raise ValueError(_words(error)) from error
    except yaml.YAMLError as error:
        raise ValueError(brief(str(error).splitlines()[0])) from error
    except RecursionError:
        raise ValueError("nested too deep") from None


def _entries(value: Any, known: dict[int, int]) -> int:
    """How many there are with every alias written out. Few lines of aliases of aliases come to billions.

    Args:
        known: Of lists and mappings, by id; 0 for one that is not counted to its end.
    """
    if type(value) not in (dict, list):
        return 1
    if id(value) not in known:
        known[id(value)] = 0
        known[id(value)] = 1 + sum(_entries(v, known) for v in (value.values() if type(value) is dict else value))
    if not known[id(value)]:
        raise ValueError("an anchor is within itself")
    return known[id(value)]


def _words(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    return f"{place}{error.problem or error.context or 'cannot be read'}"


class _Loader(yaml.SafeLoader):
    """SafeLoader with stricter mappings and other numbers."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (as the base class has it)
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in ("bool", "null", "merge")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {brief(key)} is not text", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{brief(key)} is there twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _construct_number(loader: _Loader, node: yaml.ScalarNode) -> int | Number:
    text = str(loader.construct_scalar(node))
    if _INT.fullmatch(text):
        return int(text)
    if not _FLOAT.fullmatch(text):  # an explicit tag on something else
        raise yaml.constructor.ConstructorError(None, None, f"{brief(text)} is not a number", node.start_mark)
    return Number(text.replace(".", "") if text[-1] in "fFnN" else text)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _construct_number)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(rf"^(?:{_INT.pattern})$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(rf"^(?!{_LEADING_ZERO.pattern})(?:{_FLOAT.pattern})$"), list("-+.0123456789")
)
