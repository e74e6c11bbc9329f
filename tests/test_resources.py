"""A mount that runs out of descriptors or memory, a clock that jumps, a store that is read-only: served or refused
clearly, never wrong, and well again afterwards.

A full disk is in `test_faults_crash.py`, a quota in `test_store_open.py`.
"""

import errno
import os
import re
import resource
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

import pytest

from cakefs.errors import UserError
from cakefs.model import CHUNK, MIB
from tests.disks import small_disk
from tests.exporting import needs_root
from tests.fs_child import eventually
from tests.hub import Hub
from tests.inline import Inline
from tests.models import CONFIG, single, tensor
from tests.mounts import UPSTREAM, Cakefs, needs_fuse, write_config
from tests.stress.soak import children

WEIGHTS = "model.safetensors"
TIMEOUT_S = 4
NAMES = [f"org/m{i}" for i in range(8)]
YEARS = 10 * 365 * 86400.0
MAY_FAIL = {errno.EIO, errno.ETIMEDOUT, errno.ENOMEM, errno.EMFILE, errno.ENFILE}


def published(name: str) -> bytes:
    seed = 100 * NAMES.index(name)
    large = {f"large.{i}": tensor(seed + i, (CHUNK + 5000) // 4) for i in range(2)}
    return single(large | {f"own.{i}": tensor(seed + 10 + i, 3000) for i in range(30)})


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        for name in NAMES:
            hub.add_repo(name, {WEIGHTS: published(name), "config.json": CONFIG})
        yield hub


def read(cakefs: Cakefs, name: str) -> bool:
    """Whether all of it could be read, past the kernel's memory; what could is right."""
    expected, at = published(name), 0
    try:
        fd = os.open(cakefs.mountpoint / name / WEIGHTS, os.O_RDONLY)
    except OSError as error:
        assert error.errno in MAY_FAIL, error
        return False
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        while got := os.pread(fd, MIB, at):
            assert got == expected[at : at + len(got)], "WRONG BYTES"
            at += len(got)
        return at == len(expected)
    except OSError as error:
        assert error.errno in MAY_FAIL, error
        return False
    finally:
        os.close(fd)


def has_any(cakefs: Cakefs, name: str) -> bool:
    return int(os.getxattr(cakefs.mountpoint / name / WEIGHTS, "user.cakefs.local_bytes")) > MIB


@contextmanager
def limited(pid: int, what: int, value: int) -> Iterator[None]:
    """A process that lives with less, for a while."""
    before = resource.prlimit(pid, what)
    resource.prlimit(pid, what, (value, before[1]))
    try:
        yield
    finally:
        with suppress(ProcessLookupError):  # it ended of that, and was replaced
            resource.prlimit(pid, what, before)


def address_space(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()


def descriptors(pid: int) -> int:
    return max(map(int, os.listdir(f"/proc/{pid}/fd"))) + 1


# What is said of it. A transfer process without memory may end with all that Python says then, and is replaced.
SHORT = (
    "Too many open files",
    "Cannot allocate memory",
    "no memory is left",
    "MemoryError",
    "can't start new thread",
    "Traceback",
    "a transfer process",
    UPSTREAM,
)
LIMITS = {
    "descriptors": (resource.RLIMIT_NOFILE, lambda pid: descriptors(pid) + 3),
    "no-descriptors": (resource.RLIMIT_NOFILE, lambda pid: 4),
    "memory": (resource.RLIMIT_AS, lambda pid: address_space(pid) + MIB),
}


@pytest.fixture(scope="module")
def mounted(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cakefs]:
    place = tmp_path_factory.mktemp("short")
    config = write_config(place, read_timeout_s=TIMEOUT_S, workers=1)
    cakefs = Cakefs(place, hub.endpoint, CAKEFS_CONFIG=config).provoking(*SHORT)
    cakefs.add_all(NAMES)
    with cakefs.mounted():
        yield cakefs
    assert cakefs.run("verify").returncode == 0


@needs_fuse
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("whose", "limit"),
    [(whose, limit) for whose in ("server", "transfers") for limit in LIMITS],
)
def test_a_process_that_runs_out_of_something_recovers(mounted: Cakefs, whose: str, limit: str) -> None:
    """Those that it reads for the first time have to be fetched meanwhile."""
    server = mounted.status()["pid"]
    names = NAMES[: 1 + len([p for p in NAMES if has_any(mounted, p)])]
    assert read(mounted, NAMES[0])
    assert eventually(lambda: bool(children(server)))
    pid, (what, value) = server if whose == "server" else children(server)[0], LIMITS[limit]
    began = time.monotonic()
    with limited(pid, what, value(pid)):
        if (whose, limit) == ("server", "no-descriptors"):  # It cannot be replaced now.
            os.kill(children(pid)[0], signal.SIGKILL)
        for name in names:
            read(mounted, name)
    assert time.monotonic() - began < 10 * TIMEOUT_S * len(names), "it does not hang"
    assert mounted.status()["pid"] == server
    assert eventually(lambda: all([read(mounted, name) for name in names]), 60)


def test_a_clock_that_jumps_by_years_changes_nothing_that_is_served(hub: Hub, tmp_path: Path) -> None:
    """Transfers are processes of their own, and have the right time: so two clocks disagree, too."""
    cakefs = Inline(tmp_path, hub.endpoint, CAKEFS_CONFIG=write_config(tmp_path, workers=1))
    genuine = time.time
    for name, shift in zip(NAMES, (0.0, YEARS, -YEARS), strict=False):
        with mock.patch("time.time", lambda shift=shift: genuine() + shift):
            cakefs.run("add", name)
            cakefs.run("pull", name)
            cakefs.run("gc")
    with mock.patch("time.time", lambda: genuine() - YEARS):
        cakefs.run("evict", NAMES[0])
    assert [model["verified"] for model in cakefs.json("ls")] == [False, True, True]
    assert cakefs.run("verify").returncode == 0
    assert (cakefs.store / "backup/data.mdb").exists()


@needs_root
@needs_fuse
def test_a_read_only_store_serves_what_it_has_and_refuses_the_rest_in_a_line(hub: Hub, tmp_path: Path) -> None:
    has, lacks, unknown = NAMES[:3]
    with small_disk(tmp_path / "disk", "40m") as disk:
        cakefs = Inline(disk, hub.endpoint, CAKEFS_CONFIG=write_config(tmp_path, workers=1))
        cakefs.provoking("Read-only file system", UPSTREAM).mountpoint = tmp_path / "models"
        cakefs.environment["XDG_STATE_HOME"] = str(tmp_path / "state")
        for command in (["add", has], ["pull", has], ["add", lacks]):
            cakefs.run(*command)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        out = str(tmp_path / "out")
        for command in (["ls"], ["show", has], ["export", has, out], ["hashes", has]):
            assert cakefs.run(*command).stderr == ""
        changes = ["add", unknown], ["pull", lacks], ["rm", has], ["gc"], ["evict", has], ["pin", has], ["import", out]
        for command in (*changes, ["slice", has, "--layers", "0", "--as", "slice"], ["verify"], ["verify", "--repair"]):
            done = cakefs.run(*command, check=False)
            assert done.returncode == UserError.exit_code, f"{command}: {done.stderr}"
            assert re.search("^error: .*read-only file system", done.stderr, re.I), f"{command}: {done.stderr}"
        with cakefs.mounted():
            assert read(cakefs, has) and not read(cakefs, lacks)
            assert not (cakefs.mountpoint / unknown).exists()
            assert read(cakefs, has)
