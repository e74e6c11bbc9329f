"""Reads of a model that is all local: against the native file, and against the least that a FUSE server does."""

import os
import random
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.bench import data, world
from tests.bench.measure import LOAD_GGUF, Result, cpu_seconds, interleaved, loading, row, rss_bytes, timed
from tests.bench.readers import drop_cache, read_all, tensors_all

MODEL, GGUF_MODEL = "bench/local", "bench/gguf"
WEIGHTS = "model.safetensors"


def local_model(work: Path) -> tuple[Path, dict[str, str]]:
    """Models that are all in a store: the file of the first as published, and the environment of that store."""
    native, store = work / "repos" / MODEL / WEIGHTS, work / "store"
    if not native.exists():
        data.write_llama(native.parent, layers=24)
        data.write_gguf(work / "repos" / GGUF_MODEL / "x.gguf")
        with world.hub_process(work / "repos") as endpoint:
            env = world.environment(store, endpoint)
            for name in (MODEL, GGUF_MODEL):
                world.cakefs(env, "add", name)
                world.cakefs(env, "pull", name)
    return native, world.environment(store)


def warm_loads(work: Path, rounds: int) -> Iterator[Result]:
    """What the kernel has already: the daemon is not asked. Native files on a disk (large folios) and on tmpfs."""
    native, env = local_model(work)
    there = work / "mnt"
    with ExitStack() as stack:
        stack.enter_context(world.mounted(env, there, "--offline"))
        stack.enter_context(world.passthrough(native, work / "plain"))
        memory = stack.enter_context(_in_memory(native))
        mine, plain = there / MODEL / WEIGHTS, work / "plain" / WEIGHTS
        asked = 0

        def warm(path: Path, action: Callable[[], float]) -> float:
            """The kernel drops what nobody looked at for minutes: each file is read once more just before it counts."""
            nonlocal asked
            read_all(path)
            before = world.status(there)["mount"]["reads"]
            seconds = action()
            asked += world.status(there)["mount"]["reads"] - before
            return seconds

        def reading(path: Path, reader: Callable[[Path], int]) -> Callable[[], float]:
            return lambda: warm(path, lambda: timed(lambda: [reader(path) for _ in range(3)]) / 3)

        loading(mine.parent)
        files = {"cakefs": mine, "disk": native, "tmpfs": memory}
        samples = interleaved({k: reading(p, read_all) for k, p in files.items()}, rounds)
        for other in ("tmpfs", "disk"):
            yield row(f"warm re-read, read(): time / native on {other}", samples, "cakefs", other, 1.05)
        files = {"cakefs": mine, "pass-through": plain, "tmpfs": memory}
        samples = interleaved({k: reading(p, tensors_all) for k, p in files.items()}, rounds)
        yield row("warm safe_open of all tensors: time / pass-through FUSE", samples, "cakefs", "pass-through", 1.02)
        files = {"cakefs": mine, "disk": native, "tmpfs": memory}
        variants = {k: (lambda p=p: warm(p, lambda: loading(p.parent))) for k, p in files.items()}
        samples = interleaved(variants, rounds)
        for other in ("tmpfs", "disk"):
            yield row(f"warm re-load by transformers: time / native on {other}", samples, "cakefs", other, 1.05)
        on_disk = work / "repos" / GGUF_MODEL / "x.gguf"
        files = {"cakefs": there / GGUF_MODEL / "x.gguf", "disk": on_disk}
        files["tmpfs"] = stack.enter_context(_in_memory(on_disk))
        variants = {k: (lambda p=p: warm(p, lambda: loading(p, LOAD_GGUF))) for k, p in files.items()}
        samples = interleaved(variants, rounds)
        for other in ("tmpfs", "disk"):
            yield row(f"warm re-load by llama.cpp: time / native on {other}", samples, "cakefs", other, 1.05)
        yield Result("READ requests that the daemon saw in all this", "0", float(asked), asked == 0, "", {})


@contextmanager
def _in_memory(native: Path) -> Iterator[Path]:
    """The same model on tmpfs, whose pages are of 4 KiB as those of FUSE are."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="cakefs-bench-") as directory:
        shutil.copytree(native.parent, directory, dirs_exist_ok=True)
        yield Path(directory) / native.name


def cold_reads(work: Path, rounds: int) -> Iterator[Result]:
    """Local blobs that the kernel does not have in its cache of the mount; then not in any cache."""
    native, env = local_model(work)
    size = native.stat().st_size
    mine, plain = work / "mnt" / MODEL / WEIGHTS, work / "plain" / WEIGHTS
    for kilobytes in (128, 1024):
        with ExitStack() as stack:
            pid = stack.enter_context(world.mounted(env, work / "mnt", "--offline", read_ahead_kb=kilobytes))
            plain_pid = stack.enter_context(world.passthrough(native, work / "plain", read_ahead_kb=kilobytes))
            behind = [native, *blobs_of(work)]
            for what, reader in (("read()", read_all), ("safe_open of all tensors", tensors_all)):
                ours, theirs = ColdRead(mine, pid, reader, behind), ColdRead(plain, plain_pid, reader, behind)
                samples = interleaved({"cakefs": ours, "pass-through": theirs}, rounds, memory=size)
                name = f"local blobs, cold FUSE cache, {what}, {kilobytes} KiB readahead: time / pass-through"
                found = row(name, samples, "cakefs", "pass-through", 1.05)
                found.detail += f"; {size / min(samples['cakefs']) / 2**30:.2f} GiB/s"
                found.detail += f"; daemon CPU s/GiB {ours.cpu(size):.2f} vs {theirs.cpu(size):.2f}"
                yield found
    yield from _cold_disk(work, env, native, rounds)


def _cold_disk(work: Path, env: dict[str, str], native: Path, rounds: int) -> Iterator[Result]:
    mine, blobs = work / "mnt" / MODEL / WEIGHTS, blobs_of(work)
    with world.mounted(env, work / "mnt", "--offline"):

        def cold(path: Path, behind: list[Path]) -> float:
            for file in [path, *behind]:
                drop_cache(file)
            return timed(lambda: read_all(path))

        variants = {"cakefs": lambda: cold(mine, blobs), "native": lambda: cold(native, [])}
        samples = interleaved(variants, rounds, memory=2 * native.stat().st_size)
    yield row("blobs on a cold disk, read(): time / native", samples, "cakefs", "native", 1.25)


def blobs_of(work: Path) -> list[Path]:
    """Where the bytes of the local models are."""
    return [path for path in (work / "store/blobs").rglob("*") if path.is_file()]


class ColdRead:
    """One read of a whole file whose pages the kernel dropped before, and what it cost the server.

    Args:
        behind: Files that the server reads from; the kernel is made to have them.
    """

    def __init__(self, path: Path, server: int, reader: Callable[[Path], int], behind: list[Path]) -> None:
        self._path, self._server, self._reader, self._behind = path, server, reader, behind
        self._spent: list[float] = []

    def __call__(self) -> float:
        _only(self._path, self._behind)
        before = cpu_seconds(self._server)
        seconds = timed(lambda: self._reader(self._path))
        self._spent.append(cpu_seconds(self._server) - before)
        return seconds

    def cpu(self, size: int) -> float:
        """Least CPU seconds of the server per GiB."""
        return min(self._spent) / size * 2**30


def random_reads(work: Path, rounds: int) -> Iterator[Result]:
    """4 KiB at random places of local blobs, kernel cache cold; and several readers of the whole file at once."""
    native, env = local_model(work)
    with ExitStack() as stack:
        pid = stack.enter_context(world.mounted(env, work / "mnt", "--offline", read_ahead_kb=128))
        stack.enter_context(world.passthrough(native, work / "plain", read_ahead_kb=128))
        mine, plain = work / "mnt" / MODEL / WEIGHTS, work / "plain" / WEIGHTS
        behind = [native, *blobs_of(work)]
        for readers in (1, 4):
            samples = interleaved(
                {
                    "cakefs": lambda r=readers: _median_of_pages(mine, r, behind),  # type: ignore[misc]
                    "pass-through": lambda r=readers: _median_of_pages(plain, r, behind),  # type: ignore[misc]
                },
                rounds,
            )
            yield row(
                f"random 4 KiB, {readers} readers, p50: cakefs / pass-through", samples, "cakefs", "pass-through", 2
            )
        yield from _together(mine, rounds, behind)
        rss = rss_bytes(pid) / 1e6
        yield Result("daemon RSS after all this, MB", "<= 200", rss, rss <= 200, "", {})


PAGES = 400


def _median_of_pages(path: Path, readers: int, behind: list[Path]) -> float:
    """Median seconds of one pread of a page that the kernel has behind the mount only."""
    _only(path, behind)
    pages = path.stat().st_size // 4096
    seconds: list[float] = []

    def read(seed: int) -> None:
        places = random.Random(seed).sample(range(pages), PAGES)
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        for place in places:
            start = time.perf_counter()
            os.pread(fd, 4096, place * 4096)
            seconds.append(time.perf_counter() - start)
        os.close(fd)

    _threads(readers, read)
    return statistics.median(seconds)


def _only(path: Path, behind: list[Path]) -> None:
    """Has the kernel have what is behind a file, and not the file."""
    drop_cache(path)
    for file in behind:
        read_all(file)


def _together(path: Path, rounds: int, behind: list[Path]) -> Iterator[Result]:
    """Four readers of the whole file at once against one; the worst of them against their median."""
    each: list[list[float]] = []

    def four() -> float:
        _only(path, behind)
        spent = [0.0] * 4

        def read(reader: int) -> None:
            spent[reader] = timed(lambda: read_all(path))

        total = timed(lambda: _threads(4, read))
        each.append(spent)
        return total

    def one() -> float:
        _only(path, behind)
        return timed(lambda: read_all(path))

    samples = interleaved({"four": four, "one": one}, rounds, memory=path.stat().st_size)
    yield row("four readers of a file at once / one reader, time for all", samples, "four", "one", 4)
    unfair = statistics.median(max(spent) / statistics.median(spent) for spent in each[1:])
    yield Result("slowest of the four / their median", "<= 3.00", unfair, unfair <= 3, "", {})


def _threads(count: int, work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
