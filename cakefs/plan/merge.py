"""`cakefs merge`: a checked recipe and the models it names -> the manifest of the merged model. Pure.

Layers in the recipe's order, renumbered from 0; what stands before the layers from the first slice's models, norm and
head from the last slice's, config and tokenizer from the donor (the base model, else the first that is named). Where
nothing is calculated a tensor is the extent that its model already has, however often it appears.
"""

from collections.abc import Mapping, Sequence
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
        self._donor = parents[stack.base.name if stack.base else stack.slices[0].sources[0].model.name]
        self._head = parents[stack.head.name] if stack.head else None
        self._layers = [layer for part in stack.slices for layer in self._layers_of(part)]
        self._first, self._last = self._layers[0], self._layers[-1]
        # The models whose layers are used, in the order of the recipe.
        self._used = tuple(dict.fromkeys(x.parent for layer in self._layers for x in layer.inputs))
        self._warnings: list[str] = []

    def build(self, name: str, created: int, warnings: Sequence[str]) -> Composed:
        self._check()
        self._warnings += warnings
        for number, layer in enumerate(self._layers):
            self._add_layer(number, layer)
        beyond = self._add_beyond()
        self._add_outside()
        for file in donor_files(self._donor.manifest):
            self._builder.add_file(self._donor.manifest, file)
        self._add_config(beyond)
        origin = f"merge of {', '.join(parent.name for parent in self._used)}"
        drawn = [self._drawn(number, layer) for number, layer in enumerate(self._layers)]
        manifest = self._builder.build(name, origin, created, drawn)
        return Composed(manifest, tuple(dict.fromkeys(self._warnings)))

    # -- reading the recipe ----------------------------------------------------------------------------------------

    def _layers_of(self, part: OutputSlice) -> list[Layer]:
        ranges = [self._range(source) for source in part.sources]
        if len({len(layers) for layers in ranges}) > 1:
            counts = ", ".join(f"{s.model.name} {len(r)}" for s, r in zip(part.sources, ranges, strict=True))
            raise UserError(f"{part.where}: the models have different numbers of layers: {counts}")
        last = len(ranges[0]) - 1
        return [
            Layer(
                tuple(Input(s, self._parents[s.model.name], r[i]) for s, r in zip(part.sources, ranges, strict=True)),
                part,
                i / last if last else 1.0,
            )
            for i in range(last + 1)
        ]

    def _range(self, source: SourceSlice) -> range:
        parent = self._parents[source.model.name]
        layers = range(source.start, parent.depth if source.stop is None else source.stop)
        if layers.stop > parent.depth:
            raise UserError(
                f"{source.where}.layer_range: {parent.name} has no layer {max(layers.start, parent.depth)}",
                hint=f"its layers are 0-{parent.depth - 1}: [0, {parent.depth}] is all of them",
            )
        require_layers(parent, layers, source.where)
        return layers

    def _check(self) -> None:
        named = {x.parent: f"{x.source.where}.model" for layer in self._layers[::-1] for x in layer.inputs[::-1]}
        if self._head is not None and self._stack.head is not None:
            named.setdefault(self._head, self._stack.head.where)
        self._warnings += check_fit(self._donor, dict(reversed(named.items())))
        check_ties((*self._used, self._donor), self._last.inputs[0].parent, self._head)
        if self._head is None:
            check_vocabulary(self._first.inputs[0].parent, self._last.inputs[0].parent)
        if self._first.inputs[0].parent.token_embedding() is None:
            self._warnings.append(f"{self._first.inputs[0].parent.name} has no embedding that cakefs knows by name")
        for parent in self._used:
            used = [x.layer for layer in self._layers for x in layer.inputs if x.parent is parent]
            self._warnings += odd_layers(parent, used)

    # -- tensors ---------------------------------------------------------------------------------------------------

    def _add_layer(self, number: int, layer: Layer) -> None:
        tensors = [x.parent.layers[x.layer] for x in layer.inputs]
        for rest in self._common(layer, tensors):
            parts = [found[rest] for found in tensors]
            self._add(f"{self._donor.prefix}.{number}{rest}", parts, layer, layer.depth)

    def _common(self, layer: Layer, tensors: Sequence[Mapping[str, Part]]) -> list[str]:
        """The names that all inputs have; one that only some have is refused."""
        for name in dict.fromkeys(name for found in tensors for name in found):
            lacking = [x.parent.name for x, found in zip(layer.inputs, tensors, strict=True) if name not in found]
            if lacking and not name.endswith(_BUFFERS):
                part = next(found[name] for found in tensors if name in found)
                raise UserError(f"{layer.part.where}: {lacking[0]} has no tensor that could be merged with {part.name}")
        return [name for name in tensors[0] if all(name in found for found in tensors)]

    def _add(self, name: str, parts: Sequence[Part], layer: Layer, depth: float) -> None:
        operands = [self._operand(x, part, len(parts)) for x, part in zip(layer.inputs, parts, strict=True)]
        dtype, data = blend(*self._formula(name, operands, layer, depth))
        self._builder.add_tensor(name, dtype, parts[0].shape, data)

    def _operand(self, x: Input, part: Part, of: int) -> Operand:
        data = self._builder.take(x.parent.manifest, part.data)
        key = x.parent.key(part) if of > 1 else ()
        return Operand(part.name, part.dtype, part.shape, data, key, x.parent.is_packed)

    def _formula(
        self, name: str, operands: Sequence[Operand], layer: Layer, depth: float
    ) -> tuple[Sequence[Operand], Formula]:
        """The operands in the order in which the operation takes them, and the operation."""
        stack, shared = self._stack, (layer.part.settings, self._stack.settings)
        dtypes = (stack.dtype, stack.out_dtype, layer.part.where)
        if stack.method == "passthrough":
            scopes = (layer.inputs[0].source.settings, *shared)
            scale = resolve("scale", scopes, operands[0].name, depth)
            return operands, Formula("scale", None if scale is None else (scale,), *dtypes)
        divide = resolve("normalize", shared, name, depth, switch=True)
        if stack.method == "linear":
            weights = [self._weight(x, o.name, shared, depth) for x, o in zip(layer.inputs, operands, strict=True)]
            if divide is None or divide:
                self._check_sum(weights, layer, name)
            return operands, Formula("linear", (1.0 if divide is None else divide, *weights), *dtypes)
        base = layer.part.base or stack.base
        assert base is not None  # the recipe was checked
        pairs = sorted(
            zip(layer.inputs, operands, strict=True), key=lambda pair: pair[0].source.model.name != base.name
        )
        weights = [self._weight(x, operand.name, shared, depth) for x, operand in pairs[1:]]
        factor = resolve("lambda", shared, name, depth)
        params = (divide or 0.0, 1.0 if factor is None else factor, *weights)
        if len(weights) > 4:
            self._warnings.append("a sum over more than 4 models: mergekit's own last bit depends on its threads there")
        return [operand for _, operand in pairs], Formula("task_arithmetic", params if weights else None, *dtypes)

    def _weight(self, x: Input, tensor: str, shared: tuple[Settings, Settings], depth: float) -> float:
        weight = resolve("weight", (x.source.settings, *shared), tensor, depth)
        if weight is None:
            raise UserError(f"{x.source.where}.parameters.weight: missing for {tensor}")
        return weight

    def _check_sum(self, weights: Sequence[float], layer: Layer, name: str) -> None:
        if abs(sum(weights)) <= 1e-7 * max(map(abs, weights)):
            raise UserError(
                f"{layer.part.where}: the weights of {name} add up to 0, by which they would be divided",
                hint="set `normalize: false`",
            )

    # -- what is no layer ------------------------------------------------------------------------------------------

    def _add_beyond(self) -> int:
        """Heads for further tokens of the last slice's models, behind the last layer; how many there are."""
        tops = [range(x.parent.depth, max(x.parent.layers) + 1) for x in self._last.inputs]
        if any(len(top) != len(tops[0]) for top in tops):
            self._warnings.append("not all models have heads for further tokens: they are left out")
            return 0
        for i in range(len(tops[0])):
            inputs = tuple(x._replace(layer=top[i]) for x, top in zip(self._last.inputs, tops, strict=True))
            if all(x.layer in x.parent.layers for x in inputs):
                self._add_layer(len(self._layers) + i, self._last._replace(inputs=inputs, depth=0.0))
        return len(tops[0])

    def _add_outside(self) -> None:
        for layer, roles in ((self._first, (Role.BEFORE,)), (self._last, (Role.AFTER,)), (self._first, (Role.OTHER,))):
            found = [
                {name: part for name, part in x.parent.outside.items() if x.parent.role(name) in roles}
                for x in layer.inputs
            ]
            for name in self._common(layer, found):
                if Role.AFTER in roles and self._head is not None and is_head(name):
                    continue
                if Role.OTHER in roles:
                    self._check_other(name)
                self._add(name, [parts[name] for parts in found], layer, 0.0)
        if self._head is not None and self._stack.head is not None:
            self._add_head(self._head, self._stack.head.where)

    def _check_other(self, name: str) -> None:
        """A tensor of no known place must be the same at both ends."""
        ends = [x.parent for x in (*self._first.inputs, *self._last.inputs)]
        if set(x.parent for x in self._first.inputs) == set(x.parent for x in self._last.inputs):
            return
        keys = {parent.key(parent.outside[name]) if name in parent.outside else () for parent in ends}
        if len(keys) > 1:
            names = " and ".join(dict.fromkeys(parent.name for parent in ends))
            raise UserError(
                f"{name} differs between {names}, and it is neither embedding nor head",
                hint="begin and end the recipe with layers of the same model",
            )

    def _add_head(self, parent: Parent, where: str) -> None:
        """The head of the model that the recipe names: its own, or its embedding where that is its head."""
        heads = parent.heads()
        if not heads:
            embedding = parent.token_embedding()
            if embedding is None:
                raise UserError(f"{where}: {parent.name} has neither a head nor an embedding that cakefs knows")
            names = (name for other in self._used for name in other.heads())
            heads = {next(names, "lm_head.weight"): embedding}
        source = SourceSlice(ModelRef(parent.name, where), 0, 1, {}, where)
        layer = Layer((Input(source, parent, 0),), OutputSlice((source,), None, {}, where), 0.0)
        for name, part in heads.items():
            operand = self._operand(layer.inputs[0], part, 1)
            dtype, data = blend([operand], Formula("scale", None, self._stack.dtype, self._stack.out_dtype, where))
            self._builder.add_tensor(name, dtype, part.shape, data)

    # -- config ----------------------------------------------------------------------------------------------------

    def _add_config(self, beyond: int) -> None:
        parents = list(dict.fromkeys((self._donor, *self._used)))
        variants = [
            [
                Take(parents.index(x.parent), x.layer)
                for x in (layer.inputs[min(i, len(layer.inputs) - 1)] for layer in self._layers)
            ]
            for i in range(max(len(layer.inputs) for layer in self._layers))
        ]
        sections = [parent.section for parent in parents if parent.section is not None]
        configs = [parent.config for parent in parents]
        written = [rewrite_config(configs, sections, stack, beyond=beyond) for stack in variants]
        config = written[0].config
        for other in written[1:]:
            key = next((key for key, value in other.config.items() if value != config.get(key)), None)
            if key is not None:
                raise UserError(f"config.json: the models that are merged layer by layer differ in {key}")
        self._warnings += written[0].warnings
        self._map_names(config, parents, variants[0], beyond)
        self._say_dtype(config)
        if self._head is not None:
            config["tie_word_embeddings"] = False
        original = self._donor.manifest.shown(View.MODEL).get(CONFIG)
        if config == self._donor.config and original is not None:
            self._builder.add_file(self._donor.manifest, original)
        else:
            self._builder.add_bytes(CONFIG, encode_config(config))

    def _map_names(self, config: Config, parents: Sequence[Parent], stack: Sequence[Take], beyond: int) -> None:
        places: dict[Take, list[int]] = {}
        for number, take in enumerate(stack):
            places.setdefault(take, []).append(number)
        last = self._last.inputs[0].parent
        for i in range(beyond):
            places[Take(parents.index(last), last.depth + i)] = [len(stack) + i]
        map_quantization(self._builder, config, parents, 0, places, self._read_small)

    def _say_dtype(self, config: Config) -> None:
        name = _DTYPE_NAMES.get(self._stack.out_dtype or self._stack.dtype)
        if name is None:
            return
        nested = config
        for step in self._donor.section.path if self._donor.section else ():
            nested = nested[step]
        for target in (config, nested):
            for key in [key for key in ("dtype", "torch_dtype") if key in target]:
                target[key] = name
        if "dtype" not in config and "torch_dtype" not in config:
            config["torch_dtype"] = name

    def _drawn(self, number: int, layer: Layer) -> StackLayer:
        origins: list[LayerOrigin] = []
        notes = []
        for x in layer.inputs:
            origins += x.parent.origin(x.layer)
            notes.append(x.parent.note(x.layer))
        if self._stack.method != "passthrough":
            notes.append(self._stack.method)
        elif any("scale" in s for s in (layer.inputs[0].source.settings, layer.part.settings, self._stack.settings)):
            notes.append("scaled")
        return StackLayer(
            number, tuple(dict.fromkeys(origins)), ", ".join(dict.fromkeys(note for note in notes if note))
        )
