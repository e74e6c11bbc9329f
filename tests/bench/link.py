"""Loads over a shaped link: against the link itself, `hf download`, and the same mount without readahead."""

import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.bench import data, world
from tests.bench.measure import Result, interleaved, loading, row, timed
from tests.bench.readers import first_pages, page, tensors_all
from tests.hub.odd import self_signed

GB = 1_000_000_000


LINKS = ((125e6, 0.020, 14, 1.05), (1250e6, 0.001, 14, 1.3), (12.5e6, 0.080, 3, 1.05))
"""Bytes per second, seconds of latency, layers of the model (70 MB each), and the bar of first load / link time."""


def first_load(work: Path, rounds: int) -> Iterator[Result]:
    for rate, latency, layers, bar in LINKS:
        yield from _first_load(work, rounds, rate, latency, layers, bar)


def _first_load(work: Path, rounds: int, rate: float, latency: float, layers: int, bar: float) -> Iterator[Result]:
    """The first load of a model over a shaped link, by transformers, against the link and `hf download` + load."""
    shutil.rmtree(work / "repos" / "bench/first", ignore_errors=True)
    repo = data.write_llama(work / "repos" / "bench/first", layers=layers)
    size = (repo / "model.safetensors").stat().st_size
    link = size / rate

    def through_mount() -> float:
        store, there = work / "store-first", work / "mnt-first"
        shutil.rmtree(store, ignore_errors=True)
        with world.hub_process(work / "repos", rate=rate, latency=latency) as endpoint:
            env = world.environment(store, endpoint)
            world.cakefs(env, "add", "bench/first")
            with world.mounted(env, there):
                return loading(there / "bench/first")

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
            return spent + loading(Path(done.stdout.strip().splitlines()[-1].removeprefix("path=")))

    loading(repo)  # imports and page cache of the libraries
    samples = interleaved({"cakefs": through_mount, "hf download + load": downloaded}, rounds, memory=3 * size)
    local = min(loading(repo) for _ in range(2))
    best = sorted(samples["cakefs"])[len(samples["cakefs"]) // 2]
    label = f"{rate * 8 / 1e9:g} Gbit/s, {latency * 1e3:g} ms"
    yield Result(
        f"first load over {label} / link time",
        f"<= {bar}",
        best / link,
        best / link <= bar,
        f"{best:.2f} s for {size / GB:.2f} GB, link {link:.2f} s; the same load from a local file takes {local:.2f} s",
        samples,
    )
    yield row(f"first load over {label} / (hf download + load)", samples, "cakefs", "hf download + load", 0.7)


LATENCY_S = 0.1


def first_touch(work: Path, rounds: int) -> Iterator[Result]:
    """The walk over the first pages of all tensors, and one page alone, of a model that is not here; latency 100 ms."""
    repo = data.write_llama(work / "repos" / "bench/touch", layers=19, hidden=512)
    other = work / "repos" / "bench/other"
    other.mkdir(parents=True, exist_ok=True)
    with (other / "some.bin").open("wb") as file:
        file.truncate(64 * data.MIB)
    middle = (repo / "model.safetensors").stat().st_size // 2 // 4096 * 4096
    touched = 0

    def through(ahead: bool, reader: Callable[[Path], int], latency: float = LATENCY_S) -> float:
        nonlocal touched
        store = work / "store-touch"
        shutil.rmtree(store, ignore_errors=True)
        with world.hub_process(work / "repos", latency=latency) as endpoint:
            env = world.environment(store, endpoint)
            if not ahead:
                (work / "plain.toml").write_text("readahead = false\n")
                env["CAKEFS_CONFIG"] = str(work / "plain.toml")
            world.cakefs(env, "add", "bench/touch")
            world.cakefs(env, "add", "bench/other")
            with world.mounted(env, work / "mnt-touch", read_ahead_kb=128):
                path = work / "mnt-touch" / "bench/touch" / "model.safetensors"
                path.open("rb").read(8)
                for at in range(1, 64, 8):  # a transfer process has started and knows the servers; nothing is ahead
                    page(work / "mnt-touch" / "bench/other" / "some.bin", at * data.MIB)
                before = world.status(work / "mnt-touch")["bytes_fetched"]
                spent = timed(lambda: reader(path))
                touched = world.status(work / "mnt-touch")["bytes_fetched"] - before
                return spent

    tensors = 2 + 9 * 19
    walk = {
        "ahead": lambda: through(True, first_pages),
        "near": lambda: through(True, first_pages, 0.0),  # the bytes alone
        "none": lambda: through(False, first_pages),
    }
    memory = 512 * data.MIB
    samples = interleaved(walk, max(1, rounds // 2), memory=memory)
    ahead, near, none = (statistics.median(samples[name]) for name in walk)
    trips = (ahead - near) / LATENCY_S
    detail = f"{ahead:.2f} s, {near:.2f} s of it for the bytes; without readahead {none:.2f} s"
    name = f"first page of each of {tensors} tensors: round trips beside the bytes"
    yield Result(name, "<= 3", trips, trips <= 3, detail, samples)
    alone = {"one page": lambda: through(True, lambda path: len(page(path, middle)))}
    samples = interleaved(alone, rounds, memory=memory)
    over = statistics.median(samples["one page"]) - 2 * LATENCY_S
    yield Result(
        "one page of a cold remote tensor: ms beyond 2 round trips",
        "<= 5",
        over * 1e3,
        over <= 0.005,
        f"{touched} bytes fetched",
        samples,
    )


def prefetch(work: Path, rounds: int) -> Iterator[Result]:
    """All tensors through a mapping, one after the other, over 1 Gbit/s and 20 ms, with readahead and without."""
    repo = data.write_llama(work / "repos" / "bench/ahead", layers=3)
    size = (repo / "model.safetensors").stat().st_size

    def through(ahead: bool) -> float:
        store = work / "store-ahead"
        shutil.rmtree(store, ignore_errors=True)
        with world.hub_process(work / "repos", rate=125e6, latency=0.02) as endpoint:
            env = world.environment(store, endpoint)
            (work / "ahead.toml").write_text(f"readahead = {'true' if ahead else 'false'}\n")
            env["CAKEFS_CONFIG"] = str(work / "ahead.toml")
            world.cakefs(env, "add", "bench/ahead")
            with world.mounted(env, work / "mnt-ahead", read_ahead_kb=128):
                return timed(lambda: tensors_all(work / "mnt-ahead" / "bench/ahead" / "model.safetensors"))

    variants = {"ahead": lambda: through(True), "none": lambda: through(False)}
    samples = interleaved(variants, max(1, rounds // 2), memory=3 * size)
    found = row("remote tensors, mapped, 1 Gbit/s, 20 ms: without readahead / with", samples, "none", "ahead", 0)
    found.bar, found.ok = ">= 2", found.ratio is not None and found.ratio >= 2
    yield found


def fetch_all(work: Path, rounds: int) -> Iterator[Result]:
    """`cakefs pull` from loopback, not shaped: how fast bytes get into the store, and what they cost; with TLS, too."""
    repo = data.write_llama(work / "repos" / "bench/fetch", layers=14)
    size = (repo / "model.safetensors").stat().st_size
    user: dict[str, list[float]] = {"pull": [], "TLS": []}
    system: dict[str, list[float]] = {"pull": [], "TLS": []}

    def pull(name: str, certificate: Path | None = None) -> float:
        store = work / "store-fetch"
        shutil.rmtree(store, ignore_errors=True)
        with world.hub_process(work / "repos", certificate=certificate) as endpoint:
            env = world.environment(store, endpoint) | {"SSL_CERT_FILE": str(certificate or "")}
            world.cakefs(env, "add", "bench/fetch")
            before = os.times()
            seconds = timed(lambda: world.cakefs(env, "pull", "bench/fetch"))
            after = os.times()
            user[name].append((after.children_user - before.children_user) / size * GB)
            system[name].append((after.children_system - before.children_system) / size * GB)
            return seconds

    def spent(name: str) -> str:
        return f"{statistics.median(user[name]):.2f} user, {statistics.median(system[name]):.2f} system"

    variants = {"pull": lambda: pull("pull")}
    if shutil.which("openssl") is not None:
        certificate = self_signed(work)
        variants["TLS"] = lambda: pull("TLS", certificate)
    samples = interleaved(variants, rounds, memory=2 * size)
    rate = size / statistics.median(samples["pull"]) / GB
    block = bytes(64 * data.MIB)
    sha = timed(lambda: hashlib.sha256(block)) / len(block) * GB
    detail = f"CPU s/GB: {spent('pull')}, SHA-256 {sha:.2f} of it; start of three processes included, hub not counted"
    yield Result("pull from loopback, GB/s", ">= 1", rate, rate >= 1, detail, samples)
    if "TLS" in variants:
        rate = size / statistics.median(samples["TLS"]) / GB
        yield Result("the same over TLS, GB/s", "", rate, None, f"CPU s/GB: {spent('TLS')}", {})
