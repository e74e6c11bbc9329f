"""`cakefs status`: the live mounts with their counters, and the store."""

import argparse
from typing import TYPE_CHECKING, Any

from cakefs.cli.figures import lines_of, store_status
from cakefs.cli.options import add_json_option, config_of
from cakefs.cli.out import Out
from cakefs.cli.watch import watch

if TYPE_CHECKING:
    from cakefs.config import Config

HELP = "live mounts with their counters, and the size and limit of the store"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-w", "--watch", action="store_true", help="show it again every second, until Ctrl-C")
    add_json_option(parser)


def run(args: argparse.Namespace, out: Out) -> int:
    config = config_of(args)
    if args.watch:
        watch(lambda store: {"store": store, "mounts": _mounts()}, config.store, out, as_json=args.json)
    elif args.json:
        out.json(_read(config))
    elif out.quiet:
        for mount in _mounts():
            out.line(mount["mountpoint"])
    else:
        for line in lines_of(_read(config)):
            out.line(line)
    return 0


def _read(config: "Config") -> dict[str, Any]:
    from cakefs.engine.serve.sizes import count

    return {"store": store_status(config.store, count(config.store)), "mounts": _mounts()}


def _mounts() -> list[dict[str, Any]]:
    from cakefs.cli.live import cakefs_mountpoints, read_status

    found = []
    for mountpoint in cakefs_mountpoints():
        said = read_status(mountpoint)
        answer = {"trouble": said} if isinstance(said, str) else said
        found.append({"mountpoint": mountpoint, "answers": not isinstance(said, str), **answer})
    return found
