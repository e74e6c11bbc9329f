"""Options that every command takes, before its name or after it, and the settings they make."""

import argparse
import gc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:  # Trio and the store are not for `--help`.
    from cakefs.app import App
    from cakefs.config import Config

T = TypeVar("T")

# Fields of Config that flags may set.
SETTINGS = ("store", "endpoint", "offline", "mountpoint", "allow_other", "on_demand", "metrics", "limit")


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


@contextmanager
def without_gc() -> Iterator[None]:
    """For work over 90,000 tensors: a million objects, and a third of the time to find that none of them is garbage."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def with_app(config: "Config", body: Callable[["App"], Awaitable[T]], *, serving: bool = False) -> T:
    """Runs an async function over the opened parts of cakefs. Args: serving: As `open_app` has it."""
    import trio

    from cakefs.app import open_app

    async def main() -> T:
        async with open_app(config, serving=serving) as app:
            return await body(app)

    return trio.run(main)
