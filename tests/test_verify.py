"""`cakefs verify` reads every stored byte once, whoever shares it, and finds what is wrong with it all the same."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cakefs.engine import local, verify
from cakefs.engine.transfer import confirm
from cakefs.model import SpanKey
from cakefs.store.store import Store
from tests.hub import Hub
from tests.inside import Inside
from tests.models import CONFIG, llama, sharded
from tests.store_child import flip

MODEL = "org/name"


@pytest.fixture
def cli(tmp_path: Path, hub: Hub) -> Inside:
    """A model of two shards and a slice of it, all here."""
    hub.add_repo(MODEL, sharded(llama(4), 2) | {"config.json": CONFIG.replace(b"2", b"4")})
    cli = Inside(tmp_path, hub)
    cli("add", MODEL)
    cli("slice", MODEL, "--layers", "0-1", "--as", "me/part")
    cli("pull", MODEL)
    return cli


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[SpanKey]:
    """The spans that are read, as often as they are."""
    spans: list[SpanKey] = []

    def stream(store: Store, key: SpanKey, buffer: memoryview, *, forget: bool = True) -> Iterator[memoryview]:
        spans.append(key)
        return local.stream(store, key, buffer, forget=forget)

    monkeypatch.setattr(verify, "stream", stream)
    monkeypatch.setattr(confirm, "stream", stream)
    return spans


def test_each_byte_is_read_once(cli: Inside, read: list[SpanKey]) -> None:
    found = cli.told("verify")
    assert list(found) == ["me/part", MODEL]
    assert [model["confirmed"] for model in found.values()] == [3, 4], "the shards and the files beside them"
    assert len(read) == len(set(read)) == found[MODEL]["spans"] > found["me/part"]["spans"]
    assert sum(key.size for key in read) == found[MODEL]["bytes"] > found["me/part"]["bytes"]


def shared(cli: Inside, store: Store) -> SpanKey:
    """A span of both models."""
    manifest = store.catalog.models.manifest(store.catalog.models.all()["me/part"].manifest)
    return max((manifest.key(t.span) for t in manifest.tensors if ".layers." in t.name), key=lambda key: key.size)


def bad_in(cli: Inside, *arguments: str, code: int) -> dict[str, list[str]]:
    found = json.loads(cli.call("verify", *arguments, "--json", code=code)[0])
    return {name: [line.partition(": ")[0] for line in model["bad"]] for name, model in found.items()}


def test_what_is_damaged_is_said_of_all_that_have_it_and_of_no_other(cli: Inside) -> None:
    with Store.open(cli.store) as store:
        key = shared(cli, store)
        record = store.catalog.find(key)
        assert record is not None
        flip(store.blobs.path(record.digest), 100)
    bad = bad_in(cli, code=20)
    assert bad["me/part"] == bad[MODEL] and len(bad[MODEL]) == 1
    assert bad_in(cli, "--repair", code=0) == bad
    assert cli.told("verify")[MODEL]["confirmed"] == 4


def test_what_is_well_kept_and_not_what_was_published_is_found(cli: Inside) -> None:
    with Store.open(cli.store) as store:
        key = shared(cli, store)
        store.drop_span(key)
        store.put_span(key, bytes(key.size))
    bad = bad_in(cli, "--repair", code=0)
    assert bad["me/part"] == bad[MODEL] and len(bad[MODEL]) == 1 and bad[MODEL][0].endswith(".safetensors")
    assert cli.told("verify")[MODEL]["confirmed"] == 4


def test_what_is_damaged_elsewhere_in_a_file_is_left_to_the_models_that_have_it(cli: Inside) -> None:
    with Store.open(cli.store) as store:
        key = only_in_the_model(store)
        record = store.catalog.find(key)
        assert record is not None
        flip(store.blobs.path(record.digest), 100)
    assert bad_in(cli, "me/part", "--repair", code=0) == {"me/part": []}
    with Store.open(cli.store) as store:
        assert store.has(key), "it is not fetched again with the slice, so it is not dropped"
    bad = bad_in(cli, code=20)
    assert bad["me/part"] == [] and len(bad[MODEL]) == 1
    assert bad_in(cli, "--repair", code=0) == bad
    assert cli.told("verify")[MODEL]["confirmed"] == 4


def only_in_the_model(store: Store) -> SpanKey:
    names = store.catalog.models.all()
    part, whole = (store.catalog.models.manifest(names[name].manifest) for name in ("me/part", MODEL))
    shared = {part.key(t.span) for t in part.tensors}
    return max((key for t in whole.tensors if (key := whole.key(t.span)) not in shared), key=lambda key: key.size)
