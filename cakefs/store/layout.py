"""The store's directory: made on first use, recognised by its `format` file, refused when newer.

The format file comes first and appears whole, so a directory that has it is ours, however far its creation got.
"""

import os
import secrets
from pathlib import Path

from cakefs.errors import UserError
from cakefs.store.files import translated

FORMAT = 1
_FORMAT_NAME = "cakefs-store"
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
                raise UserError(f"no store at {path}", hint="cakefs add makes one; see CAKEFS_STORE") from None
            _write_format(path)
        except NotADirectoryError:
            raise UserError(f"{path} is not a directory", hint="see CAKEFS_STORE") from None
        for name in _DIRECTORIES:
            if not (path / name).is_dir():
                (path / name).mkdir(mode=0o700, exist_ok=True)


def _check_format(path: Path, text: bytes) -> None:
    name, _, version = text.decode("ascii", "replace").strip().partition(" ")
    if name != _FORMAT_NAME or not version.isdecimal():
        raise UserError(f"{path} is not a cakefs store: its format file is unknown", hint="see CAKEFS_STORE")
    if int(version) > FORMAT:
        raise UserError(
            f"store {path} has format {version}, and this cakefs knows up to {FORMAT}",
            hint="upgrade cakefs, or choose another store with CAKEFS_STORE",
        )


def _write_format(path: Path) -> None:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Others may be making the same store right now: their temporary files are not strange.
    if any(n not in ("format", *_DIRECTORIES) and not n.startswith(".format-") for n in os.listdir(path)):
        raise UserError(f"{path} is not empty and not a cakefs store", hint="name an empty directory in CAKEFS_STORE")
    temporary = path / f".format-{secrets.token_hex(8)}"
    with open(temporary, "xb") as file:
        file.write(f"{_FORMAT_NAME} {FORMAT}\n".encode())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path / "format")
