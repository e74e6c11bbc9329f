"""Which tensors are which layer: texts such as `0-15,20`, and the naming of layers on disk. Pure.

A layer's tensors are named `<prefix>.<number>.<rest>`. The prefix is found by grouping names before their first numeric
component, so experts inside a layer (`….mlp.experts.3.w1`) never make groups of their own. A match needs the dot:
`model.layers.1` never takes `model.layers.10`.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from enum import Enum

import msgspec

from cakefs.errors import UserError
from cakefs.formats.strictjson import brief

MAX_LAYER = 99_999  # No model comes near; a slip of the finger must not cost memory.

_ITEM = re.compile(r"([0-9]+)(?:\s*-\s*([0-9]+))?")
_LAYER = re.compile(r"\.(0|[1-9][0-9]{0,7})(?=\.|\Z)")

Group = Mapping[int, Mapping[str, str]]
"""Layer number -> what follows it in a name -> the name."""
Groups = Mapping[str, Group]
"""By prefix."""


def parse_layers(text: str) -> tuple[int, ...]:
    """`0-3,8` (both ends included) as rising numbers without repeats.

    Raises:
        UserError: Naming the part that is wrong.
    """
    found: set[int] = set()
    for item in text.split(","):
        match = _ITEM.fullmatch(item.strip())
        if match is None:
            what = f"{brief(item.strip())} is not a layer or range" if item.strip() else "an entry is empty"
            raise UserError(f"layers {brief(text)}: {what}", hint="write them like 0-15,20 (both ends included)")
        first = int(match[1]) if len(match[1]) < 9 else MAX_LAYER + 1
        last = first if match[2] is None else int(match[2]) if len(match[2]) < 9 else MAX_LAYER + 1
        if last < first:
            raise UserError(f"layers {brief(text)}: {match[0]} runs backwards", hint=f"did you mean {last}-{first}?")
        if last > MAX_LAYER:
            raise UserError(f"layers {brief(text)}: no model has layer {match[2] or match[1]}")
        found.update(range(first, last + 1))
    return tuple(sorted(found))


def layers_text(layers: Iterable[int]) -> str:
    """The shortest text that `parse_layers` reads back."""
    runs: list[list[int]] = []
    for layer in sorted(set(layers)):
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


# --- names ----------------------------------------------------------------------------------------------------------


class Name(msgspec.Struct, frozen=True, gc=False):
    """A tensor's name taken apart: `<prefix>.<layer><rest>`, where `rest` is empty or starts with a dot."""

    prefix: str
    layer: int
    rest: str


def split_name(name: str, prefix: str = "") -> Name | None:
    """At the first number, or at the one behind a prefix that is known. None where there is none."""
    match = _LAYER.search(name, len(prefix)) if name.startswith(prefix) else None
    if match is None or (prefix and match.start() != len(prefix)):
        return None
    return Name(name[: match.start()], int(match[1]), name[match.end() :])


def group_layers(names: Iterable[str], prefix: str = "") -> dict[str, dict[int, dict[str, str]]]:
    """All names with a number in them, by what stands before it; or those under a prefix that is known."""
    groups: dict[str, dict[int, dict[str, str]]] = {}
    for name in names:
        split = split_name(name, prefix)
        if split is not None:
            groups.setdefault(split.prefix, {}).setdefault(split.layer, {})[split.rest] = name
    return groups


def numbers(group: Collection[int]) -> str:
    """Layers as a message says them."""
    return f"layers {layers_text(group)}" if len(group) > 1 else f"layer {layers_text(group)}"


def describe(groups: Groups) -> str:
    """What exists, for hints."""
    known = [f"{prefix} ({numbers(group)})" for prefix, group in sorted(groups.items())]
    return "; ".join(known[:8]) + ("; …" if len(known) > 8 else "") if known else "no tensor has a layer number"


def detect_prefix(groups: Groups, count: int | None, beyond: int = 0) -> str:
    """The group whose numbers are exactly the layers that the config counts.

    Args:
        count: Layers by config.json; None where it does not say.
        beyond: Heads for further tokens (MTP), named as layers after the last one, that may or may not be there.

    Raises:
        UserError: None or several fit; the hint lists what exists.
    """
    hint = f"name one with --prefix; there is: {describe(groups)}"
    if not groups:
        raise UserError("no tensor has a layer number in its name")
    if count is None:
        fitting = list(groups) if len(groups) == 1 else [p for p, g in groups.items() if set(g) == set(range(len(g)))]
        said = "no layer count in config.json, and"
    else:
        exact = {frozenset(range(count + extra)) for extra in range(beyond + 1)}
        fitting = [p for p, g in groups.items() if frozenset(g) in exact]
        if not fitting:  # a slice that was not renumbered
            fitting = [p for p, g in groups.items() if max(g) < count + beyond and len(g) > 0]
        said = f"config.json counts {count} layers:"
    if len(fitting) == 1:
        return fitting[0]
    which = " and ".join(sorted(fitting)) if fitting else "no group of tensors"
    raise UserError(f"{said} {which} {'could be them' if fitting else 'fits'}", hint=hint)


def group_at(names: Iterable[str], prefix: str, groups: Groups) -> Group:
    """The layers under a prefix that the user named, with or without the dot at its end: it may be behind a number."""
    clean = prefix.removesuffix(".")
    group = groups.get(clean) or group_layers(names, clean).get(clean)
    if not clean or group is None:
        raise UserError(f"prefix {brief(prefix)} matches no layer", hint=f"there is: {describe(groups)}")
    return group


# --- what is no layer -----------------------------------------------------------------------------------------------


class Role(Enum):
    """Where a tensor outside the layers belongs."""

    BEFORE = "embeddings"
    AFTER = "norm and head"
    OTHER = "other"


_BEFORE = frozenset({
    "embed_tokens", "embed", "embedding", "embeddings", "wte", "wpe", "word_embeddings", "word_embeddings_layernorm",
    "tok_embeddings", "embed_in", "embed_positions", "position_embeddings", "token_type_embeddings", "shared",
    "layernorm_embedding", "embeddings_layernorm", "embed_tokens_per_layer", "per_layer_model_projection",
    "per_layer_projection_norm", "project_in", "embed_norm", "emb_norm", "rotary_emb", "rotary_pos_emb",
    "altup_projections", "patch_embed", "patch_embedding", "patch_embeddings", "patch_embedder", "patch_conv",
    "class_embedding", "position_embedding",
})  # fmt: skip
_HEADS = frozenset({"lm_head", "embed_out", "output_layer", "output"})
_AFTER = _HEADS | {
    "norm", "ln_f", "final_layer_norm", "final_layernorm", "final_norm", "norm_f", "ln_out", "head", "project_out",
    "score", "classifier", "post_layernorm", "altup_unembed_projections", "embedding_norm", "mtp",
}  # fmt: skip
_TOKENS = frozenset({
    "embed_tokens", "wte", "word_embeddings", "tok_embeddings", "embed_in", "shared", "token_embedding",
})  # fmt: skip
_TOWER = re.compile(r"vis(ion|ual)?|image|audio|speech|connector|projector|aligner|resampler", re.IGNORECASE)


def role_of(name: str, prefix: str, roots: Collection[str] = ()) -> Role:
    """What a tensor that is no layer is to the layers under `prefix`.

    Args:
        roots: Of the other groups of layers; what lies under them belongs to them.
    """
    root = prefix.rpartition(".")[0]
    parts = name.split(".")
    if predicts_further(name):
        return Role.AFTER
    if any(other and other != root and not root.startswith(other) and name.startswith(other + ".") for other in roots):
        return Role.OTHER
    if any(_TOWER.search(part) for part in parts[:3]) and not _TOWER.search(prefix):
        return Role.OTHER
    return _word_role(parts)


def _word_role(parts: list[str]) -> Role:
    for part in parts:
        if part in _BEFORE:
            return Role.BEFORE
        if part in _AFTER:
            return Role.AFTER
    return Role.OTHER


def predicts_further(name: str) -> bool:
    """Whether the tensor is of a head for further tokens (MTP) that is named apart from the layers."""
    return any(part.startswith("mtp") for part in name.split(".")[:3])


def same_stack(before: str, prefix: str) -> bool:
    """Whether what stands before a layer's number may mean the layers under a prefix, which loaders call differently.

    A tower and the text are never the same, nor are an encoder and a decoder, nor the layers and those of an MTP head.
    """
    if bool(_TOWER.search(before)) != bool(_TOWER.search(prefix)) or predicts_further(before) != predicts_further(
        prefix
    ):
        return False
    return not {"encoder", "decoder"} <= {*before.split("."), *prefix.split(".")}


def is_head(name: str) -> bool:
    """Whether the tensor helps to turn hidden states into token scores."""
    return name in ("head.weight", "head.bias") or not _HEADS.isdisjoint(name.split(".")[-3:])


def scores_tokens(name: str) -> bool:
    """Whether the tensor of a head has a row for each token."""
    parts = name.split(".")
    return parts[-1] == "weight" and (name == "head.weight" or parts[-2] in _HEADS)


def is_token_embedding(name: str) -> bool:
    """Whether a tied head would reuse this tensor."""
    parts = name.split(".")
    return parts[-2:] == ["embeddings", "weight"] or not _TOKENS.isdisjoint(parts)
