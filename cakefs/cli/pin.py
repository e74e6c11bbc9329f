"""`cakefs pin` and `cakefs unpin`: whether a limit or `evict` may take a model's bytes."""

import argparse

from cakefs.cli.options import add_json_option, config_of
from cakefs.cli.out import Out

HELP = "keep the bytes of models, whatever the limit of the store"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", metavar="MODEL", nargs="+", help="name as `cakefs ls` shows it")
    add_json_option(parser)


def run(args: argparse.Namespace, out: Out) -> int:
    return set_pinned(args, out, pinned=True)


def set_pinned(args: argparse.Namespace, out: Out, *, pinned: bool) -> int:
    from cakefs.engine.known.survey import open_store, require_models

    with open_store(config_of(args).store) as store:
        require_models(store, args.models)  # All or none.
        for name in args.models:
            store.catalog.models.set_pinned(name, pinned)
            if not args.json:
                out.result(name, f"{'pinned' if pinned else 'unpinned'} {name}")
    if args.json:
        out.json([{"name": name, "pinned": pinned} for name in args.models])
    elif pinned:
        out.hint("`cakefs pull` fetches what is not here yet")
    return 0
