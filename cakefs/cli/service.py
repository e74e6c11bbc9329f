"""`cakefs service`: the systemd service of this user, which mounts at login."""

import argparse
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from cakefs.cli import unit
from cakefs.cli.mount import add_mount_options, flags_of
from cakefs.cli.options import add_json_option, config_of
from cakefs.cli.out import Out
from cakefs.errors import CakeError, UserError

HELP = "mount at login: the systemd service of this user"
EPILOG = """\
  cakefs service install [MOUNTPOINT]    writes the unit for this cakefs, starts it, and at every login; what is
                                         given as for `cakefs mount` (--limit, --offline ...) holds for all of them
  cakefs service uninstall               stops it and removes what install wrote
  cakefs service status                  whether it runs, and since when
  cakefs service logs [--follow]         what it logged

install also writes the manual page and the completions for bash and fish, below $XDG_DATA_HOME and $XDG_CONFIG_HOME.
A service does not see what is exported in a shell: the settings that are there at install are written into the unit, a
token never is (`hf auth login` keeps it where the service finds it).
"""
NO_SYSTEMD = "`cakefs mount` works without; in a shell of su or sudo: log in as the user, or `machinectl shell USER@`"
MADE = "made by `cakefs service install`"
LINES = 200
SHOWN = ("LoadState", "ActiveState", "SubState", "UnitFileState", "MainPID", "NRestarts", "StatusText", "Result")


class Extra(NamedTuple):
    """A file that comes with the service: `text` begins with a comment that says so."""

    what: str
    path: Path
    text: str


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("action", choices=("install", "uninstall", "status", "logs"), help="what to do")
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", nargs="?", help="for install (default: ~/models)")
    add_mount_options(parser)
    parser.add_argument("-f", "--follow", action="store_true", help="for logs: go on as more is logged")
    add_json_option(parser)


def run(args: argparse.Namespace, out: Out) -> int:
    actions = {"install": _install, "uninstall": _uninstall, "status": _status, "logs": _logs}
    if args.action != "install" and args.mountpoint:
        raise UserError(f"service {args.action} takes no MOUNTPOINT")
    return actions[args.action](args, out)


def _install(args: argparse.Namespace, out: Out) -> int:
    from cakefs.fs.place import cakefs_at, canonical, check_fuse

    check_fuse()
    mountpoint = canonical(config_of(args).mountpoint)
    if args.store:
        args.store = os.path.abspath(args.store)
    _require_systemd()
    runs = _properties()["ActiveState"] == "active"
    if cakefs_at(mountpoint) and not runs:
        raise UserError(f"a cakefs is already mounted at {mountpoint}", hint=f"`cakefs umount {mountpoint}` first")
    changed = unit.write(_unit_path(), unit.unit_text(mountpoint, flags_of(args), os.environ))
    for extra in _extras():
        unit.write(extra.path, extra.text)
    _systemctl("daemon-reload")
    _systemctl("enable", unit.NAME)
    started = _run("systemctl", "--user", "restart" if runs and changed else "start", unit.NAME)
    if started.returncode:
        why = _last_words() or _first_line(started.stderr)
        raise CakeError(f"the service does not start: {why}", hint="cakefs service logs")
    out.result(str(_unit_path()), f"mounted {mountpoint}, now and at every login ({_unit_path()})")
    _advise(out)
    return 0


def _advise(out: Out) -> None:
    """What else there is to know, once it runs."""
    user = os.environ.get("USER") or str(os.getuid())
    linger = _run("loginctl", "show-user", user, "--property=Linger", "--value")
    if linger.returncode == 0 and linger.stdout.strip() != "yes":
        out.hint("`loginctl enable-linger` mounts at boot and stays after logout")
    if os.environ.get("HF_TOKEN"):
        out.hint("the service does not see HF_TOKEN: `hf auth login` keeps the token where it finds it")
    out.note("completion for zsh: `cakefs completion zsh`; in new shells of bash and fish it is there")


def _uninstall(args: argparse.Namespace, out: Out) -> int:
    from cakefs.fs.place import clear_dead

    path = _unit_path()
    if path.exists() and (trouble := _systemd_trouble()):
        out.note(f"not stopped: {trouble}")
    elif path.exists():
        _systemctl("disable", "--now", unit.NAME)
        if place := unit.mountpoint_of(path.read_text(errors="replace")):
            clear_dead(place)  # it may have died since it was started last
    removed = [path] * path.exists() + [extra.path for extra in _extras() if _is_ours(extra.path)]
    try:
        for found in removed:
            found.unlink()
    except OSError as error:
        raise CakeError(f"cannot remove {error.filename}: {error.strerror}") from error
    if not _systemd_trouble():
        _systemctl("daemon-reload")
    out.result(str(path), f"removed {path}" if removed else "no service is installed")
    return 0


def _status(args: argparse.Namespace, out: Out) -> int:
    _require_systemd()
    found = _properties()
    if args.json:
        out.json({"unit": str(_unit_path()), **found})
    elif found["LoadState"] != "loaded":
        out.line("not installed")
        out.hint("cakefs service install")
    else:
        out.line(_state(found))
        if found["StatusText"]:
            out.line(found["StatusText"])
        if found["ActiveState"] == "inactive":
            out.hint(f"systemctl --user start {unit.NAME.removesuffix('.service')}")
        elif found["ActiveState"] != "active":
            out.hint("cakefs service logs")
    return 0 if found["ActiveState"] == "active" else 1


def _state(found: Mapping[str, str]) -> str:
    failure = f" ({found['Result']})" if found["Result"] not in ("", "success") else ""
    parts = [f"{found['ActiveState']}{failure}"]
    if _runs(found):
        parts.append(f"pid {found['MainPID']}")
    parts.append("starts at login" if found["UnitFileState"] == "enabled" else "does not start at login")
    if found["NRestarts"] not in ("", "0"):
        parts.append("restarted once" if found["NRestarts"] == "1" else f"restarted {found['NRestarts']} times")
    return ", ".join(parts)


def _logs(args: argparse.Namespace, out: Out) -> int:
    """Of the journal of this user, or of the system's where users have none of their own."""
    out.flush()
    follow = ["--follow"] * args.follow
    output = ["--output=json"] * args.json
    command = ["journalctl", f"--user-unit={unit.NAME}", f"--lines={LINES}", "--no-hostname", *follow, *output]
    try:
        return subprocess.run(command, check=False).returncode
    except FileNotFoundError:
        raise UserError("journalctl not found", hint="a mount that systemd did not start logs to a file") from None
    except KeyboardInterrupt:
        return 0


def _extras() -> list[Extra]:
    from cakefs.cli.completion import script
    from cakefs.cli.manual import man_page

    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share")
    return [
        Extra("manual page", data / "man/man1/cakefs.1", f'.\\" {MADE}\n{man_page()}'),
        Extra("bash", data / "bash-completion/completions/cakefs", f"# {MADE}\n{script('bash')}"),
        Extra("fish", _config_home() / "fish/completions/cakefs.fish", f"# {MADE}\n{script('fish')}"),
    ]


def _is_ours(path: Path) -> bool:
    try:
        return MADE in path.read_text().partition("\n")[0]
    except (OSError, UnicodeDecodeError):
        return False


def _config_home() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")


def _unit_path() -> Path:
    return _config_home() / "systemd/user" / unit.NAME


def _require_systemd() -> None:
    if trouble := _systemd_trouble():
        raise UserError(f"no systemd of this user to be reached here: {trouble}", hint=NO_SYSTEMD)


def _systemd_trouble() -> str:
    """Why the systemd of this user cannot be asked, or nothing."""
    asked = _run("systemctl", "--user", "show", "--property=Version")
    return _first_line(asked.stderr) or "it does not answer" if asked.returncode else ""


def _properties() -> dict[str, str]:
    asked = _systemctl("show", unit.NAME, f"--property={','.join(SHOWN)}")
    found = dict(line.partition("=")[::2] for line in asked.splitlines())
    found = {name: found.get(name, "") for name in SHOWN}
    if not _runs(found):
        found["StatusText"] = ""  # systemd keeps what a process said last, also when it is gone
    return found


def _runs(found: Mapping[str, str]) -> bool:
    return found["MainPID"] not in ("", "0")


def _last_words() -> str:
    """The error that the service ended with, as it logged it."""
    said = _run("journalctl", f"--user-unit={unit.NAME}", "--lines=20", "--output=cat").stdout
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    return errors[-1].removeprefix("error: ") if errors else ""


def _systemctl(*arguments: str) -> str:
    done = _run("systemctl", "--user", *arguments)
    if done.returncode:
        raise CakeError(f"systemctl --user {arguments[0]} failed: {_first_line(done.stderr)}")
    return done.stdout


def _run(*command: str) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=os.environ | {"LC_ALL": "C", "SYSTEMD_COLORS": "0"},
            check=False,
        )
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]} is not installed")


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
