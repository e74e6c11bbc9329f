"""The tensors of a model as hashes.json counts them: by published file, from the start of its data section. Pure."""

from typing import NamedTuple

from cakefs.errors import InvalidFormat, UserError
from cakefs.formats.hashes import TensorHash
from cakefs.formats.strictjson import brief
from cakefs.model import Extent, Manifest, SpanKey, View
from cakefs.plan.tensors import shown_tensors
from cakefs.plan.view import WEIGHTS


class Placed(NamedTuple):
    """A tensor: `[start, stop)` in the data section of `file_name`, and the span that has its bytes."""

    name: str
    file_name: str
    start: int
    stop: int
    key: SpanKey


def placed_tensors(manifest: Manifest) -> list[Placed]:
    """Tensors in published safetensors or GGUF files; of a slice or merge, those of the file that it shows.

    Raises:
        UserError: Two tensors have one name, or a tensor is not stored but calculated: hashes.json cannot say that.
    """
    found = _of_view(manifest) if manifest.stack else _of_published(manifest)
    files: dict[str, str] = {}
    for one in found:
        if one.name in files:
            both = f"{files[one.name]} and {one.file_name}"
            raise UserError(f"hashes.json names a tensor once, and {brief(one.name)} is in {both} of {manifest.name}")
        files[one.name] = one.file_name
    if not found:
        raise UserError(f"{manifest.name} has no tensors in safetensors or GGUF files: there is nothing to hash")
    return found


def _of_published(manifest: Manifest) -> list[Placed]:
    """Of the safetensors files, or where there are none, of the GGUF files (each with the padding behind it)."""
    found: dict[str, list[Placed]] = {".safetensors": [], ".gguf": []}
    begins: dict[int, int] = {}  # of the data sections, by source
    whole = [(t, t.data) for t in shown_tensors(manifest) if isinstance(t.data, Extent)]
    for _, data in whole:
        span = manifest.spans[data.span]
        begins[span.source] = min(span.start, begins.get(span.source, span.start))
    for span in manifest.spans:
        if span.start == 0 and manifest.sources[span.source].path.endswith(".safetensors"):
            begins[span.source] = span.stop  # the header: an index may leave the first tensors out
    for tensor, data in whole:
        span = manifest.spans[data.span]
        path, begin = manifest.sources[span.source].path, begins[span.source]
        kind = path[path.rfind(".") :]
        if kind in found:
            key = manifest.key(data.span)
            found[kind].append(Placed(tensor.name, path, span.start - begin, span.stop - begin, key))
    return found[".safetensors"] or found[".gguf"]


def _of_view(manifest: Manifest) -> list[Placed]:
    found, position = [], 0
    for tensor, segment in zip(manifest.tensors, manifest.shown(View.MODEL)[WEIGHTS].segments[1:], strict=True):
        if not isinstance(segment, Extent) or segment.size != manifest.spans[segment.span].size:
            what = f"{tensor.name} of {manifest.name} is calculated when it is read"
            raise UserError(f"{what}: it has no hash yet", hint="cakefs export it, and hash the file")
        stop = position + segment.size
        found.append(Placed(tensor.name, WEIGHTS, position, stop, manifest.key(segment.span)))
        position = stop
    return found


def match_claims(manifest: Manifest, entries: list[TensorHash], where: str) -> list[tuple[SpanKey, str]]:
    """The spans that the entries are about, with the SHA-256 that each is said to have; empty tensors left out.

    Raises:
        InvalidFormat: An entry is about a tensor that the model does not have, or has elsewhere.
    """
    tensors = {tensor.name: tensor for tensor in placed_tensors(manifest)}
    claims = []
    for entry in entries:
        tensor = tensors.get(entry.name)
        if tensor is None:
            raise InvalidFormat(f"{where}: {brief(entry.name)} is no tensor of {manifest.name}")
        if (entry.file_name, entry.start, entry.stop) != tensor[1:4]:
            at = f"bytes {tensor.start}-{tensor.stop} of {tensor.file_name}"
            said = f"{entry.start}-{entry.stop} of {brief(entry.file_name)}"
            hint = "it is about another revision, or another model"
            raise InvalidFormat(f"{where}: {brief(entry.name)} is not {said} in {manifest.name}, but {at}", hint=hint)
        if tensor.key.size:
            claims.append((tensor.key, entry.sha256))
    return claims
