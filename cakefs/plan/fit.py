"""Whether models fit together in one merge: refusals that mergekit leaves to the loader, or to nobody. Pure."""

from collections.abc import Iterable, Mapping

from cakefs.errors import UserError
from cakefs.formats.strictjson import brief
from cakefs.plan.layers import scores_tokens
from cakefs.plan.modelconfig import sets_apart
from cakefs.plan.parents import Parent
from cakefs.plan.view import Part

# A model of another size in any of these cannot take the other's layers, whatever the shapes say.
_SIZES = (
    "hidden_size", "n_embd", "d_model", "num_attention_heads", "n_head", "num_key_value_heads", "head_dim",
    "kv_lora_rank", "q_lora_rank", "num_experts", "num_local_experts", "n_routed_experts",
)  # fmt: skip
# What a layer calculates with: the donor's value holds for all.
_ALIKE = (
    "rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon",
    "hidden_act", "activation_function", "sliding_window", "attn_logit_softcapping", "query_pre_attn_scalar",
    "partial_rotary_factor", "num_experts_per_tok", "norm_topk_prob", "attention_multiplier", "residual_multiplier",
)  # fmt: skip


def check_fit(donor: Parent, others: Mapping[Parent, str]) -> list[str]:
    """Warnings. Raises UserError where a model cannot share a stack with the donor.

    Args:
        others: With the entry of the recipe that names each.
    """
    warnings: list[str] = []
    for other, where in others.items():
        if other is donor:
            continue
        for key in ("model_type", "architectures"):
            _refuse_other(donor, other, where, key, donor.config.get(key), other.config.get(key))
        if other.prefix != donor.prefix:
            raise UserError(
                f"{where}: layers of {other.name} are named {other.prefix}.N, those of {donor.name} {donor.prefix}.N"
            )
        own, theirs = donor.text_config(), other.text_config()
        for key in _SIZES:
            if key in own and key in theirs:
                _refuse_other(donor, other, where, key, own[key], theirs[key])
        differing = [key for key in _ALIKE if own.get(key) != theirs.get(key)]
        if differing:
            warnings.append(
                f"{other.name} and {donor.name} differ in {', '.join(differing)}: {donor.name}'s holds for all"
            )
        _check_shapes(donor, other, where)
    return warnings


def _refuse_other(donor: Parent, other: Parent, where: str, key: str, own: object, theirs: object) -> None:
    if own != theirs:
        raise UserError(f"{where}: {key} of {other.name} is {brief(theirs)}, of {donor.name} {brief(own)}")


def _check_shapes(donor: Parent, other: Parent, where: str) -> None:
    """Every tensor inside a layer has, in some layer of the donor, the shape it has here."""
    known: dict[str, set[tuple[int, ...]]] = {}
    for tensors in donor.layers.values():
        for rest, part in tensors.items():
            known.setdefault(rest, set()).add(part.shape)
    for tensors in other.layers.values():
        for rest, part in tensors.items():
            if rest in known and part.shape not in known[rest]:
                shapes = ", ".join(str(list(shape)) for shape in sorted(known[rest]))
                raise UserError(
                    f"{where}: {part.name} of {other.name} has shape {list(part.shape)}, in {donor.name} it is {shapes}"
                )


def check_vocabulary(donor: Parent, before: Parent, after: Parent, heads: Mapping[str, Part]) -> None:
    """Raises UserError where the config counts, or the head scores, other tokens than the embedding knows.

    Args:
        donor: The model of the config.
        before: That of the embedding.
        after: That of the heads.
    """
    embedding, counted = before.token_embedding(), donor.token_embedding()
    if embedding is not None and counted is not None and counted.shape[:1] != embedding.shape[:1]:
        raise UserError(
            f"config.json of {donor.name} is for {counted.shape[0]} tokens, {embedding.name} of {before.name} knows"
            f" {embedding.shape[0]}"
        )
    if embedding is None or before is after:  # mllama's own embedding knows tokens that its head never scores
        return
    for name, part in heads.items():
        if scores_tokens(name) and part.shape[:1] != embedding.shape[:1]:
            raise UserError(
                f"{name} of {after.name} scores {part.shape[0]} tokens, {embedding.name} of {before.name} knows"
                f" {embedding.shape[0]}"
            )


def check_ties(parents: Iterable[Parent], last: Parent, head: Parent | None) -> None:
    """Raises UserError where some models' head is their embedding and others' is not, and none is named.

    Args:
        last: The model whose norm and head are used.
    """
    if head is not None:
        return
    tied = {parent.is_tied(): parent for parent in parents}
    if len(tied) > 1:
        raise UserError(
            f"{tied[True].name} uses its embedding as head, {tied[False].name} has one of its own",
            hint=f"say whose head to use: `head: {tied[False].name}` at the top of the recipe",
        )
    if last.config.get("tie_word_embeddings") is False and not last.heads() and _generates(last):
        raise UserError(f"{last.name} has no head, and its config says that the embedding is none")


def _generates(parent: Parent) -> bool:
    kinds = parent.config.get("architectures") or [""]
    return "CausalLM" in str(kinds[0]) or "LMHead" in str(kinds[0])


def check_first(parent: Parent, stack: Iterable[int], where: str) -> None:
    """Refuses another first layer where loaders build the first one differently: T5 keeps its position bias there.

    Seen by tensors that layer 0 alone has or lacks although the config says nothing that sets it apart.

    Args:
        stack: The numbers that the layers of the output had.
    """
    others = {layer: set(names) for layer, names in parent.layers.items() if layer < parent.depth}
    first = others.pop(0, set())
    if not first or not others or all((layer == 0) == (i == 0) for i, layer in enumerate(stack)):
        return
    strange = (first - set().union(*others.values())) | (set.intersection(*others.values()) - first)
    if strange and not parent.is_packed and not sets_apart(parent.text_config(), parent.depth, 0):
        odd = min(strange)
        raise UserError(
            f"{where}: layer 0 of {parent.name} alone {'has' if odd in first else 'lacks'} {odd.lstrip('.')}",
            hint="loaders build their first layer so: begin with layer 0, and use it once",
        )


def odd_layers(parent: Parent, moved: Iterable[int]) -> list[str]:
    """Warnings for layers, shown in another place than they were, that lack tensors which most layers have."""
    sets = {layer: frozenset(parent.layers[layer]) for layer in parent.layers if layer < parent.depth}
    counts: dict[frozenset[str], int] = {}
    for names in sets.values():
        counts[names] = counts.get(names, 0) + 1
    usual = max(counts, key=lambda names: counts[names])
    return [
        f"layer {layer} of {parent.name} has no {min(usual - sets[layer]).lstrip('.')}; it is kept as it is"
        for layer in sorted(set(moved))
        if sets[layer] < usual
    ]
