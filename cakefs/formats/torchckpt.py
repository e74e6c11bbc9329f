"""torch checkpoints (`torch.save`): which bytes of the file are which tensor, found without unpickling. Pure.

Two containers: the zip archive (torch 1.6 and later), with a pickle and one member a storage; and the one before it,
five pickles and then the storages, each with its length in front. Either way a tensor is a strided view of a storage.
What is found equals what `torch.load(weights_only=True)` loads, and what it refuses is refused, but for a length in
front of a storage that is not the pickle's: to look at each would take a request. Refused is also, by name, what cannot
be shown exactly as safetensors: sparse, quantized and lazy tensors, types that safetensors lacks, tensors without a
name, big-endian files, TorchScript archives, the tar files of before 0.1.10; and what two readers could take for two
things: members that are packed, repeated, overlapping or at odds with the directory, anything behind the end, a storage
of two types or sizes.
"""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

from cakefs.errors import InvalidFormat
from cakefs.formats import ziptoc
from cakefs.formats.pickleops import PICKLE_LIMIT, Name, Opaque, Short, Table, walk
from cakefs.formats.steps import Steps
from cakefs.formats.strictjson import brief
from cakefs.formats.torchpickle import Storage, Tensor, TorchMeaning
from cakefs.model import KIB, ByteRange

_HEAD = 512
_SLACK = 128 * KIB  # Bytes that a member may have around its data.
_FIRST_LOOK = 64 * KIB
_MAX_TENSOR = 1 << 44  # Bytes of a tensor: expanded views can claim any size.
_NAME = re.compile(
    r"(?P<directory>(?:.*/)?)(?P<stem>pytorch_model|diffusion_pytorch_model|adapter_model)"
    r"(?:(?P<variant>\.[^/.]+)?\.bin|\.bin\.index(?P<index_variant>\.[^/.]+)?\.json)",
    re.DOTALL,
)
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


class TensorView(NamedTuple):
    """One tensor.

    Attributes:
        dtype: As safetensors spells it.
        offset: Of the first element in its storage, in elements, as `stride` is.
        item: Bytes of an element.
        storage: Key of `Checkpoint.storages`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    item: int
    storage: str

    @property
    def size(self) -> int:
        """In bytes, as a file of its own."""
        return math.prod(self.shape) * self.item

    @property
    def contiguous(self) -> bool:
        """Whether its elements follow each other in the storage: then it is `size` bytes from `offset * item` on."""
        if 0 in self.shape:
            return True
        expected = 1
        for length, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if length != 1 and step != expected:
                return False
            expected *= length
        return True


class Checkpoint(NamedTuple):
    """What a file holds.

    Attributes:
        tensors: In the order of the dictionary that names them.
        storages: Where the bytes of each storage are, by key; none overlap, and every tensor's is there.
        skipped: Names in the dictionary that stand for no tensor.
    """

    tensors: tuple[TensorView, ...]
    storages: dict[str, ByteRange]
    skipped: tuple[str, ...]


def shown_as(path: str) -> str | None:
    """The safetensors file that loaders look for in the place of a checkpoint or of an index of some, by its name.

    None for any other file: `training_args.bin` or `optimizer.pt` are no weights.
    """
    match = _NAME.fullmatch(path)
    if match is None:
        return None
    stem = "model" if match["stem"] == "pytorch_model" else match["stem"]
    return f"{match['directory']}{stem}{match['variant'] or match['index_variant'] or ''}.safetensors"


def is_index(path: str) -> bool:
    """Whether a file is named as the index of a sharded checkpoint, which is read as one of safetensors is."""
    return path.endswith(".json") and shown_as(path) is not None


def read_checkpoint(file_size: int, path: str) -> Steps[Checkpoint]:
    """Reads what is needed to place every tensor: some kilobytes, and 100 bytes or so a storage.

    Raises InvalidFormat, naming `path`.
    """
    if not file_size:
        raise InvalidFormat(f"checkpoint {path}: is empty")
    head, tail = yield [ByteRange(0, min(_HEAD, file_size)), ziptoc.tail_range(file_size)]
    if head.startswith(ziptoc.MAGIC):
        return (yield from _read_zip(tail, file_size, path))
    if head[257:262] == b"ustar":
        raise InvalidFormat(f"checkpoint {path}: is a tar file, as torch wrote them before 0.1.10")
    if not head.startswith(b"\x80"):
        raise InvalidFormat(f"checkpoint {path}: begins neither as a zip file nor as a pickle")
    return (yield from _read_legacy(head, file_size, path))


# --- zip --------------------------------------------------------------------------------------------------------------


def _read_zip(tail: bytes, file_size: int, path: str) -> Steps[Checkpoint]:
    members = yield from ziptoc.read_directory(tail, file_size, path)
    root = _root(members, path)
    small = [members[n] for n in (f"{root}data.pkl", f"{root}byteorder") if n in members]
    for member in small:
        if member.whole.size > member.size + _SLACK or member.size > PICKLE_LIMIT:
            raise InvalidFormat(f"archive {path}: {brief(member.name)} takes {member.whole.size} bytes")
    contents = yield [member.whole for member in small]
    pickle, *order = (ziptoc.content(m, data, path) for m, data in zip(small, contents, strict=True))
    if order and order != [b"little"]:
        raise InvalidFormat(f"checkpoint {path}: byte order {brief(order[0].decode(errors='replace'))} is not little")
    tensors, skipped, found = _parse_pickle(pickle, path)
    stored = {key: _storage_member(storage, members, root, path) for key, storage in found.items()}
    used = {tensor.storage: stored[tensor.storage] for tensor in tensors}
    filled = [member for member in used.values() if member.size]
    local = (yield [member.local for member in filled]) if filled else []
    starts = {m.name: ziptoc.data_start(m, data, path) for m, data in zip(filled, local, strict=True)}
    places = {k: ByteRange(start := starts.get(m.name, 0), start + m.size) for k, m in used.items()}
    return Checkpoint(tensors, places, skipped)


def _root(members: Iterable[str], path: str) -> str:
    """The directory that everything is in, with its slash."""
    names = list(members)
    root = names[0].partition("/")[0] + "/" if names else "/"
    if f"{root}data.pkl" not in names or not all(name.startswith(root) for name in names):
        raise InvalidFormat(f"checkpoint {path}: is a zip file, but not one of torch")
    if any(name == f"{root}constants.pkl" or name.startswith(f"{root}code/") for name in names):
        raise InvalidFormat(f"checkpoint {path}: is a TorchScript archive, which is a program")
    return root


def _parse_pickle(data: bytes, path: str) -> tuple[tuple[TensorView, ...], tuple[str, ...], dict[str, Storage]]:
    meaning = TorchMeaning()
    try:
        value, stop = walk(data, 0, meaning)
        if stop != len(data):
            raise ValueError(f"pickle ends at byte {stop} of {len(data)}")
        tensors, skipped = _weights(value)
    except Short:
        raise InvalidFormat(f"checkpoint {path}: its pickle is truncated") from None
    except ValueError as error:
        raise InvalidFormat(f"checkpoint {path}: {error}") from error
    return tensors, skipped, meaning.storages


def _storage_member(storage: Storage, members: dict[str, ziptoc.Member], root: str, path: str) -> ziptoc.Member:
    member = members.get(f"{root}data/{storage.key}")
    if member is None:
        raise InvalidFormat(f"checkpoint {path}: storage {brief(storage.key)} is missing")
    if member.size != storage.size:
        raise InvalidFormat(
            f"checkpoint {path}: storage {brief(storage.key)} has {member.size} bytes, not {storage.size}"
        )
    return member


# --- before zip -------------------------------------------------------------------------------------------------------


def _read_legacy(head: bytes, file_size: int, path: str) -> Steps[Checkpoint]:
    """Doubles what it has looked at until the five pickles are complete."""
    data, stop = head, min(_FIRST_LOOK, file_size)
    while True:
        if stop > len(data):
            (more,) = yield [ByteRange(len(data), stop)]
            data += more
        try:
            return _parse_legacy(data, file_size)
        except Short as short:
            if short.size > file_size:
                raise InvalidFormat(f"checkpoint {path}: its pickles are truncated") from None
            stop = min(max(short.size, 2 * len(data)), file_size)
        except ValueError as error:
            raise InvalidFormat(f"checkpoint {path}: {error}") from error


def _parse_legacy(data: bytes, file_size: int) -> Checkpoint:
    """Raises Short where data ends before the storages begin, ValueError for anything wrong."""
    plain = _PlainMeaning()
    magic, at = walk(data, 0, plain)
    if type(magic) is not int or magic != _LEGACY_MAGIC:
        raise ValueError("is a pickle, but not one of torch")
    protocol, at = walk(data, at, plain)
    if type(protocol) is not int or protocol != _LEGACY_PROTOCOL:
        raise ValueError("is of an unknown version of torch's old format")
    system, at = walk(data, at, plain)
    if not isinstance(system, Table) or system.items.get("little_endian") is not True:
        raise ValueError("is big-endian")
    meaning = TorchMeaning(legacy=True)
    value, at = walk(data, at, meaning)
    keys, at = walk(data, at, plain)
    tensors, skipped = _weights(value)
    return Checkpoint(tensors, _place(keys, meaning.storages, at, file_size), skipped)


def _place(keys: object, storages: dict[str, Storage], at: int, file_size: int) -> dict[str, ByteRange]:
    """Storages follow each other in the order of the keys, each with its number of elements in front."""
    places: dict[str, ByteRange] = {}
    for key in keys if isinstance(keys, list) else [None]:
        if not isinstance(key, str) or key not in storages or key in places:
            raise ValueError("list of storages does not fit what the tensors refer to")
        places[key] = ByteRange(at + 8, at + 8 + storages[key].size)
        at = places[key].stop
    if len(places) != len(storages):
        raise ValueError("list of storages does not fit what the tensors refer to")
    if at != file_size:
        what = "is truncated" if at > file_size else "goes on behind its last storage"
        raise ValueError(f"{what}: {file_size} bytes, not {at}")
    return places


class _PlainMeaning:
    """Of pickles that hold plain data only."""

    def find(self, name: Name) -> object:
        raise ValueError(f"refers to {name} where it should only describe itself")

    def call(self, function: Name, arguments: object, spend: object) -> object:
        raise AssertionError  # nothing to call is ever found

    def load(self, key: object) -> object:
        raise ValueError("refers to a storage where it should only describe itself")


# --- both -------------------------------------------------------------------------------------------------------------


def _weights(value: object) -> tuple[tuple[TensorView, ...], tuple[str, ...]]:
    """The named tensors of a state dict, or of the one under `state_dict`, and the names of the rest."""
    if not isinstance(value, Table):
        raise ValueError("holds no dictionary of tensors")
    inner = value.items.get("state_dict")
    table = inner if isinstance(inner, Table) else value
    if any(isinstance(item, Tensor) for item in table.unnamed):
        raise ValueError("has a tensor under a key that is no text")
    tensors: list[TensorView] = []
    skipped: list[str] = [name for name in value.items if table is not value and name != "state_dict"]
    for name, item in table.items.items():
        if isinstance(item, Tensor):
            tensors.append(_view(name, item))
        elif isinstance(item, Opaque) and item.tensor:
            raise ValueError(f"{brief(name)} is {item.what}, which cannot be shown as a tensor")
        else:
            skipped.append(name)
    if not tensors:
        raise ValueError("names no tensors")
    return tuple(tensors), tuple(skipped)


def _view(name: str, tensor: Tensor) -> TensorView:
    """Raises ValueError, naming the tensor, unless every element is in its storage and can be shown."""
    storage, dtype, offset, shape, stride, problem = tensor
    if problem:
        raise ValueError(f"tensor {brief(name)} is {problem}")
    if not dtype.name:
        raise ValueError(f"tensor {brief(name)} has a type that safetensors does not have")
    if 0 not in shape:
        last = offset + sum((length - 1) * step for length, step in zip(shape, stride, strict=True))
        if (last + 1) * dtype.size > storage.size:
            raise ValueError(
                f"tensor {brief(name)} of shape {brief(shape)} reaches past its storage of {storage.size} bytes"
            )
    view = TensorView(name, dtype.name, shape, stride, offset, dtype.size, storage.key)
    if view.size > _MAX_TENSOR:
        raise ValueError(f"tensor {brief(name)} of shape {brief(shape)} takes {view.size} bytes when written out")
    return view
