"""Tiny llama models as GGUF files, written by the gguf package: what llama.cpp loads, and what quantizers vary.

The quantized ones are the mixes Q4_K_S and Q4_K_M: bytes by llama.cpp's own quantizer, which the wheel of xllamacpp
exports, types as llama-quantize chooses them for a llama of so few layers.
"""

import ctypes
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import TokenType

WIDTH, HEADS, KV_HEADS, FEED, LAYERS = 256, 4, 2, 512, 8
Choose = Callable[[str], Type]


def shapes() -> dict[str, tuple[int, ...]]:
    """By name; rows first, as numpy has it."""
    found = {"token_embd.weight": (len(vocabulary()), WIDTH), "output_norm.weight": (WIDTH,)}
    found["output.weight"] = found["token_embd.weight"]
    narrow = WIDTH // HEADS * KV_HEADS
    for i in range(LAYERS):
        at = f"blk.{i}."
        for norm in ("attn_norm", "ffn_norm"):
            found[f"{at}{norm}.weight"] = (WIDTH,)
        for name, rows in (("attn_q", WIDTH), ("attn_k", narrow), ("attn_v", narrow), ("attn_output", WIDTH)):
            found[f"{at}{name}.weight"] = (rows, WIDTH)
        found |= {f"{at}ffn_gate.weight": (FEED, WIDTH), f"{at}ffn_up.weight": (FEED, WIDTH)}
        found[f"{at}ffn_down.weight"] = (WIDTH, FEED)
    return found


def weights(seed: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return {
        name: np.ones(shape, "<f4") if len(shape) == 1 else random.standard_normal(shape, "<f4") / 4
        for name, shape in shapes().items()
    }


def vocabulary() -> list[tuple[bytes, TokenType]]:
    special = [(b"<unk>", TokenType.UNKNOWN), (b"<s>", TokenType.CONTROL), (b"</s>", TokenType.CONTROL)]
    return [
        *special,
        *((f"<0x{byte:02X}>".encode(), TokenType.BYTE) for byte in range(256)),
        *((letter.encode(), TokenType.NORMAL) for letter in "\u2581abcdefghijklmnopqrstuvwxyz"),
    ]


def plain(name: str) -> Type:
    return Type.F32


def small(name: str) -> Type:
    """Q4_K_S: five bits for the values of the first four layers, and for the first eighth of what leaves a layer."""
    layer = _layer(name)
    finer = ("attn_v" in name and layer < 4) or ("ffn_down" in name and layer < LAYERS // 8)
    return Type.Q5_K if finer else _four_bits(name)


def medium(name: str) -> Type:
    """Q4_K_M: six bits for these in the first and last eighth, and in every third layer between."""
    layer = _layer(name)
    finer = layer < LAYERS // 8 or layer >= 7 * LAYERS // 8 or (layer - LAYERS // 8) % 3 == 2
    return Type.Q6_K if finer and ("attn_v" in name or "ffn_down" in name) else _four_bits(name)


def _four_bits(name: str) -> Type:
    return Type.Q6_K if name == "output.weight" else Type.F32 if "norm" in name else Type.Q4_K


def _layer(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith("blk.") else LAYERS


@functools.cache
def _quantizer() -> Any:
    """`ggml_quantize_chunk` of ggml.h."""
    import xllamacpp

    library = ctypes.CDLL(str(Path(xllamacpp.__file__).with_name("xllamacpp.abi3.so")))
    function = library.ggml_quantize_chunk
    sizes = [ctypes.c_int64] * 3
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *sizes, ctypes.c_void_p]
    function.restype = ctypes.c_size_t
    return function


def quantize(data: Any, kind: Type) -> Any:
    """Rows of bytes, as the gguf package's own function has them, which knows no K types."""
    if kind is Type.F32:
        return data
    block, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.ascontiguousarray(data, "<f4")
    out = np.empty((data.shape[0], data.shape[1] // block * size), np.uint8)
    assert _quantizer()(kind, data.ctypes.data, out.ctypes.data, 0, *data.shape, None) == out.size
    return out


def write(path: Path, choose: Choose = plain, *, tensors: Mapping[str, Any] | None = None, **split: int) -> Path:
    """A file that llama.cpp loads; `split` as `gguf.GGUFWriter` takes it."""
    writer = gguf.GGUFWriter(path, "llama", **split)
    tokens, types = zip(*vocabulary(), strict=True)
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(list(tokens))
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    writer.add_token_types([int(kind) for kind in types])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, data in (weights() if tensors is None else tensors).items():
        kind = choose(name)
        writer.add_tensor(name, quantize(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
