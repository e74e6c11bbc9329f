"""Models of many families as transformers saves them, restacked and loaded again."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cakefs.errors import UserError
from cakefs.model import Manifest, View
from cakefs.plan.merge import build_merge
from cakefs.plan.recipe import parse_recipe
from cakefs.plan.slice import build_slice
from tests.shelf import Shelf

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("mergekit", reason="mergekit is not installed: pip install 'cakefs[oracle]'")
    import torch
    import transformers

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore")]

TEXT = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
    "num_hidden_layers": 4, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 2, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
QWEN_VISION = {"depth": 4, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "patch_size": 4}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
SEQ2SEQ = {
    "d_model": 64, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "encoder_attention_heads": 4, "vocab_size": 300,
    "decoder_attention_heads": 4, "encoder_layers": 4, "decoder_layers": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
AUDIO = {"encoder_layers": 4, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "d_model": 32, "num_mel_bins": 16}
MOE = {
    "first_k_dense_replace": 1, "n_routed_experts": 4, "moe_intermediate_size": 32, "q_lora_rank": 32,
    "kv_lora_rank": 16, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16, "n_group": 1,
    "topk_group": 1, "num_experts_per_tok": 2, "num_key_value_heads": 4,
}  # fmt: skip
T5 = {"d_model": 64, "d_ff": 96, "num_layers": 4, "num_heads": 4, "d_kv": 16, "vocab_size": 300}
MAMBA = {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1, "head_dim": 16}
PER_LAYER = {"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 300, "num_kv_shared_layers": 0}


class Case(NamedTuple):
    """A family; `stack` is what the modules of the layers are called in memory, `prefix` what the user has to name."""

    kind: str
    config: Mapping[str, Any]
    stack: str
    prefix: str = ""


CASES = {
    "llava": Case(
        "Llava", {"text_config": {**TEXT, "model_type": "llama"}, "image_token_index": 299, "vision_config": {
            **VISION, "model_type": "clip_vision_model"}}, "model.language_model.layers"),
    "gemma3": Case(
        "Gemma3", {"text_config": {**TEXT, "head_dim": 16, "sliding_window": 8, "sliding_window_pattern": 2},
                   "vision_config": VISION, "mm_tokens_per_image": 4}, "model.language_model.layers"),
    "qwen2_5_vl": Case(
        "Qwen2_5_VL", {"text_config": {**TEXT, "rope_scaling": MROPE}, "vision_config": {
            **QWEN_VISION, "out_hidden_size": 64, "fullatt_block_indexes": [1]}},
        "model.language_model.layers", "model.layers"),
    "its vision tower": Case(
        "Qwen2_5_VL", {"text_config": {**TEXT, "rope_scaling": MROPE}, "vision_config": {
            **QWEN_VISION, "out_hidden_size": 64, "fullatt_block_indexes": [1, 3]}},
        "model.visual.blocks", "visual.blocks"),
    "mllama": Case(
        "Mllama", {"text_config": {**TEXT, "cross_attention_layers": [1, 3], "rope_scaling": None}, "vision_config": {
            "hidden_size": 32, "intermediate_size": 48, "attention_heads": 2, "num_hidden_layers": 2,
            "num_global_layers": 1, "image_size": 16, "patch_size": 4, "intermediate_layers_indices": [0],
            "vision_output_dim": 64}}, "model.language_model.layers"),
    "audio tower": Case(
        "Qwen2Audio", {"text_config": {**TEXT, "model_type": "qwen2"}, "audio_config": AUDIO},
        "model.audio_tower.layers", "audio_tower.layers"),
    "t5": Case("T5", T5, "encoder.block", "encoder.block"),
    "t5, its decoder": Case("T5", T5, "decoder.block", "decoder.block."),
    "bart": Case("Bart", SEQ2SEQ, "model.encoder.layers", "model.encoder.layers"),
    "whisper": Case("Whisper", SEQ2SEQ, "model.encoder.layers", "model.encoder.layers"),
    "deepseek_v3": Case("DeepseekV3", {**TEXT, **MOE}, "model.layers"),
    "nemotron_h": Case("NemotronH", {**TEXT, **MAMBA, "hybrid_override_pattern": "M*-M"}, "model.layers"),
    "rwkv": Case("Rwkv", {**TEXT, "attention_hidden_size": 64}, "rwkv.blocks"),
    "mamba": Case("Mamba", {**TEXT, "state_size": 8}, "backbone.layers"),
    "roberta": Case("Roberta", TEXT, "roberta.encoder.layer"),
    "modernbert": Case("ModernBert", {**TEXT, "global_attn_every_n_layers": 2, "local_attention": 8}, "model.layers"),
}  # fmt: skip


def model_class(kind: str) -> Any:
    tails = ("", "ForConditionalGeneration", "ForCausalLM", "ForMaskedLM")
    return next(found for tail in tails if (found := getattr(transformers, kind + tail, None)))


def save(case: Case, path: Path) -> tuple[Shelf, Manifest]:
    torch.manual_seed(3)
    kind = model_class(case.kind)
    kind(kind.config_class(**case.config)).save_pretrained(path)
    shelf = Shelf()
    return shelf, shelf.published("m", {f.name: f.read_bytes() for f in path.iterdir()})


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("layers", [[0, 1, 2, 1, 2, 3], [0, 2, 3]], ids=["longer", "shorter"])
def test_every_layer_is_the_one_it_should_be(case: Case, layers: list[int], tmp_path: Path) -> None:
    shelf, manifest = save(case, tmp_path / "saved")
    tools = {"name": "v", "created": 1, "read_small": shelf.read, "put_literal": shelf.put, "prefix": case.prefix}
    recipe = parse_recipe(f"model: m\nrepeat_map_raw: {layers}\n")
    view = build_merge(recipe, {"m": manifest}, **tools).manifest  # type: ignore[arg-type]
    if layers == [0, 2, 3]:
        whole = {"renumber": True, "with_embeddings": True, "with_head": True}
        cut = build_slice(manifest, "0,2-3", **tools, **whole).manifest  # type: ignore[arg-type]
        assert all(shelf.read(cut, path) == shelf.read(view, path) for path in view.shown(View.MODEL))
    target = tmp_path / "view"
    target.mkdir()
    for path in view.shown(View.MODEL):
        (target / path).write_bytes(shelf.read(view, path))
    kind = model_class(case.kind)
    loaded, info = kind.from_pretrained(target, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert len(loaded.get_submodule(case.stack)) == len(layers)
    before, position = (
        kind.from_pretrained(tmp_path / "saved").state_dict(),
        re.compile(rf"({re.escape(case.stack)}\.)(\d+)"),
    )
    for name, value in loaded.state_dict().items():
        source = position.sub(lambda found: f"{found[1]}{layers[int(found[2])]}", name)
        assert torch.equal(value, before[source]), name


REFUSED = {
    "t5": (CASES["t5"], [1, 2], "repeat_map_raw[0]: layer 0 of m alone has layer.0.SelfAttention.relative_attention"),
    "rwkv": (CASES["rwkv"], [0, 1, 0], "layer 0 of m alone has pre_ln.bias"),
    "modernbert": (CASES["modernbert"], [2, 1], "layer 0 of m alone lacks attn_norm.weight"),
    "gemma3n": (
        Case("Gemma3nForCausalLM", {**TEXT, **PER_LAYER, "head_dim": 16, "laurel_rank": 8}, ""), [0, 1],
        "gemma3n_text cannot be restacked: its embedding has a part for each layer",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("case", "layers", "said"), REFUSED.values(), ids=REFUSED)
def test_what_loaders_would_build_differently_is_refused(
    case: Case, layers: list[int], said: str, tmp_path: Path
) -> None:
    shelf, manifest = save(case, tmp_path)
    tools = {"name": "v", "created": 1, "read_small": shelf.read, "put_literal": shelf.put, "prefix": case.prefix}
    with pytest.raises(UserError) as caught:
        build_merge(parse_recipe(f"model: m\nrepeat_map_raw: {layers}\n"), {"m": manifest}, **tools)  # type: ignore[arg-type]
    assert said in caught.value.message
