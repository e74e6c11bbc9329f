"""The bytes that the hub serves, held in memory or left on disk, and the hashes that the Hub publishes about them."""

import hashlib
import threading
from pathlib import Path

SUFFIXES = ".safetensors .bin .gguf .pt .pth .ckpt .h5 .msgpack .onnx .npz .pkl .model .zip .tar .parquet .ot .tflite"
LFS_SUFFIXES = tuple(SUFFIXES.split())
LFS_SIZE = 10 * 1024 * 1024


def default_lfs(path: str, size: int) -> bool:
    """What the Hub's usual .gitattributes and its limit for plain git files make an LFS file."""
    return path.endswith(LFS_SUFFIXES) or size > LFS_SIZE


class Content:
    """Immutable bytes with lazily computed, remembered hashes. A file on disk must not change while it is served."""

    def __init__(self, source: bytes | Path) -> None:
        self.data = source if isinstance(source, bytes) else None
        self.path = source if isinstance(source, Path) else None
        self.size = len(source) if isinstance(source, bytes) else source.stat().st_size
        self._hashes: dict[str, str] = {}
        self._lock = threading.Lock()

    def read(self, start: int, stop: int) -> bytes:
        if self.data is not None:
            return self.data[start:stop]
        assert self.path is not None
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def sha256(self) -> str:
        return self._hash("sha256", b"")

    def git_id(self) -> str:
        """Id of a git blob with these bytes."""
        return self._hash("sha1", b"blob %d\0" % self.size)

    def pointer(self) -> bytes:
        """The LFS pointer file that git has in place of these bytes."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256()}\nsize {self.size}\n".encode()

    def _hash(self, algorithm: str, prefix: bytes) -> str:
        with self._lock:
            if algorithm not in self._hashes:
                self._hashes[algorithm] = self._digest(algorithm, prefix)
            return self._hashes[algorithm]

    def _digest(self, algorithm: str, prefix: bytes) -> str:
        state = hashlib.new(algorithm, prefix)
        if self.data is not None:
            state.update(self.data)
        else:
            assert self.path is not None
            with self.path.open("rb", buffering=0) as file:
                while block := file.read(1 << 20):
                    state.update(block)
        return state.hexdigest()
