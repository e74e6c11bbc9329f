"""`cakefs evict`: give up a model's bytes, which come back when they are read."""

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING

from cakefs.cli.options import add_json_option, config_of
from cakefs.cli.out import Out, counted, human_size
from cakefs.errors import UserError

if TYPE_CHECKING:
    from cakefs.plan.evict import Resident

HELP = "give up a model's bytes: it stays, and what is read is fetched again"
EPILOG = """\
Stays: what other models have as well, what a mount or another command uses at the moment,
what no address is known of, and what the model is shown by (headers, configuration, tokenizer).
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("model", metavar="MODEL", help="name as `cakefs ls` shows it")
    parser.add_argument("-n", "--dry-run", action="store_true", help="print the plan, delete nothing")
    add_json_option(parser)


def run(args: argparse.Namespace, out: Out) -> int:
    from cakefs.engine import evict
    from cakefs.engine.known.survey import find_model, open_store

    with open_store(config_of(args).store) as store:
        manifest = find_model(store, args.model)
        if store.catalog.models.all()[args.model].pinned:
            raise UserError(f"{args.model} is pinned", hint=f"cakefs unpin {args.model}")
        plan = evict.eviction_of(store, manifest)
        done = evict.evict(store, plan, spare_jobs=True, dry_run=args.dry_run)
    if args.json:
        out.json(
            {
                "model": args.model,
                "dry_run": args.dry_run,
                "bytes": done.bytes,
                "blobs": _rows(r for r in done.gone if not r.is_partial),
                "partials": _rows(r for r in done.gone if r.is_partial),
                "in_use": _rows(done.in_use),
            }
        )
    elif out.quiet:
        for resident in done.gone:
            out.line(str(resident.item))
    else:
        verb = "would free" if args.dry_run else "freed"
        out.line(f"{verb} {human_size(done.bytes)} of {args.model}, {_counted(done.gone)}")
        if not (done.gone or done.in_use):
            out.note("what it has here is in other models, borrowed, or what the model is shown by")
        if done.in_use:
            kept = sum(resident.size for resident in done.in_use)
            out.line(f"  {_counted(done.in_use)}, {human_size(kept)}, stay: a process uses them")
    return 0


def _counted(residents: "list[Resident]") -> str:
    partials = sum(resident.is_partial for resident in residents)
    kinds = (len(residents) - partials, "blob"), (partials, "unfinished transfer")
    return ", ".join(counted(number, noun) for number, noun in kinds if number) or "0 blobs"


def _rows(residents: "Iterable[Resident]") -> list[dict[str, object]]:
    return [_item(resident) | {"size": resident.size, "used": round(resident.used)} for resident in residents]


def _item(resident: "Resident") -> dict[str, object]:
    """A blob, or the span of a partial."""
    return {"span" if resident.is_partial else "digest": str(resident.item)}
