"""The commands on a real hub and a real store, as processes where that matters; a real mount where there can be one.

A command run within this process (`Cli.call`) saves the half second in which a new one imports what it needs.
"""

import contextlib
import hashlib
import itertools
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cakefs.cli import background
from cakefs.cli.live import read_status
from cakefs.cli.main import main
from cakefs.fs.place import FUSE_DEVICE, cakefs_at, clear_dead
from cakefs.store.store import Store
from tests.disks import small_disk
from tests.hub import Hub
from tests.models import CONFIG, llama, sharded, single, tensor

ROOT = Path(__file__).parent.parent
needs_fuse = pytest.mark.skipif(not os.access(FUSE_DEVICE, os.R_OK | os.W_OK), reason=f"{FUSE_DEVICE} is not there")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts a small tmpfs")
TIMEOUT_S = 60


class Cli:
    """Runs `cakefs` in an environment of its own, from a directory that is not the source tree."""

    def __init__(
        self, place: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.place = place
        self._capsys = capsys
        self.store = place / "store"
        self.mountpoint = place / "models"
        self.log = place / "state" / "cakefs" / "log" / "mount.log"
        (place / "cakefs").mkdir()
        (place / "cakefs" / "config.toml").write_text("read_timeout_s = 2.0\nworkers = 1\n")
        environment = {
            "PYTHONPATH": str(ROOT),
            "CAKEFS_STORE": str(self.store),
            "HF_ENDPOINT": endpoint,
            "XDG_CONFIG_HOME": str(place),
            "XDG_STATE_HOME": str(place / "state"),
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    def start(self, *arguments: object, stderr: int = subprocess.PIPE) -> "subprocess.Popen[str]":
        command = [sys.executable, "-P", "-m", "cakefs", *map(str, arguments)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=self.place)

    def run(self, *arguments: object, code: int = 0) -> "subprocess.CompletedProcess[str]":
        process = self.start(*arguments)
        out, err = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == code, err
        assert "Traceback" not in err
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def call(self, *arguments: object, code: int = 0) -> "subprocess.CompletedProcess[str]":
        self._capsys.readouterr()
        found = main([str(a) for a in arguments])
        said = self._capsys.readouterr()
        assert found == code, said.err
        return subprocess.CompletedProcess([], found, said.out, said.err)

    def json(self, *arguments: object, code: int = 0) -> Any:
        return json.loads(self.call(*arguments, "--json", code=code).stdout)

    def process_json(self, *arguments: object, code: int = 0) -> Any:
        return json.loads(self.run(*arguments, "--json", code=code).stdout)

    def blob_files(self) -> list[Path]:
        return sorted(path for path in (self.store / "blobs").glob("*/*") if path.is_file())

    def end_mounts(self) -> None:
        for pid in processes_with(str(self.mountpoint)):
            os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not processes_with(str(self.mountpoint)))
        clear_dead(str(self.mountpoint))


def wait_until(condition: Callable[[], object], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.fixture
def cli(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    cli = Cli(tmp_path, hub.endpoint, monkeypatch, capsys)
    yield cli
    cli.end_mounts()


def processes_with(argument: str) -> list[int]:
    """Processes with that word on their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # ended meanwhile
            if argument.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def big(seed: int = 0) -> bytes:
    """8 MB in four tensors."""
    return single({f"t{i}": tensor(seed + i, 1000, 500) for i in range(4)})


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_model_from_add_to_gc(cli: Cli, hub: Hub) -> None:
    data = big()
    hub.add_repo("org/name", {"config.json": CONFIG, "model.safetensors": data})

    added = cli.process_json("add", "org/name")
    assert added["changed"] is True
    assert (added["size"], added["missing_bytes"]) == (len(CONFIG) + len(data), 8_000_000)
    assert added["fetched_bytes"] < 70_000

    (listed,) = cli.process_json("ls")
    assert (listed["name"], listed["complete"], listed["shared_bytes"]) == ("org/name", False, 0)
    assert listed["local_bytes"] == added["local_bytes"]

    pulled = cli.process_json("pull", "org/name")
    assert (pulled["fetched_bytes"], pulled["verified"]) == (8_000_000, True)
    (listed,) = cli.process_json("ls")
    assert (listed["complete"], listed["verified"], listed["local_bytes"]) == (True, True, listed["size"])

    hub.reset()
    assert cli.process_json("pull", "org/name")["fetched_bytes"] == 0
    assert cli.process_json("verify")["org/name"]["confirmed"] == 2
    assert hub.sent() == 0

    assert cli.process_json("gc", "--dry-run")["bytes"] == 0
    assert cli.run("rm", "org/name").stdout == "removed org/name\n"
    planned = cli.process_json("gc", "--dry-run")
    assert planned["bytes"] > 8_000_000
    assert len(cli.blob_files()) == 4
    assert cli.process_json("gc") == planned | {"dry_run": False}
    assert cli.blob_files() == []
    assert cli.process_json("ls") == []


def test_words_for_people(cli: Cli, hub: Hub) -> None:
    hub.add_repo("org/name", sharded(llama(2), 2) | {"config.json": CONFIG})
    commit = hub.api.repos["org/name"].branches["main"]
    added = cli.call("add", "org/name").stdout
    assert added.startswith(f"added org/name at {commit[:12]}\n")
    assert "local" in added and "to fetch" in added
    assert cli.call("add", "org/name").stdout.startswith("unchanged org/name")
    assert cli.call("add", "org/name", "-q").stdout == "org/name\n"
    assert "org/name" in cli.call("ls").stdout.splitlines()[1]
    assert cli.call("--quiet", "ls").stdout == "org/name\n"
    shown = cli.call("show", "org/name").stdout
    assert commit in shown and "model.safetensors" in shown and "model-00001-of-00002.safetensors" in shown
    pulled = cli.call("pull", "org/name")
    assert pulled.stdout.startswith("2 files of org/name")
    assert pulled.stderr == ""
    assert cli.call("verify").stdout.startswith("good  org/name: ")
    assert cli.call("gc", "--dry-run").stdout == "would free 0 B\n"
    assert "1 model," in cli.call("status").stdout


def test_show_tells_files_sources_and_tensors(cli: Cli, hub: Hub) -> None:
    tensors = llama(2)
    hub.add_repo("org/name", sharded(tensors, 2) | {"config.json": CONFIG})
    cli.call("add", "org/name")
    shown = cli.json("show", "org/name", "--tensors")
    assert shown["revision"] == hub.api.repos["org/name"].branches["main"]
    views = {file["path"]: file["view"] for file in shown["files"]}
    assert views["model.safetensors"] == "model"
    assert views["model-00001-of-00002.safetensors"] == views["model.safetensors.index.json"] == "original"
    assert {s["path"] for s in shown["sources"] if s["sha256"]} == {p for p in views if "-of-" in p}
    assert {t["name"]: (t["dtype"], tuple(t["shape"]), t["size"]) for t in shown["tensors"]} == {
        name: ("F32", value.shape, value.nbytes) for name, value in tensors.items()
    }
    assert {t["digest"] for t in shown["tensors"]} == {""}

    cli.call("pull", "org/name")
    shown = cli.json("show", "org/name", "--tensors")
    assert all(t["digest"].startswith("xxh3:") and t["local_bytes"] == t["size"] for t in shown["tensors"])
    assert all(s["verified"] is True for s in shown["sources"] if s["sha256"])
    assert "tensors" not in cli.json("show", "org/name")


def test_shared_bytes_are_those_that_another_model_has(cli: Cli, hub: Hub) -> None:
    data = big()
    hub.add_repo("org/a", {"config.json": b"a", "model.safetensors": data})
    hub.add_repo("org/b", {"config.json": b"b", "model.safetensors": data})
    cli.call("add", "org/a")
    cli.call("pull", "org/a")
    assert [m["shared_bytes"] for m in cli.json("ls")] == [0]
    added = cli.json("add", "org/b")
    assert (added["missing_bytes"], added["fetched_bytes"]) == (0, 1)
    assert [m["shared_bytes"] for m in cli.json("ls")] == [len(data), len(data)]
    cli.call("rm", "org/a")
    assert cli.json("gc")["bytes"] == 1
    assert [(m["local_bytes"], m["shared_bytes"]) for m in cli.json("ls")] == [(len(data) + 1, 0)]


def test_a_name_changes_what_it_stands_for_only_when_told(cli: Cli, hub: Hub) -> None:
    old = hub.add_repo("org/name", {"model.safetensors": single(llama(1))})
    cli.call("add", "org/name")
    new = hub.add_repo("org/name", {"model.safetensors": single(llama(1, seed=1))})
    refused = cli.call("add", "org/name", code=2)
    assert old[:12] in refused.stderr and new[:12] in refused.stderr
    assert "hint: --update" in refused.stderr
    assert cli.json("ls")[0]["revision"] == old
    assert cli.json("add", "org/name", "--as", "mine/new")["revision"] == new
    assert cli.json("add", f"org/name@{old}")["name"] == f"org/name@{old}"
    updated = cli.json("add", "org/name", "--update")
    assert (updated["changed"], updated["revision"]) == (True, new)
    assert cli.json("add", "org/name")["changed"] is False
    hub.add_repo("other/name", {"model.safetensors": single(llama(1, seed=2))})
    assert "org/name" in cli.call("add", "other/name", "--as", "org/name", code=2).stderr


def test_pull_of_some_files(cli: Cli, hub: Hub) -> None:
    hub.add_repo("org/name", {"model.safetensors": big(), "a.gguf": bytes(2_000_000), "b.gguf": bytes(3_000_000)})
    cli.call("add", "org/name")
    hub.reset()
    pulled = cli.json("pull", "org/name", "--files", "a.*", "--files", "*.json")
    assert (pulled["files"], pulled["fetched_bytes"]) == (1, 2_000_000)
    assert hub.sent("b.gguf") == 0
    assert "c.*" in cli.call("pull", "org/name", "--files", "c.*", code=2).stderr


@pytest.mark.parametrize(
    ("fault", "code"),
    [("404", 10), ("403", 11), ("503", 13), ("redirect-loop", 21)],
)
def test_refusal_of_the_hub_is_its_exit_code(fault: str, code: int, cli: Cli, hub: Hub) -> None:
    hub.add_repo("org/name", {"model.safetensors": single(llama(1))})
    hub.fault(fault, "org/name/*", times=None)
    failed = cli.run("add", "org/name", code=code)
    assert failed.stdout == ""
    lines = failed.stderr.splitlines()
    assert [line.startswith("error: ") for line in lines].count(True) == 1
    assert fault == "503" or [line for line in lines if not line.startswith(("error: ", "hint: "))] == []
    assert cli.json("ls") == []


def test_gated_model_names_the_next_step(cli: Cli, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_repo("org/name", {"model.safetensors": single(llama(1))}, gated=True)
    failed = cli.call("add", "org/name", code=11)
    assert "hint: " in failed.stderr and "HF_TOKEN" in failed.stderr
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    assert cli.json("add", "org/name")["changed"] is True


def test_broken_header_is_named(cli: Cli, hub: Hub) -> None:
    hub.add_repo("org/name", {"model.safetensors": b"\xff" * 100})
    failed = cli.call("add", "org/name", code=21)
    assert "model.safetensors" in failed.stderr.splitlines()[0]


def test_offline_pull_says_what_is_missing(cli: Cli, hub: Hub) -> None:
    hub.add_repo("org/name", {"model.safetensors": big()})
    cli.call("add", "org/name")
    hub.reset()
    assert "offline" in cli.call("pull", "org/name", "--offline", code=13).stderr
    assert hub.requests == []


def test_ctrl_c_during_pull_keeps_what_arrived(cli: Cli, hub: Hub) -> None:
    hub.add_repo("org/name", {"model.safetensors": big()})
    cli.call("add", "org/name")
    stall = hub.fault("stall", "*.safetensors", times=None, position=7_000_000)
    process = cli.start("pull", "org/name")
    wait_until(lambda: stall.hits)
    wait_until(lambda: cli.json("ls")[0]["local_bytes"] > 2_000_000)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    before = cli.json("ls")[0]["local_bytes"]
    hub.clear_faults()
    pulled = cli.json("pull", "org/name")
    assert pulled["local_bytes_before"] == before
    assert pulled["verified"] is True


@needs_root
def test_pull_into_a_full_store_is_exit_30_and_keeps_what_fits(cli: Cli, hub: Hub) -> None:
    hub.add_repo("org/name", {"model.safetensors": big()})
    cli.store.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "cakefs-test", cli.store], check=True)
    try:
        cli.call("add", "org/name")
        failed = cli.call("pull", "org/name", code=30)
        assert "hint: cakefs gc" in failed.stderr
        assert 0 < cli.json("ls")[0]["local_bytes"] < 8_000_000
    finally:
        subprocess.run(["umount", cli.store], check=True)


@needs_root
@pytest.mark.parametrize("way", [["evict", "org/a"], ["rm", "org/a"]])
def test_on_a_full_disk_room_can_be_made(cli: Cli, hub: Hub, way: list[str]) -> None:
    """Not a byte is left, and to forget something takes some in the catalog."""
    counter = itertools.count()
    for seed, name in enumerate(("org/a", "org/b")):
        tensors = {f"{i}": tensor(seed * 100 + i, 5000) for i in range(60)}
        hub.add_repo(name, {"model.safetensors": single(tensors)})
    with small_disk(cli.store, "6m"):
        for name in ("org/a", "org/b"):
            cli.call("add", name)
            cli.call("pull", name)
        fill(cli.store)
        while main(["add", "org/b", "--as", f"copy-{next(counter)}"]) == 0:
            pass  # The catalog had free pages.
        cli.call(*way)
        cli.call("gc")
        assert free(cli.store) > 1_000_000
        (cli.store / "filler").unlink()
        cli.call("pull", "org/b")
        assert cli.json("verify", "org/b")["org/b"]["bad"] == []
        assert (cli.store / "backup/data.mdb").exists(), "made again"


def fill(disk: Path) -> None:
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def free(disk: Path) -> int:
    return os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize


def test_transfer_that_was_corrupted_is_fetched_once_more(cli: Cli, hub: Hub) -> None:
    hub.add_repo("org/name", {"model.safetensors": big()})
    cli.call("add", "org/name")
    hub.fault("corrupt", "*.safetensors", position=5_000_000)
    pulled = cli.json("pull", "org/name")
    assert pulled["fetched_bytes"] > 8_000_000
    assert pulled["verified"] is True


def test_transfer_that_is_always_corrupted_is_exit_20(cli: Cli, hub: Hub) -> None:
    hub.add_repo("org/name", {"model.safetensors": big()})
    cli.call("add", "org/name")
    hub.fault("corrupt", "*.safetensors", times=None, position=5_000_000)
    assert "model.safetensors" in cli.call("pull", "org/name", code=20).stderr
    assert cli.json("ls")[0]["verified"] is False
    hub.clear_faults()
    assert cli.json("pull", "org/name")["verified"] is True


def test_pull_takes_up_what_a_killed_pull_left(cli: Cli, hub: Hub) -> None:
    hub.add_repo("org/name", {"model.safetensors": big()})
    cli.call("add", "org/name")
    hub.fault("stall", "*.safetensors", times=None, position=7_000_000)
    process = cli.start("pull", "org/name")
    wait_until(lambda: cli.json("ls")[0]["local_bytes"] > 6_000_000)
    process.kill()
    process.communicate()
    hub.clear_faults()
    pulled = cli.json("pull", "org/name")
    assert pulled["fetched_bytes"] <= 2_000_000
    assert pulled["verified"] is True


def test_verify_finds_and_repairs_damage_on_disk(cli: Cli, hub: Hub) -> None:
    hub.add_repo("org/name", {"model.safetensors": big()})
    hub.add_repo("org/other", {"model.safetensors": big(seed=50)})
    for name in ("org/name", "org/other"):
        cli.call("add", name)
        cli.call("pull", name)
    digest = cli.json("show", "org/name", "--tensors")["tensors"][2]["digest"].partition(":")[2]
    (blob,) = (path for path in cli.blob_files() if path.name == digest)
    damage(blob)
    found = cli.json("verify", code=20)
    assert (len(found["org/name"]["bad"]), found["org/other"]["bad"]) == (1, [])
    assert "t2" in found["org/name"]["bad"][0]
    words = cli.call("verify", "org/name", code=20)
    assert words.stdout.startswith("BAD   org/name")
    assert "hint: cakefs verify org/name --repair" in words.stderr
    hub.down()
    assert "hint: " in cli.call("verify", "--repair", code=13).stderr, "dropped, and not to be had"
    hub.up()
    cli.call("pull", "org/name")
    damage(blob)
    repaired = cli.json("verify", "--repair")
    assert len(repaired["org/name"]["bad"]) == 1
    assert {name: done["fetched_bytes"] for name, done in repaired.items()} == {"org/name": 2_000_000, "org/other": 0}
    assert all(model["verified"] for model in cli.json("ls"))
    assert cli.json("verify")["org/name"]["bad"] == []


@pytest.mark.parametrize("lose", [Path.unlink, lambda path: os.truncate(path, 1000)], ids=["gone", "cut"])
def test_verify_says_of_a_lost_blob_until_it_is_repaired(cli: Cli, hub: Hub, lose: Callable[[Path], object]) -> None:
    hub.add_repo("org/name", {"model.safetensors": big()})
    cli.call("add", "org/name")
    cli.call("pull", "org/name")
    lose(max(cli.blob_files(), key=lambda path: path.stat().st_size))
    for _ in range(2):
        assert "cakefs verify org/name --repair" in cli.call("verify", code=20).stderr
    assert cli.json("verify", "--repair")["org/name"]["fetched_bytes"] == 2_000_000
    assert cli.json("ls")[0]["verified"]


def test_verify_counts_no_hash_of_a_directory_as_published(cli: Cli) -> None:
    (cli.place / "mine").mkdir()
    (cli.place / "mine" / "model.safetensors").write_bytes(big())
    cli.call("add", cli.place / "mine")
    assert cli.json("verify")["mine"]["confirmed"] == 0
    assert "no published hash to confirm" in cli.call("verify").stdout


def test_a_directory_that_is_no_store_is_refused_by_those_who_only_look(cli: Cli) -> None:
    cli.store.mkdir()
    (cli.store / "mine.txt").write_text("mine")
    for command in ("ls", "status", "verify", "add x/y"):
        said = cli.call(*command.split(), code=2).stderr
        assert f"{cli.store} is not empty and not a cakefs store" in said
    found = {check["name"]: check for check in cli.json("doctor", code=1)}["store"]
    assert found["ok"] is False and "not a cakefs store" in found["detail"] and "chmod" not in found["fix"]


def test_a_token_file_that_cannot_be_read_is_named(
    cli: Cli, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(token))
    token.write_bytes(b"\xff\xfeA")
    assert f"error: cannot read the token file {token}: it is no text" in cli.call("add", "org/x", code=2).stderr
    token.unlink()
    token.mkdir()
    assert f"cannot read the token file {token}: Is a directory" in cli.call("add", "org/x", code=2).stderr
    assert {check["name"]: check["ok"] for check in cli.json("doctor", code=1)}["token"] is False


def test_status_tells_the_limit(cli: Cli) -> None:
    with Store.open(cli.store) as store:
        store.catalog.numbers.set_limit(50_000_000)
    assert cli.json("status")["store"]["limit"] == 50_000_000
    assert f"store  {cli.store}; limit 50.0 MB" in cli.call("status").stdout


def test_quiet_means_errors_only(cli: Cli, hub: Hub) -> None:
    hub.add_repo("org/name", {"model.safetensors": big()})
    cli.call("add", "org/name")
    hub.fault("short", "org/name/model.safetensors", after=5000)
    assert cli.run("-q", "pull", "org/name").stderr == ""


def test_a_file_that_a_repair_leaves_wrong_is_fetched_whole(cli: Cli, hub: Hub) -> None:
    """What comes for one tensor is wrong, too: so all of the file is dropped, also what was good."""
    hub.add_repo("org/name", {"model.safetensors": big()})
    cli.call("add", "org/name")
    cli.call("pull", "org/name")
    damage(max(cli.blob_files(), key=lambda path: path.stat().st_size))
    hub.fault("corrupt", "org/name/model.safetensors", after=5000)
    cli.call("verify", "--repair")
    assert cli.json("ls")[0]["verified"]


def test_damaged_header_of_shards_is_mended_by_adding_again(cli: Cli, hub: Hub) -> None:
    tensors = {f"layer.{i}.{'x' * 100}": tensor(i, 4) for i in range(50)}
    hub.add_repo("org/name", sharded(tensors, 2))
    cli.call("add", "org/name")
    for blob in cli.blob_files():
        damage(blob)
    assert "header of model.safetensors" in cli.json("verify", code=20)["org/name"]["lost"][0]
    repaired = cli.call("verify", "--repair", code=20)
    assert "hint: cakefs add org/name" in repaired.stderr
    cli.call("add", "org/name")
    assert cli.json("verify")["org/name"]["lost"] == []


def damage(blob: Path) -> None:
    blob.chmod(0o600)
    with blob.open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)
        file.seek(1000)
        file.write(bytes([byte[0] ^ 1]))
    blob.chmod(0o444)


def test_pull_shows_a_bar_on_a_terminal_and_data_on_stdout(cli: Cli, hub: Hub) -> None:
    hub.add_repo("org/name", {"model.safetensors": big()})
    cli.call("add", "org/name")
    terminal, other = pty.openpty()
    process = cli.start("pull", "org/name", "--json", stderr=other)
    os.close(other)
    drawn = b""
    with contextlib.suppress(OSError):  # EIO once nobody has the other end
        while piece := os.read(terminal, 65536):
            drawn += piece
    os.close(terminal)
    out, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0
    assert json.loads(out)["verified"] is True
    assert b"org/name" in drawn and b"8.0/8.0 MB" in drawn


@needs_fuse
def test_mount_answers_when_it_returns_and_umount_leaves_nothing(cli: Cli, hub: Hub) -> None:
    data = big()
    hub.add_repo("org/name", {"model.safetensors": data})
    cli.call("add", "org/name")
    assert cli.run("mount", cli.mountpoint).stdout == f"mounted {cli.mountpoint}\n"
    assert cakefs_at(str(cli.mountpoint))
    assert sha256((cli.mountpoint / "org/name/model.safetensors").read_bytes()) == sha256(data)

    hub.add_repo("org/later", {"config.json": CONFIG, "model.safetensors": big(seed=9)})
    cli.call("add", "org/later")
    wait_until(lambda: (cli.mountpoint / "org/later/config.json").exists())

    (mount,) = (m for m in cli.json("status")["mounts"] if m["mountpoint"] == str(cli.mountpoint))
    assert mount["answers"] is True
    assert mount["bytes_served"] >= len(data)
    assert os.readlink(f"/proc/{mount['pid']}/cwd") == "/"
    assert os.getsid(mount["pid"]) == mount["pid"]
    assert f"mount  {cli.mountpoint}" in cli.run("status").stdout

    assert cli.run("umount", cli.mountpoint).stdout == f"unmounted {cli.mountpoint}\n"
    assert not cakefs_at(str(cli.mountpoint))
    assert not processes_with(str(cli.mountpoint))
    assert "serving" in cli.log.read_text()
    assert "no cakefs" in cli.run("umount", cli.mountpoint, code=2).stderr


@needs_fuse
def test_second_mount_at_a_place_is_refused_and_the_first_unharmed(cli: Cli) -> None:
    cli.run("mount", cli.mountpoint)
    before = read_status(str(cli.mountpoint))
    refused = cli.run("mount", cli.mountpoint, code=2)
    assert "already mounted" in refused.stderr
    assert refused.stdout == ""
    after = read_status(str(cli.mountpoint))
    assert isinstance(before, dict) and isinstance(after, dict)
    assert after["pid"] == before["pid"]


@needs_fuse
def test_dead_mount_is_cleared_by_the_next(cli: Cli) -> None:
    cli.run("mount", cli.mountpoint)
    status = read_status(str(cli.mountpoint))
    assert isinstance(status, dict)
    os.kill(status["pid"], signal.SIGKILL)
    wait_until(lambda: isinstance(read_status(str(cli.mountpoint)), str))
    assert any(m["answers"] is False for m in cli.json("status")["mounts"])
    cli.run("mount", cli.mountpoint)
    assert (cli.mountpoint / ".cakefs").is_dir()


@needs_fuse
def test_hung_mount_does_not_hang_status(cli: Cli) -> None:
    cli.run("mount", cli.mountpoint)
    status = read_status(str(cli.mountpoint))
    assert isinstance(status, dict)
    os.kill(status["pid"], signal.SIGSTOP)
    try:
        (mount,) = (m for m in cli.json("status")["mounts"] if m["mountpoint"] == str(cli.mountpoint))
        assert "does not answer" in mount["trouble"]
    finally:
        os.kill(status["pid"], signal.SIGCONT)


@needs_fuse
def test_mount_that_cannot_be_leaves_nothing_and_says_why(cli: Cli) -> None:
    cli.mountpoint.mkdir()
    (cli.mountpoint / "file").touch()
    failed = cli.run("mount", cli.mountpoint, code=2)
    assert failed.stderr.startswith(f"error: {cli.mountpoint} is not empty\nhint: ")
    cli.store.mkdir(exist_ok=True)
    (cli.store / "format").write_text("cakefs-store 99\n")
    other = cli.place / "other"
    assert "99" in cli.run("mount", other, code=2).stderr
    assert not cakefs_at(str(other))


@needs_fuse
def test_mount_that_is_not_ready_in_time_is_ended(cli: Cli) -> None:
    failure = background.start(cli.mountpoint, [], timeout_s=0)
    assert failure.exit_code == 1
    assert "did not answer" in failure.message
    assert not cakefs_at(str(cli.mountpoint))
    assert not processes_with(str(cli.mountpoint))


@needs_fuse
def test_ctrl_c_ends_a_mount_in_the_foreground(cli: Cli) -> None:
    process = cli.start("mount", "--foreground", cli.mountpoint)
    assert process.stderr is not None
    for line in process.stderr:
        if "serving" in line:
            break
    assert (cli.mountpoint / ".cakefs").is_dir()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0
    assert "Traceback" not in err
    assert not cakefs_at(str(cli.mountpoint))


@needs_fuse
def test_watching_prints_one_json_per_second_until_ctrl_c(cli: Cli) -> None:
    process = cli.start("status", "--watch", "--json")
    assert process.stdout is not None
    lines = [json.loads(process.stdout.readline()) for _ in range(2)]
    assert [line["store"]["path"] for line in lines] == [str(cli.store)] * 2
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, err) == (0, "")


@needs_fuse
def test_a_directory_with_python_files_in_it_does_no_harm(cli: Cli, hub: Hub) -> None:
    for name in ("trio.py", "queue.py", "cakefs.py", "msgspec.py"):
        (cli.place / name).write_text("raise SystemExit('wrong module')\n")
    data = big()
    hub.add_repo("org/name", {"model.safetensors": data})
    cli.call("add", "org/name")
    cli.run("mount", cli.mountpoint)
    assert (cli.mountpoint / "org/name/model.safetensors").read_bytes() == data
