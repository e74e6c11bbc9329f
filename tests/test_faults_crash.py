"""kill -9 of the mount or of a transfer process at any point, a full disk, a second mount: nothing lost, nothing wrong,
nothing fetched twice, no process left behind.

The tests share a hub; those that kill share a store and a mountpoint, too, so that each begins on what the last one
left.
"""

import errno
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from cakefs.model import CHUNK
from tests.disks import small_disk
from tests.fs_child import eventually
from tests.hub import Hub
from tests.models import CONFIG, single, tensor
from tests.mounts import Cakefs, needs_fuse, write_config

pytestmark = needs_fuse

WORKERS, CONNECTIONS = 2, 2
FLIGHTS = WORKERS * CONNECTIONS
LINK = 6_000_000  # Bytes per second while something is to be caught in the middle.


def layers(seed: int, count: int = 5) -> bytes:
    """Large tensors of several chunks, and small ones that are sealed together."""
    large = {f"large.{i}": tensor(seed + i, (CHUNK + CHUNK // 2) // 4) for i in range(count)}
    small = {f"small.{i}": tensor(seed + 100 + i, 4000) for i in range(4 * count)}
    return single(large | small)


SHARED, OWN = tensor(1, CHUNK // 2), tensor(2, CHUNK // 2)
KILLS = [f"org/{kill}" for kill in ("begun-daemon", "half-group", "half-daemon", "sealing-daemon", "sealing-group")]
MODELS: dict[str, Callable[[], bytes]] = {
    name: partial(layers, 1000 * seed) for seed, name in enumerate([*KILLS, "org/kept", "org/worker", "org/ended"], 1)
}
MODELS |= {"org/one": lambda: single({"a": SHARED}), "org/two": lambda: single({"a": SHARED, "b": OWN})}


class Running:
    """A mount in the background as processes."""

    def __init__(self, cakefs: Cakefs) -> None:
        self.cakefs = cakefs
        self.pid = int(cakefs.status()["pid"])

    def workers(self) -> list[int]:
        pids = map(int, filter(str.isdigit, os.listdir("/proc")))
        return [pid for pid in pids if parent(pid) == self.pid and b"engine.transfer.worker" in command_line(pid)]

    def kill(self, *, group: bool = False) -> None:
        """SIGKILL to the daemon alone or to its transfer processes as well; returns when all of them are gone."""
        workers = self.workers()
        (os.killpg if group else os.kill)(self.pid, signal.SIGKILL)
        pids = [self.pid, *workers]
        assert len(pids) == 1 + WORKERS
        assert eventually(lambda: not any(map(alive, pids))), "a transfer process outlives its mount"


def stat_fields(pid: int) -> list[str]:
    """Those of /proc/PID/stat behind the name: state, parent and so on; nothing for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return []


def parent(pid: int) -> int:
    return int((stat_fields(pid) or ["", "0"])[1])


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # ended meanwhile
        return b""


def alive(pid: int) -> bool:
    return (stat_fields(pid) or ["X"])[0] not in "XZ"


def is_verified(path: Path) -> bool:
    return os.getxattr(path, "user.cakefs.verified") == b"yes"


class World:
    def __init__(self, directory: Path, hub: Hub) -> None:
        self.hub = hub
        config = write_config(directory, read_timeout_s=5, workers=WORKERS, connections=CONNECTIONS)
        self.cakefs = Cakefs(directory, hub.endpoint, CAKEFS_CONFIG=config).provoking("a transfer process ended")

    def path(self, name: str) -> Path:
        return self.cakefs.mountpoint / name / "model.safetensors"

    def local(self, name: str) -> int:
        """Bytes of the file that are in the store."""
        return int(os.getxattr(self.path(name), "user.cakefs.local_bytes"))

    def mount(self, *flags: str) -> Running:
        self.cakefs.run("mount", *flags, str(self.cakefs.mountpoint))
        running = Running(self.cakefs)
        assert "--offline" in flags or eventually(lambda: len(running.workers()) == WORKERS)
        return running

    @contextmanager
    def reading(self, name: str) -> Iterator[list[OSError]]:
        """A program that reads the file from end to end meanwhile; gives the error it ends with."""
        errors: list[OSError] = []

        def read() -> None:
            try:
                self.path(name).read_bytes()
            except OSError as error:
                errors.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        try:
            yield errors
        finally:
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def place(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(tmp_path_factory.mktemp("crash"), hub)
    for name, published in MODELS.items():
        hub.add_repo(name, {"config.json": CONFIG, "model.safetensors": published()})
    with world.cakefs.mounted():
        world.cakefs.add_all(MODELS)
        yield world


@pytest.fixture
def world(place: World) -> World:
    """Mounted, whatever the test before left."""
    if place.cakefs.status_or_none() is None:
        place.mount()
    assert eventually(lambda: len(Running(place.cakefs).workers()) == WORKERS)
    place.hub.shape()
    return place


def begun(world: World, name: str) -> bool:
    return world.hub.sent(f"{name}/*") > 0


def half_done(world: World, name: str) -> bool:
    return world.hub.sent(f"{name}/*") > 4_000_000


def sealing(world: World, name: str) -> bool:
    """A blob that has a partial for its other name."""
    return any(path.stat().st_nlink > 1 for path in (world.cakefs.store / "blobs").glob("??/*"))


POINTS = {"begun": begun, "half": half_done, "sealing": sealing}


@pytest.mark.parametrize("name", KILLS)
def test_a_kill_in_the_middle_of_a_fetch_loses_nothing_that_had_come(world: World, name: str) -> None:
    published, point = MODELS[name](), POINTS[Path(name).name.partition("-")[0]]
    running = Running(world.cakefs)
    world.hub.reset()
    world.hub.shape(rate=LINK)
    with world.reading(name) as errors:
        assert eventually(lambda: point(world, name), every=0)
        running.kill(group=name.endswith("group"))
    assert errors or point is sealing
    with pytest.raises(OSError, match=r"not connected|abort") as raised:
        os.statvfs(world.cakefs.mountpoint)
    assert {error.errno for error in [*errors, raised.value]} <= {errno.ENOTCONN, errno.ECONNABORTED}
    world.hub.shape()
    world.mount()
    local, sent = world.local(name), world.hub.sent(f"{name}/*")
    assert sent - local < FLIGHTS * CHUNK, "of each flight at most the chunk in the air"
    world.hub.reset()
    assert world.path(name).read_bytes() == published
    assert world.hub.sent(f"{name}/*") == len(published) - local
    assert eventually(lambda: is_verified(world.path(name))), "sealed and confirmed, too"


def test_the_second_load_asks_nothing_after_umount_after_a_crash_and_offline(world: World) -> None:
    name, published = "org/kept", MODELS["org/kept"]()
    assert world.path(name).read_bytes() == published
    assert eventually(lambda: is_verified(world.path(name)))
    world.hub.reset()
    Running(world.cakefs).kill()
    world.mount()
    assert world.path(name).read_bytes() == published
    world.cakefs.run("umount", str(world.cakefs.mountpoint))
    world.mount("--offline")
    assert world.path(name).read_bytes() == published
    assert (world.cakefs.mountpoint / name / "config.json").read_bytes() == CONFIG
    world.cakefs.run("umount", str(world.cakefs.mountpoint))
    assert world.hub.requests == []


def test_a_killed_transfer_process_is_replaced_and_no_reader_notices(world: World) -> None:
    name, published = "org/worker", MODELS["org/worker"]()
    running = Running(world.cakefs)
    world.hub.reset()
    world.hub.shape(rate=LINK)
    with world.reading(name) as errors:
        assert eventually(lambda: begun(world, name))
        os.kill(running.workers()[0], signal.SIGKILL)
    assert errors == []
    assert world.path(name).read_bytes() == published
    assert world.cakefs.status()["worker_deaths"] == 1
    assert world.hub.sent(f"{name}/*") - len(published) < CONNECTIONS * CHUNK
    assert eventually(lambda: len(running.workers()) == WORKERS)


def test_a_second_mount_at_the_same_place_is_refused(world: World) -> None:
    before = world.cakefs.status()["pid"]
    done = world.cakefs.run("mount", str(world.cakefs.mountpoint), check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"error: a cakefs is already mounted at {world.cakefs.mountpoint}",
        f"hint: `cakefs umount {world.cakefs.mountpoint}` first",
    ]
    assert world.cakefs.status()["pid"] == before


def test_the_end_of_a_mount_in_the_middle_of_a_fetch_leaves_no_process(world: World) -> None:
    """Asked to, that is: by two signals, of which the second waits for no reader."""
    name = "org/ended"
    running = Running(world.cakefs)
    pids = [running.pid, *running.workers()]
    world.hub.reset()
    world.hub.fault("stall", f"{name}/*", times=None, after=CHUNK)
    with world.reading(name) as errors:
        assert eventually(lambda: begun(world, name))
        os.kill(running.pid, signal.SIGTERM)
        os.kill(running.pid, signal.SIGINT)
        assert eventually(lambda: not any(map(alive, pids)))
    world.hub.clear_faults()
    assert len(errors) == 1
    assert os.listdir(world.cakefs.mountpoint) == []


def test_a_tensor_of_two_models_is_stored_once(world: World) -> None:
    before = stored(world)
    paths = [world.path("org/one"), world.path("org/two")]
    for path in paths:
        path.read_bytes()
    assert eventually(lambda: all(map(is_verified, paths)))
    assert stored(world) - before == SHARED.nbytes + OWN.nbytes


def stored(world: World) -> int:
    return sum(path.stat().st_size for path in (world.cakefs.store / "blobs").glob("??/*"))


# A disk that is full

DISK = 16 * 2**20
INODES = 500


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system."""
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small file system")
    with small_disk(tmp_path / "disk", f"{DISK},nr_inodes={INODES}") as path:
        yield path


def fill(disk: Path, *, but: int = 0, inodes: bool = False) -> Path:
    """Takes all the room but so many bytes."""
    filler = disk / f"filler-{but}"
    filler.mkdir()
    for number in range(os.statvfs(disk).f_favail if inodes else 1):
        (filler / str(number)).write_bytes(b"")
    (filler / "0").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - but))
    return filler


def test_reads_are_right_on_a_full_disk_and_kept_once_there_is_room(hub: Hub, disk: Path, tmp_path: Path) -> None:
    cakefs = Cakefs(tmp_path, hub.endpoint, CAKEFS_CONFIG=write_config(tmp_path, read_timeout_s=5))
    cakefs.provoking("the store is full", "No space left on device", "not sealed, still served", "cannot confirm")
    cakefs.store = disk / "store"
    cakefs.environment["CAKEFS_STORE"] = str(cakefs.store)
    path = cakefs.mountpoint / "org/full/model.safetensors"
    published = layers(90_000, 3)
    for name in ("org/full", "org/other"):
        hub.add_repo(name, {"config.json": CONFIG + name.encode(), "model.safetensors": published})
    cakefs.run("add", "org/full")

    nearly = fill(disk, but=2 * CHUNK)
    with cakefs.mounted():
        assert path.read_bytes() == published
        drop_pages(path)
        assert path.read_bytes() == published
        local = int(os.getxattr(path, "user.cakefs.local_bytes"))
        assert 0 < local < len(published)
        assert cakefs.log().count("the store is full") == 1

    wholly = fill(disk, inodes=True)
    done = cakefs.run("add", "org/other", check=False)
    assert (done.returncode, done.stdout) == (30, "")
    assert [line.partition(":")[0] for line in done.stderr.splitlines()] == ["error", "hint"]
    with cakefs.mounted():
        assert os.listdir(cakefs.mountpoint / "org") == ["full"]
        assert path.read_bytes() == published

        shutil.rmtree(wholly)
        shutil.rmtree(nearly)
        hub.reset()
        cakefs.run("pull", "org/full")
        assert hub.sent("org/full/*.safetensors") == len(published) - local
        hub.reset()
        drop_pages(path)
        assert path.read_bytes() == published
        assert hub.requests == []


def drop_pages(path: Path) -> None:
    """The kernel's, so that the next read is one of the mount's."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
