"""What the mount needs from below: the models, and readers of their files. Implemented by `engine`, faked in tests.

All methods that are not async are called on the event loop that serves the kernel: they must not wait, least of all
for the network. Foreign exceptions do not leave them, only `CakeError`.
"""

import os
from collections.abc import Mapping
from typing import Protocol

from cakefs.model import File, Manifest
from cakefs.plan.hubcache import HubPlace
from cakefs.plan.wish import Wish


class FileReader(Protocol):
    """One open file. It can be read until `close`, whatever happens to its model meanwhile."""

    @property
    def size(self) -> int: ...

    def try_read(self, offset: int, size: int) -> memoryview | None:
        """The bytes when they are at hand, clamped to the end of the file; None when that would take waiting.

        The buffer is valid until the next call into the engine: it is sent before anything is awaited.
        """
        ...

    async def read(self, offset: int, size: int) -> memoryview | bytes:
        """The same bytes, after fetching what is missing.

        Raises:
            CakeError: after bounded retries.
        """
        ...

    def close(self) -> None: ...


class Library(Protocol):
    """The models of one store. Other processes change it at any time."""

    def generation(self) -> int:
        """Differs from its earlier value whenever `names` does. Asked at every look at the name levels: cheap."""
        ...

    def names(self) -> Mapping[str, str]:
        """Manifest id by shown name."""
        ...

    def manifest(self, manifest_id: str) -> Manifest: ...

    def hub_place(self, manifest_id: str) -> HubPlace | None:
        """Where it belongs in the Hugging Face cache shape."""
        ...

    @property
    def on_demand(self) -> bool:
        """Whether `demand` may bring anything."""
        ...

    async def demand(self, wish: Wish) -> None:
        """Adds a model that is not among the names; several who want the same wait for the same.

        Raises:
            CakeError: it cannot be had, or not in the time that a lookup may take. Already logged.
        """
        ...

    def open(self, manifest_id: str, file: File) -> FileReader:
        """Cheap and without network: loaders take any error here for "No such file"."""
        ...

    async def refuted(self) -> str:
        """Waits until some of the bytes that were served turn out to be wrong; returns the identity of their source."""
        ...

    def uses(self, manifest_id: str, file: File, identity: str) -> bool:
        """Whether bytes of a source are shown in a file."""
        ...

    def status(self) -> Mapping[str, object]:
        """Live counters, fit for JSON."""
        ...

    def xattrs(self, manifest_id: str, file: File | None) -> Mapping[str, bytes]:
        """What is known about a file, or about the whole model (None): `digest`, `source`, `local_bytes` and so on.

        The mount shows `digest` as `user.cakefs.digest`.
        """
        ...

    def statvfs(self) -> os.statvfs_result:
        """Of the file system that the store is on."""
        ...
