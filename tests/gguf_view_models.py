"""Tiny models with tokenizers, one for each architecture and rule of the GGUF view: bytes that depend on nothing else.

`tests/gguf_view_record.py` converts the very same files with llama.cpp's converter; the digests that it recorded are
what the view is held against.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tests import official
from tests.gguf_tokenizers import (
    BPE_SIZE,
    BYTES,
    BYTES_BY_RULE,
    DIGITS,
    GEMMA_SETTINGS,
    GPT4O,
    LLAMA3,
    LLAMA_ADDED,
    LLAMA_SETTINGS,
    QWEN2,
    QWEN_SETTINGS,
    SPM_SETTINGS,
    SPM_SIZE,
    TEKKEN,
    bpe,
    rule,
    sentencepiece,
    sentencepiece_json,
    split,
    template,
)

Array = NDArray[np.float32]
Config = dict[str, Any]
Files = dict[str, bytes]

# --- weights --------------------------------------------------------------------------------------------------------

SIZES: Config = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
}  # fmt: skip


def weights(config: Config, seed: int = 5) -> dict[str, Array]:
    """Every tensor that transformers would save for the config."""
    rng = np.random.default_rng(seed)
    width, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim") or width // heads
    q, kv = heads * head, config["num_key_value_heads"] * head

    def values(*shape: int) -> Array:
        return (rng.integers(-4096, 4096, shape) / 16384).astype(np.float32)

    kind = config["model_type"]
    found = {"model.embed_tokens.weight": values(config["vocab_size"], width), "model.norm.weight": values(width)}
    if not config.get("tie_word_embeddings", kind.startswith("gemma")):
        found["lm_head.weight"] = values(config["vocab_size"], width)
    norms = ["input_layernorm", "post_attention_layernorm"]
    norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if kind.startswith("gemma") else []
    for i in range(config["num_hidden_layers"]):
        layer = {f"{norm}.weight": values(width) for norm in norms}
        layer["self_attn.o_proj.weight"] = values(width, q)
        if kind == "phi3":
            layer["self_attn.qkv_proj.weight"] = values(q + 2 * kv, width)
            layer["mlp.gate_up_proj.weight"] = values(2 * inner, width)
            layer["mlp.down_proj.weight"] = values(width, inner)
        else:
            for name, rows in (("q", q), ("k", kv), ("v", kv)):
                layer[f"self_attn.{name}_proj.weight"] = values(rows, width)
                if kind.startswith("qwen2") or config.get("attention_bias"):
                    layer[f"self_attn.{name}_proj.bias"] = values(rows)
            layer |= _mlp(config, values)
        if kind.startswith(("qwen3", "gemma3")):
            layer |= {f"self_attn.{name}_norm.weight": values(head) for name in "qk"}
        found |= {f"model.layers.{i}.{name}": array for name, array in layer.items()}
    return found


def _mlp(config: Config, values: Callable[..., Array]) -> dict[str, Array]:
    width, kind = config["hidden_size"], config["model_type"]
    if kind == "mixtral":
        found = {"block_sparse_moe.gate.weight": values(config["num_local_experts"], width)}
        for e in range(config["num_local_experts"]):
            found |= _gated(f"block_sparse_moe.experts.{e}.", ("w1", "w3", "w2"), width, config, values)
        return found
    names = ("gate_proj", "up_proj", "down_proj")
    if not kind.endswith("_moe"):
        return _gated("mlp.", names, width, config, values)
    found = {"mlp.gate.weight": values(config["num_experts"], width)}
    for e in range(config["num_experts"]):
        sizes = config | {"intermediate_size": config["moe_intermediate_size"]}
        found |= _gated(f"mlp.experts.{e}.", names, width, sizes, values)
    if kind == "qwen2_moe":
        sizes = config | {"intermediate_size": config["shared_expert_intermediate_size"]}
        found |= _gated("mlp.shared_expert.", names, width, sizes, values)
        found["mlp.shared_expert_gate.weight"] = values(1, width)
    return found


def _gated(
    prefix: str, names: tuple[str, str, str], width: int, config: Config, values: Callable[..., Array]
) -> dict[str, Array]:
    inner = config["intermediate_size"]
    shapes = ((inner, width), (inner, width), (width, inner))
    return {f"{prefix}{name}.weight": values(*shape) for name, shape in zip(names, shapes, strict=True)}


def packed(array: Array, dtype: str) -> bytes:
    if dtype == "BF16":
        return (array.view(np.uint32) >> np.uint32(16)).astype("<u2").tobytes()
    return array.astype({"F32": "<f4", "F16": "<f2", "F64": "<f8"}[dtype]).tobytes()


def safetensors(tensors: Mapping[str, Array], dtype: Callable[[str], str]) -> bytes:
    made = {name: official.Tensor(dtype(name), a.shape, packed(a, dtype(name))) for name, a in tensors.items()}
    return official.write(made, {"format": "pt"})


# --- models ---------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """Attributes:
    files: Of the directory.
    pre: Name of the pre-tokenizer: the converter knows it by a hash over the vocabulary, which it cannot know here.
    """

    files: Files
    pre: str


CLASSES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM", "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}  # fmt: skip
_MOE = {"moe_intermediate_size": 16, "num_experts_per_tok": 2, "num_experts": 3}
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64}
OWN: dict[str, Config] = {
    "llama": {}, "mistral": {"head_dim": 16}, "mixtral": {"num_local_experts": 3, "rope_theta": 1000000.0},
    "qwen2": {"tie_word_embeddings": True}, "qwen3": {"head_dim": 16},
    "qwen2_moe": _MOE | {"shared_expert_intermediate_size": 48},
    "qwen3_moe": _MOE | {"head_dim": 16, "norm_topk_prob": True}, "gemma2": _GEMMA, "gemma3_text": _GEMMA,
    "phi3": {"original_max_position_embeddings": 512, "pad_token_id": 0},
}  # fmt: skip


def make(
    kind: str,
    dtype: str | Callable[[str], str] = "F32",
    *,
    config: Config | None = None,
    files: Mapping[str, bytes] | None = None,
    tokenizer: bytes | None = None,
    settings: Config | None = None,
    drop: tuple[str, ...] = (),
    rows: int = 0,
) -> Files:
    """A directory.

    Args:
        config: On top of the usual; `drop` takes keys away.
        tokenizer: tokenizer.json in the place of the usual tokenizer.
        settings: On top of the usual tokenizer_config.json, or of nothing with `tokenizer`.
        rows: Of the embedding beyond the vocabulary.
    """
    family = "qwen" if kind.startswith("qwen") else "gemma" if kind.startswith("gemma") else "spm"
    usual: dict[str, tuple[str, bytes, Config, int]] = {
        "qwen": ("tokenizer.json", bpe(rule(split(QWEN2), BYTES), nfc=True), QWEN_SETTINGS, BPE_SIZE + 4),
        "gemma": ("tokenizer.model", sentencepiece(gemma=True), GEMMA_SETTINGS, SPM_SIZE),
        "spm": ("tokenizer.model", sentencepiece(control=("<|endoftext|>",)), SPM_SETTINGS, SPM_SIZE),
    }
    path, data, beside, size = usual[family]
    if tokenizer is not None:
        path, data, beside, size = "tokenizer.json", tokenizer, {}, BPE_SIZE + 4
    stated = {
        "architectures": [CLASSES[kind]], "model_type": kind, "vocab_size": size, **SIZES, **OWN[kind],
        **(config or {}),
    }  # fmt: skip
    whole = {key: value for key, value in stated.items() if key not in drop}
    arrays = weights({"num_key_value_heads": whole["num_attention_heads"], **whole})
    if rows:
        arrays["model.embed_tokens.weight"] = np.vstack(
            [arrays["model.embed_tokens.weight"], np.ones((rows, whole["hidden_size"]), np.float32)]
        )
    chosen = dtype if callable(dtype) else lambda name: str(dtype)
    return {
        "config.json": json.dumps(whole).encode(),
        "model.safetensors": safetensors(arrays, chosen),
        path: data,
        "tokenizer_config.json": json.dumps(beside | (settings or {})).encode(),
        **(files or {}),
    }


CARD = b"""---
license: [mit, apache-2.0]
license_name: my-licence
license_link: https://example.org/l
language:
- en
- no
tags:
- chat
- merge
pipeline_tag: text-generation
base_model:
- Qwen/Qwen2.5-7B-Instruct
- https://huggingface.co/meta-llama/Llama-3.1-8B
- https://example.org/x/y
- plain name
datasets: HuggingFaceH4/ultrachat_200k
---
# Title
"""
CARD_2 = b"""---
license: apache-2.0
base_model: org/Some-Base-v0.1
model_creator: Somebody
model_name: My Model 7B
model_type: llama
---
"""
GENERATION = json.dumps({"temperature": 0.6, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1}).encode()
_LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}  # fmt: skip


def llama3(dtype: str = "F32", post: Config | None = None, settings: Config | None = None, **config: Any) -> Files:
    both = {"type": "Sequence", "processors": [dict(BYTES, trim_offsets=False), template("<|begin_of_text|>")]}
    made = bpe(rule(split(LLAMA3), BYTES), LLAMA_ADDED, whole=True, post=post or both)
    return make("llama", dtype, tokenizer=made, settings=LLAMA_SETTINGS | (settings or {}), config=config)


def _cases() -> dict[str, Case]:
    """By name of the directory, which the header tells too."""
    cases: dict[str, Case] = {}
    for kind in CLASSES:
        pre = "qwen2" if kind.startswith("qwen") else ""
        for dtype in ("F32", "BF16"):
            cases[f"{kind}-{dtype.lower()}"] = Case(make(kind, dtype), pre)
    llama = "llama-bpe"
    tekken = bpe(rule(split(TEKKEN), BYTES), ("<unk>", "<s>", "</s>", "<a>"), whole=True, post=template("<s>"))
    phi4 = bpe(rule(split(LLAMA3) | {"behavior": "Removed", "invert": True}, BYTES), pairs=True)
    gpt2 = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    odd = [{"name": "default", "template": "{{ d }}"}, {"name": "tool use!", "template": "{{ t }}"}]
    long = {"type": "longrope", "long_factor": [1.5, 2.0, 3.0, 4.0], "short_factor": [1.0, 1.1, 1.2, 1.3]}
    bos = {
        "__type": "AddedToken",
        "content": "<|begin_of_text|>",
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
    }
    cases |= {
        "Llama-3.1-35K-Instruct": Case(llama3(rope_theta=500000.0, rope_scaling=_LLAMA3_ROPE), llama),
        "llama-f16": Case(make("llama", "F16", config={"attention_bias": True}), ""),
        "Llama-2-7b-chat-hf": Case(
            make(
                "llama",
                config={"rope_theta": 10000.0, "_name_or_path": "meta-llama/Llama-2-7b-chat-hf"},
                drop=("num_key_value_heads", "rms_norm_eps", "max_position_embeddings"),
                files={"README.md": CARD, "generation_config.json": GENERATION},
            ),
            "",
        ),
        "Mistral-7B-Instruct-v0.3": Case(make("mistral", "BF16", files={"README.md": CARD_2}), ""),
        "Mixtral-3x20K-v0.1": Case(make("mixtral", "BF16"), ""),
        "linear": Case(llama3("BF16", rope_theta=500000, rope_scaling={"type": "linear", "factor": 4.0}), llama),
        "yarn": Case(
            make(
                "qwen3",
                config={"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 33, "beta_slow": 2}},
            ),
            "qwen2",
        ),
        "gemma-3-scaled": Case(
            make(
                "gemma3_text",
                config={"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 10000.0},
                files={"chat_template.jinja": b"{{ hi }}\r\n{{x}}"},
            ),
            "",
        ),
        "gemma-3-padded": Case(make("gemma3_text", "BF16", rows=4), ""),
        "phi3-long": Case(make("phi3", config={"rope_scaling": long, "max_position_embeddings": 4096}), ""),
        "phi3-part": Case(make("phi3", config={"partial_rotary_factor": 0.75, "sliding_window": 600}), ""),
        "phi-4": Case(make("phi3", tokenizer=phi4, settings=gpt2 | {"pad_token": "<|endoftext|>"}), "dbrx"),
        "nemo": Case(
            make(
                "mistral",
                tokenizer=tekken,
                settings=LLAMA_SETTINGS | {"bos_token": "<s>", "eos_token": "</s>", "add_prefix_space": False},
            ),
            "tekken",
        ),
        "smol": Case(
            make(
                "llama",
                tokenizer=bpe(rule(DIGITS, BYTES_BY_RULE)),
                settings=gpt2 | {"eos_token": bos | {"content": "<|im_end|>"}},
            ),
            "smollm",
        ),
        "gpt-2-cut": Case(make("llama", tokenizer=bpe(BYTES_BY_RULE), settings=gpt2), "gpt-2"),
        "gpt-4o-cut": Case(make("llama", tokenizer=bpe(rule(split(GPT4O), BYTES)), settings=gpt2), "gpt-4o"),
        "templates": Case(make("qwen2", settings={"chat_template": odd}), "qwen2"),
        "named": Case(make("qwen2", settings={"cls_token": "<tool_call>"}), "qwen2"),
        "named-elsewhere": Case(
            make(
                "llama",
                tokenizer=bpe(rule(DIGITS, BYTES_BY_RULE)),
                settings=gpt2,
                files={"special_tokens_map.json": b'{"pad_token": {"content": "<tool_call>"}}'},
            ),
            "smollm",
        ),
        "template-file": Case(
            make(
                "qwen2",
                settings={"chat_template": None},
                files={"chat_template.json": b'{"chat_template": "{{ j }}"}'},
            ),
            "qwen2",
        ),
        "turns": Case(llama3(post=template("<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>")), llama),
        "told-by-parts": Case(
            llama3(post=template("<|begin_of_text|>", "<|end_of_text|>"), settings={"bos_token": bos}), llama
        ),
        "added": Case(
            make(
                "mistral",
                files={"added_tokens.json": b'{"<a>": 297, "[B]": 298, "<|c|>": 299}'},
                settings={"pad_token": "</s>"},
            ),
            "",
        ),
        "CodeLlama-7b": Case(make("llama", "BF16", config={"vocab_size": 32016, "hidden_size": 8}), ""),
        "SmolLM2-1M": Case(llama3("BF16", vocab_size=49152, hidden_size=8), llama),
    }  # fmt: skip
    return cases


CASES = _cases()


def saved_again(kind: str) -> Files:
    """A model whose tokenizer transformers 5 has read and written: `tokenizer.json` takes the place of the model."""
    gemma = kind.startswith("gemma")
    made = sentencepiece_json(gemma=True) if gemma else sentencepiece_json(control=("<|endoftext|>",))
    decoder = {str(token["id"]): token for token in json.loads(made)["added_tokens"]}
    files = make(kind, files={"tokenizer.json": made}, settings={"added_tokens_decoder": decoder})
    return {path: data for path, data in files.items() if path != "tokenizer.model"}


def outtype(files: Files) -> str:
    """What the converter is told to keep the weights as they are."""
    found = official.read(files["model.safetensors"]) or {}
    wide = {t.dtype for name, t in sorted(found.items()) if len(t.shape) > 1}
    return "bf16" if "BF16" in wide else "f16" if "F16" in wide else "f32"
