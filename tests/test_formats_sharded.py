"""The index of a sharded model: what it may say, and which file it stands for."""

import json

import pytest

from cakefs.errors import InvalidFormat
from cakefs.formats.sharded import INDEX_LIMIT, Index, index_target, parse_index

SHARD = "model-00001-of-00002.safetensors"
GOOD = {"metadata": {"total_size": 1, "total_parameters": 2.5}, "weight_map": {"a": SHARD, "模型": "sub/b.safetensors"}}


@pytest.mark.parametrize("indent", [None, 2])
def test_a_good_index(indent: int | None) -> None:
    index = parse_index(json.dumps(GOOD, indent=indent).encode(), "x")
    assert index == Index({"a": SHARD, "模型": "sub/b.safetensors"}, {"total_size": 1, "total_parameters": 2.5})


def test_metadata_and_anything_unknown_may_be_missing_or_there() -> None:
    text = b'{"weight_map":{"a":"any name"},"quantization":{"bits":[4]}}'
    assert parse_index(text, "x") == Index({"a": "any name"}, {})


def test_the_order_of_tensors_is_kept() -> None:
    names = [f"t{n}" for n in (3, 1, 2, 10)]
    text = json.dumps({"weight_map": dict.fromkeys(names, SHARD)}).encode()
    assert list(parse_index(text, "x").weight_map) == names


def with_shard(shard: object) -> bytes:
    return json.dumps({"weight_map": {"a": SHARD, "b": shard}}).encode()


BROKEN = {
    "empty": b"",
    "no JSON": b"<html>",
    "cut": b'{"weight_map":{"a":"b"}',
    "text behind": b'{"weight_map":{"a":"b"}} x',
    "BOM": b'\xef\xbb\xbf{"weight_map":{"a":"b"}}',
    "not UTF-8": b'{"weight_map":{"\xff":"b"}}',
    "NaN": b'{"metadata":{"total_size":NaN},"weight_map":{"a":"b"}}',
    "number of 5000 digits": b'{"metadata":{"total_size":%s},"weight_map":{"a":"b"}}' % (b"9" * 5000),
    "100,000 levels": b"[" * 100_000,
    "a list": b"[]",
    "weight_map missing": b'{"metadata":{}}',
    "weight_map empty": b'{"weight_map":{}}',
    "weight_map null": b'{"weight_map":null}',
    "weight_map a list": b'{"weight_map":["a"]}',
    "metadata a list": b'{"metadata":[],"weight_map":{"a":"b"}}',
    "weight_map twice": b'{"weight_map":{"a":"b"},"weight_map":{"a":"b"}}',
    "tensor twice": b'{"weight_map":{"a":"b","a":"b"}}',
    "tensor twice, once escaped": b'{"weight_map":{"a":"b","\\u0061":"c"}}',
    "lone surrogate in a tensor": b'{"weight_map":{"\\ud800":"b"}}',
    "lone surrogate in a shard": b'{"weight_map":{"a":"\\ud800"}}',
    "shard a number": with_shard(1),
    "shard null": with_shard(None),
    "shard a list": with_shard([SHARD]),
    "shard empty": with_shard(""),
    "shard absolute": with_shard("/etc/passwd"),
    "shard above": with_shard("../x.safetensors"),
    "shard above, hidden": with_shard("a/../../x.safetensors"),
    "shard that turns back": with_shard("a/../x.safetensors"),
    "shard here": with_shard("./x.safetensors"),
    "shard a directory": with_shard("a/"),
    "shard with two slashes": with_shard("a//b"),
    "shard with NUL": with_shard("a\0b"),
    "shard of 300 characters": with_shard("n" * 300),
    "too long": b" " * (INDEX_LIMIT + 1),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_index_is_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidFormat) as caught:
        parse_index(BROKEN[name], "dir/x.index.json")
    message = caught.value.message
    assert message.startswith("index dir/x.index.json: ")
    assert len(message) < 200 and message.isprintable()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tensor twice", "'a' is there twice"),
        ("shard a number", "shard of tensor 'b' is not a string"),
        ("shard above", "unsafe path '../x.safetensors' of a shard"),
        ("weight_map empty", "weight_map is missing, empty or not an object"),
    ],
)
def test_messages_say_what_is_wrong(name: str, message: str) -> None:
    with pytest.raises(InvalidFormat) as caught:
        parse_index(BROKEN[name], "x")
    assert caught.value.message == f"index x: {message}"


@pytest.mark.parametrize(
    ("index", "single"),
    [
        ("model.safetensors.index.json", "model.safetensors"),
        ("model.safetensors.index.fp16.json", "model.fp16.safetensors"),
        ("model.fp16.safetensors.index.json", "model.fp16.safetensors"),
        ("unet/diffusion_pytorch_model.safetensors.index.json", "unet/diffusion_pytorch_model.safetensors"),
        ("a/b/x.safetensors.index.bf16.json", "a/b/x.bf16.safetensors"),
        ("pytorch_model.bin.index.json", None),
        ("model.safetensors", None),
        ("model.index.json", None),
        ("model.safetensors.index.json.bak", None),
        ("model.safetensors.index.a/b.json", None),
        (".safetensors.index.json", None),
        ("dir/.safetensors.index.json", None),
        ("model_index.json", None),
    ],
)
def test_the_single_file_an_index_stands_for(index: str, single: str | None) -> None:
    assert index_target(index) == single
