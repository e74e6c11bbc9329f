"""`cakefs hashes`: hashes.json of a model, and what one from elsewhere says of it."""

import argparse
from typing import TYPE_CHECKING

from cakefs.cli.options import add_json_option, config_of, with_app
from cakefs.cli.out import Counted, Out, counted
from cakefs.errors import UserError

if TYPE_CHECKING:
    from cakefs.app import App
    from cakefs.engine.known.hashes import Imported

HELP = "print the SHA-256 of each tensor of a model, or import what others say of it"
EPILOG = """\
  cakefs hashes org/name > hashes.json                              needs all of its tensors: cakefs pull org/name
  cakefs hashes --import https://example.org/org/name/hashes.json   MODEL is told by the place, or given after it

What is imported is only a claim. A pull then leaves out a tensor that is here under another name, hashes the whole file
with it, and keeps it only if the file has its published SHA-256; else all is fetched. A false claim costs time, and
never puts a wrong byte under a name.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("model", metavar="MODEL", nargs="?", help="name as `cakefs ls` shows it")
    parser.add_argument("--import", dest="place", metavar="FILE-OR-URL", help="a hashes.json from elsewhere")
    add_json_option(parser)


def run(args: argparse.Namespace, out: Out) -> int:
    if args.place is not None:
        return _import(args, out)
    if args.model is None:
        raise UserError("which model?", hint="cakefs hashes MODEL, or cakefs hashes --import FILE-OR-URL [MODEL]")
    from cakefs.engine.known import hashes, survey
    from cakefs.formats.hashes import encode_hashes

    with survey.open_store(config_of(args).store) as store:
        manifest = survey.find_model(store, args.model)
        with out.progress(manifest.name, sum(span.size for span in manifest.spans)) as advance:
            entries = hashes.hash_model(store, manifest, Counted(advance))
    out.script(encode_hashes(entries))
    return 0


def _import(args: argparse.Namespace, out: Out) -> int:
    from cakefs.engine.known import survey

    config = config_of(args)
    with survey.open_store(config.store):
        pass  # Without a store there is no model to say anything of.

    async def take(app: "App") -> "Imported":
        return await _take(app, args.place, args.model)

    done = with_app(config, take)
    if args.json:
        out.json(done._asdict())
        return 0
    out.result(done.name, f"{counted(done.claims, 'claim')} about {done.name}; {done.held:,} may spare a transfer")
    if done.useless:
        out.note(f"{done.useless:,} of no use for a pull: their file has no published SHA-256 to bear them out")
    return 0


async def _take(app: "App", place: str, name: str | None) -> "Imported":
    from pathlib import Path

    from cakefs.engine.known import hashes
    from cakefs.formats.hashes import HASHES_LIMIT

    is_url = place.startswith(("http://", "https://"))
    data = b"" if is_url else hashes.read_hashes(Path(place))
    manifest = app.model(name) if name is not None else hashes.model_of(app.store, place)
    if is_url:
        data = await app.read_url(place, HASHES_LIMIT)
    return hashes.import_claims(app.store, manifest, data, place)
