"""An Ollama store: models as manifests of blobs, each blob a file named by its SHA-256.

    manifests/<host>/<namespace>/<model>/<tag>    JSON: layers with media type, digest, size, and perhaps a name
    blobs/sha256-<hex>

A GGUF model is one layer. A safetensors model is a layer per tensor, each a small safetensors file that calls the
tensor by its name; an index made here shows them as one file.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cakefs.engine.disk.found import Found, Skipped, regular, unreadable
from cakefs.errors import CakeError, InvalidFormat
from cakefs.formats import safetensors
from cakefs.model import Listing, Published, is_safe_path
from cakefs.remotes.files import file_locator

_MEDIA = "application/vnd.ollama.image."
_DIGEST = re.compile("sha256:[0-9a-f]{64}")
_INDEX = "model.safetensors.index.json"
_NAMES = {  # what a layer is → the name of its file
    "projector": "mmproj.gguf",
    "adapter": "adapter.gguf",
    "template": "template",
    "system": "system",
    "params": "params.json",
    "license": "LICENSE",
    "messages": "messages.json",
}


def locations(environ: Mapping[str, str]) -> list[Path]:
    """Where the store may be: as Ollama looks for it, and where its system service keeps it."""
    if named := environ.get("OLLAMA_MODELS"):
        return [Path(os.path.expanduser(named))]
    return [Path(os.path.expanduser("~/.ollama/models")), Path("/usr/share/ollama/.ollama/models")]


def find(root: Path) -> tuple[list[Found], list[Skipped]]:
    """The models of a store."""
    models: list[Found] = []
    skipped: list[Skipped] = []
    top = root / "manifests"

    def skip(what: str, why: str) -> None:
        skipped.append(Skipped(what, why))

    for directory, folders, names in os.walk(top, onerror=unreadable(skip)):
        folders.sort()
        for name in sorted(names):
            path = Path(directory, name)
            parts = path.relative_to(top).parts
            if len(parts) != 4 or name.startswith("."):
                continue
            shown = "/".join(["ollama", *([] if parts[1] == "library" else [parts[1]]), f"{parts[2]}:{parts[3]}"])
            try:
                models.append(_model(root, path, shown))
            except CakeError as error:
                skipped.append(Skipped(shown, error.message))
    return models, skipped


def _model(root: Path, manifest: Path, name: str) -> Found:
    published: dict[str, Published] = {}
    paths: dict[str, Path] = {}
    tensors: dict[str, Path] = {}
    for layer in _layers(manifest):
        blob, file = _blob(root, layer, manifest)
        shown = _shown_as(layer, blob, published)
        published[shown] = Published(shown, file.size, file.identity, file.url, file.sha256, file.validator)
        paths[shown] = blob
        if _kind(layer) == "tensor":
            tensors[shown] = blob
    texts: dict[str, bytes] = {}
    origin = file_locator(manifest.resolve(), manifest.stat()).url
    if tensors:
        texts[_INDEX] = _index(tensors)
        published[_INDEX] = Published(_INDEX, len(texts[_INDEX]), "sha256:", f"{origin}#{quote(_INDEX)}")
    return Found(name, Listing(origin, "", "", tuple(published[p] for p in sorted(published))), paths, texts)


def _layers(manifest: Path) -> list[dict[str, Any]]:
    try:
        value = json.loads(manifest.read_bytes())
        layers = [
            *value["layers"],
            *([{**value["config"], "mediaType": _MEDIA + "ollama"}] if value.get("config") else []),
        ]
        if not all(_DIGEST.fullmatch(x["digest"]) and isinstance(x["mediaType"], str) for x in layers):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise InvalidFormat(f"{manifest} is no manifest of Ollama") from None
    return layers


def _kind(layer: Mapping[str, Any]) -> str:
    return str(layer["mediaType"]).removeprefix(_MEDIA).partition(";")[0]


def _blob(root: Path, layer: Mapping[str, Any], manifest: Path) -> tuple[Path, Published]:
    digest = str(layer["digest"])
    blob = root / "blobs" / digest.replace(":", "-")
    status = regular(blob)
    if isinstance(status, str):
        raise InvalidFormat(f"blob {blob.name} of {manifest} is {status}")
    real = blob.resolve()
    locator = file_locator(real, status)
    sha256 = digest.partition(":")[2]
    return real, Published("", locator.size, digest, locator.url, sha256, locator.validator)


def _shown_as(layer: Mapping[str, Any], blob: Path, taken: Mapping[str, object]) -> str:
    kind, name = _kind(layer), str(layer.get("name") or "")
    if kind == "tensor":
        wanted = f"tensors/{name}.safetensors"
    elif kind == "model":
        wanted = "model.gguf" if _begins(blob, b"GGUF") else "model.bin"
    else:
        wanted = name or _NAMES.get(kind) or f"{kind}.json"
    if not is_safe_path(wanted) or any(part.startswith(".") for part in wanted.split("/")):
        raise InvalidFormat(f"a layer has a name that cannot be shown: {name!r}")
    stem, dot, ending = wanted.rpartition(".")
    shown, number = wanted, 1
    while shown in taken:
        number += 1
        shown = f"{stem}-{number}.{ending}" if dot else f"{wanted}-{number}"
    return shown


def _index(tensors: Mapping[str, Path]) -> bytes:
    """An index over the files of the tensors, as a sharded checkpoint has it."""
    weight_map: dict[str, str] = {}
    for shown, blob in tensors.items():
        for name in _tensor_names(blob, shown):
            if name in weight_map:
                raise InvalidFormat(f"several layers call a tensor {name!r}: this layout of Ollama cannot be shown")
            weight_map[name] = shown
    return json.dumps({"metadata": {}, "weight_map": weight_map}, sort_keys=True).encode()


def _tensor_names(blob: Path, shown: str) -> list[str]:
    try:
        with blob.open("rb") as file:
            prefix = file.read(8)
            header = prefix + file.read(safetensors.header_size(prefix, shown) - 8)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise InvalidFormat(f"cannot read {blob}: {error.strerror}") from error
    return [entry.name for entry in safetensors.parse_header(header, size, shown).entries]


def _begins(path: Path, magic: bytes) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except OSError as error:
        raise InvalidFormat(f"cannot read {path}: {error.strerror}") from error
