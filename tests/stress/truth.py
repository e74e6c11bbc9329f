"""What is published, and so what every file under a mount must contain."""

from pathlib import Path
from typing import NamedTuple

from cakefs.model import CHUNK
from tests.models import CONFIG, sharded, single, tensor

WEIGHTS = "model.safetensors"
LARGE = 5 * CHUNK // 2 // 4  # Values of a tensor that is cut into three chunks.
CORRUPTED = "org/corrupted"  # Its answers are spoiled; it is compared only once it is confirmed.


class Shown(NamedTuple):
    """A file under a mount."""

    path: Path
    data: bytes


def published() -> dict[str, dict[str, bytes]]:
    """By repository; all but the last share half of their tensors."""
    common = {f"shared.{i}": tensor(i, LARGE) for i in range(4)}
    repos: dict[str, dict[str, bytes]] = {}
    for number, name in enumerate(["org/one", "org/two", "org/three"], 1):
        own = {f"own.{i}": tensor(100 * number + i, LARGE) for i in range(4)}
        small = {f"small.{i}": tensor(1000 * number + i, 3000) for i in range(20)}
        tensors = common | own | small
        files = sharded(tensors, 3) if name == "org/two" else {WEIGHTS: single(tensors)}
        repos[name] = files | {"config.json": CONFIG, "notes.txt": name.encode() * 1000}
        if name == "org/two":
            repos["shown"] = {WEIGHTS: single(tensors)}
    repos[CORRUPTED] = {WEIGHTS: single({f"t.{i}": tensor(9000 + i, LARGE) for i in range(3)})}
    return repos


def truth() -> tuple[dict[str, dict[str, bytes]], list[Shown]]:
    """The repositories, and the files of the mount that are compared with each read."""
    repos = published()
    merged = repos.pop("shown")
    shown = []
    for name, files in repos.items():
        if name == CORRUPTED:
            continue
        original = Path(".cakefs/original", name)
        shown += [Shown(original / path, data) for path, data in files.items()]
        kept = {path: data for path, data in files.items() if not path.startswith("model")}
        weights = merged if WEIGHTS not in files else {WEIGHTS: files[WEIGHTS]}
        shown += [Shown(Path(name, path), data) for path, data in (kept | weights).items()]
    return repos, shown
