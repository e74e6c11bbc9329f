"""The store's directory: made on first use, recognised by its `format` file, refused when newer.

The format file comes first and appears whole, so a directory that has it is ours, however far its creation got. All of
it is on the disk before anything is stored: a power cut must not leave blobs in what is no store.
"""

import os
import secrets
from contextlib import suppress
from pathlib import Path

from cakefs.errors import UserError
from cakefs.store.environment import NEW
from cakefs.store.files import make_directory, sync_directories, translated, unlink

FORMAT = 1
_FORMAT_NAME = "cakefs-store"
_NEW = ".format-"  # Begins the name of a format file that is being written.
_DIRECTORIES = ("catalog", "blobs", "partial", "quarantine", "run")


def open_layout(path: Path, *, create: bool) -> None:
    """Checks the store at `path`, or makes one in an absent or empty directory.

    Raises: UserError: It is no store, a newer one, or absent while `create` is false.
    """
    with translated(f"open store {path}"):
        try:
            _check_format(path, (path / "format").read_bytes())
        except FileNotFoundError:
            if not create:
                check_vacant(path)
                raise UserError(f"no store at {path}", hint="cakefs add makes one; see CAKEFS_STORE") from None
            _write_format(path)
        except NotADirectoryError:
            raise UserError(f"{path} is not a directory", hint="see CAKEFS_STORE") from None
        absent = [path / name for name in _DIRECTORIES if not (path / name).is_dir()]
        for directory in absent:
            directory.mkdir(mode=0o700, exist_ok=True)
        if absent:
            sync_directories([path])  # of a new store the format file's name, too


def sweep_layout(path: Path) -> None:
    """Removes what a crash left of the making of the store."""
    for debris in (*path.glob(f"{_NEW}*"), *path.glob(f"catalog/{NEW}*")):
        unlink(debris)


def _check_format(path: Path, text: bytes) -> None:
    name, _, version = text.decode("ascii", "replace").strip().partition(" ")
    if name != _FORMAT_NAME or not version.isdecimal():
        raise UserError(f"{path} is not a cakefs store: its format file is unknown", hint="see CAKEFS_STORE")
    if int(version) > FORMAT:
        raise UserError(
            f"store {path} has format {version}, and this cakefs knows up to {FORMAT}",
            hint="upgrade cakefs, or choose another store with CAKEFS_STORE",
        )


def check_vacant(path: Path) -> None:
    """Raises UserError where something is that is no store, and could not become one."""
    with translated(f"open store {path}"):
        try:
            names = os.listdir(path)
        except FileNotFoundError:
            return
        except NotADirectoryError:
            raise UserError(f"{path} is not a directory", hint="see CAKEFS_STORE") from None
        # Others may be making the same store right now: their temporary files are not strange.
        if "format" not in names and any(n not in _DIRECTORIES and not n.startswith(_NEW) for n in names):
            hint = "name an empty directory in CAKEFS_STORE"
            raise UserError(f"{path} is not empty and not a cakefs store", hint=hint)


def _write_format(path: Path) -> None:
    make_directory(path, 0o700)
    check_vacant(path)
    temporary = path / f"{_NEW}{secrets.token_hex(8)}"
    with open(temporary, "xb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(f"{_FORMAT_NAME} {FORMAT}\n".encode())
        file.flush()
        os.fsync(file.fileno())
    with suppress(FileNotFoundError):  # swept by somebody, for whom the store was made already
        os.replace(temporary, path / "format")
