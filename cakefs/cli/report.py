"""`cakefs report`: a picture of what models share, as one HTML file."""

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cakefs.cli.options import add_json_option, config_of, without_gc
from cakefs.cli.out import Out, counted, human_size
from cakefs.errors import UserError

if TYPE_CHECKING:
    from cakefs.plan.report import Report

HELP = "draw which layers of which models are the same, what is here, and what that saves"
EPILOG = """\
One HTML file that needs no network, in the light or dark of whoever looks. Nothing is fetched. Equal is what has one
hash, or the same place in the same upstream file.

  cakefs report -o models.html
  cakefs report org/base org/fine-tune my-merge -o family.html
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("models", metavar="MODEL", nargs="*", help="names as `cakefs ls` shows them (default: all)")
    parser.add_argument("-o", "--output", metavar="FILE.html", help="the file to write, or to replace")
    add_json_option(parser)


def run(args: argparse.Namespace, out: Out) -> int:
    from cakefs.cli.report_page import page
    from cakefs.engine.known.report import report

    if args.output is None and not args.json:
        raise UserError("report needs a file to write", hint="-o FILE.html, or --json")
    with without_gc():
        found = report(config_of(args).store, args.models)
        if args.output is not None:
            _write(Path(args.output), page(found, time.strftime("%Y-%m-%d %H:%M")))
    if args.json:
        out.json(_as_json(found))
        return 0
    whole = found.whole
    what = f"{counted(len(found.models), 'model')}, {human_size(whole.copies)} as plain copies"
    out.result(args.output, f"wrote {args.output}: {what}, {human_size(whole.tensors)} with each tensor once")
    return 0


def _write(path: Path, text: str) -> None:
    """In one step: whoever has the old one open keeps it. What is no file, such as a device, is written to."""
    place = path.resolve()
    beside = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        if place.exists() and not place.is_file():
            place.write_text(text, encoding="utf-8")
            return
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, place)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def _as_json(report: "Report") -> dict[str, object]:
    names = [model.name for model in report.models]
    return {
        "whole": report.whole._asdict(),
        "here": report.here._asdict(),
        "families": [[names[number] for number in family] for family in report.families],
        "models": [
            {
                "name": model.name,
                "state": model.state,
                "size": model.size,
                "local_bytes": model.local,
                "shared_bytes": model.shared,
                "layers": model.layers,
                "shares_with": {names[other]: size for other, size in model.kin},
            }
            for model in report.models
        ],
    }
