"""The cache of huggingface_hub: which models are in it, and which of its files have given bytes.

    models--org--name/refs/<branch>               40 hex digits
                      snapshots/<commit>/<path>   links to ../../blobs/<etag>, or plain files
                      blobs/<etag>                the file, or a link to the store that repositories share
                      trees/<commit>.json         the list of all files of the commit, if the client wrote one
    blobs/ab/<xet hash>                           that store

The name of a blob is what the Hub named it: SHA-256, or git's name for a small file. It is a claim, and nothing more.
"""

import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cakefs.engine.disk.found import Found, Skipped, regular, unreadable, walk
from cakefs.model import SMALL_FILE_LIMIT, Listing, Manifest, Published, Source, is_safe_path

_REPO = re.compile(r"models--([^-/][^/]*)")
_WEIGHTS = re.compile(r"\.safetensors(\.index(\.[^.]+)?\.json)?$")  # which belong together
_MODEL = re.compile(r"\.(safetensors|gguf|bin|pt|pth|ckpt|onnx)$")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NAMES = {64: "sha256", 40: "git"}  # digits of a blob's name → what it claims to be


def shown_by_us(cache: Path) -> bool:
    """Whether it is the cache that a mount shows: what is in there is here already."""
    cache = cache.resolve()  # a link to it would have us wait for a mount that waits for us
    return cache.name == "hub" and cache.parent.name == ".cakefs"


def files_with(cache: Path, published: Iterable[Published]) -> dict[str, Path]:
    """Files of the cache that claim to have what is published, by its path; of the right size."""
    wanted: dict[str, list[Published]] = {}
    for file in published:
        wanted.setdefault(file.identity, []).append(file)
    found: dict[str, Path] = {}
    if shown_by_us(cache):
        return found
    for path in cache.glob("models--*/blobs/*"):
        for file in wanted.get(_claim(path.name), ()):
            status = regular(path) if file.path not in found else "found"
            if not isinstance(status, str) and status.st_size == file.size:
                found[file.path] = path
    return found


def files_of(cache: Path, sources: Iterable[Source]) -> dict[str, Path]:
    """As `files_with`, for upstream files of a manifest."""
    return files_with(cache, [Published(s.path, s.locator.size, s.identity, s.locator.url) for s in sources])


def cached_identities(cache: Path, manifest: Manifest) -> set[str]:
    """Of the files of a model that are in the cache, by their names there."""
    found = files_of(cache, manifest.sources)
    return {source.identity for source in manifest.sources if source.path in found}


def find(cache: Path, endpoint: str) -> tuple[list[Found], list[Skipped]]:
    """The models in the cache, one for each commit that has files here."""
    models: list[Found] = []
    skipped: list[Skipped] = []
    for folder in sorted(cache.glob("models--*")):
        match = _REPO.fullmatch(folder.name)
        if match is None or not (folder / "snapshots").is_dir():
            continue
        repo = match[1].replace("--", "/")
        refs = _refs(folder / "refs")
        for snapshot in sorted((folder / "snapshots").iterdir()):
            if _COMMIT.fullmatch(snapshot.name) and snapshot.is_dir():
                _look(folder, snapshot.name, repo, refs, endpoint, models, skipped)
    return models, skipped


def _look(
    folder: Path,
    commit: str,
    repo: str,
    refs: Mapping[str, list[str]],
    endpoint: str,
    models: list[Found],
    skipped: list[Skipped],
) -> None:
    """Adds the models that one snapshot is; a commit that several branches name has as many names."""

    def skip(what: str, why: str) -> None:
        skipped.append(Skipped(what, why))

    base = f"{endpoint}/{repo}/resolve/{commit}"
    tree = _tree(folder / "trees" / f"{commit}.json")
    here = _files(folder / "snapshots" / commit, skip)
    published = [_published(path, file, size, base, tree) for path, (file, size) in here.items()]
    paths = {path: file for path, (file, _) in here.items()}
    for branch in refs.get(commit) or [commit]:
        name = repo if branch == "main" else f"{repo}@{branch}"
        if why := _unfit(here, tree):
            skip(name, why)
        else:
            whole = bool(tree) and tree.keys() <= here.keys()
            listing = Listing(f"{endpoint}/{repo}", commit, branch, tuple(published), whole)
            models.append(Found(name, listing, paths))


def _unfit(here: Collection[str], tree: Collection[str]) -> str:
    """Why a snapshot cannot be shown as a model: weights are missing. Other files may be: `add` brings them."""
    absent = sorted(path for path in tree if path not in here and _WEIGHTS.search(path))
    if absent:
        return (
            f"{absent[0]} and {len(absent) - 1} more are not in the cache"
            if absent[1:]
            else f"{absent[0]} is not in the cache"
        )
    return "" if any(_MODEL.search(path) for path in here) else "no weights are in the cache"


def _files(snapshot: Path, skip: Callable[[str, str], None]) -> dict[str, tuple[Path, int]]:
    """Also hidden ones: what is here was published."""
    found: dict[str, tuple[Path, int]] = {}
    for directory, folders, names in os.walk(snapshot, onerror=unreadable(skip)):
        folders.sort()
        for name in sorted(names):
            path = Path(directory, name)
            relative = path.relative_to(snapshot).as_posix()
            status = regular(path)
            if isinstance(status, str) or not is_safe_path(relative):
                skip(str(path), status if isinstance(status, str) else "its name cannot be shown")
            else:
                found[relative] = (path, status.st_size)
    return found


def _published(path: str, file: Path, size: int, base: str, tree: Mapping[str, Any]) -> Published:
    """As the Hub lists it: by the commit's own list, else by the name of the blob that the file is a link to."""
    entry = tree.get(path)
    claim = _claim(Path(os.readlink(file)).name if file.is_symlink() else "")
    if entry is not None:
        sha256 = entry.get("lfs_sha256")
        claim = f"sha256:{sha256}" if sha256 else f"git:{entry['blob_id']}"
    if not re.fullmatch("sha256:[0-9a-f]{64}|git:[0-9a-f]{40}", claim):
        claim = "git:" if size <= SMALL_FILE_LIMIT else "sha256:"  # a plain file: as the Hub most likely names it
    sha256 = claim.removeprefix("sha256:") if claim.startswith("sha256:") else ""
    return Published(path, size, claim, f"{base}/{quote(path)}", sha256)


def _claim(name: str) -> str:
    """What the name of a blob claims its bytes to be; empty for another name."""
    return f"{_NAMES[len(name)]}:{name}" if len(name) in _NAMES and re.fullmatch("[0-9a-f]+", name) else ""


def _refs(directory: Path) -> dict[str, list[str]]:
    """The branches and tags by the commit that they name."""
    found: dict[str, list[str]] = {}
    for name, path in walk(directory, lambda what, why: None).items():
        try:
            commit = path.read_text().strip()
        except (OSError, UnicodeDecodeError):
            continue
        if not name.startswith("refs/"):
            found.setdefault(commit, []).append(name)
    return found


def _tree(path: Path) -> dict[str, Any]:
    """The files of a commit; none where the cache has no such list, or another version of it."""
    try:
        listed = json.loads(path.read_bytes())
        files = listed["files"] if listed["format_version"] == 1 else {}
        sound = all(isinstance(f["size"], int) and isinstance(f["blob_id"], str) for f in files.values())
        return dict(files) if sound else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
