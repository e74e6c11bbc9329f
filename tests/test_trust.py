"""What the README's threat model says of secrets, other users and strangers' bytes, held against real processes."""

import os
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from cakefs.engine.models.adding import AddRequest
from cakefs.engine.transfer.messages import Done, Failed
from cakefs.errors import InvalidFormat
from cakefs.plan.wish import Wish
from cakefs.store.store import Store
from tests.hub import Hub
from tests.hub.odd import listening, swelling
from tests.models import single, tensor
from tests.mounts import Cakefs, needs_fuse
from tests.stress.soak import children

SECRET = "hf_mine_and_nobody_elses"
PUBLISHED = single({"t": tensor(1, 700_000)})


def families(pid: int) -> list[int]:
    """A process and all below it."""
    return [pid, *(p for child in children(pid) for p in families(child))]


def holders(root: Path, secret: bytes) -> list[Path]:
    """The files below a directory that have those bytes."""
    return [path for path in root.rglob("*") if path.is_file() and secret in path.read_bytes()]


@pytest.fixture(params=["variable", "file"])
def gated(request: pytest.FixtureRequest, hub: Hub, tmp_path: Path) -> Iterator[Cakefs]:
    """Mounted with all that can be logged, as one who may read a gated model, and after it was read."""
    hub.add_repo("org/gated", {"model.safetensors": PUBLISHED}, gated=True, token=SECRET)
    if request.param == "file":
        (tmp_path / "token").write_text(SECRET)
        environment = {"HF_TOKEN_PATH": str(tmp_path / "token")}
    else:
        environment = {"HF_TOKEN": SECRET}
    cakefs = Cakefs(tmp_path / "place", hub.endpoint, **environment)
    (tmp_path / "place").mkdir()
    with cakefs.mounted("--debug"):
        assert (cakefs.mountpoint / "org/gated/model.safetensors").read_bytes() == PUBLISHED
        yield cakefs


@needs_fuse
def test_the_token_is_in_no_log_no_status_no_store_and_no_argument(gated: Cakefs) -> None:
    said = [gated.run("show", "org/gated"), gated.run("status"), gated.run("add", "org/none", check=False)]
    said += [gated.run(*command, "--debug") for command in (["add", "org/gated", "--as", "again"], ["pull", "again"])]
    page = gated.store.parent / "report.html"
    said.append(gated.run("report", "--output", str(page)))
    assert "org/gated" in page.read_text() and SECRET not in page.read_text()
    assert all(SECRET not in done.stdout + done.stderr for done in said)
    assert SECRET not in (gated.mountpoint / ".cakefs/status.json").read_text()
    assert "org/none" in said[2].stderr
    assert "DEBUG" in gated.log(), "much is logged"
    assert holders(gated.store.parent / "store", SECRET.encode()) == []
    assert holders(gated.store.parent / "state", SECRET.encode()) == []
    daemon = gated.status()["pid"]
    processes = families(daemon)
    assert len(processes) > 1
    for pid in processes:
        assert SECRET.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
        if pid != daemon:  # which has it where the user has put it
            assert SECRET.encode() not in Path(f"/proc/{pid}/environ").read_bytes()


@needs_fuse
@pytest.mark.parametrize("etag", ['"strong"', ""])
def test_the_query_of_a_url_is_shown_nowhere(hub: Hub, tmp_path: Path, etag: str) -> None:
    """It may be a signature; the mount and what `show` says may be seen by others."""
    url = hub.plain("signed/model.safetensors", PUBLISHED, etag=etag)
    cakefs = Cakefs(tmp_path, hub.endpoint)
    with cakefs.mounted("--no-on-demand"):
        said = [cakefs.run("add", f"{url}?sig={SECRET}|&x=1", "--as", "signed"), cakefs.run("ls", "--json")]
        path = cakefs.mountpoint / "signed/model.safetensors"
        assert path.read_bytes() == PUBLISHED
        said += [cakefs.run("show", "signed"), cakefs.run("show", "signed", "--json")]
        assert all(SECRET not in done.stdout + done.stderr for done in said)
        about = {name: os.getxattr(path, name).decode() for name in os.listxattr(path)}
        assert about["user.cakefs.source"] == url
        assert all(SECRET not in value for value in about.values())
    assert SECRET not in cakefs.log()
    assert url in said[-1].stdout


def test_what_is_made_is_open_to_nobody_else_whatever_the_umask(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("org/name", {"model.safetensors": PUBLISHED})
    cakefs = Cakefs(tmp_path, hub.endpoint)
    before = os.umask(0)
    try:
        cakefs.run("add", "org/name")
        cakefs.run("pull", "org/name")
    finally:
        os.umask(before)
    assert stat.S_IMODE(cakefs.store.stat().st_mode) == 0o700
    assert [p for p in cakefs.store.rglob("*") if p.stat().st_mode & 0o022] == [], "and what is in it to no writer"


@needs_fuse
def test_the_log_of_a_mount_is_open_to_nobody_else_whatever_the_umask(hub: Hub, tmp_path: Path) -> None:
    cakefs = Cakefs(tmp_path, hub.endpoint)
    before = os.umask(0)
    try:
        with cakefs.mounted():
            (log,) = (tmp_path / "state").rglob("mount.log")
            assert stat.S_IMODE(log.parent.stat().st_mode) == 0o700
    finally:
        os.umask(before)


BOMBS = {
    "longer-than-any": struct.pack("<Q", 2**63) + b"{}",
    "longer-than-the-file": struct.pack("<Q", 90_000_000) + b"{}",
    "deep": (lambda text: struct.pack("<Q", len(text)) + text)(b'{"__metadata__":' + b"[" * 1_000_000),
    "wide": (lambda text: struct.pack("<Q", len(text)) + text)(
        b'{"t":{"dtype":"F32","shape":[' + b"4294967295," * 200_000 + b'1],"data_offsets":[0,4]}}'
    )
    + bytes(4),
    "a-number-of-a-million-digits": (lambda text: struct.pack("<Q", len(text)) + text)(
        b'{"t":{"dtype":"F32","shape":[' + b"9" * 1_000_000 + b'],"data_offsets":[0,4]}}'
    )
    + bytes(4),
}
ADD_WITH_LITTLE_MEMORY = """
import resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))
from cakefs.cli.main import main
sys.exit(main(["add", sys.argv[1]]))
"""


@pytest.mark.parametrize("name", BOMBS)
def test_a_header_that_is_a_bomb_is_refused_in_little_time_and_memory(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.add_repo("org/bomb", {"model.safetensors": BOMBS[name]})
    cakefs = Cakefs(tmp_path, hub.endpoint)
    began = time.monotonic()
    command = [sys.executable, "-c", ADD_WITH_LITTLE_MEMORY, "org/bomb"]
    done = subprocess.run(command, env=cakefs.environment, capture_output=True, text=True, check=False)
    assert done.returncode == InvalidFormat.exit_code, done.stderr
    assert "model.safetensors" in done.stderr and len(done.stderr) < 2000
    assert time.monotonic() - began < 30
    assert cakefs.json("ls") == []


ADD_APART = """
from cakefs.engine.models import adding
adding.MEMORY = 700 << 20
adding.main()
"""


def test_an_answer_that_swells_without_end_ends_the_adding_and_not_the_machine(hub: Hub, tmp_path: Path) -> None:
    """Packed a thousandfold, where a mount would ask the Hub: the client of the Hub unpacks what it gets."""
    cakefs = Cakefs(tmp_path, hub.endpoint)
    Store.open(cakefs.store).close()
    with listening(swelling) as port:
        wish = Wish("org/bomb", None, "org/bomb")
        request = AddRequest(str(cakefs.store), f"http://127.0.0.1:{port}", None, 5.0, None, wish)
        command, told = [sys.executable, "-c", ADD_APART], msgspec.msgpack.encode(request)
        began = time.monotonic()
        done = subprocess.run(command, env=cakefs.environment, input=told, capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    outcome = msgspec.msgpack.decode(done.stdout, type=Done | Failed)
    assert isinstance(outcome, Failed) and outcome.kind == "InvalidFormat", outcome
    assert "unexpected answer for org/bomb: MemoryError" in outcome.message
    assert time.monotonic() - began < 40
