"""Manifests from published files: what they show, assembled in memory, against the official writer's files."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cakefs.errors import InvalidFormat
from cakefs.formats.safetensors import DTYPES, Header, parse_header
from cakefs.formats.sharded import Index, parse_index
from cakefs.model import (
    Digest,
    Extent,
    Listing,
    Literal,
    Manifest,
    Published,
    View,
    check_manifest,
    decode_manifest,
    encode_manifest,
)
from cakefs.plan.compose import build_manifest, merged_metadata
from cakefs.plan.present import is_safetensors, wanted_indexes
from tests import official
from tests.official import Tensor

INDEX = "model.safetensors.index.json"
PT = {"format": "pt"}


class Repository:
    """Files by path, their manifest, and the bytes that its files stand for."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = files
        self.literals: dict[Digest, bytes] = {}
        published = tuple(
            Published(p, len(d), f"sha256:{hashlib.sha256(d).hexdigest()}", f"u/{p}") for p, d in files.items()
        )
        headers: dict[str, Header] = {p: parse_header(d, len(d), p) for p, d in files.items() if is_safetensors(p)}
        indexes: dict[str, Index] = {p: parse_index(files[p], p) for p in wanted_indexes(files)}
        listing = Listing("https://hub/org/name", "c0ffee", "main", published)
        self.manifest: Manifest = build_manifest("org/name", listing, headers, indexes, 7, self._put)

    def _put(self, data: bytes) -> Digest:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self.literals[digest] = data
        return digest

    def tree(self, view: View = View.MODEL) -> dict[str, bytes]:
        return {path: b"".join(map(self._bytes, file.segments)) for path, file in self.manifest.shown(view).items()}

    def _bytes(self, segment: Literal | Extent) -> bytes:
        if isinstance(segment, Literal):
            return self.literals[segment.blob]
        span = self.manifest.spans[segment.span]
        data = self.files[self.manifest.sources[span.source].path]
        return data[span.start + segment.start : span.start + segment.stop]


def values(*names: str, dtype: str = "F32", salt: int = 0) -> dict[str, Tensor]:
    size = 3 * DTYPES[dtype].bits // 8
    return {name: Tensor(dtype, (3,), bytes((salt + len(name) + n) % 256 for n in range(size))) for name in names}


def index(weight_map: Mapping[str, str]) -> bytes:
    return json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()


def sharded(shards: Mapping[str, dict[str, Tensor]], metadata: dict[str, str] | None = PT) -> dict[str, bytes]:
    """A repository of these shards and an index of all that is in them."""
    files = {path: official.write(tensors, metadata) for path, tensors in shards.items()}
    return files | {INDEX: index({name: path for path, tensors in shards.items() for name in tensors})}


# --- the merged file ------------------------------------------------------------------------------------------------


@st.composite
def repositories(draw: st.DrawFn) -> tuple[dict[str, bytes], dict[str, Tensor]]:
    """Files of a sharded repository, and the tensors that its index names."""
    texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6).filter(lambda n: n != "__metadata__")
    names = draw(st.lists(texts, min_size=1, max_size=12, unique=True))
    paths = draw(st.lists(st.sampled_from(["a", "b.x", "sub/c", "model-1", "é"]), min_size=1, max_size=4, unique=True))
    shards: dict[str, dict[str, Tensor]] = {f"{path}.safetensors": {} for path in paths}
    union: dict[str, Tensor] = {}
    for number, name in enumerate(names):
        dtype = draw(st.sampled_from(list(official.WRITER_NAMES)))
        shape = (*draw(st.lists(st.integers(0, 3), max_size=2)), 2)
        size = math.prod(shape) * DTYPES[dtype].bits // 8
        tensor = Tensor(dtype, shape, bytes([number + 1]) * size)
        holders = draw(st.lists(st.sampled_from(sorted(shards)), min_size=1, max_size=2, unique=True))
        shards[holders[0]][name] = tensor
        if draw(st.integers(0, 3)) or not union:
            union[name] = tensor
        for other in holders[1:]:  # a copy with other bytes, which the index does not name
            shards[other][name] = tensor._replace(data=bytes([200 + number]) * size)
    files = {path: official.write(tensors, PT) for path, tensors in shards.items()}
    chosen = {name: next(p for p in sorted(shards) if shards[p].get(name) == tensor) for name, tensor in union.items()}
    return files | {INDEX: index(chosen)}, union


@settings(max_examples=100)
@given(repositories())
def test_the_merged_file_is_what_the_official_writer_writes_for_the_indexed_tensors(
    repository: tuple[dict[str, bytes], dict[str, Tensor]],
) -> None:
    files, union = repository
    model = Repository(files)
    assert model.tree()["model.safetensors"] == official.write(union, PT)
    assert model.tree(View.ORIGINAL) == files


def test_one_shard_spelt_by_hand_is_merged_into_the_canonical_form() -> None:
    text = b'{"b":{"shape":[4],"dtype":"U8","data_offsets":[0,4]},"a":{"shape":[1],"dtype":"F32","data_offsets":[4,8]}}'
    shard = len(text).to_bytes(8, "little") + text + b"bbbbaaaa"
    model = Repository({"odd name.safetensors": shard, INDEX: index(dict.fromkeys("ab", "odd name.safetensors"))})
    union = {"a": Tensor("F32", (1,), b"aaaa"), "b": Tensor("U8", (4,), b"bbbb")}
    assert model.tree() == {"model.safetensors": official.write(union, PT)}


def test_tensors_of_a_shard_that_the_index_leaves_out_are_in_the_original_only() -> None:
    a, b = values("w", "bias"), values("extra", "v")
    files = {"a.safetensors": official.write(a | values("x", salt=9), PT), "b.safetensors": official.write(b, PT)}
    files[INDEX] = index({"w": "a.safetensors", "bias": "a.safetensors", "v": "b.safetensors"})
    model = Repository(files)
    assert model.tree() == {"model.safetensors": official.write(a | {"v": b["v"]}, PT)}
    assert model.tree(View.ORIGINAL) == files
    assert {t.name for t in model.manifest.tensors} == {"w", "bias", "x", "extra", "v"}


def test_the_index_decides_between_two_copies_of_a_tensor() -> None:
    first, last = values("w"), values("w", salt=100)
    for path, chosen in (("a.safetensors", first), ("z.safetensors", last)):
        files = {"a.safetensors": official.write(first, PT), "z.safetensors": official.write(last, PT)}
        model = Repository(files | {INDEX: index({"w": path})})
        assert model.tree() == {"model.safetensors": official.write(chosen, PT)}


def test_shards_may_lie_in_subdirectories_and_several_indexes_in_one_repository() -> None:
    one, two = values("w", "v"), values("u")
    files = {
        INDEX: index(dict.fromkeys(one, "x/y.safetensors")),
        "x/y.safetensors": official.write(one, PT),
        f"unet/{INDEX}": index(dict.fromkeys(two, "y.safetensors")),
        "unet/y.safetensors": official.write(two, PT),
    }
    merged = {"model.safetensors": official.write(one, PT), "unet/model.safetensors": official.write(two, PT)}
    assert Repository(files).tree() == merged


@pytest.mark.parametrize(
    ("shards", "merged"),
    [
        ([PT, PT], PT),
        ([PT, {"format": "pt", "x": "1"}], PT),
        ([{"format": "pt", "x": "1"}, {"format": "pt", "x": "1"}], PT),
        ([PT, {}], PT),
        ([{}, {}], PT),
        ([{"x": "1"}, {"x": "2"}], PT),
        ([{"x": "1"}, {}], PT),
        ([PT, {"format": "np"}], {}),
        ([{"format": "np"}, {}], {}),
        ([{"format": "mlx"}, {"format": "mlx"}], {"format": "mlx"}),
        ([{"z": "1", "a": "2", "y": "3"}, {"z": "1", "a": "2", "y": "4"}], {"a": "2", "z": "1"}),
        ([{"x": "1", "format": "pt"}, {"x": "1"}], {"x": "1"}),
    ],
)
def test_metadata_of_the_merged_file(shards: Sequence[dict[str, str]], merged: dict[str, str]) -> None:
    assert merged_metadata(shards) == merged
    assert list(merged_metadata(shards)) == sorted(merged)


@pytest.mark.parametrize("metadata", [None, {}, {"format": "np"}, {"a": "1"}])
def test_the_merged_file_carries_what_all_shards_say(metadata: dict[str, str] | None) -> None:
    shards = {"a.safetensors": values("a"), "b.safetensors": values("b")}
    model = Repository(sharded(shards, metadata))
    assert model.tree()["model.safetensors"] == official.write(values("a", "b"), metadata or PT)


# --- the rest of the tree -------------------------------------------------------------------------------------------


def test_a_single_file_is_shown_byte_for_byte_with_its_tensors() -> None:
    file = official.write(values("a", "b") | values("c", dtype="I8"), {"x": "1", "format": "pt"})
    model = Repository({"model.safetensors": file, "config.json": b"{}", "big.gguf": bytes(100)})
    assert model.tree() == model.tree(View.ORIGINAL) == model.files
    assert model.literals == {}
    assert [(t.name, t.dtype, t.shape) for t in model.manifest.tensors] == [
        ("a", "F32", (3,)), ("b", "F32", (3,)), ("c", "I8", (3,)),
    ]  # fmt: skip


def test_a_span_is_a_tensor_a_header_or_a_whole_file() -> None:
    file = official.write(values("a", "b"), PT)
    manifest = Repository({"model.safetensors": file, "config.json": b"{}"}).manifest
    start = len(file) - 24
    assert [s.path for s in manifest.sources] == ["config.json", "model.safetensors"]
    assert [(s.source, s.start, s.stop) for s in manifest.spans] == [
        (0, 0, 2), (1, 0, start), (1, start, start + 12), (1, start + 12, start + 24),
    ]  # fmt: skip
    assert [(t.name, t.span) for t in manifest.tensors] == [("a", 2), ("b", 3)]


def test_empty_files_and_empty_tensors() -> None:
    empty = {"e": Tensor("F32", (0, 3), b"")}
    files = sharded({"a.safetensors": values("a") | empty, "b.safetensors": values("b")}) | {"empty.txt": b""}
    model = Repository(files)
    assert model.tree() == {
        "model.safetensors": official.write(values("a", "b") | empty, PT),
        "empty.txt": b"",
    }
    assert model.manifest.shown(View.MODEL)["empty.txt"].segments == ()
    assert [s.size for s in model.manifest.spans].count(0) == 1


def test_a_repository_without_files() -> None:
    assert Repository({}).tree() == {}


def test_a_fallback_is_shown_under_the_usual_name_only() -> None:
    file = official.write(values("a"), PT)
    model = Repository({"pytorch_model.safetensors": file, "pytorch_model.bin": b"PK"})
    assert model.tree() == {"model.safetensors": file}
    assert model.tree(View.ORIGINAL) == model.files


def test_a_broken_index_beside_its_single_file_does_no_harm() -> None:
    file = official.write(values("a"), PT)
    model = Repository({"model.safetensors": file, INDEX: b"<html>"})
    assert model.tree() == {"model.safetensors": file}


def test_what_the_manifest_says_of_its_origin() -> None:
    manifest = Repository({"a.bin": b"12"}).manifest
    assert (manifest.name, manifest.origin, manifest.revision) == ("org/name", "https://hub/org/name", "c0ffee")
    assert (manifest.requested, manifest.created) == ("main", 7)
    source = manifest.sources[0]
    assert (source.path, source.locator.url, source.locator.size) == ("a.bin", "u/a.bin", 2)
    assert manifest.key(0) == (source.identity, 0, 2)


def test_the_manifest_survives_being_stored() -> None:
    shards = {"a.safetensors": values("a", "模型"), "b.safetensors": values("b", dtype="BF16")}
    manifest = Repository(sharded(shards) | {"config.json": b"{}"}).manifest
    check_manifest(manifest)
    assert decode_manifest(encode_manifest(manifest)) == manifest


def test_the_order_of_the_listing_does_not_matter() -> None:
    files = sharded({"b.safetensors": values("b"), "a.safetensors": values("a")}) | {"z": b"1", "c": b"2"}
    assert Repository(dict(reversed(files.items()))).manifest == Repository(files).manifest


# --- contradictions -------------------------------------------------------------------------------------------------


def broken(change: Mapping[str, bytes | None]) -> str:
    """The message for a good sharded repository with these files changed, or taken away where None."""
    files = sharded({"a.safetensors": values("a"), "b.safetensors": values("b")})
    with pytest.raises(InvalidFormat) as caught:
        Repository({path: data for path, data in {**files, **change}.items() if data is not None})
    return caught.value.message


def test_a_missing_shard() -> None:
    assert (
        broken({"b.safetensors": None}) == f"index {INDEX}: shard 'b.safetensors' is not a published safetensors file"
    )


def test_a_shard_of_another_format() -> None:
    change = {INDEX: index({"a": "a.safetensors", "b": "b.bin"}), "b.bin": b"PK"}
    assert broken(change) == f"index {INDEX}: shard 'b.bin' is not a published safetensors file"


def test_a_missing_shard_is_never_answered_by_a_fallback() -> None:
    fallback = official.write(values("a", "b"), PT)
    assert broken({"b.safetensors": None, "pytorch_model.safetensors": fallback}).startswith(f"index {INDEX}: ")


@pytest.mark.parametrize("place", ["a.safetensors", "b.safetensors"])
def test_an_indexed_tensor_that_its_shard_does_not_hold(place: str) -> None:
    change = {INDEX: index({"a": "a.safetensors", "b": "b.safetensors", "c": place})}
    assert broken(change) == f"index {INDEX}: tensor 'c' is not in {place}"


def test_an_indexed_tensor_that_only_another_shard_holds() -> None:
    assert broken({INDEX: index({"a": "b.safetensors"})}) == f"index {INDEX}: tensor 'a' is not in b.safetensors"


def test_a_broken_index() -> None:
    assert broken({INDEX: b"{}"}) == f"index {INDEX}: weight_map is missing, empty or not an object"


def test_a_shard_outside_the_repository() -> None:
    assert broken({INDEX: index({"a": "../a.safetensors"})}).startswith(f"index {INDEX}: unsafe path")


@pytest.mark.parametrize("data", [b"", b"version https://git-lfs.github.com/spec/v1\n", bytes(8)])
def test_a_safetensors_file_that_is_none(data: bytes) -> None:
    assert broken({"other.safetensors": data}).startswith("header of other.safetensors: ")


def test_a_path_that_is_there_twice_or_leaves_the_model() -> None:
    for paths, message in ((["a", "a"], "listing of m: 'a' is there twice"), (["../a"], "unsafe path '../a'")):
        listing = Listing("o", "", "", tuple(Published(path, 1, "git:00", "u") for path in paths))
        with pytest.raises(InvalidFormat) as caught:
            build_manifest("m", listing, {}, {}, 0, str)
        assert message in caught.value.message
