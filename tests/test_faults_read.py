"""Reading through a real mount while upstream misbehaves: never a wrong byte, a bounded wait, the right errno, and the
mount lives on.

One model with a file per fault, so that one `add` and one mount serve all. The readers of files whose fault lasts all
wait at the same time, which is a test of its own.
"""

import errno
import mmap
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest

from cakefs.fs.ops import FAILURE_PAUSE_S
from cakefs.model import CHUNK
from tests.fs_child import eventually
from tests.hub import Hub
from tests.models import single, tensor
from tests.mounts import UPSTREAM, Cakefs, needs_fuse, write_config

pytestmark = needs_fuse

T = TypeVar("T")

TIMEOUT_S = 2.0
# The kernel asks up to three times (loaders.md, section 7), each time we pause, and this machine may be busy.
BOUND_S = 3 * (TIMEOUT_S + FAILURE_PAUSE_S) + 6.0
# Of one stalled file: more than the 8 connections of the transfer processes, fewer than the 12 requests that the kernel
# has for readahead where it cannot be told to have more.
READERS = 11
INSIDE = CHUNK + 300_000  # A place in the middle of the first tensor.

# What lasts -> errno of the reader, pattern of the cause in the log.
LASTING: dict[str, tuple[str, dict[str, Any], int, str]] = {
    "stall": ("stall", {}, errno.ETIMEDOUT, "(less than 1 MiB came|no byte came in time)"),
    "stall-in-the-body": ("stall", {"after": 100_000}, errno.ETIMEDOUT, "(less than 1 MiB came|no byte came in time)"),
    "ignores-range": ("no-range", {}, errno.ETIMEDOUT, "ignored the range"),
    "short-body": ("short", {"after": 1}, errno.ETIMEDOUT, r"announced \d+ bytes .* instead of"),
    "wrong-range": ("wrong-range", {}, errno.ETIMEDOUT, "sent another range"),
    "drop": ("drop", {}, errno.ETIMEDOUT, "no answer from .*disconnected"),
    "500": ("500", {}, errno.ETIMEDOUT, "cannot serve .*500"),
    "404": ("404", {}, errno.EIO, "not found"),
    "403": ("403", {}, errno.EIO, "refused"),
    "416": ("416", {}, errno.ESTALE, "changed upstream"),
    "redirect-loop": ("redirect-loop", {}, errno.EIO, "redirects"),
}
# What passes and is not seen by the reader; twice where some bytes come each time.
PASSING: dict[str, dict[str, Any]] = {
    "drop": {"after": 200_000, "times": 2},
    "reset": {"after": 200_000, "times": 2},
    "short": {"after": 200_000},
    "long": {},
    "wrong-range": {},
    "no-range": {},
    "500": {},
    "expired": {},
    "slow": {"after": 100_000, "rate": 4_000_000.0},
}
OTHERS = [
    "busy-hub",
    "outage",
    "long-outage",
    "expired-links",
    "corrupt",
    "corrupt-elsewhere",
    "mapped",
    "busy",
    "quiet",
    "unlimited",
    "more",
]


def weights(seed: int) -> bytes:
    """Three chunks in one tensor, and a small tensor behind it."""
    return single({"a": tensor(seed, (2 * CHUNK + 400_000) // 4), "b": tensor(seed + 1, 5000)})


class Got(NamedTuple):
    """What came of one read: bytes or an errno."""

    data: bytes
    errno: int
    seconds: float


TOUCH = """
import mmap, sys
with open(sys.argv[1], "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
    print("mapped", flush=True)
    print(mapped[int(sys.argv[2])], flush=True)
"""


class Loaded(NamedTuple):
    """How a program ended that maps a file and touches a page of it, and what it wrote."""

    code: int
    output: str
    seconds: float


class World:
    def __init__(self, hub: Hub, cakefs: Cakefs) -> None:
        self.hub = hub
        self.cakefs = cakefs
        names = [*(f"lasting/{n}" for n in LASTING), *(f"passing/{n}" for n in PASSING), *OTHERS]
        self.published = {name: weights(10 * seed) for seed, name in enumerate(names)}
        self.published["busy"] = single({"a": tensor(9999, (READERS + 2) * CHUNK // 4)})

    def path(self, name: str) -> Path:
        return self.cakefs.mountpoint / "org/m" / name / "model.safetensors"

    def read(self, name: str, offset: int, size: int) -> Got:
        """One pread, of what the kernel has not remembered."""
        started, data, error = time.monotonic(), b"", 0
        fd = os.open(self.path(name), os.O_RDONLY)
        try:
            data = os.pread(fd, size, offset)
        except OSError as raised:
            error = raised.errno or -1
        finally:
            os.close(fd)
        return Got(data, error, time.monotonic() - started)

    def load(self, name: str, offset: int) -> Loaded:
        started = time.monotonic()
        command = [sys.executable, "-c", TOUCH, str(self.path(name)), str(offset)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=BOUND_S)
        return Loaded(done.returncode, done.stdout, time.monotonic() - started)

    def reads_right(self, name: str) -> bool:
        return self.path(name).read_bytes() == self.published[name]

    def fault(self, name: str, kind: str, **options: Any) -> None:
        self.hub.fault(kind, f"org/m/{name}/model.safetensors", **options)

    def logged(self, name: str) -> list[str]:
        """What the log says of failed reads of a file."""
        return [line for line in self.cakefs.log().splitlines() if f"cannot read org/m/{name}/" in line]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("read")
    with Hub() as hub:
        config = write_config(directory, read_timeout_s=TIMEOUT_S)
        world = World(hub, Cakefs(directory, hub.endpoint, CAKEFS_CONFIG=config).provoking(UPSTREAM))
        hub.add_repo("org/m", {f"{name}/model.safetensors": data for name, data in world.published.items()})
        with world.cakefs.mounted():
            world.cakefs.run("add", "org/m")
            yield world


def together(names: Iterable[str], read: Callable[[str], T]) -> dict[str, Future[T]]:
    with ThreadPoolExecutor(20) as pool:
        return {name: pool.submit(read, name) for name in names}


@pytest.fixture(scope="module")
def loaded(world: World) -> Iterator[Future[Loaded]]:
    """A loader whose page cannot be had, beside the readers of `lasting`."""
    world.fault("mapped", "stall", times=None)
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(world.load, "mapped", INSIDE)


@pytest.fixture(scope="module")
def lasting(world: World, loaded: Future[Loaded]) -> dict[str, Future[Got]]:
    """All readers at once; afterwards the faults are over."""
    for name, (kind, options, _, _) in LASTING.items():
        world.fault(f"lasting/{name}", kind, times=None, **options)
    outcomes = together(LASTING, lambda name: world.read(f"lasting/{name}", INSIDE, 4096))
    wait([loaded])
    world.hub.clear_faults()
    return outcomes


@pytest.mark.parametrize("name", LASTING)
def test_a_lasting_fault_is_a_clear_errno_in_time_and_right_bytes_afterwards(
    world: World, lasting: dict[str, Future[Got]], name: str
) -> None:
    _, _, expected, cause = LASTING[name]
    got = lasting[name].result()
    assert got.errno == expected
    assert got.seconds < BOUND_S
    line = world.logged(f"lasting/{name}")[0]
    assert re.search(rf"model\.safetensors, bytes \d+-\d+: .*{cause}", line), line
    assert world.reads_right(f"lasting/{name}")


@pytest.fixture(scope="module")
def passing(world: World) -> dict[str, Future[bool]]:
    for name, options in PASSING.items():
        world.fault(f"passing/{name}", name, **options)
    return together(PASSING, lambda name: world.reads_right(f"passing/{name}"))


@pytest.mark.parametrize("name", PASSING)
def test_a_passing_fault_is_not_seen(world: World, passing: dict[str, Future[bool]], name: str) -> None:
    assert passing[name].result()
    assert world.logged(f"passing/{name}") == []


def test_a_short_rate_limit_is_waited_for(world: World) -> None:
    """Longer than a read may take: the limit is not the reader's fault."""
    world.fault("busy-hub", "429", stage="resolve", retry_after=TIMEOUT_S + 0.5)
    assert world.reads_right("busy-hub")
    assert world.logged("busy-hub") == []


def test_the_network_goes_in_the_middle_of_a_read_and_comes_back(world: World) -> None:
    world.hub.reset()
    world.hub.shape(rate=4_000_000)
    with ThreadPoolExecutor(1) as pool:
        right = pool.submit(world.reads_right, "outage")
        assert eventually(lambda: world.hub.sent("outage/*") > 200_000)
        world.hub.down()
        time.sleep(TIMEOUT_S / 4)
        assert not right.done()
        world.hub.up()
        world.hub.shape()
        assert right.result(30)
    assert world.logged("outage") == []


def test_a_network_that_stays_away_is_a_timeout_and_right_bytes_when_it_is_back(world: World) -> None:
    world.hub.down()
    try:
        got = world.read("long-outage", INSIDE, 4096)
        assert (got.errno, got.data) == (errno.ETIMEDOUT, b"")
        assert got.seconds < BOUND_S
        assert "Connection refused" in world.logged("long-outage")[0]
    finally:
        world.hub.up()
    assert world.reads_right("long-outage")


def test_signed_urls_that_expire_are_asked_for_anew(world: World) -> None:
    data = world.published["expired-links"]
    assert world.read("expired-links", INSIDE, 4096).data == data[INSIDE : INSIDE + 4096]
    world.hub.expire_links()
    assert world.reads_right("expired-links")
    assert world.logged("expired-links") == []


def test_corrupt_bytes_are_found_when_the_file_is_complete_and_healed(world: World) -> None:
    """Not only in the store: the kernel's pages and what the daemon has open must go, too."""
    before = world.cakefs.status()["files_refuted"]
    world.fault("corrupt", "corrupt", after=1000)
    with world.path("corrupt").open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert file.read() != world.published["corrupt"], "not to be known before"
        assert eventually(lambda: world.cakefs.status()["files_refuted"] == before + 1)
        assert eventually(lambda: world.reads_right("corrupt"))
        assert mapped[:] == world.published["corrupt"]
    xattr = "user.cakefs.verified"
    assert eventually(lambda: os.getxattr(world.path("corrupt"), xattr) == b"yes")


def test_bytes_that_another_process_found_wrong_are_not_served_any_more(world: World) -> None:
    name = "corrupt-elsewhere"
    world.fault(name, "corrupt", after=500_000)
    with world.path(name).open("rb", buffering=0) as file:
        got = os.pread(file.fileno(), CHUNK, INSIDE)
        assert got != world.published[name][INSIDE : INSIDE + CHUNK], "not to be known before the file is complete"
        world.cakefs.run("pull", "org/m", "--files", f"{name}/*")
        assert eventually(lambda: os.pread(file.fileno(), 1 << 30, 0) == world.published[name])


def test_a_stalled_file_blocks_no_other(world: World) -> None:
    """With more readers than there are connections."""
    world.fault("busy", "stall", times=None)
    before = world.cakefs.status()["read_errors"]
    threads = [
        threading.Thread(target=world.read, args=("busy", place * CHUNK + CHUNK // 2, 4096))
        for place in range(1, 1 + READERS)
    ]
    for thread in threads:
        thread.start()
    assert eventually(lambda: world.cakefs.status()["chunks_on_their_way"] >= READERS)
    assert world.read("quiet", INSIDE, 4096).data == world.published["quiet"][INSIDE : INSIDE + 4096]
    assert world.cakefs.status()["read_errors"] == before, "while all the others wait"
    world.hub.clear_faults()
    for thread in threads:
        thread.join(BOUND_S)
    assert world.reads_right("busy")


def test_a_mapped_page_that_cannot_be_had_is_a_late_sigbus(
    world: World, loaded: Future[Loaded], lasting: dict[str, Future[Got]]
) -> None:
    """Not while there is hope, and with path, range and cause in the log."""
    code, output, seconds = loaded.result()
    assert (code, output) == (-signal.SIGBUS, "mapped\n")
    assert TIMEOUT_S < seconds < BOUND_S
    page = INSIDE // 4096 * 4096
    said = rf"model\.safetensors, bytes {page}-{page + 4096}: .*localhost.* (less than 1 MiB came|no byte came in time)"
    assert any(re.search(said, line) for line in world.logged("mapped"))
    assert world.load("mapped", INSIDE)[:2] == (0, f"mapped\n{world.published['mapped'][INSIDE]}\n")


def test_another_etag_is_a_stale_file_until_it_is_added_anew(world: World) -> None:
    """A plain file that its owner replaces: never a mixture of both."""
    first, second = weights(1000), weights(2000)
    url = world.hub.plain("dir/changing/model.safetensors", first)
    world.cakefs.run("add", url, "--as", "plain")
    path = world.cakefs.mountpoint / "plain/model.safetensors"
    with path.open("rb") as file:
        assert os.pread(file.fileno(), 4096, 0) == first[:4096]
        world.hub.plain("dir/changing/model.safetensors", second)
        with pytest.raises(OSError, match="Stale file handle") as raised:
            os.pread(file.fileno(), 4096, INSIDE)
        assert raised.value.errno == errno.ESTALE
    (line, *_) = [line for line in world.cakefs.log().splitlines() if "cannot read plain/model.safetensors" in line]
    assert "ETag is another one" in line and "--update" in line
    world.cakefs.run("add", url, "--as", "plain", "--update")
    assert path.read_bytes() == second


def test_a_long_rate_limit_is_not_waited_for_and_concerns_its_server_only(world: World) -> None:
    url = world.hub.plain("limited/model.safetensors", weights(3000))
    world.cakefs.run("add", url, "--as", "limited")
    world.hub.fault(429, "limited/*", times=None, retry_after=3600)
    with (world.cakefs.mountpoint / "limited/model.safetensors").open("rb") as file:
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            os.pread(file.fileno(), 4096, INSIDE)
        assert time.monotonic() - started < BOUND_S
    assert "cannot read limited/model.safetensors" in world.cakefs.log()
    assert "429: test hub: 429 on purpose) (hint: try again in 3" in world.cakefs.log()
    assert world.reads_right("unlimited")


def test_the_mount_has_seen_no_bug(world: World) -> None:
    """Last in this file: it has been through all of the above."""
    assert world.cakefs.status()["worker_deaths"] == 0
    assert "Traceback" not in world.cakefs.log()
    assert "Signature=" not in world.cakefs.log(), "a signed URL is a password"
    assert world.read("more", 0, 4096).data == world.published["more"][:4096]
