"""Small models made on the spot: tensors with known bytes, single or sharded, as the official writer emits them."""

import json
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

Tensors = Mapping[str, NDArray[np.generic]]


def tensor(seed: int, *shape: int) -> NDArray[np.float32]:
    """Random values that depend on the seed alone."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def llama(layers: int = 2, *, seed: int = 0, width: int = 96) -> dict[str, NDArray[np.float32]]:
    """Named as a llama is; a layer's bytes depend on (seed, layer), so that equal seeds share layers."""
    named = {"model.embed_tokens.weight": tensor(seed, 64, width), "model.norm.weight": tensor(seed + 1, width)}
    for i in range(layers):
        at = f"model.layers.{i}."
        named[at + "input_layernorm.weight"] = tensor(seed * 1000 + i * 10, width)
        named[at + "self_attn.q_proj.weight"] = tensor(seed * 1000 + i * 10 + 1, width, width)
        named[at + "mlp.down_proj.weight"] = tensor(seed * 1000 + i * 10 + 2, width, 4 * width)
    return named


def single(tensors: Tensors) -> bytes:
    """model.safetensors, canonical."""
    return save(dict(tensors), metadata={"format": "pt"})


def sharded(tensors: Tensors, shards: int) -> dict[str, bytes]:
    """Shards with their index, names dealt in turn so that a layer is spread over several."""
    parts: list[dict[str, NDArray[np.generic]]] = [{} for _ in range(shards)]
    weight_map = {}
    for position, name in enumerate(sorted(tensors)):
        parts[position % shards][name] = tensors[name]
        weight_map[name] = f"model-{position % shards + 1:05}-of-{shards:05}.safetensors"
    files = {f"model-{i + 1:05}-of-{shards:05}.safetensors": single(part) for i, part in enumerate(parts)}
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return files | {"model.safetensors.index.json": json.dumps(index).encode()}


CONFIG = json.dumps({"model_type": "llama", "num_hidden_layers": 2}).encode()
