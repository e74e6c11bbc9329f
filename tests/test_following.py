"""A file that is hashed while it comes: the verdict is as of one that is hashed at the end; no byte is read twice."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cakefs.engine.transfer import confirm
from cakefs.engine.transfer.confirm import Following, confirm_source
from cakefs.model import CHUNK, SpanKey
from cakefs.store import Store
from tests.hub import Hub
from tests.inside import Inside
from tests.models import CONFIG, single, tensor
from tests.store_child import MAP_SIZE, data

SIZES = (700, 3 * CHUNK + 5, 8, 2 * CHUNK, CHUNK + 4097, 1)
BYTES = data("followed", sum(SIZES))
IDENTITY = "sha256:" + hashlib.sha256(BYTES).hexdigest()
STOPS = [sum(SIZES[: i + 1]) for i in range(len(SIZES))]
KEYS = [SpanKey(IDENTITY, stop - size, stop) for size, stop in zip(SIZES, STOPS, strict=True)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", map_size=MAP_SIZE) as store:
        yield store


def put(store: Store, key: SpanKey, content: bytes = BYTES) -> None:
    store.put_span(key, content[key.start : key.stop])


def going() -> bool:
    return True


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of what is hashed when a file is confirmed."""
    sizes: list[int] = []
    genuine = confirm._hash_spans

    def spy(store: Store, identity: str, rest: confirm._Rest) -> str | None:
        sizes.append(sum(stop - start for start, stop in rest.pieces))
        return genuine(store, identity, rest)

    monkeypatch.setattr(confirm, "_hash_spans", spy)
    return sizes


@given(st.permutations(KEYS), st.sets(st.integers(0, len(KEYS))))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_in_whatever_order_it_comes_the_verdict_is_right(
    tmp_path_factory: pytest.TempPathFactory, order: list[SpanKey], looks: set[int]
) -> None:
    with Store.open(tmp_path_factory.mktemp("store") / "store", map_size=MAP_SIZE) as store:
        following = Following(store, IDENTITY, len(BYTES))
        for i, key in enumerate(order):
            assert confirm_source(store, IDENTITY, len(BYTES), following=following) is None
            put(store, key)
            if i in looks:
                following.advance(going)
        assert confirm_source(store, IDENTITY, len(BYTES), following=following) is True


def test_only_what_was_not_followed_is_hashed_at_the_end(store: Store, hashed: list[int]) -> None:
    following = Following(store, IDENTITY, len(BYTES))
    for key in KEYS[:-1]:
        put(store, key)
        following.advance(going)
    put(store, KEYS[-1])
    assert confirm_source(store, IDENTITY, len(BYTES), following=following)
    assert hashed == [SIZES[-1]]


def test_a_look_that_is_ended_in_the_middle_of_a_span_goes_on_later(store: Store, hashed: list[int]) -> None:
    following = Following(store, IDENTITY, len(BYTES))
    for key in KEYS:
        put(store, key)
    for allowed in range(len(KEYS)):
        steps = iter(range(allowed))
        following.advance(lambda steps=steps: next(steps, None) is not None)  # type: ignore[misc]
    following.advance(going)
    assert confirm_source(store, IDENTITY, len(BYTES), following=following)
    assert hashed == [0]


def test_what_was_dropped_and_came_anew_is_not_trusted(store: Store, hashed: list[int]) -> None:
    """The blob that was hashed is not the one that is there now."""
    wrong = bytes(len(BYTES))
    following = Following(store, IDENTITY, len(BYTES))
    put(store, KEYS[0], wrong)
    following.advance(going)
    store.drop_span(KEYS[0])
    for key in KEYS:
        put(store, key)
    assert confirm_source(store, IDENTITY, len(BYTES), following=following)
    assert hashed == [len(BYTES)]


def test_wrong_bytes_are_found_and_hashed_once_more_before_they_are_dropped(
    store: Store, hashed: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    following = Following(store, IDENTITY, len(BYTES))
    for key in KEYS:
        put(store, key, BYTES if key != KEYS[1] else bytes(len(BYTES)))
        following.advance(going)
    assert confirm_source(store, IDENTITY, len(BYTES), following=following) is False
    assert hashed == [0, len(BYTES)] and "do not have the published hash" in caplog.text
    assert not any(store.has(key) for key in KEYS)


def test_a_pull_has_hashed_a_large_file_when_its_last_byte_has_come(
    hub: Hub, tmp_path: Path, hashed: list[int]
) -> None:
    published = single({f"t{i}": tensor(i, 2 * CHUNK) for i in range(8)})
    hub.add_repo("org/name", {"config.json": CONFIG, "model.safetensors": published})
    cakefs = Inside(tmp_path, hub)
    cakefs.run("add", "org/name")
    hub.shape(rate=len(published) / 2)
    cakefs.run("pull", "org/name")
    assert cakefs.json("ls")[0]["verified"]
    assert hashed and max(hashed) < len(published)
