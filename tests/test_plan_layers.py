"""Layer texts, prefixes and roles."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cakefs.errors import UserError
from cakefs.plan.layers import (
    Name,
    Role,
    detect_prefix,
    group_at,
    group_layers,
    is_head,
    is_token_embedding,
    layers_text,
    parse_layers,
    role_of,
    scores_tokens,
    split_name,
)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("0-15,20", (*range(16), 20)),
        ("3", (3,)),
        ("0-3,8-11", (0, 1, 2, 3, 8, 9, 10, 11)),
        (" 2 , 0 - 1 ", (0, 1, 2)),
        ("5-5", (5,)),
        ("1,1,0-1", (0, 1)),
    ],
)
def test_layers_have_both_ends(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "an entry is empty"),
        ("1,,2", "an entry is empty"),
        ("5-3", "5-3 runs backwards"),
        ("-1", "'-1' is not a layer"),
        ("2-", "'2-' is not a layer"),
        ("a", "'a' is not a layer"),
        ("1.5", "'1.5' is not a layer"),
        ("0-99999999999", "no model has layer 99999999999"),
        ("100000", "no model has layer 100000"),
        ("١", "is not a layer"),  # noqa: RUF001
    ],
)
def test_bad_layers_are_named(text: str, part: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_layers(text)
    assert part in caught.value.message


@given(st.sets(st.integers(0, 400), min_size=1))
def test_text_is_read_back(layers: set[int]) -> None:
    assert parse_layers(layers_text(layers)) == tuple(sorted(layers))


def test_names_are_split_at_the_first_number() -> None:
    assert split_name("model.layers.10.mlp.experts.3.w1") == Name("model.layers", 10, ".mlp.experts.3.w1")
    assert split_name("h.0") == Name("h", 0, "")
    assert split_name("lm_head.weight") is None
    assert split_name("0.weight") is None  # nothing before it
    assert split_name("a.01.b") is None  # no number as anybody writes it
    assert split_name("a.1b.c") is None
    assert split_name("a.123456789.b") is None  # no model has so many
    assert split_name("a.1b.2.c") == Name("a.1b", 2, ".c")
    assert split_name("a..3") == Name("a.", 3, "")


def test_a_prefix_needs_its_dot() -> None:
    assert split_name("model.layers.10.x", "model.layers.1") is None
    assert split_name("model.layersX.1.x", "model.layers") is None
    assert split_name("a.3.experts.7.w", "a.3.experts") == Name("a.3.experts", 7, ".w")


GROUPS = group_layers(
    [*(f"model.layers.{i}.w" for i in range(4)), *(f"visual.blocks.{i}.w" for i in range(6)), "lm_head.w"]
)


def test_the_prefix_is_the_group_with_the_count_of_the_config() -> None:
    assert detect_prefix(GROUPS, 4) == "model.layers"
    assert detect_prefix(GROUPS, 6) == "visual.blocks"
    assert detect_prefix(GROUPS, 3, beyond=1) == "model.layers"  # an MTP head behind three layers
    assert detect_prefix(group_layers(["h.0.w", "h.1.w", "other.5.x"]), None) == "h"
    assert detect_prefix(group_layers(["model.layers.5.w", "model.layers.7.w"]), 10) == "model.layers"  # a slice


@pytest.mark.parametrize(
    ("names", "count", "message"),
    [
        (["encoder.block.0.w", "decoder.block.0.w"], 1, "decoder.block and encoder.block could be them"),
        (["encoder.groups.0.w"], None, None),
        (["a.7.w"], 3, "no group of tensors fits"),
        (["a.w"], 3, "no tensor has a layer number"),
    ],
)
def test_a_tie_or_nothing_is_refused(names: list[str], count: int | None, message: str | None) -> None:
    if message is None:
        assert detect_prefix(group_layers(names), count) == "encoder.groups"
        return
    with pytest.raises(UserError) as caught:
        detect_prefix(group_layers(names), count)
    assert message in caught.value.message


def test_a_prefix_that_matches_nothing_lists_what_exists() -> None:
    names = ["model.layers.0.w", "model.layers.1.w"]
    assert set(group_at(names, "model.layers.", group_layers(names))) == {0, 1}
    with pytest.raises(UserError) as caught:
        group_at(names, "model.layer", group_layers(names))
    assert "model.layer" in caught.value.message
    assert "model.layers (layers 0-1)" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "prefix", "role"),
    [
        ("model.embed_tokens.weight", "model.layers", Role.BEFORE),
        ("transformer.wpe.weight", "transformer.h", Role.BEFORE),
        ("model.norm.weight", "model.layers", Role.AFTER),
        ("transformer.ln_f.bias", "transformer.h", Role.AFTER),
        ("lm_head.weight", "model.layers", Role.AFTER),
        ("embed_out.weight", "gpt_neox.layers", Role.AFTER),
        ("bert.embeddings.LayerNorm.weight", "bert.encoder.layer", Role.BEFORE),
        ("visual.merger.norm.weight", "model.layers", Role.OTHER),
        ("model.visual.patch_embed.proj.weight", "model.language_model.layers", Role.OTHER),
        ("language_model.lm_head.weight", "language_model.model.layers", Role.AFTER),
        ("something.weight", "model.layers", Role.OTHER),
    ],
)
def test_roles_of_what_is_no_layer(name: str, prefix: str, role: Role) -> None:
    assert role_of(name, prefix) is role


def test_another_tower_keeps_its_norm() -> None:
    assert role_of("encoder.final_layer_norm.weight", "decoder.block", ["encoder"]) is Role.OTHER
    assert role_of("decoder.final_layer_norm.weight", "decoder.block", ["encoder"]) is Role.AFTER


def test_heads_and_token_embeddings() -> None:
    assert is_head("lm_head.weight") and is_head("language_model.lm_head.bias") and not is_head("model.norm.weight")
    assert is_token_embedding("transformer.wte.weight") and not is_token_embedding("transformer.wpe.weight")
    assert is_head("head.weight") and not is_head("vision.head.weight")  # rwkv
    assert is_token_embedding("backbone.embeddings.weight")  # mamba
    assert not is_token_embedding("bert.embeddings.position_embeddings.weight")
    assert scores_tokens("lm_head.weight") and not scores_tokens("lm_head.dense.weight")  # roberta
