"""What the pickle of a torch checkpoint says, as inert values: tensors with their storages, nothing else. Pure.

The list of globals is that of `torch.load(weights_only=True)`; a pickle that refers to anything else is refused by its
name, whether it would call it or not. Of the functions on the list only those that make plain tensors mean something;
what the others would make is `Opaque`, and an error only where a tensor of some other kind stands for a weight.
"""

from collections.abc import Callable
from typing import NamedTuple

from cakefs.formats.pickleops import CONTAINER, Name, Opaque, Table, TooLarge
from cakefs.formats.strictjson import brief

MAX_DIMS = 64
_FEW_DIMS = 4  # So many are one step of work; those of a matrix cost nothing beside its opcodes.


class Dtype(NamedTuple):
    """`name` as safetensors spells it, empty for what it has no name for; `size` of an element in bytes."""

    name: str
    size: int


_STORAGES = {
    "FloatStorage": Dtype("F32", 4), "HalfStorage": Dtype("F16", 2), "BFloat16Storage": Dtype("BF16", 2),
    "DoubleStorage": Dtype("F64", 8), "LongStorage": Dtype("I64", 8), "IntStorage": Dtype("I32", 4),
    "ShortStorage": Dtype("I16", 2), "CharStorage": Dtype("I8", 1), "ByteStorage": Dtype("U8", 1),
    "BoolStorage": Dtype("BOOL", 1), "ComplexFloatStorage": Dtype("C64", 8), "ComplexDoubleStorage": Dtype("", 16),
    "QInt8Storage": Dtype("", 1), "QInt32Storage": Dtype("", 4), "QUInt8Storage": Dtype("", 1),
    "QUInt4x2Storage": Dtype("", 1), "QUInt2x4Storage": Dtype("", 1),
}  # fmt: skip
_DTYPES = {
    "float32": Dtype("F32", 4), "float16": Dtype("F16", 2), "bfloat16": Dtype("BF16", 2), "float64": Dtype("F64", 8),
    "int64": Dtype("I64", 8), "int32": Dtype("I32", 4), "int16": Dtype("I16", 2), "int8": Dtype("I8", 1),
    "uint8": Dtype("U8", 1), "uint16": Dtype("U16", 2), "uint32": Dtype("U32", 4), "uint64": Dtype("U64", 8),
    "bool": Dtype("BOOL", 1), "complex64": Dtype("C64", 8), "complex128": Dtype("", 16), "complex32": Dtype("", 4),
    "float8_e4m3fn": Dtype("F8_E4M3", 1), "float8_e5m2": Dtype("F8_E5M2", 1), "float8_e8m0fnu": Dtype("F8_E8M0", 1),
    "float8_e4m3fnuz": Dtype("F8_E4M3FNUZ", 1), "float8_e5m2fnuz": Dtype("F8_E5M2FNUZ", 1),
    "float4_e2m1fn_x2": Dtype("", 1), "bits8": Dtype("", 1), "bits16": Dtype("", 2), "bits1x8": Dtype("", 1),
    "bits2x4": Dtype("", 1), "bits4x2": Dtype("", 1), "qint8": Dtype("", 1), "qint32": Dtype("", 4),
    "quint8": Dtype("", 1), "quint4x2": Dtype("", 1), "quint2x4": Dtype("", 1),
}  # fmt: skip
_LAZY = {"conj": "a lazy 'conj'", "neg": "a lazy 'neg'"}
_UNTYPED = Name("torch.storage", "UntypedStorage")
_FROM_TYPE = Name("torch._tensor", "_rebuild_from_type_v2")  # (function, class, its arguments, attributes)
_UTILS = "torch._utils"
_OTHERS = {
    _FROM_TYPE, Name("collections", "Counter"), Name("torch.serialization", "_get_layout"), Name("torch", "Tensor"),
    Name("torch", "device"), Name("_codecs", "encode"), Name("builtins", "bytearray"), Name("builtins", "set"),
    Name("builtins", "complex"), Name(_UTILS, "_rebuild_qtensor"), Name(_UTILS, "_rebuild_sparse_tensor"),
    Name(_UTILS, "_rebuild_meta_tensor_no_storage"), Name(_UTILS, "_rebuild_nested_tensor"),
    Name(_UTILS, "_rebuild_wrapper_subclass"), Name(_UTILS, "_rebuild_device_tensor_from_numpy"),
    Name(_UTILS, "_rebuild_device_tensor_from_cpu_tensor"), Name("torch", "per_tensor_affine"),
    Name("torch", "per_tensor_symmetric"), Name("torch", "per_channel_affine"), Name("torch", "per_channel_symmetric"),
    Name("torch", "per_channel_affine_float_qparams"),
}  # fmt: skip


class Storage(NamedTuple):
    """Bytes that tensors are views of, named by `key`."""

    key: str
    dtype: Dtype
    size: int


class Tensor(NamedTuple):
    """A strided view of a storage; offset and stride in elements. `problem` says why it is no plain one, or nothing."""

    storage: Storage
    dtype: Dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    problem: str = ""


class TorchMeaning:
    """A `pickleops.Meaning`.

    Args:
        legacy: Of the container before zip, where a persistent id has one more item, always None.

    Attributes:
        storages: All that the pickle refers to, by key.
    """

    def __init__(self, *, legacy: bool = False) -> None:
        self.storages: dict[str, Storage] = {}
        self._more: tuple[None, ...] = (None,) if legacy else ()

    def find(self, name: Name) -> object:
        if name.module == "__builtin__":  # Python 2
            name = Name("builtins", name.name)
        if name not in _FUNCTIONS and name not in _OTHERS and _dtype(name) is None:
            raise ValueError(f"refers to {name}, which no file of weights needs")
        return name

    def call(self, function: Name, arguments: tuple[object, ...], spend: Callable[[int], None]) -> object:
        if function == _FROM_TYPE:
            if len(arguments) != 4 or not isinstance(arguments[0], Name) or not isinstance(arguments[2], tuple):
                raise ValueError(f"calls {function} with other arguments than torch does")
            function, arguments = arguments[0], arguments[2]
        make = _FUNCTIONS.get(function)
        if make is None:
            return Opaque(f"made by {function}", tensor="_rebuild" in function.name or function.name == "Tensor")
        try:
            return make(arguments, spend)
        except TooLarge:
            raise
        except (TypeError, ValueError, IndexError):
            raise ValueError(f"calls {function} with other arguments than torch does") from None

    def load(self, key: object) -> object:
        if not isinstance(key, tuple) or len(key) < 5 or key[0] != "storage" or key[5:] != self._more:
            raise ValueError("refers to something outside of the pickle that is no storage")
        kind, name, count = key[1], key[2], key[4]
        dtype = _storage_dtype(kind) if isinstance(kind, Name) else None
        if dtype is None or not isinstance(name, str) or type(count) is not int or not _is_count(count):
            raise ValueError("refers to a storage in another way than torch does")
        storage = Storage(name, dtype, count * dtype.size)
        if self.storages.setdefault(name, storage) != storage:
            raise ValueError(f"storage {brief(name)} has two types or sizes")
        return storage


def _storage_dtype(kind: Name) -> Dtype | None:
    if kind == _UNTYPED:
        return Dtype("U8", 1)
    return _STORAGES.get(kind.name) if kind.module in ("torch", "torch.cuda") else None


def _dtype(name: Name) -> Dtype | None:
    return _storage_dtype(name) or (_DTYPES.get(name.name) if name.module == "torch" else None)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _counts(value: object) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > MAX_DIMS or not all(map(_is_count, value)):
        raise TypeError
    return value


# --- functions, each given its arguments -----------------------------------------------------------------------------


def _ordered_dict(arguments: tuple[object, ...], spend: Callable[[int], None]) -> object:
    spend(CONTAINER)
    table = Table()
    if arguments:
        (pairs,) = arguments  # Python 2: a list of lists
        if not isinstance(pairs, list):
            raise TypeError
        spend(len(pairs))
        for pair in pairs:
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise TypeError
            table.set(*pair)
    return table


def _size(arguments: tuple[object, ...], spend: Callable[[int], None]) -> object:
    (dims,) = arguments
    if not isinstance(dims, list | tuple) or len(dims) > MAX_DIMS:
        raise TypeError
    return _counts(tuple(dims))


def _rebuild_tensor(arguments: tuple[object, ...], spend: Callable[[int], None]) -> object:
    storage, offset, shape, stride = arguments
    return _tensor(spend, storage, None, offset, shape, stride)


def _rebuild_tensor_v2(arguments: tuple[object, ...], spend: Callable[[int], None]) -> object:
    storage, offset, shape, stride, _, _, *metadata = arguments
    return _tensor(spend, storage, None, offset, shape, stride, *metadata)


def _rebuild_tensor_v3(arguments: tuple[object, ...], spend: Callable[[int], None]) -> object:
    storage, offset, shape, stride, _, _, dtype, *metadata = arguments
    if not isinstance(dtype, Name) or dtype.module != "torch" or dtype.name not in _DTYPES:
        raise TypeError
    return _tensor(spend, storage, _DTYPES[dtype.name], offset, shape, stride, *metadata)


def _tensor(
    spend: Callable[[int], None],
    storage: object,
    dtype: Dtype | None,
    offset: object,
    shape: object,
    stride: object,
    metadata: object = None,
) -> Tensor:
    if not isinstance(storage, Storage) or type(offset) is not int or not _is_count(offset):
        raise TypeError
    dims, strides = _counts(shape), _counts(stride)
    if len(dims) != len(strides):
        raise TypeError
    spend(len(dims) // _FEW_DIMS)
    return Tensor(storage, dtype or storage.dtype, offset, dims, strides, _problem(metadata))


def _problem(metadata: object) -> str:
    """Of constant size and cost: a million tensors may have the same metadata."""
    if not isinstance(metadata, Table):
        return ""
    if len(metadata.items) > len(_LAZY) or not _LAZY.keys() >= metadata.items.keys():
        raise TypeError
    return next((text for bit, text in _LAZY.items() if metadata.items.get(bit, False) is not False), "")


def _parameter(arguments: tuple[object, ...], spend: Callable[[int], None]) -> object:
    """What it wraps: whether a gradient is wanted is of no interest."""
    return arguments[0]


_FUNCTIONS: dict[Name, Callable[[tuple[object, ...], Callable[[int], None]], object]] = {
    Name("collections", "OrderedDict"): _ordered_dict,
    Name("torch", "Size"): _size,
    Name("torch.nn.parameter", "Parameter"): _parameter,
    Name(_UTILS, "_rebuild_tensor"): _rebuild_tensor,
    Name(_UTILS, "_rebuild_tensor_v2"): _rebuild_tensor_v2,
    Name(_UTILS, "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    Name(_UTILS, "_rebuild_parameter"): _parameter,
    Name(_UTILS, "_rebuild_parameter_with_state"): _parameter,
}
