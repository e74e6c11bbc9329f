"""What a look at the disk finds: models, each a list of files as they would be published, and where their bytes are."""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cakefs.model import Listing, is_safe_path

MARK = "user.cakefs."  # Extended attributes by which files of a cakefs mount are known.
MOST_FILES = 10_000


class Skipped(NamedTuple):
    """What is not taken, and why."""

    what: str
    why: str


class Found(NamedTuple):
    """A model on disk.

    Attributes:
        listing: Its files; an identity without digits (`sha256:`) where nothing names the content yet.
        paths: Where the bytes of a file are, by its path in the listing.
        texts: Bytes of files that are on no disk, as `paths`.
    """

    name: str
    listing: Listing
    paths: dict[str, Path]
    texts: dict[str, bytes] = {}  # noqa: RUF012


def regular(path: Path) -> os.stat_result | str:
    """The status of a file that can be taken, behind links; else why it cannot."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return "no regular file"
        if not os.access(path, os.R_OK):
            return "may not be read"
        if served(path):
            return "is served by cakefs itself"
    except FileNotFoundError:
        return "a link to nothing" if path.is_symlink() else "missing"
    except OSError as error:
        return str(error.strerror)
    return status


def served(path: Path) -> bool:
    """True below a cakefs mount: borrowing from ourselves would never end."""
    try:
        return any(name.startswith(MARK) for name in os.listxattr(path))
    except OSError:
        return False


def walk(top: Path, skip: Callable[[str, str], None]) -> dict[str, Path]:
    """The files below a directory, by relative path; hidden ones left out, links to directories not followed.

    Args:
        skip: Called with what is left out, and why.
    """
    found: dict[str, Path] = {}
    for directory, folders, names in os.walk(top, onerror=unreadable(skip)):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(directory, name)
            relative = path.relative_to(top).as_posix()
            if name.startswith("."):
                continue
            if not is_safe_path(relative):
                skip(str(path), "its name cannot be shown")
                continue
            found[relative] = path
            if len(found) > MOST_FILES:
                return found
    return found


def unreadable(skip: Callable[[str, str], None]) -> Callable[[OSError], None]:
    """For `os.walk`: a directory that cannot be read is told, not passed over."""
    return lambda error: skip(str(error.filename), str(error.strerror))
