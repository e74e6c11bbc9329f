"""config.json -> the settings that a GGUF header states, with the defaults of the config classes. Pure."""

import math
from collections.abc import Mapping
from typing import Any

from cakefs.formats.strictjson import brief
from cakefs.plan.ggufview.archs import ARCHS, Arch
from cakefs.plan.ggufview.refusal import NoGguf
from cakefs.plan.sections import Config

Settings = dict[str, Any]

# Keys of config.json that the converter heeds and no model of these architectures has: better refused than overlooked.
_STRANGE = (
    "n_layers", "n_layer", "num_layers", "prefix_dense_intermediate_size", "dense_intermediate_size", "layer_norm_eps",
    "layer_norm_epsilon", "norm_epsilon", "n_group", "topk_group", "score_function", "scoring_func", "score_func",
    "moe_router_activation", "moe_router_activation_func", "expert_selection_fn", "draft_vocab_size",
    "transformer_layer_config", "llm_config", "lm_config", "thinker_config", "language_config", "text_config", "lfm",
    "n_routed_experts", "global_rope_theta", "local_rope_theta", "no_rope_layers", "moe_layers", "llama_4_scaling",
)  # fmt: skip
# Whole numbers, and the most that each may be: a config must not make us fill the memory with its layers or tokens.
_WHOLE = {
    "num_hidden_layers": 10_000, "hidden_size": 2**24, "num_attention_heads": 2**16, "num_key_value_heads": 2**16,
    "intermediate_size": 2**31, "max_position_embeddings": 2**32 - 1, "vocab_size": 4_000_000,
}  # fmt: skip
_WIDEST_HEAD = 2**16
_RHYTHM = {"gemma2": 2, "gemma3": 6}  # Every n-th layer is one of full attention where a header says nothing of it.
_WIDE = {"gemma2": 46, "gemma3": 62}  # Layers of the one size that scales attention by the width of all heads.


def find_arch(config: Config) -> Arch:
    """Raises NoGguf for a model that llama.cpp, or cakefs, has no form for."""
    classes = config.get("architectures")
    name = classes[0] if isinstance(classes, list) and classes else None
    arch = ARCHS.get(name) if isinstance(name, str) else None
    if arch is None:
        raise NoGguf(f"config.json: architecture {brief(name)} is not one that cakefs knows as GGUF")
    if config.get("model_type") not in arch.model_types:
        raise NoGguf(f"config.json: model_type {brief(config.get('model_type'))} is not that of {name}")
    for key in ("quantization_config", "quantization", "compression_config"):
        if config.get(key):
            method = config[key].get("quant_method") if isinstance(config[key], dict) else None
            raise NoGguf(f"config.json: weights are quantized ({key}{f': {brief(method)}' if method else ''})")
    for key in _STRANGE:
        if config.get(key) is not None:
            raise NoGguf(f"config.json: {key} is not known here for {name}")
    if config.get("is_causal") is False:
        raise NoGguf("config.json: is_causal is false")
    return arch


def settings_of(config: Config, arch: Arch) -> Settings:
    """What the header states, by the names that `Arch.keys` uses. Raises NoGguf for what llama.cpp cannot be told."""
    found: Settings = {**arch.defaults, **config}
    if found.get("num_key_value_heads") is None:
        found["num_key_value_heads"] = found["num_attention_heads"]
    for key, most in _WHOLE.items():
        if type(found[key]) is not int or not 0 < found[key] <= most:
            raise NoGguf(f"config.json: {key} is {brief(found[key])}")
    if found["hidden_size"] % found["num_attention_heads"]:
        raise NoGguf("config.json: hidden_size is not a multiple of num_attention_heads")
    if found.get("head_dim") is None and found.get("head_dim_follows"):
        found["head_dim"] = found["hidden_size"] // found["num_attention_heads"]
    _check_heads(found, arch)
    found["experts"] = next((found[k] for k in ("num_local_experts", "num_experts") if found.get(k) is not None), None)
    found.update(_rope(found, config, arch))
    for key, value in arch.required.items():
        if (found.get(key) or False) != (value or False):
            raise NoGguf(
                f"config.json: {key} is {brief(found.get(key))}, which llama.cpp cannot be told of {arch.name}"
            )
    if found.get("mlp_only_layers"):
        raise NoGguf("config.json: mlp_only_layers names layers without experts")
    for key in arch.needed:
        if not isinstance(found.get(key), int | float):
            raise NoGguf(
                f"config.json: {key} is {brief(found.get(key))}, where llama.cpp has a default for {arch.name}"
            )
    if arch.name in _RHYTHM:
        _check_gemma(found, config, arch)
    if arch.name == "phi3":
        found["sliding_window"] = found["sliding_window"] or 0
    return found


def _check_heads(found: Settings, arch: Arch) -> None:
    width = head_width(found)
    if not 0 < width <= _WIDEST_HEAD:
        raise NoGguf(f"config.json: head_dim is {brief(found['head_dim'])}")
    if not arch.free_heads and width * found["num_attention_heads"] != found["hidden_size"]:
        raise NoGguf(f"config.json: head_dim is {width}, and the heads of {arch.name} are not as wide as the model")


def head_width(settings: Settings) -> int:
    """Elements of an attention head."""
    stated = settings.get("head_dim")
    return int(stated) if stated is not None else settings["hidden_size"] // settings["num_attention_heads"]


# --- positions ------------------------------------------------------------------------------------------------------


def _rope(found: Settings, config: Config, arch: Arch) -> Settings:
    if arch.name == "gemma3":
        return _rope_gemma3(config)
    params = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    rope = _scaling(params, found, arch)
    theta = params.get("rope_theta")
    rope["rope.theta"] = theta if theta is not None else found["rope_theta"]
    if arch.name == "phi3":
        part = params.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
        rope["rope.dims"] = int(part * found["hidden_size"]) // found["num_attention_heads"]
    else:
        rope["rope.dims"] = head_width(found)
    return rope


def _rope_gemma3(config: Config) -> Settings:
    params = dict(config.get("rope_parameters") or {"full_attention": {}, "sliding_attention": {}})
    if not {"full_attention", "sliding_attention"}.issuperset(params):
        raise NoGguf("config.json: rope_parameters is not told by kind of attention")
    full, sliding = ({**(params.get(kind) or {})} for kind in ("full_attention", "sliding_attention"))
    full.update(config.get("rope_scaling") or {})
    if _kind(sliding) != "default":
        raise NoGguf("config.json: positions of sliding attention are scaled")
    rope = _scaling(full, {**config, "max_position_embeddings": 0}, ARCHS["Gemma3ForCausalLM"])
    rope["rope.theta"] = full.get("rope_theta", config.get("rope_theta", 1000000.0))
    rope["rope.theta_sliding"] = sliding.get("rope_theta", config.get("rope_local_base_freq", 10000.0))
    return rope


def _kind(params: Mapping[str, Any]) -> str:
    return str(params.get("rope_type", params.get("type", "default"))).lower()


def _scaling(params: Mapping[str, Any], found: Settings, arch: Arch) -> Settings:
    """How positions are scaled; `rope.kind` is llama3 or longrope where that takes tensors of factors."""
    kind = _kind(params)
    if any(isinstance(value, dict) for value in params.values()):
        raise NoGguf(f"config.json: positions are told by kind of attention, which {arch.name} has one of")
    if "mrope_section" in params or "mscale" in params or "mscale_all_dim" in params:
        raise NoGguf("config.json: rope_scaling says what llama.cpp cannot be told of this architecture")
    if arch.name == "phi3":
        return _scaling_phi3(params, found, "longrope" if kind in ("su", "yarn") else kind)
    if kind == "default":
        return {}
    if kind == "linear" and arch.name != "gemma2":
        return {"rope.scaling": "linear", "rope.factor": _factor(params)}
    if kind == "yarn" and arch.name not in ("gemma2", "gemma3"):
        if any(params.get(key) is not None for key in ("attention_factor", "attn_factor", "extrapolation_factor")):
            raise NoGguf("config.json: factors of rope_scaling mean something else to llama.cpp than to transformers")
        if not params.get("truncate", True):
            raise NoGguf("config.json: rope_scaling is not to be truncated, as llama.cpp always does")
        given = {f"rope.{key}": params.get(key) for key in ("beta_fast", "beta_slow")}
        original = params.get("original_max_position_embeddings", found["max_position_embeddings"])
        return {"rope.scaling": "yarn", "rope.factor": _factor(params), "rope.original": original, **given}
    if kind == "llama3" and arch.permuted:
        return {"rope.kind": kind, "rope.params": dict(params)}
    raise NoGguf(f"config.json: rope_type {brief(kind)} is not known here for {arch.name}")


def _factor(params: Mapping[str, Any]) -> float:
    factor = params.get("factor")
    if not isinstance(factor, int | float):
        raise NoGguf(f"config.json: factor of rope_scaling is {brief(factor)}")
    return factor


def _scaling_phi3(params: Mapping[str, Any], found: Settings, kind: str) -> Settings:
    original = found["original_max_position_embeddings"]
    if kind == "default":
        return {"rope.original": params.get("original_max_position_embeddings", original)}
    if kind != "longrope" or not params.get("long_factor") or not params.get("short_factor"):
        raise NoGguf(f"config.json: rope_type {brief(kind)} is not known here for phi3")
    scale = found["max_position_embeddings"] / original
    factor = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1.0 else 1.0
    return {
        "rope.kind": kind, "rope.params": dict(params), "rope.original": original, "rope.attn_factor": factor
    }  # fmt: skip


# --- gemma ----------------------------------------------------------------------------------------------------------


def _check_gemma(found: Settings, config: Config, arch: Arch) -> None:
    every, layers = _RHYTHM[arch.name], found["num_hidden_layers"]
    stated: int = config.get("sliding_window_pattern") or every if arch.name == "gemma3" else every
    usual, told = ([(i + 1) % n != 0 for i in range(layers)] for n in (every, stated))
    types = config.get("layer_types")
    sliding = told if types is None else [kind == "sliding_attention" for kind in types]
    if len(sliding) != layers or not {"sliding_attention", "full_attention"}.issuperset(types or ()):
        raise NoGguf("config.json: layer_types does not say of each layer what attention it has")
    found["sliding_layers"] = None if sliding == usual else sliding
    wide = layers == _WIDE[arch.name]
    scale = found["hidden_size"] // found["num_attention_heads"] if wide else found["head_dim"]
    if found["query_pre_attn_scalar"] != scale:
        raise NoGguf(f"config.json: query_pre_attn_scalar is not {scale}, as llama.cpp takes it for {layers} layers")
