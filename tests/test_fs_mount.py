"""A real mount, used by ordinary system calls. Only the library behind it is fake."""

import errno
import json
import mmap
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fs_child import PATTERN, FakeMount, eventually, why_no_mount

pytestmark = pytest.mark.skipif(bool(why_no_mount()), reason=why_no_mount())

BIG = 5_000_003
WHOLE = (PATTERN[:251] * (BIG // 251 + 1))[:BIG]
FILES: dict[str, dict[str, Any]] = {
    "model.safetensors": {"size": BIG, "view": "model"},
    "model-00001-of-00001.safetensors": {"size": 700, "view": "original"},
    "config.json": {"text": '{"a": 1}'},
    "empty": {"text": ""},
    "1_Pooling/config.json": {"text": "{}"},
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeMount]:
    """One mount for the tests that do not end it."""
    mount = FakeMount(tmp_path_factory.mktemp("shared"))
    mount.model("org/name", FILES, created=1_700_000_000)
    try:
        yield mount.start()
    finally:
        mount.stop()
    assert "Traceback" not in mount.log() and "Warning" not in mount.log()


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[FakeMount]:
    """A mount that is not started yet, and may end as it likes."""
    mount = FakeMount(tmp_path)
    mount.model("org/name", FILES, created=1_700_000_000)
    try:
        yield mount
    finally:
        mount.stop()


def run_python(code: str, *args: object, timeout: float = 30) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


# Reading


def test_a_walk_meets_every_file_once_in_order(shared: FakeMount) -> None:
    found = {str(Path(d).relative_to(shared.path)): (dirs, files) for d, dirs, files in os.walk(shared.path / "org")}
    assert found == {
        "org": (["name"], []),
        "org/name": (["1_Pooling"], ["config.json", "empty", "model.safetensors"]),
        "org/name/1_Pooling": ([], ["config.json"]),
    }
    assert os.listdir(shared.path) == [".cakefs", "org"]
    originals = os.listdir(shared.path / ".cakefs/original/org/name")
    assert originals == ["1_Pooling", "config.json", "empty", "model-00001-of-00001.safetensors"]


def test_listings_have_the_two_dots(shared: FakeMount) -> None:
    listed = subprocess.run(["ls", "-ai", shared.path / "org"], capture_output=True, text=True, check=True).stdout
    inodes = {name: int(ino) for ino, name in (line.split() for line in listed.splitlines())}
    assert list(inodes) == [".", "..", "name"]
    assert inodes["."] == (shared.path / "org").stat().st_ino and inodes[".."] == shared.path.stat().st_ino


def test_bytes_are_right_by_read_pread_and_both_kinds_of_mmap(shared: FakeMount) -> None:
    path = shared.path / "org/name/model.safetensors"
    assert path.read_bytes() == WHOLE
    with path.open("rb") as file:
        assert os.pread(file.fileno(), 4097, 1_048_570) == WHOLE[1_048_570:1_052_667]
        assert os.pread(file.fileno(), 4096, BIG - 3) == WHOLE[-3:]
        for flags in (mmap.MAP_SHARED, mmap.MAP_PRIVATE):
            with mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ) as mapped:
                assert mapped[:] == WHOLE
    assert (shared.path / "org/name/empty").read_bytes() == b""
    assert json.loads((shared.path / "org/name/config.json").read_text()) == {"a": 1}


def test_o_direct_is_served_at_any_offset(shared: FakeMount) -> None:
    fd = os.open(shared.path / "org/name/model.safetensors", os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, 1 << 20) as buffer:
            assert os.preadv(fd, [buffer], 12_345) == 1 << 20
            assert buffer[:] == WHOLE[12_345 : 12_345 + (1 << 20)]
    finally:
        os.close(fd)


def test_attributes_are_those_of_an_ordinary_read_only_file(shared: FakeMount) -> None:
    found = (shared.path / "org/name/model.safetensors").stat()
    assert (found.st_size, found.st_blocks, found.st_blksize) == (BIG, -(-BIG // 512), 4096)
    assert (stat.filemode(found.st_mode), found.st_nlink) == ("-r--r--r--", 1)
    assert (found.st_uid, found.st_gid, found.st_mtime) == (os.getuid(), os.getgid(), 1_700_000_000)
    folder = (shared.path / "org/name").stat()
    assert (stat.filemode(folder.st_mode), folder.st_nlink) == ("dr-xr-xr-x", 3)
    assert os.statvfs(shared.path).f_blocks == os.statvfs(shared.path.parent).f_blocks
    assert os.statvfs(shared.path).f_namemax == 255


def test_the_second_load_reaches_nobody(fresh: FakeMount) -> None:
    """keep_cache: open again, read again, map again, and the server sees no READ."""
    path = fresh.start().path / "org/name/model.safetensors"
    path.read_bytes()
    before = fresh.status()["mount"]
    assert before["reads"] > 0
    for _ in range(3):
        path.read_bytes()
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            assert len(mapped[:]) == BIG
    after = fresh.status()["mount"]
    assert after["reads"] == before["reads"] and after["opens"] == before["opens"] + 6


def test_absent_names_inside_a_model_are_asked_for_once(fresh: FakeMount) -> None:
    path = fresh.start().path / "org/name"
    path.stat()
    assert not (path / "adapter_config.json").exists()
    before = fresh.status()["mount"]["lookups"]
    for _ in range(20):
        assert not (path / "adapter_config.json").exists()
    assert fresh.status()["mount"]["lookups"] - before < 5  # the name levels, at most


def test_status_is_readable_by_any_means(shared: FakeMount) -> None:
    path = shared.path / ".cakefs/status.json"
    for text in (
        path.read_text(),
        path.read_bytes(),
        subprocess.run(["cat", path], capture_output=True, check=True).stdout,
        subprocess.run(["head", "-c", "100000", path], capture_output=True, check=True).stdout,
    ):
        found = json.loads(text)
        assert found["models"] == 1 and found["mount"]["mountpoint"] == str(shared.path)
        assert shared.process and found["mount"]["pid"] == shared.process.pid
    with path.open("rb", buffering=0) as file:
        pieces = list(iter(lambda: file.read(7), b""))
    assert json.loads(b"".join(pieces))["models"] == 1
    assert path.stat().st_size > 100


def test_status_follows_its_growing_size(fresh: FakeMount) -> None:
    path = fresh.start().path / ".cakefs/status.json"
    first = path.stat().st_size
    for i in range(1000):
        (fresh.path / f"org/name/{'config.json' if i % 2 else 'empty'}").read_bytes()
    assert path.stat().st_size > first
    assert json.loads(path.read_bytes())["mount"]["opens"] == 1000


def test_extended_attributes_as_tools_ask_for_them(shared: FakeMount) -> None:
    path = shared.path / "org/name/config.json"
    assert sorted(os.listxattr(path)) == ["user.cakefs.local_bytes", "user.cakefs.model"]
    assert os.getxattr(path, "user.cakefs.model") == b"org/name"
    assert os.getxattr(shared.path / "org/name", "user.cakefs.model") == b"org/name"
    with pytest.raises(OSError) as caught:
        os.getxattr(path, "user.other")
    assert caught.value.errno == errno.ENODATA
    assert os.listxattr(shared.path) == []


WRITES = """
import os, sys
base = sys.argv[1]
file, new = base + "/org/name/config.json", base + "/org/name/new"
tries = {
    "write": lambda: os.open(file, os.O_WRONLY), "rdwr": lambda: os.open(file, os.O_RDWR),
    "append": lambda: os.open(file, os.O_WRONLY | os.O_APPEND),
    "trunc": lambda: os.open(file, os.O_RDONLY | os.O_TRUNC),
    "create": lambda: os.open(new, os.O_RDONLY | os.O_CREAT), "mkdir": lambda: os.mkdir(new),
    "mkdir at names": lambda: os.mkdir(base + "/x"), "unlink": lambda: os.unlink(file),
    "rmdir": lambda: os.rmdir(base + "/org/name/1_Pooling"), "rename": lambda: os.rename(file, new),
    "symlink": lambda: os.symlink("x", new), "link": lambda: os.link(file, new), "mknod": lambda: os.mkfifo(new),
    "chmod": lambda: os.chmod(file, 0o600), "utime": lambda: os.utime(file), "truncate": lambda: os.truncate(file, 0),
    "setxattr": lambda: os.setxattr(file, "user.x", b"1"),
    "removexattr": lambda: os.removexattr(file, "user.cakefs.model"),
    "rmdir model": lambda: os.rmdir(base + "/org/name"),
}
for name, attempt in tries.items():
    try:
        attempt()
        print(name, "succeeded")
    except OSError as error:
        if error.errno != 30:
            print(name, error)
"""


def test_every_write_is_refused_as_on_a_read_only_file_system(shared: FakeMount) -> None:
    assert run_python(WRITES, shared.path).stdout == ""


# Models come and go


def test_added_updated_and_removed_models_are_noticed(fresh: FakeMount) -> None:
    fresh.start()
    late = fresh.path / "org/late/config.json"
    assert not late.exists()
    fresh.model("org/late", {"config.json": {"text": "one"}})
    assert late.read_text() == "one"
    inode = late.stat().st_ino
    with late.open("rb") as held:
        fresh.model("org/late", {"config.json": {"text": "second"}})
        assert eventually(lambda: late.read_text() == "second", 5)
        assert late.stat().st_ino != inode
        fresh.remove("org/late")
        assert eventually(lambda: not late.exists(), 5)
        assert held.read() == b"one", "an open file is served until it is closed"
    assert os.listdir(fresh.path / "org") == ["name"]


def test_a_model_below_a_model_appears_although_the_kernel_knew_it_absent(fresh: FakeMount) -> None:
    fresh.start()
    below = fresh.path / "org/name/view/config.json"
    assert not below.exists()
    fresh.model("org/name/view", {"config.json": {"text": "v"}})
    assert eventually(below.exists, 5)
    assert below.read_text() == "v" and (fresh.path / "org/name/config.json").exists()


def test_mapped_bytes_stay_when_the_model_is_removed(fresh: FakeMount) -> None:
    path = fresh.start().path / "org/name/model.safetensors"
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        fresh.remove("org/name")
        assert eventually(lambda: not path.exists(), 5)
        assert mapped[4_000_000:4_000_100] == WHOLE[4_000_000 : 4_000_000 + 100]


def test_a_listing_that_began_goes_on_as_it_was(fresh: FakeMount) -> None:
    """Long enough for many requests; neither doubles nor holes when models come and go in between."""
    names = [f"model-{i:03d}-{'x' * 150}" for i in range(300)]
    fresh.state["models"] = {f"many/{name}": {"files": {"f": {"size": 1}}} for name in names}
    fresh.start()
    with os.scandir(fresh.path / "many") as listing:
        first = [next(listing).name for _ in range(10)]
        for name in names[:5]:
            del fresh.state["models"][f"many/{name}"]
        fresh.model("many/a-new-one", {"f": {"size": 1}})
        rest = [entry.name for entry in listing]
    assert first + rest == names
    assert os.listdir(fresh.path / "many") == ["a-new-one", *names[5:]]


def test_memory_follows_what_the_kernel_remembers(fresh: FakeMount) -> None:
    fresh.state["models"] |= {f"many/m{i}": {"files": {"a/f": {"size": 1}}} for i in range(100)}
    fresh.start()
    for i in range(100):
        (fresh.path / f"many/m{i}/a/f").stat()
    assert fresh.status()["mount"]["inodes"] > 300
    fresh.state["models"] = {}
    fresh.save()

    def forgotten() -> bool:
        for i in range(100):
            (fresh.path / f"many/m{i}").exists()
        return bool(fresh.status()["mount"]["inodes"] < 20)

    assert eventually(forgotten, 10)


# Failures


def failing_read(path: Path) -> tuple[int, float]:
    """errno and seconds of one read of the first page, past Python's own buffering and the kernel's readahead."""
    started = time.monotonic()
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        os.pread(fd, 4096, 0)
    except OSError as error:
        return error.errno or 0, time.monotonic() - started
    finally:
        os.close(fd)
    return 0, time.monotonic() - started


def test_failed_reads_give_the_errno_slowly_and_the_mount_survives(fresh: FakeMount) -> None:
    path = fresh.start().path / "org/name/model.safetensors"
    for kind, code in (("timeout", errno.ETIMEDOUT), ("corrupt", errno.EIO), ("bug", errno.EIO), ("short", errno.EIO)):
        fresh.fault("model.safetensors", kind)
        assert failing_read(path)[0] == code
        seconds = failing_read(path)[1]
        assert 0.5 <= seconds < 5
    fresh.fault("model.safetensors", "")
    assert path.read_bytes()[:100] == WHOLE[0 : 0 + 100]
    log = fresh.log()
    assert log.count("Traceback") == 2 and log.count("ZeroDivisionError: a bug in the engine") == 1
    assert log.count("no answer for model.safetensors (hint: try again)") == 1
    assert fresh.status()["mount"]["failures"] == 8


def test_a_mapped_page_that_cannot_be_had_ends_the_loader_and_not_the_mount(fresh: FakeMount) -> None:
    fresh.start()
    fresh.fault("model.safetensors", "timeout")
    touch = "import mmap,sys; f = open(sys.argv[1], 'rb'); mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)[3_000_000]"
    started = time.monotonic()
    ended = run_python(touch, fresh.path / "org/name/model.safetensors")
    assert ended.returncode == -signal.SIGBUS
    assert 0.5 <= time.monotonic() - started < 20
    assert "cannot read org/name/model.safetensors, bytes " in fresh.log()
    assert (fresh.path / "org/name/config.json").read_bytes()


def test_populating_a_mapping_that_keeps_failing_does_not_storm(fresh: FakeMount) -> None:
    """The kernel asks again for ever; two answers a second are no load, and SIGKILL ends it."""
    fresh.start()
    fresh.fault("model.safetensors", "corrupt")
    populate = (
        "import mmap,sys; f = open(sys.argv[1], 'rb'); "
        "mmap.mmap(f.fileno(), 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ)"
    )
    with pytest.raises(subprocess.TimeoutExpired):
        run_python(populate, fresh.path / "org/name/model.safetensors", timeout=2)
    assert fresh.status()["mount"]["failures"] < 40


def test_a_stalled_file_blocks_nobody_else(fresh: FakeMount) -> None:
    fresh.start()
    fresh.fault("model.safetensors", "stall")
    results: list[bytes] = []
    path = fresh.path / "org/name/model.safetensors"
    waiting = [threading.Thread(target=lambda at=at: results.append(pread(path, at))) for at in range(0, 40960, 4096)]
    for thread in waiting:
        thread.start()
    assert eventually(lambda: fresh.status()["mount"]["reads"] >= 10)
    assert (fresh.path / "org/name/config.json").read_bytes() == b'{"a": 1}'
    assert os.listdir(fresh.path / "org/name") and not results
    fresh.fault("model.safetensors", "")
    for thread in waiting:
        thread.join(10)
    assert sorted(results) == sorted(WHOLE[at : at + 4096] for at in range(0, 40960, 4096))


def pread(path: Path, offset: int) -> bytes:
    """Past the page cache, so that each is a request of its own."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, 4096) as buffer:
            os.preadv(fd, [buffer], offset)
            return buffer[:]
    finally:
        os.close(fd)


def test_a_read_that_waits_is_answered_as_well(fresh: FakeMount) -> None:
    fresh.start()
    fresh.fault("config.json", "slow")
    assert (fresh.path / "org/name/config.json").read_text() == '{"a": 1}'
    assert fresh.status()["mount"]["hits"] == 0


def test_a_killed_reader_leaves_no_error_in_the_log(fresh: FakeMount) -> None:
    fresh.start()
    fresh.fault("model.safetensors", "stall")
    reader = subprocess.Popen(["cat", fresh.path / "org/name/model.safetensors"], stdout=subprocess.DEVNULL)
    assert eventually(lambda: fresh.status()["mount"]["reads"] > 0)
    reader.kill()
    reader.wait(10)
    fresh.fault("model.safetensors", "")
    assert (fresh.path / "org/name/model.safetensors").read_bytes()
    assert fresh.log() == ""
