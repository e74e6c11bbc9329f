"""`cakefs add` of what cannot be added: one clear line, the documented exit code, no half-made model, a mount that
lives on.

All the commands run once, beside a mount, and the tests look at what came of each. They run in a few processes, many
in each: starting Python and importing takes longer than they do.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from subprocess import PIPE, Popen
from typing import NamedTuple

import pytest

from cakefs.errors import AccessDenied, CakeError, CorruptData, InvalidFormat, NotFound, RemoteUnavailable
from tests.hub import Hub
from tests.models import CONFIG, llama, sharded, single
from tests.mounts import Cakefs, needs_fuse, write_config
from tests.safetensors_files import REFUSED, STRICTER

pytestmark = needs_fuse

PROCESSES = 3  # Some commands wait for a timeout.
GOOD = single(llama(1))
SHARDS = sharded(llama(1), 2)
INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00002.safetensors"
ENDLESS = 3600.0


class Case(NamedTuple):
    """A source that cannot be added, and what is said about it.

    Attributes:
        prepare: Makes the repository of the given name, or a fault, and returns the source if that is another one.
        says: Pattern of the error's text.
        hint: Pattern of the hint; empty where there is none.
    """

    prepare: Callable[[Hub, str], str | None]
    error: type[CakeError]
    says: str
    hint: str = ""
    environment: Mapping[str, str] = {}


def header(data: bytes) -> Callable[[Hub, str], None]:
    return lambda hub, repo: publish(hub, repo, {"model.safetensors": data})


def index(weight_map: object, **files: bytes) -> Callable[[Hub, str], None]:
    body = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    return lambda hub, repo: publish(hub, repo, SHARDS | {INDEX: body} | files)


def fault(kind: str | int, stage: str, **options: float) -> Callable[[Hub, str], None]:
    def prepare(hub: Hub, repo: str) -> None:
        publish(hub, repo, {"model.safetensors": GOOD})
        hub.fault(kind, f"{repo}*", times=None, stage=stage, **options)  # type: ignore[arg-type]

    return prepare


def publish(hub: Hub, repo: str, files: Mapping[str, bytes], **how: bool) -> None:
    # Bytes of its own, so that no case finds in the store what another brought.
    hub.add_repo(repo, {"config.json": CONFIG + repo.encode(), **files}, **how)  # type: ignore[arg-type]


def gated(hub: Hub, repo: str) -> None:
    publish(hub, repo, {"model.safetensors": GOOD}, gated=True)


def private(hub: Hub, repo: str) -> None:
    publish(hub, repo, {"model.safetensors": GOOD}, private=True)


def shard_not_there(hub: Hub, repo: str) -> None:
    publish(hub, repo, {name: data for name, data in SHARDS.items() if name != FIRST})


def index_cut_short(hub: Hub, repo: str) -> None:
    publish(hub, repo, SHARDS | {INDEX: b"{"})


def nothing(hub: Hub, repo: str) -> None:
    """No such repository."""


def other_revision(hub: Hub, repo: str) -> str:
    publish(hub, repo, {"model.safetensors": GOOD})
    return f"{repo}@v9"


def wrong_small_file(hub: Hub, repo: str) -> None:
    publish(hub, repo, {})
    hub.fault("corrupt", f"{repo}/config.json")


def plain_without_ranges(hub: Hub, repo: str) -> str:
    return hub.plain(f"{repo}/model.safetensors", GOOD, ranges=False)


def plain_index_without_shard(hub: Hub, repo: str) -> str:
    for name, data in SHARDS.items():
        if name != FIRST:
            url = hub.plain(f"{repo}/{name}", data)
    return url.rpartition("/")[0] + "/" + INDEX


AN_HOUR = "try again in 3600 s"
HEADER = "header of model.safetensors: "
BAD_INDEX = f"index {INDEX}: "
CASES = {
    "header too long": Case(
        header(REFUSED["length over the limit"]), InvalidFormat, HEADER + "length 1000000", "is this"
    ),
    "header past the file": Case(
        header(REFUSED["length past the file"]), InvalidFormat, "model.safetensors: header of"
    ),
    "header of nonsense length": Case(header(REFUSED["length past 64 bits minus 8"]), InvalidFormat, HEADER, "is this"),
    "truncated header": Case(header(REFUSED["not closed entry"]), InvalidFormat, HEADER),
    "truncated data": Case(header(REFUSED["data cut"]), InvalidFormat, HEADER),
    "shorter than 8 bytes": Case(header(REFUSED["7 bytes"]), InvalidFormat, "model.safetensors.* short"),
    "overlap": Case(header(REFUSED["overlap"]), InvalidFormat, HEADER + ".*overlap"),
    "overflow": Case(header(REFUSED["product past 64 bits"]), InvalidFormat, HEADER),
    "duplicate names": Case(header(STRICTER["tensor name twice"]), InvalidFormat, HEADER + ".*twice"),
    "unknown dtype": Case(header(REFUSED["dtype C128"]), InvalidFormat, HEADER + ".*C128"),
    "index names a shard that is not there": Case(shard_not_there, InvalidFormat, f"{INDEX}.*{FIRST}"),
    "index leaves its directory": Case(index({"t": "../../etc/passwd"}), InvalidFormat, BAD_INDEX + r".*\.\./"),
    "index with an absolute path": Case(index({"t": "/etc/passwd"}), InvalidFormat, BAD_INDEX + ".*/etc/passwd"),
    "index with a number": Case(index({"t": 7}), InvalidFormat, BAD_INDEX),
    "index with a tensor that its shard lacks": Case(index({"t": FIRST}), InvalidFormat, f"{INDEX}.*{FIRST}"),
    "index that is no JSON": Case(index_cut_short, InvalidFormat, BAD_INDEX),
    "401 of the listing": Case(fault(401, "api"), AccessDenied, "refused REPO .401"),
    "403 of a file": Case(fault(403, "resolve"), AccessDenied, "refused .*REPO.*403"),
    "gated without token": Case(gated, AccessDenied, "refused .*REPO.*restricted", "accept the licence .*HF_TOKEN"),
    "gated with a foreign token": Case(
        gated, AccessDenied, "refused .*REPO.*restricted", "accept the licence", {"HF_TOKEN": "hf_other"}
    ),
    "bad token": Case(gated, AccessDenied, "refused REPO .401: Invalid cred", "hf auth login", {"HF_TOKEN": "hf_bad"}),
    "private": Case(private, NotFound, "REPO not found", "private.*HF_TOKEN"),
    "404 of the listing": Case(nothing, NotFound, "REPO not found", "check the name"),
    "404 of a file": Case(fault(404, "resolve"), NotFound, "REPO/resolve/.* not found", "check"),
    "no such revision": Case(other_revision, NotFound, "REPO.*'v9'", "check the revision"),
    "429 of the listing": Case(
        fault(429, "api", retry_after=ENDLESS), RemoteUnavailable, "cannot list REPO.*429", AN_HOUR
    ),
    "429 of a file": Case(
        fault(429, "resolve", retry_after=ENDLESS), RemoteUnavailable, "REPO.*in 1 try.*429", AN_HOUR
    ),
    "500 of the listing": Case(fault(500, "api"), RemoteUnavailable, "cannot list REPO.*500"),
    "500 of a file": Case(fault(500, "resolve"), RemoteUnavailable, "REPO.*tries.*500"),
    "redirect loop": Case(fault("redirect-loop", "resolve"), InvalidFormat, "redirects .*REPO"),
    "wrong bytes of a small file": Case(
        wrong_small_file,
        CorruptData,
        "config.json.* published hash",
        "try again",
    ),
    "server without ranges": Case(plain_without_ranges, InvalidFormat, "does not serve parts of .*REPO", "Range"),
    "index at a URL without its shard": Case(plain_index_without_shard, InvalidFormat, f"{INDEX}.*{FIRST}"),
}


BATCH = """
import contextlib, io, json, os, sys
from cakefs.cli.main import main
for line in sys.stdin:
    arguments, environment = json.loads(line)
    os.environ |= environment
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(arguments)
    for name in environment:
        del os.environ[name]
    print(json.dumps([code, out.getvalue(), err.getvalue()]))
"""


class Done(NamedTuple):
    code: int
    stdout: str
    stderr: str


class Batch:
    """Commands that run one after the other in a process of their own."""

    def __init__(self, cakefs: Cakefs) -> None:
        self._process = Popen([sys.executable, "-c", BATCH], stdin=PIPE, stdout=PIPE, text=True, env=cakefs.environment)
        self._commands: dict[str, str] = {}

    def put(self, name: str, arguments: list[str], environment: Mapping[str, str]) -> None:
        self._commands[name] = json.dumps([arguments, environment]) + "\n"

    def start(self) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        stdin.writelines(self._commands.values())
        stdin.close()

    def outcomes(self) -> dict[str, Done]:
        with self._process as process:
            assert process.stdout is not None
            lines = list(process.stdout)
        return {name: Done(*json.loads(line)) for name, line in zip(self._commands, lines, strict=True)}


def slug(name: str) -> str:
    return "bad/" + re.sub(r"\W+", "-", name)


class World(NamedTuple):
    hub: Hub
    cakefs: Cakefs
    mountpoint: Path
    outcomes: dict[str, Done]


def attempt_all(hub: Hub, cakefs: Cakefs) -> dict[str, Done]:
    batches = [Batch(cakefs) for _ in range(PROCESSES)]
    for turn, (name, case) in enumerate(CASES.items()):
        source = case.prepare(hub, slug(name)) or slug(name)
        batches[turn % PROCESSES].put(name, ["add", source, "--as", slug(name)], case.environment)
    for batch in batches:
        batch.start()
    return {name: done for batch in batches for name, done in batch.outcomes().items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A mount with a good model in it, beside which all cases have been tried."""
    directory = tmp_path_factory.mktemp("add")
    with Hub() as hub:
        cakefs = Cakefs(directory, hub.endpoint, CAKEFS_CONFIG=write_config(directory, read_timeout_s=3.0))
        hub.add_repo("org/good", {"config.json": CONFIG, "model.safetensors": GOOD})
        hub.add_repo("org/known", {"config.json": CONFIG}, token="hf_other")

        with cakefs.mounted("--no-on-demand") as mountpoint:
            cakefs.run("add", "org/good")
            outcomes = attempt_all(hub, cakefs)
            yield World(hub, cakefs, mountpoint, outcomes)


@pytest.mark.parametrize("name", CASES)
def test_it_says_what_is_wrong_in_one_line_and_leaves_no_model(world: World, name: str) -> None:
    case, done = CASES[name], world.outcomes[name]
    said = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert done.code == case.error.exit_code, done
    assert len(said) == 1 + bool(case.hint) and said[0].startswith("error: ")
    assert re.search(case.says.replace("REPO", re.escape(slug(name))), said[0])
    assert not case.hint or (said[1].startswith("hint: ") and re.search(case.hint, said[1]))
    assert done.stdout == ""
    assert not (world.mountpoint / slug(name)).exists()


def test_the_mount_and_the_store_are_as_before(world: World) -> None:
    assert [model["name"] for model in world.cakefs.json("ls")] == ["org/good"]
    assert sorted(p.name for p in world.mountpoint.iterdir()) == [".cakefs", "org"]
    assert (world.mountpoint / "org/good/model.safetensors").read_bytes() == GOOD


def test_a_passing_rate_limit_is_waited_for_and_told_at_once(world: World) -> None:
    publish(world.hub, "org/limited", {"model.safetensors": GOOD})
    of_list = world.hub.fault(429, "org/limited", retry_after=1.0, stage="api")
    of_file = world.hub.fault(429, "org/limited/*", retry_after=1.0, stage="resolve")
    done = world.cakefs.run("add", "org/limited", CAKEFS_CONFIG=os.devnull)
    assert (of_list.hits, of_file.hits) == (1, 1)
    said = done.stderr.splitlines()
    assert len(said) == 2 and all(line.startswith("warning: trying again in 1 s: ") for line in said)
    assert (world.mountpoint / "org/limited/model.safetensors").read_bytes() == GOOD


def test_what_failed_can_be_added_once_it_is_mended(world: World) -> None:
    name = slug("index with a number")
    publish(world.hub, name, SHARDS)
    world.cakefs.run("add", name)
    assert (world.mountpoint / name / "model.safetensors").read_bytes() == GOOD
