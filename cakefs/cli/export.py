"""`cakefs export`: ordinary files of what a model shows, for a place without cakefs or without FUSE."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cakefs.cli.options import add_json_option, config_of, with_app
from cakefs.cli.out import Counted, Out, counted, human_size
from cakefs.cli.pull import take_cached
from cakefs.errors import UserError

if TYPE_CHECKING:
    from cakefs.app import App
    from cakefs.engine.export.exporter import Wish, Written
    from cakefs.model import Manifest

HELP = "write a model, or a file of it, as ordinary files"
EPILOG = """\
What is missing is fetched first. Interrupted at any point, run it again: it goes on with what is there. A file that is
made of others beside it (model.gguf, of the safetensors) is written with --file only.

  cakefs export org/name DIR                                         what the mount shows of it
  cakefs export org/name DIR --original                              what upstream published: shards, index, everything
  cakefs export org/name out.safetensors --file model.safetensors    one file

With --reflink auto a safetensors file that was made here (of shards, by slice or merge) shares blocks with the store
where both are on one XFS or btrfs: its tensors then begin at whole blocks, so its bytes are not those of the mounted
file. --reflink always does the same with files that upstream published; --reflink never keeps the bytes of all.
"""


class Exported(NamedTuple):
    """The whole of it."""

    manifest: "Manifest"
    files: "list[Written]"
    fetched: int


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("model", metavar="MODEL", help="name as `cakefs ls` shows it")
    parser.add_argument("dest", metavar="DEST", help="directory for all files; with --file, a file or a directory")
    parser.add_argument("--file", metavar="NAME", help="only this file, as `cakefs show` names it")
    parser.add_argument("--original", action="store_true", help="the files as upstream published them")
    parser.add_argument(
        "--reflink",
        choices=("auto", "always", "never"),
        default="auto",
        help="share blocks with the store, see below",
    )
    parser.add_argument("--force", action="store_true", help="replace files that are something else")
    add_json_option(parser)


def run(args: argparse.Namespace, out: Out) -> int:
    if args.original and args.reflink == "always":
        raise UserError("--original keeps the bytes, --reflink always lays them out anew", hint="--reflink auto")

    async def export(app: "App") -> Exported:
        return await _export(app, args, out)

    done = with_app(config_of(args), export)
    if args.json:
        out.json(_as_json(done, args.dest))
        return 0
    size = human_size(sum(f.size for f in done.files))
    name, written = done.manifest.name, [f for f in done.files if f.written]
    what = f"exported {name} to {args.dest}" if written else f"{args.dest} has {name} already"
    out.result(args.dest, f"{what}: {counted(len(done.files), 'file')}, {size}")
    if written and not out.quiet:
        cloned = sum(f.cloned for f in written)
        copied = human_size(sum(f.size for f in written) - cloned)
        confirmed = sum(f.confirmed for f in done.files)
        out.line(f"  {human_size(cloned)} shared with the store, {copied} written, {human_size(done.fetched)} fetched")
        if confirmed:
            out.line(f"  {counted(confirmed, 'file')} with the published SHA-256")
    return 0


async def _export(app: "App", args: argparse.Namespace, out: Out) -> Exported:
    from cakefs.engine.evict import job_is_done
    from cakefs.engine.export.exporter import Exporter, Reflink
    from cakefs.engine.held import held
    from cakefs.engine.known.shown import Local, Shown
    from cakefs.plan.choice import file_spans

    with held(app.store, [args.model]) as (manifest,):
        wishes = _wishes(manifest, args)
        exporter = Exporter(
            app.store,
            app.reading,
            manifest,
            reflink=Reflink(args.reflink),
            original=args.original,
            force=args.force,
        )
        done: dict[Path, Written] = {}
        present = sum(w.path.stat().st_size for w in wishes if w.path.is_file())
        with out.progress("looking", present) as advance:
            count = Counted(advance)
            for wish in wishes:
                if found := await exporter.look(wish, count):
                    done[wish.path] = found
        absent = [wish for wish in wishes if wish.path not in done]
        spans = file_spans(manifest, [wish.file for wish in absent])
        await take_cached(app, manifest, spans, out)
        shown = Shown.of(manifest, [wish.file for wish in absent])
        before, counters = shown.here(Local.of_model(app.store, manifest)).bytes, app.fetcher.counters
        with out.progress("fetching", shown.size, before) as advance:
            await exporter.fetch(app.fetcher, absent, lambda _: advance(before + counters.bytes_fetched))
        with out.progress("writing", shown.size) as advance:
            count = Counted(advance)
            for wish in absent:
                done[wish.path] = await exporter.write(wish, count)
        job_is_done(app.store, map(manifest.key, spans), app.fetcher.limit)
    return Exported(manifest, [done[wish.path] for wish in wishes], counters.bytes_fetched)


def _wishes(manifest: "Manifest", args: argparse.Namespace) -> "list[Wish]":
    from cakefs.engine.export.exporter import Wish
    from cakefs.model import View
    from cakefs.plan.derived import own_files

    files = manifest.shown(View.ORIGINAL if args.original else View.MODEL)
    dest = Path(args.dest)
    if args.file is None:
        if not files:
            raise UserError(f"{manifest.name} was made here: upstream has no files of it", hint="leave out --original")
        if dest.exists() and not dest.is_dir():
            raise UserError(f"{dest} is no directory", hint="--file NAME for a single file")
        own = files if args.original else own_files(manifest)
        return [Wish(file, dest / path) for path, file in sorted(own.items())]
    if args.file not in files:
        raise UserError(f"no file {args.file} in {manifest.name}", hint=f"cakefs show {manifest.name}")
    into = args.dest.endswith("/") or dest.is_dir()
    return [Wish(files[args.file], dest / Path(args.file).name if into else dest)]


def _as_json(done: Exported, dest: str) -> dict[str, object]:
    return {
        "name": done.manifest.name,
        "destination": dest,
        "files": [f._asdict() | {"path": str(f.path)} for f in done.files],
        "size": sum(f.size for f in done.files),
        "cloned_bytes": sum(f.cloned for f in done.files),
        "written_bytes": sum(f.size - f.cloned for f in done.files if f.written),
        "fetched_bytes": done.fetched,
    }
