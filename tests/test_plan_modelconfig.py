"""config.json for other stacks: counts, lists, rules by position, what is shared, names of layers."""

import json
from typing import Any

import pytest

from cakefs.errors import InvalidFormat, UserError
from cakefs.plan.layernames import Renames, map_names
from cakefs.plan.modelconfig import Take, rewrite_config
from cakefs.plan.sections import Section, encode_config, find_section, is_encoder_decoder, parse_config

Config = dict[str, Any]


def section(config: Config, prefix: str = "") -> Section:
    found = find_section(config, prefix)
    assert found is not None
    return found


def rewrite(config: Config, layers: list[int], prefix: str = "", **options: Any) -> Config:
    stack = [Take(0, layer) for layer in layers]
    before = json.dumps(config)
    new = rewrite_config([config], [section(config, prefix)], stack, **options).config
    assert json.dumps(config) == before
    return new


def refused(config: Config, layers: list[int]) -> str:
    with pytest.raises(UserError) as caught:
        rewrite(config, layers)
    return caught.value.message


# --- counts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"])
def test_the_count_under_any_of_its_names(key: str) -> None:
    assert rewrite({key: 4, "hidden_size": 8}, [0, 1, 1, 2, 3]) == {key: 5, "hidden_size": 8}


def test_a_nested_text_config_is_found_and_alone_changed() -> None:
    config = {
        "model_type": "llava",
        "vision_config": {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4},
        "text_config": {"num_hidden_layers": 4, "layer_types": ["full_attention", "sliding_attention"] * 2},
    }
    new = rewrite(config, [0, 1, 1])
    assert new["text_config"] == {
        "num_hidden_layers": 3, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    }  # fmt: skip
    assert new["vision_config"] == config["vision_config"]
    vision = rewrite(config, [0], prefix="vision_tower.encoder.layers")
    assert vision["vision_config"]["num_hidden_layers"] == 1 and vision["text_config"] == config["text_config"]


def test_what_is_said_twice_is_changed_twice() -> None:
    config = {"num_hidden_layers": 3, "text_config": {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}}
    new = rewrite(config, [0, 2])
    assert new == {
        "num_hidden_layers": 2,
        "text_config": {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2},
    }


def test_encoder_and_decoder_count_apart() -> None:
    bart = {"encoder_layers": 3, "decoder_layers": 4, "num_hidden_layers": 3, "is_encoder_decoder": True}
    assert is_encoder_decoder(bart)
    assert rewrite(bart, [0], prefix="model.decoder.layers") == {**bart, "decoder_layers": 1}
    assert rewrite(bart, [0], prefix="model.encoder.layers") == {**bart, "encoder_layers": 1, "num_hidden_layers": 1}
    t5 = {"num_layers": 6, "is_encoder_decoder": True}
    assert rewrite(t5, [0, 1], prefix="encoder.block") == {**t5, "num_layers": 2, "num_decoder_layers": 6}


def test_heads_beyond_the_last_layer_are_counted_apart() -> None:
    config = {
        "model_type": "deepseek_v3",
        "num_hidden_layers": 4,
        "num_nextn_predict_layers": 1,
        "first_k_dense_replace": 1,
    }
    assert section(config) == Section((), ("num_hidden_layers",), 4, 1)
    assert rewrite(config, [0, 1, 2, 3, 2, 3], beyond=1)["num_nextn_predict_layers"] == 1
    assert rewrite(config, [0, 1])["num_nextn_predict_layers"] == 0


def test_no_count_is_no_section() -> None:
    assert find_section({"hidden_size": 8}) is None


def test_a_list_counts_where_nothing_else_does() -> None:
    """nemotron_h as transformers saves it."""
    assert rewrite({"model_type": "nemotron_h", "layers_block_type": ["mamba", "attention", "mlp"]}, [0, 1, 1, 2]) == {
        "model_type": "nemotron_h", "layers_block_type": ["mamba", "attention", "attention", "mlp"],
    }  # fmt: skip


def test_an_audio_tower_counts_in_its_own_config() -> None:
    config = {"text_config": {"num_hidden_layers": 4}, "audio_config": {"encoder_layers": 6}}
    section = find_section(config, "audio_tower.layers")
    assert section is not None and section[:3] == (("audio_config",), ("encoder_layers",), 6)


def test_an_embedding_with_a_part_for_each_layer_is_refused() -> None:
    config = {"num_hidden_layers": 2, "hidden_size_per_layer_input": 256}
    assert rewrite(config, [0, 1]) == config
    with pytest.raises(UserError, match="hidden_size_per_layer_input"):
        rewrite(config, [0, 1, 1])


# --- lists ----------------------------------------------------------------------------------------------------------


def test_lists_with_one_entry_a_layer() -> None:
    config = {
        "num_hidden_layers": 3,
        "no_rope_layers": [1, 0, 1],
        "intermediate_size": [10, 20, 30],
        "hybrid_override_pattern": "M*-",
        "per_layer_config": {"01": {"head_dim": 9}},
        "eos_token_id": [7, 8, 9],
    }
    assert rewrite(config, [2, 1, 1]) == {
        "num_hidden_layers": 3,
        "no_rope_layers": [1, 0, 0],
        "intermediate_size": [30, 20, 20],
        "hybrid_override_pattern": "-**",
        "per_layer_config": {"01": {"head_dim": 9}, "02": {"head_dim": 9}},
        "eos_token_id": [7, 8, 9],
    }


def test_lists_of_indices_even_when_all_layers_are_listed() -> None:
    config = {"num_hidden_layers": 3, "moe_layers": [0, 1, 2], "cross_attention_layers": [1]}
    new = rewrite(config, [0, 1, 0, 1])
    assert new["moe_layers"] == [0, 1, 2, 3] and new["cross_attention_layers"] == [1, 3]


def test_labels_by_number_are_no_layers() -> None:
    config = {"num_hidden_layers": 3, "id2label": {"0": "bad", "1": "good"}}
    assert rewrite(config, [0, 2, 2, 1]) == {**config, "num_hidden_layers": 4}


def test_an_unknown_list_is_taken_with_a_warning_or_refused() -> None:
    config = {"num_hidden_layers": 3, "my_layer_kinds": ["a", "b", "c"]}
    new = rewrite_config([config], [section(config)], [Take(0, 2), Take(0, 0)])
    assert new.config["my_layer_kinds"] == ["c", "a"]
    assert "my_layer_kinds is taken for a list" in new.warnings[0]
    assert "my_layer_ids" in refused({"num_hidden_layers": 5, "my_layer_ids": [1, 3]}, [0, 1])
    assert "my_layer_interval" in refused({"num_hidden_layers": 5, "my_layer_interval": 2}, [0, 1])
    assert rewrite({"num_hidden_layers": 5, "my_layer_interval": 2}, [*range(5)])["my_layer_interval"] == 2


# --- rules by position ----------------------------------------------------------------------------------------------

S, F, LIN = "sliding_attention", "full_attention", "linear_attention"


@pytest.mark.parametrize(
    ("config", "layers", "expected"),
    [
        ({"model_type": "gemma2"}, [0, 1, 1, 0], [S, F, F, S]),
        ({"model_type": "gpt_oss"}, [1, 0], [F, S]),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 3}, [0, 2, 2], [S, F, F]),
        ({"model_type": "cohere2", "sliding_window_pattern": 2}, [0, 0], [S, S]),
        ({"model_type": "olmo3"}, [3, 3], [F, F]),
        ({"model_type": "qwen3_next", "full_attention_interval": 2}, [0, 1, 1], [LIN, F, F]),
        ({"model_type": "modernbert", "global_attn_every_n_layers": 2}, [1, 0], [S, F]),
        ({"model_type": "lfm2", "full_attn_idxs": [1]}, [1, 1, 0], None),  # the indices say it already
        ({"model_type": "gemma2", "layer_types": [S, F, S, F]}, [1, 0], [F, S]),
    ],
)
def test_rules_become_lists_where_they_no_longer_hold(
    config: Config, layers: list[int], expected: list[str] | None
) -> None:
    config = {"num_hidden_layers": 4, **config}
    assert rewrite(config, layers).get("layer_types") == expected


@pytest.mark.parametrize("layers", [[0, 1, 0, 1], [0, 1], [2, 3, 0, 1, 2]])
def test_a_rule_that_still_holds_stays(layers: list[int]) -> None:
    assert "layer_types" not in rewrite({"model_type": "gemma2", "num_hidden_layers": 4}, layers)


def test_late_sliding_layers_move_the_threshold_or_are_listed() -> None:
    config = {
        "model_type": "qwen2", "num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 8,
        "max_window_layers": 2,
    }  # fmt: skip
    new = rewrite(config, [0, 1, 0, 2, 3])
    assert new["max_window_layers"] == 3 and new["layer_types"] == [F, F, F, S, S]
    assert rewrite(config, [2, 0])["layer_types"] == [S, F]
    idle = {**config, "use_sliding_window": False}
    assert rewrite(idle, [2, 0]) == {**idle, "num_hidden_layers": 2}


def test_dense_layers_of_a_mixture() -> None:
    step = {"model_type": "qwen3_moe", "num_hidden_layers": 4, "num_experts": 8, "decoder_sparse_step": 2}
    assert rewrite(step, [1, 0, 0])["mlp_only_layers"] == [1, 2]
    assert rewrite(step, [1, 0, 0])["decoder_sparse_step"] == 1
    assert rewrite(step, [0, 1, 0, 1]) == step
    first = {"model_type": "deepseek_v3", "num_hidden_layers": 4, "first_k_dense_replace": 1}
    assert rewrite(first, [0, 0, 1])["first_k_dense_replace"] == 2
    assert rewrite(first, [1, 2])["first_k_dense_replace"] == 0
    assert "first_k_dense_replace cannot say" in refused(first, [1, 0])
    assert rewrite({**first, "model_type": "glm4_moe_lite"}, [1, 0])["mlp_layer_types"] == ["sparse", "dense"]
    ernie = {"model_type": "ernie4_5_moe", "num_hidden_layers": 4, "moe_layer_start_index": 1, "moe_layer_end_index": 3}
    assert rewrite(ernie, [0, 1, 2, 1, 2, 3])["moe_layer_end_index"] == 5


def test_jamba_finds_another_rhythm_or_refuses() -> None:
    config = {
        "model_type": "jamba", "num_hidden_layers": 8, "attn_layer_period": 4, "attn_layer_offset": 2,
        "expert_layer_period": 2, "expert_layer_offset": 1,
    }  # fmt: skip
    new = rewrite(config, [2, 3, 6, 7])
    assert (new["attn_layer_period"], new["attn_layer_offset"]) == (2, 0)
    assert "attn_layer_period cannot say" in refused(config, [2, 2, 0, 1])


def test_llama4_and_neo() -> None:
    llama4 = {"model_type": "llama4_text", "num_hidden_layers": 4, "interleave_moe_layer_step": 2}
    new = rewrite(llama4, [3, 1, 0])
    assert new["no_rope_layers"] == [0, 1, 1] and new["moe_layers"] == [0, 1]
    neo = {
        "model_type": "gpt_neo", "num_layers": 4, "attention_types": [[["global", "local"], 2]],
        "attention_layers": ["global", "local", "global", "local"],
    }  # fmt: skip
    assert rewrite(neo, [0, 2])["attention_types"] == [[["global", "global"], 1]]
    assert rewrite(neo, [0, 2])["attention_layers"] == ["global", "global"]


def test_a_rule_in_the_code_of_a_model_that_is_not_known_here() -> None:
    assert "layer_types is not listed" in refused({"model_type": "flint", "num_hidden_layers": 4}, [0, 1])


def test_position_in_the_arithmetic_is_warned_of() -> None:
    config = {"model_type": "gpt2", "n_layer": 2, "scale_attn_by_inverse_layer_idx": True}
    assert "position" in rewrite_config([config], [section(config)], [Take(0, 1)]).warnings[0]


# --- what layers share ----------------------------------------------------------------------------------------------


def test_shared_keys_and_values() -> None:
    config = {"num_hidden_layers": 4, "kv_source_layers": [0, 0, 2, 2]}
    assert rewrite(config, [0, 1, 0, 1, 2, 3])["kv_source_layers"] == [0, 0, 2, 2, 4, 4]
    assert "layer 1 uses the keys and values of layer 0" in refused(config, [1, 2])


def test_the_shared_end_of_gemma3n_must_stay() -> None:
    config = {
        "model_type": "gemma3n_text", "num_hidden_layers": 6, "num_kv_shared_layers": 2,
        "layer_types": [S, F, S, F, S, F], "activation_sparsity_pattern": [0.0] * 6,
    }  # fmt: skip
    assert rewrite(config, [0, 1, 0, 1, 2, 3, 4, 5])["num_hidden_layers"] == 8
    for layers in ([0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 4, 5], [0, 1, 2, 3, 0, 4, 5]):
        assert "num_kv_shared_layers" in refused(config, layers)


def test_a_shared_indexer_needs_its_full_one() -> None:
    config = {"num_hidden_layers": 4, "indexer_types": ["full", "shared", "full", "shared"]}
    assert rewrite(config, [0, 1, 0, 1])["indexer_types"] == ["full", "shared"] * 2
    assert "indexer_types" in refused(config, [0, 3])
    assert "indexer_types" in refused(config, [1, 2])


@pytest.mark.parametrize("kind", ["albert", "zamba2"])
def test_models_whose_layers_are_one(kind: str) -> None:
    assert "cannot be restacked" in refused({"model_type": kind, "num_hidden_layers": 4}, [0])


def test_gemma4_wants_full_attention_last() -> None:
    assert "last layer" in refused({"model_type": "gemma4_text", "num_hidden_layers": 6}, [0, 1])


# --- several models -------------------------------------------------------------------------------------------------


def test_entries_come_from_the_model_of_the_layer() -> None:
    a = {"num_hidden_layers": 2, "layer_types": [S, F], "rope_theta": 1.0}
    b = {"num_hidden_layers": 3, "layer_types": [F, F, S], "rope_theta": 2.0}
    new = rewrite_config([a, b], [section(a), section(b)], [Take(0, 0), Take(1, 0), Take(1, 2)], donor=1).config
    assert new == {"num_hidden_layers": 3, "layer_types": [S, F, S], "rope_theta": 2.0}


def test_a_list_in_one_model_only() -> None:
    a, b = {"num_hidden_layers": 2, "intermediate_size": [1, 2]}, {"num_hidden_layers": 2, "intermediate_size": 1}
    with pytest.raises(UserError, match="intermediate_size"):
        rewrite_config([a, b], [section(a), section(b)], [Take(1, 0)])


# --- text and names -------------------------------------------------------------------------------------------------


def test_text() -> None:
    config = parse_config(b'{"a": Infinity, "b": "\xc3\xa9"}', "config.json")
    assert encode_config(config) == '{\n  "a": Infinity,\n  "b": "é"\n}\n'.encode()
    for text in (b"[]", b"{", b"\xff", b"[" * 100_000):
        with pytest.raises(InvalidFormat, match=r"config\.json"):
            parse_config(text, "config.json")


@pytest.mark.parametrize(
    "config",
    [
        {"num_hidden_layers": 2, "model_type": "jamba", "attn_layer_period": 0},
        {"num_hidden_layers": 2, "model_type": "gpt_neo", "attention_types": 3},
        {"num_hidden_layers": 2, "kv_source_layers": ["x", "y"]},
    ],
)
def test_values_of_an_odd_form_are_no_crash(config: Config) -> None:
    with pytest.raises((InvalidFormat, UserError), match=r"config\.json"):
        rewrite(config, [1, 0])


def test_names_of_layers_follow_them() -> None:
    quantization = {
        "bits": 4,
        "modules_to_not_convert": ["lm_head", "model.layers.0.mlp", "model.layers.10.mlp"],
        "model.layers.0.self_attn": {"bits": 8},
        "config_groups": {"group_0": {"targets": ["Linear"]}},
    }
    renames = Renames("model.layers", {Take(0, 0): (0, 2), Take(0, 1): (1,)})
    assert map_names([quantization], renames, 0, "quantization_config") == {
        "bits": 4,
        "modules_to_not_convert": ["lm_head", "model.layers.0.mlp", "model.layers.2.mlp"],
        "model.layers.0.self_attn": {"bits": 8},
        "model.layers.2.self_attn": {"bits": 8},
        "config_groups": {"group_0": {"targets": ["Linear"]}},
    }


def test_names_of_two_models_meet() -> None:
    a, b = {"ignore": ["lm_head", "model.layers.0.mlp"]}, {"ignore": ["model.layers.1.mlp", "lm_head"]}
    renames = Renames("model.layers", {Take(0, 0): (0,), Take(1, 1): (1,)})
    assert map_names([a, b], renames, 0, "q") == {"ignore": ["lm_head", "model.layers.0.mlp", "model.layers.1.mlp"]}
    for other in ({"ignore": ["lm_head"], "bits": 8}, None):
        with pytest.raises(UserError, match="differs between the models"):
            map_names([a, other], renames, 0, "q")


def test_a_pattern_with_a_layer_number_is_refused() -> None:
    with pytest.raises(UserError, match="pattern"):
        map_names([{"ignore": ["re:model[.]layers\\.0\\..*"]}], Renames("model.layers", {}), 0, "q")
    plain = {"ignore": ["re:.*gate$"]}
    assert map_names([plain], Renames("model.layers", {}), 0, "q") == plain


@pytest.mark.parametrize(
    "name",
    [
        r"re:.*layers\.(0|1)\..*",
        r"re:.*layers\.[0-1]\.mlp",
        r"re:.*\.1\.mlp.*",
        r"+:.*\.1\..*gate.*",
        "re:.*.1.mlp",
        "model.layers.1*",
    ],
)
def test_patterns_that_speak_of_layers_in_their_own_way_are_refused(name: str) -> None:
    renames = Renames("model.layers", {Take(0, i): (2 * i,) for i in range(12)})
    values: list[Any] = [[name], {name: {}}]
    for value in values:
        with pytest.raises(UserError, match="cannot renumber it"):
            map_names([{"ignore": value}], renames, 0, "quantization_config")


def test_patterns_that_speak_of_no_layer_stay() -> None:
    names = [
        "lm_head",
        "re:.*lm_head",
        r"re:.*mlp\.experts\.\d+\..*",
        r"re:.*experts\.[0-9]+\.w[123]$",
        "re:.*w2",
        "*norm",
    ]
    renames = Renames("model.layers", {Take(0, 0): (1,), Take(0, 61): (70,)})
    mapped = map_names([[*names, "model.layers.61*"]], renames, 0, "exclude_modules")
    assert mapped == [*names, "model.layers.70.*"]


@pytest.mark.parametrize(
    ("prefix", "own", "others"),
    [
        ("language_model.model.layers", "model.language_model.layers.0.mlp", "vision_tower.transformer.layers.0.mlp"),
        ("vision_tower.encoder.layers", "vision_tower.encoder.layers.0.mlp", "model.layers.0.mlp"),
        ("decoder.block", "decoder.block.0.layer.1", "encoder.block.0.layer.1"),
        ("model.layers", "model.layers.0.mlp", "mtp.layers.0.mlp"),
    ],
)
def test_names_of_layers_of_another_tower_stay(prefix: str, own: str, others: str) -> None:
    mapped = map_names([[own, others]], Renames(prefix, {Take(0, 0): (4,)}), 0, "ignore")
    assert mapped == [others, own.replace(".0.", ".4.")]
