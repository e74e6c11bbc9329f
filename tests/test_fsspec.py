"""`cakefs://` paths in the real fsspec, over a real hub."""

import errno
import os
import pickle
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import cakefs
from cakefs.cli.main import main
from tests.hub import Hub
from tests.models import CONFIG, llama, sharded, single

fsspec = pytest.importorskip("fsspec")

MODEL = llama(2)
WEIGHTS = single(MODEL)
ROOT = Path(__file__).parent.parent


@pytest.fixture
def environment(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    (tmp_path / "config.toml").write_text("workers = 1\nread_timeout_s = 5.0\n")
    environment = {
        "CAKEFS_CONFIG": str(tmp_path / "config.toml"),
        "CAKEFS_STORE": str(tmp_path / "store"),
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    yield environment
    cakefs.close()


@pytest.fixture
def fs(environment: dict[str, str], hub: Hub) -> Any:
    from cakefs.api.filesystem import CakeFileSystem

    hub.add_repo("org/name", sharded(MODEL, 2) | {"config.json": CONFIG, "sub/x.txt": b"one\ntwo\n"})
    hub.add_repo("org/other", {"config.json": CONFIG})
    assert main(["add", "-q", "org/name"]) == 0
    return CakeFileSystem(skip_instance_cache=True)


FOUND_BY_NAME = """
import sys, fsspec
with fsspec.open("cakefs://org/name/config.json") as file:
    print(file.read())
with fsspec.open("cakefs://org/name/config.json", "r") as file:
    print(repr(file.read()))
print(fsspec.filesystem("cakefs").ls("org", detail=False), fsspec.get_filesystem_class("cakefs").__module__)
"""


def test_fsspec_finds_it_by_its_name(environment: dict[str, str], hub: Hub, tmp_path: Path) -> None:
    """By the entry point of pyproject.toml, wherever cakefs is installed; here it need not be."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    metadata = tmp_path / "site/cakefs-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: cakefs\nVersion: 0\n")
    lines = [f"{name} = {value}" for name, value in project["entry-points"]["fsspec.specs"].items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[fsspec.specs]", *lines, ""]))
    hub.add_repo("org/name", {"config.json": CONFIG})
    done = subprocess.run(
        [sys.executable, "-c", FOUND_BY_NAME],
        env=os.environ | environment | {"PYTHONPATH": f"{metadata.parent}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stderr == ""
    assert done.stdout == f"{CONFIG!r}\n{CONFIG.decode()!r}\n['org/name'] cakefs.api.filesystem\n"


def test_listings_are_those_of_the_mount(fs: Any) -> None:
    assert fs.ls("", detail=False) == ["org"] and fs.ls("cakefs://org/", detail=False) == ["org/name"]
    below = {entry["name"]: (entry["type"], entry["size"]) for entry in fs.ls("org/name")}
    assert below == {
        "org/name/config.json": ("file", len(CONFIG)),
        "org/name/model.safetensors": ("file", len(WEIGHTS)),
        "org/name/sub": ("directory", 0),
    }
    assert fs.ls("org/name/config.json", detail=False) == ["org/name/config.json"]
    assert fs.find("org") == ["org/name/config.json", "org/name/model.safetensors", "org/name/sub/x.txt"]
    assert fs.glob("org/*/*.json") == ["org/name/config.json"]
    assert fs.glob("cakefs://org/name/**/*.txt") == ["org/name/sub/x.txt"]
    shards = fs.ls(".cakefs/original/org/name", detail=False)
    assert [name.rpartition("/")[2] for name in shards][1:3] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert fs.isdir("org/name/sub") and fs.isfile("org/name/sub/x.txt") and not fs.exists("org/name/nix")
    assert fs.info("org")["type"] == "directory" and fs.size("org/name/sub/x.txt") == 8
    assert fs.modified("org/name/config.json").timestamp() > 1e9
    for missing in ("org/name/nix", "nix", "nix/"):
        with pytest.raises(FileNotFoundError):
            fs.ls(missing)


def test_bytes_whole_in_ranges_and_copied(fs: Any, tmp_path: Path) -> None:
    path = "org/name/model.safetensors"
    with fs.open(path) as file:
        assert file.seek(100) == 100 and file.read(50) == WEIGHTS[100:150] and file.size == len(WEIGHTS)
    with fs.open("org/name/sub/x.txt", "r") as text:
        assert text.readlines() == ["one\n", "two\n"]
    assert fs.cat_file(path) == WEIGHTS
    for start, end in ((5, 9), (-9, None), (None, 7), (-9, -3), (10, 4), (len(WEIGHTS) + 5, None)):
        assert fs.cat_file(path, start, end) == WEIGHTS[start:end]
    assert fs.cat_ranges([path, path], [0, 100], [8, 108]) == [WEIGHTS[:8], WEIGHTS[100:108]]
    assert fs.head("org/name/sub/x.txt", 3) == b"one" and fs.tail("org/name/sub/x.txt", 4) == b"two\n"
    fs.get("org/name", str(tmp_path / "out"), recursive=True)
    assert (tmp_path / "out/model.safetensors").read_bytes() == WEIGHTS
    assert (tmp_path / "out/sub/x.txt").read_bytes() == b"one\ntwo\n"


def test_a_key_of_its_own_for_each_content(fs: Any, hub: Hub) -> None:
    before = fs.ukey("org/name/config.json")
    assert before == fs.ukey("cakefs://org/name/config.json") != fs.ukey("org/name/sub/x.txt")
    hub.add_repo("org/name", {"config.json": CONFIG + b" "})
    assert main(["add", "-q", "org/name", "--update"]) == 0
    assert fs.ukey("org/name/config.json") != before
    assert pickle.loads(pickle.dumps(fs)).cat_file("org/name/config.json") == CONFIG + b" "


def test_a_look_at_an_unknown_model_adds_it_and_a_listing_does_not(fs: Any) -> None:
    assert fs.find("org") == ["org/name/config.json", "org/name/model.safetensors", "org/name/sub/x.txt"]
    assert not fs.exists("org/nobody/config.json")
    assert fs.cat_file("org/other/config.json") == CONFIG
    assert fs.ls("org", detail=False) == ["org/name", "org/other"]


@pytest.mark.parametrize(
    "write",
    [
        lambda fs: fs.open("org/name/x", "wb"),
        lambda fs: fs.open("org/name/x", "ab"),
        lambda fs: fs.pipe("org/name/x", b"1"),
        lambda fs: fs.rm("org/name", recursive=True),
        lambda fs: fs.rm_file("org/name/config.json"),
        lambda fs: fs.mkdir("org/new"),
        lambda fs: fs.makedirs("a/b/c"),
        lambda fs: fs.touch("org/name/config.json"),
        lambda fs: fs.copy("org/name/config.json", "org/name/x"),
        lambda fs: fs.mv("org/name/config.json", "org/name/x"),
        lambda fs: fs.put(__file__, "org/name/x"),
    ],
)
def test_every_write_is_refused(fs: Any, write: Any) -> None:
    with pytest.raises(OSError) as caught:
        write(fs)
    assert caught.value.errno == errno.EROFS
    assert fs.exists("org/name/config.json")
