"""What is on this machine already, and back: `import` against the hash that it has to compute, `export` against cp."""

import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.bench import data, world
from tests.bench.measure import Result, interleaved, ratio, timed
from tests.bench.readers import drop_cache, read_all
from tests.disks import NoDisk, disk_in_a_file, used

GB = 1_000_000_000
LAYER_BYTES = 73_408_512  # Of `data.write_llama` as it is used here.
EXPORTED_LAYERS = 57  # 4.2 GB
REPOS = ("bench/one", "bench/two")  # Files are hashed side by side.


class Costed:
    """A command to be timed: its seconds, and the CPU seconds of what it started.

    Args:
        before: Makes things as they were, and is not counted.
    """

    def __init__(self, command: Callable[[], object], before: Callable[[], object] = lambda: None) -> None:
        self._command, self._before = command, before
        self._cpu: list[float] = []

    def __call__(self) -> float:
        self._before()
        start = os.times()
        seconds = timed(self._command)
        end = os.times()
        self._cpu.append(sum(end[:4]) - sum(start[:4]))
        return seconds

    def cpu(self, size: int) -> str:
        return f"{statistics.median(self._cpu[1:]) / size * GB:.2f} CPU s/GB"


def importing(work: Path, rounds: int) -> Iterator[Result]:
    """`cakefs import hub-cache` of two models that `hf download` brought, against hashing alone, from memory and from
    the disk; and with copies."""
    cache, store, copies = work / "import-cache", work / "store-import", work / "import-cp"
    files = _cached(work, cache)
    size = sum(path.stat().st_size for path in files)
    env = world.environment(store) | {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}

    def drop() -> None:
        for path in files:
            drop_cache(path)

    def imported(*flags: str, cold: bool = False) -> Costed:
        def prepare() -> None:
            _forget(store)
            if cold:
                drop()

        return Costed(lambda: world.cakefs(env, "import", "hub-cache", *flags), prepare)

    name = f"import of {size / GB:.1f} GB, borrowed, in memory / SHA-256 of it"
    actions = {"cakefs": imported(), "SHA-256": Costed(lambda: _all(_sha256, files))}
    yield _against(name, interleaved(actions, rounds), "SHA-256", 1.6, actions, size)
    actions = {
        "cakefs": imported(cold=True),
        "SHA-256": Costed(lambda: _all(_sha256, files), drop),
        "read": Costed(lambda: _all(read_all, files), drop),
    }
    samples = interleaved(actions, rounds)
    found = _against("import from the disk / SHA-256 from the disk", samples, "SHA-256", 1.6, actions, size)
    hashing, reading = (statistics.median(samples[way]) for way in ("SHA-256", "read"))
    found.detail += f"; at {'the speed of the hash' if hashing > 1.2 * reading else 'the speed of the disk'}"
    yield found

    def copy_and_hash() -> None:
        _copy(files, copies)
        _all(_sha256, files)

    actions = {"cakefs": imported("--copy"), "cp": Costed(copy_and_hash, lambda: _forget(copies))}
    samples = interleaved(actions, rounds)
    yield _against("import --copy / cp, sync and SHA-256", samples, "cp", 1.6, actions, size)
    _forget(store)
    _forget(copies)


def exporting(work: Path, rounds: int) -> Iterator[Result]:
    """`cakefs export` of a model that was made here: by reflink on an XFS, and as a copy against cp."""
    layers = min(EXPORTED_LAYERS, (shutil.disk_usage(work).free - 2 * GB) // 3 // LAYER_BYTES)
    name = f"export of {layers * LAYER_BYTES / GB:.1f} GB by reflink: s"
    try:
        with disk_in_a_file(work, "xfs", layers * LAYER_BYTES * 13 // 4 + GB) as disk:
            env, size = _made(work, disk / "store", layers)
            yield from _reflink(name, env, disk, rounds)
            yield from _copies(env, disk, size, rounds)
    except NoDisk as error:
        yield Result(name, "<= 1.50", None, None, str(error))
        env, size = _made(work, work / "store-export", layers)
        yield from _copies(env, work, size, rounds)


def _made(work: Path, store: Path, layers: int) -> tuple[dict[str, str], int]:
    """A store with a model of which a slice, all of it, is `made`."""
    shutil.rmtree(work / "repos-export", ignore_errors=True)
    repo = data.write_llama(work / "repos-export" / "bench/big", layers=layers)
    with world.hub_process(work / "repos-export") as endpoint:
        env = world.environment(store, endpoint)
        world.cakefs(env, "add", "bench/big")
        world.cakefs(env, "pull", "bench/big")
    size = (repo / "model.safetensors").stat().st_size
    shutil.rmtree(work / "repos-export")
    env = world.environment(store)
    world.cakefs(
        env, "slice", "bench/big", "--layers", f"0-{layers - 1}", "--as", "made", "--with-embeddings", "--with-head"
    )
    return env, size


def _reflink(name: str, env: dict[str, str], disk: Path, rounds: int) -> Iterator[Result]:
    out = disk / "out"
    action = Costed(lambda: world.cakefs(env, "export", "made", str(out)), lambda: _forget(out))
    samples = interleaved({"export": action}, rounds)
    _forget(out)
    before = used(disk)
    done = json.loads(world.cakefs(env, "export", "made", str(out), "--json"))
    taken = (used(disk) - before) / 1e6
    seconds = statistics.median(samples["export"])
    detail = f"{done['cloned_bytes'] / GB:.2f} GB cloned, {done['written_bytes'] / 1e6:.2f} MB written"
    cpu = action.cpu(GB).replace("CPU s/GB", "CPU s in all, start included")
    yield Result(name, "<= 1.50", seconds, seconds <= 1.5, f"{detail}; {cpu}", samples)
    yield Result("new data blocks of it, MB", "<= 10", taken, taken <= 10, "by statvfs, metadata included", {})
    _forget(out)


def _copies(env: dict[str, str], disk: Path, size: int, rounds: int) -> Iterator[Result]:
    out, plain = disk / "out", disk / "plain"
    world.cakefs(env, "export", "made", str(plain), "--reflink", "never")
    file = next(path for path in plain.iterdir() if path.suffix == ".safetensors")
    command = ("export", "made", f"{out}/", "--reflink", "never", "--file", file.name)
    actions = {
        "cakefs": Costed(lambda: world.cakefs(env, *command), lambda: _forget(out)),
        "cp": Costed(lambda: _copy([file], out), lambda: _forget(out)),
    }
    yield _against("export as a copy / cp and sync", interleaved(actions, rounds), "cp", 1.5, actions, size)


def _copy(files: Sequence[Path], into: Path) -> None:
    """What a user would do instead. The bytes are on disk then, as ours are."""
    into.mkdir()
    for number, path in enumerate(files):
        subprocess.run(["cp", "--reflink=never", path, into / str(number)], check=True)
        subprocess.run(["sync", into / str(number)], check=True)


def _against(
    name: str, samples: dict[str, list[float]], other: str, bar: float, actions: dict[str, Costed], size: int
) -> Result:
    value = ratio(samples, "cakefs", other)
    rates = (f"{k} {size / GB / statistics.median(v):.2f} GB/s, {actions[k].cpu(size)}" for k, v in samples.items())
    return Result(name, f"<= {bar:.2f}", value, value <= bar, "; ".join(rates), samples)


def _cached(work: Path, cache: Path) -> list[Path]:
    """Downloads by the genuine client; the large files."""
    for seed, name in enumerate(REPOS):
        data.write_llama(work / "repos-import" / name, layers=14, seed=seed)
    shutil.rmtree(cache, ignore_errors=True)
    with world.hub_process(work / "repos-import") as endpoint:
        env = world.environment(work / "unused", endpoint) | {"HF_HUB_CACHE": str(cache)}
        for name in REPOS:
            hf = Path(sys.executable).with_name("hf")
            subprocess.run([hf, "download", name, "--quiet"], env=env, capture_output=True, check=True)
    shutil.rmtree(work / "repos-import")
    return sorted(path.resolve() for path in cache.glob("models--*/snapshots/*/*.safetensors"))


def _all(function: Callable[[Path], object], files: Sequence[Path]) -> None:
    with ThreadPoolExecutor() as pool:
        list(pool.map(function, files))


def _sha256(path: Path) -> None:
    with path.open("rb") as file:
        hashlib.file_digest(file, "sha256")


def _forget(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
