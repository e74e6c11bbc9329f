"""The index of a sharded model, `model.safetensors.index.json`: which tensor is in which shard.

A broken index is an error that names it, never a reason to look elsewhere: loaders that fall back load other weights.
`metadata.total_size` is informative only, since it is wrong in the wild.
"""

import re
from typing import NamedTuple

from cakefs.errors import InvalidFormat
from cakefs.formats.strictjson import brief, decode
from cakefs.model import is_safe_path

# 100 bytes a tensor make 14 MB for the largest models of today; decoding costs up to 20 times the text.
INDEX_LIMIT = 32 * 1024 * 1024

_INDEX_NAME = re.compile(r"(?P<stem>(?:.*/)?[^/]+)\.safetensors\.index(?:\.(?P<variant>[^/.]+))?\.json", re.DOTALL)


class Index(NamedTuple):
    """A checked index.

    Attributes:
        weight_map: Tensor name -> path of its shard, relative to the index's directory and below it.
        metadata: As published.
    """

    weight_map: dict[str, str]
    metadata: dict[str, object]


def index_target(path: str) -> str | None:
    """The single file that an index stands for, or None when `path` is not named as an index of safetensors shards.

    Variants are spelt `model.safetensors.index.fp16.json` for `model.fp16.safetensors`.
    """
    match = _INDEX_NAME.fullmatch(path)
    if match is None:
        return None
    variant = f".{match['variant']}" if match["variant"] else ""
    return f"{match['stem']}{variant}.safetensors"


def parse_index(data: bytes, path: str) -> Index:
    """Checks an index; `path` is for messages only. Whether the shards exist is for the caller to find out."""
    try:
        if len(data) > INDEX_LIMIT:
            raise ValueError(f"{len(data)} bytes are more than {INDEX_LIMIT}")
        document = decode(data)
        if type(document) is not dict:
            raise ValueError("not an object")
        metadata = document.get("metadata", {})
        if type(metadata) is not dict:
            raise ValueError("metadata is not an object")
        return Index(_weight_map(document), metadata)
    except ValueError as error:
        raise InvalidFormat(f"index {path}: {error}") from error


def _weight_map(document: dict[str, object]) -> dict[str, str]:
    weight_map = document.get("weight_map")
    if type(weight_map) is not dict or not weight_map:
        raise ValueError("weight_map is missing, empty or not an object")
    "".join(weight_map).encode()  # refuses lone surrogates, which no tensor name can hold
    shards: dict[str, str] = {}  # thousands of tensors share one string
    for name, shard in weight_map.items():
        if type(shard) is not str:
            raise ValueError(f"shard of tensor {brief(name)} is not a string")
        if shard not in shards:
            shard.encode()
            if not is_safe_path(shard):
                raise ValueError(f"unsafe path {brief(shard)} of a shard")
        weight_map[name] = shards.setdefault(shard, shard)
    return weight_map
