"""What a transfer process can still do: write in the store, and read; nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub import Hub
from tests.models import CONFIG, single, tensor
from tests.mounts import Cakefs, needs_fuse

TRY = """
import os, resource, sys, threading
from pathlib import Path
from cakefs.engine.transfer.confine import confine
store, outside = map(Path, sys.argv[1:])
if not confine(store):
    sys.exit(77)

def refused(what, *arguments):
    try:
        what(*arguments)
    except PermissionError:
        return
    raise SystemExit(f"not refused: {what}{arguments}")

def look():
    (store / "a/new").write_text("x")
    (store / "a/new").rename(store / "b/new")
    os.truncate(store / "b/new", 0)
    (store / "b/new").unlink()
    (store / "moved/new").write_text("x")
    assert (outside / "file").read_text() == "mine"
    refused((outside / "file").write_text, "theirs")
    refused((outside / "new").write_text, "x")
    refused((outside / "file").unlink)
    refused(os.truncate, outside / "file", 0)
    refused((outside / "file").rename, store / "stolen")
    refused(os.execv, sys.executable, [sys.executable])
    status = Path("/proc/thread-self/status").read_text()
    assert "NoNewPrivs:\\t1\\n" in status
    left = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("CapPrm", "CapEff", "CapInh"))]
    assert all(capabilities & ~0b1110 == 0 for capabilities in left), status
    assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)

look()
thread = threading.Thread(target=look)
thread.start()
thread.join()
"""


def test_it_writes_in_the_store_and_nowhere_else(tmp_path: Path) -> None:
    store, outside, disk = tmp_path / "store", tmp_path / "outside", tmp_path / "disk"
    for directory in (store / "a", store / "b", outside, disk):
        directory.mkdir(parents=True)
    (store / "moved").symlink_to(disk)
    (outside / "file").write_text("mine")
    done = subprocess.run([sys.executable, "-c", TRY, store, outside], capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("this kernel has no Landlock")
    assert (done.returncode, done.stderr) == (0, "")
    assert (outside / "file").read_text() == "mine"


def _children(task: str) -> list[str]:
    return Path(f"{task}/children").read_text().split()


@needs_fuse
def test_the_transfer_processes_of_a_mount_are_confined_and_transfer(tmp_path: Path, hub: Hub) -> None:
    data = single({"a": tensor(1, 300, 1000)})
    hub.add_repo("org/name", {"config.json": CONFIG, "model.safetensors": data})
    cakefs = Cakefs(tmp_path, hub.endpoint)
    with cakefs.mounted() as mount:
        cakefs.run("add", "org/name")
        assert (mount / "org/name/model.safetensors").read_bytes() == data
        pid = cakefs.status()["pid"]
        children = [c for tid in os.listdir(f"/proc/{pid}/task") for c in _children(f"/proc/{pid}/task/{tid}")]
        workers = [c for c in children if b"cakefs.engine.transfer.worker" in Path(f"/proc/{c}/cmdline").read_bytes()]
        assert workers
        for worker in workers:
            assert "NoNewPrivs:\t1\n" in Path(f"/proc/{worker}/status").read_text()
        assert "NoNewPrivs:\t0\n" in Path(f"/proc/{pid}/status").read_text(), "it must call fusermount3"
