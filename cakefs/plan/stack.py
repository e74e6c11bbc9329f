"""A recipe and its models -> the layers of the output in order, each with the layers that it is made of. Pure."""

from collections.abc import Mapping
from typing import NamedTuple

from cakefs.errors import UserError
from cakefs.plan.parents import Parent, require_layers
from cakefs.plan.ratio import check_map, ratio_layers
from cakefs.plan.recipe import ModelRef, OutputSlice, Repeat, SourceSlice, Stack


class Input(NamedTuple):
    """One of the sources of an output layer."""

    source: SourceSlice
    parent: Parent
    layer: int


class Layer(NamedTuple):
    """An output layer; `depth` is where in its slice it lies, from 0 to 1."""

    inputs: tuple[Input, ...]
    part: OutputSlice
    depth: float


def unrolled(recipe: Repeat, parent: Parent) -> Stack:
    """A slice for each layer."""
    layers = ratio_layers(recipe.ratios, parent.depth, recipe.mode) if recipe.layers is None else recipe.layers
    entry = "ratio_repeat" if recipe.layers is None else "repeat_map_raw"
    slices = []
    for i, layer in enumerate(check_map(layers, parent.depth)):
        where = f"{entry}[{i}]" if recipe.layers else entry
        source = SourceSlice(ModelRef(recipe.model.name, where), layer, layer + 1, {}, where)
        slices.append(OutputSlice((source,), None, {}, where))
    return Stack("passthrough", tuple(slices))


def stack_layers(stack: Stack, parents: Mapping[str, Parent]) -> list[Layer]:
    """Raises UserError, naming the entry, for layers that do not exist or do not pair up."""
    return [layer for part in stack.slices for layer in _layers_of(part, parents)]


def _layers_of(part: OutputSlice, parents: Mapping[str, Parent]) -> list[Layer]:
    sources = [(source, parents[source.model.name]) for source in part.sources]
    ranges = [_range(source, parent) for source, parent in sources]
    if len({len(layers) for layers in ranges}) > 1:
        counts = ", ".join(f"{s.model.name} {len(r)}" for (s, _), r in zip(sources, ranges, strict=True))
        raise UserError(f"{part.where}: the models have different numbers of layers: {counts}")
    last = len(ranges[0]) - 1
    return [
        Layer(
            tuple(Input(source, parent, layer) for (source, parent), layer in zip(sources, layers, strict=True)),
            part,
            i / last if last else 1.0,
        )
        for i, layers in enumerate(zip(*ranges, strict=True))
    ]


def _range(source: SourceSlice, parent: Parent) -> range:
    layers = range(source.start, parent.depth if source.stop is None else source.stop)
    if layers.stop > parent.depth:
        raise UserError(
            f"{source.where}.layer_range: {parent.name} has no layer {max(layers.start, parent.depth)}",
            hint=f"its layers are 0-{parent.depth - 1}: [0, {parent.depth}] is all of them",
        )
    require_layers(parent, layers, source.where)
    return layers
