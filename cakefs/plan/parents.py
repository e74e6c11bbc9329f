"""A model that slices and merges take from: its tensors sorted into layers and the rest, beside its config. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from cakefs.errors import UserError
from cakefs.model import LayerOrigin, Manifest, View
from cakefs.plan.layers import (
    Groups,
    Role,
    detect_prefix,
    group_at,
    group_layers,
    is_head,
    is_token_embedding,
    layers_text,
    numbers,
    parse_layers,
    predicts_further,
    role_of,
)
from cakefs.plan.sections import Config, Section, find_section, is_encoder_decoder, parse_config, section_of
from cakefs.plan.view import CONFIG, Part, ReadSmall, parts_of


@dataclass(frozen=True, eq=False)
class Parent:
    """A model, compared by identity.

    Attributes:
        config: Empty where the model has none.
        prefix: Of its layers, without the dot.
        layers: Number -> rest of the name -> tensor; heads for further tokens (MTP) come after the last layer.
        outside: All other tensors, by name.
        roots: Of other stacks of layers in the same file.
    """

    name: str
    manifest: Manifest
    config: Config
    section: Section | None
    prefix: str
    layers: dict[int, dict[str, Part]]
    outside: dict[str, Part]
    roots: tuple[str, ...]

    @property
    def depth(self) -> int:
        """How many layers the config says there are; without one, how many numbers there are."""
        return self.section.layers if self.section else max(self.layers) + 1

    def text_config(self) -> Config:
        return section_of(self.config, self.section) if self.section else self.config

    def role(self, name: str) -> Role:
        return role_of(name, self.prefix, self.roots)

    def heads(self) -> dict[str, Part]:
        return {n: part for n, part in self.outside.items() if is_head(n) and self.role(n) is Role.AFTER}

    def token_embedding(self) -> Part | None:
        found = [p for n, p in self.outside.items() if is_token_embedding(n) and self.role(n) is Role.BEFORE]
        return found[0] if found else None

    def is_tied(self) -> bool:
        """Whether the head is the embedding again: as the config says, else by what is in the file."""
        for config in (self.config, self.text_config()):
            if type(config.get("tie_word_embeddings")) is bool:
                return bool(config["tie_word_embeddings"])
        return not self.heads()

    def further_heads(self) -> int:
        """How many heads for further tokens (MTP) are named apart from the layers; only the config counts those."""
        return self.section.beyond if self.section and any(map(predicts_further, self.outside)) else 0

    @cached_property
    def is_packed(self) -> bool:
        """Whether its weights are quantized, so that no element is a weight: its config or a tensor says so."""
        if any(config.get(key) for config in (self.config, self.text_config()) for key in QUANTIZATION):
            return True
        parts = (part for tensors in self.layers.values() for part in tensors.values())
        return any(part.dtype in PACKED and part.name.endswith("weight") for part in parts)

    def origin(self, layer: int) -> tuple[LayerOrigin, ...]:
        """Where a layer comes from in the end: of a view, what its own layer comes from."""
        stack = self.manifest.stack
        for entry in stack:
            if entry.layer == layer:
                return entry.origins
        return (LayerOrigin(self.manifest.name, layer, self.manifest.revision),)

    def note(self, layer: int) -> str:
        return next((entry.note for entry in self.manifest.stack if entry.layer == layer), "")


PACKED = ("U8", "I8", "I32", "U32")
QUANTIZATION = ("quantization_config", "quantization", "compression_config")


def load_parent(manifest: Manifest, read_small: ReadSmall, prefix: str = "") -> Parent:
    """Sorts the tensors of a model.

    Args:
        prefix: As the user named it; empty to find it.

    Raises:
        UserError: No layers, or no telling which; the message names the model.
    """
    if manifest.substituted:
        message = f"{manifest.name} is not what was published: {manifest.substituted}"
        raise UserError(message, hint="add it without --substitute under another name, and take that")
    parts = parts_of(manifest)
    config: Config = {}
    if CONFIG in manifest.shown(View.MODEL):
        config = parse_config(read_small(manifest, CONFIG), f"{CONFIG} of {manifest.name}")
    groups = group_layers(parts)
    try:
        found = prefix.removesuffix(".") or _find_prefix(config, groups)
        group = group_at(parts, found, groups)
    except UserError as error:
        raise UserError(f"{manifest.name}: {error.message}", hint=error.hint) from error
    layers = {layer: {rest: parts[name] for rest, name in group[layer].items()} for layer in sorted(group)}
    inside = {name for names in group.values() for name in names.values()}
    outside = {name: part for name, part in parts.items() if name not in inside}
    section = find_section(config, found)
    if section is not None and max(layers) >= section.layers + section.beyond:
        section = None  # It counts others: those of another tower.
    roots = tuple({p.rpartition(".")[0] for p in groups if p != found})
    return Parent(manifest.name, manifest, config, section, found, layers, outside, roots)


def _find_prefix(config: Config, groups: Groups) -> str:
    section = find_section(config)
    if is_encoder_decoder(config) and len(groups) > 1:
        raise UserError("has an encoder and a decoder", hint=f"name one with --prefix: {', '.join(sorted(groups))}")
    return detect_prefix(groups, section.layers if section else None, section.beyond if section else 0)


def named_layers(parent: Parent, text: str) -> tuple[int, ...]:
    """The layers that a text such as `0-15,20` names. Raises UserError naming what is wrong and what there is."""
    try:
        layers = parse_layers(text)
    except UserError as error:
        raise UserError(error.message, hint=f"{error.hint}; {_there_is(parent)}".removeprefix("; ")) from error
    require_layers(parent, layers, "layers")
    return layers


def require_layers(parent: Parent, wanted: Sequence[int], where: str) -> None:
    """Raises UserError, naming the layer, where one of these is not in the file."""
    missing = [layer for layer in wanted if layer not in parent.layers]
    if missing:
        what = f"{numbers(missing)} {'is' if len(missing) == 1 else 'are'}"
        raise UserError(f"{where}: {what} not in {parent.name}", hint=_there_is(parent))


def _there_is(parent: Parent) -> str:
    return f"there is: {parent.prefix}.{{{layers_text(parent.layers)}}}"
