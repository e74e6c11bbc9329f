"""A model with near-equal tensors of another one in the place of its own: asked for by name and bound, never silent.

The result is made here, as a slice is: its file is not what was published, and says so in its metadata, as the manifest
does to `ls`, `show` and the mount. Only tensors are taken whose largest difference was measured, element by element;
one with a NaN or an infinity that the other has not is never near.
"""

import json
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from cakefs.model import Extent, LayerOrigin, Manifest, SpanKey, StackLayer
from cakefs.plan.derived import own_files
from cakefs.plan.layers import split_name
from cakefs.plan.view import WEIGHTS, Part, PutLiteral, ViewBuilder, parts_of

METADATA_KEY = "cakefs.substituted"


class Candidate(NamedTuple):
    """Tensors of one name, dtype and shape in both models, each a stored piece of its own."""

    name: str
    own: SpanKey
    other: SpanKey


def candidates(manifest: Manifest, other: Manifest) -> list[Candidate]:
    """What could be substituted, were it near enough. Raises UserError for a model without `model.safetensors`."""
    parts, donors = parts_of(manifest), parts_of(other)
    found = []
    for name, part in parts.items():
        donor = donors.get(name)
        if donor is None or (part.dtype, part.shape) != (donor.dtype, donor.shape):
            continue
        own, theirs = _whole(manifest, part), _whole(other, donor)
        if own is not None and theirs is not None and own != theirs and own.size:
            found.append(Candidate(name, own, theirs))
    return found


def _whole(manifest: Manifest, part: Part) -> SpanKey | None:
    data = part.data
    whole = isinstance(data, Extent) and data.size == manifest.spans[data.span].size
    return manifest.key(data.span) if isinstance(data, Extent) and whole else None


def build_substituted(
    manifest: Manifest,
    other: Manifest,
    diffs: Mapping[str, float],
    bound: float,
    *,
    name: str,
    created: int,
    put_literal: PutLiteral,
) -> Manifest:
    """Args:
    diffs: The tensors to be taken from `other`, and the largest difference of each.
    """
    parts, donors = parts_of(manifest), parts_of(other)
    builder = ViewBuilder(put_literal)
    for tensor, part in parts.items():  # In this order spans are counted, by which a manifest is the same again.
        source, chosen = (other, donors[tensor]) if tensor in diffs else (manifest, part)
        builder.add_parts(source, [(tensor, chosen)])
    for path, file in own_files(manifest).items():
        if path != WEIGHTS:
            builder.add_file(manifest, file)
    builder.metadata[METADATA_KEY] = json.dumps(
        {
            "model": other.name,
            "origin": other.origin,
            "revision": other.revision,
            "max_diff": bound,
            "tensors": dict(sorted(diffs.items())),
        },
        ensure_ascii=False,
    )
    count = f"{len(diffs)} of {len(parts)} tensors"
    words = f"{count} are those of {other.name}, max |a - b| <= {bound:g}"
    at = f" at {manifest.revision[:12]}" if manifest.revision else ""
    made = builder.build(
        name, f"{manifest.origin}{at}, with tensors of {other.name}", created, _stack(manifest, other, diffs)
    )
    return msgspec.structs.replace(made, substituted=words)


def _stack(manifest: Manifest, other: Manifest, diffs: Mapping[str, float]) -> list[StackLayer]:
    """The layers by number, of both models where a tensor of it was taken from the other."""
    layers: dict[int, set[bool]] = {}
    for tensor in parts_of(manifest):
        split = split_name(tensor)
        layers.setdefault(split.layer if split is not None else -1, set()).add(tensor in diffs)
    outside = layers.pop(-1, set())
    return [
        StackLayer(
            layer, tuple(_origin(m, layer) for m, wanted in ((manifest, False), (other, True)) if wanted in kinds)
        )
        for layer, kinds in sorted((layers or {0: outside}).items())
    ]


def _origin(manifest: Manifest, layer: int) -> LayerOrigin:
    return LayerOrigin(manifest.name, layer, manifest.revision)
