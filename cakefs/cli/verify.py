"""`cakefs verify`: read every stored byte again, and confirm what upstream published."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from cakefs.cli.failures import EXIT_BUG, EXIT_INTERRUPTED, failure_of
from cakefs.cli.options import add_json_option, config_of, with_app
from cakefs.cli.out import Counted, Out, counted, human_size
from cakefs.errors import CakeError, CorruptData

if TYPE_CHECKING:
    from cakefs.app import App
    from cakefs.engine.verify import Repair, Verifier
    from cakefs.model import Manifest, SpanKey
    from cakefs.store.store import Store

HELP = "read every byte of complete tensors again, and confirm published hashes"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = f"Exit code {CorruptData.exit_code} when something is bad and was not repaired."
    parser.add_argument("model", metavar="MODEL", nargs="?", help="name as `cakefs ls` shows it (default: all)")
    parser.add_argument("--repair", action="store_true", help="drop what is bad, and fetch it again")
    add_json_option(parser)


def run(args: argparse.Namespace, out: Out) -> int:
    from cakefs.engine.known import survey
    from cakefs.engine.verify import Verifier

    place = config_of(args).store
    if args.repair:
        _recover(place, out)
    results = {}
    views: set[str] = set()  # slices and merges
    with survey.open_store(place) as store:
        names = [args.model] if args.model else sorted(store.catalog.models.all())
        manifests = {name: survey.find_model(store, name) for name in names}
        before = {
            name: store.catalog.recorded(map(manifest.key, range(len(manifest.spans))))
            for name, manifest in manifests.items()
        }
        verifier = Verifier(store, repair=args.repair)  # Forgets what was borrowed and is lost: behind `before`.
        for name, manifest in manifests.items():
            results[name] = _verify(store, verifier, manifest, out)
            views |= {name} if manifest.stack else set()
            if not args.json:
                _report(name, results[name], out)
        gone = {name: keys - store.catalog.recorded(keys) for name, keys in before.items()}
    fetched, failed = _fetch_again(args, gone, out) if args.repair else ({}, 0)
    if args.json:
        out.json({name: result._asdict() | {"fetched_bytes": fetched.get(name, 0)} for name, result in results.items()})
    for name, result in results.items():
        if result.lost and args.repair:
            out.hint(f"make {name} again, as before" if name in views else f"cakefs add {name} stores its header anew")
        elif result.bad and not args.repair:
            out.hint(f"cakefs verify {name} --repair drops what is bad, and fetches it again")
    unrepaired = any(result.lost or (result.bad and not args.repair) for result in results.values())
    return failed or (CorruptData.exit_code if unrepaired else 0)


def _fetch_again(args: argparse.Namespace, gone: "dict[str, set[SpanKey]]", out: Out) -> tuple[dict[str, int], int]:
    """Fetches what was dropped. Returns: the bytes by model, and the exit code of what could not be had, or 0."""
    config, done, failed = config_of(args), {}, 0
    for name, keys in gone.items():
        if not keys:
            continue

        async def fetch(app: "App", name: str = name, keys: "set[SpanKey]" = keys) -> int:
            return await _fetch(app, name, keys, out)

        try:
            done[name] = with_app(config, fetch)
        except (CakeError, BaseExceptionGroup) as error:  # the other models are mended all the same
            failure = failure_of(error)
            if failure.exit_code in (EXIT_BUG, EXIT_INTERRUPTED):
                raise
            out.error(f"{name}: {failure.message}", failure.hint or f"cakefs pull {name} fetches what was dropped")
            failed = failure.exit_code
        else:
            if done[name] and not args.json and not out.quiet:
                out.line(f"fetched {human_size(done[name])} of {name} again")
    return done, failed


async def _fetch(app: "App", name: str, keys: "set[SpanKey]", out: Out) -> int:
    from cakefs.engine import jobs
    from cakefs.plan.choice import in_order

    manifest = app.model(name)
    spans = in_order(manifest, (i for i in range(len(manifest.spans)) if manifest.key(i) in keys))
    with out.progress(name, sum(key.size for key in keys)) as advance:
        return await jobs.pull_spans(app.store, app.fetcher, manifest, spans, Counted(advance))


def _recover(store: Path, out: Out) -> None:
    """A catalog that is broken is made again first."""
    from cakefs.engine.recover import recover, told

    found = recover(store)
    for line in told(found) if found else ():
        out.note(line)


def _verify(store: "Store", verifier: "Verifier", manifest: "Manifest", out: Out) -> "Repair":
    from cakefs.engine.known.shown import Local

    done = 0

    def progress(size: int) -> None:
        nonlocal done
        done += size
        advance(done)

    local = Local.of_model(store, manifest)
    total = sum(local.size(manifest.key(span)) for span in range(len(manifest.spans)))
    with out.progress(manifest.name, total) as advance:
        return verifier.verify(manifest, progress)


def _report(name: str, result: "Repair", out: Out) -> None:
    good = "BAD" if result.bad or result.lost else "good"
    if out.quiet:
        if good == "BAD":
            out.line(name)
        return
    hashes = "published hash" if result.confirmed == 1 else "published hashes"
    confirmed = f"{result.confirmed:,} {hashes} confirmed" if result.confirmed else "no published hash to confirm"
    waiting = f", {counted(result.incomplete, 'file')} not all local" if result.incomplete else ""
    out.line(f"{good:<4}  {name}: {human_size(result.bytes)} read, {confirmed}{waiting}")
    for line in (*result.bad, *result.lost):
        out.line(f"      {line}")
