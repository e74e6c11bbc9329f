"""What a merge method does to one tensor: the parameters of the recipe, resolved for its name and depth. Pure."""

from collections.abc import Sequence

from cakefs.errors import UserError
from cakefs.plan.blend import Formula, Operand
from cakefs.plan.recipe import Stack
from cakefs.plan.settings import Settings, resolve
from cakefs.plan.stack import Input, Layer


def is_scaled(stack: Stack, layer: Layer) -> bool:
    """Whether a passthrough scales some tensor of the layer."""
    return any("scale" in s for s in (layer.inputs[0].source.settings, layer.part.settings, stack.settings))


def is_plain(stack: Stack, layer: Layer) -> bool:
    """Whether all tensors of the layer stay as they are."""
    return not (stack.method != "passthrough" or stack.dtype or stack.out_dtype or is_scaled(stack, layer))


def formula_of(
    stack: Stack, layer: Layer, name: str, operands: Sequence[Operand], depth: float
) -> tuple[Sequence[Operand], Formula]:
    """The operands in the order in which the operation takes them, and the operation.

    Args:
        name: Of the tensor in the output.
        operands: In the order of the layer's inputs.
        depth: Where in its slice the tensor lies.

    Raises:
        UserError: Naming the parameter that is missing or makes no sense.
    """
    shared = (layer.part.settings, stack.settings)
    dtypes = (stack.dtype, stack.out_dtype, layer.part.where)
    if stack.method == "passthrough":
        scale = resolve("scale", (layer.inputs[0].source.settings, *shared), operands[0].name, depth)
        return operands, Formula("scale", None if scale is None else (scale,), *dtypes)
    divide = resolve("normalize", shared, name, depth, switch=True)
    pairs = list(zip(layer.inputs, operands, strict=True))
    if stack.method == "linear":
        weights = [_weight(x, operand.name, shared, depth) for x, operand in pairs]
        if divide is None or divide:
            _check_sum(weights, layer, name)
        return operands, Formula("linear", (1.0 if divide is None else divide, *weights), *dtypes)
    base = layer.part.base or stack.base
    assert base is not None  # the recipe was checked
    pairs.sort(key=lambda pair: pair[0].source.model.name != base.name)
    weights = [_weight(x, operand.name, shared, depth) for x, operand in pairs[1:]]
    factor = resolve("lambda", shared, name, depth)
    params = (divide or 0.0, 1.0 if factor is None else factor, *weights)
    return [operand for _, operand in pairs], Formula("task_arithmetic", params if weights else None, *dtypes)


def _weight(x: Input, tensor: str, shared: tuple[Settings, Settings], depth: float) -> float:
    weight = resolve("weight", (x.source.settings, *shared), tensor, depth)
    if weight is None:
        raise UserError(f"{x.source.where}.parameters.weight: missing for {tensor}")
    return weight


def _check_sum(weights: Sequence[float], layer: Layer, name: str) -> None:
    if abs(sum(weights)) <= 1e-7 * max(map(abs, weights)):
        raise UserError(
            f"{layer.part.where}: the weights of {name} add up to 0, by which they would be divided",
            hint="set `normalize: false`",
        )
