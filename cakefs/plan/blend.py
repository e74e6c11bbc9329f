"""One tensor of the output from those of the inputs: the bytes as they are, or how to calculate them. Pure.

The order of operations, and where each rounds, is mergekit's: inputs are cast to `dtype` (or to what all of them fit
in), then the method, then a cast to `out_dtype`. Tensors of integers are no weights: they are copied, and must agree.
"""

from collections.abc import Sequence
from typing import NamedTuple

from cakefs.errors import UserError
from cakefs.formats.safetensors import DTYPES
from cakefs.formats.strictjson import brief
from cakefs.model import Computed, leaves
from cakefs.plan.view import Bytes

_CALCULABLE = ("F64", "F32", "F16", "BF16")
_MOST_INPUTS = 1000  # Reading a page of it takes a tenth of a second.
_MOST_STEPS = 200  # Each is a call within a call when it is read.
WHOLE = ("BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64")


class Operand(NamedTuple):
    """A tensor to be merged.

    Attributes:
        data: Counted in the view's spans.
        key: Equal only for equal bytes; needed for those of WHOLE.
        packed: Of a quantized model, so that its elements are no weights.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: Bytes
    key: tuple[object, ...]
    packed: bool


class Formula(NamedTuple):
    """Attributes:
    params: As the operation takes them; None where nothing is calculated.
    dtype, out_dtype: As in mergekit, or empty.
    where: The entry of the recipe, for messages.
    """

    op: str
    params: tuple[float, ...] | None
    dtype: str
    out_dtype: str
    where: str


def blend(operands: Sequence[Operand], formula: Formula) -> tuple[str, Bytes]:
    """The dtype and bytes of the result.

    Raises:
        UserError: Naming the tensor that cannot be merged so.
    """
    first = operands[0]
    calculated = formula.params is not None or formula.dtype or formula.out_dtype
    if calculated and any(operand.packed for operand in operands):
        raise UserError(f"{formula.where}: {first.name} is quantized; its values cannot be calculated on read")
    if any(operand.dtype in WHOLE for operand in operands):
        if any(operand.dtype != first.dtype or operand.key != first.key for operand in operands[1:]):
            raise UserError(f"{formula.where}: {first.name} holds integers that differ between the models")
        return first.dtype, first.data
    if any(operand.shape != first.shape for operand in operands[1:]):
        shapes = " and ".join(dict.fromkeys(brief(list(operand.shape)) for operand in operands))
        raise UserError(f"{formula.where}: {first.name} is of shape {shapes}")
    if not calculated:
        return first.dtype, first.data
    return _calculate(operands, formula)


def _calculate(operands: Sequence[Operand], formula: Formula) -> tuple[str, Bytes]:
    for operand in operands:
        if operand.dtype not in _CALCULABLE:
            raise UserError(f"{formula.where}: {operand.name} is {operand.dtype}, which cannot be calculated with")
    dtypes = [formula.dtype or operand.dtype for operand in operands]
    working = _promote(dtypes) if formula.op != "scale" else dtypes[0]
    inputs = []
    for operand, dtype in zip(operands, dtypes, strict=True):
        data = _cast(operand.data, operand.dtype, dtype)
        inputs.append(_cast(data, dtype, working))
    result: Bytes = inputs[0]
    if formula.params is not None:
        size = _resized(operands[0].data.size, operands[0].dtype, working)
        result = Computed(formula.op, working, size, tuple(inputs), (working,) * len(inputs), formula.params)
        _check_cost(result, operands[0].name, formula.where)
    dtype = formula.out_dtype or working
    return dtype, _cast(result, working, dtype)


def _check_cost(data: Computed, name: str, where: str) -> None:
    """Averages of averages may double with each step what is read, and the manifest with it."""
    count, steps = len(leaves(data)), _steps(data)
    if count > _MOST_INPUTS or steps > _MOST_STEPS:
        what = f"from {count} tensors" if count > _MOST_INPUTS else f"in {steps} steps"
        raise UserError(
            f"{where}: {name} would be calculated {what} on each read, more than cakefs does",
            hint="`cakefs export` the models that are merges of merges, add the copies, and merge those",
        )


def _steps(data: Bytes) -> int:
    """Calculations, one after the other."""
    return 1 + max(map(_steps, data.inputs)) if isinstance(data, Computed) else 0


def _promote(dtypes: Sequence[str]) -> str:
    """The narrowest dtype that all fit in, as torch promotes: BF16 and F16 meet in F32."""
    kinds = set(dtypes)
    if len(kinds) == 1:
        return dtypes[0]
    return "F64" if "F64" in kinds else "F32"


def _cast(data: Bytes, dtype: str, to: str) -> Bytes:
    if dtype == to:
        return data
    return Computed("cast", to, _resized(data.size, dtype, to), (data,), (dtype,))


def _resized(size: int, dtype: str, to: str) -> int:
    return size * DTYPES[to].bits // DTYPES[dtype].bits
