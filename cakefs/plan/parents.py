"""A model that slices and merges take from: its tensors sorted into layers and the rest, beside its config. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from cakefs.errors import UserError
from cakefs.model import LayerOrigin, Manifest, View
from cakefs.plan.layers import (
    Role,
    check_prefix,
    detect_prefix,
    group_layers,
    is_head,
    is_token_embedding,
    layers_text,
    role_of,
    split_at,
)
from cakefs.plan.modelconfig import Config, Section, find_section, is_encoder_decoder, parse_config, section_of
from cakefs.plan.view import CONFIG, Part, ReadSmall, byte_keys, parts_of


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
        return {name: part for name, part in self.outside.items() if is_head(name)}

    def token_embedding(self) -> Part | None:
        found = [p for n, p in self.outside.items() if is_token_embedding(n) and self.role(n) is Role.BEFORE]
        return found[0] if found else None

    def is_tied(self) -> bool:
        """Whether the head is the embedding again: as the config says, else by what is in the file."""
        for config in (self.config, self.text_config()):
            if type(config.get("tie_word_embeddings")) is bool:
                return bool(config["tie_word_embeddings"])
        return not self.heads()

    @cached_property
    def is_packed(self) -> bool:
        """Whether its weights are quantized, so that no element of a tensor is a weight."""
        return any(config.get(key) for config in (self.config, self.text_config()) for key in QUANTIZATION)

    def origin(self, layer: int) -> tuple[LayerOrigin, ...]:
        """Where a layer comes from in the end: of a view, what its own layer comes from."""
        stack = self.manifest.stack
        for entry in stack:
            if entry.layer == layer:
                return entry.origins
        return (LayerOrigin(self.manifest.name, layer, self.manifest.revision),)

    def note(self, layer: int) -> str:
        return next((entry.note for entry in self.manifest.stack if entry.layer == layer), "")

    def key(self, part: Part) -> tuple[object, ...]:
        return byte_keys(self.manifest, part.data)


QUANTIZATION = ("quantization_config", "quantization", "compression_config")


def load_parent(manifest: Manifest, read_small: ReadSmall, prefix: str = "") -> Parent:
    """Sorts the tensors of a model.

    Args:
        prefix: As the user named it; empty to find it.

    Raises:
        UserError: No layers, or no telling which; the message names the model.
    """
    parts = parts_of(manifest)
    config: Config = {}
    if CONFIG in manifest.shown(View.MODEL):
        config = parse_config(read_small(manifest, CONFIG), f"{CONFIG} of {manifest.name}")
    groups = group_layers(parts)
    try:
        if prefix:
            check_prefix(parts, prefix, groups)
            found = prefix.removesuffix(".")
        else:
            found = _find_prefix(config, groups)
    except UserError as error:
        raise UserError(f"{manifest.name}: {error.message}", hint=error.hint) from error
    section = find_section(config, found)
    layers: dict[int, dict[str, Part]] = {}
    outside: dict[str, Part] = {}
    for name, part in parts.items():
        split = split_at(name, found)
        if split is None:
            outside[name] = part
        else:
            layers.setdefault(split.layer, {})[split.rest] = part
    roots = tuple({p.rpartition(".")[0] for p in groups if p != found})
    return Parent(manifest.name, manifest, config, section, found, dict(sorted(layers.items())), outside, roots)


def _find_prefix(config: Config, groups: dict[str, dict[int, list[str]]]) -> str:
    section = find_section(config)
    if is_encoder_decoder(config) and len(groups) > 1:
        raise UserError("has an encoder and a decoder", hint=f"name one with --prefix: {', '.join(sorted(groups))}")
    return detect_prefix(groups, section.layers if section else None, section.beyond if section else 0)


def require_layers(parent: Parent, wanted: Sequence[int], where: str) -> None:
    """Raises UserError, naming the layer, where one of these is not in the file."""
    missing = [layer for layer in wanted if layer not in parent.layers]
    if missing:
        what = f"layer {missing[0]} is" if len(missing) == 1 else f"layers {layers_text(missing)} are"
        raise UserError(
            f"{where}: {what} not in {parent.name}", hint=f"there is: {parent.prefix}.{{{layers_text(parent.layers)}}}"
        )
