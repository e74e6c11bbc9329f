"""A broken catalog: found out by a child process, as reading one may end a process, and made again from its copy."""

import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from cakefs.errors import CakeError, CorruptData, UserError
from cakefs.execute import child_environment, python_command
from cakefs.store import backup, lease
from cakefs.store.files import locked
from cakefs.store.store import Store


class Recovered(NamedTuple):
    """Attributes:
    aside: The broken catalog.
    as_of: Of the copy that took its place, in Unix seconds; None when there was none: the store is empty now.
    models: How many are in it.
    """

    aside: Path | None
    as_of: float | None
    models: int


def recover(store: Path) -> Recovered | None:
    """Puts the copy in the place of a broken catalog. Returns: None when it is not broken.

    Raises:
        UserError: A mount uses the store.
    """
    if not (store / "format").exists() or not _is_broken(store):
        return None
    if lease.any_alive(store / "run"):
        raise UserError(f"catalog of {store} is broken, and a mount uses it", hint="cakefs umount, then this again")
    with locked(store / "gc.lock"):
        copy = backup.copy_path(store)
        as_of = copy.stat().st_mtime if copy.exists() else None
        aside = backup.put_back(store)
        if _is_broken(store):
            backup.drop_copy(store)
            backup.put_back(store)
            as_of = None
    with Store.open(store, create=False) as opened:
        return Recovered(aside, as_of, len(opened.catalog.models.all()))


def told(found: Recovered) -> list[str]:
    """In words, for the user."""
    lines = [f"the catalog was broken; it is now {found.aside}"] if found.aside else ["the catalog was gone"]
    if found.as_of is None:
        return [*lines, "there was no copy of it: the store is empty, and `cakefs add` brings models back"]
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.as_of))
    return [*lines, f"in its place is the copy of {when}, with {found.models} models"]


def _is_broken(store: Path) -> bool:
    """Whether it cannot be read, or changed, from end to end: told by an error, or by the end of who tried."""
    with backup.scratch(store) as empty:
        command = python_command("cakefs.engine.recover", str(store), str(empty))
        code = subprocess.run(command, env=child_environment(), capture_output=True, check=False).returncode
    return code == CorruptData.exit_code or code < 0


def main() -> int:
    store, empty = map(Path, sys.argv[1:])
    try:
        backup.check_present(store)
        backup.check(store / "catalog")
        backup.try_out(store / "catalog", empty)
    except CakeError as error:
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
