"""The tensors that a model's directory shows, whichever files they are in, under names that are unique. Pure."""

from collections import Counter
from collections.abc import Iterable

from cakefs.model import Manifest, View, all_leaves, leaves
from cakefs.plan.view import WEIGHTS, Part, parts_of, tensor_data


class Tensor(Part, frozen=True, gc=False):
    """A tensor of the shown file `path`; `data` counts in the manifest's spans."""

    path: str


def shown_tensors(manifest: Manifest) -> list[Tensor]:
    """In the order of the manifest. A tensor that several files show counts once, for the first of them."""
    if manifest.stack:
        return [Tensor(p.name, p.dtype, p.shape, p.data, WEIGHTS) for p in parts_of(manifest).values()]
    files = manifest.shown(View.MODEL)
    at: dict[int, str] = {}
    for path in sorted(files, key=lambda p: (not p.endswith(".safetensors"), p)):
        for extent in all_leaves(files[path].segments):
            at.setdefault(extent.span, path)
    found = []
    for t in manifest.tensors:
        data = tensor_data(manifest, t)
        paths = [at.get(extent.span) for extent in leaves(data)]
        if paths[0] is not None and None not in paths:
            found.append(Tensor(t.name, t.dtype, t.shape, data, paths[0]))
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
