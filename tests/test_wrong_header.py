"""A header that came wrong when a model was added, and that its format allows: found out with the rest of its file, and
then the model is what it would have been."""

import io
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cakefs.model import CHUNK, SpanKey
from cakefs.store.store import Store
from tests.fs_child import eventually
from tests.hub import Hub
from tests.models import CONFIG, sharded, single, tensor
from tests.mounts import UPSTREAM, Cakefs, needs_fuse

torch = pytest.importorskip("torch")

SHARD = "model-00001-of-00002.safetensors"
AGAIN = "a header had come wrong when it was added|had come wrong: make it again"


def cakefs_in(directory: Path, hub: Hub) -> Cakefs:
    return Cakefs(directory, hub.endpoint).provoking(UPSTREAM, AGAIN)


def misread(hub: Hub, path: str, data: bytes, right: bytes, wrong: bytes) -> None:
    """The next answer has a `wrong` byte where the `right` one is, within what both have around it."""
    at = data.index(right)
    ((place, flips),) = [(i, a ^ b) for i, (a, b) in enumerate(zip(right, wrong, strict=True)) if a != b]
    hub.fault("corrupt", path, after=at + place, flips=flips)


def add_with_a_misread_shard(hub: Hub, directory: Path, tensors: dict[str, NDArray[np.float32]]) -> Cakefs:
    files = sharded(tensors, 2)
    hub.add_repo("org/m", {**files, "config.json": CONFIG})
    misread(hub, f"org/m/{SHARD}", files[SHARD], b'"F32"', b'"I32"')
    cakefs = cakefs_in(directory, hub)
    cakefs.run("add", "org/m")
    return cakefs


@needs_fuse
def test_a_merged_file_becomes_right_by_reading_it(hub: Hub, tmp_path: Path) -> None:
    """Without a pull: its own header is nothing that is read, and yet fetched again once its file was refuted."""
    tensors = {f"l{i}": tensor(i, CHUNK // 4 + 1000) for i in range(4)}
    cakefs = add_with_a_misread_shard(hub, tmp_path, tensors)
    with cakefs.mounted() as path:
        merged = path / "org/m/model.safetensors"
        assert merged.read_bytes() != single(tensors), "not to be known before"
        assert eventually(lambda: cakefs.status()["files_refuted"] == 1)
        assert eventually(lambda: merged.read_bytes() == single(tensors))
        assert "a header had come wrong" in cakefs.log()


@needs_fuse
@pytest.mark.parametrize("way", ["mount", "pull"])
def test_who_ended_before_the_header_came_again_leaves_that_to_the_next(hub: Hub, tmp_path: Path, way: str) -> None:
    tensors = {f"l{i}": tensor(i, 1000) for i in range(4)}
    cakefs = add_with_a_misread_shard(hub, tmp_path, tensors)
    with Store.open(cakefs.store) as store:
        manifest = store.catalog.models.manifest(store.catalog.models.all()["org/m"].manifest)
        (source,) = [source for source in manifest.sources if source.path == SHARD]
        store.catalog.set_verified(source.identity, False, 0)
        for start, stop in store.catalog.spans(source.identity):
            store.drop_span(SpanKey(source.identity, start, stop))
    if way == "pull":
        cakefs.run("pull", "org/m")
    with cakefs.mounted() as path:
        merged = path / "org/m/model.safetensors"
        assert eventually(lambda: merged.read_bytes() == single(tensors))


def test_a_neighbour_that_is_not_here_does_not_matter_where_the_header_was_right(hub: Hub, tmp_path: Path) -> None:
    """A torch checkpoint cannot be looked into again without all of it; the other file is right, and proved."""
    published, pickle = single({"abc": tensor(1, 100_000)}), io.BytesIO()
    torch.save({"w": torch.zeros(600, 600)}, pickle)
    hub.add_repo("org/m", {"model.safetensors": published, "text_encoder/pytorch_model.bin": pickle.getvalue()})
    cakefs = cakefs_in(tmp_path, hub)
    cakefs.run("add", "org/m")
    hub.fault("corrupt", "org/m/model.safetensors", position=len(published) - 5)
    done = cakefs.run("pull", "org/m", "--files", "model.safetensors")
    assert "came wrong, and is fetched again" in done.stderr and "header" not in done.stderr
    (source,) = [s for s in cakefs.json("show", "org/m")["sources"] if s["path"] == "model.safetensors"]
    assert source["verified"] is True


def test_names_become_right_and_what_was_made_of_wrong_ones_is_told(hub: Hub, tmp_path: Path) -> None:
    tensors = {f"model.layers.{i}.w": tensor(i, 1000) for i in (0, 2)}
    published = single(tensors)
    hub.add_repo("org/m", {"model.safetensors": published})
    misread(hub, "org/m/model.safetensors", published, b"layers.2", b"layers.1")
    cakefs = cakefs_in(tmp_path, hub)
    cakefs.run("add", "org/m")
    assert names(cakefs) == {"model.layers.0.w", "model.layers.1.w"}
    cakefs.run("slice", "org/m", "--layers", "0-1", "--as", "cut")
    done = cakefs.run("pull", "org/m")
    assert "org/m: a header had come wrong" in done.stderr and "cut was made when" in done.stderr
    assert names(cakefs) == {*tensors}
    assert cakefs.run("add", "org/m").stdout.startswith("unchanged")
    cakefs.run("verify", "org/m")


def test_adding_again_is_enough_where_the_header_is_read_anew(hub: Hub, tmp_path: Path) -> None:
    """The same files, understood otherwise: nothing that needs --update."""
    published = single({"abc": tensor(1, 1000)})
    hub.add_repo("org/m", {"model.safetensors": published})
    misread(hub, "org/m/model.safetensors", published, b'"abc"', b'"abb"')
    cakefs = cakefs_in(tmp_path, hub)
    cakefs.run("add", "org/m")
    assert names(cakefs) == {"abb"}
    with Store.open(cakefs.store) as store:
        (key,) = [key for key, _ in store.catalog.listing() if key.start == 0]
        store.drop_span(key)
    assert "org/m" in cakefs.run("add", "org/m").stdout
    assert names(cakefs) == {"abc"}


def names(cakefs: Cakefs) -> set[str]:
    return {found["name"] for found in cakefs.json("show", "org/m", "--tensors")["tensors"]}
