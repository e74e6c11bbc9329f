"""`cakefs pull`: fetch what is missing of a model, so that it works offline for certain."""

import argparse
from typing import TYPE_CHECKING, NamedTuple

from cakefs.cli.options import add_json_option, config_of, with_app
from cakefs.cli.out import Out, counted, human_size
from cakefs.errors import UserError

if TYPE_CHECKING:
    from cakefs.app import App

HELP = "fetch what is missing of a model, and confirm the published hashes"


class Pulled(NamedTuple):
    """What `--json` writes; `verified` as `cakefs ls` has it, for the files that were asked for."""

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
    else:
        what = f"{counted(done.files, 'file')} of {done.name}, {human_size(done.size)}"
        how = "; every published hash is right" if done.verified else ""
        out.result(done.name, f"{what}: {human_size(done.fetched_bytes)} fetched{how}")
    return 0


async def _pull(app: "App", name: str, patterns: list[str], out: Out) -> Pulled:
    from cakefs.engine import jobs, survey
    from cakefs.engine.index import chosen_files

    manifest = app.model(name)
    files = chosen_files(manifest, patterns)
    if not files:
        raise UserError(f"no file of {name} is like {' or '.join(patterns)}", hint=f"cakefs show {name}")
    shown = survey.Shown(manifest, files)
    before = shown.local_bytes(survey.Local.of_model(app.store, manifest))
    counters = app.fetcher.counters
    with out.progress(name, shown.size, before) as advance:
        fetched = await jobs.pull(
            app.store, app.fetcher, manifest, files, lambda _: advance(before + counters.bytes_fetched)
        )
    return Pulled(name, len(files), shown.size, before, fetched, survey.is_verified(app.store, manifest, shown))
