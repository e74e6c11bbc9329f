"""`cakefs evict`: give up a model's bytes, which come back when they are read."""

import argparse
from typing import TYPE_CHECKING

from cakefs.cli.options import add_json_option, config_of
from cakefs.cli.out import Out, counted, human_size
from cakefs.errors import UserError

if TYPE_CHECKING:
    from cakefs.plan.evict import Resident

HELP = "give up a model's bytes: it stays, and what is read is fetched again"
EPILOG = """\
Stays: what other models have as well, what a mount or another command uses at the moment,
what no address is known of, what the model is shown by (headers, configuration, tokenizer), and a tensor of
which only a part is here.
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
        if store.catalog.models()[args.model].pinned:
            raise UserError(f"{args.model} is pinned", hint=f"cakefs unpin {args.model}")
        plan = evict.eviction_of(store, manifest)
        done = evict.evict(store, plan, spare_jobs=True, dry_run=args.dry_run)
    if args.json:
        out.json(
            {
                "model": args.model,
                "dry_run": args.dry_run,
                "bytes": done.bytes,
                "blobs": _rows(done.blobs),
                "in_use": _rows(done.in_use),
            }
        )
    elif out.quiet:
        for blob in done.blobs:
            out.line(blob.digest)
    else:
        verb = "would free" if args.dry_run else "freed"
        out.line(f"{verb} {human_size(done.bytes)} of {args.model}, {counted(len(done.blobs), 'blob')}")
        if not (done.blobs or done.in_use):
            out.note("what it has here is in other models, borrowed, no whole tensor, or what the model is shown by")
        if done.in_use:
            kept = sum(blob.size for blob in done.in_use)
            out.line(f"  {counted(len(done.in_use), 'blob')}, {human_size(kept)}, stay: a process uses them")
    return 0


def _rows(blobs: "list[Resident]") -> list[dict[str, object]]:
    return [{"digest": blob.digest, "size": blob.size, "used": round(blob.used)} for blob in blobs]
