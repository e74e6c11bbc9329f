"""The small files beside the weights, read once each. Pure: the caller brings the bytes."""

import json
from collections.abc import Callable, Collection
from typing import Any

import msgspec

from cakefs.plan.ggufview.refusal import NoGguf

_MAX_VALUES = 6_000_000  # Of a JSON file: each takes some 60 bytes of memory; a vocabulary of 262,144 has 2 million.


class SideFiles:
    """Files of a model's directory by path.

    Args:
        paths: All there are.
        read: The bytes of one of them; raises CakeError where they are not local.
    """

    def __init__(self, paths: Collection[str], read: Callable[[str], bytes]) -> None:
        self._paths = frozenset(paths)
        self._read = read
        self._json: dict[str, dict[str, Any]] = {}

    def __contains__(self, path: str) -> bool:
        return path in self._paths

    def data(self, path: str) -> bytes | None:
        """None where there is no such file."""
        return self._read(path) if path in self._paths else None

    def text(self, path: str) -> str | None:
        data = self.data(path)
        try:
            return None if data is None else data.decode().replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError:
            raise NoGguf(f"{path} is not UTF-8") from None

    def json(self, path: str) -> dict[str, Any] | None:
        """A JSON object, None where there is no such file. Do not change what you get."""
        if path not in self._json:
            data = self.data(path)
            if data is None:
                return None
            found = _decoded(data, path)
            if type(found) is not dict:
                raise NoGguf(f"{path} is not a JSON object")
            self._json[path] = found
        return self._json[path]

    def under(self, directory: str, suffix: str) -> dict[str, str]:
        """Name without suffix -> path of the files right in a directory, which is given with its slash."""
        inside = [p for p in self._paths if p.startswith(directory) and p.endswith(suffix)]
        return {p[len(directory) : -len(suffix)]: p for p in inside if "/" not in p[len(directory) :]}


def _decoded(data: bytes, path: str) -> Any:
    if sum(map(data.count, (b",", b"[", b"{"))) > _MAX_VALUES:
        raise NoGguf(f"{path} has more than {_MAX_VALUES} values")
    try:
        return msgspec.json.decode(data)  # Three times as fast, but knows no NaN, as some config.json have it.
    except (msgspec.DecodeError, UnicodeDecodeError):
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise NoGguf(f"{path} is not JSON: {error}") from error
    except RecursionError:
        raise NoGguf(f"{path} is nested too deep") from None
