"""`cakefs verify`: read every stored byte again, and confirm what upstream published."""

import argparse
from typing import TYPE_CHECKING

from cakefs.cli.options import add_json_option, config_of
from cakefs.cli.out import Out, counted, human_size
from cakefs.errors import CorruptData

if TYPE_CHECKING:
    from cakefs.engine.jobs import Repair
    from cakefs.model import Manifest
    from cakefs.store.store import Store

HELP = "read every stored byte again, and confirm published hashes"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = f"Exit code {CorruptData.exit_code} when something is bad and was not repaired."
    parser.add_argument("model", metavar="MODEL", nargs="?", help="name as `cakefs ls` shows it (default: all)")
    parser.add_argument("--repair", action="store_true", help="drop what is bad, so that it is fetched again")
    add_json_option(parser)


def run(args: argparse.Namespace, out: Out) -> int:
    from cakefs.engine import survey

    results = {}
    views: set[str] = set()  # slices and merges
    with survey.open_store(config_of(args).store) as store:
        for name in [args.model] if args.model else sorted(store.catalog.models()):
            manifest = survey.find_model(store, name)
            results[name] = _verify(store, manifest, args.repair, out)
            views |= {name} if manifest.stack else set()
            if not args.json:
                _report(name, results[name], out)
    if args.json:
        out.json({name: result._asdict() for name, result in results.items()})
    for name, result in results.items():
        if result.lost and args.repair:
            out.hint(f"make {name} again, as before" if name in views else f"cakefs add {name} stores its header anew")
        elif result.bad and not args.repair:
            out.hint(f"cakefs verify {name} --repair drops what is bad, to be fetched again")
    unrepaired = any(result.lost or (result.bad and not args.repair) for result in results.values())
    return CorruptData.exit_code if unrepaired else 0


def _verify(store: "Store", manifest: "Manifest", repair: bool, out: Out) -> "Repair":
    from cakefs.engine import jobs, survey

    done = 0

    def progress(size: int) -> None:
        nonlocal done
        done += size
        advance(done)

    local = survey.Local.of_model(store, manifest)
    total = sum(local.size(manifest.key(span)) for span in range(len(manifest.spans)))
    with out.progress(manifest.name, total) as advance:
        return jobs.verify(store, manifest, progress, repair=repair)


def _report(name: str, result: "Repair", out: Out) -> None:
    good = "BAD" if result.bad or result.lost else "good"
    if out.quiet:
        if good == "BAD":
            out.line(name)
        return
    confirmed = f"{result.confirmed} published hashes confirmed" if result.confirmed else "no published hash to confirm"
    waiting = f", {counted(result.incomplete, 'file')} not all local" if result.incomplete else ""
    out.line(f"{good:<4}  {name}: {human_size(result.bytes)} read, {confirmed}{waiting}")
    for line in (*result.bad, *result.lost):
        out.line(f"      {line}")
