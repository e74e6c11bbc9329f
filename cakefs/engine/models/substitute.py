"""`add --substitute`: near-equal tensors of another model instead of a model's own, as far as they were compared.

Whether two tensors are near is known only to who has read both. `cakefs compare` does, and what it finds is kept by
content, also when the bytes are gone; here nothing is read and nothing fetched.
"""

import logging
import math
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

from cakefs.engine.known.shown import Local
from cakefs.engine.known.survey import find_model
from cakefs.engine.models.views import Made, make_view
from cakefs.errors import StoreFull, UserError
from cakefs.model import Manifest, View
from cakefs.plan.pairs import Pair, Pairs
from cakefs.plan.similarity import Similarity
from cakefs.plan.slice import Composed
from cakefs.plan.substitute import build_substituted, candidates
from cakefs.plan.view import WEIGHTS, PutLiteral, ReadSmall
from cakefs.store.distances import Distance
from cakefs.store.store import Store

log = logging.getLogger(__name__)


class Substituted(NamedTuple):
    """Attributes:
    tensors: What was taken from the other model, with the largest difference of each; `size` bytes.
    unknown: How many tensors were never compared with the other model's.
    """

    made: Made
    tensors: dict[str, float]
    size: int
    unknown: int


def remember(store: Store, a: Manifest, b: Manifest, pairs: Pairs, measured: Iterable[tuple[Pair, Similarity]]) -> None:
    """Keeps what was found of two models. On a full disk that is all that is lost."""
    found = dict.fromkeys(pairs.equal, Distance(True, 0, 0))
    for pair, one in measured:
        if pair.a.path == pair.b.path == WEIGHTS:
            found[pair.a.name] = Distance(one.equal, one.max_diff, one.clashes)
    if store.catalog.readonly or any(WEIGHTS not in manifest.shown(View.MODEL) for manifest in (a, b)):
        return
    try:
        rows = [(c.own, c.other, found[c.name]) for c in candidates(a, b) if c.name in found]
        store.catalog.distances.record(rows)
    except StoreFull as error:
        log.warning("what was found is not kept for `cakefs add --substitute`: %s", error.message)


def substitute_model(
    store: Store, manifest: Manifest, name: str, other: str, bound: float, *, update: bool
) -> Substituted:
    """Shows `manifest`, which is not stored, under a name, with tensors of the model called `other`.

    Args:
        bound: Of |a - b| for each element.

    Raises:
        UserError: No tensor is known to be so near, or the name is taken.
    """
    if not (math.isfinite(bound) and bound >= 0):
        raise UserError(f"--max-diff {bound} is no bound", hint="a number of 0 or more")
    donor = find_model(store, other)
    near: dict[str, float] = {}
    size = unknown = 0
    mine, theirs = Local.of_model(store, manifest).digests, Local.of_model(store, donor).digests
    for own in candidates(manifest, donor):
        found = store.catalog.distances.of(own.own, own.other)
        if found is None:
            unknown += own.own not in mine or mine[own.own] != theirs.get(own.other)
        elif not found.equal and found.max_diff is not None and found.max_diff <= bound and not found.clashes:
            near[own.name] = float(found.max_diff)
            size += own.own.size
    if not near:
        message = f"no tensor of {manifest.name} is known to be within {bound:g} of that of {other}"
        raise UserError(message, hint=f"add it under a name of its own, and `cakefs compare` that with {other}")

    def build(*, name: str, created: int, read_small: ReadSmall, put_literal: PutLiteral) -> Composed:
        make = partial(build_substituted, manifest, donor, near, bound)
        return Composed(make(name=name, created=created, put_literal=put_literal), ())

    return Substituted(make_view(store, name, build, update=update), near, size, unknown)
