"""config.json for another stack of layers: counts, lists, rules by position, names of layers. Pure.

A loader builds its layers from the config alone: a wrong count drops layers in silence, a list that was not mapped
turns a sliding layer into a full one. So whatever says something of single layers is mapped, and what cannot be is
refused by its key. Values are taken from the config of the model that a layer comes from; all else is the donor's.
"""

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

from cakefs.errors import InvalidFormat, UserError
from cakefs.formats.strictjson import brief
from cakefs.plan.positions import INDICES, NEEDS, PER_LAYER, Rule, rules_of
from cakefs.plan.sections import (
    BEYOND,
    TEXT_CONFIGS,
    Config,
    Section,
    count_keys,
    is_encoder_decoder,
    nested_configs,
    section_of,
)

_SHARED = {"albert": "all its layers are one", "zamba": "its layers share blocks", "zamba2": "its layers share blocks"}
_LAST_FULL = ("gemma4_text", "gemma4_unified_text", "embedding_gemma2_text", "diffusion_gemma_text")
_WINDOW_RULES = ("sliding_window_pattern", "_sliding_window_pattern", "max_window_layers")
_SUSPECT = re.compile(
    r"(layer|block|attn|attention|moe|mlp|expert|sparse|dense|rope|window|global|local)\w*"
    r"(interval|period|pattern|every|freq\b|frequency|_step\b|offset)|layers?_group_size|layers_per_"
)
_HARMLESS = re.compile(
    r"token|norm|vocab|time_step|relative_attention|chunk|mel|frame|image|spatial|temporal|loss|cache"
)


class Take(NamedTuple):
    """A layer of the output: layer `layer` of model `model` of those given."""

    model: int
    layer: int


class Rewritten(NamedTuple):
    config: Config
    warnings: tuple[str, ...]


def rewrite_config(
    configs: Sequence[Config], sections: Sequence[Section], stack: Sequence[Take], *, donor: int = 0, beyond: int = 0
) -> Rewritten:
    """The donor's config for the layers of `stack`.

    Args:
        sections: Of the configs, one each.
        beyond: How many MTP heads there are.

    Raises:
        UserError: Naming the key that cannot be made to fit.
    """
    config = copy.deepcopy(configs[donor])
    writer = _Writer(configs, sections, stack, donor, beyond)
    with _values_checked():
        writer.write(section_of(config, sections[donor]))
        for path, twin in _twins(config, configs[donor], sections[donor]):
            writer.write(twin, path)
    return Rewritten(config, tuple(writer.warnings))


@contextmanager
def _values_checked() -> Iterator[None]:
    """What a value of an unexpected form leads to is the fault of the file."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InvalidFormat(f"config.json: a value is not of the form it should have ({error})") from error


def _twins(config: Config, before: Config, main: Section) -> Iterator[tuple[tuple[str, ...], Config]]:
    """Nested text configs that repeat what the top says: some files say everything twice."""
    for path, section in nested_configs(before, ()):
        keys = count_keys(section, "")
        if path and not main.path and path[-1] in TEXT_CONFIGS and keys and section[keys[0]] == main.layers:
            nested = _at(config, path)
            assert nested is not None
            yield path, nested


class _Writer:
    """Writes one section of the donor's config; gathers warnings."""

    def __init__(
        self, configs: Sequence[Config], sections: Sequence[Section], stack: Sequence[Take], donor: int, beyond: int
    ) -> None:
        self._all, self._sections, self._stack = configs, sections, stack
        self._donor, self._beyond = donor, beyond
        self._counts = [section.layers for section in sections]
        self.warnings: list[str] = []

    def write(self, target: Config, path: tuple[str, ...] | None = None) -> None:
        at = self._sections[self._donor].path if path is None else path
        sources = [_at(c, at) or section_of(c, s) for c, s in zip(self._all, self._sections, strict=True)]
        keys = self._sections[self._donor].keys
        self._refuse_shared(sources)
        before = copy.deepcopy(target)
        if "num_layers" in keys and is_encoder_decoder(target):
            target.setdefault("num_decoder_layers", before["num_layers"])  # T5: the decoder keeps its count
        for key in keys:
            target[key] = len(self._stack)
        for key in BEYOND:
            if any(type(source.get(key)) is int and source[key] > 0 for source in sources):
                target[key] = self._beyond
        handled = set(self._lists(target, before, sources))
        handled.update(self._rules(target, sources))
        self._check_special(target, sources)
        self._check_rest(target, before, handled)

    # -- lists -----------------------------------------------------------------------------------------------------

    def _lists(self, target: Config, before: Config, sources: list[Config]) -> Iterator[str]:
        n = self._counts[self._donor]
        for key, value in before.items():
            if key in INDICES and _is_indices(value, n):
                taken = [frozenset(s.get(key) or ()) for s in sources]
                target[key] = [i for i, take in enumerate(self._stack) if take.layer in taken[take.model]]
                yield key
            elif key == "kv_source_layers" and type(value) is list:
                target[key] = self._kv_sources(sources)
                yield key
            elif "layer" in key and type(value) is dict and value and all(k.isdecimal() for k in value):
                target[key] = self._by_number(key, value, sources)
                yield key
            elif self._is_per_layer(key, value, n):
                mapped = [self._entry(key, sources, take) for take in self._stack]
                tail = value[n : n + self._beyond] if len(value) > n else value[:0]
                target[key] = "".join(mapped) + tail if type(value) is str else [*mapped, *tail]
                yield key

    def _is_per_layer(self, key: str, value: object, n: int) -> bool:
        if type(value) is str:
            return key == "hybrid_override_pattern" and len(value) == n
        if type(value) is not list or len(value) not in (n, n + self._sections[self._donor].beyond):
            return False
        if key in PER_LAYER:
            return True
        if n > 1 and re.search(r"layer|block_types|_pattern", key) and not _is_indices(value, n):
            self.warnings.append(f"config.json: {key} is taken for a list with one entry a layer")
            return True
        return False

    def _entry(self, key: str, sources: list[Config], take: Take) -> Any:
        value = sources[take.model].get(key)
        if not isinstance(value, list | str) or take.layer >= len(value):
            raise UserError(f"config.json: {key} is a list in one model and not in another")
        return value[take.layer]

    def _by_number(self, key: str, value: Config, sources: list[Config]) -> Config:
        """Overrides by layer number, such as `per_layer_config`: its keys keep their width."""
        width = min(map(len, value))
        mapped = {}
        for i, take in enumerate(self._stack):
            entries = {int(k): v for k, v in (sources[take.model].get(key) or {}).items()}
            if take.layer in entries:
                mapped[f"{i:0{width}}"] = copy.deepcopy(entries[take.layer])
        return mapped

    # -- rules -----------------------------------------------------------------------------------------------------

    def _rules(self, target: Config, sources: list[Config]) -> Iterator[str]:
        for rule in rules_of(sources[self._donor]):
            yield rule.key
            values = [self._value(rule, sources, take) for take in self._stack]
            if rule.listed and isinstance(sources[self._donor].get(rule.key), list):
                values = target[rule.key][: len(values)]  # mapped already
            if rule.values(target, len(values)) == values:
                continue
            if rule.listed:
                target[rule.key] = values
            tuned = rule.retune(target, values)
            if tuned and (rule.unless in tuned or rule.values({**target, **tuned}, len(values)) == values):
                if not rule.listed or all(key in target for key in tuned):
                    target.update(tuned)
            elif not rule.listed:
                raise UserError(
                    f"config.json: {rule.key} cannot say which layer is of which kind in this order",
                    hint=f"choose layers that keep the rhythm of {target.get('model_type', 'the model')}",
                )
            elif any(key in target for key in _WINDOW_RULES):
                self.warnings.append(f"config.json: {rule.key} is listed, and no longer follows the rule beside it")

    def _value(self, rule: Rule, sources: list[Config], take: Take) -> Any:
        source, n = sources[take.model], self._counts[take.model]
        listed = source.get(rule.key)
        return listed[take.layer] if rule.listed and isinstance(listed, list) else rule.value(source, take.layer, n)

    # -- what layers share -----------------------------------------------------------------------------------------

    def _refuse_shared(self, sources: list[Config]) -> None:
        for source in sources:
            kind = str(source.get("model_type", ""))
            if kind in _SHARED:
                raise UserError(f"config.json: {kind} cannot be restacked: {_SHARED[kind]}")
            for key in NEEDS.get(kind, ()):
                if not source.get(key):
                    raise UserError(
                        f"config.json: {key} is not listed, and the rule of {kind} for it is not known here"
                    )
            if source.get("hidden_size_per_layer_input") and not self._is_identity():
                raise UserError(
                    f"config.json: {kind} cannot be restacked: its embedding has a part for each layer"
                    " (hidden_size_per_layer_input)"
                )

    def _is_identity(self) -> bool:
        """Whether every layer stays what and where it is."""
        return list(self._stack) == [Take(self._donor, i) for i in range(self._counts[self._donor])]

    def _kv_sources(self, sources: list[Config]) -> list[int]:
        """Each layer's source of keys and values: the nearest copy of the same layer before it, or itself."""
        last: dict[Take, int] = {}
        mapped = []
        for i, take in enumerate(self._stack):
            last[take] = i
            wanted = Take(take.model, sources[take.model]["kv_source_layers"][take.layer])
            if wanted not in last:
                raise UserError(
                    f"config.json: layer {take.layer} uses the keys and values of layer {wanted.layer}, which does not"
                    " come before it here (kv_source_layers)"
                )
            mapped.append(last[wanted])
        return mapped

    def _check_special(self, target: Config, sources: list[Config]) -> None:
        kind = str(target.get("model_type", ""))
        shared = sources[self._donor].get("num_kv_shared_layers")
        if shared:
            self._check_kv_shared(target, sources, int(shared))
        types = target.get("layer_types")
        if kind in _LAST_FULL and types and types[-1] != "full_attention":
            raise UserError(f"config.json: {kind} makes the last layer one of full attention, and this one is none")
        self._check_indexers(sources)
        if target.get("scale_attn_by_inverse_layer_idx") or kind in ("diffllama", "minimax", "rwkv"):
            self.warnings.append(f"config.json: {kind} calculates with a layer's position, which is another one here")

    def _check_kv_shared(self, target: Config, sources: list[Config], shared: int) -> None:
        """gemma3n: the last layers use the keys and values of the last layer of their type before them."""
        n, stack = self._counts[self._donor], self._stack
        first = len(stack) - shared
        kept = list(stack[first:]) == [Take(self._donor, layer) for layer in range(n - shared, n)]
        kept = kept and all(take.layer < n - shared for take in stack[:first])
        types, own = _attention(target, len(stack)), _attention(sources[self._donor], n)
        for kind in set(types[first:]) if kept else ():
            newest = next((stack[i] for i in range(first - 1, -1, -1) if types[i] == kind), None)
            oldest = next((i for i in range(n - shared - 1, -1, -1) if own[i] == kind), -1)
            kept = kept and newest == Take(self._donor, oldest)
        if not kept:
            raise UserError(
                f"config.json: the last {shared} layers use keys and values of earlier ones (num_kv_shared_layers), and"
                " this order breaks that",
                hint=f"end with layers {n - shared}-{n - 1}, and use them nowhere else",
            )

    def _check_indexers(self, sources: list[Config]) -> None:
        """glm_moe_dsa: a shared indexer uses what the last full one before it found."""
        last: Take | None = None
        for take in self._stack:
            modes = sources[take.model].get("indexer_types")
            if not isinstance(modes, list) or take.layer >= len(modes):
                continue
            if modes[take.layer] != "shared":
                last = take
                continue
            full = next((i for i in range(take.layer, -1, -1) if modes[i] != "shared"), None)
            if last is None or last != Take(take.model, -1 if full is None else full):
                raise UserError(
                    f"config.json: layer {take.layer} uses the index that layer {full} finds (indexer_types), and"
                    " another one comes before it here"
                )

    def _check_rest(self, target: Config, before: Config, handled: set[str]) -> None:
        """Refuses what looks like a statement on single layers and is not understood."""
        n, rules = self._counts[self._donor], rules_of(before)
        if self._is_identity():
            return
        known = handled | {rule.key for rule in rules} | PER_LAYER | INDICES
        for key, value in before.items():
            if key in known or _HARMLESS.search(key):
                continue
            if key == "stage_names" and value:
                raise UserError("config.json: stage_names of a vision backbone cannot be restacked")
            rule = type(value) is int and value > 1 and _SUSPECT.search(key) and not rules
            indices = value and _is_indices(value, n) and re.search(r"layer|block|idx|indices|indexes", key)
            if rule or indices:
                raise UserError(
                    f"config.json: {key} ({brief(value)}) may speak of single layers in a way not known here"
                )


def sets_apart(section: Config, n: int, layer: int) -> bool:
    """Whether the config says of a layer of `n` what it says of no other."""
    with _values_checked():
        facts: list[list[Any]] = [rule.values(section, n) for rule in rules_of(section)]
    facts += [list(v)[:n] for k, v in section.items() if k in PER_LAYER and isinstance(v, list | str) and len(v) >= n]
    facts += [[i in v for i in range(n)] for k, v in section.items() if k in INDICES and isinstance(v, list)]
    return any(kinds.count(kinds[layer]) == 1 for kinds in facts)


def _attention(config: Config, n: int) -> list[Any]:
    """What kind of attention each layer has, listed or by rule."""
    listed = config.get("layer_types")
    if isinstance(listed, list):
        return listed
    return next((rule.values(config, n) for rule in rules_of(config) if rule.key == "layer_types"), [""] * n)


def _at(config: Config, path: tuple[str, ...]) -> Config | None:
    for key in path:
        if type(config.get(key)) is not dict:
            return None
        config = config[key]
    return config


def _is_indices(value: object, n: int) -> bool:
    return (
        type(value) is list
        and all(type(i) is int and 0 <= i < n for i in value)
        and all(a < b for a, b in pairwise(value))
    )
