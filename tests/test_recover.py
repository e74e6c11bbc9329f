"""A catalog that broke: told clearly, and made again by `verify --repair` from the copy that is kept of it."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cakefs.errors import CorruptData, UserError
from cakefs.store.store import Store
from tests.hub import Hub
from tests.inline import Inline
from tests.models import CONFIG, single, tensor
from tests.mounts import Cakefs

PAGE = 4096


def garbage(path: Path) -> None:
    path.write_bytes(b"no catalog" * 5000)


def middle(path: Path) -> None:
    """All but the pages that say where everything is."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(2 * PAGE)
        file.write(os.urandom(size - 2 * PAGE))


def cut(path: Path) -> None:
    os.truncate(path, 3 * PAGE)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


DAMAGES = [garbage, middle, cut, emptied, Path.unlink]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def made(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a model that is all here."""
    hub.add_repo("org/name", {"config.json": CONFIG, "model.safetensors": single({"t": tensor(1, 500_000)})})
    hub.add_repo("org/later", {"model.safetensors": single({"t": tensor(2, 500_000)})})
    cakefs = Inline(tmp_path_factory.mktemp("made"), hub.endpoint)
    cakefs.run("add", "org/name")
    cakefs.run("pull", "org/name")
    return cakefs.store


@pytest.fixture
def cakefs(hub: Hub, made: Path, tmp_path: Path) -> Cakefs:
    """With a copy of that store."""
    cakefs = Inline(tmp_path, hub.endpoint)
    shutil.copytree(made, cakefs.store)
    return cakefs


def apart(cakefs: Cakefs, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """In a process of its own: a broken catalog may end it."""
    return Cakefs.run(cakefs, *arguments, check=False)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_catalog_is_made_again_from_its_copy(hub: Hub, cakefs: Cakefs, damage: Callable[[Path], None]) -> None:
    damage(cakefs.store / "catalog/data.mdb")
    told = apart(cakefs, "ls")
    assert told.returncode == CorruptData.exit_code, told.stdout
    assert told.stderr.startswith("error: catalog ") and "hint: cakefs verify --repair" in told.stderr
    repaired = cakefs.run("verify", "--repair")
    assert "in its place is the copy of" in repaired.stderr and "with 1 models" in repaired.stderr
    hub.reset()
    assert cakefs.json("ls")[0]["complete"]
    assert cakefs.json("pull", "org/name")["fetched_bytes"] == 0
    assert hub.sent() == 0
    kept = list(cakefs.store.glob("catalog-broken-*"))
    assert len(kept) == (damage is not Path.unlink)
    assert cakefs.run("verify", "--repair").stderr == "", "once"


def test_without_a_copy_the_store_is_empty_and_models_are_added_again(hub: Hub, cakefs: Cakefs) -> None:
    garbage(cakefs.store / "catalog/data.mdb")
    garbage(cakefs.store / "backup/data.mdb")
    assert "the store is empty" in cakefs.run("verify", "--repair").stderr
    assert cakefs.json("ls") == []
    cakefs.run("add", "org/name")
    cakefs.run("gc")
    assert cakefs.run("verify").returncode == 0


def test_what_the_copy_does_not_know_is_fetched_again_and_what_it_knows_too_much_is_missing(
    hub: Hub, cakefs: Cakefs
) -> None:
    copy = (cakefs.store / "backup/data.mdb").read_bytes()
    cakefs.run("evict", "org/name")
    cakefs.run("add", "org/later")
    (cakefs.store / "backup/data.mdb").write_bytes(copy)
    garbage(cakefs.store / "catalog/data.mdb")
    hub.reset()
    cakefs.run("verify", "--repair")
    assert [m["name"] for m in cakefs.json("ls")] == ["org/name"]
    cakefs.run("pull", "org/name")
    assert hub.sent("org/name/*") > 1_000_000
    cakefs.run("add", "org/later")
    cakefs.run("gc")
    assert cakefs.run("verify").returncode == 0
    assert [m["name"] for m in cakefs.json("ls")] == ["org/later", "org/name"]


def test_a_catalog_in_use_is_not_replaced(cakefs: Cakefs) -> None:
    with Store.open(cakefs.store) as store:
        lease = store.lease()
        shutil.copyfile(cakefs.store / "catalog/data.mdb", cakefs.store / "good")
        garbage(cakefs.store / "catalog/data.mdb")
        refused = apart(cakefs, "verify", "--repair")
        shutil.copyfile(cakefs.store / "good", cakefs.store / "catalog/data.mdb")
        lease.close()
    assert refused.returncode == UserError.exit_code
    assert "a mount uses it" in refused.stderr and "cakefs umount" in refused.stderr


def test_a_copy_that_cannot_be_made_fails_nothing(cakefs: Cakefs) -> None:
    shutil.rmtree(cakefs.store / "backup")
    (cakefs.store / "backup").write_bytes(b"in the way")
    cakefs.run("rm", "org/name")
    (cakefs.store / "backup").unlink()
    cakefs.run("gc")
    assert (cakefs.store / "backup/data.mdb").exists()


def test_who_only_looks_makes_no_copy(cakefs: Cakefs) -> None:
    (cakefs.store / "backup/data.mdb").unlink()
    cakefs.run("ls")
    assert not (cakefs.store / "backup/data.mdb").exists()
