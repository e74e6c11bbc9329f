"""What models show of what is here: the same by their outlines, by their manifests, and however little is looked at."""

from pathlib import Path

import lmdb
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cakefs.engine.known import shown
from cakefs.engine.known.shown import Outline, Shown, Spans
from cakefs.engine.known.survey import summarize_models
from cakefs.model import Manifest
from cakefs.store.store import Store
from tests.hub import Hub
from tests.inside import Inside
from tests.models import CONFIG, llama, sharded, single

RECIPE = """\
merge_method: linear
dtype: float32
models:
  - {model: org/name, parameters: {weight: 0.5}}
  - {model: org/same, parameters: {weight: 0.5}}
"""
BOUNDS = st.tuples(st.integers(0, 9), st.integers(10, 14))


@given(st.dictionaries(BOUNDS, st.integers(1, 1 << 63), min_size=1), st.dictionaries(BOUNDS, st.text(max_size=2)))
def test_spans_are_found_by_either_way_to_look(
    sizes: dict[tuple[int, int], int], known: dict[tuple[int, int], str]
) -> None:
    """Few that are known are looked up one by one; of many, all spans are gone through."""
    expected = {(size, bounds, known[bounds]) for bounds, size in sizes.items() if bounds in known}
    spans = Spans.of(sizes)
    assert spans.total == sum(sizes.values())
    found = list(spans.among(known))
    assert set(found) == expected and len(found) == len(expected)
    one_by_one = [each for bounds, text in known.items() for each in spans.among({bounds: text})]
    assert set(one_by_one) == expected


@pytest.fixture
def cakefs(hub: Hub, tmp_path: Path) -> Inside:
    """A model of shards, one that shares its tensors, a view that repeats layers, one with calculated tensors."""
    cakefs = Inside(tmp_path, hub)
    tensors = llama(2, width=64)
    hub.add_repo("org/name", sharded(tensors, 3) | {"config.json": CONFIG, "notes.txt": b"n" * 100})
    hub.add_repo("org/same", {"model.safetensors": single(tensors), "config.json": CONFIG})
    for name in ("org/name", "org/same"):
        cakefs("add", name)
    cakefs("merge", "org/name", "--ratio-repeat", "0:.5,.25:1", "--as", "deep")
    (tmp_path / "recipe.yml").write_text(RECIPE)
    cakefs("merge", tmp_path / "recipe.yml", "--as", "mean")
    return cakefs


def manifests(store: Store) -> list[Manifest]:
    return [store.catalog.models.manifest(record.manifest) for record in store.catalog.models.all().values()]


def test_an_outline_says_what_the_manifest_does(cakefs: Inside) -> None:
    cakefs("pull", "org/name", "--layers", "0")
    with Store.open(cakefs.store) as store:
        stored = {data for data in store.catalog.models.outlines().values()}
        local = shown.Local.of_all(store)
        for manifest in manifests(store):
            outline = Outline.of(manifest, Shown.of(manifest))
            assert msgspec.msgpack.encode(outline) in stored
            direct, back = Shown.of(manifest), outline.shown()
            assert (back.size, back.literal_bytes, back.published) == (
                direct.size,
                direct.literal_bytes,
                direct.published,
            )
            assert back.here(local) == direct.here(local)
            assert direct.size == sum(file.size for file in shown.own_files(manifest).values())


@pytest.mark.parametrize("others", [None, b"", msgspec.msgpack.encode(["of", "another", "version"])])
def test_models_without_an_outline_that_is_understood_are_listed_the_same(cakefs: Inside, others: bytes | None) -> None:
    """Such as those that an earlier version added."""
    cakefs("pull", "org/same")
    expected = cakefs.told("ls")
    assert [one["name"] for one in expected] == ["deep", "mean", "org/name", "org/same"]
    env = lmdb.open(str(cakefs.store / "catalog"), max_dbs=64)
    table = env.open_db(b"outlines")
    with env.begin(write=True) as txn:
        ids = [bytes(key) for key, _ in txn.cursor(table)]
        assert len(ids) == 4
        for id in ids:
            txn.delete(id, db=table) if others is None else txn.put(id, others, db=table)
    env.close()
    assert cakefs.told("ls") == expected
    assert [model.name for model in summarize_models(cakefs.store)] == ["deep", "mean", "org/name", "org/same"]


def test_gc_takes_the_outlines_along(cakefs: Inside) -> None:
    cakefs("rm", "deep")
    cakefs("gc")
    with Store.open(cakefs.store) as store:
        assert store.catalog.models.outlines().keys() == store.catalog.models.manifest_ids()
        assert len(store.catalog.models.manifest_ids()) == 3
