"""`cakefs add`: show a model, reading kilobytes of it."""

import argparse
from typing import TYPE_CHECKING

from cakefs.cli.options import add_json_option, config_of, with_app
from cakefs.cli.out import Out, human_size

if TYPE_CHECKING:
    from cakefs.app import App
    from cakefs.engine.index import Added

HELP = "show a model, reading headers and small files only"
EPILOG = """\
SOURCE is one of
  org/name, org/name@revision                a model of the Hugging Face Hub
  https://host/dir/model.safetensors         a file of a web server
  https://host/dir/model.safetensors.index.json    an index, its shards beside it
  https://host/dir/model.gguf                any other single file
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("source", metavar="SOURCE", help="where the model is, see below")
    parser.add_argument("--as", dest="name", metavar="NAME", help="show it under this name")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit (default: main)")
    parser.add_argument("--update", action="store_true", help="let a name that is taken stand for this from now on")
    add_json_option(parser)


def run(args: argparse.Namespace, out: Out) -> int:
    from cakefs.engine.index import model_name
    from cakefs.engine.sources import default_name, parse_source

    source = parse_source(args.source, args.revision)
    name = model_name(args.name or default_name(source))

    async def add(app: "App") -> "Added":
        return await app.add(source, name, update=args.update)

    added = with_app(config_of(args), add)
    if args.json:
        out.json(_as_json(added))
        return 0
    at = f" at {added.manifest.revision[:12]}" if added.manifest.revision else ""
    out.result(name, f"{'added' if added.changed else 'unchanged'} {name}{at}")
    if not out.quiet:
        missing = added.total - added.local
        out.line(
            f"  {human_size(added.total)}: {human_size(added.local)} local, {human_size(missing)} to fetch when read"
        )
        out.line(f"  {human_size(added.fetched)} fetched now")
    return 0


def _as_json(added: "Added") -> dict[str, object]:
    return {
        "name": added.manifest.name,
        "origin": added.manifest.origin,
        "revision": added.manifest.revision,
        "changed": added.changed,
        "size": added.total,
        "local_bytes": added.local,
        "missing_bytes": added.total - added.local,
        "fetched_bytes": added.fetched,
    }
