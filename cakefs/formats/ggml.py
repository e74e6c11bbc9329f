"""Tensor types of ggml, by id: elements of a block and its bytes. A row is always whole blocks.

A type that is not in the table can still be served: its size is the distance to the next tensor.
"""

from collections.abc import Sequence
from typing import NamedTuple

MAX_DIMS = 4
_MAX_I64 = 2**63 - 1


class TensorType(NamedTuple):
    """Attributes:
    block: Elements that are packed together, `size` bytes a block.
    """

    name: str
    block: int
    size: int


TYPES = {
    0: TensorType("F32", 1, 4), 1: TensorType("F16", 1, 2), 2: TensorType("Q4_0", 32, 18),
    3: TensorType("Q4_1", 32, 20), 6: TensorType("Q5_0", 32, 22), 7: TensorType("Q5_1", 32, 24),
    8: TensorType("Q8_0", 32, 34), 9: TensorType("Q8_1", 32, 40), 10: TensorType("Q2_K", 256, 84),
    11: TensorType("Q3_K", 256, 110), 12: TensorType("Q4_K", 256, 144), 13: TensorType("Q5_K", 256, 176),
    14: TensorType("Q6_K", 256, 210), 15: TensorType("Q8_K", 256, 292), 16: TensorType("IQ2_XXS", 256, 66),
    17: TensorType("IQ2_XS", 256, 74), 18: TensorType("IQ3_XXS", 256, 98), 19: TensorType("IQ1_S", 256, 50),
    20: TensorType("IQ4_NL", 32, 18), 21: TensorType("IQ3_S", 256, 110), 22: TensorType("IQ2_S", 256, 82),
    23: TensorType("IQ4_XS", 256, 136), 24: TensorType("I8", 1, 1), 25: TensorType("I16", 1, 2),
    26: TensorType("I32", 1, 4), 27: TensorType("I64", 1, 8), 28: TensorType("F64", 1, 8),
    29: TensorType("IQ1_M", 256, 56), 30: TensorType("BF16", 1, 2), 34: TensorType("TQ1_0", 256, 54),
    35: TensorType("TQ2_0", 256, 66), 39: TensorType("MXFP4", 32, 17), 40: TensorType("NVFP4", 64, 36),
    41: TensorType("Q1_0", 128, 18), 42: TensorType("Q2_0", 64, 18),
}  # fmt: skip

TYPE_IDS = {entry.name: type_id for type_id, entry in TYPES.items()}


def type_name(type_id: int) -> str:
    """As llama.cpp spells it, or `GGML_<id>` for one that is not in the table."""
    return TYPES[type_id].name if type_id in TYPES else f"GGML_{type_id}"


def tensor_size(type_id: int, dims: Sequence[int]) -> int | None:
    """In bytes, None for a type that is not in the table; `dims` fastest first.

    Raises ValueError where a row is no whole number of blocks or the elements pass 63 bits.
    """
    elements = 1
    for dim in dims:
        elements *= dim
        if elements > _MAX_I64:
            raise ValueError(f"dims {list(dims)} overflow")
    if type_id not in TYPES:
        return None
    name, block, size = TYPES[type_id]
    row = dims[0] if dims else 1
    if row % block:
        raise ValueError(f"{row} elements a row are not whole blocks of {block}, as {name} has")
    return elements // block * size
