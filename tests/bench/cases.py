"""What is measured: each function sets a stage, runs variants side by side and returns rows for the table."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from tests.bench import data, world
from tests.bench.measure import Result, cpu_seconds, interleaved, peak_rss_bytes, ratio, timed
from tests.bench.readers import drop_cache, map_all, read_all

GB = 1_000_000_000
MODEL = "bench/local"
LOAD = """
import sys, time, torch, transformers
import transformers.models.llama.modeling_llama
start = time.perf_counter()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    model(torch.arange(4)[None])
print(time.perf_counter() - start)
"""


def local_reads(work: Path, rounds: int) -> Iterator[Result]:
    """Reads of a model that is all local: against the native file and against the least a FUSE server does."""
    repo = data.write_llama(work / "repos" / MODEL, layers=24)
    native, store, there = repo / "model.safetensors", work / "store", work / "mnt"
    with world.hub_process(work / "repos") as endpoint:
        env = world.environment(store, endpoint)
        world.cakefs(env, "add", MODEL)
        world.cakefs(env, "pull", MODEL)
    env = world.environment(store)
    size = native.stat().st_size
    for kilobytes in (128, 1024):
        with ExitStack() as stack:
            pid = stack.enter_context(world.mounted(env, there, "--offline", read_ahead_kb=kilobytes))
            plain_pid = stack.enter_context(world.passthrough(native, work / "plain", read_ahead_kb=kilobytes))
            mine, plain = there / MODEL / "model.safetensors", work / "plain" / "model.safetensors"
            if kilobytes == 128:
                yield from _warm(there, mine, plain, native, rounds)
            yield from _cold(kilobytes, mine, plain, native, pid, plain_pid, rounds, size)


def _warm(there: Path, mine: Path, plain: Path, native: Path, rounds: int) -> Iterator[Result]:
    for path in (mine, plain, native):
        read_all(path)
    before = world.status(there)["mount"]["reads"]
    samples = interleaved(
        {"cakefs": lambda: timed(lambda: read_all(mine)), "native": lambda: timed(lambda: read_all(native))}, rounds
    )
    yield _row("warm re-read, read(): cakefs / native page-cached", samples, "cakefs", "native", 1.10)
    samples = interleaved(
        {
            "cakefs": lambda: timed(lambda: map_all(mine)),
            "pass-through": lambda: timed(lambda: map_all(plain)),
            "native": lambda: timed(lambda: map_all(native)),
        },
        rounds,
    )
    yield _row("warm mmap: cakefs / pass-through FUSE", samples, "cakefs", "pass-through", 1.05)
    asked = world.status(there)["mount"]["reads"] - before
    yield Result("READ requests that the daemon saw in all warm runs", "0", float(asked), asked == 0, "", {})


def _cold(
    kilobytes: int, mine: Path, plain: Path, native: Path, pid: int, plain_pid: int, rounds: int, size: int
) -> Iterator[Result]:
    read_all(native)
    for what, reader in (("read()", read_all), ("mmap", map_all)):
        ours, theirs = ColdRead(mine, pid, reader), ColdRead(plain, plain_pid, reader)
        samples = interleaved({"cakefs": ours, "pass-through": theirs}, rounds)
        name = f"local blobs, cold FUSE cache, {what}, {kilobytes} KiB readahead: time / pass-through"
        row = _row(name, samples, "cakefs", "pass-through", 1.10)
        row.detail += f"; {size / min(samples['cakefs']) / 2**30:.2f} GiB/s"
        row.detail += f"; daemon CPU s/GiB {ours.cpu(size):.2f} vs {theirs.cpu(size):.2f}"
        yield row


class ColdRead:
    """One read of a whole file whose pages the kernel dropped before, and what it cost the server."""

    def __init__(self, path: Path, server: int, reader: Callable[[Path], int]) -> None:
        self._path, self._server, self._reader = path, server, reader
        self._spent: list[float] = []

    def __call__(self) -> float:
        drop_cache(self._path)
        before = cpu_seconds(self._server)
        seconds = timed(lambda: self._reader(self._path))
        self._spent.append(cpu_seconds(self._server) - before)
        return seconds

    def cpu(self, size: int) -> float:
        """Least CPU seconds of the server per GiB."""
        return min(self._spent) / size * 2**30


def first_load(work: Path, rounds: int, *, rate: float = 125e6, latency: float = 0.020) -> Iterator[Result]:
    """The first load of a 1 GB model over a shaped link, by transformers, against the link and `hf download` + load."""
    repo = data.write_llama(work / "repos" / "bench/first", layers=14)
    size = (repo / "model.safetensors").stat().st_size
    link = size / rate

    def through_mount() -> float:
        store, there = work / "store-first", work / "mnt-first"
        shutil.rmtree(store, ignore_errors=True)
        with world.hub_process(work / "repos", rate=rate, latency=latency) as endpoint:
            env = world.environment(store, endpoint)
            world.cakefs(env, "add", "bench/first")
            with world.mounted(env, there):
                return _load(there / "bench/first")

    def downloaded() -> float:
        cache = work / "hf-cache"
        shutil.rmtree(cache, ignore_errors=True)
        with world.hub_process(work / "repos", rate=rate, latency=latency) as endpoint:
            env = world.environment(work / "unused", endpoint) | {"HF_HUB_CACHE": str(cache)}
            start = time.perf_counter()
            done = subprocess.run(
                [Path(sys.executable).with_name("hf"), "download", "bench/first", "--quiet"],
                env=env,
                capture_output=True,
                text=True,
                check=True,
            )
            spent = time.perf_counter() - start
            return spent + _load(Path(done.stdout.strip().splitlines()[-1].removeprefix("path=")))

    _load(repo)  # imports and page cache of the libraries
    samples = interleaved({"cakefs": through_mount, "hf download + load": downloaded}, rounds)
    local = min(_load(repo) for _ in range(2))
    best = sorted(samples["cakefs"])[len(samples["cakefs"]) // 2]
    label = f"{rate * 8 / 1e9:g} Gbit/s, {latency * 1e3:g} ms"
    yield Result(
        f"first load over {label} / link time",
        "<= 1.15",
        best / link,
        best / link <= 1.15,
        f"{best:.2f} s for {size / GB:.2f} GB, link {link:.2f} s; the same load from a local file takes {local:.2f} s",
        samples,
    )
    yield _row(f"first load over {label} / (hf download + load)", samples, "cakefs", "hf download + load", 0.8)


def _load(path: Path) -> float:
    """Seconds of loading and one forward pass by transformers, imports not counted."""
    env = dict(os.environ) | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, "-c", LOAD, str(path)], env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"loading {path}: exit {done.returncode}\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def adding(work: Path, rounds: int) -> Iterator[Result]:
    """Bytes and CPU of `add`, for 700 tensors and for 90,000."""
    for tensors, name in ((700, "bench/many"), (90_000, "bench/huge")):
        repo = work / "repos" / name
        header, small = _write_sparse(repo, tensors)
        with world.hub_process(work / "repos") as endpoint:
            env = world.environment(work / f"store-{tensors}", endpoint)
            start = os.times()
            report = json.loads(world.cakefs(env, "add", "--json", name))
            end = os.times()
            cpu = end.children_user + end.children_system - start.children_user - start.children_system
        over = report["fetched_bytes"] - header - small
        yield Result(
            f"add of {tensors} tensors: bytes beyond headers and small files",
            "<= 65536",
            float(over),
            over <= 65536,
            f"{report['fetched_bytes']} bytes fetched",
            {},
        )
        if tensors > 1000:
            yield Result(
                f"add of {tensors} tensors: CPU seconds", "< 3", cpu, cpu < 3, "whole process, imports included", {}
            )
            there = work / "mnt-add"
            with world.mounted(world.environment(work / f"store-{tensors}"), there, "--offline") as pid:
                (there / name / "model.safetensors").open("rb").read(64)
                rss = peak_rss_bytes(pid) / 1e6
            yield Result(f"daemon RSS with {tensors} tensors open, MB", "< 250", rss, rss < 250, "peak", {})


def _write_sparse(repo: Path, tensors: int) -> tuple[int, int]:
    repo.mkdir(parents=True, exist_ok=True)
    config = json.dumps(data.llama_config(4)).encode()
    (repo / "config.json").write_bytes(config)
    entries = {
        f"model.layers.{i // 500}.mlp.experts.{i % 500}.w.weight": {
            "dtype": "BF16",
            "shape": [64, 64],
            "data_offsets": [i * 8192, i * 8192 + 8192],
        }
        for i in range(tensors)
    }
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    with (repo / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + tensors * 8192)
    return 8 + len(header), len(config)


def _row(name: str, samples: dict[str, list[float]], of: str, to: str, bar: float) -> Result:
    value = ratio(samples, of, to)
    medians = ", ".join(f"{k} {sorted(v)[len(v) // 2]:.3f} s" for k, v in samples.items())
    return Result(name, f"<= {bar:.2f}", value, value <= bar, medians, samples)


CASES = {"local": local_reads, "first-load": first_load, "add": adding}
