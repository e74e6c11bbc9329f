"""`cakefs gc`: delete what no model and no live mount refers to."""

import argparse
from typing import TYPE_CHECKING

from cakefs.cli.options import add_json_option, config_of, with_app
from cakefs.cli.out import Out, counted, human_size

if TYPE_CHECKING:
    from cakefs.plan.collect import GcPlan
    from cakefs.store.catalog import SpanPlace

HELP = "delete bytes that no model and no live mount refers to"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-n", "--dry-run", action="store_true", help="print the plan, delete nothing")
    add_json_option(parser)


def run(args: argparse.Namespace, out: Out) -> int:
    from cakefs.app import App
    from cakefs.engine import jobs

    async def collect(app: App) -> "GcPlan[SpanPlace]":
        return await jobs.gc(app.store, dry_run=args.dry_run)

    plan = with_app(config_of(args), collect)
    if args.json:
        out.json(_as_json(plan, dry_run=args.dry_run))
        return 0
    out.line(f"{'would free' if args.dry_run else 'freed'} {human_size(plan.bytes)}")
    for number, noun, size in (
        (len(plan.blobs), "blob", sum(plan.blobs.values())),
        (len(plan.partials), "unfinished transfer", sum(plan.partials.values())),
    ):
        if number:
            out.line(f"  {counted(number, noun)}, {human_size(size)}")
    if plan.manifests:
        out.line(f"  {counted(len(plan.manifests), 'description')} of removed or updated models")
    return 0


def _as_json(plan: "GcPlan[SpanPlace]", *, dry_run: bool) -> dict[str, object]:
    return {
        "dry_run": dry_run,
        "bytes": plan.bytes,
        "blobs": [{"digest": digest, "size": size} for digest, size in sorted(plan.blobs.items())],
        "partials": len(plan.partials),
        "partial_bytes": sum(plan.partials.values()),
        "manifests": plan.manifests,
    }
