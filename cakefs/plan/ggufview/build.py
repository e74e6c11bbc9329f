"""A manifest with safetensors -> the same with `model.gguf`: a header of its own, everything else the same spans. Pure.

The file is what llama.cpp's convert_hf_to_gguf.py would write of the model's directory with `--outtype` as the weights
are, byte for byte. Its header is three literals: what is the model's own, the vocabulary (which models with the same
tokenizer share), the list of tensors.
"""

import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import msgspec

from cakefs.errors import CakeError
from cakefs.formats.ggml import TYPE_IDS
from cakefs.formats.gguf import Kind, aligned
from cakefs.formats.ggufwrite import Layout, TensorSpec, build_header, encode, encode_array
from cakefs.formats.strictjson import brief
from cakefs.model import Digest, File, Literal, Manifest, Segment, View
from cakefs.plan.derived import GGUF as NAME
from cakefs.plan.ggufview.archs import Arch, Key
from cakefs.plan.ggufview.card import Sizes, general_fields
from cakefs.plan.ggufview.refusal import NoGguf
from cakefs.plan.ggufview.rope import factor_tensors
from cakefs.plan.ggufview.settings import Settings, find_arch, settings_of
from cakefs.plan.ggufview.sidefiles import SideFiles
from cakefs.plan.ggufview.tensors import FILE_TYPES, Tensor, file_type, map_tensors
from cakefs.plan.ggufview.vocabulary import Vocabulary, check_tokenizer, read_vocabulary, wanted_files
from cakefs.plan.view import CONFIG, WEIGHTS, PutLiteral, ReadSmall, parts_of

TOKENIZER_LIMIT = 64 * 1024 * 1024  # Bytes of a tokenizer file; the largest of today have 33 million.
_QUANTIZATION_VERSION = 2


class Outcome(NamedTuple):
    """Attributes:
    refused: Why there is no `model.gguf`; empty where there is one, or where the model shows GGUF files of its own.
    """

    manifest: Manifest
    refused: str


def needed_tokenizers(manifest: Manifest, read_small: ReadSmall) -> list[str]:
    """Shown files that the vocabulary is read from; none where `with_gguf` would not get so far."""
    shown = manifest.shown(View.MODEL)
    if WEIGHTS not in shown or CONFIG not in shown or any(path.endswith(".gguf") for path in shown):
        return []
    try:
        arch = find_arch(SideFiles([CONFIG], lambda path: read_small(manifest, path)).json(CONFIG) or {})
    except (CakeError, AttributeError, TypeError):
        return []
    return wanted_files(arch, [path for path, file in shown.items() if file.size <= TOKENIZER_LIMIT])


def with_gguf(manifest: Manifest, read_small: ReadSmall, put_literal: PutLiteral) -> Outcome:
    """Adds the file where the model can be shown so. Never raises for what the model is like."""
    shown = manifest.shown(View.MODEL)
    if any(path.endswith(".gguf") for path in shown):
        return Outcome(manifest, "")
    try:
        if WEIGHTS not in shown or CONFIG not in shown:
            raise NoGguf(f"there is no {WEIGHTS if WEIGHTS not in shown else CONFIG}")
        files = SideFiles(shown, lambda path: read_small(manifest, path))
        file = _build(manifest, files, put_literal)
    except CakeError as error:
        return Outcome(manifest, error.message)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, struct.error) as error:
        return Outcome(manifest, f"a value is not of the form it should have ({brief(str(error))[1:-1]})")
    files_now = tuple(sorted((*manifest.files, file), key=lambda f: (f.path, f.view)))
    return Outcome(msgspec.structs.replace(manifest, files=files_now), "")


def _build(manifest: Manifest, files: SideFiles, put_literal: Callable[[bytes], Digest]) -> File:
    config = files.json(CONFIG) or {}
    arch = find_arch(config)
    settings = settings_of(config, arch)
    if manifest.substituted:
        raise NoGguf(f"its safetensors are not what was published: {manifest.substituted}")
    check_tokenizer(files, arch)
    parts = parts_of(manifest)
    matrix = file_type(parts)
    settings["file_type"] = FILE_TYPES[matrix]
    tensors = map_tensors(parts, arch, settings, settings["vocab_size"])
    factors = factor_tensors(settings)
    if arch.name == "qwen3" and _is_reranker(manifest, files, config):
        raise NoGguf("it is a reranker, whose head GGUF wants cut down to two words")
    vocabulary = read_vocabulary(files, arch, settings["vocab_size"])
    sizes = Sizes.of(
        [(name, (len(data) // 4,)) for name, data in factors.items()] + [(t.spec.name, t.shape) for t in tensors]
    )
    own = _own_fields(arch, settings, general_fields(files, manifest.name.rpartition("/")[2], sizes))
    return _lay_out(own, vocabulary, factors, tensors, put_literal)


def _is_reranker(manifest: Manifest, files: SideFiles, config: Mapping[str, object]) -> bool:
    hints = [manifest.name.rpartition("/")[2], str(config.get("_name_or_path", ""))]
    text = (files.text("README.md") or "").lower()
    return any("qwen3-reranker" in hint.lower() for hint in hints) or "# qwen3-reranker" in text


def _own_fields(arch: Arch, settings: Settings, general: dict[str, bytes]) -> dict[str, bytes]:
    """All that comes before the vocabulary."""
    keys = {key.name if key.name[0] == "." else f"{arch.name}.{key.name}": key for key in arch.keys}
    stated = {
        name.lstrip("."): _encoded(key, settings[key.setting])
        for name, key in keys.items()
        if settings.get(key.setting) is not None
    }
    early = {name: stated.pop(name) for name in (f"{arch.name}.rope.scaling.attn_factor",) if name in stated}
    return {
        "general.architecture": encode(Kind.STRING, arch.name),
        **early,
        "general.type": encode(Kind.STRING, "model"),
        **general,
        **stated,
        "general.quantization_version": encode(Kind.U32, _QUANTIZATION_VERSION),
    }


def _encoded(key: Key, value: Any) -> bytes:
    return encode_array(key.kind, value) if isinstance(value, list) else encode(key.kind, value)


def _lay_out(
    own: dict[str, bytes],
    vocabulary: Vocabulary,
    factors: Mapping[str, bytes],
    tensors: list[Tensor],
    put_literal: Callable[[bytes], Digest],
) -> File:
    extra = [TensorSpec(name, TYPE_IDS["F32"], (len(data) // 4,), len(data)) for name, data in factors.items()]
    layout = build_header({**own, **vocabulary.fields}, [*extra, *(t.spec for t in tensors)], NAME)
    first = 24 + sum(8 + len(key.encode()) + len(value) for key, value in own.items())
    second = first + sum(8 + len(key.encode()) + len(value) for key, value in vocabulary.fields.items())
    tail = layout.header[second:] + b"".join(
        data + bytes(aligned(len(data), 32) - len(data)) for data in factors.values()
    )
    literals = (layout.header[:first], layout.header[first:second], tail)
    segments: list[Segment] = [Literal(put_literal(data), len(data)) for data in literals]
    _append_tensors(segments, tensors, layout, len(extra), put_literal)
    return File(NAME, layout.size, View.MODEL, tuple(segments))


def _append_tensors(
    segments: list[Segment], tensors: list[Tensor], layout: Layout, skipped: int, put_literal: Callable[[bytes], Digest]
) -> None:
    zeros: dict[int, Literal] = {}
    for tensor, padding in zip(tensors, layout.paddings[skipped:], strict=True):
        segments.extend(tensor.segments)
        if padding:
            if padding not in zeros:
                zeros[padding] = Literal(put_literal(bytes(padding)), padding)
            segments.append(zeros[padding])
