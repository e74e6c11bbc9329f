"""A file that is hashed while it comes: the verdict is as of one that is hashed at the end; no byte is read twice."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cakefs.app import App
from cakefs.engine import follow, jobs
from cakefs.engine.follow import Followed
from cakefs.engine.tasks import open_flat_nursery
from cakefs.engine.transfer import confirm
from cakefs.engine.transfer.confirm import Following, confirm_source
from cakefs.model import CHUNK, Manifest, Source, SpanKey
from cakefs.plan.choice import file_spans
from cakefs.store import Store
from tests.hub import Hub
from tests.inside import Inside
from tests.models import CONFIG, sharded, single, tensor
from tests.store_child import MAP_SIZE, data
from tests.test_engine import Body, add, run

SIZES = (700, 3 * CHUNK + 5, 8, 2 * CHUNK, CHUNK + 4097, 1)
BYTES = data("followed", sum(SIZES))
IDENTITY = "sha256:" + hashlib.sha256(BYTES).hexdigest()
BUFFER = memoryview(bytearray(CHUNK))
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
                following.advance(BUFFER, going)
        assert confirm_source(store, IDENTITY, len(BYTES), following=following) is True


def test_only_what_was_not_followed_is_hashed_at_the_end(store: Store, hashed: list[int]) -> None:
    following = Following(store, IDENTITY, len(BYTES))
    for key in KEYS[:-1]:
        put(store, key)
        following.advance(BUFFER, going)
    put(store, KEYS[-1])
    assert confirm_source(store, IDENTITY, len(BYTES), following=following)
    assert hashed == [SIZES[-1]]


def test_a_look_that_is_ended_in_the_middle_of_a_span_goes_on_later(store: Store, hashed: list[int]) -> None:
    following = Following(store, IDENTITY, len(BYTES))
    for key in KEYS:
        put(store, key)
    for allowed in range(len(KEYS)):
        steps = iter(range(allowed))
        following.advance(BUFFER, lambda steps=steps: next(steps, None) is not None)  # type: ignore[misc]
    following.advance(BUFFER, going)
    assert confirm_source(store, IDENTITY, len(BYTES), following=following)
    assert hashed == [0]


def test_what_was_dropped_and_came_anew_is_not_trusted(store: Store, hashed: list[int]) -> None:
    """The blob that was hashed is not the one that is there now."""
    wrong = bytes(len(BYTES))
    following = Following(store, IDENTITY, len(BYTES))
    put(store, KEYS[0], wrong)
    following.advance(BUFFER, going)
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
        following.advance(BUFFER, going)
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


SHARDS = sharded({f"t{i}": tensor(i, CHUNK) for i in range(6)}, 2)  # of 12 MiB each


@pytest.fixture
def app_of(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Body], None]:
    """Runs a body inside an app over a store, with a model of two shards added."""
    monkeypatch.setattr(follow, "FOLLOWED", 8 * CHUNK)
    hub.add_repo("org/name", {"config.json": CONFIG, **SHARDS})

    def start(body: Body) -> None:
        async def added(app: App) -> None:
            await add(app, "org/name")
            await body(app)

        run(hub, tmp_path / "store", added)

    return start


def verified(app: App) -> list[bool]:
    known = [app.store.catalog.verified(s.identity) for s in shards(app.model("org/name"))]
    return [bool(one and one.ok) for one in known]


def shards(manifest: Manifest) -> list[Source]:
    return sorted((s for s in manifest.sources if s.path.startswith("model-")), key=lambda s: s.path)


def followed(app: App, spans: Iterable[int]) -> list[str]:
    manifest = app.model("org/name")
    found = Followed(app.store, manifest, spans)
    return [source.path for i, source in enumerate(manifest.sources) if i in found]


def test_a_pull_that_is_ended_has_confirmed_what_was_complete(hub: Hub, app_of: Callable[[Body], None]) -> None:
    async def body(app: App) -> None:
        manifest = app.model("org/name")
        hub.fault("stall", "model-00002-of-00002.safetensors", times=None, after=CHUNK, seconds=30)
        async with open_flat_nursery() as nursery:
            nursery.start_soon(jobs.pull, app.store, app.fetcher, manifest, manifest.files, lambda _: None)
            with trio.fail_after(20):
                while verified(app) != [True, False]:  # noqa: ASYNC110
                    await trio.sleep(0.02)
            nursery.cancel_scope.cancel()
        hub.clear_faults()
        assert verified(app) == [True, False]

    app_of(body)


def test_only_what_the_pull_completes_and_nobody_confirmed_is_followed(app_of: Callable[[Body], None]) -> None:
    async def body(app: App) -> None:
        manifest = app.model("org/name")
        spans = file_spans(manifest, manifest.files)
        first, second = (shard.path for shard in shards(manifest))
        assert followed(app, spans) == [first, second]
        assert followed(app, [i for i in spans if manifest.spans[i].size < CHUNK]) == [], "they complete nothing"
        await jobs.pull(app.store, app.fetcher, manifest, manifest.files, lambda _: None)
        assert verified(app) == [True, True] and followed(app, spans) == []
        lost = next(i for i in spans if manifest.sources[manifest.spans[i].source].path == second)
        app.store.drop_span(manifest.key(lost))
        assert followed(app, [lost]) == [second], "what came anew must be confirmed anew; the other was"

    app_of(body)
