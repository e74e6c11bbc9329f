"""torch checkpoints: every tensor where torch has it, nothing executed, every refusal with its reason."""

import io
import itertools
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cakefs.errors import InvalidFormat
from cakefs.formats.steps import run
from cakefs.formats.torchckpt import Checkpoint, TensorView, is_index, read_checkpoint, shown_as
from cakefs.formats.ziptoc import TAIL
from cakefs.model import ByteRange
from tests.torch_bad_files import BODIES, LEGACY, OTHER, ZIPS
from tests.torch_files import (
    NO_HOOKS,
    ONE,
    STORAGES,
    UTILS,
    Record,
    archive,
    call,
    changed,
    legacy,
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

CONTAINERS: dict[str, Callable[[bytes], bytes]] = {"zip": zipped, "legacy": legacy}


def read(file: bytes, asked: list[ByteRange] | None = None) -> Checkpoint:
    def fetch(part: ByteRange) -> bytes:
        assert 0 <= part.start < part.stop <= len(file)
        if asked is not None:
            asked.append(part)
        return file[part.start : part.stop]

    return run(read_checkpoint(len(file), "x.bin"), fetch)


def refusal(file: bytes) -> str:
    with pytest.raises(InvalidFormat) as caught:
        read(file)
    assert caught.value.message.startswith(("checkpoint x.bin: ", "archive x.bin: "))
    assert len(caught.value.message) < 300 and caught.value.message.isprintable()
    return caught.value.message


def gathered(file: bytes, checkpoint: Checkpoint, view: TensorView) -> bytes:
    """The tensor as a file of its own has it, element by element."""
    place = checkpoint.storages[view.storage]
    data = file[place.start : place.stop]
    starts = (
        (view.offset + sum(i * s for i, s in zip(index, view.stride, strict=True))) * view.item
        for index in itertools.product(*map(range, view.shape))
    )
    found = b"".join(data[start : start + view.item] for start in starts)
    if view.contiguous:
        assert found == data[view.offset * view.item :][: view.size]
    assert len(found) == view.size
    return found


def floats(file: bytes) -> dict[str, tuple[float, ...]]:
    found = read(file)
    return {v.name: struct.unpack(f"<{v.size // 4}f", gathered(file, found, v)) for v in found.tensors}


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_small_checkpoint(container: str) -> None:
    file = CONTAINERS[container](ONE)
    assert floats(file) == {"a": (1, 2, 3, 4)}
    assert read(file).tensors == (TensorView("a", "F32", (4,), (1,), 0, 4, "0"),)
    assert read(file).skipped == ()


@pytest.mark.parametrize("container", CONTAINERS)
def test_views_of_a_storage(container: str) -> None:
    views = {"all": tensor(), "tied": tensor(), "tail": tensor([2], [1], 2), "turned": tensor([2, 2], [1, 2])}
    views |= {"every other": tensor([2], [2], 1), "expanded": tensor([3], [0]), "scalar": tensor([], [], 3)}
    views |= {"empty": tensor([0, 7], [7, 1], 99), "row": tensor([1, 4], [9, 1])}
    file = CONTAINERS[container](pickled(table(views)))
    assert floats(file) == {
        "all": (1, 2, 3, 4), "tied": (1, 2, 3, 4), "tail": (3, 4), "turned": (1, 3, 2, 4), "every other": (2, 4),
        "expanded": (1, 1, 1), "scalar": (4,), "empty": (), "row": (1, 2, 3, 4),
    }  # fmt: skip
    strided = [v.name for v in read(file).tensors if not v.contiguous]
    assert strided == ["turned", "every other", "expanded"]


def test_other_ways_to_say_the_same() -> None:
    parameter = call(name(UTILS, "_rebuild_parameter"), tensor(), b"\x88", NO_HOOKS)
    stateful = call(name(UTILS, "_rebuild_parameter_with_state"), tensor(), b"\x88", NO_HOOKS, b"}")
    plain = call(name(UTILS, "_rebuild_tensor"), storage(), number(0), numbers([4]), numbers([1]))
    arguments = (storage(), number(0), call(name("torch", "Size"), numbers([4])), numbers([1]), b"\x89", NO_HOOKS)
    typed = call(
        name("torch._tensor", "_rebuild_from_type_v2"), name(UTILS, "_rebuild_tensor_v2"), name("torch", "Tensor"),
        b"(" + b"".join(arguments) + b"t", b"}",
    )  # fmt: skip
    metadata = tensor([4], [1], 0, None, table({"conj": b"\x89", "neg": b"\x89"}))
    cuda = tensor(of=storage(kind=name("torch.cuda", "FloatStorage")))
    bodies = [
        parameter,
        stateful,
        plain,
        typed,
        metadata,
        cuda,
        name("torch.nn.parameter", "Parameter") + b"(" + tensor() + b"\x88t\x81",
    ]
    names = {str(i): body for i, body in enumerate(bodies)}
    assert floats(zipped(pickled(table(names)))) == {n: (1, 2, 3, 4) for n in names}


def test_a_nested_state_dict_is_descended_into() -> None:
    inner = table({"a": tensor(), "step": b"K\7"})
    found = read(zipped(pickled(table({"state_dict": inner, "epoch": b"K\1", "best": tensor()}))))
    assert [t.name for t in found.tensors] == ["a"]
    assert found.skipped == ("epoch", "best", "step")


def test_what_is_no_tensor_is_skipped() -> None:
    others = {"none": b"N", "list": b"]", "text": string("x"), "real": b"G" + bytes(8), "set": b"\x8f", "table": b"}"}
    others |= {
        "bytes": call(name("_codecs", "encode"), string("x"), string("latin1")),
        "huge": b"\x8a\xff" + bytes(255),
    }
    others |= {"device": call(name("torch", "device"), string("cpu")), "dtype": name("torch", "float16")}
    found = read(zipped(pickled(table(others | {"a": tensor()}))))
    assert found.skipped == tuple(others)


def test_dictionaries_with_pairs_attributes_and_other_keys() -> None:
    pairs = b"](](" + string("a") + tensor() + b"ee"  # as Python 2 has it
    ordered = call(name("collections", "OrderedDict"), pairs)
    body = ordered + table({"_metadata": b"N"}) + b"b" + b"K\7Ns" + string("b") + tensor([1], [1], 3) + b"s"
    assert floats(zipped(pickled(body))) == {"a": (1, 2, 3, 4), "b": (4,)}


def test_the_last_of_two_equal_names_counts_as_in_a_dictionary() -> None:
    body = b"}(" + string("a") + tensor() + string("a") + tensor([1], [1], 1) + b"u"
    assert floats(zipped(pickled(body))) == {"a": (2,)}


def test_protocols() -> None:
    newer = table({"a": tensor()}).replace(b"X\1\0\0\0a", b"\x8c\1a\x94")
    for protocol in (3, 4, 5):
        frame = b"\x95" + struct.pack("<Q", len(newer) + 1)
        assert floats(zipped(b"\x80" + bytes([protocol]) + frame + newer + b".")) == {"a": (1, 2, 3, 4)}


def test_archives_that_torch_would_read_too() -> None:
    good = {"a": (1, 2, 3, 4)}
    assert floats(zipped(order=None)) == good  # before 2.1
    assert floats(archive(records(), zip64=False)) == good
    assert floats(changed(2, wide=True)) == good
    assert floats(changed(2, local_sizes=16)) == good
    assert floats(changed(2, local_sizes=0xFFFFFFFF)) == good
    assert floats(changed(2, padding=5000)) == good
    assert floats(archive(list(reversed(records())))) == good
    many = [Record(b"archive/.data/%d" % i, b"") for i in range(1000)]
    assert floats(archive([*records(), *many])) == good  # a directory longer than the first look


def test_a_storage_without_bytes_takes_none() -> None:
    empty = tensor([0], [1], 0, storage(count=0))
    file = zipped(pickled(table({"a": empty})), {"0": b""})
    assert floats(file) == {"a": ()}
    assert read(file).storages == {"0": ByteRange(0, 0)}


def test_only_what_is_needed_is_read() -> None:
    """Of a zip file: two ends, pickle and byte order, a local header for each storage; of the old one its pickles."""
    weights = {"0": bytes(200_000), "1": bytes(400_000)}
    views = {"a": tensor([50_000], [1], 0, storage("0", 50_000)), "b": tensor([7], [1], 9, storage("1", 100_000))}
    asked: list[ByteRange] = []
    read(zipped(pickled(table(views)), weights), asked)
    assert len(asked) == 6 and sum(part.size for part in asked) < TAIL + 3000
    asked = []
    read(legacy(pickled(table(views)), weights), asked)
    assert max(part.stop for part in asked if part.stop < 600_000) < 70_000


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that a command of a hostile pickle would make."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "marker"


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("case", BODIES)
def test_a_hostile_pickle_is_refused_and_not_run(case: str, container: str, marker: Path) -> None:
    body, reason = BODIES[case]
    assert reason in refusal(CONTAINERS[container](pickled(body)))
    assert not marker.exists()


class Touch:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("marker"),)


class System:
    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, ("touch marker",)


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("container", CONTAINERS)
def test_a_pickle_that_python_would_run_is_not(protocol: int, container: str, marker: Path) -> None:
    hostile = pickle.dumps({"a": System()}, protocol)
    subprocess.run(
        [sys.executable, "-c", "import pickle, sys; pickle.load(sys.stdin.buffer)"], input=hostile, check=True
    )
    assert marker.exists()  # or the test would prove nothing
    marker.unlink()
    assert "refers to posix.system" in refusal(CONTAINERS[container](hostile))
    assert "refers to" in refusal(CONTAINERS[container](pickle.dumps(Touch(), protocol)))
    assert not marker.exists()


@pytest.mark.parametrize("case", ZIPS)
def test_a_bad_archive_is_refused(case: str) -> None:
    file, reason = ZIPS[case]
    assert reason in refusal(file)


@pytest.mark.parametrize("case", LEGACY)
def test_a_bad_old_file_is_refused(case: str) -> None:
    file, reason = LEGACY[case]
    assert reason in refusal(file)


@pytest.mark.parametrize("case", OTHER)
def test_any_other_file_is_refused(case: str) -> None:
    file, reason = OTHER[case]
    assert reason in refusal(file)


@pytest.mark.parametrize("container", CONTAINERS)
def test_truncation_anywhere_is_refused(container: str) -> None:
    file = CONTAINERS[container](ONE)
    assert all(refusal(file[:size]) for size in range(len(file)))


@pytest.mark.parametrize("container", CONTAINERS)
def test_no_bit_flip_leads_outside_of_the_file(container: str) -> None:
    file = CONTAINERS[container](ONE)
    for position in range(len(file)):
        for bit in (1, 0x80):
            bad = bytearray(file)
            bad[position] ^= bit
            try:
                found = read(bytes(bad))
            except InvalidFormat:
                continue
            assert all(place.stop <= len(file) for place in found.storages.values())


# --- memory -----------------------------------------------------------------------------------------------------------

BOMBS = {
    "9 bytes that cost CPython 8 GB": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "text of 4 GB": pickled(b"X\xff\xff\xff\xff"),
    "text of 2^63": pickled(b"\x8d" + b"\xff" * 7 + b"\x7f"),
    "bytes of 16 MB": pickled(b"B\0\0\0\1"),
    "number of 2 GB": pickled(b"\x8b\xff\xff\xff\x7f"),
    "tuples of the same": pickled(b"N" + b"2\x86" * 10_000 + b"2\x87"),
    "lists of the same": pickled(b"]q\0" + b"h\0a" * 10_000),
    "a dictionary in itself": pickled(b"}q\0" + string("a") + b"h\0s"),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("case", BOMBS)
def test_a_bomb_costs_nothing(case: str, container: str) -> None:
    file = CONTAINERS[container](BOMBS[case])
    tracemalloc.start()
    try:
        refusal(file)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


FLOODS = {
    "dictionaries": "b'](' + b'}' * 900_000 + b'e' + b'](' + b'}' * 900_000 + b'e'",
    "stack": "b'N' * 2_000_000",
    "one list many times": "b'](' + b'N' * 900_000 + b'eq\\0' + b'ccollections\\nOrderedDict\\n(h\\0tR' * 100_000",
    "one tensor of many dims": "DIMS + b'h\\1h\\2R0' * 900_000",
    "one tensor that is lazy in many ways": "LAZY + b'h\\1h\\2R' * 300",
}

CHILD = """
import resource, sys
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
from cakefs.errors import InvalidFormat
from cakefs.formats.pickleops import walk
from cakefs.formats.torchpickle import TorchMeaning
from tests.torch_files import NO_HOOKS, UTILS, many, name, number, numbers, storage, table
def tensor(dims, *metadata):
    ones = numbers([1] * dims)
    arguments = many(storage(), number(0), ones, ones, b"\\x89", NO_HOOKS, *metadata)
    return name(UTILS, "_rebuild_tensor_v2") + b"q\\1" + arguments + b"q\\2"
DIMS = tensor(64)
LAZY = tensor(1, table({str(i): b"\\x88" for i in range(40_000)}))
data = b"\\x80\\x02" + FLOOD + b"."
try:
    walk(data, 0, TorchMeaning())
except ValueError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("case", FLOODS)
def test_a_flood_is_stopped(case: str) -> None:
    script = CHILD.replace("FLOOD", FLOODS[case])
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    reason, megabytes = done.stdout.splitlines()
    assert "more than" in reason or "other arguments" in reason
    assert int(megabytes) < 250


# --- names ------------------------------------------------------------------------------------------------------------


def test_which_files_are_weights() -> None:
    expected = {
        "pytorch_model.bin": "model.safetensors",
        "unet/diffusion_pytorch_model.fp16.bin": "unet/diffusion_pytorch_model.fp16.safetensors",
        "adapter_model.bin": "adapter_model.safetensors",
        "pytorch_model.bin.index.json": "model.safetensors",
        "a/pytorch_model.bin.index.fp16.json": "a/model.fp16.safetensors",
        "pytorch_model-00001-of-00002.bin": None,
        "training_args.bin": None,
        "optimizer.pt": None,
        "my_pytorch_model.bin": None,
        "model.safetensors.index.json": None,
    }
    assert {path: shown_as(path) for path in expected} == expected
    assert [path for path in expected if is_index(path)] == [
        p for p, t in expected.items() if t and p.endswith(".json")
    ]


def test_a_checkpoint_packed_again_by_python() -> None:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        for record in records():
            file.writestr(record.name.decode(), record.data)
    assert floats(data.getvalue()) == {"a": (1, 2, 3, 4)}
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as file:
        for record in records():
            file.writestr(record.name.decode(), record.data)
    assert "is deflated" in refusal(data.getvalue())
    assert STORAGES["0"] in zipped()
