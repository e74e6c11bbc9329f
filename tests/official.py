"""The official safetensors library as oracle: what it writes, and its verdict on a file."""

import ctypes
from collections.abc import Mapping
from typing import Any, NamedTuple

import safetensors
from safetensors import SafetensorError, TensorSpec

# Name in a header -> name that the library's writer takes. It cannot write the two 6-bit types.
WRITER_NAMES = {
    "BOOL": "bool", "F4": "float4_e2m1fn_x2", "U8": "uint8", "I8": "int8", "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "I16": "int16", "U16": "uint16", "F16": "float16", "BF16": "bfloat16",
    "I32": "int32", "U32": "uint32", "F32": "float32", "C64": "complex64", "F64": "float64", "I64": "int64",
    "U64": "uint64",
}  # fmt: skip


class Tensor(NamedTuple):
    """A tensor by value: dtype as in a header, shape in elements."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def write(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The file that the library writes for these tensors."""
    specs = {}
    for name, tensor in tensors.items():
        shape = list(tensor.shape)
        if tensor.dtype == "F4":
            shape[-1] //= 2  # counted in pairs there
        dtype = WRITER_NAMES[tensor.dtype]
        address = ctypes.cast(ctypes.c_char_p(tensor.data), ctypes.c_void_p).value or 0
        specs[name] = TensorSpec(dtype=dtype, shape=shape, data_ptr=address, data_len=len(tensor.data))
    return bytes(safetensors.serialize(specs, metadata=None if metadata is None else dict(metadata)))


def read(file: bytes) -> dict[str, Tensor] | None:
    """The tensors of a file as the library sees them, or None where it refuses the file."""
    try:
        found: list[tuple[str, dict[str, Any]]] = safetensors.deserialize(file)  # type: ignore[no-untyped-call]
    except SafetensorError:
        return None
    return {name: Tensor(t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in found}
