"""hashes.json of a model here, and what one from elsewhere says about it."""

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

from cakefs.engine.known.claims import Progress, candidates, learn
from cakefs.engine.known.survey import find_model
from cakefs.errors import CorruptData, InvalidFormat, UserError
from cakefs.formats.hashes import HASHES_LIMIT, TensorHash, parse_hashes
from cakefs.model import Manifest, SpanKey
from cakefs.plan.published import match_claims, placed_tensors
from cakefs.plan.pullplan import PROVING
from cakefs.store.store import Store

EMPTY = hashlib.sha256().hexdigest()


class Imported(NamedTuple):
    """What an import recorded.

    Attributes:
        claims: Tensors of which it says something.
        useless: Those of them whose file has no published SHA-256, so that nothing can bear the claim out.
        held: Those that are not here, while a blob with the claimed SHA-256 is.
    """

    name: str
    claims: int
    useless: int
    held: int


def hash_model(store: Store, manifest: Manifest, progress: Progress = lambda size: None) -> list[TensorHash]:
    """The SHA-256 of each tensor, computed where it was not before.

    Raises:
        UserError: Not all of them are here.
        CorruptData: One is damaged.
    """
    tensors = placed_tensors(manifest)
    digests = _digests(store, [t.key for t in tensors])
    missing = [t for t in tensors if t.key.size and t.key not in digests]
    if missing:
        size = sum(t.key.size for t in missing)
        what = f"{len(missing)} of {len(tensors)} tensors of {manifest.name} are not here ({size:,} bytes)"
        raise UserError(f"{what}, such as {missing[0].name}", hint=f"cakefs pull {manifest.name}")
    hashes = learn(store, list(digests.values()), progress)
    entries = []
    for tensor in tensors:
        sha256 = hashes.get(digests[tensor.key], "") if tensor.key.size else EMPTY
        if not sha256:
            hint = f"cakefs verify {manifest.name} --repair"
            raise CorruptData(f"{tensor.name} of {manifest.name} is damaged in the store", hint=hint)
        entries.append(TensorHash(tensor.name, tensor.start, tensor.stop, tensor.file_name, sha256))
    return entries


def import_claims(store: Store, manifest: Manifest, data: bytes, where: str) -> Imported:
    """Records what a hashes.json says about a model, all of it or nothing, and hashes the blobs that it may be about.

    Raises:
        InvalidFormat: It is no hashes.json, is about another model, or contradicts a SHA-256 that was computed here.
    """
    claims = match_claims(manifest, parse_hashes(data, where), where)
    digests = _digests(store, [key for key, _ in claims])
    computed = store.catalog.sha256.of(set(digests.values()))
    for key, sha256 in claims:
        ours = computed.get(digests.get(key, ""), sha256)
        if ours != sha256:
            name = next(t.name for t in placed_tensors(manifest) if t.key == key)
            raise InvalidFormat(f"{where}: {name} has SHA-256 {ours} here, not {sha256}", hint="nothing was imported")
    store.catalog.sha256.put_claims(claims)
    left = [i for i in range(len(manifest.spans)) if manifest.key(i) not in digests]
    learn(store, candidates(store, manifest, left, dict(claims)))
    known = store.catalog.sha256.digests({sha256 for _, sha256 in claims})
    useless = sum(not key.identity.startswith(PROVING) for key, _ in claims)
    held = sum(key not in digests and sha256 in known for key, sha256 in claims)
    return Imported(manifest.name, len(claims), useless, held)


def _digests(store: Store, keys: list[SpanKey]) -> dict[SpanKey, str]:
    """Blobs of the spans that are complete."""
    wanted = set(keys)
    return {
        key: digest
        for identity in {key.identity for key in wanted}
        for span, digest in store.catalog.spans(identity).items()
        if (key := SpanKey(identity, *span)) in wanted
    }


def read_hashes(path: Path) -> bytes:
    """Raises UserError."""
    try:
        with path.open("rb") as file:
            return file.read(HASHES_LIMIT + 1)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def model_of(store: Store, place: str) -> Manifest:
    """The model that a hashes.json is about, by the directories it is in, such as `…/org/name/hashes.json`.

    Raises:
        UserError: No such model is here.
    """
    parts = [part for part in re.sub(r"[?#].*$", "", place).split("/")[:-1] if part]
    known = store.catalog.models.all()
    for name in ("/".join(parts[-2:]), parts[-1] if parts else ""):
        if name in known:
            return find_model(store, name)
    hint = f"cakefs hashes --import {place} MODEL"
    raise UserError(f"the place of {place} does not say which model here it is about", hint=hint)
