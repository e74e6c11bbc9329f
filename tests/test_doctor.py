"""`cakefs doctor`: every check on a machine that is as it should be, and on one that is not."""

import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from cakefs.cli.checks import machine
from cakefs.cli.checks.mounts import check_mounts, stat_errno
from cakefs.cli.checks.outside import check_hub, check_libraries, check_token
from cakefs.cli.checks.store import check_store
from cakefs.cli.doctor import Check, diagnose
from cakefs.config import Config
from cakefs.errors import UserError
from cakefs.fs import place

FREE_DISK = "21 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts without a server")
as_user = pytest.mark.skipif(os.geteuid() == 0, reason="root may open everything")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The parts of a healthy machine that are looked at, as files."""
    place = tmp_path / "machine"
    write(place / "dev/fuse", "")
    write(place / "proc/self/mountinfo", FREE_DISK)
    write(place / "proc/self/status", "CapEff:\t000001ffffffffff\n")
    write(place / "proc/sys/kernel/osrelease", "6.12.3-amd64\n")
    write(place / "boot/config-6.12.3-amd64", "CONFIG_FUSE_PASSTHROUGH=y\n")
    write(place / "etc/fuse.conf", "# comment\nuser_allow_other\n")
    return place


@pytest.fixture
def store(tmp_path: Path) -> Path:
    place = tmp_path / "store"
    place.mkdir(0o700)
    return place


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def named(checks: Iterator[Check], name: str) -> Check:
    return next(c for c in checks if c.name == name)


def test_healthy_machine_has_nothing_to_fix(root: Path, store: Path) -> None:
    config = Config(store=store, mountpoint=root / "models", offline=True)
    checks = list(diagnose(config, token=check_token(True), root=root))
    assert {"/dev/fuse", "kernel", "open files", "store", "libraries", "token", "hub"} <= {c.name for c in checks}
    assert all(c.fix for c in checks if c.ok is False)
    assert not [c for c in checks if c.ok is False and c.name not in ("fusermount3", "open files", "store space")]
    assert not any("\n" in c.detail + c.fix for c in checks)


def test_device_missing(root: Path) -> None:
    (root / "dev/fuse").unlink()
    check = machine.check_device(root)
    assert check.ok is False
    assert "modprobe fuse" in check.fix
    assert "--device /dev/fuse" in check.fix
    assert all(door in check.fix for door in ("cakefs export", "cakefs.open", "fsspec"))


def test_a_mount_that_cannot_be_names_the_doors_without_fuse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(place, "FUSE_DEVICE", str(tmp_path / "fuse"))
    with pytest.raises(UserError, match="fuse is missing") as caught:
        place.check_fuse()
    assert all(door in caught.value.hint for door in ("cakefs export", "cakefs.open", "fsspec"))


@as_root
def test_root_without_the_right_to_mount(root: Path) -> None:
    write(root / "proc/self/status", "CapEff:\t00000000a80425fb\n")  # docker's default
    check = machine.check_device(root)
    assert check.ok is False
    assert "SYS_ADMIN" in check.fix


@as_user
def test_device_of_another_user(root: Path) -> None:
    (root / "dev/fuse").chmod(0)
    assert machine.check_device(root).fix.startswith("sudo chmod 666 /dev/fuse; ")


def test_fusermount_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    check = machine.check_fusermount()
    assert check.ok is False
    assert "apt-get install fuse3" in check.fix


def test_fusermount_without_setuid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "fusermount3"
    write(program, "#!/bin/sh\necho fusermount3 version: 3.14.0\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "u+s" in machine.check_fusermount().fix
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert machine.check_fusermount() == Check("fusermount3", True, f"3.14.0 at {program}")


@pytest.mark.parametrize(
    ("release", "ok", "says"),
    [
        ("4.19.0-26-amd64", False, "too old"),
        ("5.15.0-1", True, "passthrough: no"),
        ("6.12.3-amd64", True, "passthrough: yes"),
        ("6.12.4-other", True, "passthrough: unknown"),
    ],
)
def test_kernel(root: Path, release: str, ok: bool, says: str) -> None:
    write(root / "proc/sys/kernel/osrelease", release)
    check = machine.check_kernel(root)
    assert check.ok is ok
    assert says in check.detail
    assert bool(check.fix) is not ok


def test_allow_other(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert machine.check_allow_other(root, True).ok is True
    write(root / "etc/fuse.conf", "#user_allow_other\n")
    assert machine.check_allow_other(root, True).ok is False
    assert machine.check_allow_other(root, False).ok is None
    assert "/etc/fuse.conf" in machine.check_allow_other(root, True).fix
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert machine.check_allow_other(root, True).ok is True


def test_open_files() -> None:
    assert machine.check_open_files(1024).ok is False
    assert "nofile" in machine.check_open_files(1024).fix
    assert machine.check_open_files(524288).ok is True
    assert machine.check_open_files(-1).detail == "any number for a process"


def list_mount(root: Path, point: Path, *, kind: str = "fuse.cakefs", readahead: str = "128") -> None:
    escaped = str(point).replace(" ", "\\040")
    write(root / "proc/self/mountinfo", f"{FREE_DISK}50 21 0:50 / {escaped} ro - {kind} cakefs ro\n")
    write(root / "sys/class/bdi/0:50/read_ahead_kb", f"{readahead}\n")


def test_readahead_of_a_live_mount(root: Path, tmp_path: Path) -> None:
    point = tmp_path / "my models"
    point.mkdir()
    list_mount(root, point)
    (check,) = check_mounts(root)
    assert check.name == f"mount {point}"
    assert check.ok is None
    assert check.fix == "echo 1024 | sudo tee /sys/class/bdi/0:50/read_ahead_kb"
    list_mount(root, point, readahead="4096")
    (check,) = check_mounts(root)
    assert check.ok is True
    assert "4096 KiB" in check.detail


def test_a_mount_whose_store_is_gone(root: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    list_mount(root, tmp_path, readahead="4096")
    (store / "format").touch()
    said = {"store": str(store), "mount": {"since": int(time.time())}}
    monkeypatch.setattr("cakefs.cli.checks.mounts.read_status", lambda point: said)
    (check,) = check_mounts(root)
    assert check.ok is True
    os.utime(store / "format", (time.time() + 2, time.time() + 2))
    (check,) = check_mounts(root)
    assert check.ok is False and "another is there now" in check.detail and "umount" in check.fix
    shutil.rmtree(store)
    (check,) = check_mounts(root)
    assert check.ok is False and f"its store {store} is gone" in check.detail and "umount" in check.fix


def test_mounts_of_others_are_not_asked(root: Path, tmp_path: Path) -> None:
    list_mount(root, tmp_path, kind="fuse.sshfs")
    assert list(check_mounts(root)) == []


@contextmanager
def mounted_without_server(point: Path) -> Iterator[Callable[[], None]]:
    """A mount whose requests nobody answers; gives what takes its connection away."""
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0"
    command = ["mount", "-i", "-n", "-t", "fuse.cakefs", "-o", options, "cakefs", str(point)]
    try:
        subprocess.run(command, pass_fds=[device], check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        os.close(device)
        pytest.skip(f"cannot mount here: {error.stderr.decode().strip()}")
    opened = [device]
    try:
        yield lambda: os.close(opened.pop())
    finally:
        for fd in opened:
            os.close(fd)
        subprocess.run(["umount", "-l", str(point)], check=True)


@as_root
@pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="no /dev/fuse")
def test_hung_and_dead_mount(root: Path, tmp_path: Path) -> None:
    point = tmp_path / "models"
    point.mkdir()
    list_mount(root, point)
    with mounted_without_server(point) as disconnect:
        (check,) = check_mounts(root, timeout_s=0.3)
        assert (check.ok, check.detail) == (False, "does not answer; its server hangs")
        disconnect()
        (check,) = check_mounts(root)
        assert (check.ok, check.detail) == (False, "dead: its server is gone")
        assert f"umount -l {point}" in check.fix


def test_stat_errno(tmp_path: Path) -> None:
    assert stat_errno(str(tmp_path)) == 0
    assert stat_errno(str(tmp_path / "absent")) == 2


def test_store_is_made_on_first_use(root: Path, tmp_path: Path) -> None:
    check = named(check_store(tmp_path / "a/b/store", root), "store")
    assert check.ok is True
    assert "first use" in check.detail
    assert not (tmp_path / "a").exists()


def test_a_directory_of_other_things_is_no_store(root: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    tmp_path.chmod(0o755)
    check = named(check_store(tmp_path, root), "store")
    assert check.ok is False
    assert "not a cakefs store" in check.detail and "chmod" not in check.fix


def test_store_open_to_others(root: Path, store: Path) -> None:
    assert named(check_store(store, root), "store").ok is True
    store.chmod(0o755)
    check = named(check_store(store, root), "store")
    assert check.ok is False
    assert check.fix == f"chmod 700 {store}"


@as_root
def test_store_of_another_user(root: Path, store: Path) -> None:
    os.chown(store, 1234, 1234)
    check = named(check_store(store, root), "store")
    assert check.ok is False
    assert "1234" in check.detail
    assert "chown" in check.fix


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("nowhere")])
def test_store_that_is_no_directory(root: Path, tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "file")
    (check,) = check_store(tmp_path / "file", root)
    assert check.ok is False
    assert "not a directory" in check.detail


def test_store_space(root: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cakefs.cli.checks.store.MIN_FREE", 1 << 70)
    check = named(check_store(store, root), "store space")
    assert check.ok is False
    assert "cakefs gc" in check.fix


@pytest.mark.parametrize(("kind", "ok"), [("ext4", True), ("nfs4", False), ("tmpfs", None)])
def test_store_file_system(root: Path, store: Path, kind: str, ok: bool | None) -> None:
    line = f"50 21 0:50 / {store.parent} rw - {kind} x rw\n"
    write(root / "proc/self/mountinfo", f"{FREE_DISK}{line}51 21 0:51 / {store.parent}x rw - xfs x rw\n")
    check = named(check_store(store, root), "store file system")
    assert check.ok is ok
    assert kind in check.detail
    assert bool(check.fix) is (ok is not True)


def test_store_of_a_newer_version(root: Path, store: Path) -> None:
    write(store / "format", "cakefs-store 99\n")
    check = named(check_store(store, root), "store format")
    assert check.ok is False
    assert check.fix


def test_library_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "importlib.metadata.requires", lambda _: ["rich>=13", "no-such-thing>=1", "x>1; extra == 'test'"]
    )
    check = check_libraries()
    assert check.ok is False
    assert check.detail == "no_such_thing: No module named 'no_such_thing'"
    assert check.fix.endswith("--force-reinstall no-such-thing")


def test_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.requires", lambda _: ["rich>=13", "trio"])
    check = check_libraries()
    assert check.ok is True
    assert "rich 1" in check.detail
    assert "Python 3." in check.detail


def test_token_is_a_remark() -> None:
    assert check_token(True) == Check("token", True, "present")
    assert check_token(False).ok is None
    assert "HF_TOKEN" in check_token(False).fix


@contextmanager
def hub_that_says(status: int) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize(("status", "ok"), [(200, True), (404, True), (401, True), (503, False)])
def test_hub_answers(no_proxy: None, status: int, ok: bool) -> None:
    with hub_that_says(status) as host:
        check = check_hub(f"http://user:secret@{host}/mirror", offline=False)
    assert check.ok is ok
    assert host in check.detail
    assert "secret" not in check.detail + check.fix


def test_hub_is_asked_through_the_proxy(no_proxy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_that_says(407) as proxy:
        monkeypatch.setenv("http_proxy", f"http://user:secret@{proxy}")
        check = check_hub("http://hub.invalid", offline=False)
    assert check.ok is False
    assert f"through the proxy {proxy}" in check.detail
    assert "secret" not in check.detail


def test_hub_out_of_reach(no_proxy: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        check = check_hub(endpoint, offline=False, timeout_s=0.2)
        assert check.ok is False
        assert "HF_HUB_OFFLINE=1" in check.fix
    refused = check_hub(endpoint, offline=False)
    assert refused.ok is False
    assert "refused" in refused.detail


def test_hub_is_not_asked_offline() -> None:
    assert check_hub("http://hub.invalid", offline=True) == Check("hub", None, "http://hub.invalid not asked: offline")
