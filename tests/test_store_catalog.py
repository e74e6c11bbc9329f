"""What the catalog knows: models, manifests, spans, checks; across processes."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import lmdb
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cakefs.errors import CorruptData, NotFound, UserError
from cakefs.model import Manifest, SpanKey
from cakefs.store import BlobRecord, Catalog, Verified

ROOT = Path(__file__).parent.parent
ADDER = """
import sys
from pathlib import Path
from cakefs.model import Manifest
from cakefs.store import Catalog
catalog = Catalog.open(Path(sys.argv[1]), map_size=1 << 22)
catalog.models.put(Manifest("from/elsewhere", "", "", "", 0, (), (), (), ()))
print(catalog.models.generation())
"""


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    catalog = Catalog.open(tmp_path / "catalog", map_size=1 << 22)
    yield catalog
    catalog.close()


def manifest(name: str, revision: str = "1") -> Manifest:
    return Manifest(name, "https://example.org", revision, "main", 7, (), (), (), ())


def record(digest: str, inline: bytes | None = None) -> BlobRecord:
    return BlobRecord(digest, len(inline or b"12345"), b"12345678", inline)


def test_a_model_is_replaced_only_while_it_is_what_it_was(catalog: Catalog) -> None:
    first = catalog.models.put(manifest("org/a"))
    second = catalog.models.put(msgspec.structs.replace(manifest("org/a"), created=1), instead_of=first)
    assert second and catalog.models.all()["org/a"].manifest == second
    third = msgspec.structs.replace(manifest("org/a"), created=2)
    assert catalog.models.put(third, instead_of=first) == ""
    assert catalog.models.all()["org/a"].manifest == second
    catalog.models.remove("org/a")
    assert catalog.models.put(third, instead_of=second) == "" and not catalog.models.all()


def test_models(catalog: Catalog) -> None:
    assert (catalog.models.all(), catalog.models.generation()) == ({}, 0)
    first = catalog.models.put(manifest("org/a"))
    catalog.models.put(manifest("org/ü"), pinned=True)
    assert catalog.models.generation() == 2
    models = catalog.models.all()
    assert {name: (m.manifest, m.pinned) for name, m in models.items()} == {
        "org/a": (first, False),
        "org/ü": (catalog.models.put(manifest("org/ü")), True),
    }
    assert models["org/a"].added > 1_600_000_000
    assert catalog.models.manifest(first) == manifest("org/a")


def test_a_model_is_replaced_and_keeps_its_pin(catalog: Catalog) -> None:
    old = catalog.models.put(manifest("org/a"), pinned=True)
    new = catalog.models.put(manifest("org/a", "2"))
    assert (catalog.models.all()["org/a"].manifest, catalog.models.all()["org/a"].pinned) == (new, True)
    assert catalog.models.manifest_ids() == {old, new}
    catalog.models.drop_manifests([old, new])
    assert catalog.models.manifest_ids() == {new}, "a manifest that a model has is not dropped"
    with pytest.raises(NotFound):
        catalog.models.manifest(old)


def test_pins_and_removal_change_the_generation(catalog: Catalog) -> None:
    catalog.models.put(manifest("org/a"))
    assert catalog.models.set_pinned("org/a", True) and catalog.models.all()["org/a"].pinned
    assert not catalog.models.set_pinned("unknown", True)
    before = catalog.models.generation()
    assert catalog.models.set_pinned("org/a", True)
    assert catalog.models.generation() == before, "nothing changed"
    assert catalog.models.remove("org/a")
    assert not catalog.models.remove("org/a")
    assert catalog.models.generation() == before + 1
    assert catalog.models.all() == {}
    assert len(catalog.models.manifest_ids()) == 1, "for gc"


def test_other_processes_are_noticed(catalog: Catalog, tmp_path: Path) -> None:
    catalog.models.put(manifest("org/a"))
    command = [sys.executable, "-c", ADDER, str(tmp_path / "catalog")]
    assert subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout == b"2\n"
    assert catalog.models.generation() == 2
    assert set(catalog.models.all()) == {"org/a", "from/elsewhere"}


@pytest.mark.parametrize("name", ["", "x" * 512, "ü" * 256])
def test_names_that_cannot_be_kept(catalog: Catalog, name: str) -> None:
    with pytest.raises(UserError):
        catalog.models.put(manifest(name))
    assert catalog.models.manifest_ids() == set()


def test_a_damaged_manifest_is_refused(catalog: Catalog, tmp_path: Path) -> None:
    name = catalog.models.put(manifest("org/a", "revision-in-clear-text"))
    catalog.close()
    path = tmp_path / "catalog" / "data.mdb"
    path.write_bytes(path.read_bytes().replace(b"clear-text", b"clear-tixt"))
    again = Catalog.open(tmp_path / "catalog", map_size=1 << 22)
    with pytest.raises(CorruptData, match="no longer matches"):
        again.models.manifest(name)


def test_spans_and_blobs(catalog: Catalog) -> None:
    a, b, c = SpanKey("sha256:a", 0, 5), SpanKey("sha256:a", 5, 10), SpanKey("git:b", 0, 5)
    catalog.record_seals([(a, record("xxh3:01")), (b, record("xxh3:02", b"hello")), (c, record("xxh3:01"))])
    assert catalog.find(a) == catalog.find(c) == catalog.blob("xxh3:01") == record("xxh3:01")
    assert catalog.find(b) == record("xxh3:02", b"hello")
    assert catalog.find(SpanKey("sha256:a", 0, 10)) is None
    assert catalog.spans("sha256:a") == {(0, 5): "xxh3:01", (5, 10): "xxh3:02"}
    assert catalog.spans("sha256:z") == {}
    assert sorted(catalog.listing()) == sorted([(a, "xxh3:01"), (b, "xxh3:02"), (c, "xxh3:01")])
    assert catalog.blobs() == [("xxh3:01", 5, False), ("xxh3:02", 5, True)]
    assert catalog.recorded([a, SpanKey("x", 0, 1)]) == {a}
    catalog.forget_spans([a, b, a])
    assert catalog.find(a) is None
    assert catalog.unreferenced(["xxh3:01", "xxh3:02", "xxh3:03"]) == ["xxh3:02", "xxh3:03"]
    catalog.drop_blobs(["xxh3:01"])
    assert catalog.find(c) is None
    assert catalog.blobs() == [("xxh3:02", 5, True)]
    assert catalog.listing() == []


def test_a_span_moves(catalog: Catalog) -> None:
    a = SpanKey("sha256:a", 0, 5)
    catalog.record_seals([(a, record("xxh3:01"))])
    catalog.record_seals([(a, record("xxh3:02"))])
    assert catalog.spans("sha256:a") == {(0, 5): "xxh3:02"}
    assert catalog.unreferenced(["xxh3:01", "xxh3:02"]) == ["xxh3:01"]


def test_verified(catalog: Catalog) -> None:
    assert catalog.verified("sha256:a") is None
    catalog.set_verified("sha256:a", True, 1234)
    assert catalog.verified("sha256:a") == Verified(True, 1234)
    catalog.set_verified("sha256:a", False, 5678)
    assert catalog.verified("sha256:a") == Verified(False, 5678)
    catalog.set_verified("sha256:a", True, 9)
    catalog.record_seals([(SpanKey("sha256:a", 0, 5), record("xxh3:01"))])
    catalog.forget_spans([SpanKey("sha256:a", 0, 5)])
    assert catalog.verified("sha256:a") is None


def test_sha256s_go_with_their_blob_and_claims_stay_claims(catalog: Catalog) -> None:
    key, sha256 = SpanKey("sha256:a", 0, 5), "ab" * 32
    catalog.record_seals([(key, record("xxh3:01"))])
    catalog.sha256.record({"xxh3:01": sha256, "xxh3:gone": "cd" * 32})
    assert catalog.sha256.of(["xxh3:01", "xxh3:gone"]) == {"xxh3:01": sha256}
    assert catalog.sha256.digests([sha256, "cd" * 32]) == {sha256: "xxh3:01"}
    other = SpanKey("sha256:b", 3, 8)
    catalog.sha256.put_claims([(other, sha256), (SpanKey("sha256:b", 0, 3), sha256)])
    catalog.sha256.put_claims([(other, "ef" * 32)])
    assert catalog.sha256.claims("sha256:b") == {(0, 3): sha256, (3, 8): "ef" * 32}
    assert catalog.find(other) is None and catalog.spans("sha256:b") == {}
    catalog.sha256.drop_claims([other])
    catalog.drop_blobs(["xxh3:01"])
    assert catalog.sha256.of(["xxh3:01"]) == {} == catalog.sha256.digests([sha256])
    assert catalog.sha256.claims("sha256:b") == {(0, 3): sha256}
    catalog.sha256.keep_claims(["sha256:a"])
    assert catalog.sha256.claims("sha256:b") == {}


def test_other_library_errors_are_ours(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    def corrupted(**_: object) -> None:
        raise lmdb.CorruptedError("MDB_CORRUPTED")

    monkeypatch.setattr(catalog._env, "_env", type("Broken", (), {"begin": staticmethod(corrupted)})())
    with pytest.raises(CorruptData):
        catalog.models.all()
    with pytest.raises(CorruptData):
        catalog.models.put(manifest("org/a"))
    monkeypatch.undo()


def test_threads_read_and_write(catalog: Catalog) -> None:
    """Growth of the map in the middle included."""
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for i in range(12):
                catalog.models.put(manifest(f"{number}-{i}", "r" * 30_000))
                assert f"{number}-{i}" in catalog.models.all()
                catalog.models.generation()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=[n]) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(catalog.models.all()) == 72


KEYS = st.builds(
    lambda identity, start, size: SpanKey(identity, start, start + size),
    st.sampled_from(["sha256:a", "sha256:b", "git:c"]),
    st.integers(0, 3),
    st.integers(1, 2),
)
DIGESTS = st.sampled_from(["xxh3:01", "xxh3:01-1", "xxh3:02"])
STEPS = st.tuples(
    st.lists(st.tuples(KEYS, DIGESTS), max_size=4),  # sealed
    st.lists(KEYS, max_size=3),  # forgotten
    st.lists(DIGESTS, max_size=1),  # dropped
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(STEPS, max_size=5))
def test_agrees_with_a_dict(
    catalog: Catalog, steps: list[tuple[list[tuple[SpanKey, str]], list[SpanKey], list[str]]]
) -> None:
    catalog.drop_blobs([digest for digest, _, _ in catalog.blobs()])
    spans: dict[SpanKey, str] = {}
    blobs: set[str] = set()
    for sealed, forgotten, dropped in steps:
        catalog.record_seals((key, record(digest)) for key, digest in sealed)
        spans.update(sealed)
        blobs |= {digest for _, digest in sealed}
        catalog.forget_spans(forgotten)
        spans = {key: digest for key, digest in spans.items() if key not in forgotten}
        catalog.drop_blobs(dropped)
        spans = {key: digest for key, digest in spans.items() if digest not in dropped}
        blobs -= set(dropped)
        assert dict(catalog.listing()) == spans
        assert {digest for digest, _, _ in catalog.blobs()} == blobs
        assert set(catalog.unreferenced(sorted(blobs))) == blobs - set(spans.values())
