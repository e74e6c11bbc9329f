"""SHA-256s, the hash that is exchanged with others: those we computed, beside the blobs; those others claim, beside the
spans. LMDB; the tables are `Catalog`'s.

The two are never mixed up. A row of the first kind is a fact: we hashed the bytes of that blob. A row of the second
kind is a guess about bytes that may not be here; it never says where a span's bytes are.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from cakefs.model import SpanKey
from cakefs.store.rows import identity_hash, scan, span_row

if TYPE_CHECKING:
    from cakefs.store.environment import Environment, Transaction

TABLES = {
    "sha256": False,  # digest of a blob → the SHA-256 of its bytes (32 bytes), as computed here
    "digests": False,  # the reverse: SHA-256 → digest of the blob
    "claims": False,  # as in `spans`: identity, start, stop → the SHA-256 that somebody says these bytes have
}


class Sha256s:
    """Part of the catalog. A SHA-256 is 64 lower-case hex digits here, 32 bytes in the tables."""

    def __init__(self, env: "Environment") -> None:
        self._env = env

    # What we computed

    def record(self, hashes: Mapping[str, str]) -> None:
        """Says what the blobs' bytes hash to, by digest; those that are gone meanwhile are left out."""

        def work(txn: "Transaction") -> None:
            table = self._env.table
            for digest, sha256 in hashes.items():
                if txn.get(digest.encode(), db=table["blobs"]) is not None:
                    txn.put(digest.encode(), bytes.fromhex(sha256), db=table["sha256"])
                    txn.put(bytes.fromhex(sha256), digest.encode(), db=table["digests"])

        if hashes:
            self._env.write(work)

    def of(self, digests: Iterable[str]) -> dict[str, str]:
        """The SHA-256s of these blobs, as far as they were computed."""
        with self._env.read() as txn:
            table = self._env.table["sha256"]
            if not txn.stat(table)["entries"]:
                return {}
            found = ((digest, txn.get(digest.encode(), db=table)) for digest in digests)
            return {digest: value.hex() for digest, value in found if value is not None}

    def digests(self, hashes: Iterable[str]) -> dict[str, str]:
        """The blobs here that have these SHA-256s."""
        with self._env.read() as txn:
            table = self._env.table["digests"]
            found = ((sha256, txn.get(bytes.fromhex(sha256), db=table)) for sha256 in hashes)
            return {sha256: str(value, "ascii") for sha256, value in found if value is not None}

    def drop(self, txn: "Transaction", digest: bytes) -> None:
        """For the transaction that drops the blob: the digest may stand for other bytes later."""
        sha256 = txn.pop(digest, db=self._env.table["sha256"])
        if sha256 is not None:
            txn.delete(bytes(sha256), db=self._env.table["digests"])

    # What others claim

    def put_claims(self, claims: Iterable[tuple[SpanKey, str]]) -> None:
        """A later claim about a span takes the place of an earlier one."""
        batch = list(claims)

        def work(txn: "Transaction") -> None:
            table = self._env.table
            for key, sha256 in batch:
                row = span_row(key)
                txn.put(row[:20], key.identity.encode(), db=table["identities"], overwrite=False)
                txn.put(row, bytes.fromhex(sha256), db=table["claims"])

        if batch:
            self._env.write(work)

    def claims(self, identity: str) -> dict[tuple[int, int], str]:
        """What is claimed of the spans of one upstream file, by start and stop."""
        with self._env.read() as txn:
            return {span: sha256.hex() for span, sha256 in scan(txn, self._env.table["claims"], identity)}

    def drop_claims(self, keys: Iterable[SpanKey]) -> None:
        rows = [span_row(key) for key in keys]

        def work(txn: "Transaction") -> None:
            for row in rows:
                txn.delete(row, db=self._env.table["claims"])

        if rows:
            self._env.write(work)

    def keep_claims(self, identities: Iterable[str]) -> None:
        """Drops those about all other upstream files."""
        kept = {identity_hash(identity) for identity in identities}

        def work(txn: "Transaction") -> None:
            table = self._env.table["claims"]
            rows = [bytes(k) for k in txn.cursor(table).iternext(values=False)]
            for row in rows:
                if row[:20] not in kept:
                    txn.delete(row, db=table)

        self._env.write(work)
