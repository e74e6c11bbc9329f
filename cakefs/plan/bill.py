"""What models take: as plain copies, with each file kept once, with each tensor kept once. Pure."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from cakefs.model import Literal, SpanKey, leaves
from cakefs.plan.derived import own_files
from cakefs.plan.equal import Known


class Bill(NamedTuple):
    """Bytes that the same models take: as plain copies, with each file kept once, with each tensor kept once."""

    copies: int
    files: int
    tensors: int


class Weight(NamedTuple):
    """Of one model: its bytes, and those that are here; both again of each file as published (of what was made here, as
    shown); the spans that it needs, with what stands for all equal ones and what is here; the literals."""

    copies: int
    copies_here: int
    files: dict[object, tuple[int, int]]
    spans: dict[SpanKey, tuple[SpanKey, int]]
    literals: dict[str, int]


def weigh(model: Known) -> Weight:
    manifest, copies = model.manifest, [0, 0]
    sources: dict[int, list[int]] = {}
    files: dict[object, tuple[int, int]] = {}
    spans: set[int] = set()
    literals: dict[str, int] = {}
    for file in own_files(manifest).values():
        marks: list[object] = []
        total = [0, 0]
        for segment in file.segments:
            size = here = segment.size
            if isinstance(segment, Literal):
                literals[segment.blob] = size
                marks.append(segment.blob)
                if not manifest.stack:
                    files[segment.blob] = (size, size)
            else:
                here = model.here(segment)
                used = [extent.span for extent in leaves(segment) if extent.size]
                spans.update(used)
                if manifest.stack:
                    marks.append(model.mark(segment))
                elif used:
                    _add(sources.setdefault(manifest.spans[used[0]].source, [0, 0]), size, here)
            _add(total, size, here)
        if manifest.stack:
            files[tuple(marks)] = (total[0], total[1])
        _add(copies, *total)
    for source, total in sources.items():  # a file that is published twice under two names is kept once
        files[manifest.sources[source].identity] = (total[0], total[1])
    here_of = {model.keys[span]: (model.roots[span], model.local[span]) for span in spans}
    return Weight(copies[0], copies[1], files, here_of, literals)


def _add(total: list[int], size: int, here: int) -> None:
    total[0] += size
    total[1] += here


def bills(weights: Sequence[Weight]) -> tuple[Bill, Bill]:
    files: dict[object, tuple[int, int]] = {}
    spans: dict[SpanKey, tuple[SpanKey, int]] = {}
    literals: dict[str, int] = {}
    for weight in weights:
        for mark, sizes in weight.files.items():
            files[mark] = max(files.get(mark, (0, 0)), sizes)
        literals |= weight.literals
        spans |= weight.spans
    here: Counter[SpanKey] = Counter()
    for root, local in spans.values():
        here[root] += local
    kept = sum(literals.values())
    whole, now = kept + sum(root.size for root in here), kept + sum(min(root.size, n) for root, n in here.items())
    return (
        Bill(sum(w.copies for w in weights), sum(size for size, _ in files.values()), whole),
        Bill(sum(w.copies_here for w in weights), sum(size for _, size in files.values()), now),
    )
