"""`cakefs rm`: forget the names of models; their bytes are gc's matter."""

import argparse
from functools import partial

from cakefs.cli.options import add_json_option, config_of
from cakefs.cli.out import Out

HELP = "forget models; their bytes stay until gc"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", metavar="MODEL", nargs="+", help="name as `cakefs ls` shows it")
    add_json_option(parser)


def run(args: argparse.Namespace, out: Out) -> int:
    from cakefs.engine.known.survey import open_store, require_models

    with open_store(config_of(args).store) as store:
        require_models(store, args.models)  # All or none.
        for name in args.models:
            store.freeing(partial(store.catalog.models.remove, name))
            if not args.json:
                out.result(name, f"removed {name}")
    if args.json:
        out.json({"removed": args.models})
    else:
        out.hint("`cakefs gc` deletes the bytes that nothing else needs")
    return 0
