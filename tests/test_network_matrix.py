"""The network matrix: every fault x the first, a middle and the last chunk of a tensor x one reader and ten, through a
real mount.

A cell is a file of its own. The cells of a group fail at the same time, so each of them also shows that the others do
not block it; and beside them somebody reads another file all the while. Each group is run once, by its first test.
"""

import errno
import os
import random
import re
import shutil
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from cakefs.engine.fetch import READER_MARGIN_S
from cakefs.fs.ops import FAILURE_PAUSE_S
from cakefs.model import CHUNK
from tests.fs_child import eventually
from tests.hub import Hub
from tests.hub.odd import drip, encrypted, listening, self_signed, silent
from tests.models import single, tensor
from tests.mounts import UPSTREAM, Cakefs, needs_fuse, write_config

pytestmark = needs_fuse

TIMEOUT_S = 4.0
BOUND_S = TIMEOUT_S + READER_MARGIN_S + FAILURE_PAUSE_S + 10.0  # This machine may be busy.
# httpcore leaves the socket of a TLS handshake that is given up to the garbage collector, which closes it.
UNCLOSED = ("ResourceWarning: unclosed <socket", "ResourceWarning: Enable tracemalloc")
LAST = 40_960  # Size of the last chunk of a cell's tensor.
PAGE = 4096
PLACES = {"first": (0, CHUNK), "middle": (CHUNK, CHUNK), "last": (2 * CHUNK, LAST)}
READERS = (1, 10)


class Fault(NamedTuple):
    """What happens to a cell.

    Attributes:
        kind: As the test hub calls it, or an address that a file is redirected to.
        errno: What its readers get; 0 for the right bytes.
        says: Pattern of the cause in the log.
        options: Of the hub's fault; `inside` puts it that far into the chunk, `plain` takes a file of a plain server.
    """

    kind: str
    errno: int = 0
    says: str = ""
    options: Mapping[str, Any] = {}
    inside: int | None = None
    plain: bool = False


def lasting(kind: str, code: int, says: str, inside: int | None = None, plain: bool = False, **options: Any) -> Fault:
    return Fault(kind, code, says, {"times": None, **options}, inside, plain)


def passing(kind: str, inside: int | None = None, **options: Any) -> Fault:
    return Fault(kind, options=options, inside=inside)


LATE, STALE, BROKEN = errno.ETIMEDOUT, errno.ESTALE, errno.EIO
NOTHING = "no byte came in time|no connection in time|less than 1 MiB came"
HUB = {"stage": "resolve"}
CDN = {"stage": "cdn"}

SILENT = {
    "stall": lasting("stall", LATE, NOTHING),
    "stall-inside": lasting("stall", LATE, NOTHING, inside=20_000),
    "slow-loris-body": lasting("slow", LATE, NOTHING, rate=2000.0),
    "slow-loris-head": lasting("http://127.0.0.1:DRIP/x", LATE, NOTHING),
}
CUT = {
    "tls-hangs": lasting("https://localhost:SILENT/x", LATE, NOTHING),
    "tls-certificate": lasting("https://localhost:TLS/x", LATE, "TLS failed: self-signed certificate"),
    "tls-missing": lasting("https://localhost:DRIP/x", LATE, "TLS failed"),
    "no-such-host": lasting("http://no-such-host.invalid/x", LATE, "no answer from no-such-host.invalid"),
    "nobody-listens": lasting("http://127.0.0.1:CLOSED/x", LATE, "Connection refused"),
    "drop": lasting("drop", LATE, "no answer from .*disconnected"),
    "drop-inside": lasting("drop", LATE, "no answer from", inside=20_000),
    "reset": lasting("reset", LATE, "no answer from"),
    "reset-inside": lasting("reset", LATE, "no answer from", inside=20_000),
}
WRONG = {
    "short": lasting("short", LATE, "announced .* instead of", inside=20_000),
    "long": lasting("long", LATE, "announced .* instead of"),
    "wrong-range": lasting("wrong-range", LATE, "sent another range"),
    "200-instead-of-206": lasting("no-range", LATE, "ignored the range"),
    "packed": lasting("gzip-anyway", BROKEN, "gzip-encoded although plain bytes were asked for"),
    "changed-etag": lasting("etag", STALE, "its ETag is another one", plain=True),
}
REFUSED = {
    "links-always-expired": lasting("expired", BROKEN, r"refused .*403"),
    "401": lasting("401", BROKEN, "refused .*401", **HUB),
    "403": lasting("403", BROKEN, "refused .*403", **HUB),
    "404": lasting("404", BROKEN, "not found .*404", **HUB),
    "416": lasting("416", STALE, "no such range", **CDN),
    "429": lasting("429", LATE, "cannot serve .*429", **CDN),
    "500": lasting("500", LATE, "cannot serve .*500", **HUB),
    "503": lasting("503", LATE, "cannot serve .*503", **CDN),
    "redirect-loop": lasting("redirect-loop", BROKEN, "redirects"),
}
UNSEEN = {
    "latency": passing("stall", seconds=0.3, times=None),
    "one-stall": passing("stall", inside=20_000, seconds=TIMEOUT_S / 4),
    "one-slow": passing("slow", rate=4_000_000.0),
    "one-drop": passing("drop", inside=20_000),
    "one-reset": passing("reset", inside=20_000),
    "one-short": passing("short", inside=20_000),
    "one-long": passing("long"),
    "one-wrong-range": passing("wrong-range"),
}
REPEATED = {
    "one-200-instead-of-206": passing("no-range"),
    "one-429": passing("429", retry_after=0.2, **HUB),
    "one-500": passing("500", times=2),
    "one-503": passing("503", retry_after=0.2, **CDN),
    "link-expired": passing("expired"),
    "link-refused-401": passing("401", **CDN),
    "link-refused-404": passing("404", **CDN),
    "etag-of-the-cdn": passing("etag", times=None, **CDN),
}
# Fewer readers each than the requests that the kernel has on their way at once (fs/limits.py).
GROUPS = {
    "silent": SILENT,
    "cut": CUT,
    "wrong": WRONG,
    "refused": REFUSED,
    "unseen": UNSEEN,
    "repeated": REPEATED,
}


class Cell(NamedTuple):
    fault: str
    place: str
    readers: int

    def __str__(self) -> str:
        return f"{self.fault}-{self.place}-{self.readers}"

    @property
    def start(self) -> int:
        """Of the chunk, in the file."""
        return HEADER + PLACES[self.place][0]

    @property
    def size(self) -> int:
        return PLACES[self.place][1]

    def pages(self) -> list[int]:
        """Where its readers read: ten places over the whole chunk, or one amid it."""
        room = self.size - PAGE
        return [self.start + room * i // 9 for i in range(10)] if self.readers == 10 else [self.start + room // 2]


def cells(faults: Mapping[str, Fault]) -> list[Cell]:
    return [Cell(fault, place, readers) for fault in faults for place in PLACES for readers in READERS]


BASE = np.frombuffer(random.Random(8).randbytes(2 * CHUNK + LAST), np.uint8)


def weights(name: str) -> bytes:
    """One tensor of two chunks and a bit, every byte of it another one than at its place in most other files."""
    tensors = {"a": BASE + np.uint8(zlib.crc32(name.encode()) % 251)}
    data = single(tensors | {"name": np.frombuffer(f"{name:64}".encode(), np.uint8)})
    assert len(data) == HEADER + len(BASE) + 64
    return data


HEADER = len(single({"a": BASE, "name": np.zeros(64, np.uint8)})) - len(BASE) - 64


class Got(NamedTuple):
    """What came of one read: bytes or an errno."""

    data: bytes
    errno: int
    seconds: float


def read(path: Path, offset: int, size: int = PAGE) -> Got:
    """One pread, and with O_DIRECT one request of the kernel."""
    started, data, error = time.monotonic(), b"", 0
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        data = os.pread(fd, size, offset)
    except OSError as raised:
        error = raised.errno or -1
    finally:
        os.close(fd)
    return Got(data, error, time.monotonic() - started)


class Bystander:
    """Reads a file that nothing is wrong with, small tensor by small tensor, each never read before."""

    COUNT, SIZE = 400, 16_384

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = single({f"t{i:03}": tensor(i, self.SIZE // 4) for i in range(self.COUNT)})
        self.slowest = 0.0
        self.reads = 0
        self.wrong: list[Got] = []
        self._places = list(range(len(self.data) - self.COUNT * self.SIZE, len(self.data), self.SIZE))
        random.Random(1).shuffle(self._places)

    @contextmanager
    def reading(self) -> Iterator[None]:
        stop = threading.Event()

        def run() -> None:
            while self._places and not stop.wait(0.05):
                offset = self._places.pop()
                got = read(self.path, offset)
                self.reads += 1
                self.slowest = max(self.slowest, got.seconds)
                if got.data != self.data[offset : offset + PAGE]:
                    self.wrong.append(got)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


class Outcome(NamedTuple):
    """Of a cell: while the fault lasts, in the log, and of its chunk once the fault is gone."""

    got: list[Got]
    logged: list[str]
    afterwards: Got


class Group:
    """The cells of some faults, put into a world and run there."""

    def __init__(self, name: str, world: "World") -> None:
        self._world = world
        self._faults = GROUPS[name]
        self._repo = f"org/{name}"
        self._cells = [cell for cell in cells(self._faults) if world.possible(self._faults[cell.fault])]
        self.bystander = Bystander(world.cakefs.mountpoint / f"org/beside-{name}/model.safetensors")
        self.outcomes = self._run(world.hub)

    def _run(self, hub: Hub) -> dict[Cell, Outcome]:
        self._publish(hub)
        for cell in self._cells:
            self._spoil(hub, cell)
        reads = [(cell, page) for cell in self._cells for page in cell.pages()]
        with ThreadPoolExecutor(len(reads)) as pool, self.bystander.reading():
            got = list(pool.map(lambda r: read(self._path(r[0]), r[1]), reads))
        hub.clear_faults()
        log = self._world.cakefs.log().splitlines()
        with ThreadPoolExecutor(8) as pool:
            healed = list(pool.map(lambda cell: read(self._path(cell), cell.start, cell.size), self._cells))
        hub.remove_repo(self._repo)
        return {
            cell: Outcome(
                [g for (c, _), g in zip(reads, got, strict=True) if c == cell],
                [line for line in log if f"cannot read {self._model(cell)}/" in line],
                after,
            )
            for cell, after in zip(self._cells, healed, strict=True)
        }

    def _publish(self, hub: Hub) -> None:
        """Nobody else's patience: the faults are yet to come."""
        plain = [cell for cell in self._cells if self._faults[cell.fault].plain]
        urls = [hub.plain(f"{cell}/model.safetensors", weights(str(cell))) for cell in plain]
        others = {f"{cell}/model.safetensors": weights(str(cell)) for cell in self._cells if cell not in plain}
        beside = self.bystander.path.parent.relative_to(self._world.cakefs.mountpoint).as_posix()
        hub.add_repo(self._repo, others)
        hub.add_repo(beside, {"model.safetensors": self.bystander.data})
        self._world.cakefs.add_all([self._repo, beside, *urls], CAKEFS_CONFIG=os.devnull)

    def _spoil(self, hub: Hub, cell: Cell) -> None:
        fault = self._faults[cell.fault]
        path, options = f"{cell}/model.safetensors", dict(fault.options)
        if fault.inside is not None:
            options["position"] = cell.start + fault.inside
        if "://" in fault.kind:
            to = re.sub("[A-Z]+", lambda name: str(self._world.ports[name[0]]), fault.kind)
            hub.fault("redirect", path, to=to, **options)
        else:
            hub.fault(fault.kind, path, **options)

    def _model(self, cell: Cell) -> str:
        """What it is shown in."""
        return f"plain/{cell}" if self._faults[cell.fault].plain else f"{self._repo}/{cell}"

    def _path(self, cell: Cell) -> Path:
        return self._world.cakefs.mountpoint / self._model(cell) / "model.safetensors"


class World:
    """A mount, a hub, and servers by the name that stands for their port in an address above."""

    def __init__(self, hub: Hub, cakefs: Cakefs, ports: Mapping[str, int]) -> None:
        self.hub = hub
        self.cakefs = cakefs
        self.ports = ports
        self._groups: dict[str, Group] = {}

    def group(self, name: str) -> Group:
        if name not in self._groups:
            self._groups[name] = Group(name, self)
        return self._groups[name]

    def possible(self, fault: Fault) -> bool:
        return "TLS/" not in fault.kind or "TLS" in self.ports


@contextmanager
def odd_servers(directory: Path) -> Iterator[dict[str, int]]:
    """Ports by name; one of them has nobody behind it, and TLS needs a command that may not be here."""
    with ExitStack() as stack:
        ports = {"SILENT": stack.enter_context(listening(silent)), "DRIP": stack.enter_context(listening(drip))}
        with listening(silent) as closed:
            ports["CLOSED"] = closed
        if shutil.which("openssl"):
            ports["TLS"] = stack.enter_context(listening(encrypted(self_signed(directory))))
        yield ports


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("matrix")
    with Hub() as hub, odd_servers(directory) as ports:
        config = write_config(directory, read_timeout_s=TIMEOUT_S, connections=40)
        cakefs = Cakefs(directory, hub.endpoint, CAKEFS_CONFIG=config).provoking(UPSTREAM, *UNCLOSED)
        with cakefs.mounted("--no-on-demand"):
            yield World(hub, cakefs, ports)
        shutil.rmtree(cakefs.store)


def check(world: World, group: str, cell: Cell) -> None:
    fault, expected = GROUPS[group][cell.fault], weights(str(cell))
    if not world.possible(fault):
        pytest.skip("needs the openssl command to make a certificate")
    outcome = world.group(group).outcomes[cell]
    for page, got in zip(cell.pages(), outcome.got, strict=True):
        assert got.errno == fault.errno
        assert got.data == (b"" if fault.errno else expected[page : page + PAGE])
        assert got.seconds < BOUND_S
    if fault.errno:
        said = rf"/model\.safetensors, bytes \d+-\d+: .*({fault.says})"
        assert any(re.search(said, line) for line in outcome.logged), outcome.logged
    else:
        assert outcome.logged == []
    assert outcome.afterwards.data == expected[cell.start : cell.start + cell.size]
    assert outcome.afterwards.seconds < BOUND_S


def matrix(*groups: str) -> Callable[..., Any]:
    every = [(group, cell) for group in groups for cell in cells(GROUPS[group])]
    return pytest.mark.parametrize(("group", "cell"), every, ids=[str(cell) for _, cell in every])


@matrix("silent", "cut")
def test_what_does_not_come_is_a_timeout_in_time(world: World, group: str, cell: Cell) -> None:
    check(world, group, cell)


@matrix("wrong", "refused")
def test_a_wrong_answer_is_a_clear_errno_in_time(world: World, group: str, cell: Cell) -> None:
    check(world, group, cell)


@matrix("unseen", "repeated")
def test_what_passes_is_not_seen(world: World, group: str, cell: Cell) -> None:
    check(world, group, cell)


@pytest.mark.parametrize("group", GROUPS)
def test_another_file_is_served_all_the_while(world: World, group: str) -> None:
    bystander = world.group(group).bystander
    assert bystander.wrong == []
    assert bystander.reads > 5 and bystander.slowest < BOUND_S / 2


CORRUPT = [Cell("corrupt", place, readers) for place in PLACES for readers in READERS]


@pytest.fixture(scope="module")
def corrupt(world: World) -> Path:
    """A model whose files come wrong the first time."""
    world.hub.add_repo("org/corrupt", {f"{cell}/model.safetensors": weights(str(cell)) for cell in CORRUPT})
    world.cakefs.add_all(["org/corrupt"], CAKEFS_CONFIG=os.devnull)
    for cell in CORRUPT:
        world.hub.fault("corrupt", f"{cell}/*", position=cell.start + 20_000)
    return world.cakefs.mountpoint / "org/corrupt"


@pytest.mark.parametrize("cell", CORRUPT, ids=str)
def test_corrupt_bytes_are_replaced_once_the_file_is_complete(world: World, corrupt: Path, cell: Cell) -> None:
    """They are not to be known before; then the blob is put away, and what the kernel remembers of it goes, too."""
    path, quarantine = corrupt / str(cell) / "model.safetensors", world.cakefs.store / "quarantine"
    before = len(list(quarantine.iterdir()))
    with ThreadPoolExecutor(cell.readers) as pool:
        list(pool.map(lambda _: path.read_bytes(), range(cell.readers)))
    assert eventually(lambda: len(list(quarantine.iterdir())) > before)
    assert eventually(lambda: path.read_bytes() == weights(str(cell)))
    assert eventually(lambda: os.getxattr(path, "user.cakefs.verified") == b"yes")
    assert f"/{cell}/model.safetensors came wrong" in world.cakefs.log()


def test_the_mount_has_seen_no_bug(world: World) -> None:
    """Last in this file: it has been through all of the above."""
    assert world.cakefs.status()["worker_deaths"] == 0
    assert "Signature=" not in world.cakefs.log(), "a signed URL is a password"
