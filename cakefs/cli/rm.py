"""`cakefs rm`: forget the names of models; their bytes are gc's matter."""

import argparse

from cakefs.cli.options import config_of, with_app
from cakefs.cli.out import Out

HELP = "forget models; their bytes stay until gc"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", metavar="MODEL", nargs="+", help="name as `cakefs ls` shows it")


def run(args: argparse.Namespace, out: Out) -> int:
    from cakefs.app import App

    async def remove(app: App) -> None:
        app.remove(args.models)

    with_app(config_of(args), remove)
    for name in args.models:
        out.result(name, f"removed {name}")
    out.hint("cakefs gc deletes the bytes that nothing else needs")
    return 0
