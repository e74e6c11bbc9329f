"""Two real mounts of one store below a limit: one is killed again and again, the other must live and leak nothing.

Readers, loaders, commands, a killer and the weather of the network run in threads until the time is over. What may
fail is said where it is done; a wrong byte never may, nor a read that takes longer than the bound.
"""

import errno
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cakefs.fs.ops import FAILURE_PAUSE_S
from cakefs.model import CHUNK, MIB
from tests.fs_child import eventually
from tests.hub import Hub
from tests.mounts import SURVIVED, Cakefs, write_config
from tests.stress.truth import CORRUPTED, WEIGHTS, Shown, truth

TIMEOUT_S = 4.0
# The kernel asks up to three times, the daemon pauses before each failure, and the machine is busy with all the others.
BOUND_S = 3 * (TIMEOUT_S + FAILURE_PAUSE_S) + 6.0
LIMIT = 50 * MIB  # Of about 90 MB.
WORKERS = 2
RSS_SLACK = 80 * MIB  # Buffers of reads at once, chunks held while the store is full.
THREAD_SLACK = 8  # Idle threads of a pool live for 10 s.
LOGGED = 40
FAILED = {errno.ETIMEDOUT}  # What a read may end with while the network is broken.
DEAD = {errno.ENOTCONN, errno.ECONNABORTED, errno.ENOENT, errno.ENODEV, errno.EIO}  # As well, under the one killed.
EXIT_CODES = {0, 12, 13, 30}  # Of commands: done, upstream failed, nothing more fits.
LOADER = """
import mmap, sys
with open(sys.argv[1], "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
    with open(sys.argv[2], "rb") as expected:
        sys.exit(0 if mapped[:] == expected.read() else 5)
"""


class Footprint(dict[str, int]):
    """What a daemon takes, now."""

    @classmethod
    def of(cls, pid: int) -> "Footprint":
        status = Path(f"/proc/{pid}/status").read_text().split()
        return cls(
            fds=len(os.listdir(f"/proc/{pid}/fd")),
            rss=int(status[status.index("VmRSS:") + 1]) * 1024,
            threads=len(os.listdir(f"/proc/{pid}/task")),
            children=len(children(pid)),
        )

    @classmethod
    def least(cls, pid: int, seconds: int) -> "Footprint":
        """What it keeps, without what it had only for a while, such as the process that counts sizes."""
        seen = [cls.of(pid)]
        for _ in range(4 * seconds):
            time.sleep(0.25)
            seen.append(cls.of(pid))
        return cls({name: min(footprint[name] for footprint in seen) for name in seen[0]})

    def __str__(self) -> str:
        return ", ".join(f"{k} {v / MIB:.0f} MiB" if k == "rss" else f"{k} {v}" for k, v in self.items())


def children(pid: int) -> list[int]:
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if int(Path(f"/proc/{name}/stat").read_text().rpartition(") ")[2].split()[1]) == pid:
                found.append(int(name))
    return found


class Unheard(Cakefs):
    """Its upstream is broken all the time: what it warns of is no news."""

    def warned(self, text: str) -> None:
        pass


class Soak:
    """The world, what was counted, and what did not hold."""

    def __init__(self, directory: Path, hub: Hub, seed: int) -> None:
        self.hub = hub
        self.seed = seed
        self.counts: Counter[str] = Counter()
        self.violations: list[str] = []
        self.logged: list[str] = []  # Of the steady daemon, about reads that failed.
        self.longest = 0.0
        self.over = threading.Event()
        self._lock = threading.Lock()
        self.repos, self.shown = truth()
        config = write_config(directory, read_timeout_s=TIMEOUT_S, workers=WORKERS, connections=3)
        environment = {"CAKEFS_CONFIG": config, "PYTHONPATH": str(Path(__file__).parents[2])}
        self.killed = Unheard(directory, hub.endpoint, **environment)
        self.steady = directory / "steady"
        self.truths = directory / "truths"
        self.log = directory / "steady.log"

    def bad(self, text: str) -> None:
        with self._lock:
            self.violations.append(f"{time.strftime('%H:%M:%S')} {text}")

    def count(self, **numbers: int) -> None:
        with self._lock:
            self.counts.update(numbers)

    # Mounts

    def prepare(self) -> None:
        for name, files in self.repos.items():
            self.hub.add_repo(name, files)
        self.killed.add_all(self.repos)
        self.truths.mkdir()
        for number, shown in enumerate(self.shown):
            (self.truths / str(number)).write_bytes(shown.data)

    @contextmanager
    def mounts(self) -> Any:
        command = [sys.executable, "-m", "tests.stress.daemon", "mount", "-f", f"--limit={LIMIT}", str(self.steady)]
        self.mount_killed()
        with self.log.open("w") as log:
            self.daemon = subprocess.Popen(command, env=self.killed.environment, stderr=log)
            try:
                assert eventually(lambda: os.path.ismount(self.steady), 60), self.log.read_text()
                yield
            finally:
                self.daemon.terminate()
                self.daemon.wait(60)
                done = self.killed.run("umount", str(self.killed.mountpoint), check=False)
                if done.returncode:
                    self.bad(f"umount: {done.stderr}")
                    subprocess.run(["fusermount3", "-uz", str(self.killed.mountpoint)], capture_output=True)

    def mount_killed(self) -> None:
        self.killed.run("mount", f"--limit={LIMIT}", str(self.killed.mountpoint))

    # Actors; each is called again and again

    def read(self, dice: random.Random) -> None:
        """Some reads of one file of one mount; each is compared."""
        steady = dice.random() < 0.6
        shown = dice.choice(self.shown)
        mountpoint = self.steady if steady else self.killed.mountpoint
        allowed = FAILED if steady else FAILED | DEAD
        try:
            with self._timed(f"open {shown.path}"):
                fd = os.open(mountpoint / shown.path, os.O_RDONLY)
        except OSError as error:
            return self._failed(error, allowed, shown, steady)
        try:
            for _ in range(dice.randint(1, 12)):
                self._read_one(dice, fd, shown)
        except OSError as error:
            self._failed(error, allowed, shown, steady)
        finally:
            os.close(fd)

    def _read_one(self, dice: random.Random, fd: int, shown: Shown) -> None:
        offset = dice.randrange(len(shown.data))
        size = dice.choice([1, 4096, 70_000, CHUNK, 3 * CHUNK])
        if dice.random() < 0.3:  # So that the daemon is asked, and not the kernel's memory.
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        stop = min(offset + size, len(shown.data))
        while offset < stop:  # An error in the middle is a short read, and an error at the next.
            with self._timed(f"read {shown.path} at {offset}", stop - offset):
                got = os.pread(fd, stop - offset, offset)
            if not got or got != shown.data[offset : offset + len(got)]:
                return self.bad(f"WRONG BYTES: {shown.path} at {offset}, {len(got)} of {stop - offset}")
            self.count(reads=1, bytes=len(got))
            offset += len(got)

    @contextmanager
    def _timed(self, what: str, size: int = 0) -> Any:
        """Holds it to the bound, which is that of one request: the kernel makes one of each MiB."""
        began = time.monotonic()
        try:
            yield
        finally:
            took, bound = time.monotonic() - began, BOUND_S * (1 + size // MIB)
            self.longest = max(self.longest, took)
            if took > bound:
                self.bad(f"{what} took {took:.1f} s, more than {bound:.1f} s")

    def _failed(self, error: OSError, allowed: set[int], shown: Shown, steady: bool) -> None:
        self.count(failed_reads=1)
        if error.errno not in allowed:
            self.bad(f"{'steady' if steady else 'killed'} mount: {shown.path}: {error}")
        time.sleep(0.05)

    def load(self, dice: random.Random) -> None:
        """A process that maps a whole file; SIGBUS is what a page that cannot be had is."""
        number = dice.randrange(len(self.shown))
        steady = dice.random() < 0.5
        path = (self.steady if steady else self.killed.mountpoint) / self.shown[number].path
        done = subprocess.run(
            [sys.executable, "-S", "-c", LOADER, str(path), str(self.truths / str(number))], capture_output=True
        )
        if done.returncode == 5:
            self.bad(f"WRONG BYTES: {self.shown[number].path} mapped")
        elif done.returncode not in ((0, 1, -signal.SIGBUS) if not steady else (0, -signal.SIGBUS)):
            self.bad(f"loader of {path}: {done.returncode} {done.stderr.decode()[-300:]}")
        self.count(loads=1, bytes=len(self.shown[number].data) if done.returncode == 0 else 0)

    def command(self, dice: random.Random) -> None:
        """A command as users type them, sometimes killed."""
        name = dice.choice(sorted(self.repos))
        arguments = dice.choice(
            [["pull", name], ["pull", name], ["evict", name], ["gc"], ["ls"], ["verify", name], ["add", name]]
        )
        command = [sys.executable, "-m", "cakefs", *arguments]
        process = subprocess.Popen(
            command, env=self.killed.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        if dice.random() < 0.25:
            time.sleep(dice.random())
            process.kill()
            self.count(kills=1)
        said = process.communicate()[1]
        code = process.returncode
        if re.search(SURVIVED, said) or code not in EXIT_CODES | {-signal.SIGKILL}:
            self.bad(f"cakefs {' '.join(arguments)}: exit {code}: {said[-500:]}")
        self.count(commands=1)

    def kill(self, dice: random.Random) -> None:
        """The daemon of one mount, which is mounted again; or transfer processes of either."""
        time.sleep(dice.uniform(1, 4))
        status = self.killed.status_or_none()
        if status is None:
            self.bad("the mount that is killed did not answer though it was not killed")
        elif dice.random() < 0.5:
            os.kill(status["pid"], signal.SIGKILL)
            self.count(kills=1)
            time.sleep(dice.random())
            self.mount_killed()
        else:
            pid = dice.choice([status["pid"], self.daemon.pid])
            for worker in children(pid)[: dice.randint(1, 2)]:
                with suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
                    self.count(kills=1)

    def weather(self, dice: random.Random) -> None:
        """What a network and a server do to some of the answers."""
        kinds = ["drop", "reset", "500", "503", "slow", "short", "expired", "429", "stall", "outage", "links"]
        kind = dice.choice(kinds)
        self.count(faults=1)
        self.hub.clear_faults()  # Those that nothing met would pile up, until no budget of retries outlives them.
        times = dice.randint(1, 3)
        if kind == "outage":
            self.hub.down()
            time.sleep(dice.uniform(0.1, 1.0))
            self.hub.up()
        elif kind == "links":
            self.hub.expire_links()
        elif kind == "429":
            self.hub.fault(kind, times=times, stage="resolve", retry_after=0.3)
        elif kind == "expired":  # Once: what is refused again and again though it is resolved anew is refused for good.
            self.hub.fault(kind)
        elif kind.isdigit():
            self.hub.fault(kind, times=times)
        elif kind == "stall":
            self.hub.fault(kind, times=1, after=dice.randrange(CHUNK), seconds=1.0)
        else:
            self.hub.fault(kind, times=times, after=dice.randrange(CHUNK), **({"rate": 2e6} if kind == "slow" else {}))
        time.sleep(dice.uniform(0.1, 1.0))

    def corrupt(self, dice: random.Random) -> None:
        """Wrong bytes from upstream: gone from the store and from the kernel once the file is confirmed."""
        path = self.steady / CORRUPTED / WEIGHTS
        data = self.repos[CORRUPTED][WEIGHTS]
        fault = self.hub.fault("corrupt", f"{CORRUPTED}/{WEIGHTS}", position=dice.randrange(len(data)))
        done = self.killed.run("pull", CORRUPTED, check=False)
        self.count(faults=min(1, fault.hits))
        if done.returncode == 0 and eventually(lambda: os.getxattr(path, "user.cakefs.verified") == b"yes", 5):
            with suppress(TimeoutError):
                if not eventually(lambda: path.read_bytes() == data, 10):
                    self.bad(f"WRONG BYTES: {path} though it is confirmed")
        self.killed.run("evict", CORRUPTED, check=False)
        time.sleep(dice.random())

    # The run

    def run(self, seconds: float) -> None:
        actors: list[Callable[[random.Random], None]] = [self.read] * 4
        actors += [self.load, self.command, self.command, self.kill, self.weather, self.corrupt]
        threads = [threading.Thread(target=self._act, args=(i, actor)) for i, actor in enumerate(actors)]
        for thread in threads:
            thread.start()
        self.over.wait(seconds)
        self.over.set()
        for thread in threads:
            thread.join(120)
            if thread.is_alive():
                self.bad(f"{thread.name} hangs")

    def _act(self, number: int, actor: Callable[[random.Random], None]) -> None:
        dice = random.Random(f"{self.seed} {number}")
        while not self.over.is_set():
            try:
                actor(dice)
            except Exception as error:
                self.bad(f"{actor.__name__}: {error!r}")

    def calm(self) -> None:
        """With all faults over every byte can be had, under both mounts; nothing is damaged; nothing is on its way."""
        self.hub.clear_faults()
        self.hub.up()
        for mountpoint in (self.steady, self.killed.mountpoint):
            for shown in self.shown:
                if (mountpoint / shown.path).read_bytes() != shown.data:
                    self.bad(f"WRONG BYTES at the end: {mountpoint / shown.path}")
        done = self.killed.run("verify", check=False)
        if done.returncode:
            self.bad(f"verify at the end: {done.stdout}{done.stderr}")

    def settled(self) -> Footprint:
        """Of the steady daemon, once it has nothing to do."""
        status = self.steady / ".cakefs/status.json"
        idle = '"chunks_on_their_way": 0'
        if not eventually(lambda: idle in status.read_text().replace("\n", " "), 30):
            self.bad("chunks are on their way though nobody reads")
        time.sleep(6)  # Longer than files without a reader stay open (daemon.py), and a look for them.
        return Footprint.least(self.daemon.pid, 5)


def soak(seconds: float, directory: Path, seed: int) -> Soak:
    """Runs it and prints the summary."""
    with Hub() as hub:
        world = Soak(directory, hub, seed)
        world.prepare()
        with world.mounts():
            world.calm()
            before = world.settled()
            world.run(seconds)
            world.calm()
            after = world.settled()
        world.logged = [line for line in world.log.read_text().splitlines() if "cannot read" in line][-LOGGED:]
        for line in filter(re.compile(SURVIVED).search, (world.log.read_text() + world.killed.log()).splitlines()):
            world.bad(f"in the log: {line}")
    for name, slack in (("fds", 4), ("rss", RSS_SLACK), ("threads", THREAD_SLACK), ("children", 0)):
        if after[name] > before[name] + slack:
            world.bad(f"{name} of the daemon grew from {before[name]} to {after[name]}")
    counted = ", ".join(f"{world.counts[name]} {name}" for name in ("reads", "loads", "commands", "kills", "faults"))
    print(f"soak of {seconds:.0f} s: {counted}, {world.counts['failed_reads']} reads failed as they may")
    compared = world.counts["bytes"] / MIB
    print(f"  compared {compared:.0f} MiB; longest wait {world.longest:.1f} s (bound {BOUND_S:.1f} s)")
    print(f"  daemon before: {before}")
    print(f"  daemon after:  {after}")
    for text in world.violations:
        print(f"  DID NOT HOLD: {text}")
    if world.violations:
        print("".join(f"  log: {line}\n" for line in world.logged))
    return world
