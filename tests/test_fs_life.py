"""How a mount begins and ends: places, signals, leftovers, other users."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from cakefs.errors import UserError
from cakefs.fs.limits import BACKGROUND, CONTROL
from cakefs.fs.place import Claim, Mount, cakefs_at, canonical, parse_mountinfo, umount
from cakefs.fs.systemd import Probe, Systemd
from tests import ordinary_user
from tests.fs_child import FakeMount, eventually, why_no_mount

needs_mount = pytest.mark.skipif(bool(why_no_mount()), reason=why_no_mount())
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[FakeMount]:
    made = FakeMount(tmp_path)
    made.model("org/m", {"config.json": {"text": "{}"}, "big": {"size": 1_000_000}})
    try:
        yield made
    finally:
        made.stop()


def test_mountinfo_is_parsed_with_its_escapes() -> None:
    text = (
        b"36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 shared:7 - ext3 /dev/root rw,errors=continue\n"
        b"42 27 0:39 / /home/j\\134k/\xc3\xa9 ro,nosuid,nodev,relatime - fuse.cakefs cakefs ro,user_id=0\n"
    )
    assert parse_mountinfo(text) == [
        Mount("98:0", "/mnt 2", "ext3"),
        Mount("0:39", os.fsdecode(b"/home/j\\k/\xc3\xa9"), "fuse.cakefs"),
    ]


def test_a_place_is_named_without_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert canonical(tmp_path / "link/../link") == str(tmp_path / "real")
    assert canonical("~") == os.path.realpath(os.path.expanduser("~"))


def test_a_claim_makes_the_directory_and_takes_it_back(tmp_path: Path) -> None:
    place = tmp_path / "a/b/c"
    claim = Claim(str(place))
    assert place.is_dir()
    claim.undo()
    assert os.listdir(tmp_path) == []
    place.mkdir(parents=True)
    Claim(str(place)).undo()
    assert place.is_dir(), "what was there before stays"


def test_two_claims_of_one_place_exclude_each_other(tmp_path: Path) -> None:
    first = Claim(str(tmp_path / "x"))
    with pytest.raises(UserError, match="another cakefs is just being mounted"):
        Claim(str(tmp_path / "x"))
    first.release()
    Claim(str(tmp_path / "x")).undo()
    assert (tmp_path / "x").is_dir()


def test_places_that_are_no_empty_directory_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("")
    with pytest.raises(UserError, match="full is not empty"):
        Claim(str(tmp_path / "full"))
    for place in ("file", "file/below"):
        with pytest.raises(UserError, match="Not a directory"):
            Claim(str(tmp_path / place))
    assert os.listdir(tmp_path / "full") == ["x"]


def test_unmounting_nothing_is_said_clearly(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"no cakefs is mounted at {tmp_path}"):
        umount(tmp_path)


@needs_mount
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_unmounts_and_ends_silently(mount: FakeMount, number: signal.Signals) -> None:
    mount.start()
    assert mount.end(number) == 0
    assert not mount.mounted() and mount.log() == ""
    assert os.listdir(mount.path) == []


@needs_mount
def test_a_signal_ends_also_a_mount_in_use(mount: FakeMount) -> None:
    """With open files, and with a reader that waits for bytes that do not come."""
    mount.start()
    mount.fault("big", "stall")
    with (mount.path / "org/m/config.json").open("rb"):
        reader = subprocess.Popen(["cat", mount.path / "org/m/big"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        assert eventually(lambda: mount.status()["mount"]["reads"] > 0)
        assert mount.end() == 0
        assert b"cat: " in reader.communicate(timeout=10)[1]
    assert not mount.mounted() and mount.log() == ""


@needs_mount
def test_umount_ends_the_server(mount: FakeMount) -> None:
    mount.start()
    umount(mount.path)
    assert not mount.mounted()
    assert mount.exit_code() == 0 and mount.log() == ""


@needs_mount
def test_umount_names_who_uses_the_mount(mount: FakeMount) -> None:
    mount.start()
    with (
        (mount.path / "org/m/config.json").open("rb"),
        pytest.raises(UserError, match=rf"a mount is in use by .*\(pid {os.getpid()}\)"),
    ):
        umount(mount.path)
    assert (mount.path / "org/m/config.json").read_text() == "{}"


@needs_mount
def test_a_second_mount_at_the_same_place_is_refused(mount: FakeMount, tmp_path: Path) -> None:
    mount.start()
    (tmp_path / "2").mkdir()
    second = FakeMount(tmp_path / "2")
    second.path = mount.path
    second.spawn()
    assert second.exit_code() == 2
    assert second.log() == (
        f"error: a cakefs is already mounted at {mount.path} (hint: `cakefs umount {mount.path}` first)\n"
    )
    assert (mount.path / "org/m/config.json").read_text() == "{}"


@needs_mount
def test_of_two_that_start_together_one_wins(mount: FakeMount, tmp_path: Path) -> None:
    (tmp_path / "2").mkdir()
    second = FakeMount(tmp_path / "2")
    second.path = mount.path
    both = [mount, second]
    try:
        for m in both:
            m.spawn()
        assert eventually(lambda: any(m.process and m.process.poll() is not None for m in both))
        codes = sorted(m.end() for m in both if m.process)
        assert codes == [0, 2] and not mount.mounted()
    finally:
        second.stop()


@needs_mount
def test_a_dead_mount_is_cleared_by_the_next_one(mount: FakeMount) -> None:
    mount.start()
    assert mount.end(signal.SIGKILL) == -signal.SIGKILL
    assert mount.mounted()
    with pytest.raises(OSError, match="Transport endpoint is not connected"):
        os.listdir(mount.path)
    mount.start()
    assert (mount.path / "org/m/config.json").read_text() == "{}"
    assert mount.end() == 0 and not mount.mounted(), "the dead one is not underneath"


@needs_mount
def test_a_dead_mount_can_be_unmounted(mount: FakeMount) -> None:
    mount.start()
    mount.end(signal.SIGKILL)
    umount(mount.path)
    assert not mount.mounted()


@needs_mount
def test_a_mount_that_cannot_be_leaves_no_directory(mount: FakeMount) -> None:
    mount.path = Path("/proc/self/nowhere")
    mount.spawn()
    assert mount.exit_code() == 2
    assert mount.log().startswith("error: cannot mount at /proc/")


@needs_mount
@needs_root
def test_the_reason_of_the_kernel_is_passed_on(mount: FakeMount) -> None:
    """Without the privilege to mount, and no fusermount3 to help: one line, and the directory is gone again."""
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("setpriv (util-linux) is absent")
    mount.prefix = (setpriv, "--bounding-set=-sys_admin", "--inh-caps=-sys_admin")
    mount.env["PATH"] = "/nonexistent"
    mount.spawn()
    assert mount.exit_code() == 2
    assert mount.log().startswith(f"error: cannot mount at {mount.path}: ") and mount.log().count("\n") == 1
    assert "ermi" in mount.log() or "fusermount3" in mount.log()
    assert not mount.path.exists()


@needs_mount
@needs_root
def test_readahead_is_raised_for_root(mount: FakeMount) -> None:
    mount.start()
    found = cakefs_at(canonical(mount.path))
    assert found is not None
    assert Path(f"/sys/class/bdi/{found.device}/read_ahead_kb").read_text() == "1024\n"
    (mount.path / "org/m/big").read_bytes()
    assert mount.status()["mount"]["reads"] <= 4, "requests of 1 MiB, not of 128 KiB"


@contextmanager
def control_files() -> Iterator[Path]:
    """Where the kernel lets the limits of FUSE connections be changed; systemd mounts it, containers often have not."""
    place = Path("/sys/fs/fuse/connections")
    absent = not os.path.ismount(place)
    if absent and subprocess.run(["mount", "-t", "fusectl", "none", place], check=False).returncode:
        pytest.skip("fusectl cannot be mounted")
    try:
        yield place
    finally:
        if absent:
            subprocess.run(["umount", place], check=True)


@needs_mount
@needs_root
def test_the_kernel_may_read_ahead_of_many_at_once(mount: FakeMount) -> None:
    """Else a few readers of one file that stalls make all others wait."""
    with control_files() as control:
        mount.start()
        found = cakefs_at(canonical(mount.path))
        assert found is not None
        assert (control / found.device.partition(":")[2] / "max_background").read_text() == f"{BACKGROUND}\n"


@needs_mount
@needs_root
def test_it_may_where_the_limits_are_not_to_be_seen(mount: FakeMount) -> None:
    """As in most containers."""
    if os.path.ismount(CONTROL):
        pytest.skip("they are to be seen here")
    mount.start()
    found = cakefs_at(canonical(mount.path))
    assert found is not None and not os.path.ismount(CONTROL)
    with control_files() as control:
        assert (control / found.device.partition(":")[2] / "max_background").read_text() == f"{BACKGROUND}\n"


@contextmanager
def notify_socket(name: str) -> Iterator[Callable[[], list[str]]]:
    """A socket as systemd has it; yields what gives the lines of the next message."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(name)
        sock.settimeout(10)
        yield lambda: sock.recv(1000).decode().split("\n")


@needs_mount
@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_is_told(tmp_path: Path, abstract: bool) -> None:
    name = f"cakefs-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    mount = FakeMount(tmp_path, env={"NOTIFY_SOCKET": "@" + name if abstract else name})
    with notify_socket("\0" + name if abstract else name) as said:
        try:
            mount.start()
            assert said() == ["READY=1"]
            (status,) = said()
            assert status.startswith(f"STATUS=serving {canonical(mount.path)}: 0 files are open")
            assert mount.end() == 0
            assert said() == ["STOPPING=1", "STATUS=ending; 0 files are open"]
            assert said()[0] == "STOPPING=1"
        finally:
            mount.stop()


@needs_mount
def test_the_watchdog_hears_of_a_mount_that_answers_and_of_no_other(tmp_path: Path) -> None:
    name = str(tmp_path / "notify")
    mount = FakeMount(tmp_path, env={"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "800000"})
    with notify_socket(name) as said:
        try:
            mount.start()
            heard = [said()]
            while heard.count(["WATCHDOG=1"]) < 3:
                heard.append(said())
            assert heard[0] == ["READY=1"] and all(len(lines) == 1 for lines in heard)
        finally:
            mount.stop()


@needs_mount
def test_a_watchdog_of_another_process_is_none_of_ours(tmp_path: Path) -> None:
    environ = {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "800000"}
    assert Systemd(environ).watchdog_s == Systemd({**environ, "WATCHDOG_PID": str(os.getpid())}).watchdog_s == 0.8
    assert Systemd({**environ, "WATCHDOG_PID": "1"}).watchdog_s == 0
    assert Systemd({"WATCHDOG_USEC": "800000"}).watchdog_s == 0


@needs_mount
def test_a_server_that_hangs_is_found_out(mount: FakeMount) -> None:
    """Stopped, it is as good as hung: the probe says so, unless everything is busy, and then works again."""
    mount.start()
    assert mount.process is not None
    busy = False
    probe = Probe(str(mount.path), lambda: busy)

    async def look() -> list[bool]:
        nonlocal busy
        found = [await probe(20)]
        os.kill(pid, signal.SIGSTOP)
        try:
            found.append(await probe(0.3))
            busy = True
            found.append(await probe(0.3))
        finally:
            os.kill(pid, signal.SIGCONT)
        busy = False
        return [*found, await probe(20), await probe(20)]

    pid = mount.process.pid
    assert trio.run(look) == [True, False, True, True, True]


@needs_mount
def test_those_who_read_may_finish_before_it_ends(tmp_path: Path) -> None:
    """They find the mount where it was, too."""
    mount = FakeMount(tmp_path, env={"FS_CHILD_GRACE_S": "60"})
    mount.model("org/m", {"big": {"size": 8 << 20}, "next": {"text": "read next"}})
    mount.fault("big", "trickle")
    try:
        mount.start()
        command = ["sh", "-c", 'cat "$0/org/m/big" | wc -c; cat "$0/org/m/next"', mount.path]
        reader = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert eventually(lambda: mount.status()["mount"]["reads"] > 0)
        assert mount.end() == 0
        assert reader.communicate(timeout=10)[0].split(None, 1) == [b"%d" % (8 << 20), b"read next"]
        assert not mount.mounted() and mount.log() == ""
    finally:
        mount.stop()


@needs_mount
def test_who_only_holds_a_file_is_not_waited_for(tmp_path: Path) -> None:
    mount = FakeMount(tmp_path, env={"FS_CHILD_GRACE_S": "600"})
    mount.model("org/m", {"file": {"text": "x"}})
    try:
        mount.start()
        with (mount.path / "org/m/file").open("rb") as file:
            holder = subprocess.Popen(["sleep", "60"], stdin=file)
        try:
            assert mount.end() == 0
        finally:
            holder.kill()
            holder.wait()
        assert not mount.mounted() and mount.log() == ""
    finally:
        mount.stop()


@needs_mount
def test_a_second_signal_waits_for_nobody(tmp_path: Path) -> None:
    name = str(tmp_path / "notify")
    mount = FakeMount(tmp_path, env={"FS_CHILD_GRACE_S": "600", "NOTIFY_SOCKET": name})
    mount.model("org/m", {"big": {"size": 1 << 20}})
    mount.fault("big", "stall")
    with notify_socket(name) as said:
        try:
            mount.start()
            reader = subprocess.Popen(["cat", mount.path / "org/m/big"], stderr=subprocess.DEVNULL)
            assert eventually(lambda: mount.status()["mount"]["waiting"] > 0)
            assert mount.process is not None
            mount.process.send_signal(signal.SIGTERM)
            while said()[0] != "STOPPING=1":
                pass
            assert mount.end() == 0
            assert reader.wait(10) != 0
            assert not mount.mounted() and mount.log() == ""
        finally:
            mount.stop()


@needs_mount
def test_a_killed_server_leaves_errors_and_no_hang(mount: FakeMount) -> None:
    mount.start()
    mount.fault("big", "stall")
    with (mount.path / "org/m/config.json").open("rb", buffering=0) as held:
        reader = subprocess.Popen(["cat", mount.path / "org/m/big"], stderr=subprocess.PIPE)
        assert eventually(lambda: mount.status()["mount"]["waiting"] > 0)
        mount.end(signal.SIGKILL)
        assert b"cat: " in reader.communicate(timeout=10)[1]
        with pytest.raises(OSError, match=r"not connected|Software caused connection abort"):
            os.fstatvfs(held.fileno())
    mount.fault("", "")
    mount.start()
    assert (mount.path / "org/m/config.json").read_text() == "{}", "works again by itself"


@needs_mount
@needs_root
def test_an_aborted_connection_ends_the_server_and_leaves_nothing(mount: FakeMount, tmp_path: Path) -> None:
    mount.start()
    found = cakefs_at(canonical(mount.path))
    assert found is not None
    control = tmp_path / "fusectl"
    control.mkdir()
    subprocess.run(["mount", "-t", "fusectl", "none", control], check=True)
    try:
        (control / found.device.split(":")[1] / "abort").write_text("1")
    finally:
        subprocess.run(["umount", control], check=True)
    assert mount.exit_code() == 0
    assert not mount.mounted() and mount.log() == ""


@needs_mount
@needs_root
@pytest.mark.parametrize("options", [[], ["allow_other"]])
def test_other_users_see_the_mount_only_when_allowed(options: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        mount = FakeMount(Path(name))
        mount.options = options
        mount.model("org/m", {"config.json": {"text": "{}"}})
        try:
            mount.start()
            command = [*ordinary_user.AS_HIM, "cat", mount.path / "org/m/config.json"]
            read = subprocess.run(command, capture_output=True, check=False)
            assert read.stdout == (b"{}" if options else b"")
        finally:
            mount.stop()


USE = """
import os, sys
path = sys.argv[1] + "/org/m/config.json"
found = os.stat(path)
assert open(path).read() == "{}" and (found.st_uid, found.st_gid) == (65534, 65534)
try:
    os.unlink(path)
except OSError as error:
    assert error.errno == 30
from cakefs.fs.place import umount
umount(sys.argv[1])
"""


@needs_mount
@needs_root
def test_an_ordinary_user_mounts_uses_and_unmounts() -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        os.chown(directory, ordinary_user.UID, ordinary_user.UID)
        mount = FakeMount(directory, prefix=ordinary_user.namespace(directory))
        mount.model("org/m", {"config.json": {"text": "{}"}})
        try:
            mount.start()
            assert mount.process is not None and not mount.mounted(), "it is in a namespace of its own"
            code = [sys.executable, "-c", USE, str(mount.path)]
            command = [*ordinary_user.enter(mount.process.pid), *code]
            used = subprocess.run(command, capture_output=True, text=True, env=mount.env, check=False)
            assert (used.returncode, used.stderr) == (0, "")
            assert mount.exit_code() == 0 and mount.log() == ""
        finally:
            mount.stop()
