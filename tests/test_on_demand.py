"""Models that nobody added, looked up in a real mount over a loopback hub."""

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cakefs.config import load_config
from tests import models
from tests.fs_child import eventually
from tests.hub import Hub
from tests.mounts import NOT_TO_BE_HAD, Cakefs, Place, needs_fuse, shared_place

pytestmark = [needs_fuse, pytest.mark.timeout(120)]

FILES = {**models.sharded(models.llama(), 2), "config.json": models.CONFIG, "1_Pooling/config.json": b"{}"}

# What cargo, cmake, conda, pyenv, ctags and vim were seen to look for in whatever is above them.
TOOLS = (
    "rust-toolchain",
    "cmake",
    "CMakeFiles",
    "PreLoad.cmake",
    "conda-meta",
    "pyenv",
    "ctags.d",
    "4913",
    "build.ninja",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with shared_place(tmp_path_factory.mktemp("on-demand"), NOT_TO_BE_HAD) as place:
        yield place


@pytest.fixture
def hub(place: Place) -> Hub:
    place.hub.reset()
    return place.hub


@pytest.fixture
def cakefs(place: Place) -> Cakefs:
    return place.cakefs


@pytest.fixture
def mounted(place: Place) -> Path:
    return place.path


@pytest.fixture
def own(tmp_path: Path) -> Iterator[tuple[Hub, Cakefs]]:
    """For a test that ends its mount or needs another one."""
    with Hub() as hub:
        hub.add_repo("acme/tiny", FILES)
        yield hub, Cakefs(tmp_path, hub.endpoint).provoking(NOT_TO_BE_HAD)


def asked(hub: Hub, repo: str = "") -> int:
    """Requests of the listing's kind: each add makes some."""
    return sum(r.stage == "api" and repo in r.path for r in hub.requests)


def test_opening_a_file_of_a_model_that_nobody_added_adds_it(hub: Hub, cakefs: Cakefs, mounted: Path) -> None:
    hub.add_repo("first/tiny", FILES)
    before = cakefs.status()["added_on_demand"]
    assert "first" not in os.listdir(mounted)
    assert (mounted / "first/tiny/config.json").read_bytes() == models.CONFIG
    assert os.listdir(mounted / "first") == ["tiny"] and "first" in os.listdir(mounted)
    assert os.listdir(mounted / "first/tiny") == ["1_Pooling", "config.json", "model.safetensors"]
    assert (mounted / "first/tiny/model.safetensors").read_bytes() == models.single(models.llama())
    assert "first/tiny" in [model["name"] for model in cakefs.json("ls")]
    status = cakefs.status()
    assert (status["added_on_demand"], status["being_added"]) == (before + 1, 0)


def test_a_revision_is_had_by_its_name(hub: Hub, mounted: Path) -> None:
    first = hub.add_repo("acme/old", FILES)
    hub.add_repo("acme/old", {"config.json": b'{"v": 2}'})
    hub.add_repo("acme/old", {"config.json": b'{"v": "side"}'}, branch="side")
    assert (mounted / f"acme/old@{first}/config.json").read_bytes() == models.CONFIG
    assert (mounted / "acme/old@side/config.json").read_bytes() == b'{"v": "side"}'
    assert (mounted / "acme/old/config.json").read_bytes() == b'{"v": 2}'
    assert not (mounted / "acme/old@never").exists()


def test_walking_listing_and_completing_start_nothing(hub: Hub, cakefs: Cakefs, mounted: Path) -> None:
    hub.add_repo("walk/tiny", FILES)
    cakefs.run("add", "walk/tiny")
    hub.reset()
    for command in (
        ["find", mounted, "-ls"],
        ["ls", "-laR", mounted],
        ["du", "-s", mounted],
        ["tar", "--exclude-caches", "--exclude-vcs-ignores", "-cf", "/dev/null", "-C", mounted, "walk"],
        ["bash", "-c", f"compgen -f {mounted}/wa; compgen -f {mounted}/walk/ti; echo {mounted}/*/*/c*"],
        *([["git", "-C", mounted / "walk", "status"]] if shutil.which("git") else []),
    ):
        subprocess.run([str(part) for part in command], capture_output=True, timeout=60)
    assert hub.requests == []


def test_what_desktops_editors_and_tools_look_for_never_leaves_the_machine(hub: Hub, mounted: Path) -> None:
    for name in (
        ".git",
        ".Trash-0",
        ".hidden",
        "autorun.inf",
        "AUTORUN.INF",
        "DCIM",
        "VIDEO_TS",
        "node_modules",
        *TOOLS,
    ):
        assert not (mounted / name).exists(), name
        assert not (mounted / name / "name").exists(), name
        assert not (mounted / "acme" / name).exists(), name
    for name in (".directory", ".name.swp", "HEAD", "config.json", "pyproject.toml", "x.safetensors", "a--b", "x y"):
        assert not (mounted / "acme" / name).exists(), name
    assert hub.requests == []


def test_an_unknown_namespace_is_an_empty_directory_that_no_listing_shows(hub: Hub, mounted: Path) -> None:
    assert os.listdir(mounted / "nobody") == [] and (mounted / "nobody").is_dir()
    assert "nobody" not in os.listdir(mounted)
    assert hub.requests == []


def test_no_is_remembered_for_a_while(hub: Hub, cakefs: Cakefs, mounted: Path) -> None:
    assert not (mounted / "acme/never").exists()
    first = asked(hub)
    assert first > 0
    for _ in range(20):
        assert not (mounted / "acme/never/config.json").exists()
    assert asked(hub) == first
    assert cakefs.log().count("acme/never is not added on demand: acme/never not found") == 1
    hub.add_repo("acme/never", FILES)
    cakefs.run("add", "acme/never")
    assert (mounted / "acme/never").is_dir()


def test_a_gated_model_is_refused_with_its_reason(hub: Hub, cakefs: Cakefs, mounted: Path) -> None:
    hub.add_repo("acme/gated", {"config.json": b'{"not": "here yet"}'}, gated=True)
    with pytest.raises(PermissionError):
        (mounted / "acme/gated/config.json").read_bytes()
    (said,) = [line for line in cakefs.log().splitlines() if "acme/gated is not added on demand: " in line]
    assert "(hint: " in said


def test_a_broken_model_is_an_error_and_not_an_absence(hub: Hub, cakefs: Cakefs, mounted: Path) -> None:
    hub.add_repo("acme/broken", {"model.safetensors": b"x" * 100, "config.json": b"{}"})
    with pytest.raises(OSError, match="Input/output error"):
        os.stat(mounted / "acme/broken")
    (said,) = [line for line in cakefs.log().splitlines() if "acme/broken is not added on demand: " in line]
    assert "model.safetensors" in said


@pytest.mark.parametrize("flag", ["--offline", "--no-on-demand"])
def test_it_can_be_switched_off(own: tuple[Hub, Cakefs], flag: str) -> None:
    hub, cakefs = own
    cakefs.run("add", "acme/tiny")
    hub.add_repo("acme/other", FILES)
    hub.reset()
    with cakefs.mounted(flag) as mountpoint:
        assert not (mountpoint / "acme/other").exists() and not (mountpoint / "nobody").exists()
        assert not (mountpoint / ".cakefs/hub/models--acme--other").exists()
        assert (mountpoint / "acme/tiny/config.json").read_bytes() == models.CONFIG
    assert hub.requests == []


def test_the_config_file_can_switch_it_off(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("on_demand = false\n")
    environment = {"CAKEFS_CONFIG": str(tmp_path / "config.toml")}
    assert not load_config({}, environment).on_demand
    assert load_config({"on_demand": True}, environment).on_demand and load_config({}, {}).on_demand


def test_an_unreachable_hub_is_an_absence_and_then_not(hub: Hub, cakefs: Cakefs, mounted: Path) -> None:
    hub.add_repo("acme/far", FILES)
    hub.down()
    assert not (mounted / "acme/far").exists()
    assert "acme/far is not added on demand: no answer from localhost" in cakefs.log()
    hub.up()
    assert eventually(lambda: (mounted / "acme/far").exists(), 60)


def test_a_removed_model_is_not_brought_back_by_those_who_still_look(hub: Hub, cakefs: Cakefs, mounted: Path) -> None:
    hub.add_repo("acme/gone", FILES)
    assert (mounted / "acme/gone/config.json").exists()
    cakefs.run("rm", "acme/gone")
    hub.reset()
    assert eventually(lambda: not (mounted / "acme/gone").exists())
    assert not (mounted / ".cakefs/hub/models--acme--gone").exists()
    assert hub.requests == []
    cakefs.run("add", "acme/gone")
    assert (mounted / "acme/gone").is_dir()


def test_while_one_is_added_all_that_is_known_is_served(hub: Hub, cakefs: Cakefs, mounted: Path) -> None:
    """Even in the same namespace, if it was looked at before; new names in there the kernel asks for one by one."""
    hub.add_repo("busy/tiny", FILES)
    hub.add_repo("busy/slow", FILES)
    os.stat(mounted / "busy/tiny/config.json")
    hub.fault("stall", "busy/slow", times=None, stage="api")
    looked: list[bool] = []
    looker = threading.Thread(target=lambda: looked.append((mounted / "busy/slow/config.json").exists()))
    looker.start()
    try:
        hub.wait_for("busy/slow")
        assert (mounted / "busy/tiny/config.json").read_bytes() == models.CONFIG
        assert (mounted / "busy/tiny/model.safetensors").read_bytes() == models.single(models.llama())
        assert os.listdir(mounted / "busy/tiny") == ["1_Pooling", "config.json", "model.safetensors"]
        assert os.listdir(mounted / "elsewhere") == [] and "busy" in os.listdir(mounted)
        assert cakefs.status()["being_added"] == 1
        assert not looked
    finally:
        hub.clear_faults()
        looker.join()
    assert looked == [True]


def test_many_who_look_at_once_add_it_once(hub: Hub, cakefs: Cakefs, mounted: Path) -> None:
    hub.add_repo("acme/one", FILES)
    hub.add_repo("acme/next", FILES)
    assert (mounted / "acme/one").exists()
    before, one = cakefs.status()["added_on_demand"], asked(hub, "acme/one")
    places = ["acme/next/config.json", ".cakefs/hub/models--acme--next/refs/main"] * 6
    found: list[bool] = []
    threads = [threading.Thread(target=lambda p=p: found.append((mounted / p).exists())) for p in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 12 and asked(hub, "acme/next") == one
    assert cakefs.status()["added_on_demand"] == before + 1


def test_unmounting_does_not_wait_for_what_is_being_added(own: tuple[Hub, Cakefs]) -> None:
    hub, cakefs = own
    hub.fault("stall", "acme/tiny", times=None, stage="api")
    with cakefs.mounted() as mountpoint:
        looker = threading.Thread(target=os.path.exists, args=(mountpoint / "acme/tiny",))
        looker.start()
        hub.wait_for("acme/tiny")
        os.kill(cakefs.status()["pid"], signal.SIGTERM)
        looker.join(30)
        assert not looker.is_alive()
        assert eventually(lambda: not os.path.ismount(mountpoint))
    assert cakefs.json("ls") == []
