"""The yardstick: the least that a pyfuse3 server can do. One native file shown through FUSE, one preadv a request.

python -m tests.bench.passthrough FILE MOUNTPOINT
"""

import errno
import os
import stat
import sys

import pyfuse3
import trio

FILE = pyfuse3.ROOT_INODE + 1


class PassThrough(pyfuse3.Operations):
    def __init__(self, path: str) -> None:
        super().__init__()
        self._fd = os.open(path, os.O_RDONLY)
        self._size = os.fstat(self._fd).st_size
        self._buffer = memoryview(bytearray(4 << 20))
        self._name = os.path.basename(path).encode()

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = stat.S_IFREG | 0o444 if inode == FILE else stat.S_IFDIR | 0o555
        entry.st_size = self._size if inode == FILE else 0
        entry.st_blksize = 4096
        entry.st_blocks = -(-entry.st_size // 512)
        entry.attr_timeout = entry.entry_timeout = 300
        return entry

    async def lookup(self, parent_inode, name, ctx):
        if name != self._name:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attributes(FILE)

    async def getattr(self, inode, ctx=None):
        return self._attributes(inode)

    async def open(self, inode, flags, ctx):
        return pyfuse3.FileInfo(fh=1, keep_cache=True)

    async def read(self, fh, offset, size):
        view = self._buffer[:size]
        return view[: os.preadv(self._fd, [view], offset)]

    async def opendir(self, inode, ctx):
        return inode

    async def readdir(self, fh, start_id, token):
        if start_id == 0:
            pyfuse3.readdir_reply(token, self._name, self._attributes(FILE), 1)


def main() -> None:
    path, mountpoint = sys.argv[1:]
    options = set(pyfuse3.default_options) | {"fsname=passthrough", "ro"}
    pyfuse3.init(PassThrough(path), mountpoint, options)
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close()


if __name__ == "__main__":
    main()
