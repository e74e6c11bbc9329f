"""Bytes and CPU of `add`, and what many models cost those who list and open them."""

import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from cakefs.model import SpanKey
from cakefs.store.store import Store
from tests.bench import data, world
from tests.bench.measure import Result, peak_rss_bytes, timed

EXPERTS = 500  # Tensors of a layer.
TENSORS = 400  # Of each of many models: the kernel reads ahead of the first bytes, and only headers are here.


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
            detail = "whole process, imports included"
            yield Result(f"add of {tensors} tensors: CPU seconds", "< 1", cpu, cpu < 1, detail, {})
            env = world.environment(work / f"store-{tensors}")
            commands = {"plan": ("plan", name), "merge": ("merge", name, "--ratio-repeat", "0:.6,.4:1", "--as", "deep")}
            for what, words in commands.items():
                start = os.times()
                world.cakefs(env, *words)
                end = os.times()
                cpu = end.children_user + end.children_system - start.children_user - start.children_system
                yield Result(f"{what} of {tensors} tensors: CPU seconds", "< 1", cpu, cpu < 1, detail, {})
            there = work / "mnt-add"
            with world.mounted(world.environment(work / f"store-{tensors}"), there, "--offline") as pid:
                (there / name / "model.safetensors").open("rb").read(64)
                rss = peak_rss_bytes(pid) / 1e6
            yield Result(f"daemon RSS with {tensors} tensors open, MB", "< 250", rss, rss < 250, "peak", {})


def _write_sparse(repo: Path, tensors: int) -> tuple[int, int]:
    repo.mkdir(parents=True, exist_ok=True)
    config = json.dumps(data.llama_config(-(-tensors // EXPERTS))).encode()
    (repo / "config.json").write_bytes(config)
    entries = {
        f"model.layers.{i // EXPERTS}.mlp.experts.{i % EXPERTS}.w.weight": {
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


def many_models(work: Path, rounds: int) -> Iterator[Result]:
    """What `ls`, lookup, open and readdir cost with one model and with a thousand."""
    costs: dict[int, dict[str, float]] = {}
    for count in (1, 1000):
        repos = work / f"repos-{count}"
        for i in range(count):
            _write_sparse(repos / f"many/m{i:04}", TENSORS)
        store, there = work / f"store-many-{count}", work / "mnt-many"
        with world.hub_process(repos) as endpoint:
            world.cakefs_all(world.environment(store, endpoint), [f"many/m{i:04}" for i in range(count)])
        env = world.environment(store)
        with world.mounted(env, there, "--offline"):
            costs[count] = _looking(env, there / "many/m0000/model.safetensors", rounds)
    ls = costs[1000]["ls"]
    yield Result("ls of 1,000 models, s", "< 0.3", ls, ls < 0.3, f"of one model {costs[1]['ls']:.3f} s", {})
    for what in ("open", "lookup", "readdir of a model"):
        grown = costs[1000][what] / costs[1][what]
        yield Result(
            f"{what}: 1,000 models / 1", "<= 1.50", grown, grown <= 1.5, f"{costs[1000][what] * 1e6:.0f} us", {}
        )


def many_blobs(work: Path, rounds: int) -> Iterator[Result]:
    """What becoming ready and looking at a model cost in stores of 100 and of a million small blobs."""
    repos, costs = work / "repos-blobs", dict[int, dict[str, float]]()
    _write_sparse(repos / "many/m", TENSORS)
    for blobs in (100, 1_000_000):
        store, there = work / f"store-blobs-{blobs}", work / "mnt-blobs"
        with world.hub_process(repos) as endpoint:
            world.cakefs(world.environment(store, endpoint), "add", "many/m")
        with Store.open(store) as opened:
            for first in range(0, blobs, 50_000):
                numbers = range(first, min(first + 50_000, blobs))
                opened.put_spans(
                    (SpanKey(f"bench:{i // 1000}", i % 1000, i % 1000 + 8), i.to_bytes(8)) for i in numbers
                )
        env = world.environment(store)
        ready = []
        for _ in range(rounds):
            start = time.perf_counter()
            with world.mounted(env, there, "--offline"):
                ready.append(time.perf_counter() - start)
        with world.mounted(env, there, "--offline"):
            costs[blobs] = _looking(env, there / "many/m/model.safetensors", rounds) | {"ready": min(ready)}
    for what in ("ready", "open", "readdir of a model"):
        grown = costs[1_000_000][what] / costs[100][what]
        yield Result(
            f"{what}: 1,000,000 blobs / 100",
            "<= 1.50",
            grown,
            grown <= 1.5,
            f"{costs[1_000_000][what] * 1e3:.2f} ms",
            {},
        )


def _looking(env: dict[str, str], file: Path, rounds: int) -> dict[str, float]:
    """Seconds of each way to look at a model."""
    return {
        "ls": min(timed(lambda: world.cakefs(env, "ls")) for _ in range(rounds)),
        "open": statistics.median(timed(lambda: file.open("rb", buffering=0).read(64)) for _ in range(50)),
        "lookup": statistics.median(timed(lambda i=i: (file.parent / f"absent-{i}").exists()) for i in range(50)),
        "readdir of a model": statistics.median(timed(lambda: os.listdir(file.parent)) for _ in range(50)),
    }
