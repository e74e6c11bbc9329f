"""`cakefs export` over a real hub: ordinary files, whole or not there, as the mount shows them or upstream has them."""

import errno
import hashlib
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from cakefs.cli.options import with_app
from cakefs.config import load_config
from cakefs.engine.export.exporter import Exporter, Reflink, Wish
from cakefs.engine.export.target import Unfinished, unfinished_path
from cakefs.engine.held import held
from cakefs.errors import CorruptData, UserError
from cakefs.model import View
from cakefs.store.store import Store
from tests import gguf_files
from tests.disks import shared_bytes, small_disk, used
from tests.exporting import files_in, loop_disk, needs_root
from tests.hub import Hub
from tests.inside import Inside
from tests.models import CONFIG, llama, sharded, single, tensor
from tests.test_loaders import python

ROOT = Path(__file__).parent.parent
WEIGHTS = "model.safetensors"
MODEL = llama(3, width=512)  # 16 MB


@pytest.fixture
def cli(tmp_path: Path, hub: Hub) -> Inside:
    return Inside(tmp_path, hub)


def assert_tensors(path: Path, expected: Any) -> None:
    """As the official library reads it."""
    found = load_file(path)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_shards_become_one_canonical_file(cli: Inside, hub: Hub, tmp_path: Path) -> None:
    shards = sharded(MODEL, 3)
    hub.add_repo("org/name", shards | {"config.json": CONFIG, "sub/notes.txt": b"hello"})
    cli("add", "org/name")
    done = cli.told("export", "org/name", tmp_path / "out", "--reflink", "never")
    assert files_in(tmp_path / "out") == {WEIGHTS: single(MODEL), "config.json": CONFIG, "sub/notes.txt": b"hello"}
    assert done["size"] == done["written_bytes"] == len(single(MODEL)) + len(CONFIG) + 5
    assert done["cloned_bytes"] == 0
    assert done["fetched_bytes"] >= sum(t.nbytes for t in MODEL.values()) * 0.99
    assert [Path(f["path"]).name for f in done["files"] if f["written"]] == ["config.json", WEIGHTS, "notes.txt"]

    hub.reset()
    original = cli.told("export", "org/name", tmp_path / "original", "--original")
    assert files_in(tmp_path / "original") == shards | {"config.json": CONFIG, "sub/notes.txt": b"hello"}
    assert hub.sent() == 0
    assert sum(f["confirmed"] for f in original["files"]) == 3


def test_a_single_file_is_byte_identical_whatever_the_disk(cli: Inside, hub: Hub, tmp_path: Path) -> None:
    data = single(MODEL)
    hub.add_repo("org/name", {WEIGHTS: data, "config.json": CONFIG})
    cli("add", "org/name")
    said = cli("export", "org/name", tmp_path / "out").splitlines()
    assert said[0].startswith(f"exported org/name to {tmp_path / 'out'}: 2 files")
    assert said[-1].strip() == "1 file with the published SHA-256"
    assert files_in(tmp_path / "out") == {WEIGHTS: data, "config.json": CONFIG}
    with safe_open(tmp_path / "out" / WEIGHTS, "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_one_file_to_a_path_or_into_a_directory(cli: Inside, hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("org/name", {"a/b.txt": b"one", "config.json": CONFIG})
    cli("add", "org/name")
    cli("export", "org/name", tmp_path / "x.txt", "--file", "a/b.txt")
    cli("export", "org/name", f"{tmp_path}/new/", "--file", "a/b.txt")
    assert (tmp_path / "x.txt").read_bytes() == (tmp_path / "new/b.txt").read_bytes() == b"one"
    cli("export", "org/name", tmp_path / "new", "--file", "config.json")
    assert files_in(tmp_path / "new") == {"b.txt": b"one", "config.json": CONFIG}
    assert "no file c.txt in org/name" in cli("export", "org/name", tmp_path / "y", "--file", "c.txt", code=2)
    assert "is no directory" in cli("export", "org/name", tmp_path / "x.txt", code=2)
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "x.txt").stat().st_mode) == 0o666 & ~umask


def test_slices_and_calculated_merges(cli: Inside, hub: Hub, tmp_path: Path) -> None:
    model = llama(2, width=512)
    hub.add_repo("org/name", sharded(model, 2) | {"config.json": CONFIG})
    cli("add", "org/name")
    cli("slice", "org/name", "--layers", "1", "--as", "part")
    cli("export", "part", tmp_path / "part")
    assert_tensors(tmp_path / "part" / WEIGHTS, {n: t for n, t in model.items() if ".layers.1." in n})

    recipe = tmp_path / "recipe.yml"
    scale = "parameters: {scale: [{filter: down_proj, value: 0.5}, {value: 1.0}]}"
    recipe.write_text(
        f"merge_method: passthrough\nslices: [{{sources: [{{model: org/name, layer_range: [0, 2], {scale}}}]}}]\n"
    )
    cli("merge", recipe, "--as", "half")
    cli("export", "half", tmp_path / "half")
    found = load_file(tmp_path / "half" / WEIGHTS)
    down = "model.layers.1.mlp.down_proj.weight"
    assert np.array_equal(found[down], model[down] * np.float32(0.5))
    assert "upstream has no files of it" in cli("export", "part", tmp_path / "no", "--original", code=2)


def test_what_is_there_is_done_or_refused(cli: Inside, hub: Hub, tmp_path: Path) -> None:
    data, out = single(MODEL), tmp_path / "out"
    hub.add_repo("org/name", {WEIGHTS: data, "config.json": CONFIG})
    cli("add", "org/name")
    out.mkdir()
    (out / WEIGHTS).write_bytes(data)
    before = (out / WEIGHTS).stat()
    hub.reset()
    done = cli.told("export", "org/name", out)
    assert {Path(f["path"]).name: f["written"] for f in done["files"]} == {WEIGHTS: False, "config.json": True}
    assert hub.sent("*.safetensors") == 0, "the published hash tells that it is there"
    assert (out / WEIGHTS).stat().st_mtime_ns == before.st_mtime_ns
    assert "has org/name already" in cli("export", "org/name", out)

    for other in (data[:-1], data[:-1] + bytes([data[-1] ^ 1]), b""):
        (out / WEIGHTS).write_bytes(other)
        assert "something else" in cli("export", "org/name", out, code=2)
        assert files_in(out) == {WEIGHTS: other, "config.json": CONFIG}
    cli("export", "org/name", out, "--force")
    assert files_in(out) == {WEIGHTS: data, "config.json": CONFIG}

    (out / "config.json").unlink()
    (out / "config.json").mkdir()
    assert "a directory" in cli("export", "org/name", out, "--force", code=2)
    (out / "config.json").rmdir()
    (out / "config.json").symlink_to(tmp_path / "nowhere")
    assert "something else" in cli("export", "org/name", out, code=2)
    cli("export", "org/name", out, "--force")
    assert not (out / "config.json").is_symlink() and not (tmp_path / "nowhere").exists()


def test_nothing_is_written_when_anything_is_refused(cli: Inside, hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("org/name", {"a.txt": b"a", "b.txt": b"b", "c.txt": b"c"})
    cli("add", "org/name")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/b.txt").write_bytes(b"mine")
    cli("export", "org/name", tmp_path / "out", code=2)
    assert files_in(tmp_path / "out") == {"b.txt": b"mine"}


def test_a_merged_file_that_is_there_is_compared_byte_for_byte(cli: Inside, hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("org/name", sharded(MODEL, 2))
    cli("add", "org/name")
    cli("export", "org/name", tmp_path / "out")
    written = (tmp_path / "out" / WEIGHTS).stat().st_mtime_ns
    for reflink in ("auto", "never"):
        assert cli.told("export", "org/name", tmp_path / "out", "--reflink", reflink)["written_bytes"] == 0
    assert (tmp_path / "out" / WEIGHTS).stat().st_mtime_ns == written
    with (tmp_path / "out" / WEIGHTS).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    cli("export", "org/name", tmp_path / "out", code=2)


KILLED = """
import os, signal, sys
from cakefs.engine.export import target
put, blocks = target.Unfinished.put, 0
def put_or_die(self, offset, data):
    global blocks
    blocks += 1
    if blocks > 6:
        os.kill(os.getpid(), signal.SIGKILL)
    put(self, offset, data)
target.Unfinished.put = put_or_die
from cakefs.cli.main import main
main(sys.argv[1:])
"""


def test_killed_while_writing_it_goes_on(
    cli: Inside, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the killed one wrote is not written again, and was never to be seen under the file's name."""
    hub.add_repo("org/name", sharded(MODEL, 2))
    cli("add", "org/name")
    out = tmp_path / WEIGHTS
    command = ["export", "org/name", str(out), "--file", WEIGHTS, "--reflink", "never"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *command], env=cli.environment, cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert not out.exists()
    there = unfinished_path(out).stat().st_size
    assert 4_000_000 < there < len(single(MODEL))

    written: list[int] = []
    write = Unfinished.put.__globals__["write_full"]

    def counted(fd: int, data: memoryview, offset: int) -> None:
        written.append(len(data))
        write(fd, data, offset)

    monkeypatch.setitem(Unfinished.put.__globals__, "write_full", counted)
    hub.reset()
    cli(*command)
    assert out.read_bytes() == single(MODEL)
    assert not unfinished_path(out).exists()
    assert sum(written) == len(single(MODEL)) - there
    assert hub.sent() == 0


def test_what_was_left_is_not_trusted(cli: Inside, hub: Hub, tmp_path: Path) -> None:
    """Of another file, longer, or damaged since: the result is right."""
    hub.add_repo("org/name", sharded(MODEL, 2))
    cli("add", "org/name")
    out = tmp_path / WEIGHTS
    for left in (b"\0" * 20_000_000, single(MODEL)[:9_000_000] + b"junk", os.urandom(5_000_000)):
        unfinished_path(out).write_bytes(left)
        cli("export", "org/name", out, "--file", WEIGHTS, "--reflink", "never")
        assert out.read_bytes() == single(MODEL)
        out.unlink()


def test_two_at_once_on_one_file(tmp_path: Path) -> None:
    first = Unfinished.open(tmp_path / "x", 3)
    with pytest.raises(UserError, match="written by another process"):
        Unfinished.open(tmp_path / "x", 3)
    first.put(0, memoryview(b"abc"))
    (tmp_path / "x").write_bytes(b"mine")
    with pytest.raises(UserError, match="appeared meanwhile"):
        first.finish(replace=False)
    first.close()
    again = Unfinished.open(tmp_path / "x", 3)
    again.finish(replace=True)
    assert files_in(tmp_path) == {"x": b"abc"}
    long = tmp_path / ("ü" * 120)
    assert len(unfinished_path(long).name.encode()) < 200


@pytest.mark.parametrize("by", ["kernel", "look"])
def test_a_file_that_appears_at_the_last_moment_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """A file system that cannot rename without replacing says EINVAL; there a look just before has to do."""
    target = tmp_path / "x"
    if by == "look":
        monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: mock.Mock(renameat2=lambda *_: -1))
        monkeypatch.setattr("ctypes.get_errno", lambda: errno.EINVAL)
    first = Unfinished.open(target, 3)
    first.put(0, memoryview(b"abc"))
    monkeypatch.setattr("os.fsync", lambda fd: target.write_bytes(b"mine"))
    with pytest.raises(UserError, match="appeared meanwhile"):
        first.finish(replace=False)
    assert target.read_bytes() == b"mine"
    target.unlink()
    monkeypatch.setattr("os.fsync", lambda fd: None)
    first.finish(replace=False)
    assert files_in(tmp_path) == {"x": b"abc"}


@needs_root
def test_a_full_disk_keeps_what_was_written(cli: Inside, hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("org/name", sharded(MODEL, 2) | {"config.json": CONFIG})
    cli("add", "org/name")
    with small_disk(tmp_path / "disk", "8m") as disk:
        failed = cli("export", "org/name", disk / "out", code=30)
        assert (
            f"cannot write {disk / 'out' / WEIGHTS}: No space left" in failed and "goes on where it stopped" in failed
        )
        (left,) = (p for p in (disk / "out").iterdir() if p.name != "config.json")
        assert left == unfinished_path(disk / "out" / WEIGHTS) and left.stat().st_size > 4_000_000
        subprocess.run(["mount", "-o", "remount,size=40m", disk], check=True)
        hub.reset()
        cli("export", "org/name", disk / "out")
        assert files_in(disk / "out") == {WEIGHTS: single(MODEL), "config.json": CONFIG}
        assert hub.sent() == 0


def test_a_place_that_cannot_be_written_to(cli: Inside, hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("org/name", {"a.txt": b"a"})
    cli("add", "org/name")
    (tmp_path / "file").write_bytes(b"")
    assert "cannot write" in cli("export", "org/name", tmp_path / "file" / "out", code=2)
    assert "cannot write" in cli("export", "org/name", "/proc/out", code=2)


def test_a_damaged_blob_is_never_exported(cli: Inside, hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("org/name", sharded(MODEL, 2))
    cli("add", "org/name"), cli("pull", "org/name")
    blob = cli.blobs()[0]
    blob.chmod(0o600)
    with blob.open("r+b") as file:
        file.write(b"damaged!")
    cli("export", "org/name", tmp_path / "out", "--reflink", "never")
    assert files_in(tmp_path / "out") == {WEIGHTS: single(MODEL)}
    blob.write_bytes(b"damaged!" + blob.read_bytes()[8:])
    assert "offline" in cli("--offline", "export", "org/name", tmp_path / "2", "--reflink", "never", code=13)
    assert not (tmp_path / "2" / WEIGHTS).exists()


def test_a_file_without_its_published_hash_is_an_error_and_no_file(cli: Inside, hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("org/name", {WEIGHTS: single(MODEL)})
    cli("add", "org/name"), cli("pull", "org/name")

    async def export(app: Any) -> None:
        manifest = app.model("org/name")
        source = msgspec.structs.replace(manifest.sources[0], sha256="0" * 64)
        lying = msgspec.structs.replace(manifest, sources=(source,))
        exporter = Exporter(app.store, app.reading, lying, reflink=Reflink.AUTO, original=False, force=False)
        await exporter.write(Wish(lying.shown(View.MODEL)[WEIGHTS], tmp_path / "out" / WEIGHTS), lambda size: None)

    with pytest.raises(CorruptData, match="do not have the published SHA-256"):
        with_app(load_config({"store": cli.store, "endpoint": hub.endpoint}), export)
    assert files_in(tmp_path / "out") == {}


def test_bytes_that_go_meanwhile_are_fetched_again(cli: Inside, hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("org/name", sharded(MODEL, 2))
    cli("add", "org/name"), cli("pull", "org/name")

    async def export(app: Any) -> None:
        manifest = app.model("org/name")
        exporter = Exporter(app.store, app.reading, manifest, reflink=Reflink.AUTO, original=False, force=False)
        for span in range(len(manifest.spans)):
            app.store.drop_span(manifest.key(span))
        await exporter.write(Wish(manifest.shown(View.MODEL)[WEIGHTS], tmp_path / "out" / WEIGHTS), lambda size: None)

    with_app(load_config({"store": cli.store, "endpoint": hub.endpoint}), export)
    assert_tensors(tmp_path / "out" / WEIGHTS, MODEL)


def test_gguf_and_other_files_are_what_was_published(cli: Inside, hub: Hub, tmp_path: Path) -> None:
    files = {"a.gguf": gguf_files.make([], [gguf_files.info("a", [5]), gguf_files.info("b", [3], 0, 32)], 64)}
    files |= {"empty": b"", "dir/large.bin": os.urandom(3_000_000), ".gitattributes": b"*.bin lfs\n"}
    hub.add_repo("org/name", files)
    cli("add", "org/name")
    cli("export", "org/name", tmp_path / "out")
    assert files_in(tmp_path / "out") == files


def test_what_is_being_exported_is_held(cli: Inside, hub: Hub) -> None:
    hub.add_repo("org/name", {WEIGHTS: single(MODEL)})
    cli("add", "org/name"), cli("pull", "org/name")
    with Store.open(cli.store) as store, held(store, ["org/name"]):
        cli("rm", "org/name")
        assert cli.told("gc")["bytes"] == 0
    assert cli.told("gc")["bytes"] > 15_000_000


WITHOUT_FUSE = (
    "import sys; sys.modules['pyfuse3'] = None; from cakefs.cli.main import main; sys.exit(main(sys.argv[1:]))"
)


def test_fuse_is_not_needed(cli: Inside, hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("org/name", {"a.txt": b"a"})
    for command in (["add", "org/name"], ["export", "org/name", str(tmp_path / "out")]):
        python = [sys.executable, "-c", WITHOUT_FUSE, *command]
        subprocess.run(python, env=cli.environment, cwd=ROOT, check=True, capture_output=True)
    assert files_in(tmp_path / "out") == {"a.txt": b"a"}


BIG = {f"model.layers.{i}.w": tensor(i, 1024, 1024) for i in range(16)}  # 64 MiB
UNEVEN = BIG | {"model.norm": tensor(90, 512), "head": tensor(91, 1001, 300), "bias": tensor(92, 3)}


@needs_root
@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_on_a_disk_that_can_share_no_new_blocks_are_taken(kind: str, hub: Hub, tmp_path: Path) -> None:
    with loop_disk(tmp_path, kind) as disk:
        cli = Inside(disk, hub)
        hub.add_repo("org/sharded", sharded(UNEVEN, 3))
        hub.add_repo("org/single", {WEIGHTS: single(UNEVEN)})
        for name in ("org/sharded", "org/single"):
            cli("add", name), cli("pull", name)

        full = sum(t.nbytes for t in BIG.values())
        before = used(disk)
        done = cli.told("export", "org/sharded", disk / "out")
        assert used(disk) - before < 1_000_000
        assert done["cloned_bytes"] > full and done["written_bytes"] < 20_000
        path = disk / "out" / WEIGHTS
        assert done["cloned_bytes"] >= shared_bytes(path) >= full
        assert_tensors(path, UNEVEN)
        with safe_open(path, "np") as file:
            assert file.metadata() == {"format": "pt"}
        assert cli.told("export", "org/sharded", disk / "out")["written_bytes"] == 0

        exact = cli.told("export", "org/single", disk / "single")
        assert (exact["cloned_bytes"], (disk / "single" / WEIGHTS).read_bytes()) == (0, single(UNEVEN))
        before = used(disk)
        (shared,) = cli.told("export", "org/single", disk / "shared", "--reflink", "always")["files"]
        assert used(disk) - before < 1_000_000
        assert (shared["aligned"], shared["confirmed"]) == (True, False)
        assert_tensors(disk / "shared" / WEIGHTS, UNEVEN)

        cli("export", "org/sharded", disk / "copy", "--reflink", "never")
        assert (disk / "copy" / WEIGHTS).read_bytes() == single(UNEVEN)
        (path.parent / WEIGHTS).unlink()
        unfinished_path(path).write_bytes(b"x" * 100_000_000)
        cli("export", "org/sharded", disk / "out")
        assert_tensors(path, UNEVEN)


MAKE = """
import sys, torch, transformers
torch.manual_seed(7)
sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
config = transformers.AutoConfig.for_model("llama", vocab_size=300, num_hidden_layers=3, **sizes)
model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
model.save_pretrained(sys.argv[1], max_shard_size="100KB")
"""
COMPARE = """
import sys, torch, transformers
published, *exported = (transformers.AutoModelForCausalLM.from_pretrained(path) for path in sys.argv[1:])
wanted = published.state_dict()
for model in exported:
    found = model.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
print(len(exported), "alike")
"""


@pytest.mark.loaders
@pytest.mark.timeout(300)
@needs_root
def test_transformers_loads_what_was_exported(hub: Hub, tmp_path: Path) -> None:
    """As the mounted file, laid out for sharing, and as the original shards."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    made = tmp_path / "made"
    python(MAKE, made)
    assert len(list(made.glob("*.safetensors"))) > 1
    hub.add_repo("org/name", made)
    with loop_disk(tmp_path, "xfs") as disk:
        cli = Inside(disk, hub)
        cli("add", "org/name")
        out = [disk / how for how in ("shared", "never", "original")]
        cli("export", "org/name", out[0], "--reflink", "always")
        cli("export", "org/name", out[1], "--reflink", "never")
        cli("export", "org/name", out[2], "--original")
        assert files_in(out[2]) == files_in(made)
        assert files_in(out[0])[WEIGHTS] != files_in(out[1])[WEIGHTS]
        assert python(COMPARE, made, *out) == "3 alike\n"


@needs_root
def test_a_disk_that_cannot_share_is_an_error_only_when_it_must(cli: Inside, hub: Hub, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "60m") as disk:
        hub.add_repo("org/name", sharded(MODEL, 2))
        cli("add", "org/name")
        failed = cli("export", "org/name", disk / "out", "--reflink", "always", code=2)
        assert "cannot share blocks with" in failed and "--reflink auto" in failed
        assert not (disk / "out" / WEIGHTS).exists()
        cli("export", "org/name", disk / "out")
        assert hashlib.sha256((disk / "out" / WEIGHTS).read_bytes()).digest() == hashlib.sha256(single(MODEL)).digest()
    both = cli("export", "org/name", tmp_path / "x", "--original", "--reflink", "always", code=2)
    assert "--original keeps the bytes" in both
