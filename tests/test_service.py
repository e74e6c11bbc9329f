"""The login service: its unit, the commands around it, and its life under a real `systemd --user`."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from cakefs.cli import unit
from cakefs.cli.main import main
from tests.fs_child import eventually
from tests.user_systemd import Session, user_systemd, why_not

ROOT = Path(__file__).parents[1]
UNIT = "/run/home/.config/systemd/user/cakefs.service"
MOUNT = "/run/home/models"
needs_systemd = pytest.mark.skipif(bool(why_not()), reason=why_not())


def lines(text: str, name: str) -> list[str]:
    return [line.partition("=")[2] for line in text.splitlines() if line.startswith(f"{name}=")]


def test_the_unit_starts_this_very_cakefs_at_that_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit, "own_command", lambda: ["/opt/my tools/cakefs"])
    text = unit.unit_text('/srv/a "b" 50%/$x', ["--offline"], {})
    assert lines(text, "ExecStart") == ['"/opt/my tools/cakefs" mount --foreground --offline "/srv/a \\"b\\" 50%%/$$x"']
    assert unit.mountpoint_of(text) == '/srv/a "b" 50%/$x'
    assert unit.mountpoint_of(unit.template()) == unit.mountpoint_of("") == unit.mountpoint_of('ExecStart="') == ""
    assert lines(text, "Type") == ["notify"] and lines(text, "WatchdogSec") == ["120"]


def test_the_command_is_absolute_and_runs() -> None:
    command = unit.own_command()
    assert os.path.isabs(command[0])
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True, cwd="/", env=environment)
    assert done.stdout.startswith("cakefs ")


def test_settings_of_the_shell_are_kept_and_secrets_are_not() -> None:
    environment = {
        "CAKEFS_STORE": "/big disk/100%",
        "HF_TOKEN": "hf_secret",
        "https_proxy": "http://proxy:3128",
        "ALL_PROXY": "http://me:secret@proxy:3128",
        "HF_HOME": "",
        "EDITOR": "vi",
    }
    text = unit.unit_text("/m", [], environment)
    kept = [line for line in lines(text, "Environment") if not line.startswith("PYTHONPATH=")]
    assert kept == ['"CAKEFS_STORE=/big disk/100%%"', "HTTPS_PROXY=http://proxy:3128"]
    assert "secret" not in text


def test_the_one_template_is_shipped_in_the_package() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert build["force-include"] == {"systemd/cakefs.service": "cakefs/data/cakefs.service"}
    assert unit.template() == (ROOT / "systemd/cakefs.service").read_text()


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze (systemd) is absent")
@pytest.mark.parametrize("installed", [False, True])
def test_systemd_finds_no_fault_with_the_unit(tmp_path: Path, installed: bool) -> None:
    text = unit.unit_text("/srv/my models", [], {"CAKEFS_STORE": "/a b"}) if installed else unit.template()
    path = tmp_path / "cakefs.service"
    path.write_text(text.replace("ExecStart=cakefs", f"ExecStart={sys.executable}"))  # it looks at no ExecSearchPath
    done = subprocess.run(
        ["systemd-analyze", "verify", "--user", "--man=no", path],
        capture_output=True,
        text=True,
        env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)},
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("command", ["install", "status"])
def test_without_systemd_it_says_so(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    if os.geteuid() != 0:
        pytest.importorskip("pyfuse3")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.path.dirname(shutil.which('fusermount3') or '')}")
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin/systemctl"
    fake.write_text("#!/bin/sh\necho 'Failed to connect to bus: No medium found' >&2\nexit 1\n")
    fake.chmod(0o755)
    assert main(["service", command]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error == "error: no systemd of this user to be reached here: Failed to connect to bus: No medium found"
    assert hint.startswith("hint: `cakefs mount` works without")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bin"], "nothing is written"


def test_uninstall_removes_what_install_wrote_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    own = tmp_path / "bash-completion/completions/cakefs"
    own.parent.mkdir(parents=True)
    own.write_text("# my own\n")
    assert main(["service", "uninstall"]) == 0
    assert capsys.readouterr().out == "no service is installed\n"
    assert own.read_text() == "# my own\n"


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    try:
        with user_systemd(tmp_path_factory.mktemp("systemd") / "log") as found:
            yield found
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture
def installed(session: Session) -> Iterator[Session]:
    """An ordinary user's service, through fusermount3, under the unit as it is shipped."""
    session.cakefs("service", "install")
    try:
        yield session
    finally:
        assert "Traceback" not in session.outside("/run/home/log").read_text()
        session.cakefs("service", "uninstall", check=False)


@needs_systemd
def test_a_service_is_installed_runs_and_is_uninstalled(session: Session) -> None:
    said = session.cakefs("service", "install", "--limit", "1GB")
    assert said.stdout == f"mounted {MOUNT}, now and at every login ({UNIT})\n"
    assert session.run("ls", "-a", MOUNT).stdout.split() == [".", "..", ".cakefs"]
    assert session.show("cakefs", "UnitFileState") == "enabled"
    status = session.cakefs("service", "status").stdout
    assert status.startswith("active, pid ") and f"serving {MOUNT}: 0 files are open" in status
    assert session.show("cakefs", "NRestarts") == "0"
    before = session.show("cakefs", "MainPID")
    session.cakefs("service", "install", "--limit", "1GB")
    assert session.show("cakefs", "MainPID") == before, "nothing has changed: it goes on"
    session.cakefs("service", "install")
    assert session.show("cakefs", "MainPID") != before, "as it is wanted now"
    for path in (".local/share/man/man1/cakefs.1", ".local/share/bash-completion/completions/cakefs"):
        assert session.outside(f"/run/home/{path}").stat().st_size > 1000

    assert session.cakefs("service", "uninstall").stdout == f"removed {UNIT}\n"
    assert session.run("ls", "-a", MOUNT).stdout.split() == [".", ".."], "unmounted"
    left = session.run("find", "/run/home/.config", "/run/home/.local", "-type", "f").stdout.split()
    assert left == []
    assert session.cakefs("service", "status", check=False).returncode == 1


@needs_systemd
def test_the_status_of_a_service_that_does_not_run_says_nothing_of_one_that_did(installed: Session) -> None:
    def status() -> tuple[int, list[str], list[str]]:
        done = installed.cakefs("service", "status", check=False)
        return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()

    stopped = (1, ["inactive, starts at login"], ["hint: systemctl --user start cakefs"])
    installed.run("systemctl", "--user", "stop", "cakefs")
    assert status() == stopped
    told = json.loads(installed.cakefs("service", "status", "--json", check=False).stdout)
    assert (told["ActiveState"], told["StatusText"]) == ("inactive", "")
    installed.run("systemctl", "--user", "start", "cakefs")
    assert status()[0] == 0
    installed.cakefs("umount")
    assert eventually(lambda: status() == stopped), status()
    drop_in = installed.outside(f"{UNIT}.d")
    installed.run("mkdir", "-p", f"{UNIT}.d")
    (drop_in / "slow.conf").write_text("[Service]\nRestartSec=1000\n")
    try:
        installed.run("systemctl", "--user", "daemon-reload")
        installed.run("systemctl", "--user", "start", "cakefs")
        os.kill(int(installed.show("cakefs", "MainPID")), signal.SIGKILL)
        assert eventually(lambda: installed.show("cakefs", "SubState") == "auto-restart")
        assert status() == (1, ["activating (signal), starts at login"], ["hint: cakefs service logs"])
        installed.cakefs("service", "uninstall")
        assert installed.run("ls", "-a", MOUNT).stdout.split() == [".", ".."], "what died is cleared, too"
    finally:
        shutil.rmtree(drop_in)


@needs_systemd
@pytest.mark.parametrize("ended", ["killed", "restarted"])
def test_a_killed_service_leaves_errors_and_works_again_by_itself(installed: Session, ended: str) -> None:
    """Restarted is what makes an update of cakefs take effect."""
    holder = subprocess.Popen(
        installed.command("sh", "-c", f"exec 3<{MOUNT}/.cakefs/status.json; echo; exec sleep 1000"),
        env=installed.environment,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"\n"
        before = installed.show("cakefs", "MainPID")
        if ended == "killed":
            os.kill(int(before), signal.SIGKILL)
            assert eventually(lambda: installed.show("cakefs", "NRestarts") == "1", 30)
            assert eventually(lambda: installed.show("cakefs", "ActiveState") == "active", 30)
        else:
            installed.run("systemctl", "--user", "restart", "cakefs")
        assert installed.show("cakefs", "MainPID") != before
        assert installed.run("ls", "-a", MOUNT).stdout.split() == [".", "..", ".cakefs"]
        read = installed.run("timeout", "10", "cat", f"/proc/{holder.pid}/fd/3", check=False)
        assert read.returncode == 1 and "timeout" not in read.stderr, "an error, not a hang"
        assert installed.run("grep", "-c", f" {MOUNT} ", "/proc/self/mountinfo").stdout == "1\n"
    finally:
        holder.kill()
        holder.wait()
        if holder.stdout is not None:
            holder.stdout.close()


@needs_systemd
def test_a_hung_service_is_ended_by_the_watchdog_and_works_again(installed: Session) -> None:
    drop_in = installed.outside(f"{UNIT}.d")
    installed.run("mkdir", "-p", f"{UNIT}.d")
    (drop_in / "quick.conf").write_text("[Service]\nWatchdogSec=2\nTimeoutAbortSec=1\n")
    installed.run("systemctl", "--user", "daemon-reload")
    installed.run("systemctl", "--user", "restart", "cakefs")
    before = int(installed.show("cakefs", "MainPID"))
    os.kill(before, signal.SIGSTOP)
    try:
        assert eventually(lambda: installed.show("cakefs", "NRestarts") == "1", 30)
        assert eventually(lambda: installed.show("cakefs", "ActiveState") == "active", 30)
        assert installed.run("ls", "-a", MOUNT).stdout.split() == [".", "..", ".cakefs"]
    finally:
        shutil.rmtree(drop_in)


@needs_systemd
def test_a_place_that_is_taken_is_said_and_not_tried_again(session: Session) -> None:
    session.run("sh", "-c", f"mkdir -p {MOUNT}; touch {MOUNT}/mine")
    try:
        done = session.cakefs("service", "install", check=False)
        assert done.returncode == 1
        assert done.stderr.startswith("error: the service does not start: ")
        assert session.show("cakefs", "NRestarts") == "0"
    finally:
        session.run("rm", f"{MOUNT}/mine")
        session.cakefs("service", "uninstall", check=False)
