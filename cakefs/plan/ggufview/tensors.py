"""Tensors of a model in safetensors -> tensors of its GGUF, each as segments over the same spans. Pure.

In the order in which the converter writes them: by name, stacked experts where the last of them stands. Weights keep
their bytes; rows of q and k are interleaved where llama's are; what llama.cpp wants in F32 is widened, which is exact.
Nothing is rounded, where the converter does: it writes all matrices in one dtype, and adds 1 to norms of F16 in F16.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import msgspec

from cakefs.formats.ggml import TYPE_IDS
from cakefs.formats.ggufwrite import TensorSpec
from cakefs.formats.safetensors import DTYPES
from cakefs.formats.strictjson import brief
from cakefs.model import Computed, Extent, Segment
from cakefs.plan.ggufview.archs import Arch
from cakefs.plan.ggufview.refusal import NoGguf
from cakefs.plan.ggufview.settings import Settings
from cakefs.plan.interleave import OP as INTERLEAVE
from cakefs.plan.view import Bytes, Part

FILE_TYPES = {"F32": 0, "F16": 1, "BF16": 32}
_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,5})\.(.+)")
_EXPERT = re.compile(r"(.+)\.(0|[1-9][0-9]{0,5})\.([^.]+)\.weight")
_EMBEDDING = "model.embed_tokens.weight"
_OUTSIDE = {_EMBEDDING: "token_embd.weight", "model.norm.weight": "output_norm.weight"}
_HEAD = "lm_head.weight"
_BUFFERS = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")  # No loader needs these.
_ALWAYS_F32 = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight")


class Tensor(NamedTuple):
    """Attributes:
    shape: Slowest first.
    segments: Its bytes, in order.
    """

    spec: TensorSpec
    shape: tuple[int, ...]
    segments: tuple[Segment, ...]


def file_type(parts: Mapping[str, Part]) -> str:
    """What the file says it is mostly of: the first 16-bit dtype of a matrix, else F32. Raises NoGguf for any other."""
    found = "F32"
    for name in sorted(parts):
        dtype = parts[name].dtype
        if dtype not in FILE_TYPES and not name.endswith(_BUFFERS):
            raise NoGguf(f"tensor {brief(name)} is of {dtype}; only F32, F16 and BF16 can be shown as GGUF")
        if found == "F32" and dtype != "F32" and len(parts[name].shape) > 1:
            found = dtype
    return found


def map_tensors(parts: Mapping[str, Part], arch: Arch, settings: Settings, tokens: int) -> list[Tensor]:
    """All tensors in the order of the file. Raises NoGguf for one that is missing or unknown.

    Args:
        tokens: Of the vocabulary: as many rows as the embedding must have.
    """
    mapper = _Mapper(arch, settings, tokens)
    tensors = [tensor for name in sorted(parts) for tensor in mapper.take(name, parts[name])]
    mapper.check_complete(settings, _HEAD in parts)
    return tensors


class _Mapper:
    def __init__(self, arch: Arch, settings: Settings, tokens: int) -> None:
        self._arch, self._settings, self._tokens = arch, settings, tokens
        self._layers: int = settings["num_hidden_layers"]
        self._experts: dict[int, dict[tuple[str, int], Part]] = {}  # layer -> (word, expert) -> tensor
        self._seen: set[str] = set()

    def take(self, name: str, part: Part) -> Iterator[Tensor]:
        """What is written when the converter comes by this tensor."""
        if name.endswith(_BUFFERS) or (name == _HEAD and not self._arch.head):
            return
        match = _LAYER.fullmatch(name)
        if match is None:
            target = _OUTSIDE.get(name, "output.weight" if name == _HEAD else "")
            part = self._trimmed(part) if name == _EMBEDDING else part
            yield self._plain(name, target, target, part)
            return
        layer, rest = int(match[1]), match[2]
        if layer >= self._layers:
            raise NoGguf(f"tensor {brief(name)} is of a layer that config.json does not count")
        expert = _EXPERT.fullmatch(rest) if self._arch.experts else None
        if expert is not None and self._arch.experts and expert[1] == self._arch.experts.prefix:
            yield from self._expert(layer, int(expert[2]), expert[3], name, part)
            return
        target = self._arch.layer.get(rest, "")
        yield self._plain(name, f"blk.{layer}.{target}", target, part)

    def _plain(self, name: str, full: str, target: str, part: Part) -> Tensor:
        if not target:
            raise NoGguf(f"tensor {brief(name)} has no place in a GGUF of {self._arch.name}")
        self._seen.add(full)
        dtype = _dtype(target, part)
        data = plus_one(part) if self._arch.shifted_norms and name.endswith("norm.weight") else cast(part, dtype)
        if self._arch.permuted and name.endswith(("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias")):
            key = "num_attention_heads" if ".q_proj." in name else "num_key_value_heads"
            data = interleaved(name, part, data, dtype, self._settings[key])
        return _tensor(full, dtype, part.shape, (data,))

    def _trimmed(self, part: Part) -> Part:
        """Without rows beyond the vocabulary, which gemma's embeddings have."""
        rows = part.shape[0] if part.shape else 0
        if rows > self._tokens and self._arch.name == "gemma3" and isinstance(part.data, Extent):
            stop = part.data.start + part.data.size // rows * self._tokens
            data = Extent(part.data.span, part.data.start, stop)
            return msgspec.structs.replace(part, shape=(self._tokens, *part.shape[1:]), data=data)
        if rows != self._tokens:
            raise NoGguf(f"the embedding has {rows} rows, the vocabulary {self._tokens} tokens")
        return part

    def _expert(self, layer: int, expert: int, word: str, name: str, part: Part) -> Iterator[Tensor]:
        assert self._arch.experts is not None
        count, words = self._settings["experts"], self._arch.experts.words
        if word not in words or expert >= count:
            raise NoGguf(f"tensor {brief(name)} has no place in a GGUF of {self._arch.name}")
        found = self._experts.setdefault(layer, {})
        found[word, expert] = part
        if len(found) < len(words) * count:
            return
        for word, target in words.items():
            stack = [found[word, i] for i in range(count)]
            if len({p.shape for p in stack}) > 1:
                raise NoGguf(f"experts of layer {layer} are not all of one shape")
            full = f"blk.{layer}.{target}"
            self._seen.add(full)
            shape = (count, *stack[0].shape)
            dtype = stack[0].dtype if len({p.dtype for p in stack}) == 1 else "F32"
            yield _tensor(full, dtype, shape, tuple(cast(p, dtype) for p in stack))

    def check_complete(self, settings: Settings, head: bool) -> None:
        wanted = [*_OUTSIDE.values()]
        within = {target for rest, target in self._arch.layer.items() if rest not in self._arch.optional}
        within.update(self._arch.experts.words.values() if self._arch.experts else ())
        wanted += [f"blk.{layer}.{target}" for layer in range(self._layers) for target in sorted(within)]
        missing = next((name for name in wanted if name not in self._seen), None)
        if missing is not None:
            raise NoGguf(f"there is no tensor to make {missing} of")
        if not head and not settings["tie_word_embeddings"]:
            raise NoGguf(f"there is no {_HEAD}, and config.json does not tie it to the embedding")


def _dtype(target: str, part: Part) -> str:
    """llama.cpp wants vectors, norms, routers and whatever is no weight in F32."""
    wide = len(part.shape) < 2 or target.endswith("_norm.weight") or not target.endswith(".weight")
    return "F32" if wide or target in _ALWAYS_F32 else part.dtype


def cast(part: Part, dtype: str) -> Bytes:
    """The tensor in its own dtype, or in F32."""
    if part.dtype == dtype:
        return part.data
    return Computed("cast", dtype, _size(part.shape, dtype), (part.data,), (part.dtype,))


def plus_one(part: Part) -> Bytes:
    """In F32."""
    return Computed("add", "F32", _size(part.shape, "F32"), (part.data,), (part.dtype,), (1.0,))


def interleaved(name: str, part: Part, data: Bytes, dtype: str, heads: int) -> Bytes:
    """With the halves of each head taken in turn."""
    rows = part.shape[0] if part.shape else 0
    if rows == 0 or rows % (2 * heads):
        raise NoGguf(f"tensor {brief(name)} has {rows} rows, which are not {heads} heads of two halves")
    return Computed(INTERLEAVE, dtype, data.size, (data,), (dtype,), (heads, rows))


def _size(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * DTYPES[dtype].bits // 8


def _tensor(name: str, dtype: str, shape: tuple[int, ...], segments: tuple[Segment, ...]) -> Tensor:
    size = sum(segment.size for segment in segments)
    return Tensor(TensorSpec(name, TYPE_IDS[dtype], shape[::-1] or (1,), size), shape, segments)
