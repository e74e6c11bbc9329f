"""`cakefs add --substitute`: what was asked for is said before and after."""

import argparse
from typing import TYPE_CHECKING

from cakefs.cli.options import config_of, with_app
from cakefs.cli.out import Out, counted, human_size
from cakefs.errors import UserError

if TYPE_CHECKING:
    from cakefs.app import App
    from cakefs.engine.models.substitute import Substituted


def add_substitute_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--substitute", metavar="OTHER", help="near-equal tensors of this model, where it was compared")
    parser.add_argument("--max-diff", metavar="X", type=float, help="how near: the largest |a-b| of any element")


def wants_substitute(args: argparse.Namespace) -> bool:
    """Raises UserError where only half of it is said."""
    if (args.substitute is None) != (args.max_diff is None):
        raise UserError("--substitute and --max-diff belong together", hint="--substitute OTHER --max-diff 0.001")
    return args.substitute is not None


def run_substitute(args: argparse.Namespace, out: Out) -> int:
    from cakefs.engine.known.naming import model_name
    from cakefs.engine.models.sources import default_name, parse_source
    from cakefs.engine.models.substitute import substitute_model

    source = parse_source(args.source, args.revision)
    published = default_name(source)
    name = model_name(published if args.name is None else args.name)

    async def add(app: "App") -> "Substituted":
        with app.store.guard():  # What is read to compose it has no name before the end.
            manifest = await app.compose(source, published)
            return substitute_model(app.store, manifest, name, args.substitute, args.max_diff, update=args.update)

    done = with_app(config_of(args), add)
    if args.json:
        out.json(_as_json(done, args))
        return 0
    count = counted(len(done.tensors), "tensor")
    out.result(name, f"{'added' if done.made.changed else 'unchanged'} {name}, NOT as published")
    if not out.quiet:
        bound = f"max |a-b| <= {args.max_diff:g}"
        out.line(f"  {count} of {args.substitute} in the place of its own: {human_size(done.size)}, {bound}")
        if done.unknown:
            out.line(f"  {counted(done.unknown, 'tensor')} never compared: its own")
    return 0


def _as_json(done: "Substituted", args: argparse.Namespace) -> dict[str, object]:
    return {
        "name": done.made.manifest.name,
        "origin": done.made.manifest.origin,
        "changed": done.made.changed,
        "substitute": args.substitute,
        "max_diff": args.max_diff,
        "substituted": done.tensors,
        "substituted_bytes": done.size,
        "never_compared": done.unknown,
    }
