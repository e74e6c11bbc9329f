"""The tensors of two models in pairs by name: what is known to be equal, what can be compared, what cannot. Pure."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from cakefs.errors import UserError
from cakefs.model import Manifest, SpanKey
from cakefs.plan.knowledge import Knower, Names, Relation, origin_of
from cakefs.plan.tensors import Tensor, named_alike, shown_tensors


class Pair(NamedTuple):
    """Tensors of one name."""

    name: str
    a: Tensor
    b: Tensor

    @property
    def alike(self) -> bool:
        """Of one dtype and shape: their values can be compared."""
        return (self.a.dtype, self.a.shape, self.a.data.size) == (self.b.dtype, self.b.shape, self.b.data.size)


class Pairs(NamedTuple):
    """The tensors of two models.

    Attributes:
        equal: Known to have equal bytes, without a look at them.
        open: Of one dtype and shape, to be read.
        unlike: Of another dtype or shape.
    """

    equal: list[str]
    open: list[Pair]
    unlike: list[Pair]
    only_a: list[str]
    only_b: list[str]

    @property
    def size(self) -> int:
        """Bytes to be read of either side."""
        return sum(pair.a.data.size for pair in self.open)


def pair_up(a: Manifest, b: Manifest, digests: Mapping[SpanKey, str], names: Sequence[str] = ()) -> Pairs:
    """Pairs the tensors of two models.

    Args:
        digests: Of the spans that are local, of both.
        names: Only tensors with these names, or like these globs.

    Raises:
        UserError: No tensor is of such a name, or one of the models has none.
    """
    tensors_a, tensors_b = named_alike(shown_tensors(a), shown_tensors(b))
    for manifest, tensors in ((a, tensors_a), (b, tensors_b)):
        if not tensors:
            raise UserError(f"{manifest.name} has no tensors that cakefs knows", hint="`cakefs show` lists its files")
    wanted = _chosen([*tensors_a, *(name for name in tensors_b if name not in tensors_a)], names)
    pairs = Pairs([], [], [], [], [])
    knower = Knower([Names("xxh3", digests)])
    for name in wanted:
        if name not in tensors_b:
            pairs.only_a.append(name)
        elif name not in tensors_a:
            pairs.only_b.append(name)
        else:
            pair = Pair(name, tensors_a[name], tensors_b[name])
            known = knower.compare(origin_of(a, pair.a.data), origin_of(b, pair.b.data))
            if not pair.alike:
                pairs.unlike.append(pair)
            elif known.relation is Relation.EQUAL:
                pairs.equal.append(name)
            else:
                pairs.open.append(pair)
    return pairs


def _chosen(known: Sequence[str], names: Sequence[str]) -> list[str]:
    for name in names:
        if not any(name == one or fnmatchcase(one, name) for one in known):
            raise UserError(f"no tensor {name} in either model", hint="`cakefs show MODEL --tensors` names them")
    return [one for one in known if not names or any(name == one or fnmatchcase(one, name) for name in names)]
