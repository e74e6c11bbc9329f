"""torch checkpoints from `add` to a loader: as the safetensors that torch itself would write, no pickle executed."""

import io
import json
import math
import tracemalloc
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from cakefs.engine.models import upstream
from cakefs.plan import torch_compose
from tests.hub import Hub
from tests.inline import Inline
from tests.models import CONFIG, llama, single
from tests.mounts import Cakefs, needs_fuse
from tests.torch_bad_files import BODIES, LEGACY, OTHER, ZIPS
from tests.torch_files import legacy, pickled, storage, table, tensor, zipped

INDEX = "pytorch_model.bin.index.json"
CONTAINERS = {"zip": zipped, "legacy": legacy}


@pytest.fixture
def cakefs(hub: Hub, tmp_path: Path) -> Cakefs:
    return Inline(tmp_path, hub.endpoint)


def checkpoint(tensors: dict[str, np.ndarray[Any, Any]], kind: str = "zip") -> bytes:
    """A storage for each."""
    entries, storages = {}, {}
    for key, (label, value) in enumerate(tensors.items()):
        stride = [math.prod(value.shape[d + 1 :]) for d in range(value.ndim)]
        entries[label] = tensor(value.shape, stride, 0, storage(str(key), value.size))
        storages[str(key)] = value.tobytes()
    return CONTAINERS[kind](pickled(table(entries)), storages)


def paths(cakefs: Cakefs, model: str) -> tuple[set[str], set[str]]:
    """Of the files in the model's directory, and of those in its original."""
    files = cakefs.json("show", model)["files"]
    return ({f["path"] for f in files if f["view"] != "original"}, {f["path"] for f in files if f["view"] != "model"})


# --- what is shown ----------------------------------------------------------------------------------------------------


@needs_fuse
@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_checkpoint_is_shown_as_the_official_writers_safetensors(cakefs: Cakefs, hub: Hub, kind: str) -> None:
    tensors = llama(2)
    pickle = checkpoint(tensors, kind)
    hub.add_repo("org/old", {"config.json": CONFIG, "pytorch_model.bin": pickle})
    added = cakefs.json("add", "org/old")
    assert added["warnings"] == [] and added["fetched_bytes"] < len(pickle) / 2
    with cakefs.mounted() as mountpoint:
        assert sorted(p.name for p in (mountpoint / "org/old").iterdir()) == ["config.json", "model.safetensors"]
        assert (mountpoint / "org/old/model.safetensors").read_bytes() == single(tensors)
        original = mountpoint / ".cakefs/original/org/old"
        assert sorted(p.name for p in original.iterdir()) == ["config.json", "pytorch_model.bin"]
        assert (original / "pytorch_model.bin").read_bytes() == pickle


def test_shards_with_an_index_are_shown_as_one_file(cakefs: Cakefs, hub: Hub) -> None:
    tensors = llama(3)
    names = sorted(tensors)
    shards = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    files = {path: checkpoint({n: tensors[n] for n in part}) for path, part in shards.items()}
    weight_map = {n: path for path, part in shards.items() for n in part}
    files[INDEX] = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()
    hub.add_repo("org/old", files)
    assert cakefs.json("add", "org/old")["warnings"] == []
    assert paths(cakefs, "org/old") == ({"model.safetensors"}, set(files))
    cakefs.run("export", "org/old", str(cakefs.store / "out"))
    assert (cakefs.store / "out/model.safetensors").read_bytes() == single(tensors)


@pytest.mark.parametrize("kind", CONTAINERS)
def test_a_pull_completes_the_checkpoint_and_confirms_its_published_hash(cakefs: Cakefs, hub: Hub, kind: str) -> None:
    """What is between the storages came with the directory, or comes along with them."""
    tensors = {f"layers.{i}.weight": np.full((64, 1024), i, "<f4") for i in range(40)}
    hub.add_repo("org/old", {"pytorch_model.bin": checkpoint(tensors, kind)})
    cakefs.run("add", "org/old")
    hub.reset()
    pulled = cakefs.json("pull", "org/old")
    assert pulled["verified"] is True
    assert kind == "zip" or len([r for r in hub.requests if r.stage == "cdn"]) <= 10


def test_a_model_in_both_formats_is_stored_once(cakefs: Cakefs, hub: Hub) -> None:
    tensors = {f"layers.{i}.weight": np.full((64, 1024), i, "<f4") for i in range(8)}
    hub.add_repo("org/old", {"pytorch_model.bin": checkpoint(tensors)})
    hub.add_repo("org/new", {"model.safetensors": single(tensors)})
    stored = []
    for model in ("org/new", "org/old"):
        cakefs.run("add", model)
        cakefs.run("pull", model)
        stored.append(cakefs.json("status")["store"]["blob_bytes"])
    assert stored[1] - stored[0] < 16_384
    assert cakefs.json("diff", "org/old", "org/new")["equal"]["tensors"] == 8


def test_views_of_a_storage_are_parts_of_it_repeated_or_gathered(cakefs: Cakefs, hub: Hub) -> None:
    base = np.arange(48, dtype="<f4").reshape(6, 8)
    of = storage("0", 48)
    entries = {
        "base": tensor([6, 8], [8, 1], 0, of),
        "tied": tensor([6, 8], [8, 1], 0, of),
        "rows": tensor([2, 8], [8, 1], 8, of),
        "turned": tensor([8, 6], [1, 8], 0, of),
        "expanded": tensor([5, 8], [0, 1], 16, of),
        "empty": tensor([0, 8], [8, 1], 0, of),
        "scalar": tensor([], [], 13, of),
    }
    expected = {
        "base": base,
        "tied": base,
        "rows": base[1:3],
        "turned": base.T.copy(),
        "expanded": np.repeat(base[2:3], 5, 0),
        "empty": base[:0],
        "scalar": np.asarray(base[1, 5]),
    }
    hub.add_repo("org/views", {"pytorch_model.bin": zipped(pickled(table(entries)), {"0": base.tobytes()})})
    assert cakefs.json("add", "org/views")["warnings"] == []
    cakefs.run("export", "org/views", str(cakefs.store / "out"))
    assert (cakefs.store / "out/model.safetensors").read_bytes() == single(expected)
    shown = {t["name"]: t["size"] for t in cakefs.json("show", "org/views", "--tensors")["tensors"]}
    assert shown == {label: value.nbytes for label, value in expected.items()}


def test_slices_of_a_checkpoint(cakefs: Cakefs, hub: Hub) -> None:
    """Also of tensors that are a part of a storage, or turned around in one."""
    tensors = llama(3)
    entries, storages = {}, {}
    for key, (label, value) in enumerate(tensors.items()):
        turned = "down_proj" in label
        stride = [1, value.shape[0]] if turned else [math.prod(value.shape[d + 1 :]) for d in range(value.ndim)]
        entries[label] = tensor(value.shape, stride, 4, storage(str(key), value.size + 4))
        storages[str(key)] = bytes(16) + (value.T if turned else value).tobytes()
    config = json.dumps({"model_type": "llama", "num_hidden_layers": 3}).encode()
    hub.add_repo("org/old", {"pytorch_model.bin": zipped(pickled(table(entries)), storages), "config.json": config})
    cakefs.run("add", "org/old")
    cakefs.run("slice", "org/old", "--layers", "1", "--as", "mine")
    cakefs.run("export", "mine", str(cakefs.store / "out"))
    expected = {label: value for label, value in tensors.items() if ".layers.1." in label}
    assert (cakefs.store / "out/model.safetensors").read_bytes() == single(expected)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_refused_checkpoints_are_warned_of_by_name_and_never_run(
    cakefs: Cakefs, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in a directory of its own: nothing of them is in the model, all of them in its original, byte for byte."""
    monkeypatch.chdir(tmp_path)
    cases = [(make(pickled(body)), reason) for make in CONTAINERS.values() for body, reason in BODIES.values()]
    cases += [*ZIPS.values(), *LEGACY.values(), *OTHER.values()]
    directories = {f"{number:03}/pytorch_model.bin": case for number, case in enumerate(cases)}
    files = {path: data for path, (data, _) in directories.items()}
    hub.add_repo("org/bad", files | {"model.safetensors": single(llama(1))})
    added = cakefs.json("add", "org/bad")
    warnings = dict(warning.split(" is shown under .cakefs/original only: ", 1) for warning in added["warnings"])
    assert warnings.keys() == files.keys()
    for path, (_, reason) in directories.items():
        assert reason in warnings[path] and path in warnings[path], (path, warnings[path])
    assert paths(cakefs, "org/bad") == ({"model.safetensors"}, {*files, "model.safetensors"})
    assert not (tmp_path / "marker").exists()
    assert cakefs.json("add", "org/bad")["changed"] is False


def test_an_index_of_checkpoints_that_breaks_its_rules_is_a_warning(cakefs: Cakefs, hub: Hub) -> None:
    shard = "pytorch_model-00001-of-00001.bin"
    good = checkpoint({"a": np.zeros(4, "<f4")})
    for number, (body, reason) in enumerate(
        [
            (b"{", "index"),
            (json.dumps({"weight_map": {"b": shard}}).encode(), f"tensor 'b' is not in '{shard}'"),
            (json.dumps({"weight_map": {"a": "no/such.bin"}}).encode(), "tensor 'a' is not in 'no/such.bin'"),
            (json.dumps({"weight_map": {"a": "config.json"}}).encode(), "tensor 'a' is not in 'config.json'"),
            (json.dumps({"weight_map": {"a": "../a.bin"}}).encode(), "unsafe path"),
        ]
    ):
        files = {INDEX: body, shard: good, "config.json": CONFIG}
        hub.add_repo(f"org/bad{number}", files)
        (warning,) = cakefs.json("add", f"org/bad{number}")["warnings"]
        assert reason in warning and INDEX in warning
        assert paths(cakefs, f"org/bad{number}") == ({"config.json"}, set(files))


def test_a_view_that_is_too_scattered_is_refused_by_name(cakefs: Cakefs, hub: Hub) -> None:
    turned = zipped(pickled(table({"w": tensor([2, 2], [1, 2])})))
    hub.add_repo("org/turned", {"pytorch_model.bin": turned})
    with mock.patch.object(torch_compose, "REACH_LIMIT", 12):
        (warning,) = cakefs.json("add", "org/turned")["warnings"]
    assert "tensor 'w' of 16 bytes with strides (1, 2) is too scattered" in warning
    assert paths(cakefs, "org/turned") == (set(), {"pytorch_model.bin"})
    assert cakefs.json("add", "org/turned", "--update")["warnings"] == []
    assert paths(cakefs, "org/turned") == ({"model.safetensors"}, {"pytorch_model.bin"})


def test_what_a_strangers_file_makes_us_fetch_and_hold_is_bounded(cakefs: Cakefs, hub: Hub) -> None:
    tensors = {f"layers.{i}.weight": np.full((64, 1024), i, "<f4") for i in range(8)}
    hub.add_repo("org/old", {"pytorch_model.bin": checkpoint(tensors)})
    for limit, value in (("MOST_BYTES", 1000), ("MOST_REQUESTS", 3)):
        with mock.patch.object(upstream, limit, value):
            (warning,) = cakefs.json("add", "org/old", "--update")["warnings"]
        assert "pytorch_model.bin: it takes" in warning and "to learn where its tensors are" in warning
    bomb = b"\x80\x02" + b"X\xf0\xff\xff\x7f" + b"." * 2_000_000
    hub.add_repo("org/bomb", {"pytorch_model.bin": legacy(bomb), "adapter_model.bin": bomb})
    tracemalloc.start()
    cakefs.run("add", "org/bomb")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2**20


# --- safetensors that are not the model's -----------------------------------------------------------------------------


def test_a_broken_file_beside_the_model_is_a_warning_and_shown_as_published(cakefs: Cakefs, hub: Hub) -> None:
    good, broken = single(llama(1)), single(llama(1))[:-1]
    files = {"model.safetensors": good, "extra/lora.safetensors": broken, "extra/tiny.safetensors": b"x"}
    hub.add_repo("org/name", files)
    added = cakefs.json("add", "org/name")
    assert [w.partition(":")[0] for w in added["warnings"]] == [
        "extra/lora.safetensors is shown as it is",
        "extra/tiny.safetensors is shown as it is",
    ]
    assert paths(cakefs, "org/name") == (set(files), set(files))
    assert cakefs.json("pull", "org/name")["verified"] is True
    for path in ("model.safetensors", "extra/model.safetensors", "lora.safetensors"):
        hub.add_repo("org/main", {path: broken, "config.json": CONFIG})
        failed = cakefs.run("add", "org/main", check=False)
        assert failed.returncode == 21 and f"header of {path}: " in failed.stderr


# --- torch itself -----------------------------------------------------------------------------------------------------


@needs_fuse
@pytest.mark.loaders
@pytest.mark.filterwarnings("ignore")  # torch warns of types and protocols
@pytest.mark.parametrize("variant", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
def test_the_file_under_the_mount_is_what_torch_loads(cakefs: Cakefs, hub: Hub, variant: dict[str, bool]) -> None:
    """Strided, tied, empty and in every type: the very bytes that safetensors writes for what torch loads."""
    torch = pytest.importorskip("torch", reason="needs torch (the `loaders` extra)")
    safetensors = pytest.importorskip("safetensors.torch")
    from tests.test_formats_torch_real import TYPES, values, views

    raw = torch.arange(4096, dtype=torch.uint8)
    kinds = TYPES[: TYPES.index("uint16")] if variant else TYPES  # torch does not load the others from the old format
    typed = {t: raw.view(getattr(torch, t)).clone() for t in kinds if t != "bool"} | {"bool": raw % 2 == 0}
    conv = values(64, 32, 3, 3).to(memory_format=torch.channels_last)
    state = {**views(), **typed, "conv": conv, "big": values(300, 700), "turned big": values(300, 700).t()}
    file = io.BytesIO()
    torch.save({"state_dict": state, "epoch": 3}, file, **variant)
    hub.add_repo("org/old", {"unet/diffusion_pytorch_model.bin": file.getvalue()})
    assert cakefs.json("add", "org/old")["warnings"] == []
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=True)["state_dict"]
    plain = {n: t.detach().clone(memory_format=torch.contiguous_format).contiguous() for n, t in loaded.items()}
    with cakefs.mounted() as mountpoint:
        served = mountpoint / "org/old/unet/diffusion_pytorch_model.safetensors"
        assert served.read_bytes() == safetensors.save(plain, metadata={"format": "pt"})
