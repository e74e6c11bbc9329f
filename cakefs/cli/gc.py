"""`cakefs gc`: delete what no model and no live mount refers to."""

import argparse
from typing import TYPE_CHECKING

from cakefs.cli.options import add_json_option, config_of
from cakefs.cli.out import Out, counted, human_size

if TYPE_CHECKING:
    from cakefs.plan.collect import GcPlan

HELP = "delete bytes that no model and no live mount refers to"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-n", "--dry-run", action="store_true", help="print the plan, delete nothing")
    add_json_option(parser)


def run(args: argparse.Namespace, out: Out) -> int:
    from cakefs.engine import jobs
    from cakefs.engine.known.survey import open_store

    with open_store(config_of(args).store) as store:
        plan = jobs.gc_plan(store) if args.dry_run else jobs.collect(store)
    if args.json:
        out.json(_as_json(plan, args.dry_run))
    elif out.quiet:
        for digest in plan.blobs:
            out.line(digest)
    else:
        _report(plan, "would free" if args.dry_run else "freed", out)
    return 0


def _report(plan: "GcPlan", verb: str, out: Out) -> None:
    out.line(f"{verb} {human_size(plan.bytes)}")
    for number, noun, size in (
        (len(plan.blobs), "blob", sum(plan.blobs.values())),
        (len(plan.partials), "unfinished transfer", sum(plan.partials.values())),
    ):
        if number:
            out.line(f"  {counted(number, noun)}, {human_size(size)}")
    if plan.set_aside:
        out.line(f"  {human_size(plan.set_aside)} set aside as wrong or damaged")
    if plan.manifests:
        out.line(f"  {counted(len(plan.manifests), 'manifest')} of models that were removed or updated")
    if plan.held:
        out.note(f"kept, as a mount or a pull still uses what was removed or updated: {', '.join(plan.held)}")


def _as_json(plan: "GcPlan", dry_run: bool) -> dict[str, object]:
    return {
        "dry_run": dry_run,
        "bytes": plan.bytes,
        "blobs": [{"digest": digest, "size": size} for digest, size in sorted(plan.blobs.items())],
        "partials": len(plan.partials),
        "partial_bytes": sum(plan.partials.values()),
        "set_aside_bytes": plan.set_aside,
        "manifests": plan.manifests,
        "held": plan.held,
    }
