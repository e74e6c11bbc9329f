"""The operations called directly: errnos, pauses, log lines. The kernel's side of them is in test_fs_mount."""

import errno
import json
import logging
import os
import stat
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pyfuse3
import pytest
import trio
import trio.testing

from cakefs.errors import (
    AccessDenied,
    CakeError,
    CorruptData,
    InvalidFormat,
    NotFound,
    RemoteChanged,
    RemoteUnavailable,
    StoreFull,
)
from cakefs.fs.answer import read_errno
from cakefs.fs.ops import Ops
from tests.fs_child import FakeLibrary

T = TypeVar("T")
FILES = {"a.bin": {"size": 300_000}, "config.json": {"text": "{}"}, "sub/b": {"text": ""}}


class Bench:
    """Handlers with a library behind them, called without a kernel; the clock jumps over pauses."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"generation": 1, "models": {"org/m": {"files": FILES, "created": 1234}}}
        self.library = FakeLibrary(lambda: self.state)
        self.ops = Ops(self.library, uid=12, gid=34, facts={"pid": 5})
        self.context: Any = None
        self.waited = 0.0

    def call(self, handler: Callable[..., Awaitable[T]], *args: Any) -> T:
        async def run() -> T:
            started = trio.current_time()
            try:
                return await handler(*args)
            finally:
                self.waited = trio.current_time() - started

        return trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))

    def errno(self, handler: Callable[..., Awaitable[Any]], *args: Any) -> int:
        with pytest.raises(pyfuse3.FUSEError) as caught:
            self.call(handler, *args)
        return caught.value.errno

    def look(self, path: str) -> pyfuse3.EntryAttributes:
        entry = self.call(self.ops.getattr, pyfuse3.ROOT_INODE, self.context)
        for name in filter(None, path.split("/")):
            entry = self.call(self.ops.lookup, entry.st_ino, name.encode(), self.context)
        return entry

    def open(self, path: str) -> int:
        return self.call(self.ops.open, self.look(path).st_ino, os.O_RDONLY, self.context).fh

    def fault(self, path: str, kind: str) -> None:
        self.state["faults"] = {path: kind}

    def mount_status(self) -> dict[str, Any]:
        handle = self.open(".cakefs/status.json")
        text = bytes(self.call(self.ops.read, handle, 0, 1 << 20))
        self.call(self.ops.release, handle)
        found: dict[str, Any] = json.loads(text)["mount"]
        return found


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RemoteUnavailable("x"), errno.ETIMEDOUT),
        (RemoteChanged("x"), errno.ESTALE),
        (CorruptData("x"), errno.EIO),
        (InvalidFormat("x"), errno.EIO),
        (NotFound("x"), errno.EIO),
        (AccessDenied("x"), errno.EIO),
        (StoreFull("x"), errno.EIO),
        (OSError(errno.EAGAIN, "x"), errno.EIO),
    ],
)
def test_a_read_fails_only_with_errnos_that_loaders_understand(error: Exception, code: int) -> None:
    assert read_errno(error) == code


def test_attributes(bench: Bench) -> None:
    file = bench.look("org/m/a.bin")
    assert (file.st_mode, file.st_size, file.st_nlink) == (stat.S_IFREG | 0o444, 300_000, 2)
    assert (file.st_blksize, file.st_blocks) == (4096, 586)
    assert (file.st_uid, file.st_gid, file.st_mtime_ns) == (12, 34, 1234 * 10**9)
    folder = bench.look("org/m")
    assert (folder.st_mode, folder.st_nlink, folder.st_mtime_ns) == (stat.S_IFDIR | 0o555, 3, 1234 * 10**9)
    assert bench.look("org/m/sub/b").st_blocks == 0


def test_absent_names_are_remembered_inside_models_only(bench: Bench) -> None:
    absent = bench.look("org/m/adapter_config.json")
    assert absent.st_ino == 0 and absent.entry_timeout > 1e6
    assert bench.errno(bench.ops.lookup, bench.look("org").st_ino, b"absent", None) == errno.ENOENT
    assert bench.errno(bench.ops.lookup, bench.look("org/m/a.bin").st_ino, b"x", None) == errno.ENOTDIR


def test_unknown_inodes_are_stale(bench: Bench) -> None:
    for handler in (bench.ops.getattr, bench.ops.opendir, bench.ops.listxattr):
        assert bench.errno(handler, 999, None) == errno.ESTALE
    assert bench.errno(bench.ops.open, 999, os.O_RDONLY, None) == errno.ESTALE
    assert bench.errno(bench.ops.lookup, 999, b"x", None) == errno.ESTALE


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_RDONLY | os.O_CREAT])
def test_opening_to_write_is_refused(bench: Bench, flags: int) -> None:
    assert bench.errno(bench.ops.open, bench.look("org/m/a.bin").st_ino, flags, None) == errno.EROFS


def test_open_keeps_the_cache_and_never_asks_for_direct_io(bench: Bench) -> None:
    info = bench.call(bench.ops.open, bench.look("org/m/a.bin").st_ino, os.O_RDONLY | os.O_DIRECT, None)
    assert info.keep_cache and not info.direct_io
    assert bench.errno(bench.ops.open, bench.look("org").st_ino, os.O_RDONLY, None) == errno.EISDIR


@pytest.mark.parametrize(
    "name",
    [
        "mknod",
        "mkdir",
        "unlink",
        "rmdir",
        "symlink",
        "rename",
        "link",
        "create",
        "setattr",
        "write",
        "setxattr",
        "removexattr",
    ],
)
def test_every_change_is_refused(bench: Bench, name: str) -> None:
    assert bench.errno(getattr(bench.ops, name), 1, b"x", 0o644, 0, None) == errno.EROFS


def test_flush_is_left_to_the_kernel() -> None:
    """ENOSYS once, and no close costs a request any more."""
    assert Ops.flush is pyfuse3.Operations.flush


def test_reads_are_cut_at_the_end_of_the_file_only(bench: Bench) -> None:
    handle = bench.open("org/m/a.bin")
    assert len(bench.call(bench.ops.read, handle, 0, 131072)) == 131072
    assert len(bench.call(bench.ops.read, handle, 299_990, 4096)) == 10
    assert len(bench.call(bench.ops.read, handle, 300_000, 4096)) == 0
    assert len(bench.call(bench.ops.read, bench.open("org/m/sub/b"), 0, 4096)) == 0
    assert bench.mount_status()["hits"] == 4


def test_a_short_reply_is_an_error_and_not_data(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.fault("a.bin", "short")
    assert bench.errno(bench.ops.read, bench.open("org/m/a.bin"), 0, 4096) == errno.EIO
    assert "4095 bytes read where 4096 at 0 of 300000 were asked for" in caplog.text


def test_an_error_of_ours_is_one_line_with_path_range_and_cause(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.fault("a.bin", "timeout")
    assert bench.errno(bench.ops.read, bench.open("org/m/a.bin"), 4096, 4096) == errno.ETIMEDOUT
    (record,) = caplog.records
    assert record.getMessage() == "cannot read org/m/a.bin, bytes 4096-8192: no answer for a.bin (hint: try again)"
    assert record.levelno == logging.WARNING and record.exc_info is None


def test_any_other_exception_is_one_traceback_and_eio(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.fault("a.bin", "bug")
    handle = bench.open("org/m/a.bin")
    for _ in range(5):
        assert bench.errno(bench.ops.read, handle, 0, 4096) == errno.EIO
    (record,) = caplog.records
    assert record.exc_info is not None and isinstance(record.exc_info[1], ZeroDivisionError)
    assert bench.mount_status()["failures"] == 5
    assert bench.errno(bench.ops.read, 12345, 0, 4096) == errno.EIO  # no such handle


def test_where_memory_runs_out_that_is_one_line(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.fault("a.bin", "memory")
    assert bench.errno(bench.ops.read, bench.open("org/m/a.bin"), 0, 4096) == errno.EIO
    (record,) = caplog.records
    assert record.getMessage() == "cannot read org/m/a.bin, bytes 0-4096: no memory is left" and not record.exc_info


@pytest.mark.parametrize("kind", ["timeout", "corrupt", "bug", "short"])
def test_failures_are_answered_slowly(bench: Bench, kind: str) -> None:
    bench.fault("a.bin", kind)
    handle = bench.open("org/m/a.bin")
    for _ in range(3):
        bench.errno(bench.ops.read, handle, 0, 4096)
        assert bench.waited >= 0.5


def test_a_bug_below_a_lookup_is_eio(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    org = bench.look("org").st_ino
    monkeypatch.setattr(bench.library, "manifest", lambda _: int("not a number"))
    assert bench.errno(bench.ops.lookup, org, b"m", None) == errno.EIO
    assert "ValueError" in caplog.text


@pytest.mark.parametrize(
    ("error", "code"),
    [(NotFound("x"), errno.ENOENT), (AccessDenied("x"), errno.EACCES), (RemoteUnavailable("x"), errno.ETIMEDOUT)],
)
def test_our_errors_below_a_lookup_have_their_lookup_errno(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, error: CakeError, code: int
) -> None:
    def fail(_: str) -> None:
        raise error

    org = bench.look("org").st_ino
    monkeypatch.setattr(bench.library, "manifest", fail)
    assert bench.errno(bench.ops.lookup, org, b"m", None) == code


def test_opening_what_was_collected_is_stale_so_that_the_kernel_looks_again(bench: Bench) -> None:
    ino = bench.look("org/m/a.bin").st_ino
    bench.library.collect()
    assert bench.errno(bench.ops.open, ino, os.O_RDONLY, None) == errno.ESTALE


def test_extended_attributes(bench: Bench) -> None:
    ino = bench.look("org/m/a.bin").st_ino
    assert bench.call(bench.ops.listxattr, ino, None) == [b"user.cakefs.local_bytes", b"user.cakefs.model"]
    assert bench.call(bench.ops.getxattr, ino, b"user.cakefs.local_bytes", None) == b"300000"
    for name in (b"user.cakefs.absent", b"security.capability", b"system.posix_acl_access"):
        assert bench.errno(bench.ops.getxattr, ino, name, None) == errno.ENODATA
    assert bench.call(bench.ops.getxattr, bench.look("org/m").st_ino, b"user.cakefs.model", None) == b"org/m"
    for path in ("", "org", "org/m/sub", ".cakefs", ".cakefs/status.json"):
        assert bench.call(bench.ops.listxattr, bench.look(path).st_ino, None) == []


def test_looking_at_the_counters_does_not_change_them(bench: Bench) -> None:
    bench.call(bench.ops.read, bench.open("org/m/a.bin"), 0, 1000)
    first, second = bench.mount_status(), bench.mount_status()
    del first["lookups"], second["lookups"], first["inodes"], second["inodes"]
    assert (
        first
        == second
        == {
            "pid": 5,
            "opens": 1,
            "open_files": 1,
            "reads": 1,
            "hits": 1,
            "bytes": 1000,
            "failures": 0,
            "waiting": 0,
            "stalled": 0,
            "longest_wait_s": 0.0,
        }
    )


def test_handles_are_closed_at_release_and_at_the_end(bench: Bench) -> None:
    first, _ = bench.open("org/m/a.bin"), bench.open("org/m/a.bin")
    bench.call(bench.ops.release, first)
    assert bench.library.closed == 1
    bench.ops.close()
    assert bench.library.closed == 2


def test_a_broken_model_does_not_hide_its_neighbours(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench.state["models"]["org/broken"] = {"files": {"x": {"size": 1}}}
    bench.state["generation"] += 1
    intact = bench.library.manifest

    def manifest(manifest_id: str) -> Any:
        if (found := intact(manifest_id)).name == "org/broken":
            raise InvalidFormat("manifest of org/broken: bad span")
        return found

    monkeypatch.setattr(bench.library, "manifest", manifest)
    listed: list[bytes] = []

    def reply(token: object, name: bytes, entry: object, offset: int) -> bool:
        listed.append(name)
        return True

    monkeypatch.setattr("pyfuse3.readdir_reply", reply)
    handle = bench.call(bench.ops.opendir, bench.look("org").st_ino, None)
    bench.call(bench.ops.readdir, handle, 0, None)
    assert listed == [b".", b"..", b"m"]
    assert "bad span" in caplog.text
