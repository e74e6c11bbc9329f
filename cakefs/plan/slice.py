"""`cakefs slice`: some layers of a model as a model of their own. Pure.

Without renumbering, the tensors keep their names and config.json its bytes: what a worker of a distributed run expects.
Renumbered, the layers count from 0 and the config is cut to fit. What is no layer is left out unless asked for; with
both embeddings and head everything is in, a vision tower too: a model that loads.
"""

from typing import NamedTuple, TypedDict, Unpack

from cakefs.errors import UserError
from cakefs.model import Manifest, StackLayer, View
from cakefs.plan.fit import check_first
from cakefs.plan.layers import Role, numbers
from cakefs.plan.modelconfig import Take, rewrite_config
from cakefs.plan.parents import Parent, load_parent, named_layers
from cakefs.plan.quantized import map_quantization
from cakefs.plan.sections import encode_config
from cakefs.plan.view import CONFIG, Part, PutLiteral, ReadSmall, ViewBuilder, donor_files


class Composed(NamedTuple):
    """A view, and what the user should know about it."""

    manifest: Manifest
    warnings: tuple[str, ...]


class SliceOptions(TypedDict, total=False):
    """Attributes:
    prefix: Of the layers' names, where it cannot be found.
    with_embeddings: Also what stands before the layers.
    with_head: The final norm and the head too; of a tied model the embedding, which is its head.
    renumber: Count the layers from 0, and fit the config to them.
    """

    prefix: str
    with_embeddings: bool
    with_head: bool
    renumber: bool


def build_slice(
    manifest: Manifest,
    layers: str,
    *,
    name: str,
    created: int,
    read_small: ReadSmall,
    put_literal: PutLiteral,
    **options: Unpack[SliceOptions],
) -> Composed:
    """Raises UserError for a layer or prefix that is not there, naming it and what is.

    Args:
        layers: Such as `0-15,20`.
    """
    renumber = options.get("renumber", False)
    with_embeddings, with_head = options.get("with_embeddings", False), options.get("with_head", False)
    parent = load_parent(manifest, read_small, options.get("prefix", ""))
    chosen = named_layers(parent, layers)
    builder, warnings = ViewBuilder(put_literal), list[str]()
    moved = {layer: i if renumber else layer for i, layer in enumerate(chosen)}
    for layer, number in moved.items():
        at = f"{parent.prefix}.{number}"
        builder.add_parts(manifest, ((at + rest, part) for rest, part in parent.layers[layer].items()))
    builder.add_parts(manifest, ((p.name, p) for p in _outside(parent, with_embeddings, with_head, warnings)))
    for file in donor_files(manifest):
        builder.add_file(manifest, file)
    config = manifest.shown(View.MODEL).get(CONFIG)
    if renumber:
        warnings += _cut_config(builder, parent, moved, parent.further_heads() if with_head else 0, read_small)
        if not (with_embeddings and with_head):
            warnings.append("to load as a model of its own it also needs --with-embeddings and --with-head")
    elif config is not None:
        builder.add_file(manifest, config)
    stack = [StackLayer(number, parent.origin(layer), parent.note(layer)) for layer, number in moved.items()]
    return Composed(builder.build(name, f"{numbers(chosen)} of {manifest.name}", created, stack), tuple(warnings))


def _outside(parent: Parent, with_embeddings: bool, with_head: bool, warnings: list[str]) -> list[Part]:
    if with_embeddings and with_head:
        return list(parent.outside.values())
    wanted = Role.BEFORE if with_embeddings else Role.AFTER if with_head else None
    found = {name: part for name, part in parent.outside.items() if parent.role(name) is wanted}
    if wanted is not None and not found:
        warnings.append(f"{parent.name} has no {wanted.value} that cakefs knows by name")
    embedding = parent.token_embedding()
    if with_head and not parent.heads() and embedding is not None:
        found[embedding.name] = embedding
    return list(found.values())


def _cut_config(
    builder: ViewBuilder, parent: Parent, moved: dict[int, int], apart: int, read_small: ReadSmall
) -> tuple[str, ...]:
    """Warnings. `apart`: heads for further tokens that are named apart from the layers."""
    if parent.section is None:
        message = f"config.json of {parent.name} does not count the layers {parent.prefix}.N: it cannot be cut"
        raise UserError(message, hint="slice it without --renumber")
    stack = [Take(0, layer) for layer in moved if layer < parent.depth]
    beyond = len(moved) - len(stack) or apart
    if not stack:
        raise UserError("layers: only heads for further tokens, no layer", hint=f"the layers are 0-{parent.depth - 1}")
    check_first(parent, [take.layer for take in stack], "layers")
    new = rewrite_config([parent.config], [parent.section], stack, beyond=beyond)
    places = {Take(0, layer): (number,) for layer, number in moved.items()}
    map_quantization(builder, new.config, [parent], 0, places, read_small)
    builder.add_bytes(CONFIG, encode_config(new.config))
    return new.warnings
