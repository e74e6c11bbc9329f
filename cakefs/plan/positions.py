"""What model configs say of layers by their position, in keys and in the code of the models. Pure.

Such a fact is a list with one entry a layer, a list of layer indices, a rule (`every fourth layer`), or in the model's
code alone. `plan/modelconfig.py` reads one value a layer from any of these and writes them for another stack.

The rules are those of transformers 5.23; a test holds them against all its config classes.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Config = Mapping[str, Any]
Values = list[Any]

# One entry a layer.
PER_LAYER = frozenset({
    "layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type", "indexer_types", "layer_rope_theta",
    "activation_sparsity_pattern", "num_attention_heads_per_layer", "num_key_value_heads_per_layer", "num_experts",
    "hybrid_override_pattern", "attention_layers", "attention_window", "moe_layer_freq", "compress_ratios", "moe_topk",
    "attn_layers", "attn_type_list", "block_configs", "num_query_heads", "num_kv_heads", "ffn_multipliers",
    "num_key_value_heads", "num_attention_heads", "intermediate_size", "hybrid_layer_pattern", "rope_theta",
    "sparse_attention_freq", "sliding_windows", "gnn_layers_types",
})  # fmt: skip

# Indices of those layers for which something holds.
INDICES = frozenset({
    "full_attn_idxs", "mlp_only_layers", "attn_layer_indices", "cross_attention_layers", "rope_scaling_layers",
    "moe_layers", "window_block_indexes", "window_block_indices", "global_attn_indexes", "fullatt_block_indexes",
    "local_layer_ids", "ple_layer_ids",
})  # fmt: skip


class Rule(NamedTuple):
    """A fact that follows from position where `key` is absent.

    Attributes:
        key: The list that loaders prefer to the rule, or the rule's own parameter where there is no such list.
        value: Of layer i of n.
        listed: Whether `key` is such a list.
        retune: Other parameters of the rule that give these values, or None.
        unless: A key that overrides the rule.
    """

    key: str
    value: Callable[[Config, int, int], Any]
    listed: bool = True
    retune: Callable[[Config, Values], dict[str, Any] | None] = lambda config, values: None
    unless: str = ""

    def values(self, config: Config, n: int) -> Values:
        return [self.value(config, i, n) for i in range(n)]


# --- attention ------------------------------------------------------------------------------------------------------

_FULL, _SLIDING, _LINEAR = "full_attention", "sliding_attention", "linear_attention"


def _late_sliding(c: Config, i: int, n: int) -> str:
    active = c.get("use_sliding_window", False) and c.get("sliding_window", 4096) is not None
    late = c.get("max_window_layers", 80 if str(c.get("model_type", "")).startswith(("qwen2_vl", "qwen2_5_vl")) else 28)
    return _SLIDING if active and i >= late else _FULL


def _dots(c: Config, i: int, n: int) -> str:
    late = i >= c.get("max_window_layers", 62)
    return _SLIDING if late and c.get("sliding_window", 4096) is not None else _FULL


def _early_sliding(c: Config, i: int, n: int) -> str:
    return _SLIDING if c.get("use_sliding_window") and i % 2 == 0 and i < c.get("max_window_layers", 28) else _FULL


def _every(default: int, *keys: str, other: str = _SLIDING, last: bool = False) -> Callable[[Config, int, int], str]:
    """Full attention in each n-th layer, counted from one; in the last layer too with `last`."""

    def value(c: Config, i: int, n: int) -> str:
        period = next((c[key] for key in keys if isinstance(c.get(key), int)), default)
        return _FULL if (i + 1) % period == 0 or (last and i == n - 1) else other

    return value


def _from_zero(default: int, *keys: str) -> Callable[[Config, int, int], str]:
    def value(c: Config, i: int, n: int) -> str:
        period = next((c[key] for key in keys if isinstance(c.get(key), int)), default)
        return _SLIDING if i % period else _FULL

    return value


def _exaone(c: Config, i: int, n: int) -> str:
    pattern = c.get("sliding_window_pattern", 4)
    if c.get("sliding_window", 4096) is None or not pattern:
        return _FULL
    if isinstance(pattern, str):
        return _FULL if i == n - 1 or pattern[i % len(pattern)] != "L" else _SLIDING
    return _SLIDING if (i + 1) % pattern else _FULL


def _no_rope(c: Config, i: int, n: int) -> int:
    return int((i + 1) % c.get("no_rope_layer_interval", 4) != 0)


def _minimax(c: Config, i: int, n: int) -> str:
    return _LINEAR if i % 2 else _FULL


def _lfm2(c: Config, i: int, n: int) -> str:
    indices = c.get("full_attn_idxs")
    return _FULL if indices is None or i in indices else "conv"


def _smollm(c: Config, i: int, n: int) -> str:
    listed = c.get("no_rope_layers")
    rope = listed[i] if listed else _no_rope(c, i, n)
    return _FULL if rope or not c.get("use_sliding_window") or c.get("sliding_window") is None else _SLIDING


def _llama4(c: Config, i: int, n: int) -> str:
    listed = c.get("no_rope_layers")
    return "chunked_attention" if (listed[i] if listed else _no_rope(c, i, n)) else _FULL


def _griffin(c: Config, i: int, n: int) -> str:
    types = c.get("block_types") or ("recurrent", "recurrent", "attention")
    return str(types[i % len(types)])


def _neo(c: Config, i: int, n: int) -> str:
    types = c.get("attention_types") or [[["global", "local"], 12]]
    expanded = [kind for kinds, times in types for kind in list(kinds) * times]
    return str(expanded[i]) if len(expanded) == n else ""  # the model refuses any other length


def _jamba_attention(c: Config, i: int, n: int) -> bool:
    return bool(i % c.get("attn_layer_period", 8) == c.get("attn_layer_offset", 4))


# --- dense or sparse ------------------------------------------------------------------------------------------------

_DENSE, _SPARSE = "dense", "sparse"


def _after_dense(default: int) -> Callable[[Config, int, int], str]:
    def value(c: Config, i: int, n: int) -> str:
        first, frequency = c.get("first_k_dense_replace", default), c.get("moe_layer_freq", 1)
        every = frequency[i] if isinstance(frequency, list) else i % max(1, frequency or 1) == 0
        return _SPARSE if i >= first and every else _DENSE

    return value


def _few_dense(c: Config, i: int, n: int) -> str:
    return _SPARSE if i >= c.get("num_dense_layers", 1 if c.get("model_type") == "afmoe" else 2) else _DENSE


def _sparse_step(c: Config, i: int, n: int) -> str:
    only = c.get("mlp_only_layers") or ()
    return (
        _SPARSE
        if i not in only and c.get("num_experts", 1) and (i + 1) % c.get("decoder_sparse_step", 1) == 0
        else _DENSE
    )


def _jamba_expert(c: Config, i: int, n: int) -> bool:
    return bool(i % c.get("expert_layer_period", 2) == c.get("expert_layer_offset", 1))


def _ernie(c: Config, i: int, n: int) -> str:
    last = c.get("moe_layer_end_index", -1)
    last = n - 1 if last == -1 else last
    inside = c.get("moe_layer_start_index", 1) <= i <= last
    return _SPARSE if inside and (i + 1) % c.get("moe_layer_interval", 1) == 0 else _DENSE


def _llama4_moe(c: Config, i: int, n: int) -> bool:
    return bool((i + 1) % c.get("interleave_moe_layer_step", 1) == 0)


def _gemma3n_sparsity(c: Config, i: int, n: int) -> float:
    return 0.95 if n > 10 and i < 10 else 0.0


# --- other parameters of the same rule ------------------------------------------------------------------------------


def _leading(key: str) -> Callable[[Config, Values], dict[str, Any] | None]:
    """The dense layers come first, and only they."""

    def retune(c: Config, values: Values) -> dict[str, Any] | None:
        dense = values.index(_SPARSE) if _SPARSE in values else len(values)
        if _DENSE in values[dense:] or c.get("moe_layer_freq", 1) not in (None, 1):
            return None
        return {key: dense}

    return retune


def _only_dense(c: Config, values: Values) -> dict[str, Any] | None:
    return {"decoder_sparse_step": 1, "mlp_only_layers": [i for i, v in enumerate(values) if v == _DENSE]}


def _period(period: str, offset: str) -> Callable[[Config, Values], dict[str, Any] | None]:
    def retune(c: Config, values: Values) -> dict[str, Any] | None:
        for step in range(1, len(values) + 2):
            for at in range(step):
                if values == [i % step == at for i in range(len(values))]:
                    return {period: step, offset: at}
        return None

    return retune


def _block(c: Config, values: Values) -> dict[str, Any] | None:
    sparse = [i for i, v in enumerate(values) if v == _SPARSE]
    if not sparse or sparse != list(range(sparse[0], sparse[-1] + 1)):
        return None
    return {"moe_layer_start_index": sparse[0], "moe_layer_end_index": sparse[-1], "moe_layer_interval": 1}


def _listed_as(key: str) -> Callable[[Config, Values], dict[str, Any] | None]:
    return lambda c, values: {key: values}


def _neo_types(c: Config, values: Values) -> dict[str, Any] | None:
    return {"attention_types": [[values, 1]]}


def _threshold(c: Config, values: Values) -> dict[str, Any] | None:
    first = values.index(_SLIDING) if _SLIDING in values else len(values)
    return None if _FULL in values[first:] else {"max_window_layers": first}


def _moe_indices(c: Config, values: Values) -> dict[str, Any] | None:
    return {"moe_layers": [i for i, sparse in enumerate(values) if sparse]}


# --- which model has which rules ------------------------------------------------------------------------------------


def _types(value: Callable[[Config, int, int], Any]) -> Rule:
    return Rule("layer_types", value)


def _mlp(first: int) -> Rule:
    return Rule("mlp_layer_types", _after_dense(first))


_LATE = Rule("layer_types", _late_sliding, retune=_threshold)
_INTERVAL = _types(_every(4, "full_attention_interval", other=_LINEAR))
_STEP = Rule("decoder_sparse_step", _sparse_step, False, _only_dense)
_FIRST_K = Rule("first_k_dense_replace", _after_dense(0), False, _leading("first_k_dense_replace"), "mlp_layer_types")
_DENSE_COUNT = Rule("num_dense_layers", _few_dense, False, _leading("num_dense_layers"), "mlp_layer_types")
_GEMMA = _every(6, "_sliding_window_pattern", "sliding_window_pattern")
_ATTENTION_PERIOD = Rule(
    "attn_layer_period", _jamba_attention, False, _period("attn_layer_period", "attn_layer_offset")
)
_EXPERT_PERIOD = Rule(
    "expert_layer_period", _jamba_expert, False, _period("expert_layer_period", "expert_layer_offset")
)
_MOE_RANGE = Rule("moe_layer_start_index", _ernie, False, _block)

RULES: Mapping[str, tuple[Rule, ...]] = {
    **dict.fromkeys(
        ("qwen2", "qwen3", "qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text", "qwen2_5_omni_text",
         "qwen2_5_omni_talker", "qwen3_omni_moe_talker_code_predictor", "deepseek_ocr2_encoder"), (_LATE,)),
    "dots1": (Rule("layer_types", _dots, retune=_threshold), _FIRST_K),
    "qwen2_moe": (_types(_early_sliding), _STEP),
    **dict.fromkeys(("qwen3_moe", "qwen3_vl_moe_text", "qwen3_omni_moe_text", "qwen3_omni_moe_talker_text"), (_STEP,)),
    "qwen3_next": (_INTERVAL, _STEP),
    **dict.fromkeys(("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), (_INTERVAL,)),
    **dict.fromkeys(("gemma2", "vaultgemma", "t5_gemma_module", "gpt_oss"), (_types(_every(2)),)),
    **dict.fromkeys(("gemma3_text", "gemma3"), (_types(_GEMMA),)),
    "gemma3n_text": (_types(_every(5)), Rule("activation_sparsity_pattern", _gemma3n_sparsity)),
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), (_types(_every(6, last=True)),)),
    "cohere2": (_types(_every(4, "sliding_window_pattern")),),
    **dict.fromkeys(("olmo3", "olmo_hybrid"), (_types(_every(4)),)),
    "exaone4": (_types(_exaone),),
    "exaone_moe": (_types(_exaone), _mlp(1)),
    **dict.fromkeys(("cwm", "granite_swa", "granitemoe_swa"), (_types(_from_zero(4)),)),
    **dict.fromkeys(("modernbert", "modernbert-decoder"), (_types(_from_zero(3, "global_attn_every_n_layers")),)),
    "afmoe": (_types(_every(4, "global_attn_every_n_layers")), _DENSE_COUNT),
    "smollm3": (Rule("no_rope_layers", _no_rope), _types(_smollm)),
    "llama4_text": (Rule("no_rope_layers", _no_rope), _types(_llama4),
                    Rule("interleave_moe_layer_step", _llama4_moe, False, _moe_indices, "moe_layers")),
    "minimax": (_types(_minimax),),
    "lfm2": (_types(_lfm2),),
    "lfm2_moe": (_DENSE_COUNT,),
    "recurrent_gemma": (Rule("block_types", _griffin, False, _listed_as("block_types")),),
    "gpt_neo": (Rule("attention_types", _neo, False, _neo_types),),
    "jamba": (_ATTENTION_PERIOD, _EXPERT_PERIOD),
    "ernie4_5_moe": (_MOE_RANGE,),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe", "glm4v_moe_text", "mistral4"), (_FIRST_K,)),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa"), (_mlp(3),)),
    **dict.fromkeys(("axk1", "glm4_moe_lite"), (_mlp(1),)),
}  # fmt: skip

# Models whose code has a rule that is not told here: their configs must list these, as what transformers saves does.
NEEDS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("beam", "bailing_hybrid", "deepseek_v4", "diffusion_gemma_text", "dots3_note_text", "embedding_gemma2_text",
         "flint", "glm5_next_text", "inkling_text", "kimi_linear", "kolibri1", "lfm3", "lfm3_vl_vision", "neomme",
         "mimo_v2_flash", "qwen4_exp_text", "ultrabert", "ultravbert", "t5gemma2_text", "t5gemma2_encoder",
         "t5gemma2_decoder", "muse_glimmer_vision", "muse_spark_vision"), ("layer_types",)),
    **dict.fromkeys(("muse_glimmer_text", "muse_spark_text"), ("layer_types", "layer_rope_theta")),
    **dict.fromkeys(("dots3_note_vision_encoder", "step3p5"), ("mlp_layer_types",)),
    "hy_v4": ("indexer_types", "mlp_layer_types"),
    "mllama_text_model": ("cross_attention_layers",),
    "mistral_large4_text": ("no_rope_layers", "mlp_layer_types"),
}  # fmt: skip

# For other models: what a key says wherever it is known. What it cannot say is refused, as no list is known to win.
_BY_KEY: Mapping[str, Rule] = {
    "max_window_layers": Rule("max_window_layers", _late_sliding, False, _threshold, "layer_types"),
    "sliding_window_pattern": Rule("sliding_window_pattern", _GEMMA, False, unless="layer_types"),
    "_sliding_window_pattern": Rule("_sliding_window_pattern", _GEMMA, False, unless="layer_types"),
    "full_attention_interval": Rule("full_attention_interval", _INTERVAL.value, False, unless="layer_types"),
    "global_attn_every_n_layers": Rule(
        "global_attn_every_n_layers", _from_zero(3, "global_attn_every_n_layers"), False, unless="layer_types"
    ),
    "no_rope_layer_interval": Rule("no_rope_layer_interval", _no_rope, False, unless="no_rope_layers"),
    "interleave_moe_layer_step": Rule("interleave_moe_layer_step", _llama4_moe, False, unless="moe_layers"),
    "first_k_dense_replace": _FIRST_K,
    "num_dense_layers": _DENSE_COUNT,
    "decoder_sparse_step": _STEP,
    "attn_layer_period": _ATTENTION_PERIOD,
    "expert_layer_period": _EXPERT_PERIOD,
    "moe_layer_start_index": _MOE_RANGE,
}


def rules_of(config: Config) -> tuple[Rule, ...]:
    """The rules that hold for a model where no list overrides them."""
    rules = RULES.get(str(config.get("model_type", "")))
    if rules is None:
        rules = tuple(rule for key, rule in _BY_KEY.items() if config.get(key) is not None)
    return tuple(rule for rule in rules if not (rule.unless and config.get(rule.unless)))
