"""The scripts of the README, run against a stand-in for Python and apt-get that writes down what it is asked."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = [*sorted((ROOT / "scripts").iterdir()), ROOT / ".ci/run"]
BASH_SCRIPTS = [path for path in SCRIPTS if path.is_file() and path.read_bytes().startswith(b"#!/usr/bin/env bash\n")]
TOOLS = ("bash", "cat", "cp", "dirname", "env", "flock", "ln", "mkdir", "readlink", "rm", "sed", "sha256sum", "sleep")
NEEDED = (*TOOLS, "touch", "true", "uname")

# Answers what scripts/setup asks of a Python; `-m venv` makes a .venv whose python is this file again.
PYTHON = """#!/bin/bash
here=${PATH%%:*} all="$*"
case "$*" in
  *sys._base_executable*) echo /usr/bin/python3.11 ;;
  *print*version_info*) echo 3.11 ;;
  *ensurepip*) [ -e "$LOG.venv" ] ;;
  *Python.h*) [ -e "$LOG.headers" ] ;;
  "-m venv --clear"*) echo venv >>"$LOG"; rm -rf .venv; mkdir -p .venv/bin; cp "$here/python3" .venv/bin/python ;;
  *"pip "*--dry-run*) exit 1 ;;
  *"pip "*) echo "pip ${all##*--no-input }" >>"$LOG"; cp "$here/true" .venv/bin/cakefs; [ ! -e "$LOG.broken" ] ;;
  *"- torch") echo torch==2.13.0 ;;
  *"- pyfuse3") echo pyfuse3 ;;
  *dependency-groups*) echo transformers==4 tokenizers==0 ;;
esac
"""
APT = """#!/bin/bash
all="$*"
echo "apt ${all##*=120 }" >>"$LOG"
here=$(dirname "$0")
[ ! -e "$LOG.unknown" ] || unknown=$(cat "$LOG.unknown")
case " $* " in *" ${unknown-none} "*) echo "E: Unable to locate it" >&2; exit 100 ;; esac
while [ $# != 0 ]; do
  case "$1" in
    *venv*) touch "$LOG.venv" ;;
    fuse3) cp "$here/true" "$here/fusermount3" ;;
    man-db) cp "$here/true" "$here/man" ;;
    systemd) cp "$here/true" "$here/systemctl"; cp "$here/true" "$here/systemd-analyze" ;;
    chromium | fish | gcc | git | openssl | zsh) cp "$here/true" "$here/$1" ;;
  esac
  shift
done
"""
# Programs without which tests skip, and the packages of them; not mkfs, which setup finds whatever the PATH is.
PROGRAMS = ("gcc", "openssl", "git", "man", "zsh", "fish", "systemctl", "systemd-analyze", "chromium")
BRINGING = ["gcc", "libc6-dev", "openssl", "git", "man-db", "zsh", "fish", "systemd", "chromium", "fonts-dejavu-core"]


class Machine:
    """A copy of the tree's scripts on a machine with just the programs they need."""

    def __init__(self, place: Path) -> None:
        self.tree, self.bin, self.log = place / "tree", place / "bin", place / "log"
        shutil.copytree(ROOT / "scripts", self.tree / "scripts")
        shutil.copy(ROOT / "pyproject.toml", self.tree)
        self.bin.mkdir()
        for name in NEEDED:
            found = shutil.which(name)
            assert found, name
            (self.bin / name).symlink_to(found)
        self.program("python3", PYTHON)
        self.program("apt-get", APT)
        self.program("id", "#!/bin/bash\necho 0\n")

    def program(self, name: str, text: str) -> None:
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        environ = {"PATH": str(self.bin), "HOME": str(self.tree.parent / "home"), "LOG": str(self.log), "CI": "true"}
        return subprocess.run(
            ["bash", *command],
            cwd=self.tree,
            env=environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def done(self) -> list[str]:
        """What was asked of apt-get, venv and pip since the last call."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("script", BASH_SCRIPTS, ids=lambda path: path.name)
def test_script_parses_and_is_executable(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script], capture_output=True, check=False).stderr == b""
    assert os.access(script, os.X_OK)


def test_the_promised_scripts_are_there() -> None:
    assert {"setup", "mount", "test", "check", "run"} <= {path.name for path in BASH_SCRIPTS}


def test_no_script_names_a_host() -> None:
    for path in BASH_SCRIPTS:
        text = path.read_text()
        assert not re.findall(r"https?://(?!127\.0\.0\.1|localhost)|--index-url|--extra-index|--find-links", text), path


def test_help_of_mount_sets_nothing_up(machine: Machine) -> None:
    told = machine.run("scripts/mount", "--help")
    assert told.returncode == 0
    assert "scripts/mount [MOUNTPOINT]" in told.stdout
    assert not (machine.tree / ".venv").exists()
    assert machine.done() == []


def test_fresh_machine(machine: Machine) -> None:
    told = machine.run("scripts/setup")
    assert told.returncode == 0, told.stderr
    assert machine.done() == [
        "apt update",
        "apt install -y --no-install-recommends fuse3",
        "apt install -y --no-install-recommends python3.11-venv",
        "venv",
        "apt install -y --no-install-recommends libfuse3-dev pkg-config gcc libc6-dev python3.11-dev",
        "pip install -e .",
    ]
    assert "installing system packages with apt-get: fuse3" in told.stderr
    assert told.stdout == ""


def ready(machine: Machine, *arguments: str) -> None:
    for name in ("fusermount3", "mkfs.ext4", "mkfs.xfs", "mkfs.btrfs", "pkg-config", *PROGRAMS):
        machine.program(name, "#!/bin/bash\n")
    for name in ("venv", "headers"):
        Path(f"{machine.log}.{name}").touch()
    assert machine.run("scripts/setup", *arguments).returncode == 0


def test_second_run_does_nothing(machine: Machine) -> None:
    ready(machine)
    assert machine.done() == ["venv", "pip install -e ."]
    told = machine.run("scripts/setup")
    assert (told.returncode, told.stdout, told.stderr) == (0, "", "")
    assert machine.done() == []


def test_changed_requirements_are_installed_into_the_same_environment(machine: Machine) -> None:
    ready(machine)
    machine.done()
    with (machine.tree / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert machine.run("scripts/setup").returncode == 0
    assert machine.done() == ["pip install -e ."]


def test_torch_comes_first_and_alone(machine: Machine) -> None:
    ready(machine, "--dev")
    assert machine.done() == [
        "venv",
        "pip install torch==2.13.0",
        "pip install -e .[check,test,loaders,oracle]",
        "pip install --upgrade --no-deps --target .venv/transformers-4 transformers==4 tokenizers==0",
    ]
    machine.run("scripts/setup")
    assert machine.done() == []  # whoever can test can mount


def asked_for(machine: Machine) -> list[list[str]]:
    """The packages of each call of apt-get, but for those of file systems: this machine may have these."""
    calls = [line.split()[4:] for line in machine.done() if line.startswith("apt install")]
    return [[package for package in call if package not in ("e2fsprogs", "xfsprogs", "btrfs-progs")] for call in calls]


def test_setup_for_tests_brings_at_once_what_they_would_skip_for(machine: Machine) -> None:
    ready(machine)
    for name in PROGRAMS:
        (machine.bin / name).unlink()
    machine.done()
    told = machine.run("scripts/setup", "--dev")
    assert told.returncode == 0 and "not here" not in told.stderr, told.stderr
    assert asked_for(machine) == [BRINGING]
    machine.run("scripts/setup", "--dev")
    assert machine.done() == []


def test_setup_for_tests_brings_the_file_systems_that_they_make() -> None:
    """Else the tests of reflinks skip. Read, not run: the script finds the mkfs of this machine, whatever its PATH."""
    wanted = re.findall("^ *want (.*)", (ROOT / "scripts/setup").read_text(), re.M)
    assert {"ext4", "xfs", "btrfs"} <= set(" ".join(wanted).split())


def test_what_cannot_be_had_for_tests_is_one_line_and_no_failure(machine: Machine) -> None:
    ready(machine)
    for name in ("fish", "chromium", "man"):
        (machine.bin / name).unlink()
    Path(f"{machine.log}.unknown").write_text("fish")
    machine.done()
    for tried in ([["man-db", "fish", "chromium", "fonts-dejavu-core"], ["man-db"], ["fish"], BRINGING[-2:]], []):
        told = machine.run("scripts/setup", "--dev")
        assert told.returncode == 0
        (said,) = [line for line in told.stderr.splitlines() if "skip" in line]
        assert said == "cakefs setup: not here and not to be installed, so tests skip: fish"
        assert "E: " not in told.stderr
        assert asked_for(machine) == tried, "what could not be had is not asked for again"


@pytest.mark.parametrize("lacking", ["sudo", "manager"])
def test_who_cannot_install_programs_for_tests_is_told_what_they_skip_for(machine: Machine, lacking: str) -> None:
    ready(machine)
    for name in ("zsh", "systemd-analyze"):
        (machine.bin / name).unlink()
    machine.done()
    if lacking == "sudo":
        machine.program("id", "#!/bin/bash\necho 1000\n")
    else:
        (machine.bin / "apt-get").unlink()
    told = machine.run("scripts/setup", "--dev")
    assert told.returncode == 0
    assert told.stderr.startswith("cakefs setup: not here and not to be installed, so tests skip: zsh systemd\n")
    assert asked_for(machine) == []


def test_moved_tree_gets_a_new_environment(machine: Machine) -> None:
    ready(machine)
    machine.done()
    machine.tree = machine.tree.rename(machine.tree.with_name("elsewhere"))
    assert machine.run("scripts/setup").returncode == 0
    assert machine.done() == ["venv", "pip install -e ."]


def test_failed_install_is_tried_twice_and_not_taken_for_done(machine: Machine) -> None:
    broken = Path(f"{machine.log}.broken")
    broken.touch()
    for name in ("fusermount3", "pkg-config", "gcc"):
        machine.program(name, "#!/bin/bash\n")
    machine.program("sleep", "#!/bin/bash\n")
    for name in ("venv", "headers"):
        Path(f"{machine.log}.{name}").touch()
    told = machine.run("scripts/setup")
    assert told.returncode == 1
    assert "could not install cakefs" in told.stderr
    assert machine.done() == ["venv", "pip install -e .", "pip install -e ."]
    broken.unlink()
    assert machine.run("scripts/setup").returncode == 0
    assert machine.done() == ["pip install -e ."]


def test_no_python(machine: Machine) -> None:
    machine.program("python3", "#!/bin/bash\nexit 1\n")
    told = machine.run("scripts/setup")
    assert told.returncode == 1
    assert "no Python >= 3.11" in told.stderr
    assert machine.done() == []


def test_ordinary_user_without_sudo_is_told_what_to_run(machine: Machine) -> None:
    machine.program("id", "#!/bin/bash\necho 1000\n")
    told = machine.run("scripts/setup")
    assert told.returncode == 1
    assert "as root run: apt-get install fuse3" in told.stderr
    assert machine.done() == []


def test_sudo_only_when_not_root(machine: Machine) -> None:
    machine.program("id", "#!/bin/bash\necho 1000\n")
    machine.program("sudo", '#!/bin/bash\necho sudo >>"$LOG"\nexec "$@"\n')
    assert machine.run("scripts/setup").returncode == 0
    assert machine.done()[:4] == ["sudo", "apt update", "sudo", "apt install -y --no-install-recommends fuse3"]


def test_mount_hands_its_arguments_on(machine: Machine) -> None:
    ready(machine)
    command = machine.tree / ".venv/bin/cakefs"
    command.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\nexit 7\n')
    machine.program("id", "#!/bin/bash\necho 1000\n")
    told = machine.run("scripts/mount", "/tmp/my models", "--offline")
    assert told.returncode == 7
    assert told.stdout.splitlines() == ["mount", "/tmp/my models", "--offline"]
    link = machine.tree.parent / "home/.local/bin/cakefs"
    assert link.readlink() == command
    assert told.stderr == f'linked {link}\nhint: export PATH="{link.parent}:$PATH"\n'


def test_status_of_the_tests_and_of_the_check(machine: Machine) -> None:
    ready(machine, "--dev")
    for name, status in (("ruff", 0), ("mypy", 1), ("pytest", 0)):
        tool = machine.tree / ".venv/bin" / name
        tool.write_text(f"#!/bin/bash\nexit {status}\n")
        tool.chmod(0o755)
    told = machine.run("scripts/check")
    assert (told.returncode, told.stderr.splitlines()[-1]) == (1, "check failed: mypy")
    assert machine.run("scripts/test", "-k", "x").returncode == 1
