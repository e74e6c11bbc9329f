"""`cakefs slice`: some layers of a model as a model of their own. Pure.

Without renumbering, the tensors keep their names and config.json its bytes: what a worker of a distributed run expects.
Renumbered, the layers count from 0 and the config is cut to fit. What is no layer is left out unless asked for.
"""

from collections.abc import Sequence
from typing import NamedTuple

from cakefs.errors import UserError
from cakefs.model import Manifest, StackLayer, View
from cakefs.plan.layers import Role, layers_text
from cakefs.plan.modelconfig import Take, encode_config, rewrite_config
from cakefs.plan.parents import Parent, load_parent, require_layers
from cakefs.plan.quantized import map_quantization
from cakefs.plan.view import CONFIG, Part, PutLiteral, ReadSmall, ViewBuilder, donor_files


class Composed(NamedTuple):
    """A view, and what the user should know about it."""

    manifest: Manifest
    warnings: tuple[str, ...]


def build_slice(
    manifest: Manifest,
    layers: Sequence[int],
    *,
    name: str,
    created: int,
    read_small: ReadSmall,
    put_literal: PutLiteral,
    prefix: str = "",
    with_embeddings: bool = False,
    with_head: bool = False,
    renumber: bool = False,
) -> Composed:
    """Raises UserError for a layer or prefix that is not there, naming it and what is.

    Args:
        layers: Rising, as `parse_layers` gives them.
        with_head: The final norm too; of a tied model the embedding, which is its head.
    """
    parent = load_parent(manifest, read_small, prefix)
    require_layers(parent, layers, "layers")
    builder, warnings = ViewBuilder(put_literal), list[str]()
    numbers = {layer: i if renumber else layer for i, layer in enumerate(layers)}
    for layer, number in numbers.items():
        for rest, part in parent.layers[layer].items():
            _add(builder, parent, f"{parent.prefix}.{number}{rest}", part)
    for part in _outside(parent, with_embeddings, with_head, warnings):
        _add(builder, parent, part.name, part)
    for file in donor_files(manifest):
        builder.add_file(manifest, file)
    config = manifest.shown(View.MODEL).get(CONFIG)
    if renumber:
        warnings += _cut_config(builder, parent, numbers, read_small)
    elif config is not None:
        builder.add_file(manifest, config)
    stack = [StackLayer(number, parent.origin(layer), parent.note(layer)) for layer, number in numbers.items()]
    return Composed(
        builder.build(name, f"layers {layers_text(layers)} of {manifest.name}", created, stack), tuple(warnings)
    )


def _add(builder: ViewBuilder, parent: Parent, name: str, part: Part) -> None:
    builder.add_tensor(name, part.dtype, part.shape, builder.take(parent.manifest, part.data))


def _outside(parent: Parent, with_embeddings: bool, with_head: bool, warnings: list[str]) -> list[Part]:
    wanted = {Role.BEFORE} if with_embeddings else set()
    wanted |= {Role.AFTER} if with_head else set()
    found = {name: part for name, part in parent.outside.items() if parent.role(name) in wanted}
    embedding = parent.token_embedding()
    if with_head and not parent.heads() and embedding is not None:
        found[embedding.name] = embedding
    for asked, role in ((with_embeddings, Role.BEFORE), (with_head, Role.AFTER)):
        if asked and not any(parent.role(name) is role for name in found):
            warnings.append(f"{parent.name} has no {role.value} that cakefs knows by name")
    return list(found.values())


def _cut_config(
    builder: ViewBuilder, parent: Parent, numbers: dict[int, int], read_small: ReadSmall
) -> tuple[str, ...]:
    if parent.section is None:
        raise UserError(f"{parent.name} has no layer count in config.json to fit", hint="slice it without --renumber")
    stack = [Take(0, layer) for layer in numbers if layer < parent.depth]
    beyond = len(numbers) - len(stack)
    if not stack:
        raise UserError("layers: only heads for further tokens, no layer", hint=f"the layers are 0-{parent.depth - 1}")
    new = rewrite_config([parent.config], [parent.section], stack, beyond=beyond)
    places = {Take(0, layer): (number,) for layer, number in numbers.items()}
    map_quantization(builder, new.config, [parent], 0, places, read_small)
    builder.add_bytes(CONFIG, encode_config(new.config))
    return new.warnings
