"""Files and tensors of models in a Python program, without a mount: over a real hub."""

import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open as official_open

import cakefs
from cakefs.api.cuts import NEAR, cut, rows
from cakefs.cli.main import main
from cakefs.errors import CakeError, NotFound, RemoteUnavailable, UserError
from tests.hub import Hub
from tests.models import CONFIG, llama, sharded, single, tensor

WEIGHTS = "org/name/model.safetensors"
MODEL = llama(3, width=384)  # 7 MB
ROOT = Path(__file__).parent.parent
MIB = 1 << 20

Configure = Callable[..., None]


@pytest.fixture
def configure(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Configure]:
    """Sets what `cakefs` reads when it starts."""

    def write(**settings: str) -> None:
        lines = {"workers": "1", "read_timeout_s": "5.0"} | settings
        (tmp_path / "config.toml").write_text("".join(f"{k} = {v}\n" for k, v in lines.items()))

    write()
    monkeypatch.setenv("CAKEFS_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("CAKEFS_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    yield write
    cakefs.close()


@pytest.fixture
def added(hub: Hub, configure: Configure) -> Hub:
    hub.add_repo("org/name", sharded(MODEL, 2) | {"config.json": CONFIG, "sub/notes.txt": b"one\ntwo\n"})
    assert main(["add", "-q", "org/name"]) == 0
    hub.reset()
    return hub


def test_importing_cakefs_imports_nothing_else() -> None:
    code = "import cakefs, sys; print(sorted({m.split('.')[0] for m in sys.modules} & {'trio','numpy','lmdb','httpx'}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("[]\n", "")
    assert not hasattr(cakefs, "nonsense")


def test_a_file_is_what_the_mount_shows(added: Hub) -> None:
    data = single(MODEL)
    with cakefs.open(WEIGHTS) as file:
        assert (file.size, file.name, file.mode) == (len(data), WEIGHTS, "rb")
        assert file.readable() and file.seekable() and not file.writable()
        assert file.seek(2 * MIB + 5) == 2 * MIB + 5 and file.read(10) == data[2 * MIB + 5 :][:10]
        assert added.sent("*.safetensors") < len(data), "all of it was fetched for ten bytes"
        assert file.seek(-7, io.SEEK_END) == len(data) - 7 and file.read() == data[-7:] and file.read() == b""
        file.seek(len(data) + 100)
        assert file.read(5) == b""
        file.seek(0)
        buffer = bytearray(3 * MIB)
        assert file.readinto(buffer) == 3 * MIB and buffer == data[: 3 * MIB] and file.tell() == 3 * MIB
        file.seek(0)
        assert file.read() == data
        with pytest.raises(io.UnsupportedOperation):
            file.write(b"x")
    with pytest.raises(ValueError, match="closed"):
        file.read(1)
    with io.TextIOWrapper(cakefs.open("cakefs://org/name/sub/notes.txt")) as text:
        assert list(text) == ["one\n", "two\n"]
    with cakefs.open(Path(".cakefs/original/org/name/model-00001-of-00002.safetensors"), buffering=1) as file:
        assert file.read() == sharded(MODEL, 2)["model-00001-of-00002.safetensors"]


def test_what_was_read_needs_no_network_any_more(added: Hub) -> None:
    file = cakefs.open(WEIGHTS)
    assert file.read() == single(MODEL)
    added.down()
    file.seek(0)
    cakefs.close()
    assert file.read() == single(MODEL), "opens anew by itself"
    assert cakefs.open(WEIGHTS).read() == single(MODEL)


@pytest.mark.parametrize(
    ("path", "mode", "said"),
    [
        ("org/name/nix.json", "rb", "no file 'nix.json' in org/name"),
        ("org/name", "rb", "a directory"),
        ("nix", "rb", "no model here for 'nix'"),
        (WEIGHTS, "w", "read-only"),
    ],
)
def test_what_cannot_be_opened_is_told(added: Hub, path: str, mode: str, said: str) -> None:
    with pytest.raises(CakeError, match=said):
        cakefs.open(path, mode)


def test_a_model_that_nobody_added_is_added_where_a_mount_would(hub: Hub, configure: Configure) -> None:
    hub.add_repo("org/other", {"config.json": CONFIG})
    configure(on_demand="false")
    with pytest.raises(NotFound) as caught:
        cakefs.open("org/other/config.json")
    assert caught.value.hint == "cakefs add org/other"
    cakefs.close()
    configure()
    assert cakefs.open("org/other/config.json").read() == CONFIG
    with pytest.raises(NotFound, match="org/nobody"):
        cakefs.open("org/nobody/config.json")


def test_a_failure_of_the_network_is_the_error_that_the_mount_would_log(added: Hub, configure: Configure) -> None:
    configure(read_timeout_s="0.5")
    file = cakefs.open(WEIGHTS)
    added.down()
    file.seek(MIB)
    with pytest.raises(RemoteUnavailable):
        file.read(10)
    added.up()
    assert file.read(10) == single(MODEL)[MIB : MIB + 10]


def test_many_threads_read_at_once(added: Hub) -> None:
    data = single(MODEL)

    def read(number: int) -> bool:
        with cakefs.open(WEIGHTS) as file:
            file.seek(number * 700_000)
            return file.read(900_000) == data[number * 700_000 :][:900_000]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))


def test_ctrl_c_ends_a_read_that_stalls(added: Hub, configure: Configure) -> None:
    added.fault("stall", "*.safetensors", times=None)
    configure(read_timeout_s="60.0")
    file = cakefs.open(WEIGHTS)
    file.seek(MIB)
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        timer.start()
        file.read(10)
    timer.join()
    added.clear_faults()


FORK = """
import multiprocessing, sys
import cakefs
file = cakefs.open(sys.argv[1])
whole = file.read()

def child(offset):
    file.seek(offset)
    assert file.read(100) == whole[offset : offset + 100]
    with cakefs.safe_open("org/name") as tensors:
        return offset, len(tensors.keys())

for _ in range(2):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        print(pool.map(child, [0, 1_500_000]))
    file.seek(5)
    assert file.read(50) == whole[5:55]
"""


def test_children_of_a_fork_read_what_the_parent_opened(added: Hub) -> None:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK, WEIGHTS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert done.stderr == ""
    assert done.stdout == 2 * f"[(0, {len(MODEL)}), (1500000, {len(MODEL)})]\n"


def test_an_open_file_outlives_its_model(added: Hub) -> None:
    data = single(MODEL)
    file = cakefs.open(WEIGHTS)
    assert file.read(MIB) == data[:MIB]
    assert main(["rm", "-q", "org/name"]) == 0
    assert main(["gc", "-q"]) == 0
    assert file.read() == data[MIB:]


# --- tensors --------------------------------------------------------------------------------------------------------


def test_tensors_are_those_of_the_official_library(added: Hub, tmp_path: Path) -> None:
    path = tmp_path / "plain.safetensors"
    path.write_bytes(single(MODEL))
    with cakefs.safe_open("org/name") as ours, official_open(path, "np") as official:
        assert ours.keys() == sorted(official.keys())
        assert ours.offset_keys() == list(official.offset_keys())
        assert ours.metadata() == official.metadata() == {"format": "pt"}
        for name in official.keys():  # noqa: SIM118  # it is no mapping
            mine, theirs = ours.get_tensor(name), official.get_tensor(name)
            assert mine.dtype == theirs.dtype and np.array_equal(mine, theirs)
            assert ours.get_slice(name).get_shape() == official.get_slice(name).get_shape()
            assert ours.get_slice(name).get_dtype() == official.get_slice(name).get_dtype()
        every = ours.get_tensors()
        assert list(every) == ours.offset_keys() and all(np.array_equal(every[n], ours.get_tensor(n)) for n in every)
        assert {name for name in dir(official) if name[0] != "_"} <= set(dir(ours)), "a program may call any of these"
    with pytest.raises(ValueError, match="closed"):
        ours.get_tensor("model.norm.weight")


def test_a_tensor_is_fetched_when_it_is_asked_for(hub: Hub, configure: Configure) -> None:
    configure(readahead="false")
    model = {"a": tensor(1, 64, 65536), "b": tensor(2, 64, 65536)}  # 16 MiB each
    hub.add_repo("org/name", {"model.safetensors": single(model)})
    with cakefs.safe_open(WEIGHTS) as file:
        hub.reset()
        assert np.array_equal(file.get_slice("b")[3:5], model["b"][3:5])
        assert hub.sent("*.safetensors") <= 3 * MIB
        assert np.array_equal(file.get_tensor("b"), model["b"])
        assert hub.sent("*.safetensors") == 16 * MIB


def test_types_that_numpy_lacks_are_told_and_had_in_torch(hub: Hub, configure: Configure, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    kinds = ("bfloat16", "float16", "float32", "float64", "int64", "int8", "uint8", "bool", "complex64")
    kinds += ("float8_e4m3fn", "float8_e5m2", "uint16", "uint64")
    model = {kind: torch.arange(24).reshape(2, 3, 4).to(getattr(torch, kind)) for kind in kinds}
    model |= {"scalar": torch.tensor(2.5, dtype=torch.bfloat16), "empty": torch.empty(0, 3)}
    save_file(model, tmp_path / "model.safetensors")
    hub.add_repo("org/name", {"model.safetensors": tmp_path / "model.safetensors"})
    with cakefs.safe_open("org/name", framework="pt") as file:
        assert file.metadata() is None
        for name, expected in model.items():
            found = file.get_tensor(name)
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
            assert found.is_contiguous() and bytes(found.flatten().view(torch.uint8).numpy()) == bytes(
                expected.flatten().view(torch.uint8).numpy()
            )
        assert torch.equal(file.get_slice("bfloat16")[:, 1], model["bfloat16"][:, 1])
    with cakefs.safe_open("org/name", framework="np") as file:
        assert file.get_tensor("float16").dtype == np.float16
        with pytest.raises(UserError, match="numpy has no BF16, the type of scalar") as caught:
            file.get_tensor("scalar")
        assert "pt" in caught.value.hint
        with pytest.raises(UserError, match="no tensor 'nix'"):
            file.get_tensor("nix")
    with pytest.raises(UserError, match="framework 'jax'"):
        cakefs.safe_open("org/name", framework="jax")


def test_what_is_no_safetensors_file_is_told(added: Hub) -> None:
    with pytest.raises(CakeError, match=r"config\.json"):
        cakefs.safe_open("org/name/config.json")
    added.add_repo("org/empty", {"config.json": CONFIG})
    with pytest.raises(NotFound, match=r"no file 'model\.safetensors' in org/empty"):
        cakefs.safe_open("org/empty")


# --- indices --------------------------------------------------------------------------------------------------------

SHAPES = st.lists(st.integers(0, 6), max_size=4).map(tuple)


@st.composite
def indexed(draw: st.DrawFn) -> tuple[tuple[int, ...], Any]:
    shape = draw(SHAPES)
    index: list[Any] = []
    for size in shape[: draw(st.integers(0, len(shape)))]:
        bound = st.none() | st.integers(-8, 8)
        cuts = st.builds(slice, bound, bound, st.none() | st.integers(1, 3))
        index.append(draw(st.integers(-size, size - 1) | cuts if size else cuts))
    if draw(st.booleans()):
        index.insert(draw(st.integers(0, len(index))), ...)
        tail = index[index.index(...) + 1 :]
        index = index[: index.index(...) + 1] + [i for i in tail if isinstance(i, slice)]
    return shape, tuple(index)


def taken(whole: NDArray[np.int32], index: Any, width: int) -> NDArray[np.int32]:
    """As `safe_open` reads it, from memory."""
    wanted = cut(index, whole.shape)
    flat, box = whole.reshape(-1), np.full(wanted.shape, -1, np.int32)
    for block in rows(wanted.bounds, whole.shape, width):
        data = np.full(len(block.offsets) * block.size, -1, np.int32)
        for offset, at, size in block.runs():
            assert size > 0 and offset + size <= len(flat)
            data[at : at + size] = flat[offset : offset + size]
        part = data.reshape(-1, block.size)[:, block.first : block.last]
        box.reshape(-1)[block.slots[0] * part.shape[1] : block.slots[1] * part.shape[1]] = part.reshape(-1)
    return box[wanted.final] if wanted.final else box


@given(indexed(), st.sampled_from([1, NEAR]))
def test_an_index_takes_what_numpy_takes(given: tuple[tuple[int, ...], Any], width: int) -> None:
    """Whether the rows are near each other or far apart."""
    shape, index = given
    whole = np.arange(int(np.prod(shape)), dtype=np.int32).reshape(shape)
    try:
        expected = whole[index]
    except IndexError:
        with pytest.raises(IndexError):
            cut(index, shape)
        return
    assert np.array_equal(taken(whole, index, width), expected)


@pytest.mark.parametrize("index", [(0, 0, 0), 4, -5, slice(None, None, -1), [1, 2], (..., ...), "a", None])
def test_what_is_no_index_is_told(index: Any) -> None:
    with pytest.raises(IndexError):
        cut(index, (4, 4))
