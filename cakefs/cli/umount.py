"""`cakefs umount`: take a mount away, and come back when it and its server are gone."""

import argparse
import os
import select

from cakefs.cli.options import config_of
from cakefs.cli.out import Out

HELP = "unmount, and wait until the mount is gone"
END_TIMEOUT_S = 20.0  # The transfer processes of a server seal what is complete before they go.


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", nargs="?", help="where it is mounted (default: ~/models)")


def run(args: argparse.Namespace, out: Out) -> int:
    from cakefs.cli.live import server_of
    from cakefs.fs.place import cakefs_at, canonical, umount

    path = canonical(config_of(args).mountpoint)
    server = _watch(server_of(path) if cakefs_at(path) else None)
    try:
        umount(path)
        if server is not None and not select.select([server], [], [], END_TIMEOUT_S)[0]:
            why = "it finishes transfers, or another mount namespace has the mount, too"
            out.note(f"{path} is unmounted here; its process goes on: {why}")
    finally:
        if server is not None:
            os.close(server)
    out.result(path, f"unmounted {path}")
    return 0


def _watch(pid: int | None) -> int | None:
    """A descriptor that becomes readable when the process ends."""
    try:
        return None if pid is None else os.pidfd_open(pid)
    except OSError:  # gone already, or of another container
        return None
