"""What is measured on: models made on the spot, always the same."""

import json
from pathlib import Path

import numpy as np

MIB = 1 << 20
HIDDEN = 2048


def layer_shapes(layer: int, hidden: int) -> list[tuple[str, tuple[int, ...]]]:
    """A llama layer: nine tensors, from 4 KiB norms to the MLP matrices."""
    at, inner = f"model.layers.{layer}.", hidden * 2
    return [
        (at + "input_layernorm.weight", (hidden,)),
        (at + "post_attention_layernorm.weight", (hidden,)),
        (at + "self_attn.q_proj.weight", (hidden, hidden)),
        (at + "self_attn.k_proj.weight", (hidden // 4, hidden)),
        (at + "self_attn.v_proj.weight", (hidden // 4, hidden)),
        (at + "self_attn.o_proj.weight", (hidden, hidden)),
        (at + "mlp.gate_proj.weight", (inner, hidden)),
        (at + "mlp.up_proj.weight", (inner, hidden)),
        (at + "mlp.down_proj.weight", (hidden, inner)),
    ]


def llama_config(layers: int, hidden: int = HIDDEN, vocabulary: int = 8192) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden * 2,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": vocabulary,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
        "rms_norm_eps": 1e-6,
    }


def write_llama(directory: Path, layers: int, hidden: int = HIDDEN, vocabulary: int = 8192, seed: int = 1) -> Path:
    """A loadable bf16 llama with small random weights, canonical as the official writer emits it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(llama_config(layers, hidden, vocabulary)))
    shapes = [("model.embed_tokens.weight", (vocabulary, hidden)), ("model.norm.weight", (hidden,))]
    for layer in range(layers):
        shapes += layer_shapes(layer, hidden)
    write_safetensors(directory / "model.safetensors", sorted(shapes), seed)
    return directory


def write_gguf(path: Path, width: int = HIDDEN, layers: int = 8, seed: int = 1) -> Path:
    """A llama of 16 bits that llama.cpp loads: 0.3 GB with these sizes."""
    import gguf

    from tests.gguf_models import vocabulary

    path.parent.mkdir(parents=True, exist_ok=True)
    tokens, types = zip(*vocabulary(), strict=True)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(2 * width)
    writer.add_head_count(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(list(tokens))
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([int(kind) for kind in types])
    random = np.random.default_rng(seed)
    shapes = {"token_embd": (len(tokens), width), "output_norm": (width,)}
    for i in range(layers):
        shapes |= {f"blk.{i}.{name}": (width, width) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        shapes |= {f"blk.{i}.{name}": (2 * width, width) for name in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{i}.ffn_down": (width, 2 * width)}
        shapes |= {f"blk.{i}.{name}": (width,) for name in ("attn_norm", "ffn_norm")}
    for name, shape in shapes.items():
        values = random.standard_normal(shape, np.float32) / 50
        writer.add_tensor(f"{name}.weight", values if len(shape) == 1 else values.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_safetensors(path: Path, shapes: list[tuple[str, tuple[int, ...]]], seed: int) -> None:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes:
        size = 2 * int(np.prod(shape))
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    random = np.random.default_rng(seed)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _ in range(0, offset, 16 * MIB):
            # The upper half of small normal float32 values is bf16 in the range of real weights.
            values = random.standard_normal(8 * MIB, dtype=np.float32) * np.float32(0.02)
            file.write(
                (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()[: offset - file.tell() + 8 + len(header)]
            )
