"""`cakefs pull`: fetch what is missing of a model, so that it works offline for certain."""

import argparse
from typing import TYPE_CHECKING, NamedTuple

from cakefs.cli.options import add_json_option, config_of, with_app
from cakefs.cli.out import Out, counted, human_size

if TYPE_CHECKING:
    from cakefs.app import App

HELP = "fetch what is missing of a model, and confirm the published hashes"


class Pulled(NamedTuple):
    name: str
    files: int
    size: int
    local_bytes_before: int
    fetched_bytes: int
    verified: bool


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Interrupted at any point, what arrived is kept: run it again to go on."
    parser.add_argument("model", metavar="MODEL", help="name as `cakefs ls` shows it")
    parser.add_argument("--files", metavar="GLOB", action="append", default=[], help="only files like this; repeatable")
    add_json_option(parser)


def run(args: argparse.Namespace, out: Out) -> int:
    async def pull(app: "App") -> Pulled:
        return await _pull(app, args.model, args.files, out)

    done = with_app(config_of(args), pull)
    if args.json:
        out.json(done._asdict())
        return 0
    how = ", all published hashes confirmed" if done.verified else ""
    what = f"{counted(done.files, 'file')} of {done.name}, {human_size(done.size)}"
    out.result(done.name, f"{what}: {human_size(done.fetched_bytes)} fetched{how}")
    return 0


async def _pull(app: "App", name: str, patterns: list[str], out: Out) -> Pulled:
    from cakefs.engine import jobs
    from cakefs.engine.index import chosen_files
    from cakefs.engine.survey import Local, Shown, confirmed

    manifest = app.model(name)
    files = chosen_files(manifest, patterns)
    shown = Shown(manifest, files)
    before = shown.local_bytes(Local.of_model(app.store, manifest))
    with out.progress(name, shown.size, before) as advance:
        fetched = await jobs.pull(
            app.store,
            app.fetcher,
            manifest,
            files,
            lambda _: advance(before + app.fetcher.counters.bytes_fetched),
        )
    return Pulled(name, len(files), shown.size, before, fetched, confirmed(app.store, manifest, shown))
