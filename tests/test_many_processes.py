"""Many processes on one store, all at once and over and over: nothing is lost, nothing is there twice, and nothing
waits for ever."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from huggingface_hub import snapshot_download

from cakefs.model import MIB
from tests.hub import Hub
from tests.models import CONFIG, single, tensor
from tests.mounts import Cakefs, needs_fuse

SECONDS = 8.0
STUCK_S = 60.0  # No command of this test takes longer, however busy the machine is.
SIZE = 2 * MIB + 4096  # Of a tensor: several chunks, the last one short.
CACHED = ["org/m0", "org/m1"]  # Downloaded by the genuine client before.
FETCHED = ["org/m2", "org/m3"]
COMES_AND_GOES = "org/m4"


def published(seed: int) -> dict[str, bytes]:
    """A model of a tensor that all have, one that the next model has as well, and one of its own."""
    seeds = {"shared": 1, "left": 100 + seed, "right": 101 + seed, "own": 200 + seed}
    tensors = {f"model.layers.0.{name}": tensor(number, SIZE // 4) for name, number in seeds.items()}
    return {"config.json": CONFIG, "model.safetensors": single(tensors)}


MODELS = {f"org/m{i}": published(i) for i in range(5)}
DISTINCT = 1 + 6 + 5  # Tensors of SIZE bytes in all five models, each counted once.


# A process that repeats commands until the time is over, and once at least; it says how often.
LOOP = """
import json, sys, time
from cakefs.cli.main import main
until, commands = time.monotonic() + float(sys.argv[1]), json.loads(sys.argv[2])
rounds = 0
while not rounds or time.monotonic() < until:
    for command in commands:
        code = main(["--quiet", *command])
        if code:
            sys.exit(f"cakefs {' '.join(command)}: {code}, in round {rounds}")
    rounds += 1
print("rounds:", rounds)
"""


class Crowd:
    """Processes and threads that do something over and over, all at once; `failed` is what went wrong."""

    def __init__(self, cakefs: Cakefs) -> None:
        self._cakefs = cakefs
        self._until = time.monotonic() + SECONDS
        self._processes: list[subprocess.Popen[str]] = []
        self._threads: list[threading.Thread] = []
        self.failed: list[str] = []

    def repeat(self, *commands: list[str], seconds: float = SECONDS) -> None:
        self._processes.append(
            subprocess.Popen(
                [sys.executable, "-c", LOOP, str(seconds), json.dumps(commands)],
                env=self._cakefs.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )

    def read(self, mount: Path, names: list[str]) -> None:
        def loop() -> None:
            try:
                while time.monotonic() < self._until:
                    self.check(mount, names)
            except OSError as error:
                self.failed.append(repr(error))

        self._threads.append(threading.Thread(target=loop, daemon=True))
        self._threads[-1].start()

    def check(self, mount: Path, names: Iterable[str]) -> None:
        """That the mount has the very bytes that were published."""
        for name in names:
            if (mount / name / "model.safetensors").read_bytes() != MODELS[name]["model.safetensors"]:
                self.failed.append(f"wrong bytes of {name}")

    def wait(self) -> None:
        for process in self._processes:
            try:
                out, err = process.communicate(timeout=STUCK_S)
            except subprocess.TimeoutExpired:
                process.kill()
                self.failed.append(f"stuck: {process.args!r}")
                continue
            if process.returncode or "rounds:" not in out or "Traceback" in err:
                self.failed.append(err)
        for thread in self._threads:
            thread.join(STUCK_S)
            if thread.is_alive():
                self.failed.append("a reader is stuck")
        self._processes, self._threads = [], []


@pytest.fixture
def cakefs(hub: Hub, tmp_path: Path) -> Cakefs:
    for name, files in MODELS.items():
        hub.add_repo(name, files)
    for name in CACHED:
        snapshot_download(name, cache_dir=tmp_path / "cache", endpoint=hub.endpoint)
    cakefs = Cakefs(tmp_path, hub.endpoint, HF_HUB_CACHE=str(tmp_path / "cache"))
    cakefs.add_all(FETCHED)
    return cakefs


@needs_fuse
@pytest.mark.timeout(300)
def test_mount_pull_import_evict_and_gc_at_once(hub: Hub, cakefs: Cakefs) -> None:
    with cakefs.mounted() as mount:
        crowd = Crowd(cakefs)
        crowd.read(mount, FETCHED[:1])  # The other one is in use by nobody when it is evicted.
        crowd.read(mount, FETCHED[:1])
        crowd.repeat(["import", "hub-cache"])
        crowd.repeat(*(["pull", name] for name in FETCHED))
        crowd.repeat(*(["pull", name] for name in FETCHED[::-1]))
        crowd.repeat(*(["evict", name] for name in FETCHED), ["gc"])
        crowd.repeat(*([command, COMES_AND_GOES] for command in ("add", "pull", "verify", "rm")))
        crowd.wait()
        assert crowd.failed == []

        crowd.repeat(*([command, name] for name in MODELS for command in ("add", "pull")), seconds=0)
        crowd.wait()
        hub.down()
        crowd.check(mount, MODELS)  # Nothing is lost
        assert crowd.failed == []
    crowd.repeat(["verify"], ["gc"], seconds=0)
    crowd.wait()
    assert crowd.failed == []
    assert all(model["verified"] for model in cakefs.json("ls"))
    own = sum(path.stat().st_size for path in (cakefs.store / "blobs").glob("??/*") if path.stat().st_size >= SIZE)
    borrowed = cakefs.json("status")["store"]["borrowed_bytes"]
    assert own + borrowed == DISTINCT * SIZE, "and nothing is there twice"
    assert not any((cakefs.store / "partial").iterdir())
    assert not any((cakefs.store / "quarantine").iterdir())
