"""`safetensors.safe_open` over the store: the same methods and the same tensors, each fetched when it is asked for."""

import os
from collections.abc import Sequence
from importlib import import_module
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from cakefs.api.cuts import Index, cut, rows
from cakefs.api.files import Run, StoredFile
from cakefs.api.places import find, plain
from cakefs.api.session import session
from cakefs.engine.serve.library import Library
from cakefs.errors import UserError
from cakefs.formats.safetensors import DTYPES, TensorEntry, header_size, parse_header
from cakefs.plan.view import WEIGHTS

NUMPY = {
    "BOOL": "bool", "U8": "u1", "I8": "i1", "U16": "u2", "I16": "i2", "F16": "f2", "U32": "u4", "I32": "i4",
    "F32": "f4", "U64": "u8", "I64": "i8", "F64": "f8", "C64": "c8",
}  # fmt: skip
TORCH = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "F16": "float16", "BF16": "bfloat16",
    "U32": "uint32", "I32": "int32", "F32": "float32", "U64": "uint64", "I64": "int64", "F64": "float64",
    "C64": "complex64", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
FRAMEWORKS = {"np": "np", "numpy": "np", "pt": "pt", "torch": "pt", "pytorch": "pt"}
Opened = TypeVar("Opened", bound="safe_open")


class safe_open:  # the name is that of safetensors
    """Tensors of a safetensors file of a model.

    Args:
        filename: `org/name` for its model.safetensors, or a path as `cakefs.open` takes it.
        framework: `np` or `pt`.
        device: Where torch puts the tensors.

    Raises:
        CakeError: There is no such file, or it is no safetensors file.
    """

    def __init__(self, filename: str | os.PathLike[str], framework: str = "np", device: str | int = "cpu") -> None:
        if framework not in FRAMEWORKS:
            raise UserError(f"framework {framework!r} is not known", hint="np or pt")
        self._device = device
        self._torch: Any = import_module("torch") if FRAMEWORKS[framework] == "pt" else None
        self._file = StoredFile(_weights(plain(os.fspath(filename))))
        try:
            self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self: Opened) -> Opened:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._file.close()

    def keys(self) -> list[str]:
        """Names of the tensors, sorted."""
        return sorted(self._entries)

    def offset_keys(self) -> list[str]:
        """Names of the tensors as they lie in the file."""
        return list(self._entries)

    def metadata(self) -> dict[str, str] | None:
        """`__metadata__` of the header."""
        return dict(self._metadata) or None

    def get_tensor(self, name: str) -> Any:
        """Raises UserError where there is none, or the framework has no such type."""
        return self.get_slice(name)[...]

    def get_tensors(self) -> dict[str, Any]:
        """All of them, in the order of the file. Raises UserError where the framework lacks the type of one."""
        return {name: self.get_tensor(name) for name in self.offset_keys()}

    def get_slice(self, name: str) -> "TensorSlice":
        """The tensor, to be indexed: only the bytes of what is taken are read."""
        entry = self._entries.get(name)
        if entry is None:
            raise UserError(f"no tensor {name!r} in {self._file.path}")
        return TensorSlice(self, entry)

    def read(self, entry: TensorEntry, bounds: Sequence[range]) -> Any:
        """The elements of a box of a tensor, as the framework has them."""
        dtype = self._dtype(entry)
        width, shape = DTYPES[entry.dtype].bits // 8, [len(bound) for bound in bounds]
        box = np.empty(shape, f"V{width}")
        slots = box.reshape(-1)
        for block in rows(bounds, entry.shape, width):
            per_row = block.last - block.first
            target = slots[block.slots[0] * per_row : block.slots[1] * per_row]
            data = target if block.whole else np.empty(len(block.offsets) * block.size, box.dtype)
            view, begin = data.view(np.uint8).data, self._data_start + entry.start
            self._file.read_into(
                Run(begin + offset * width, view[at * width : (at + size) * width]) for offset, at, size in block.runs()
            )
            if not block.whole:
                columns = data.reshape(-1, block.size)[:, block.first : block.last]
                target.reshape(-1, per_row)[:] = columns
        if self._torch is None:
            return box.view(dtype)
        if not box.size:
            return self._torch.empty(shape, dtype=dtype, device=self._device)
        return self._torch.from_numpy(slots.view(np.uint8)).view(dtype).reshape(shape).to(self._device)

    def _dtype(self, entry: TensorEntry) -> Any:
        name = (NUMPY if self._torch is None else TORCH).get(entry.dtype)
        if self._torch is None:
            if name is None:
                hint = "framework='pt'" if entry.dtype in TORCH else "cakefs.open gives the bytes"
                raise UserError(f"numpy has no {entry.dtype}, the type of {entry.name}", hint=hint)
            return np.dtype(name)
        found = getattr(self._torch, name, None) if name else None
        if found is None:
            raise UserError(f"this torch has no {entry.dtype}, the type of {entry.name}")
        return found

    def _read_header(self) -> None:
        size, path = self._file.size, self._file.path
        prefix = bytearray(min(8, size))
        self._file.read_into([Run(0, memoryview(prefix))])
        header = bytearray(min(header_size(bytes(prefix), path), size))
        self._file.read_into([Run(0, memoryview(header))])
        parsed = parse_header(bytes(header), size, path)
        self._entries = {entry.name: entry for entry in parsed.entries}
        self._metadata, self._data_start = parsed.metadata, parsed.size


class TensorSlice:
    """A tensor of which nothing was read yet."""

    def __init__(self, file: safe_open, entry: TensorEntry) -> None:
        self._file = file
        self._entry = entry

    def get_shape(self) -> list[int]:
        return list(self._entry.shape)

    def get_dtype(self) -> str:
        """As the file spells it, such as `BF16`."""
        return self._entry.dtype

    def __getitem__(self, index: Index | tuple[Index, ...]) -> Any:
        """Numbers, slices with a positive step, and `...`. Raises IndexError."""
        wanted = cut(index, self._entry.shape)
        box = self._file.read(self._entry, wanted.bounds)
        taken = box[wanted.final] if wanted.final else box
        return taken.contiguous() if hasattr(taken, "contiguous") else np.ascontiguousarray(taken).reshape(taken.shape)


def _weights(path: str) -> str:
    """The file that a path stands for: itself, or the model.safetensors of a model."""

    async def is_model(library: Library) -> bool:
        return not (await find(library, path)).inner

    return f"{path}/{WEIGHTS}" if not path.endswith(".safetensors") and session().call(is_model) else path
