"""The Hub's own client on `.cakefs/hub`: online, offline and with the Hub unreachable it finds what it asks for there.

Two clients: the newest, and the last one before 1.0, which transformers 4 needs and which writes more. Each runs in a
process of its own, as it reads its environment when it is imported. What it transfers is the test hub's word: of the
answers to the client none may carry a byte of a file.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests import models
from tests.hub import Hub
from tests.mounts import NOT_TO_BE_HAD, Cakefs, needs_fuse, shared_place

pytestmark = [needs_fuse, pytest.mark.timeout(120)]

FILES: dict[str, bytes | Path] = {
    **models.sharded(models.llama(), 2),
    "config.json": models.CONFIG,
    "README.md": b"# tiny",
    "pytorch_model.bin": b"pickle" * 1000,
    "1_Pooling/config.json": b"{}",
}

# Each line of the argument is evaluated; the result is a value or the name of an exception. Where the client would
# sleep before it asks again, the seconds are counted instead.
CLIENT = """
import json, sys, time, warnings
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, scan_cache_dir, snapshot_download, try_to_load_from_cache

slept = []
time.sleep = slept.append
def waited():
    return [sum(slept), slept.clear()][0]
def value(line):
    try:
        return eval(line)
    except Exception as error:
        return type(error).__name__.removeprefix("Remote")  # the old one tells less
print(json.dumps([value(line) for line in json.loads(sys.argv[1])], default=repr))
"""


# Where each is, if not beside cakefs; `scripts/setup --dev` puts it there.
CLIENTS = {"newest": None, "0.36": Path(sys.prefix) / "transformers-4"}
# What the old one would write although it is there. It says so, and goes on.
IGNORED = {"newest": "(?!)", "0.36": "Ignored error while writing commit hash|Could not cache non-existence of file"}


class Viewed(NamedTuple):
    """A place as the programs see it that import one of the clients."""

    hub: Hub
    cakefs: Cakefs
    path: Path
    which: str

    def client(self, *lines: str, clean: bool = True, offline: bool = False) -> list[Any]:
        """What the client says to each line; `clean`: it may not complain, and the newest not even try to write."""
        environment = {"HF_HUB_OFFLINE": "1"} if offline else {}
        cache = {"HF_ENDPOINT": self.hub.endpoint, "HF_HUB_CACHE": str(self.path / ".cakefs/hub")}
        if packages := CLIENTS[self.which]:
            environment["PYTHONPATH"] = str(packages)
        command = [sys.executable, "-c", CLIENT, json.dumps(lines)]
        done = subprocess.run(
            command, env=os.environ | cache | environment, capture_output=True, text=True, timeout=90, check=False
        )
        assert done.returncode == 0, done.stderr
        complaints = [line for line in done.stderr.splitlines() if not re.match(IGNORED[self.which], line)]
        assert not (clean and complaints), done.stderr
        found: list[Any] = json.loads(done.stdout)
        return found

    def snapshot(self, repo: str, commit: str) -> Path:
        return self.path / f".cakefs/hub/models--{repo.replace('/', '--')}/snapshots/{commit}"


@pytest.fixture(scope="module", params=CLIENTS)
def which(request: pytest.FixtureRequest) -> str:
    packages = CLIENTS[request.param]
    if packages is not None and not packages.is_dir():
        pytest.skip(f"that client is not in {packages}: run scripts/setup --dev")
    return str(request.param)


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory, which: str) -> Iterator[Viewed]:
    with shared_place(tmp_path_factory.mktemp("hubview"), NOT_TO_BE_HAD) as place:
        yield Viewed(*place, which)


@pytest.fixture
def place(mounted: Viewed) -> Iterator[Viewed]:
    mounted.hub.reset()
    yield mounted
    mounted.hub.up()


def added(place: Viewed, repo: str, files: dict[str, bytes | Path] = FILES) -> str:
    commit = place.hub.add_repo(repo, files)
    place.cakefs.run("add", repo)
    place.hub.reset()
    return commit


def bodies(hub: Hub) -> list[str]:
    """Files of which anything was asked for; not HEAD, not lists."""
    return [r.path for r in hub.requests if r.method == "GET" and r.stage != "api"]


@pytest.mark.parametrize("mode", ["online", "offline", "unreachable"])
def test_the_hubs_client_finds_an_added_model_without_a_download(place: Viewed, mode: str) -> None:
    repo = f"acme/{mode}"
    commit = added(place, repo)
    if mode == "unreachable":
        place.hub.down()
    asks_anew = mode == "unreachable" and place.which == "0.36"
    *found, waited = place.client(
        f"hf_hub_download({repo!r}, 'config.json')",
        f"hf_hub_download({repo!r}, 'config.json', subfolder='1_Pooling')",
        "waited()",
        f"hf_hub_download({repo!r}, 'model-00001-of-00002.safetensors', revision={commit!r})",
        f"snapshot_download({repo!r})",
        f"snapshot_download({repo!r}, revision={commit!r})",
        f"snapshot_download({repo!r}, allow_patterns=['*.safetensors'])",
        f"snapshot_download({repo!r}, local_files_only=True)",
        f"try_to_load_from_cache({repo!r}, 'config.json')",
        f"try_to_load_from_cache({repo!r}, 'adapter_config.json') is _CACHED_NO_EXIST",
        "waited()",
        clean=not asks_anew,
        offline=mode == "offline",
    )
    there = place.snapshot(repo, commit)
    files = [there / name for name in ("config.json", "1_Pooling/config.json", "model-00001-of-00002.safetensors")]
    # The old client asks the Hub for each file by its branch, and anew for 23 s, before it looks into its cache.
    assert found.pop(2) == (46 if asks_anew else 0)
    assert found == [*map(str, files), *[str(there)] * 4, str(files[0]), True]
    assert waited == 0
    assert bodies(place.hub) == []
    if mode != "online":
        assert place.hub.requests == []


def test_an_absent_file_is_known_to_be_absent_by_its_commit_and_of_it_the_hub_is_asked_first(place: Viewed) -> None:
    """`hf_hub_download` never looks at what is known to be absent; what transformers asks first does."""
    commit = added(place, "acme/absent")
    asked, known = (
        f"hf_hub_download('acme/absent', 'processor_config.json', revision={commit!r})",
        f"try_to_load_from_cache('acme/absent', 'processor_config.json', revision={commit!r}) is _CACHED_NO_EXIST",
    )
    assert place.client(asked, known, "waited()") == ["EntryNotFoundError", True, 0]
    place.hub.down()
    assert place.client(known, "waited()") == [True, 0]
    assert place.client(asked, clean=False) == ["LocalEntryNotFoundError"]


def test_a_snapshot_is_what_was_published(place: Viewed) -> None:
    there = place.snapshot("acme/bytes", added(place, "acme/bytes"))
    found = {str(p.relative_to(there)): p.read_bytes() for p in there.rglob("*") if p.is_file()}
    assert found == FILES
    assert not any(p.is_symlink() for p in there.rglob("*"))
    assert os.listxattr(place.path / ".cakefs/hub") == ["user.cakefs.view"]
    assert (there / "config.json").stat().st_ino == (place.path / "acme/bytes/config.json").stat().st_ino


def test_weights_are_looked_up_by_pattern_as_vllm_does(place: Viewed) -> None:
    """Patterns tried in turn on the list of the repository, then a glob in the folder that the client names."""
    commit = added(place, "acme/weights")
    found = place.client(
        "sorted(__import__('huggingface_hub').list_repo_files('acme/weights'))",
        "snapshot_download('acme/weights', allow_patterns=['*.safetensors'], local_files_only=False)",
        "hf_hub_download('acme/weights', 'model.safetensors.index.json')",
        "hf_hub_download('acme/weights', 'model.safetensors')",
    )
    assert found[0] == sorted(FILES)
    there = Path(found[1])
    assert there == place.snapshot("acme/weights", commit)
    globbed = sorted(p.name for p in there.glob("*.safetensors"))
    index = json.loads(Path(found[2]).read_bytes())
    assert globbed == sorted(set(index["weight_map"].values()))
    assert found[3] == "EntryNotFoundError"
    assert bodies(place.hub) == []


def next_second() -> None:
    """What a branch stands for is what was added last, by the second."""
    time.sleep(1.01 - time.time() % 1)


def test_a_branch_that_moved_is_followed_without_a_write(place: Viewed) -> None:
    first = added(place, "acme/moved")
    next_second()
    second = place.hub.add_repo("acme/moved", {**FILES, "config.json": b'{"v": 2}'})
    (by_file,) = place.client("hf_hub_download('acme/moved', 'config.json')")
    assert by_file == str(place.snapshot("acme/moved", second) / "config.json")
    assert Path(by_file).read_bytes() == b'{"v": 2}'
    next_second()
    third = place.hub.add_repo("acme/moved", {**FILES, "config.json": b'{"v": 3}'})
    absent, whole = place.client(
        "hf_hub_download('acme/moved', 'adapter_config.json')",  # fatal with a stale ref
        "snapshot_download('acme/moved')",
    )
    assert (absent, whole) == ("EntryNotFoundError", str(place.snapshot("acme/moved", third)))
    place.hub.down()
    assert place.client("snapshot_download('acme/moved')", offline=True) == [whole]
    # The path that the user has stays what it was.
    assert (place.path / "acme/moved/config.json").read_bytes() == models.CONFIG
    assert os.listdir(place.path / "acme/moved") == os.listdir(place.path / f"acme/moved@{third}")
    assert sorted(os.listdir(place.snapshot("acme/moved", first).parent)) == sorted([first, second, third])


def test_another_branch_or_tag_is_had_by_its_name(place: Viewed) -> None:
    added(place, "acme/branches")
    side = place.hub.add_repo("acme/branches", {**FILES, "config.json": b'{"v": "side"}'}, branch="side")
    found = place.client(
        "hf_hub_download('acme/branches', 'adapter_config.json', revision='side')",
        "hf_hub_download('acme/branches', 'config.json', revision='side')",
        "snapshot_download('acme/branches', revision='side')",
    )
    there = place.snapshot("acme/branches", side)
    assert found == ["EntryNotFoundError", str(there / "config.json"), str(there)]
    assert (there.parent.parent / "refs/side").read_text() == side
    assert place.client("snapshot_download('acme/branches', revision='side')", offline=True) == [str(there)]


def test_a_model_that_nobody_added_is_found_by_its_name(place: Viewed) -> None:
    commit = place.hub.add_repo("acme/new", FILES)
    legacy = place.hub.add_repo("gpt0", FILES)
    found = place.client("snapshot_download('acme/new')", "hf_hub_download('gpt0', 'config.json')")
    assert found == [str(place.snapshot("acme/new", commit)), str(place.snapshot("gpt0", legacy) / "config.json")]
    assert (place.path / "acme/new/config.json").read_bytes() == models.CONFIG


def test_a_model_that_does_not_exist_is_the_hubs_own_error(place: Viewed) -> None:
    assert (
        place.client("snapshot_download('acme/never')", "hf_hub_download('acme/never', 'config.json')")
        == ["RepositoryNotFoundError"] * 2
    )


def test_the_cache_can_be_scanned_and_lists_what_is_known(place: Viewed) -> None:
    commit = added(place, "acme/scanned")
    scan = "[(r.repo_id, r.nb_files, [(v.commit_hash, *v.refs) for v in r.revisions]) for r in scan_cache_dir().repos]"
    repos, warned = place.client(scan, "[str(w) for w in scan_cache_dir().warnings]")
    assert ["acme/scanned", len(FILES), [[commit, "main"]]] in repos
    tag = place.path / ".cakefs/hub/CACHEDIR.TAG"  # as a cache of the newest has it, too
    assert warned == ([f"Repo path is not a directory: {tag}"] if place.which == "0.36" else [])


def test_without_on_demand_a_moved_branch_is_refused_and_a_commit_is_not(hub: Hub, tmp_path: Path, which: str) -> None:
    cakefs = Cakefs(tmp_path, hub.endpoint)
    with cakefs.mounted("--no-on-demand") as path:
        place = Viewed(hub, cakefs, path, which)
        commit = added(place, "acme/tiny")
        hub.add_repo("acme/tiny", {**FILES, "config.json": b"{}"})
        moved, pinned, offline = (
            *place.client("hf_hub_download('acme/tiny', 'config.json')", clean=False),
            *place.client(f"hf_hub_download('acme/tiny', 'config.json', revision={commit!r})"),
            *place.client("hf_hub_download('acme/tiny', 'config.json')", offline=True),
        )
    assert moved == "OSError"
    assert pinned == offline == str(place.snapshot("acme/tiny", commit) / "config.json")


def test_slices_and_plain_urls_are_not_shown_as_a_hubs(place: Viewed) -> None:
    added(place, "acme/whole", {"model.safetensors": models.single(models.llama()), "config.json": models.CONFIG})
    place.cakefs.run("slice", "acme/whole", "--layers", "0", "--as", "acme/slice")
    url = place.hub.plain("dir/model.safetensors", models.single(models.llama()))
    place.cakefs.run("add", url, "--as", "acme/url")
    shown = os.listdir(place.path / ".cakefs/hub")
    assert "models--acme--whole" in shown
    assert not {"models--acme--slice", "models--acme--url", "models--dir"} & set(shown)


def test_a_write_is_refused_as_everywhere(place: Viewed) -> None:
    commit = added(place, "acme/ro")
    there = place.snapshot("acme/ro", commit)
    for path in (
        there / "x",
        there.parent.parent / "refs/new.tmp",
        place.path / ".cakefs/hub/.locks/x",
        there / "config.json",
    ):
        with pytest.raises(OSError, match="Read-only file system"):
            path.write_bytes(b"")
