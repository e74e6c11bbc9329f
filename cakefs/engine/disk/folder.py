"""A directory or a file of the user as a model."""

from pathlib import Path

from cakefs.engine.disk.found import MOST_FILES, Found, Skipped, regular, walk
from cakefs.errors import NotFound, UserError
from cakefs.model import Listing, Published
from cakefs.remotes.files import file_locator


def find(path: Path, name: str) -> tuple[Found, list[Skipped]]:
    """Raises NotFound and UserError for what is no model."""
    top = path.resolve()
    skipped: list[Skipped] = []
    if top.is_dir():
        files = walk(top, lambda what, why: skipped.append(Skipped(what, why)))
        if len(files) > MOST_FILES:
            raise UserError(
                f"{path} has more than {MOST_FILES:,} files: that is no model", hint="name a directory in it"
            )
    elif top.exists():
        files = {top.name: top}
    else:
        raise NotFound(f"{path} does not exist")
    published, paths = [], {}
    for relative, file in files.items():
        status = regular(file)
        if isinstance(status, str):
            skipped.append(Skipped(str(file), status))
            continue
        real = file.resolve()
        locator = file_locator(real, status)
        published.append(Published(relative, locator.size, "sha256:", locator.url, validator=locator.validator))
        paths[relative] = real
    if not published:
        why = f": {skipped[0].what} {skipped[0].why}" if skipped else ""
        raise UserError(f"no file in {path} can be taken{why}")
    origin = file_locator(top, top.stat()).url
    return Found(name, Listing(origin, "", "", tuple(published)), paths), skipped


def name_of(path: Path) -> str:
    """What a directory or file is shown as when the user does not say."""
    real = path.resolve()
    return real.name if real.is_dir() else real.stem
