"""The text of the systemd unit: the template that is shipped, with the command and settings of whoever installs it."""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from cakefs.errors import UserError
from cakefs.execute import import_environment, python_command

NAME = "cakefs.service"
# What a service that systemd starts does not inherit from the shell. Never a token: that is read from its file.
KEPT = (
    "CAKEFS_CONFIG",
    "CAKEFS_STORE",
    "HF_ENDPOINT",
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "HF_TOKEN_PATH",
    "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME",
    "XDG_DATA_HOME",
    "SSL_CERT_DIR",
    "SSL_CERT_FILE",
    "ALL_PROXY",
    "HTTPS_PROXY",
    "HTTP_PROXY",
    "NO_PROXY",
)


def template() -> str:
    """systemd/cakefs.service: in the package once it is installed, beside it in a source tree."""
    shipped = files("cakefs") / "data" / NAME
    beside = Path(__file__).parents[2] / "systemd" / NAME
    return shipped.read_text() if shipped.is_file() else beside.read_text()


def unit_text(mountpoint: str, arguments: Sequence[str], environ: Mapping[str, str]) -> str:
    """The unit that mounts at a place.

    Args:
        arguments: Further ones of `cakefs mount`.
    """
    command = [*own_command(), "mount", "--foreground", *arguments, mountpoint]
    settings = [f"Environment={_quoted(f'{name}={value}')}" for name, value in kept(environ).items()]
    start = "\n".join([*settings, "ExecStart=" + " ".join(_quoted(word).replace("$", "$$") for word in command)])
    text, count = re.subn(r"^ExecStart=.*$", lambda _: start, template(), flags=re.MULTILINE)
    assert count == 1, "the template has one ExecStart"
    return text


def mountpoint_of(text: str) -> str:
    """Where a unit that `unit_text` made mounts; nothing where somebody else wrote it."""
    found = re.search(r"^ExecStart=(.*)$", text, re.MULTILINE)
    try:
        word = shlex.split(found[1])[-1] if found else ""
    except (ValueError, IndexError):
        return ""
    place = word.replace("$$", "$").replace("%%", "%")
    return place if os.path.isabs(place) else ""


def kept(environ: Mapping[str, str]) -> dict[str, str]:
    """The settings in an environment that the service needs; none with a password in it."""
    found = {name: environ.get(name) or environ.get(name.lower(), "") for name in KEPT}
    if place := import_environment().get("PYTHONPATH"):
        found["PYTHONPATH"] = place
    return {name: value for name, value in found.items() if value and not re.search(r"//[^/]*@", value)}


def own_command() -> list[str]:
    """How to start the cakefs that runs now, from anywhere."""
    script = Path(sys.executable).parent / "cakefs"
    return [str(script)] if shutil.which(script) else python_command("cakefs")


def write(path: Path, text: str) -> bool:
    """False where the file says that already. Raises UserError."""
    try:
        if path.is_file() and path.read_text() == text:
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        temp = path.with_name(f".{path.name}.{os.getpid()}")
        temp.write_text(text)
        temp.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    return True


def _quoted(word: str) -> str:
    """One word of a unit file, in which `%` begins a specifier."""
    if not word.isprintable():
        raise UserError(f"systemd cannot be told {word!r}", hint="choose a path without control characters")
    word = word.replace("%", "%%")
    if re.fullmatch(r"[\w@%+=:,./-]+", word, re.ASCII):
        return word
    return '"' + word.replace("\\", "\\\\").replace('"', '\\"') + '"'
