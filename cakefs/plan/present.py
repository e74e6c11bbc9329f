"""What of a repository is shown where: one form of the weights per directory, whatever was published.

Loaders disagree on which of several forms wins, so the model directory offers them no choice, and `original` keeps
everything:

- an index without the single file it stands for: the merged file is shown in the index's place and its shards';
- an index beside its single file: the file is shown, as transformers would read it; the index is never read, so a stale
  one does no harm;
- no `model.safetensors` and no index for it: `pytorch_model.safetensors` or `model-00001-of-00001.safetensors` is shown
  under that name;
- no safetensors of a kind but a torch checkpoint, or an index of several: safetensors made of it are shown in its
  place, if it can be read; it itself, the shards and the index are not, even if it cannot;
- beside a shown `model.safetensors` no other safetensors file, index or torch pickle is shown, and no pickle beside
  the safetensors file of its kind;
- all else is shown as published.
"""

import posixpath
import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from cakefs.errors import InvalidFormat
from cakefs.formats.sharded import Index, index_target
from cakefs.formats.torchckpt import is_index, shown_as
from cakefs.model import View

_SINGLE = "model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_FALLBACKS = ("pytorch_model.safetensors", "model-00001-of-00001.safetensors")
_OTHER_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt)|.*\.safetensors\.index(\.[^.]+)?\.json|pytorch_model.*\.index(\.[^.]+)?\.json",
    re.DOTALL,
)
_SHARD = re.compile(r"(?P<stem>.*?)-\d+-of-\d+(?P<rest>(?:\.[^/.]+)?\.(?:safetensors|bin))", re.DOTALL)
_SHARD_NUMBER = re.compile(r"(\.[^/.]+)?-\d+-of-\d+(\.[^/.]+)?\.safetensors")  # what follows the stem


class Shown(NamedTuple):
    """One file of the tree.

    Attributes:
        path: Where it is shown, relative to the model.
        origin: The published file with the same bytes; of a merged one the index, or the torch checkpoint, that its
            tensors are those of.
    """

    path: str
    view: View
    origin: str
    merged: bool


def is_safetensors(path: str) -> bool:
    """Whether the file must have a safetensors header, which then has to be fetched before `arrange` is of use."""
    return path.endswith(".safetensors")


def is_pickle(path: str) -> bool:
    """Whether the file is named as torch checkpoints are."""
    return path.endswith(_PICKLES)


def wanted_indexes(paths: Collection[str]) -> list[str]:
    """The published indexes that merged files will be made from, rising."""
    published = frozenset(paths)
    targets = _targets(published)
    single_dirs = {_directory(p) for p in (*published, *targets) if _name(p) == _SINGLE or _name(p) in _FALLBACKS}
    return sorted(
        index
        for target, index in targets.items()
        if target not in published and (_name(target) == _SINGLE or _directory(target) not in single_dirs)
    )


def wanted_checkpoints(paths: Collection[str]) -> dict[str, str]:
    """Safetensors files that are to be made of torch checkpoints: path -> the checkpoint, or the index of shards."""
    published = frozenset(paths)
    taken = _taken(published)
    found: dict[str, str] = {}
    for path in sorted(published, key=lambda p: (is_index(p), p)):
        target = shown_as(path)
        if target is not None and target not in taken:
            found.setdefault(target, path)
    singles = {_directory(p) for p in (*taken, *found) if _name(p) == _SINGLE}
    merged = {_directory(p) for p in wanted_indexes(published)}
    return {
        target: origin
        for target, origin in found.items()
        if (_directory(target) not in merged if _name(target) == _SINGLE else _directory(target) not in singles)
    }


def checkpoint_files(wanted: Mapping[str, str], indexes: Mapping[str, Index]) -> set[str]:
    """The torch checkpoints to read for `wanted_checkpoints`: those that are no shards, and the shards of `indexes`."""
    found: set[str] = set()
    for origin in wanted.values():
        if origin in indexes:
            found.update(shard_path(origin, shard) for shard in indexes[origin].weight_map.values())
        elif not is_index(origin):
            found.add(origin)
    return {path for path in found if is_pickle(path)}


def _taken(published: frozenset[str]) -> set[str]:
    """Safetensors files that are there, in whatever form."""
    taken = {path for path in published if is_safetensors(path)} | set(_targets(published))
    taken |= {_joined(match) for path in taken if (match := _SHARD.fullmatch(path))}
    return taken | {posixpath.join(_directory(p), _SINGLE) for p in published if _name(p) in _FALLBACKS}


def _joined(shard: "re.Match[str]") -> str:
    return f"{shard['stem']}{shard['rest']}"


def _pickles(published: frozenset[str], indexes: Mapping[str, Index]) -> set[str]:
    """Checkpoints in whose place safetensors are shown, or would be if they could be read; their indexes and shards."""
    targets = _taken(published) | wanted_checkpoints(published).keys()
    found = {path for path in published if shown_as(path) in targets}
    shards = {shard_path(i, shard) for i in found & indexes.keys() for shard in indexes[i].weight_map.values()}
    found |= {path for path in shards if is_pickle(path)}
    joined = {path: _joined(match) for path in published if (match := _SHARD.fullmatch(path))}
    return found | {path for path, whole in joined.items() if whole.endswith(".bin") and shown_as(whole) in targets}


def main_files(paths: Collection[str], indexes: Mapping[str, Index]) -> set[str]:
    """The safetensors without which there is no model: each `model.safetensors` or what it is merged of, or the only
    file."""
    shown = arrange(paths, indexes)
    found = {s.origin for s in shown if not s.merged and _name(s.path) == _SINGLE and s.view is not View.ORIGINAL}
    for merged in (s.origin for s in shown if s.merged):
        found.update(shard_path(merged, shard) for shard in indexes[merged].weight_map.values())
    tensors = [path for path in paths if is_safetensors(path)]
    return found or set(tensors if len(tensors) == 1 else ())


def shard_path(index: str, shard: str) -> str:
    """A shard's path relative to the repository."""
    return posixpath.join(_directory(index), shard)


def arrange(
    paths: Collection[str], indexes: Mapping[str, Index], converted: Collection[str] = frozenset()
) -> list[Shown]:
    """The files of both views, by path.

    Args:
        paths: Everything published.
        indexes: Those of `wanted_indexes`, parsed; of those in `wanted_checkpoints` what could be.
        converted: The files of `wanted_checkpoints` that can be made.
    """
    published = frozenset(paths)
    wanted = wanted_indexes(published)
    hidden = _pickles(published, indexes)
    hidden |= {shard_path(i, shard) for i in wanted for shard in set(indexes[i].weight_map.values())}
    hidden.update(wanted)
    hidden.update(_beside_single(published))
    made = [Shown(str(index_target(i)), View.MODEL, i, True) for i in wanted]
    made += [Shown(t, View.MODEL, o, True) for t, o in wanted_checkpoints(published).items() if t in converted]
    made += _renamed(published, published - hidden, {m.path for m in made})
    hidden.update(m.origin for m in made)
    single_dirs = {_directory(p) for p in ({m.path for m in made} | (published - hidden)) if _name(p) == _SINGLE}
    for path in published:
        if _name(path) != _SINGLE and _directory(path) in single_dirs and _OTHER_WEIGHTS.fullmatch(_name(path)):
            hidden.add(path)
    files = [*made, *(Shown(p, View.ORIGINAL if p in hidden else View.BOTH, p, False) for p in published)]
    files.sort()
    _check_tree([f.path for f in files if f.view is not View.ORIGINAL])
    _check_tree(published)
    return files


def _targets(published: Iterable[str]) -> dict[str, str]:
    """Single file -> the index that stands for it."""
    targets: dict[str, str] = {}
    for path in sorted(published):
        target = index_target(path)
        if target is None:
            continue
        if target in targets:
            raise InvalidFormat(f"both {targets[target]} and {path} are an index of {target}")
        targets[target] = path
    return targets


def _beside_single(published: frozenset[str]) -> set[str]:
    """Indexes whose single file is published, and by their names the shards of such."""
    found: set[str] = set()
    for target, index in _targets(published).items():
        if target in published:
            stem = index[: index.rindex(".safetensors.index")]
            found.add(index)
            found.update(p for p in published if p.startswith(stem) and _SHARD_NUMBER.fullmatch(p, len(stem)))
    return found


def _renamed(published: frozenset[str], offered: frozenset[str], merged: set[str]) -> list[Shown]:
    """Single files with another name, under the name that every loader looks for."""
    renamed: dict[str, Shown] = {}
    for fallback in _FALLBACKS:
        for path in offered:
            single = posixpath.join(_directory(path), _SINGLE)
            if _name(path) == fallback and single not in published and single not in merged:
                renamed.setdefault(single, Shown(single, View.MODEL, path, False))
    return list(renamed.values())


def _check_tree(paths: Collection[str]) -> None:
    directories = {parent for path in paths for parent in _parents(path)}
    both = directories.intersection(paths)
    if both:
        raise InvalidFormat(f"{min(both)} is both a file and a directory")


def _parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:n]) for n in range(1, len(parts))]


def _directory(path: str) -> str:
    return posixpath.dirname(path)


def _name(path: str) -> str:
    return posixpath.basename(path)
