"""The tensors that a model's directory shows, whichever files they are in, under names that are unique. Pure."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from cakefs.model import Manifest, View, all_leaves, leaves
from cakefs.plan.view import WEIGHTS, Bytes, parts_of, tensor_data


class Tensor(NamedTuple):
    """A tensor of a shown file; `data` counts in the manifest's spans."""

    path: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Bytes


def shown_tensors(manifest: Manifest) -> list[Tensor]:
    """In the order of the manifest. A tensor that several files show counts once, for the first of them."""
    if manifest.stack:
        return [Tensor(WEIGHTS, *part) for part in parts_of(manifest).values()]
    files = manifest.shown(View.MODEL)
    at: dict[int, str] = {}
    for path in sorted(files, key=lambda p: (not p.endswith(".safetensors"), p)):
        for extent in all_leaves(files[path].segments):
            at.setdefault(extent.span, path)
    found = []
    for t in manifest.tensors:
        data = tensor_data(manifest, t)
        places = [extent.span for extent in leaves(data)]
        if at.keys() >= {*places}:
            found.append(Tensor(at[places[0]], t.name, t.dtype, t.shape, data))
    return found


def named_alike(*models: Iterable[Tensor]) -> tuple[dict[str, Tensor], ...]:
    """The tensors of each model by name; by `path:name` where any of the models has several of that name."""
    lists = [list(tensors) for tensors in models]
    tables = tuple({tensor.name: tensor for tensor in tensors} for tensors in lists)
    if all(len(table) == len(tensors) for table, tensors in zip(tables, lists, strict=True)):
        return tables
    twice = {name for tensors in lists for name, n in Counter(t.name for t in tensors).items() if n > 1}

    def key(tensor: Tensor) -> str:
        return f"{tensor.path}:{tensor.name}" if tensor.name in twice else tensor.name

    return tuple({key(tensor): tensor for tensor in tensors} for tensors in lists)
