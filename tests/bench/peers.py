"""The same work by others: `rclone mount` of local and of remote files, the store of tensorfs."""

import importlib.util
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.bench import data, world
from tests.bench.local import MODEL, WEIGHTS, ColdRead, blobs_of, local_model
from tests.bench.measure import Result, cpu_seconds, interleaved, ratio, row, timed
from tests.bench.readers import read_all, tensors_all

GB = 1_000_000_000
START_S = 1.0  # A mount of a session began long ago, and so did its processes.


def with_rclone(work: Path, rounds: int) -> Iterator[Result]:
    """Sequential read() of a whole file, kernel cache cold: of the disk, and of a web server (`rclone serve http`)."""
    if shutil.which("rclone") is None:
        yield Result("rclone mount / cakefs", ">= 3", None, None, "rclone is not installed (Debian has it)", {})
        return
    native, env = local_model(work)
    with ExitStack() as stack:
        pid = stack.enter_context(world.mounted(env, work / "mnt", "--offline"))
        other_pid = stack.enter_context(world.rclone(str(native.parent), work / "rclone"))
        behind = [native, *blobs_of(work)]
        ours = ColdRead(work / "mnt" / MODEL / WEIGHTS, pid, read_all, behind)
        theirs = ColdRead(work / "rclone" / WEIGHTS, other_pid, read_all, behind)
        size = native.stat().st_size
        samples = interleaved({"rclone": theirs, "cakefs": ours}, rounds, memory=size)
        found = row("read(), cold FUSE cache: rclone mount / cakefs, time", samples, "rclone", "cakefs", 0)
        found.bar, found.ok = ">= 3", found.ratio is not None and found.ratio >= 3
        found.detail += f"; CPU s/GiB: rclone {theirs.cpu(size):.2f}, cakefs {ours.cpu(size):.2f}"
        yield found
    yield from _remote(work, rounds)


def _remote(work: Path, rounds: int) -> Iterator[Result]:
    repo = data.write_llama(work / "served" / "bench", layers=7)
    size = (repo / WEIGHTS).stat().st_size
    cpu: dict[str, list[float]] = {"cakefs": [], "rclone": []}

    def cakefs() -> float:
        shutil.rmtree(work / "store-remote", ignore_errors=True)
        env = world.environment(work / "store-remote")
        with _served(work / "served") as url:
            world.cakefs(env, "add", f"{url}bench/{WEIGHTS}", "--as", "remote")
            with world.mounted(env, work / "mnt-remote") as pid:
                return measured("cakefs", pid, work / "mnt-remote" / "remote" / WEIGHTS)

    def rclone() -> float:
        cache = work / "rclone-cache"
        shutil.rmtree(cache, ignore_errors=True)
        flags = ("--vfs-cache-mode", "full", "--cache-dir", str(cache))
        with (
            _served(work / "served") as url,
            world.rclone(f":http,url='{url}':", work / "rclone-remote", *flags) as pid,
        ):
            return measured("rclone", pid, work / "rclone-remote" / "bench" / WEIGHTS)

    def measured(name: str, pid: int, path: Path) -> float:
        time.sleep(START_S)
        before = cpu_seconds(pid)
        seconds = timed(lambda: read_all(path))
        cpu[name].append((cpu_seconds(pid) - before) / size * GB)
        return seconds

    samples = interleaved({"cakefs": cakefs, "rclone": rclone}, max(1, rounds // 2), memory=3 * size)
    yield row("first read() from a web server: time / rclone mount with its cache", samples, "cakefs", "rclone", 1)
    value = ratio(cpu, "cakefs", "rclone")
    detail = ", ".join(f"{name} {min(spent):.2f} CPU s/GB" for name, spent in cpu.items())
    yield Result("the same: CPU / rclone", "<= 1.00", value, value <= 1, detail, cpu)


@contextmanager
def _served(directory: Path) -> Iterator[str]:
    """The URL of a web server with ranges, listings and dates."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = ["rclone", "serve", "http", "--read-only", "--config", os.devnull, "--addr", address, str(directory)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + world.PATIENCE_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))).close()
                break
            except OSError:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise
                time.sleep(0.05)
        yield f"http://{address}/"
    finally:
        process.terminate()
        process.wait()


def with_tensorfs(work: Path, rounds: int) -> Iterator[Result]:
    """The nearest store of tensors: taking a directory in, and all tensors of it once they are in memory."""
    if importlib.util.find_spec("tensorfs") is None:
        yield Result("tensorfs / cakefs", ">= 1", None, None, "tensorfs is not installed (`pip install tensorfs`)", {})
        return
    import tensorfs

    native, env = local_model(work)
    theirs, mine = work / "tensorfs", work / "store-copy"

    def ingest() -> float:
        shutil.rmtree(theirs, ignore_errors=True)
        return timed(lambda: tensorfs.convert_to_cozytensors(str(native.parent), cache_dir=str(theirs)))

    def copy() -> float:
        shutil.rmtree(mine, ignore_errors=True)
        return timed(
            lambda: world.cakefs(world.environment(mine), "import", str(native.parent), "--copy", "--as", "me")
        )

    samples = interleaved({"cakefs": copy, "tensorfs": ingest}, max(1, rounds // 2))
    yield row("a directory into the store, by copy: time / tensorfs", samples, "cakefs", "tensorfs", 1)
    with world.mounted(env, work / "mnt", "--offline"):
        path = work / "mnt" / MODEL / WEIGHTS
        checkpoint = tensorfs.convert_to_cozytensors(str(native.parent), cache_dir=str(theirs))
        (component,) = checkpoint.components.values()

        def read() -> None:
            component.tensors.read(device="cpu")

        for warm in (lambda: tensors_all(path), read):
            warm()
        samples = interleaved(
            {"cakefs": lambda: timed(lambda: tensors_all(path)), "tensorfs": lambda: timed(read)}, rounds
        )
        yield row(
            "all tensors, warm: time of safe_open through the mount / tensorfs in the process",
            samples,
            "cakefs",
            "tensorfs",
            1,
        )
