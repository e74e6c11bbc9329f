"""`cakefs merge`: a checked recipe and the models it names -> the manifest of the merged model. Pure.

Layers in the recipe's order, renumbered from 0; what stands before the layers from the first slice's models, norm and
head from the last slice's, config and tokenizer from the donor (the base model, else the first that is named). Where
nothing is calculated a tensor is the extent that its model already has, however often it appears.
"""

from collections.abc import Mapping, Sequence

from cakefs.errors import UserError
from cakefs.model import LayerOrigin, Manifest, StackLayer, View
from cakefs.plan.blend import WHOLE, Formula, Operand, blend
from cakefs.plan.fit import check_first, check_fit, check_ties, check_vocabulary, odd_layers
from cakefs.plan.formula import formula_of, is_plain, is_scaled
from cakefs.plan.layers import Role, is_head
from cakefs.plan.modelconfig import Take, rewrite_config
from cakefs.plan.parents import Parent, load_parent
from cakefs.plan.quantized import map_quantization
from cakefs.plan.recipe import ModelRef, OutputSlice, Recipe, Repeat, SourceSlice, Stack, referenced
from cakefs.plan.sections import Config, encode_config, section_of
from cakefs.plan.slice import Composed
from cakefs.plan.stack import Input, Layer, stack_layers, unrolled
from cakefs.plan.view import CONFIG, DigestOf, Part, PutLiteral, ReadSmall, ViewBuilder, byte_keys, donor_files

_DTYPE_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
# Recomputed by every loader: in one model's file and not in another's, they are left out.
_BUFFERS = (".rotary_emb.inv_freq", ".attn.masked_bias", ".attention.rotary_emb.inv_freq")


def build_merge(
    recipe: Recipe,
    models: Mapping[str, Manifest],
    *,
    name: str,
    created: int,
    read_small: ReadSmall,
    put_literal: PutLiteral,
    prefix: str = "",
    digest_of: DigestOf = lambda key: None,
) -> Composed:
    """Raises UserError, naming the entry of the recipe, where it cannot be what it says.

    Args:
        models: By the names in the recipe; a missing one is refused.
        digest_of: Tells equal tensors of different files.
    """
    parents: dict[str, Parent] = {}
    for ref in referenced(recipe):
        if ref.name not in models:
            raise UserError(f"{ref.where}: no model {ref.name}", hint=f"cakefs add {ref.name}")
        parent = parents[ref.name] = load_parent(models[ref.name], read_small, prefix)
        if parent.section is None:
            raise UserError(f"{ref.where}: config.json of {ref.name} does not count the layers {parent.prefix}.N")
    stack = unrolled(recipe, parents[recipe.model.name]) if isinstance(recipe, Repeat) else recipe
    merger = _Merger(stack, parents, ViewBuilder(put_literal), read_small, digest_of)
    return merger.build(name, created, recipe.warnings)


class _Merger:
    """Checks, then builds, one merge."""

    def __init__(
        self,
        stack: Stack,
        parents: dict[str, Parent],
        builder: ViewBuilder,
        read_small: ReadSmall,
        digest_of: DigestOf,
    ) -> None:
        self._stack = stack
        self._builder, self._read_small, self._digest_of = builder, read_small, digest_of
        self._donor = parents[stack.base.name if stack.base else stack.slices[0].sources[0].model.name]
        self._head = parents[stack.head.name] if stack.head else None
        self._layers = stack_layers(stack, parents)
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

    def _check(self) -> None:
        named = {x.parent: f"{x.source.where}.model" for layer in self._layers[::-1] for x in layer.inputs[::-1]}
        if self._head is not None and self._stack.head is not None:
            named.setdefault(self._head, self._stack.head.where)
        self._warnings += check_fit(self._donor, dict(reversed(named.items())))
        check_ties((*self._used, self._donor), self._last.inputs[0].parent, self._head)
        after = self._head or self._last.inputs[0].parent
        heads = after.heads() if self._head is None else self._named_heads(after)
        check_vocabulary(self._donor, self._first.inputs[0].parent, after, heads)
        for layer, role in ((self._first, Role.BEFORE), (self._last, Role.AFTER)):
            end = layer.inputs[0].parent
            if not any(end.role(name) in (role, Role.OTHER) for name in end.outside):
                self._warnings.append(f"{end.name} has no {role.value} that cakefs knows by name")
        if self._stack.method == "task_arithmetic" and any(len(layer.inputs) > 5 for layer in self._layers):
            self._warnings.append("a sum over more than 4 models: mergekit's own last bit depends on its threads there")
        for parent in self._used:
            places = [(i, x.layer) for i, layer in enumerate(self._layers) for x in layer.inputs if x.parent is parent]
            self._warnings += odd_layers(parent, (layer for i, layer in places if i != layer))
            check_first(parent, (layer.inputs[0].layer for layer in self._layers), self._stack.slices[0].where)

    # -- tensors ---------------------------------------------------------------------------------------------------

    def _add_layer(self, number: int, layer: Layer) -> None:
        tensors = [x.parent.layers[x.layer] for x in layer.inputs]
        at = f"{self._donor.prefix}.{number}"
        if is_plain(self._stack, layer):
            manifest = layer.inputs[0].parent.manifest
            self._builder.add_parts(manifest, ((at + rest, part) for rest, part in tensors[0].items()))
            return
        for rest in self._common(layer, tensors):
            self._add(at + rest, [found[rest] for found in tensors], layer, layer.depth)

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
        dtype, data = blend(*formula_of(self._stack, layer, name, operands, depth))
        self._builder.add_tensor(name, dtype, parts[0].shape, data)

    def _operand(self, x: Input, part: Part, of: int) -> Operand:
        data = self._builder.take(x.parent.manifest, part.data)
        key = self._key(x.parent, part) if of > 1 and part.dtype in WHOLE else ()
        return Operand(part.name, part.dtype, part.shape, data, key, x.parent.is_packed)

    def _key(self, parent: Parent, part: Part) -> tuple[object, ...]:
        return byte_keys(parent.manifest, part.data, self._digest_of)

    # -- what is no layer ------------------------------------------------------------------------------------------

    def _add_beyond(self) -> int:
        """Puts heads for further tokens of the last slice's models behind the last layer; how many the output has."""
        tops = [range(x.parent.depth, max(x.parent.layers) + 1) for x in self._last.inputs]
        if any(len(top) != len(tops[0]) for top in tops):
            self._warnings.append("not all models have heads for further tokens: they are left out")
            return 0
        for i in range(len(tops[0])):
            inputs = tuple(x._replace(layer=top[i]) for x, top in zip(self._last.inputs, tops, strict=True))
            if all(x.layer in x.parent.layers for x in inputs):
                self._add_layer(len(self._layers) + i, self._last._replace(inputs=inputs, depth=0.0))
        return len(tops[0]) or self._last.inputs[0].parent.further_heads()

    def _add_outside(self) -> None:
        for layer, roles in ((self._first, (Role.BEFORE,)), (self._last, (Role.AFTER,)), (self._first, (Role.OTHER,))):
            found = [
                {name: part for name, part in x.parent.outside.items() if x.parent.role(name) in roles}
                for x in layer.inputs
            ]
            if Role.AFTER in roles and not self._keeps_heads():
                found = [{name: part for name, part in parts.items() if not is_head(name)} for parts in found]
            for name in self._common(layer, found):
                if Role.OTHER in roles:
                    self._check_other(name)
                self._add(name, [parts[name] for parts in found], layer, 0.0)
        if self._head is not None and self._stack.head is not None:
            self._add_head(self._head, self._stack.head.where)

    def _keeps_heads(self) -> bool:
        """Whether the heads of the last slice are those of the output.

        Not where the recipe names one, nor where the files of tied models hold one all the same: it is a copy of an
        embedding, and transformers would prefer it to the output's.
        """
        if self._head is not None or not self._donor.is_tied():
            return self._head is None
        ends = [{x.parent for x in layer.inputs} for layer in (self._first, self._last)]
        copies = [parent.name for parent in ends[1] if parent.heads()]
        if ends[0] == ends[1] and len(copies) == len(ends[1]):
            return True
        self._warnings += [f"{name} is tied: the head in its file is left out" for name in sorted(copies)]
        return False

    def _check_other(self, name: str) -> None:
        """A tensor of no known place must be the same at both ends."""
        ends = [x.parent for x in (*self._first.inputs, *self._last.inputs)]
        if set(x.parent for x in self._first.inputs) == set(x.parent for x in self._last.inputs):
            return
        keys = {self._key(parent, parent.outside[name]) if name in parent.outside else () for parent in ends}
        if len(keys) > 1:
            names = list(dict.fromkeys(parent.name for parent in ends))
            raise UserError(
                f"{name}, neither embedding nor head, is not known to be the same in {' and '.join(names)}",
                hint=f"begin and end with layers of one model; or compare: cakefs pull {names[0]}, and so on",
            )

    def _named_heads(self, parent: Parent) -> Mapping[str, Part]:
        """The head of the model that the recipe names: its own, or its embedding where that is its head."""
        heads, embedding = parent.heads(), parent.token_embedding()
        if heads or embedding is None:
            return heads
        names = (name for other in self._used for name in other.heads())
        return {next(names, "lm_head.weight"): embedding}

    def _add_head(self, parent: Parent, where: str) -> None:
        heads = self._named_heads(parent)
        if not heads:
            raise UserError(f"{where}: {parent.name} has neither a head nor an embedding that cakefs knows")
        source = SourceSlice(ModelRef(parent.name, where), 0, 1, {}, where)
        layer = Layer((Input(source, parent, 0),), OutputSlice((source,), None, {}, where), 0.0)
        for name, part in heads.items():
            operand = self._operand(layer.inputs[0], part, 1)
            dtype, data = blend([operand], Formula("scale", None, self._stack.dtype, self._stack.out_dtype, where))
            self._builder.add_tensor(name, dtype, part.shape, data)

    # -- config ----------------------------------------------------------------------------------------------------

    def _add_config(self, beyond: int) -> None:
        parents = list(dict.fromkeys((self._donor, *self._used)))
        configs, sections = [p.config for p in parents], [p.section for p in parents if p.section is not None]
        # One stack for each of the sources that an output layer may have: their configs must come to the same.
        stacks = [
            [
                Take(parents.index(x.parent), x.layer)
                for layer in self._layers
                for x in (*layer.inputs[i:], layer.inputs[-1])[:1]
            ]
            for i in range(max(len(layer.inputs) for layer in self._layers))
        ]
        (config, warnings), *others = (rewrite_config(configs, sections, stack, beyond=beyond) for stack in stacks)
        for other in others:
            key = next((key for key, value in other.config.items() if value != config.get(key)), None)
            if key is not None:
                raise UserError(f"config.json: the models that are merged layer by layer differ in {key}")
        self._warnings += warnings
        self._map_names(config, parents, stacks[0], beyond)
        self._say(config)
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
            if last.depth + i in last.layers:
                places[Take(parents.index(last), last.depth + i)] = [len(stack) + i]
        map_quantization(self._builder, config, parents, 0, places, self._read_small)

    def _say(self, config: Config) -> None:
        """The dtype and the head, where the recipe names them, wherever the config speaks of them."""
        facts: Config = {} if self._head is None else {"tie_word_embeddings": False}
        dtype = _DTYPE_NAMES.get(self._stack.out_dtype or self._stack.dtype)
        if dtype is not None:
            facts |= {"dtype": dtype, "torch_dtype": dtype}
        nested = section_of(config, self._donor.section) if self._donor.section else config
        for target in (config, nested):
            target.update({key: value for key, value in facts.items() if key in target})
        if self._head is not None:
            config["tie_word_embeddings"] = False
        if dtype is not None and "dtype" not in config:
            config["torch_dtype"] = dtype

    def _drawn(self, number: int, layer: Layer) -> StackLayer:
        origins: list[LayerOrigin] = []
        notes = []
        for x in layer.inputs:
            origins += x.parent.origin(x.layer)
            notes.append(x.parent.note(x.layer))
        if self._stack.method != "passthrough":
            notes.append(self._stack.method)
        elif is_scaled(self._stack, layer):
            notes.append("scaled")
        return StackLayer(
            number, tuple(dict.fromkeys(origins)), ", ".join(dict.fromkeys(note for note in notes if note))
        )
