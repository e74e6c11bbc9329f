"""`cakefs verify`: read every stored byte again, and confirm what upstream published."""

import argparse
from typing import TYPE_CHECKING

from cakefs.cli.options import add_json_option, config_of, with_app
from cakefs.cli.out import Out, counted, human_size
from cakefs.errors import CorruptData

if TYPE_CHECKING:
    from cakefs.app import App
    from cakefs.engine.jobs import Repair

HELP = "read every stored byte again, and confirm published SHA-256"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = f"Exit code {CorruptData.exit_code} when something is bad and was not repaired."
    parser.add_argument("model", metavar="MODEL", nargs="?", help="name as `cakefs ls` shows it (default: all)")
    parser.add_argument("--repair", action="store_true", help="drop what is bad, so that it is fetched again")
    add_json_option(parser)


def run(args: argparse.Namespace, out: Out) -> int:
    results: dict[str, Repair] = {}

    async def verify(app: "App") -> None:
        for name in [args.model] if args.model else sorted(app.store.catalog.models()):
            results[name] = await _verify(app, name, args.repair, out)
            if not args.json:
                _report(name, results[name], out)

    with_app(config_of(args), verify)
    if args.json:
        out.json({name: result._asdict() for name, result in results.items()})
    bad = sum(result.unrepaired for result in results.values())
    return 0
