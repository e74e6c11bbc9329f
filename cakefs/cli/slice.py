"""`cakefs slice`: some layers of a model as a model of their own."""

import argparse
from typing import TYPE_CHECKING

from cakefs.cli.options import add_json_option, config_of
from cakefs.cli.out import Out, counted, human_size

if TYPE_CHECKING:
    from cakefs.engine.models.views import Made

HELP = "show some layers of a model as a model of their own"
EPILOG = """\
Nothing is fetched: the slice is a header, and its tensors are those of the model, fetched when they are read.

  cakefs slice org/name --layers 0-15 --as worker-a        for one of several machines: names and config unchanged
  cakefs slice org/name --layers 0-3 --as small --renumber --with-embeddings --with-head     a model that loads
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("model", metavar="MODEL", help="name as `cakefs ls` shows it")
    parser.add_argument("--layers", metavar="L", required=True, help="such as 0-15,20: both ends included")
    parser.add_argument("--with-embeddings", action="store_true", help="also what stands before the layers")
    parser.add_argument(
        "--with-head", action="store_true", help="also the final norm and the head; with both, all that is no layer"
    )
    parser.add_argument("--renumber", action="store_true", help="count the layers from 0 and fit the config to them")
    add_view_options(parser)


def add_view_options(parser: argparse.ArgumentParser) -> None:
    """What slice and merge have in common."""
    parser.add_argument("--as", dest="name", metavar="NAME", required=True, help="show it under this name")
    parser.add_argument("--prefix", metavar="TEXT", default="", help="of the layers' names, where they are unusual")
    parser.add_argument("--update", action="store_true", help="let a name that is taken stand for this from now on")
    add_json_option(parser)


def run(args: argparse.Namespace, out: Out) -> int:
    from cakefs.engine.known import survey
    from cakefs.engine.models import views

    with survey.open_store(config_of(args).store) as store:
        made = views.slice_model(
            store,
            args.model,
            args.layers,
            args.name,
            prefix=args.prefix,
            with_embeddings=args.with_embeddings,
            with_head=args.with_head,
            renumber=args.renumber,
            update=args.update,
        )
    say_made(made, args.json, out)
    return 0


def say_made(made: "Made", as_json: bool, out: Out) -> None:
    """The view that came of it."""
    manifest = made.manifest
    for warning in made.warnings:
        out.note(f"warning: {warning}")
    if as_json:
        facts = {"name": manifest.name, "origin": manifest.origin, "changed": made.changed, "layers": made.layers}
        sizes = {"tensors": len(manifest.tensors), "size": made.size, "new_bytes": made.new_bytes}
        out.json({**facts, **sizes, "warnings": list(made.warnings)})
        return
    what = f"{counted(made.layers, 'layer')}, {counted(len(manifest.tensors), 'tensor')}, {human_size(made.size)}"
    out.result(manifest.name, f"{'made' if made.changed else 'unchanged'} {manifest.name}: {what}")
    if not out.quiet:
        out.line(f"  {manifest.origin}; {human_size(made.new_bytes)} new in the store")
