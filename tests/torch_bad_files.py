"""Hostile and broken torch checkpoints, each with the reason that its refusal must name."""

import struct

from tests.torch_files import (
    NO_HOOKS,
    ONE,
    UTILS,
    Record,
    archive,
    call,
    changed,
    legacy,
    many,
    name,
    number,
    numbers,
    pickled,
    records,
    storage,
    string,
    table,
    tensor,
    zipped,
)

SYSTEM = name("posix", "system")
FLOAT = name("torch", "FloatStorage")
COMMAND = string("touch marker")
KEYS = b"](" + string("0") + b"e"
META = b"\x89" + NO_HOOKS  # no gradient, no hooks


def of(kind: str, count: int = 2) -> bytes:
    return tensor([1], [1], 0, storage("0", count, name("torch", kind)))


def lazy(bit: str) -> bytes:
    return tensor([4], [1], 0, None, table({"conj": b"\x89", "neg": b"\x89"} | {bit: b"\x88"}))


# What a pickle may not say, whichever container it is in. Values are bodies.
BODIES = {
    "os.system": (table({"a": tensor(), "b": call(name("os", "system"), COMMAND)}), "refers to os.system"),
    "posix.system": (call(SYSTEM, COMMAND), "refers to posix.system"),
    "named, not called": (table({"a": tensor(), "b": SYSTEM}), "refers to posix.system"),
    "dropped at once": (SYSTEM + b"0" + table({"a": tensor()}), "refers to posix.system"),
    "by way of the memo": (SYSTEM + b"q\1" + b"0h\1" + many(COMMAND) + b"R", "refers to posix.system"),
    "eval": (call(name("builtins", "eval"), string("1")), "refers to builtins.eval"),
    "eval of Python 2": (call(name("__builtin__", "eval"), string("1")), "refers to builtins.eval"),
    "getattr": (call(name("builtins", "getattr"), NO_HOOKS, string("a")), "refers to builtins.getattr"),
    "name on the stack": (string("os") + string("system") + b"\x93" + many(COMMAND) + b"R", "refers to os.system"),
    "a path in the name": (name("torch", "Size.__init__"), "refers to torch.Size.__init__"),
    "a close name": (name("torch._utils", "_rebuild_tensor_v4"), "refers to torch._utils._rebuild_tensor_v4"),
    "a loader of bytes": (name("torch.storage", "_load_from_bytes"), "refers to torch.storage._load_from_bytes"),
    "a class of its own": (name("__main__", "Model") + b")\x81", "refers to __main__.Model"),
    "called through torch": (
        call(name("torch._tensor", "_rebuild_from_type_v2"), SYSTEM, NO_HOOKS, many(COMMAND), b"N"), "posix.system"
    ),
    "instance": (b"(" + COMMAND + b"iposix\nsystem\n", "opcode b'i'"),
    "object": (b"(" + SYSTEM + COMMAND + b"o", "refers to posix.system"),
    "extension registry": (b"\x82\1", "opcode b'\\x82'"),
    "text number": (b"I1\n", "opcode b'I'"),
    "buffer out of band": (b"\x97", "opcode b'\\x97'"),
    "persistent id of text": (b"P1\n", "opcode b'P'"),
    "module as persistent id": (many(string("module"), b"N", b"N", b"N") + b"Q", "no storage"),
    "persistent id without anything": (b")Q", "no storage"),
    "calls text": (string("system") + many() + b"R", "no function"),
    "calls a tensor": (tensor() + many() + b"R", "no function"),
    "arguments are no tuple": (name("collections", "OrderedDict") + b"]R", "no function"),
    "empty stack": (b"0", "not there"),
    "stops with nothing": (b"", "not there"),
    "stops at a mark": (b"N(", "a mark for a value"),
    "no mark": (b"t", "not there"),
    "memo never filled": (b"h\7", "not there"),
    "appends to a tuple": (b")Na", "no list"),
    "sets items of a list": (b"]" + string("a") + b"Ns", "no dictionary"),
    "odd number of items": (b"}(" + string("a") + b"u", "no dictionary"),
    "adds to a list": (b"](N\x90", "no set"),
    "state of a tensor": (tensor() + b"Nb", "a state"),
    "protocol 9": (b"\x80\x09N", "protocol 9"),
    "name without end": (b"c" + b"a" * 5000, "more than 1024 bytes"),
    "key is no text": (table({"a\udc80": tensor()}), "utf-8"),
    "number as a name": (b"}K\7" + tensor() + b"s" + string("a") + tensor() + b"s", "under a key that is no text"),
    "no dictionary": (b"N", "no dictionary of tensors"),
    "a tensor alone": (tensor(), "no dictionary of tensors"),
    "nothing named": (table({"epoch": b"K\1"}), "names no tensors"),
    "nothing named inside": (table({"state_dict": b"}", "a": tensor()}), "names no tensors"),
    "past its storage": (table({"a": tensor([5])}), "tensor 'a' of shape (5,) reaches past its storage of 16 bytes"),
    "past by offset": (table({"a": tensor([4], [1], 1)}), "reaches past"),
    "past by stride": (table({"a": tensor([2], [4])}), "reaches past"),
    "past by a huge stride": (table({"a": tensor([2, 2], [2**62, 1])}), "reaches past"),
    "past by a huge offset": (table({"a": tensor([1], [1], 2**63 - 1)}), "reaches past"),
    "expanded beyond measure": (table({"a": tensor([2**60], [0])}), "when written out"),
    "negative stride": (table({"a": tensor([2], [-1], 1)}), "other arguments"),
    "negative dim": (table({"a": tensor([-1])}), "other arguments"),
    "negative offset": (table({"a": tensor([1], [1], -1)}), "other arguments"),
    "dim past 64 bits": (table({"a": tensor([2**64])}), "other arguments"),
    "dim is a bool": (table({"a": tensor()}).replace(numbers([4]), many(b"\x88")), "other arguments"),
    "65 dims": (table({"a": tensor([1] * 65, [1] * 65)}), "other arguments"),
    "dims without strides": (table({"a": tensor([4], [])}), "other arguments"),
    "tensor of no storage": (table({"a": tensor(of=b"N")}), "other arguments"),
    "too few arguments": (call(name(UTILS, "_rebuild_tensor_v2"), storage()), "other arguments"),
    "negative storage": (table({"a": tensor(of=storage(count=-4))}), "another way"),
    "storage of no type": (table({"a": tensor(of=storage(kind=name("torch", "device")))}), "another way"),
    "view of a storage": (table({"a": tensor(of=storage("0", 4, FLOAT, many()))}), "no storage"),
    "storage of two types": (table({"a": tensor(), "b": of("IntStorage", 4)}), "storage '0' has two types"),
    "storage of two sizes": (table({"a": tensor(), "b": of("FloatStorage", 3)}), "storage '0' has two types or sizes"),
    "conjugated": (table({"a": lazy("conj")}), "tensor 'a' is a lazy 'conj'"),
    "negated": (table({"a": lazy("neg")}), "tensor 'a' is a lazy 'neg'"),
    "complex128": (table({"a": of("ComplexDoubleStorage", 1)}), "a type that"),
    "quantized": (table({"a": call(name(UTILS, "_rebuild_qtensor"), b"N")}), "'a' is made by torch._utils._rebuild_q"),
    "sparse": (table({"a": call(name(UTILS, "_rebuild_sparse_tensor"), b"N")}), "_rebuild_sparse_tensor"),
    "of another type": (
        table({"a": call(name(UTILS, "_rebuild_tensor_v3"), storage(), number(0), numbers([1]), numbers([1]), META[:1],
                         NO_HOOKS, name("torch", "float4_e2m1fn_x2"))}), "a type that"
    ),
    "memo of 2^32": (b"Nr\xff\xff\xff\xff", "no dictionary of tensors"),
    "string of 2^32": (b"X\xff\xff\xff\xff", "value of 4294967295 bytes"),
    "string of 2^63": (b"\x8d" + b"\xff" * 8, "value of 18446744073709551615 bytes"),
    "number of 2^32 bytes": (b"\x8b\xff\xff\xff\xff", "value of 4294967295 bytes"),
}  # fmt: skip

ZIPS = {
    "deflated pickle": (changed(0, method=8), "'archive/data.pkl' is deflated"),
    "deflated storage": (changed(2, method=8), "'archive/data/0' is deflated"),
    "deflated in the local header only": (changed(2, local_method=8), "contradicts the directory"),
    "packed by an unknown method": (changed(3, method=77), "compressed by method 77"),
    "encrypted": (changed(2, flags=1), "encrypted"),
    "two sizes": (changed(2, packed=12), "two sizes"),
    "two sizes, one in the local header": (changed(2, local_sizes=12), "contradicts the directory"),
    "duplicate pickle": (archive([*records(), Record(b"archive/data.pkl", ONE)]), "'archive/data.pkl' is there twice"),
    "duplicate storage": (archive([*records(), records()[2]]), "'archive/data/0' is there twice"),
    "another name in the local header": (changed(2, local_name=b"archive/data/1"), "another local header"),
    "a longer name in the local header": (changed(2, local_name=b"archive/data/00"), "another local header"),
    "no local header": (changed(2, at=1), "overlaps what follows"),
    "two members at one place": (changed(3, at=0), "overlaps what follows"),
    "storage over the directory": (changed(3, size=2**31), "overlaps what follows"),
    "storage past the file": (changed(2, size=2**40, wide=True), "overlaps what follows"),
    "zip64 sizes missing": (changed(2, size=0xFFFFFFFF), "lacks its zip64 sizes"),
    "NUL in a name": (changed(3, name=b"archive/\0"), "no usable name"),
    "empty name": (changed(3, name=b""), "no usable name"),
    "name is no UTF-8": (changed(3, name=b"archive/\xff"), "utf-8"),
    "checksum of the pickle": (changed(0, crc=1), "does not have its checksum"),
    "comment": (archive(records(), comment=b"hello"), "end record"),
    "something behind": (zipped() + b"\0", "end record"),
    "truncated by one": (zipped()[:-1], "end record"),
    "truncated in the middle": (zipped()[: len(zipped()) // 2], "end record"),
    "end record only": (b"PK\3\4" + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, 46, 0, 0), "does not end at"),
    "directory elsewhere": (archive(records(), start=10), "does not end at"),
    "directory past the file": (archive(records(), start=2**31), "does not end at"),
    "bytes between directory and end": (archive(records(), left=bytes(4)), "4 bytes left"),
    "one member more than there is": (archive(records(), count=5), "in the middle of a member"),
    "one member less": (archive(records(), count=3), "bytes left"),
    "2^40 members": (archive(records(), count=0xFFFF, wide_count=2**40), "1099511627776 members"),
    "two counts": (archive(records(), wide_count=3), "contradict each other"),
    "locator points elsewhere": (archive(records(), locator=0), "locator points at 0"),
    "no pickle": (archive(records()[1:]), "not one of torch"),
    "no members": (b"PK\3\4" + archive([], zip64=False, start=4), "not one of torch"),
    "two roots": (archive([*records(), Record(b"other/data.pkl", ONE)]), "not one of torch"),
    "TorchScript": (archive([*records(), Record(b"archive/constants.pkl", ONE)]), "TorchScript"),
    "TorchScript code": (archive([*records(), Record(b"archive/code/a.py", b"")]), "TorchScript"),
    "big-endian": (zipped(order=b"big"), "byte order 'big'"),
    "no known byte order": (zipped(order=b"middle"), "byte order 'middle'"),
    "storage missing": (zipped(storages={}), "storage '0' is missing"),
    "storage too short": (zipped(storages={"0": bytes(12)}), "storage '0' has 12 bytes, not 16"),
    "storage too long": (zipped(storages={"0": bytes(20)}), "storage '0' has 20 bytes, not 16"),
    "pickle cut short": (zipped(ONE[:-1]), "its pickle is truncated"),
    "two pickles": (zipped(ONE + ONE), "pickle ends at"),
    "gap behind the pickle": (
        archive([records()[0], Record(b"archive/gap", bytes(200_000), listed=False), *records()[1:]]), "takes 200"
    ),
}  # fmt: skip

LEGACY = {
    "another magic": (legacy(magic=7), "not one of torch"),
    "another protocol": (legacy(protocol=1000), "unknown version"),
    "big-endian": (legacy(little=b"\x89"), "big-endian"),
    "endianness unknown": (legacy(little=b"N"), "big-endian"),
    "a bare pickle": (ONE, "where it should only describe itself"),
    "a pickle of text": (pickled(string("hi")), "not one of torch"),
    "code in the magic": (pickled(call(SYSTEM, COMMAND)), "refers to posix.system"),
    "code in the keys": (legacy().replace(pickled(KEYS), pickled(call(SYSTEM, COMMAND))), "refers to posix.system"),
    "truncated by one": (legacy()[:-1], "is truncated"),
    "truncated in the pickles": (legacy()[:60], "are truncated"),
    "something behind": (legacy() + b"\0", "goes on behind"),
    "storage not listed": (legacy(keys=[]), "list of storages"),
    "storage listed twice": (legacy(keys=["0", "0"]), "list of storages"),
    "unknown storage listed": (legacy(keys=["0", "1"]), "list of storages"),
    "storages too short": (legacy(storages={"0": bytes(12)}), "is truncated"),
}  # fmt: skip

OTHER = {
    "empty": (b"", "is empty"),
    "text": (b"hello world", "neither as a zip file nor as a pickle"),
    "a pointer of git LFS": (b"version https://git-lfs.github.com/spec/v1\n", "neither as a zip file nor as a pickle"),
    "a pickle of protocol 0": (b"I1\n.", "neither as a zip file nor as a pickle"),
    "tar": (b"storages" + bytes(249) + b"ustar\x0000" + bytes(248), "is a tar file"),
    "four bytes of a zip": (b"PK\3\4", "too few"),
}  # fmt: skip
