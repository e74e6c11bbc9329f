"""Architectures that can be shown as GGUF, as data: names of tensors, keys of the header, what config.json must say.

One entry for each class name in `architectures` of config.json. Everything here is what llama.cpp's converter
(convert_hf_to_gguf.py as of 2026-10) writes for it with transformers 5.23, whose config classes bring the defaults.
"""

from collections.abc import Mapping
from enum import Enum, auto
from typing import Any, NamedTuple

from cakefs.formats.gguf import Kind


class Key(NamedTuple):
    """A key of the header: left out where the setting is None, an array where it is a list.

    `{arch}.` comes before a name without a dot in front.
    """

    name: str
    kind: Kind
    setting: str


class Vocabulary(Enum):
    """Where a converter looks for tokens."""

    SENTENCEPIECE = auto()  # tokenizer.model
    BPE = auto()  # tokenizer.json, byte-level
    EITHER = auto()  # tokenizer.model where there is one
    PHI3 = auto()  # BPE where the tokenizer says it is GPT-2's, else SentencePiece


class Experts(NamedTuple):
    """Tensors of single experts, `<layer>.<prefix>.<expert>.<word>.weight`, which become one tensor per word.

    Attributes:
        words: In the order in which the stacked tensors are written -> GGUF name.
    """

    prefix: str
    words: Mapping[str, str]


class Arch(NamedTuple):
    """Attributes:
    name: As llama.cpp calls it.
    model_types: Of config.json.
    defaults: What the config class has where config.json is silent.
    required: Settings -> the value without which llama.cpp would calculate something else.
    needed: Settings that must be numbers, since llama.cpp has defaults of its own for them.
    keys: Of the header, in the order of the converter.
    layer: Names within a layer, behind `model.layers.<n>.` -> behind `blk.<n>.`
    optional: Those of `layer` that need not be there, such as biases.
    head: Whether `lm_head.weight` is taken; else it is left out, being the embedding.
    permuted: Whether the rows of q and k are interleaved, as llama's original weights are.
    shifted_norms: Whether 1 is added to norms.
    free_heads: Whether all heads together may be wider or narrower than the model.
    """

    name: str
    model_types: tuple[str, ...]
    vocabulary: Vocabulary
    defaults: Mapping[str, Any]
    required: Mapping[str, Any]
    keys: tuple[Key, ...]
    layer: Mapping[str, str]
    optional: frozenset[str] = frozenset()
    needed: tuple[str, ...] = ()
    head: bool = True
    permuted: bool = False
    shifted_norms: bool = False
    free_heads: bool = True
    experts: Experts | None = None


_U32, _F32, _STRING = Kind.U32, Kind.F32, Kind.STRING

_ROPE = (
    Key("rope.scaling.type", _STRING, "rope.scaling"),
    Key("rope.scaling.factor", _F32, "rope.factor"),
    Key("rope.scaling.original_context_length", _U32, "rope.original"),
    Key("rope.scaling.yarn_beta_fast", _F32, "rope.beta_fast"),
    Key("rope.scaling.yarn_beta_slow", _F32, "rope.beta_slow"),
    Key("rope.freq_base", _F32, "rope.theta"),
    Key("rope.freq_base_swa", _F32, "rope.theta_sliding"),
)
_RMS = Key("attention.layer_norm_rms_epsilon", _F32, "rms_norm_eps")
_HEADS = (
    Key("attention.head_count", _U32, "num_attention_heads"),
    Key("attention.head_count_kv", _U32, "num_key_value_heads"),
)
_LENGTHS = (Key("attention.key_length", _U32, "head_dim"), Key("attention.value_length", _U32, "head_dim"))
_FILE_TYPE = Key(".general.file_type", _U32, "file_type")
_BLOCKS = Key("block_count", _U32, "num_hidden_layers")
_CONTEXT = Key("context_length", _U32, "max_position_embeddings")
_WIDTH = Key("embedding_length", _U32, "hidden_size")
_INNER = Key("feed_forward_length", _U32, "intermediate_size")
_WINDOW = Key("attention.sliding_window", _U32, "sliding_window")
_RHYTHM = Key("attention.sliding_window_pattern", Kind.BOOL, "sliding_layers")
_SOFTCAP = Key("final_logit_softcapping", _F32, "final_logit_softcapping")
_COMMON = (
    *(_BLOCKS, _CONTEXT, _WIDTH, _INNER, *_HEADS, *_ROPE, _RMS),
    Key("expert_count", _U32, "experts"),
    Key("expert_used_count", _U32, "num_experts_per_tok"),
    *_LENGTHS,
    _FILE_TYPE,
)
_LLAMA = (*_COMMON, Key("vocab_size", _U32, "vocab_size"), Key("rope.dimension_count", _U32, "rope.dims"))
_MOE = (
    *_COMMON,
    Key("expert_feed_forward_length", _U32, "moe_intermediate_size"),
    Key("expert_shared_feed_forward_length", _U32, "shared_expert_intermediate_size"),
)
_GEMMA2 = (
    *(_CONTEXT, _WIDTH, _BLOCKS, _INNER, *_HEADS, _RMS, *_LENGTHS, _FILE_TYPE),
    Key("attn_logit_softcapping", _F32, "attn_logit_softcapping"),
    *(_SOFTCAP, _WINDOW, _RHYTHM),
)
_PHI3 = (
    Key("rope.scaling.attn_factor", _F32, "rope.attn_factor"),
    _CONTEXT,
    Key("rope.scaling.original_context_length", _U32, "rope.original"),
    *(_WIDTH, _INNER, _BLOCKS, *_HEADS, _RMS),
    Key("rope.dimension_count", _U32, "rope.dims"),
    Key("rope.freq_base", _F32, "rope.theta"),
    _FILE_TYPE,
    _WINDOW,
)

_ATTENTION = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
}
_BIASES = {
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
}
_OUT_BIAS = {"self_attn.o_proj.bias": "attn_output.bias"}
_HEAD_NORMS = {"self_attn.q_norm.weight": "attn_q_norm.weight", "self_attn.k_norm.weight": "attn_k_norm.weight"}
_NORM = {"post_attention_layernorm.weight": "ffn_norm.weight"}
_MLP = {
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
_MLP_BIASES = {
    "mlp.gate_proj.bias": "ffn_gate.bias",
    "mlp.up_proj.bias": "ffn_up.bias",
    "mlp.down_proj.bias": "ffn_down.bias",
}
_ROUTER = {"mlp.gate.weight": "ffn_gate_inp.weight"}
_SHARED = {
    "mlp.shared_expert_gate.weight": "ffn_gate_inp_shexp.weight",
    "mlp.shared_expert.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_expert.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_expert.down_proj.weight": "ffn_down_shexp.weight",
}
_GEMMA_LAYER = {
    **_ATTENTION,
    **_MLP,
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
}
_QWEN_EXPERTS = Experts(
    "mlp.experts",
    {
        "down_proj": "ffn_down_exps.weight",
        "gate_proj": "ffn_gate_exps.weight",
        "up_proj": "ffn_up_exps.weight",
    },
)
_MIXTRAL_EXPERTS = Experts(
    "block_sparse_moe.experts",
    {"w1": "ffn_gate_exps.weight", "w2": "ffn_down_exps.weight", "w3": "ffn_up_exps.weight"},
)

_SILU = {"hidden_act": "silu"}
_GELU = {"hidden_activation": "gelu_pytorch_tanh", "use_bidirectional_attention": False}
_PLAIN: Mapping[str, Any] = {
    "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "rms_norm_eps": 1e-6, "head_dim": None,
    "head_dim_follows": False, "hidden_act": "silu", "tie_word_embeddings": False, "rope_theta": 10000.0,
}  # fmt: skip
_LLAMA_DEFAULTS = {
    **_PLAIN, "vocab_size": 32000, "intermediate_size": 11008, "num_key_value_heads": None,
    "max_position_embeddings": 2048, "head_dim_follows": True,
}  # fmt: skip
_MISTRAL_DEFAULTS = {
    **_PLAIN, "vocab_size": 32000, "intermediate_size": 14336, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "head_dim_follows": True, "sliding_window": 4096,
}  # fmt: skip
_MIXTRAL_DEFAULTS = {
    **_MISTRAL_DEFAULTS, "head_dim_follows": False, "rms_norm_eps": 1e-5, "num_experts_per_tok": 2,
    "num_local_experts": 8, "rope_theta": 1000000.0, "sliding_window": None,
}  # fmt: skip
_QWEN_DEFAULTS = {
    **_PLAIN, "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
    "max_position_embeddings": 32768, "use_sliding_window": False,
}  # fmt: skip
_QWEN2MOE_DEFAULTS = {
    **_QWEN_DEFAULTS, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24,
    "num_attention_heads": 16, "num_key_value_heads": 16, "decoder_sparse_step": 1, "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632, "num_experts_per_tok": 4, "num_experts": 60, "norm_topk_prob": False,
}  # fmt: skip
_QWEN3MOE_DEFAULTS = {
    **_QWEN_DEFAULTS, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24,
    "num_key_value_heads": 4, "decoder_sparse_step": 1, "moe_intermediate_size": 768, "num_experts_per_tok": 8,
    "num_experts": 128, "norm_topk_prob": False,
}  # fmt: skip
_GEMMA_DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True, "query_pre_attn_scalar": 256, "sliding_window": 4096, "rope_theta": 10000.0,
    "use_bidirectional_attention": False,
}  # fmt: skip
_GEMMA2_DEFAULTS = {
    **_GEMMA_DEFAULTS, "vocab_size": 256000, "max_position_embeddings": 8192, "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
}  # fmt: skip
_GEMMA3_DEFAULTS = {**_GEMMA_DEFAULTS, "vocab_size": 262208, "max_position_embeddings": 131072}
_PHI3_DEFAULTS = {
    **_PLAIN, "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "num_key_value_heads": None,
    "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    "sliding_window": None,
}  # fmt: skip

_BASE = Arch(
    "llama",
    ("llama",),
    Vocabulary.EITHER,
    _LLAMA_DEFAULTS,
    _SILU,
    _LLAMA,
    {**_ATTENTION, **_BIASES, **_OUT_BIAS, **_NORM, **_MLP, **_MLP_BIASES},
    optional=frozenset([*_BIASES, *_OUT_BIAS, *_MLP_BIASES]),
    permuted=True,
)
_QWEN2 = _BASE._replace(
    name="qwen2",
    model_types=("qwen2",),
    defaults=_QWEN_DEFAULTS,
    required={**_SILU, "use_sliding_window": False},
    keys=_COMMON,
    layer={**_ATTENTION, **_BIASES, **_NORM, **_MLP},
    optional=frozenset(_BIASES),
    permuted=False,
    free_heads=False,
)
_QWEN_MOE = _QWEN2._replace(
    vocabulary=Vocabulary.BPE,
    required={**_QWEN2.required, "decoder_sparse_step": 1},
    keys=_MOE,
    experts=_QWEN_EXPERTS,
)
_GEMMA2_ARCH = Arch(
    "gemma2",
    ("gemma2",),
    Vocabulary.SENTENCEPIECE,
    _GEMMA2_DEFAULTS,
    {**_GELU, "rope.theta": 10000.0, "rope.scaling": None, "tie_word_embeddings": True},
    _GEMMA2,
    _GEMMA_LAYER,
    needed=("sliding_window", "final_logit_softcapping", "attn_logit_softcapping"),
    head=False,
    shifted_norms=True,
)

ARCHS: Mapping[str, Arch] = {
    "LlamaForCausalLM": _BASE,
    "MistralForCausalLM": _BASE._replace(model_types=("mistral",), defaults=_MISTRAL_DEFAULTS),
    "MixtralForCausalLM": _BASE._replace(
        model_types=("mixtral",),
        defaults=_MIXTRAL_DEFAULTS,
        layer={**_ATTENTION, **_NORM, "block_sparse_moe.gate.weight": "ffn_gate_inp.weight"},
        experts=_MIXTRAL_EXPERTS,
    ),
    "Qwen2ForCausalLM": _QWEN2,
    "Qwen3ForCausalLM": _QWEN2._replace(
        name="qwen3",
        model_types=("qwen3",),
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
        layer={**_QWEN2.layer, **_HEAD_NORMS},
        free_heads=True,
    ),
    "Qwen2MoeForCausalLM": _QWEN_MOE._replace(
        name="qwen2moe",
        model_types=("qwen2_moe",),
        defaults=_QWEN2MOE_DEFAULTS,
        required={**_QWEN_MOE.required, "norm_topk_prob": False, "tie_word_embeddings": False},
        layer={**_ATTENTION, **_BIASES, **_NORM, **_ROUTER, **_SHARED},
    ),
    "Qwen3MoeForCausalLM": _QWEN_MOE._replace(
        name="qwen3moe",
        model_types=("qwen3_moe",),
        defaults=_QWEN3MOE_DEFAULTS,
        required={**_QWEN_MOE.required, "norm_topk_prob": True},
        layer={**_ATTENTION, **_BIASES, **_HEAD_NORMS, **_NORM, **_ROUTER},
        free_heads=True,
    ),
    "Gemma2ForCausalLM": _GEMMA2_ARCH,
    "Gemma3ForCausalLM": _GEMMA2_ARCH._replace(
        name="gemma3",
        model_types=("gemma3_text",),
        defaults=_GEMMA3_DEFAULTS,
        required={**_GELU, "attn_logit_softcapping": None},
        keys=(*_COMMON, _SOFTCAP, _WINDOW, _RHYTHM),
        layer={**_GEMMA_LAYER, **_HEAD_NORMS},
        needed=("sliding_window",),
        head=True,
    ),
    "Phi3ForCausalLM": Arch(
        "phi3",
        ("phi3",),
        Vocabulary.PHI3,
        _PHI3_DEFAULTS,
        _SILU,
        _PHI3,
        {
            "input_layernorm.weight": "attn_norm.weight",
            "self_attn.qkv_proj.weight": "attn_qkv.weight",
            "self_attn.o_proj.weight": "attn_output.weight",
            **_NORM,
            "mlp.gate_up_proj.weight": "ffn_up.weight",
            "mlp.down_proj.weight": "ffn_down.weight",
        },
        free_heads=False,
    ),
}
