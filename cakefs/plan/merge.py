"""`cakefs merge`: a checked recipe and the models it names -> the manifest of the merged model. Pure.

Layers in the recipe's order, renumbered from 0; what stands before the layers from the first slice's models, norm and head
from the last slice's, config and tokenizer from the donor (the base model, else the first that is named). Where nothing is
calculated a tensor is the extent that its model already has, however often it appears.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from cakefs.errors import UserError
from cakefs.model import LayerOrigin, Manifest, StackLayer, View
from cakefs.plan.blend import Formula, Operand, blend
from cakefs.plan.fit import check_fit, check_ties, check_vocabulary, odd_layers
from cakefs.plan.layers import Role, is_head
from cakefs.plan.modelconfig import Config, Take, encode_config, rewrite_config
from cakefs.plan.parents import Parent, load_parent, require_layers
from cakefs.plan.quantized import map_quantization
from cakefs.plan.ratio import check_map, ratio_layers
from cakefs.plan.recipe import ModelRef, OutputSlice, Recipe, Repeat, SourceSlice, Stack, referenced
from cakefs.plan.settings import Settings, resolve
from cakefs.plan.slice import Composed
from cakefs.plan.view import CONFIG, Part, PutLiteral, ReadSmall, ViewBuilder, donor_files

_DTYPE_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
# Recomputed by every loader: in one model's file and not in another's, they are left out.
_BUFFERS = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attention.rotary_emb.inv_freq")


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


def build_merge(
    recipe: Recipe,
    models: Mapping[str, Manifest],
    *,
    name: str,
    created: int,
    read_small: ReadSmall,
    put_literal: PutLiteral,
    prefix: str = "",
) -> Composed:
    """Raises UserError, naming the entry of the recipe, where it cannot be what it says.

    Args:
        models: By the names in the recipe; a missing one is refused.
    """
    parents: dict[str, Parent] = {}
    for ref in referenced(recipe):
        if ref.name not in models:
            raise UserError(f"{ref.where}: no model {ref.name}", hint=f"cakefs add {ref.name}")
        parents[ref.name] = load_parent(models[ref.name], read_small, prefix)
        if parents[ref.name].section is None:
            raise UserError(f"{ref.where}: no layer count in config.json of {ref.name}")
    stack = _unrolled(recipe, parents[recipe.model.name]) if isinstance(recipe, Repeat) else recipe
    merger = _Merger(stack, parents, ViewBuilder(put_literal), read_small)
    return merger.build(name, created, recipe.warnings)


def _unrolled(recipe: Repeat, parent: Parent) -> Stack:
    """A slice for each layer."""
    layers = ratio_layers(recipe.ratios, parent.depth, recipe.mode) if recipe.layers is None else recipe.layers
    entry = "ratio_repeat" if recipe.layers is None else "repeat_map_raw"
    slices = []
    for i, layer in enumerate(check_map(layers, parent.depth)):
        where = f"{entry}[{i}]" if recipe.layers else entry
        source = SourceSlice(ModelRef(recipe.model.name, where), layer, layer + 1, {}, where)
        slices.append(OutputSlice((source,), None, {}, where))
    return Stack("passthrough", tuple(slices))


class _Merger:
    """Checks, then builds, one merge."""

    def __init__(self, stack: Stack, parents: dict[str, Parent], builder: ViewBuilder, read_small: ReadSmall) -> None:
        self._stack, self._parents = stack, parents
        self._builder, self._read_small = builder, read_small
        first, last = stack.slices[0], stack.slices[-1]
        self._donor = parents[stack.base.name if stack.base else first.sources[0].model.name]
        self._first = tuple(parents[s.model.name] for s in first.sources)
        self._last = tuple(parents[s.model.name] for s in last.sources)
        self._head = parents[stack.head.name] if stack.head else None
        self._layers = [layer for part in stack.slices for layer in self._layers_of(part)]
        self._warnings: list[str] = []

    def build(self, name: str, created: int, warnings: Sequence[str]) -> Composed:
        self._check()
        self._warnings += warnings
        for number, layer in enumerate(self._layers):
            self._add_layer(number, layer)
        beyond = self._add_heads_beyond()
        self._add_outside()
        for file in donor_files(self._donor.manifest):
            self._builder.add_file(self._donor.manifest, file)
        self._add_config(beyond)
        origin = f"merge of {', '.join(dict.fromkeys(parent.name for parent in self._used()))}"
        manifest = self._builder.build(name, origin, created, [self._drawn(i, x) for i, x in enumerate(self._layers)])
        return Composed(manifest, tuple(dict.fromkeys(self._warnings)))

    # -- reading the recipe ----------------------------------------------------------------------------------------

    def _layers_of(self, part: OutputSlice) -> list[Layer]:
        depths = []
        for source in part.sources:
            parent = self._parents[source.model.name]
            stop = parent.depth if source.stop is None else source.stop
            if stop > parent.depth:
                raise UserError(
                    f"{source.where}.layer_range: {parent.name} has no layer {max(source.start, parent.depth)}",
                    hint=f"its layers are 0-{parent.depth - 1}, so [0, {parent.depth}] is all of them",
                )
            require_layers(parent, range(source.start, stop), source.where)
            depths.append(stop - source.start)
        if len(set(depths)) > 1:
            counts = ", ".join(f"{s.model.name} {d}" for s, d in zip(part.sources, depths, strict=True))
            raise UserError(f"{part.where}: the models have different numbers of layers: {counts}")
        return [
            Layer(
                tuple(Input(s, self._parents[s.model.name], s.start + i) for s in part.sources),
                part,
                i / (depths[0] - 1) if depths[0] > 1 else 1.0,
            )
            for i in range(depths[0])
        ]

    def _used(self) -> list[Parent]:
        """The models whose layers are used, the donor first."""
        used = {x.parent.name: x.parent for layer in self._layers for x in layer.inputs}
        return list({self._donor.name: self._donor, **used}.values())

    def _check(self) -> None:
        others: dict[str, Parent] = {}
        for part in self._stack.slices:
            for source in part.sources:
                others.setdefault(f"{source.where}.model", self._parents[source.model.name])
        if self._head is not None and self._stack.head is not None:
            others[self._stack.head.where] = self._head
        seen = {parent.name: where for where, parent in reversed(others.items())}
        self._warnings += check_fit(self._donor, {where: self._parents_by(name) for name, where in seen.items()})
        check_ties(dict.fromkeys(_Same(p) for p in self._used()), self._head)
        check_vocabulary(self._first[0], self._last[0], self._head.name if self._head else None)
        for parent in self._used():
            layers = [x.layer for layer in self._layers for x in layer.inputs if x.parent is parent]
            self._warnings += odd_layers(parent, layers)

    def _parents_by(self, name: str) -> Parent:
        return next(parent for parent in self._parents.values() if parent.name == name)
