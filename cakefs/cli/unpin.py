"""`cakefs unpin`: the opposite of `pin.py`."""

import argparse

from cakefs.cli import pin
from cakefs.cli.out import Out

HELP = "let a limit or `evict` take the bytes of models again"
configure = pin.configure


def run(args: argparse.Namespace, out: Out) -> int:
    return pin.set_pinned(args, out, pinned=False)
