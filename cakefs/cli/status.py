"""`cakefs status`: the live mounts with their counters, and the store."""

import argparse
import sys
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from cakefs.cli.options import add_json_option, config_of
from cakefs.cli.out import Out, counted, human_size
from cakefs.errors import UserError

if TYPE_CHECKING:
    from cakefs.config import Config

HELP = "live mounts with their counters, and the size of the store"
WATCH_S = 1.0


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-w", "--watch", action="store_true", help="show it again every second, until Ctrl-C")
    add_json_option(parser)


def run(args: argparse.Namespace, out: Out) -> int:
    config = config_of(args)
    if args.watch:
        _watch(config, out, args.json)
    elif args.json:
        out.json(_status(config))
    elif out.quiet:
        for mount in _mounts():
            out.line(mount["mountpoint"])
    else:
        for line in _lines(_status(config)):
            out.line(line)
    return 0


def _watch(config: "Config", out: Out, as_json: bool) -> None:
    """Ends with Ctrl-C, which is the way to end it and no failure."""
    try:
        if as_json:
            while True:
                out.json_line(_status(config))
                time.sleep(WATCH_S)
        _watch_terminal(config)
    except KeyboardInterrupt:
        return


def _watch_terminal(config: "Config") -> None:
    if sys.stdout is None or not sys.stdout.isatty():
        raise UserError("--watch needs a terminal", hint="cakefs status --watch --json")
    from rich.live import Live
    from rich.text import Text

    with Live(auto_refresh=False) as live:
        while True:
            live.update(Text("\n".join(_lines(_status(config)))), refresh=True)
            time.sleep(WATCH_S)


def _status(config: "Config") -> dict[str, Any]:
    from cakefs.engine.survey import summarize_store

    return {"store": {"path": str(config.store), **summarize_store(config.store)._asdict()}, "mounts": _mounts()}


def _mounts() -> list[dict[str, Any]]:
    from cakefs.cli.live import cakefs_mountpoints, read_status

    found = []
    for mountpoint in cakefs_mountpoints():
        said = read_status(mountpoint)
        answer = {"trouble": said} if isinstance(said, str) else said
        found.append({"mountpoint": mountpoint, "answers": not isinstance(said, str), **answer})
    return found


def _lines(status: dict[str, Any]) -> list[str]:
    store = status["store"]
    blobs = f"{human_size(store['blob_bytes'])} in {counted(store['blobs'], 'blob')}"
    lines = [
        f"store  {store['path']}",
        f"       {counted(store['models'], 'model')}, {blobs}, {human_size(store['partial_bytes'])} unfinished",
    ]
    for mount in status["mounts"]:
        lines += [f"mount  {mount['mountpoint']}", *(f"       {line}" for line in _mount_lines(mount))]
    return lines if status["mounts"] else [*lines, "no mount"]


def _mount_lines(mount: dict[str, Any]) -> list[str]:
    if not mount["answers"]:
        return [str(mount["trouble"])]
    count = defaultdict[str, Any](int, mount)  # A mount of another version may count other things.
    reads = count["reads"]
    hits = f"{100 * count['reads_without_waiting'] / reads:.1f} % without waiting" if reads else "none so far"
    errors = f", {count['read_errors']} failed" if count["read_errors"] else ""
    failed = f", {count['requests_failed']} failed" if count["requests_failed"] else ""
    return [
        f"pid {count['pid']}, up {_duration(count['uptime_s'])}, store {count['store']}",
        f"served   {human_size(count['bytes_served'])} in {counted(reads, 'read')} ({hits}{errors})",
        f"fetched  {human_size(count['bytes_fetched'])} in {counted(count['requests'], 'request')}{failed}; "
        f"{counted(count['chunks_on_their_way'], 'chunk')} on the way",
    ]


def _duration(seconds: float) -> str:
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    if hours >= 48:
        return f"{hours // 24} days"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min" if minutes else f"{int(seconds)} s"
