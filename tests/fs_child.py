"""A library in a JSON file, served by a real mount in a child process, and the handle that tests have on both.

Run as a script it is the child: `fs_child.py MOUNTPOINT STATE [allow_other]`. The parent replaces the state file to
add, update and remove models and to break files, as another process does with the store. pyfuse3 cannot mount twice in
one process.
"""

import hashlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import trio

from cakefs import errors
from cakefs.errors import CakeError, CorruptData, NotFound, RemoteUnavailable
from cakefs.fs.place import FUSE_DEVICE, KIND, canonical, mounts
from cakefs.model import File, Literal, Manifest, View, encode_manifest
from cakefs.plan.hubcache import HubPlace
from cakefs.plan.wish import Wish

PATTERN = bytes(range(251)) * 8400  # 2 MiB and more, and of a period that no power of two divides


def content(spec: Mapping[str, Any], offset: int, size: int) -> bytes:
    """Bytes of a file that is given by its `text`, or by its `size` only."""
    if "text" in spec:
        return str(spec["text"]).encode()[offset : offset + size]
    start = offset % 251
    return PATTERN[start : start + max(0, min(size, spec["size"] - offset))]


def build_manifest(name: str, model: Mapping[str, Any]) -> Manifest:
    files = []
    for path, spec in model["files"].items():
        size = len(spec["text"].encode()) if "text" in spec else spec["size"]
        segments = (Literal("xxh3:" + "0" * 32, size),) if size else ()
        files.append(File(path, size, View(spec.get("view", "both")), segments))
    return Manifest(name, "test", model.get("revision", ""), "main", model.get("created", 0), (), (), (), tuple(files))


class FakeReader:
    def __init__(self, library: "FakeLibrary", spec: Mapping[str, Any], path: str) -> None:
        self._library = library
        self._spec = spec
        self._path = path
        self.size = len(content(spec, 0, 1 << 40)) if "text" in spec else spec["size"]

    def try_read(self, offset: int, size: int) -> memoryview | None:
        fault = self._library.fault(self._path)
        if fault == "bug":
            raise ZeroDivisionError("a bug in the engine")
        if fault == "memory":
            raise MemoryError
        if fault == "short":
            return memoryview(content(self._spec, offset, size)[:-1])
        return None if fault else memoryview(content(self._spec, offset, size))

    async def read(self, offset: int, size: int) -> memoryview | bytes:
        while fault := self._library.fault(self._path):
            if fault == "timeout":
                raise RemoteUnavailable(f"no answer for {self._path}", hint="try again")
            if fault == "corrupt":
                raise CorruptData(f"{self._path} is damaged")
            if fault == "trickle":
                await trio.sleep(0.2)
            if fault in ("slow", "trickle"):
                break
            await trio.sleep(0.01)  # "stall": until the fault is taken away
        return content(self._spec, offset, size)

    def close(self) -> None:
        self._library.closed += 1


class FakeLibrary:
    """`state` is what the file held last: generation, models by name, faults by file path."""

    def __init__(self, load: Callable[[], dict[str, Any]], store: str = "/") -> None:
        self._load = load
        self._store = store
        self._manifests: dict[str, tuple[Manifest, Mapping[str, Any]]] = {}
        self.closed = 0
        self.wishes: list[Wish] = []

    def fault(self, path: str) -> str:
        return str(self._load().get("faults", {}).get(path, ""))

    def generation(self) -> int:
        return int(self._load()["generation"])

    def names(self) -> dict[str, str]:
        return {name: self._store_model(name, model) for name, model in self._load()["models"].items()}

    def _store_model(self, name: str, model: Mapping[str, Any]) -> str:
        manifest = build_manifest(name, model)
        manifest_id = "sha256:" + hashlib.sha256(encode_manifest(manifest)).hexdigest()
        self._manifests[manifest_id] = (manifest, model)
        return "sha256:gone" if model.get("gone") else manifest_id

    def manifest(self, manifest_id: str) -> Manifest:
        if manifest_id not in self._manifests:
            raise NotFound(f"no manifest {manifest_id}")
        return self._manifests[manifest_id][0]

    def collect(self) -> None:
        """As `gc` does with manifests that nobody needs."""
        self._manifests.clear()

    def hub_place(self, manifest_id: str) -> HubPlace | None:
        place = self._manifests[manifest_id][1].get("hub")
        return None if place is None else HubPlace(*place)

    @property
    def on_demand(self) -> bool:
        return "upstream" in self._load()

    async def demand(self, wish: Wish) -> None:
        """`upstream` is models by the name that is wished for, or the name of an error."""
        self.wishes.append(wish)
        found = self._load()["upstream"].get(wish.name, "NotFound")
        if isinstance(found, str):
            raise getattr(errors, found)(f"no {wish.name}")
        self._load()["models"][wish.name] = found
        self._load()["generation"] += 1

    def open(self, manifest_id: str, file: File) -> FakeReader:
        self.manifest(manifest_id)
        return FakeReader(self, self._manifests[manifest_id][1]["files"][file.path], file.path)

    async def refuted(self) -> str:
        await trio.sleep_forever()

    def uses(self, manifest_id: str, file: File, identity: str) -> bool:
        return False

    def status(self) -> dict[str, object]:
        return {"models": len(self._load()["models"]), "readers_closed": self.closed}

    def xattrs(self, manifest_id: str, file: File | None) -> dict[str, bytes]:
        found = {"model": self.manifest(manifest_id).name.encode()}
        return found | ({"local_bytes": str(file.size).encode()} if file else {})

    def statvfs(self) -> os.statvfs_result:
        return os.statvfs(self._store)


def load_from(path: Path) -> Callable[[], dict[str, Any]]:
    """Reads the file again only when it was replaced."""
    seen: tuple[int, dict[str, Any]] = (-1, {})

    def load() -> dict[str, Any]:
        nonlocal seen
        mtime = path.stat().st_mtime_ns
        if mtime != seen[0]:
            seen = (mtime, json.loads(path.read_text()))
        return seen[1]

    return load


class FakeMount:
    """A mount of a fake library that lives in another process; `prefix` runs that process in other circumstances."""

    def __init__(self, directory: Path, *, prefix: tuple[str, ...] = (), env: Mapping[str, str] | None = None) -> None:
        self.path = directory / "a mount"  # a space, since mountinfo escapes it
        self.state: dict[str, Any] = {"generation": 0, "models": {}, "faults": {}}
        self._state_file = directory / "state.json"
        self.log_file = directory / "log"
        self.prefix = prefix
        self.options: list[str] = []
        self.env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), **(env or {})}
        self.process: subprocess.Popen[bytes] | None = None

    def save(self) -> None:
        """Makes the state visible to the child at once."""
        self.state["generation"] += 1
        temp = self._state_file.with_suffix(".new")
        temp.write_text(json.dumps(self.state))
        os.utime(temp, ns=(self.state["generation"], self.state["generation"]))
        temp.replace(self._state_file)

    def model(self, name: str, files: Mapping[str, Any], **more: Any) -> None:
        self.state["models"][name] = {"files": dict(files), **more}
        self.save()

    def remove(self, name: str) -> None:
        del self.state["models"][name]
        self.save()

    def fault(self, path: str, kind: str) -> None:
        self.state["faults"] = {path: kind} if kind else {}
        self.save()

    def spawn(self) -> subprocess.Popen[bytes]:
        self.save()
        command = [*self.prefix, sys.executable, "-W", "error", __file__, str(self.path), str(self._state_file)]
        command += self.options
        with self.log_file.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=self.env)
        return self.process

    def start(self) -> "FakeMount":
        process = self.spawn()
        assert process.stdout is not None
        readable, _, _ = select.select([process.stdout], [], [], 30)
        if not readable or process.stdout.readline() != b"ready\n":
            self.stop()
            raise RuntimeError(f"the mount did not start: {self.log()}")
        return self

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Ends the child by a signal and returns how it exited."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.exit_code()

    def exit_code(self) -> int:
        assert self.process is not None and self.process.stdout is not None
        with self.process.stdout:
            return self.process.wait(20)

    def stop(self) -> None:
        """Leaves nothing behind, however the test went, and lets it be judged by what was logged."""
        sys.stderr.write(self.log())
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.process is not None and self.process.stdout is not None:
            self.process.stdout.close()
        while self.mounted():
            detach = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-uz"]
            subprocess.run([*detach, self.path], check=True)

    def mounted(self) -> bool:
        place = canonical(self.path)
        return any(m.point == place and m.kind == KIND for m in mounts())

    def log(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else ""

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.path / ".cakefs/status.json").read_bytes())
        return found


def eventually(condition: Callable[[], bool], seconds: float = 15.0, every: float = 0.02) -> bool:
    """Waits for what another process does; False after a bound that is far beyond what it should take.

    Args:
        every: Seconds between looks; 0 for what lasts for a moment only.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(every)
    return True


def why_no_mount() -> str:
    """Why tests with a mount must be skipped here, or nothing."""
    if not os.path.exists(FUSE_DEVICE):
        return f"{FUSE_DEVICE} is absent"
    return "" if os.access(FUSE_DEVICE, os.R_OK | os.W_OK) else f"this user may not open {FUSE_DEVICE}"


def main() -> int:
    from cakefs.fs.mount import serve

    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    mountpoint, state = map(Path, sys.argv[1:3])
    allow_other = sys.argv[3:] == ["allow_other"]
    grace_s = float(os.environ.get("FS_CHILD_GRACE_S", "1"))
    library = FakeLibrary(load_from(state), str(state.parent))

    async def run() -> None:
        await serve(
            library, mountpoint, allow_other=allow_other, on_ready=lambda: print("ready", flush=True), grace_s=grace_s
        )

    try:
        trio.run(run)
    except CakeError as error:
        print(f"error: {error.message} (hint: {error.hint})", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
