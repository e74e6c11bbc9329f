"""`cakefs ls`: the models, and how much of each is here."""

import argparse

from cakefs.cli.options import add_json_option, config_of
from cakefs.cli.out import Out, human_size

HELP = "list the models: size, local and shared bytes, complete or verified"
EPILOG = """\
LOCAL   bytes that are in the store
SHARED  the part of LOCAL that other models here use as well
STATE   the local part, complete, or verified: every published SHA-256 was found to be right
"""


def configure(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add_json_option(parser)


def run(args: argparse.Namespace, out: Out) -> int:
    from cakefs.engine.survey import summarize_models

    models = summarize_models(config_of(args).store)
    if args.json:
        out.json([model._asdict() for model in models])
        return 0
    out.table(
        ("NAME", ">SIZE", ">LOCAL", ">SHARED", "STATE"),
        [(m.name, human_size(m.size), human_size(m.local_bytes), human_size(m.shared_bytes), m.state) for m in models],
    )
    if not models:
        out.note("no models yet")
        out.hint("cakefs add org/name")
    return 0
