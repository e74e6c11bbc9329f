"""`cakefs ls`: the models, and how much of each is here."""

import argparse

from cakefs.cli.options import add_json_option, config_of
from cakefs.cli.out import Out, human_size

HELP = "list the models: size, local and shared bytes, complete or verified"
EPILOG = """\
LOCAL     bytes that are here: in the store, or borrowed in place
SHARED    the part of LOCAL that other models here use as well
BORROWED  the part of LOCAL that lies in files of somebody else (`cakefs import`); only where there is any
STATE     the local part, complete, or verified: every published SHA-256 was found to be right; and whether
          some tensors are near-equal ones of another model (`cakefs add --substitute`), and it is pinned
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add_json_option(parser)


def run(args: argparse.Namespace, out: Out) -> int:
    from cakefs.engine.known.survey import summarize_models

    models = summarize_models(config_of(args).store)
    if args.json:
        out.json([model._asdict() for model in models])
        return 0
    sizes = {">SIZE": "size", ">LOCAL": "local_bytes", ">SHARED": "shared_bytes", ">BORROWED": "borrowed_bytes"}
    if not any(model.borrowed_bytes for model in models):
        del sizes[">BORROWED"]
    rows = [
        (m.name, *(human_size(getattr(m, field)) for field in sizes.values()), m.state + ", pinned" * m.pinned)
        for m in models
    ]
    out.table(("NAME", *sizes, "STATE"), rows)
    if not models:
        out.note("no models yet")
        out.hint("cakefs add org/name")
    return 0
