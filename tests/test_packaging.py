"""What `pip install .` installs: built as a wheel, installed beside nothing of the source tree, and used from there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="needs hatchling (the `test` extra)")

ROOT = Path(__file__).parent.parent
PIP = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "--no-input"]

USED = """
import importlib.metadata, importlib.resources, fsspec, cakefs
from cakefs.cli import unit
print(cakefs.__file__, importlib.metadata.version("cakefs"), fsspec.get_filesystem_class("cakefs").__module__)
assert (importlib.resources.files("cakefs") / "data/cakefs.service").read_text() == unit.template()
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the installed package and its commands; what it depends on is that of the tests."""
    place = tmp_path_factory.mktemp("packaging")
    build = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", place, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = place.glob("cakefs-*.whl")
    subprocess.run([*PIP, "install", "--no-deps", "--no-index", "--target", place / "site", wheel], check=True)
    return place / "site"


def run(site: Path, *command: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(site), "CAKEFS_CONFIG": os.devnull}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_package_and_its_entry_points_are_whole(site: Path) -> None:
    place, version, door = run(site, sys.executable, "-c", USED).split()
    assert Path(place).is_relative_to(site) and door == "cakefs.api.filesystem"
    assert run(site, str(site / "bin/cakefs"), "--version") == f"cakefs {version}\n"


@pytest.mark.parametrize("topic", ["mount", "settings", "exit-codes", "status.json"])
def test_the_installed_command_explains_each_topic(site: Path, topic: str) -> None:
    assert len(run(site, str(site / "bin/cakefs"), "help", topic)) > 200


def test_nothing_but_the_package_is_installed(site: Path) -> None:
    found = {path.name for path in site.iterdir()} - {"bin", "__pycache__"}
    assert {name for name in found if not name.startswith("cakefs-")} == {"cakefs"}
