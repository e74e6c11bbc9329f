"""`cakefs add`: show a model, reading kilobytes of it."""

import argparse
from typing import TYPE_CHECKING

from cakefs.cli.import_command import added_as_json, import_what, late_bar, say_skipped
from cakefs.cli.options import add_json_option, config_of, with_app
from cakefs.cli.out import Out, human_size
from cakefs.cli.substitute import add_substitute_options, run_substitute, wants_substitute
from cakefs.errors import UserError

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
  ./directory, /path/to/x.gguf               what is on this machine, as `cakefs import` shows it

A torch checkpoint (pytorch_model.bin) is shown as model.safetensors, without running its pickle.
Files of a Hub model that are in the cache of huggingface_hub ($HF_HUB_CACHE) are read there, once, and not fetched.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("source", metavar="SOURCE", help="where the model is, see below")
    parser.add_argument("--as", dest="name", metavar="NAME", help="show it under this name")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit (default: main)")
    parser.add_argument("--update", action="store_true", help="let a name that is taken stand for this from now on")
    add_substitute_options(parser)
    add_json_option(parser)


def run(args: argparse.Namespace, out: Out) -> int:
    from cakefs.engine.models.sources import local_path

    if wants_substitute(args):
        return run_substitute(args, out)
    added = _add(args, out) if local_path(args.source) is None else _add_path(args, out)
    name = added.manifest.name
    for warning in added.warnings:
        out.note(f"warning: {warning}")
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


def _add(args: argparse.Namespace, out: Out) -> "Added":
    from cakefs.engine.disk.meter import Meter
    from cakefs.engine.known.naming import model_name
    from cakefs.engine.models.sources import default_name, parse_source

    source = parse_source(args.source, args.revision)
    name = model_name(default_name(source) if args.name is None else args.name)

    async def add(app: "App") -> "Added":
        with late_bar(out, "reading the cache") as show:
            return await app.add(source, name, update=args.update, meter=Meter(show))

    return with_app(config_of(args), add)


def _add_path(args: argparse.Namespace, out: Out) -> "Added":
    if args.revision:
        raise UserError(f"{args.source} has no revisions", hint="leave out --revision")
    done = import_what(args, args.source, args.name, out, update=args.update)
    say_skipped(done.skipped, out)
    return done.models[0]


def _as_json(added: "Added") -> dict[str, object]:
    return added_as_json(added) | {
        "missing_bytes": added.total - added.local,
        "fetched_bytes": added.fetched,
        "warnings": list(added.warnings),
    }
