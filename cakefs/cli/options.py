"""Options that every command takes, before its name or after it, and the settings they make."""

import argparse
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:  # Trio and the store are not for `--help`.
    from cakefs.app import App
    from cakefs.config import Config

T = TypeVar("T")

SETTINGS = ("store", "endpoint", "offline", "mountpoint", "allow_other")  # Fields of Config that flags may set.


def add_global_options(parser: argparse.ArgumentParser, *, top: bool) -> None:
    """Adds them to the parser of `cakefs` itself (`top`, which sets the defaults) or of a command."""
    absent = None if top else argparse.SUPPRESS
    off = False if top else argparse.SUPPRESS
    group = parser.add_argument_group("options of every command")
    group.add_argument("--store", metavar="DIR", default=absent, help="the store (default: $CAKEFS_STORE)")
    group.add_argument("--endpoint", metavar="URL", default=absent, help="the Hub (default: $HF_ENDPOINT)")
    group.add_argument("--offline", action="store_const", const=True, default=absent, help="never ask the network")
    group.add_argument("-q", "--quiet", action="store_true", default=off, help="names and errors only")
    group.add_argument("--debug", action="store_true", default=off, help="log more; tracebacks")


def add_json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="write JSON, sizes in bytes")


def config_of(args: argparse.Namespace) -> "Config":
    """The settings: flags over environment over file. Raises UserError."""
    from cakefs.config import load_config

    return load_config({name: getattr(args, name, None) for name in SETTINGS})


def with_app(config: "Config", body: Callable[["App"], Awaitable[T]]) -> T:
    """Runs an async function over the opened parts of cakefs."""
    import trio

    from cakefs.app import open_app

    async def main() -> T:
        async with open_app(config) as app:
            return await body(app)

    return trio.run(main)
