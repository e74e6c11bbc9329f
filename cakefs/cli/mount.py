"""`cakefs mount`: serve in the foreground, or start a process that does and wait until its mount answers."""

import argparse
import faulthandler
import logging
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from cakefs.cli.options import config_of, with_app
from cakefs.cli.out import Out

if TYPE_CHECKING:
    from cakefs.app import App

HELP = "show all models as ordinary directories"
EPILOG = """\
Goes to the background and returns once the mount answers. A dead earlier mount at that place is cleared first.
In the foreground Ctrl-C unmounts and ends it.
"""
LOG_FORMAT = "%(asctime)s %(process)d %(levelname)s %(message)s"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument(
        "mountpoint", metavar="MOUNTPOINT", nargs="?", help="empty or new directory (default: ~/models)"
    )
    parser.add_argument("-f", "--foreground", action="store_true", help="stay, and log to stderr")
    add_mount_options(parser)
    parser.add_argument("--ready-fd", type=int, help=argparse.SUPPRESS)  # for `background.start`


def add_mount_options(parser: argparse.ArgumentParser) -> None:
    """How to mount: also what a service is installed with."""
    parser.add_argument("--allow-other", action="store_const", const=True, help="let other users see it")
    parser.add_argument(
        "--no-on-demand",
        dest="on_demand",
        action="store_const",
        const=False,
        help="show what was added and nothing else; without it, looking up org/name adds it",
    )
    parser.add_argument("--metrics", metavar="ADDR", help="counters for Prometheus at unix:/path or 127.0.0.1:PORT")
    parser.add_argument("--limit", metavar="SIZE", help="of the store, such as 200GB: the least recently used goes")


def run(args: argparse.Namespace, out: Out) -> int:
    from cakefs.cli import background

    if args.foreground:
        with background.answering(args.ready_fd) as ready:
            _serve(args, ready)
        return 0
    mountpoint = config_of(args).mountpoint
    failure = background.start(mountpoint, flags_of(args))
    if failure.exit_code:
        out.error(failure.message, failure.hint)
    else:
        out.result(str(mountpoint), f"mounted {mountpoint}")
    return failure.exit_code


def flags_of(args: argparse.Namespace) -> list[str]:
    """What was given, for the process that mounts; environment and config file it finds by itself."""
    valued = ("store", "endpoint", "metrics", "limit")
    given = [f"--{name}={value}" for name in valued if (value := getattr(args, name)) is not None]
    given += ["--no-on-demand"] * (args.on_demand is False)
    return given + [
        flag for flag in ("--offline", "--allow-other", "--debug") if getattr(args, flag[2:].replace("-", "_"))
    ]


def _serve(args: argparse.Namespace, ready: Callable[[], None]) -> None:
    from cakefs.engine.serve.scrape import exporting
    from cakefs.fs.mount import serve

    faulthandler.enable()  # A watchdog, or a bug in C code, ends us: then the log has what each thread was doing.
    level = logging.DEBUG if args.debug else logging.INFO
    logging.basicConfig(level=level, format=LOG_FORMAT, stream=sys.stderr, force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    config = config_of(args)

    async def body(app: "App") -> None:
        def on_ready() -> None:
            app.fetcher.start()  # 0.5 s of imports that the first read need not wait for
            ready()

        if args.ready_fd is not None:
            os.chdir("/")  # A process in the background must not keep a file system from being unmounted.
        async with app.library() as library, exporting(config.metrics, library.status) as exporter:
            await serve(
                library,
                config.mountpoint,
                allow_other=config.allow_other,
                on_ready=on_ready,
                on_status=exporter.use,
                grace_s=config.stop_grace_s,
            )

    with_app(config, body, serving=True)
