"""hashes.json, as cake publishes it: for each tensor of a model the SHA-256 of its bytes. Pure.

    {"lm_head.weight": {"data_offsets": [0, 4096], "file_name": "model.safetensors", "hash": "9f86…", "size": 4096}, …}

One object for all files of a model. Offsets count from the data section of `file_name`, as in its header; the hash is
lower-case hex of the bytes alone: no name, dtype or shape is in it. What is read is hostile until proved otherwise.
"""

import json
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from cakefs.errors import InvalidFormat
from cakefs.formats.strictjson import brief, decode
from cakefs.model import MIB, is_safe_path

HASHES_LIMIT = 64 * MIB  # Bytes of a hashes.json: 300,000 tensors.

_SHA256 = re.compile("[0-9a-f]{64}")


class TensorHash(NamedTuple):
    """An entry; `[start, stop)` in the data section of `file_name`."""

    name: str
    start: int
    stop: int
    file_name: str
    sha256: str


def encode_hashes(entries: Iterable[TensorHash]) -> str:
    """The text of a hashes.json, in the order of the entries."""
    table = {
        e.name: {
            "data_offsets": [e.start, e.stop],
            "file_name": e.file_name,
            "hash": e.sha256,
            "size": e.stop - e.start,
        }
        for e in entries
    }
    return json.dumps(table, indent=2)


def parse_hashes(data: bytes, where: str) -> list[TensorHash]:
    """Raises InvalidFormat, naming the entry. Members that we do not know are ignored."""
    if len(data) > HASHES_LIMIT:
        raise InvalidFormat(f"{where} is longer than {HASHES_LIMIT} bytes")
    try:
        table = decode(data)
    except ValueError as error:
        raise InvalidFormat(f"{where} is no hashes.json: {error}") from error
    if type(table) is not dict:
        raise InvalidFormat(f"{where} is no hashes.json: it is no object with an entry for each tensor")
    return [_entry(name, value, f"{where}: {brief(name)}") for name, value in table.items()]


def _entry(name: str, value: Any, where: str) -> TensorHash:
    if type(value) is not dict:
        raise InvalidFormat(f"{where} is no object")
    for member in ("data_offsets", "file_name", "hash", "size"):
        if member not in value:
            raise InvalidFormat(f"{where} has no {member}")
    offsets, file_name, sha256, size = (value[m] for m in ("data_offsets", "file_name", "hash", "size"))
    if type(offsets) is not list or len(offsets) != 2 or any(type(o) is not int for o in offsets):
        raise InvalidFormat(f"{where}: data_offsets are not two counts of bytes: {brief(offsets)}")
    start, stop = offsets
    if stop < start:
        raise InvalidFormat(f"{where}: data_offsets run backwards: {brief(offsets)}")
    if type(size) is not int or size != stop - start:
        raise InvalidFormat(f"{where}: size {brief(size)} is not that of data_offsets {brief(offsets)}")
    if type(file_name) is not str or not is_safe_path(file_name):
        raise InvalidFormat(f"{where}: {brief(file_name)} is no file name")
    if type(sha256) is not str or not _SHA256.fullmatch(sha256):
        raise InvalidFormat(f"{where}: hash {brief(sha256)} is not a SHA-256 in lower-case hex")
    return TensorHash(name, start, stop, file_name, sha256)
