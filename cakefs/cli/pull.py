"""`cakefs pull`: fetch what is missing of a model, so that it works offline for certain."""

import argparse
from typing import TYPE_CHECKING, NamedTuple

from cakefs.cli.options import add_json_option, config_of, with_app
from cakefs.cli.out import Out, counted, human_size
from cakefs.cli.plan import add_choice_options, chosen_spans

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cakefs.app import App
    from cakefs.model import Manifest

HELP = "fetch what is missing of a model, and confirm the published hashes"


class Pulled(NamedTuple):
    """What `--json` writes.

    Attributes:
        files: How many were asked for; 0 with --layers.
        spared_bytes: Not fetched, because they were here under another name, as a hashes.json claimed.
        verified: As `cakefs ls` has it, for the files that were asked for.
    """

    name: str
    files: int
    size: int
    local_bytes_before: int
    fetched_bytes: int
    spared_bytes: int
    verified: bool


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Interrupted at any point, what arrived is kept: run it again to go on."
    parser.add_argument("model", metavar="MODEL", help="name as `cakefs ls` shows it")
    add_choice_options(parser)
    add_json_option(parser)


def run(args: argparse.Namespace, out: Out) -> int:
    async def pull(app: "App") -> Pulled:
        return await _pull(app, args, out)

    done = with_app(config_of(args), pull)
    if args.json:
        out.json(done._asdict())
    else:
        what = counted(done.files, "file") if args.layers is None else f"layers {args.layers}"
        how = f"; {human_size(done.spared_bytes)} were here under another name" if done.spared_bytes else ""
        how += "; every published hash is right" if done.verified else ""
        size, fetched = human_size(done.size), human_size(done.fetched_bytes)
        out.result(done.name, f"{what} of {done.name}, {size}: {fetched} fetched{how}")
    return 0


async def take_cached(app: "App", manifest: "Manifest", spans: "Sequence[int]", out: Out) -> None:
    """What is in the Hub cache by now is borrowed there."""
    from cakefs.cli.import_command import late_bar, say_skipped
    from cakefs.engine.disk.cached import borrow_cached
    from cakefs.engine.disk.meter import Meter

    with late_bar(out, "reading the cache") as show:
        meter = Meter(show)
        skipped = await borrow_cached(app.store, manifest, spans, app.config.hub_cache, meter)
    say_skipped(skipped, out)
    if meter.done:
        out.note(f"{human_size(meter.done)} of it in the Hub cache: what is right there is not fetched")


async def _pull(app: "App", args: argparse.Namespace, out: Out) -> Pulled:
    from cakefs.engine import jobs
    from cakefs.engine.evict import job_is_done
    from cakefs.engine.held import held
    from cakefs.engine.known import survey
    from cakefs.engine.known.shown import Local, Shown
    from cakefs.plan.choice import chosen_files

    with held(app.store, [args.model]) as (manifest,):
        spans = chosen_spans(app.store, manifest, args)
        await take_cached(app, manifest, spans, out)
        keys = [manifest.key(span) for span in spans]
        files = chosen_files(manifest, args.files) if args.layers is None else []
        shown = Shown.of(manifest, files)
        wanted, local = sum(key.size for key in keys), app.store.local_bytes(keys)
        size = shown.size if files else wanted
        before = shown.here(Local.of_model(app.store, manifest)).bytes if files else local
        counters = app.fetcher.counters
        with out.progress(manifest.name, size, before) as advance:
            fetched = await jobs.pull_spans(
                app.store, app.fetcher, manifest, spans, lambda _: advance(before + counters.bytes_fetched)
            )
        verified = bool(files) and survey.is_verified(app.store, manifest, shown)
        job_is_done(app.store, keys, app.fetcher.limit)
    spared = max(0, wanted - local - fetched)
    return Pulled(manifest.name, len(files), size, before, fetched, spared, verified)
