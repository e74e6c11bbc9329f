"""Models in memory, with or without bytes: manifests as `add` makes them, and the bytes of any file of a view."""

import hashlib
import json
import struct
from collections.abc import Mapping
from typing import Any

from cakefs.formats.safetensors import TensorSpec as Spec
from cakefs.formats.safetensors import build_header, canonical_key, parse_header, tensor_size
from cakefs.model import Computed, Digest, Extent, Listing, Literal, Manifest, Published, Segment, View
from cakefs.plan.compose import build_manifest
from cakefs.plan.compute import evaluate, needs

Shapes = Mapping[str, tuple[str, tuple[int, ...]]]


class Shelf:
    """Keeps the published files and the literals; `read` puts a file of a manifest together."""

    def __init__(self) -> None:
        self.literals: dict[Digest, bytes] = {}
        self._files: dict[str, bytes] = {}

    def put(self, data: bytes) -> Digest:
        digest = f"xxh3:{hashlib.sha256(data).hexdigest()[:32]}"
        self.literals[digest] = data
        return digest

    def model(
        self, name: str, tensors: Shapes, config: Mapping[str, Any] | None, *, files: Mapping[str, bytes] = {}
    ) -> Manifest:
        """A model whose tensors hold pseudo-random bytes, each depending on (name, tensor)."""
        specs = sorted((Spec(n, *dtype_shape) for n, dtype_shape in tensors.items()), key=canonical_key)
        header = build_header(specs, {"format": "pt"}, name)
        data = b"".join(_fill(name, s) for s in specs)
        everything = {**files, "model.safetensors": header + data}
        if config is not None:
            everything["config.json"] = json.dumps(config).encode()
        return self.published(name, everything)

    def published(self, name: str, files: Mapping[str, bytes]) -> Manifest:
        listed, headers = [], {}
        for path, data in files.items():
            identity = f"sha256:{hashlib.sha256(data).hexdigest()}"
            self._files[identity] = data
            listed.append(Published(path, len(data), identity, f"http://x/{name}/{path}"))
            if path.endswith(".safetensors"):
                headers[path] = parse_header(data, len(data), path)
        listing = Listing(f"http://x/{name}", "c0ffee", "main", tuple(listed))
        return build_manifest(name, listing, headers, {}, 1, self.put)

    def hollow(self, name: str, tensors: Shapes, config: Mapping[str, Any]) -> Manifest:
        """A model of any size, of which only the header and the config exist."""
        specs = sorted((Spec(n, *dtype_shape) for n, dtype_shape in tensors.items()), key=canonical_key)
        header = build_header(specs, {"format": "pt"}, name)
        size = len(header) + sum(tensor_size(s.dtype, s.shape) for s in specs)
        body = json.dumps(config).encode()
        self._files[f"git:{name}"] = body
        weights = Published("model.safetensors", size, f"sha256:{name}", f"http://x/{name}/model.safetensors")
        listing = Listing(
            f"http://x/{name}", "", "", (weights, Published("config.json", len(body), f"git:{name}", "http://x"))
        )
        parsed = parse_header(header, size, "model.safetensors")
        return build_manifest(name, listing, {"model.safetensors": parsed}, {}, 1, self.put)

    def read(self, manifest: Manifest, path: str) -> bytes:
        return b"".join(self.segment(manifest, s) for s in manifest.shown(View.MODEL)[path].segments)

    def segment(self, manifest: Manifest, segment: Segment) -> bytes:
        if isinstance(segment, Literal):
            return self.literals[segment.blob]
        if isinstance(segment, Computed):
            wanted = needs(segment, 0, segment.size)
            return evaluate(segment, 0, segment.size, [self._span(manifest, *need) for need in wanted])
        return self._span(manifest, segment, segment.start, segment.stop)

    def _span(self, manifest: Manifest, extent: Extent, start: int, stop: int) -> bytes:
        span = manifest.spans[extent.span]
        return self._files[manifest.sources[span.source].identity][span.start + start : span.start + stop]

    def config(self, manifest: Manifest) -> dict[str, Any]:
        config: dict[str, Any] = json.loads(self.read(manifest, "config.json"))
        return config

    def tensors(self, manifest: Manifest) -> dict[str, bytes]:
        """Name -> bytes, as any reader of the served file would see them."""
        data = self.read(manifest, "model.safetensors")
        header = parse_header(data, len(data), "model.safetensors")
        return {e.name: data[header.size + e.start : header.size + e.stop] for e in header.entries}


def _fill(model: str, spec: Spec) -> bytes:
    """Finite values: BF16 and F32 numbers between -1 and 1 whose bits look random."""
    size = tensor_size(spec.dtype, spec.shape)
    noise = hashlib.shake_256(f"{model}/{spec.name}".encode()).digest(size)
    if spec.dtype == "F32":
        return b"".join(struct.pack("<f", b / 2**31) for (b,) in struct.iter_unpack("<i", noise))
    if spec.dtype in ("BF16", "F16"):
        return bytes(byte if i % 2 == 0 else byte & 0x80 | 0x3A for i, byte in enumerate(noise))
    return noise


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "tie_word_embeddings": False}


def llama(layers: int, *, width: int = 8, vocabulary: int = 16, dtype: str = "BF16", tied: bool = False) -> Shapes:
    """Tensors of a small llama."""
    shapes = {"model.embed_tokens.weight": (dtype, (vocabulary, width)), "model.norm.weight": (dtype, (width,))}
    if not tied:
        shapes["lm_head.weight"] = (dtype, (vocabulary, width))
    for i in range(layers):
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (dtype, (width,))
        shapes[f"model.layers.{i}.self_attn.q_proj.weight"] = (dtype, (width, width))
        shapes[f"model.layers.{i}.mlp.down_proj.weight"] = (dtype, (width, 2 * width))
    return shapes


def qwen_4bit(layers: int = 28) -> Shapes:
    """Shape for shape Qwen2.5-7B-Instruct as mlx quantizes it to 4 bits in groups of 64."""

    def packed(rows: int, columns: int) -> list[tuple[str, str, tuple[int, ...]]]:
        return [
            ("weight", "U32", (rows, columns // 8)),
            ("scales", "BF16", (rows, columns // 64)),
            ("biases", "BF16", (rows, columns // 64)),
        ]

    shapes: dict[str, tuple[str, tuple[int, ...]]] = {"model.norm.weight": ("BF16", (3584,))}
    modules = {"model.embed_tokens": (152064, 3584), "lm_head": (152064, 3584)}
    for i in range(layers):
        at = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{at}.{norm}.weight"] = ("BF16", (3584,))
        for name, rows in (("q", 3584), ("k", 512), ("v", 512)):
            shapes[f"{at}.self_attn.{name}_proj.bias"] = ("BF16", (rows,))
            modules[f"{at}.self_attn.{name}_proj"] = (rows, 3584)
        modules[f"{at}.self_attn.o_proj"] = (3584, 3584)
        modules[f"{at}.mlp.gate_proj"] = modules[f"{at}.mlp.up_proj"] = (18944, 3584)
        modules[f"{at}.mlp.down_proj"] = (3584, 18944)
    for module, size in modules.items():
        for part, dtype, shape in packed(*size):
            shapes[f"{module}.{part}"] = (dtype, shape)
    return shapes
