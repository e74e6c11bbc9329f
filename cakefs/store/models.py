"""The models of a store: the names they are shown under, and their manifests. LMDB; the tables are `Catalog`'s."""

import hashlib
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec

from cakefs.errors import CorruptData, NotFound, UserError
from cakefs.model import Manifest, ManifestHead, decode_head, decode_manifest, encode_manifest
from cakefs.store.numbers import GENERATION, Numbers

if TYPE_CHECKING:
    from cakefs.store.environment import Environment, Transaction

TABLES = {
    "models": False,  # shown name → ModelRecord
    "manifests": False,  # "sha256:<hex>" of the encoded manifest → the encoded manifest
    "outlines": False,  # a manifest's id → what `engine/known/shown.py` keeps of it
}

_LONGEST_KEY = 511  # LMDB's limit


class ModelRecord(msgspec.Struct, frozen=True, array_like=True):
    """Attributes:
    manifest: Its manifest's id.
    added: Unix seconds.
    """

    manifest: str
    added: int
    pinned: bool


class Models:
    """Part of the catalog."""

    def __init__(self, env: "Environment", numbers: Numbers) -> None:
        self._env = env
        self._numbers = numbers

    def generation(self) -> int:
        """Grows with every change of the table of models, whichever process makes it."""
        with self._env.read() as txn:
            return self._numbers.of(txn, GENERATION)

    def all(self) -> dict[str, ModelRecord]:
        with self._env.read() as txn:
            rows = txn.cursor(self._env.table["models"])
            return {str(k, "utf-8"): msgspec.msgpack.decode(v, type=ModelRecord) for k, v in rows}

    def put(
        self, manifest: Manifest, *, pinned: bool | None = None, outline: bytes = b"", instead_of: str | None = None
    ) -> str:
        """Stores the manifest and shows it under its name, instead of what had that name.

        Args:
            pinned: None keeps what holds for that name (at first: not pinned).
            outline: What follows from the manifest, for those who list many.
            instead_of: Only while the name stands for this one.

        Returns: The manifest's id; empty where the name stands for another one.
        """
        name, data = _name(manifest.name), encode_manifest(manifest)
        id = "sha256:" + hashlib.sha256(data).hexdigest()
        table = self._env.table

        def work(txn: "Transaction") -> str:
            row = txn.get(name, db=table["models"])
            old = None if row is None else msgspec.msgpack.decode(row, type=ModelRecord)
            if instead_of is not None and (old is None or old.manifest != instead_of):
                return ""
            kept = old is not None and old.pinned
            pin = kept if pinned is None else pinned
            txn.put(id.encode(), data, db=table["manifests"])
            if outline:
                txn.put(id.encode(), outline, db=table["outlines"])
            self._put_record(txn, name, ModelRecord(id, int(time.time()), pin))
            return id

        return self._env.write(work)

    def remove(self, name: str) -> bool:
        """Returns: False when there was none of that name. Its manifest and bytes stay, for gc."""

        def work(txn: "Transaction") -> bool:
            found = txn.delete(_name(name), db=self._env.table["models"])
            if found:
                self._numbers.count(txn, GENERATION)
            return found

        return self._env.write(work)

    def set_pinned(self, name: str, pinned: bool) -> bool:
        """Returns: False when there is no model of that name."""

        def work(txn: "Transaction") -> bool:
            old = txn.get(_name(name), db=self._env.table["models"])
            if old is None:
                return False
            record = msgspec.msgpack.decode(old, type=ModelRecord)
            if record.pinned != pinned:
                self._put_record(txn, _name(name), msgspec.structs.replace(record, pinned=pinned))
            return True

        return self._env.write(work)

    def manifest(self, id: str) -> Manifest:
        """Raises NotFound, and CorruptData when it no longer matches its id."""
        with self._env.read() as txn:
            return decode_manifest(self._encoded(txn, id))

    def head(self, id: str) -> ManifestHead:
        """Raises NotFound, and CorruptData when the manifest no longer matches its id."""
        with self._env.read() as txn:
            return decode_head(self._encoded(txn, id))

    def outlines(self) -> dict[str, bytes]:
        """By the ids of the manifests; not of all of them."""
        with self._env.read() as txn:
            return {str(k, "ascii"): bytes(v) for k, v in txn.cursor(self._env.table["outlines"])}

    def manifest_ids(self) -> set[str]:
        with self._env.read() as txn:
            return {str(k, "ascii") for k in txn.cursor(self._env.table["manifests"]).iternext(values=False)}

    def drop_manifests(self, ids: Iterable[str]) -> None:
        """Forgets those of them that no model has."""
        table = self._env.table
        unwanted = set(ids)

        def work(txn: "Transaction") -> None:
            used = {msgspec.msgpack.decode(v, type=ModelRecord).manifest for _, v in txn.cursor(table["models"])}
            for id in unwanted - used:
                txn.delete(id.encode(), db=table["manifests"])
                txn.delete(id.encode(), db=table["outlines"])

        self._env.write(work)

    def walk(self) -> None:
        """Makes sense of all of it. Raises CorruptData."""
        self.all()
        with self._env.read() as txn:
            for id in txn.cursor(self._env.table["manifests"]).iternext(values=False):
                self._encoded(txn, str(id, "ascii"))

    # Within a transaction

    def _encoded(self, txn: "Transaction", id: str) -> memoryview:
        data = txn.get(id.encode(), db=self._env.table["manifests"])
        if data is None:
            raise NotFound(f"no manifest {id} in the store", hint="cakefs add the model again")
        if "sha256:" + hashlib.sha256(data).hexdigest() != id:
            raise CorruptData(f"manifest {id} no longer matches its digest", hint="cakefs add the model again")
        return memoryview(data)

    def _put_record(self, txn: "Transaction", name: bytes, record: ModelRecord) -> None:
        txn.put(name, msgspec.msgpack.encode(record), db=self._env.table["models"])
        self._numbers.count(txn, GENERATION)


def _name(name: str) -> bytes:
    data = name.encode()
    if not 0 < len(data) <= _LONGEST_KEY:
        raise UserError(f"the name of a model has 1 to {_LONGEST_KEY} bytes: {name[:80]!r}")
    return data
